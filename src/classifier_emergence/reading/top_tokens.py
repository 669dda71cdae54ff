"""The lens with its runners-up: the most probable tokens, the entropy and words, for every layer and position."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from classifier_emergence.progress import progress
from classifier_emergence.reading.readout import Readout

CHUNK_ROWS = 128


@dataclass(frozen=True)
class TopTokens:
    """What the readout says; arrays start (layers, positions)."""

    ids: Tensor
    """(layers, positions, k): the most probable tokens, in order."""
    probability: Tensor
    """(layers, positions, k)"""
    entropy: Tensor
    """(layers, positions), in nats."""
    alignment: Tensor
    """(layers, positions, words): total probability of a word's token ids."""
    rank: Tensor
    """(layers, positions, words): best rank among them; 1 is the top of the vocabulary."""


@torch.no_grad()
def top_tokens(
    states: Tensor, readout: Readout, words: Sequence[Sequence[int]], k: int, *, description: str | None = None
) -> TopTokens:
    """Apply the logit lens and keep the ``k`` most probable tokens of every state.

    Holds ``CHUNK_ROWS`` rows of logits at once. ``lens.lens_scores`` is faster where the top token is enough.

    Args:
        states: (layers, positions, d) pre-norm residual streams.
        readout: Of the same model.
        words: Token ids of each word, possibly none.
        k: Tokens to keep; at most the vocabulary.
        description: Shown with the progress bar.
    """
    rows = states.reshape(-1, states.shape[-1])
    parts: list[tuple[Tensor, ...]] = []
    with progress(description, total=len(rows)) as advance:
        for part in rows.split(CHUNK_ROWS):
            logits = readout.logits(part)
            top, ids = logits.topk(min(k, logits.shape[1]))
            of_words = [logits[:, list(word)] for word in words]
            best = [scores.amax(-1, keepdim=True) for scores in of_words]
            rank = [1 + (logits > one).sum(-1, dtype=torch.int32) for one in best]  # int64 is slow
            below = logits.sub_(top[:, :1]).clamp_(min=-80)  # else exp() gives denormal numbers, which are slow
            odds = below.exp()
            sums = odds.sum(-1, keepdim=True)
            total = top[:, :1] + sums.log()
            mass = [(scores - total).exp().sum(-1) for scores in of_words]
            probability = (top - total).exp()
            entropy = sums.log()[:, 0] - torch.linalg.vecdot(odds, below) / sums[:, 0]
            empty = total.new_empty(len(part), 0)
            parts.append((ids, probability, entropy, torch.stack(mass, -1) if mass else empty,
                          torch.stack(rank, -1).long() if rank else empty.long()))  # fmt: skip
            advance(len(part))
    shape = states.shape[:2]
    return TopTokens(*(torch.cat(field).cpu().unflatten(0, shape) for field in zip(*parts, strict=True)))
