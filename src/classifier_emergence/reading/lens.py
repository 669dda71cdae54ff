"""The logit lens: what the readout says of every layer, without ever holding layers x prompts x vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from classifier_emergence.errors import InputError
from classifier_emergence.progress import progress
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import Readout, checked_gap, device_of
from classifier_emergence.reading.residuals import residual_stream

CHUNK_ROWS = 1024
CHUNK_TOKENS = 1920  # with the rows 8 MiB of logits; see _count for the bound


@dataclass(frozen=True)
class LensScores:
    """Scores of words at every layer and prompt; all arrays start (layers, prompts, ...)."""

    log_alignment: Tensor
    """(layers, prompts, words): log of a word's alignment, the total probability of its token ids; nats."""
    rank: Tensor
    """(layers, prompts, ranked words): best rank among a word's ids over the whole vocabulary; 1 is the top. The last
    axis follows ``ranked[prompt]``."""
    top_id: Tensor
    """(layers, prompts): the most probable token."""
    top_prob: Tensor
    """(layers, prompts): its probability."""


@torch.no_grad()
def lens_scores(
    states: Tensor,
    readout: Readout,
    words: Sequence[Sequence[int]],
    *,
    ranked: Sequence[Sequence[int]] | None = None,
    description: str | None = None,
) -> LensScores:
    """Apply the logit lens (nostalgebraist, 2020): ``softmax(logits(h_l))`` over the full vocabulary.

    The vocabulary is swept in blocks that share one buffer and stay in cache; of each row only the probabilities of
    the wanted words, their ranks and the top token are kept. Ranks are counted on logits: log-probabilities tie in
    float32.

    Args:
        states: (layers, prompts, d) pre-norm residual streams.
        readout: Of the same model.
        words: Token ids of each word; a word's alignment is the sum over its ids.
        ranked: For each prompt the words (indices) whose ranks are wanted, equally many; default all words. Each rank
            costs a pass over the vocabulary.
        description: Shown with the progress bar.

    Raises:
        InputError: A word has no token id, or one that the readout does not have.
    """
    for position, ids in enumerate(words):
        if not len(ids):
            raise InputError(f"word {position}: no single-token form in this vocabulary, so it has no alignment")
        if max(ids) >= len(readout.weight):
            raise InputError(
                f"word {position}: token {max(ids)}, but the readout has {len(readout.weight)}; the tokenizer knows "
                "more, so call model.resize_token_embeddings(len(tokenizer))"
            )
    n_layers, n_prompts, d = states.shape
    device = readout.weight.device  # where the unembedding lies; the states come to it block by block
    wanted_ranks = torch.tensor([range(len(words))] * n_prompts if ranked is None else ranked, device=device)
    rows = states.reshape(-1, d)
    flat = torch.tensor([i for ids in words for i in ids], device=device)
    owner = torch.tensor([w for w, ids in enumerate(words) for _ in ids], device=device)

    log_alignment = torch.empty(len(rows), len(words))
    rank = torch.empty(len(rows), wanted_ranks.shape[1], dtype=torch.int64)
    top_id = torch.empty(len(rows), dtype=torch.int64)
    top_prob = torch.empty(len(rows))
    with progress(description, total=len(rows)) as advance:
        for start in range(0, len(rows), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            normed = readout.norm(rows[part].to(device))
            wanted = readout.unembed(normed, flat)
            best = _reduce_words(wanted, owner, len(words), "amax")
            prompt = torch.arange(start, start + len(normed), device=device) % n_prompts
            top, top_id[part], log_total, above = _sweep(normed, readout, best.gather(1, wanted_ranks[prompt]))
            rank[part] = 1 + above
            top_prob[part] = (top - log_total).exp()
            mass = _reduce_words((wanted - best[:, owner]).exp(), owner, len(words), "sum")
            log_alignment[part] = mass.log() + best - log_total[:, None]
            advance(len(normed))
    shape = (n_layers, n_prompts)
    return LensScores(log_alignment.view(*shape, -1), rank.view(*shape, -1), top_id.view(shape), top_prob.view(shape))


def _sweep(normed: Tensor, readout: Readout, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over the vocabulary in blocks that stay in cache.

    Returns:
        Per row the largest logit, its token, the log of the summed exponentials (rescaled as the maximum grows), and
        per threshold how many logits lie above it.
    """
    n, vocabulary, device = len(normed), len(readout.weight), normed.device
    top, top_id = torch.full((n,), -torch.inf, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    total = torch.zeros(n, device=device)
    above = torch.zeros(thresholds.shape, dtype=torch.int64, device=device)
    # The thresholds come from another matrix product than the blocks; a word must not rank below itself by rounding.
    thresholds = thresholds + 1e-6 * thresholds.abs()
    buffer = torch.empty(n, CHUNK_TOKENS, device=device)
    is_above = torch.zeros(n, CHUNK_TOKENS, dtype=torch.bool, device=device)
    for start in range(0, vocabulary, CHUNK_TOKENS):
        width = min(CHUNK_TOKENS, vocabulary - start)
        if width < CHUNK_TOKENS:
            buffer, is_above = torch.empty(n, width, device=device), torch.zeros_like(is_above)
        logits = readout.unembed(normed, slice(start, start + width), out=buffer)
        for k in range(thresholds.shape[1]):
            torch.gt(logits, thresholds[:, k, None], out=is_above[:, :width])
            above[:, k] += _count(is_above)
        block_top, block_id = logits.max(dim=-1)
        higher = torch.maximum(top, block_top)
        # e^-80 adds nothing to a sum of at least 1; below it lie denormal numbers, which cost twenty times as much.
        total = total * (top - higher).exp() + logits.sub_(higher[:, None]).clamp_(min=-80).exp_().sum(-1)
        top_id = torch.where(block_top > top, block_id + start, top_id)
        top = higher
    return top, top_id, top + total.log(), above


def _count(flags: Tensor) -> Tensor:
    """True entries a row: eight bytes are added at a time, twenty times faster than ``torch.count_nonzero``.

    A byte holds at most 255, so rows may have at most 8 * 255 flags, and a multiple of 8.
    """
    return flags.view(torch.int64).sum(-1, keepdim=True).view(torch.uint8).sum(-1)


def _reduce_words(values: Tensor, owner: Tensor, n_words: int, reduce: str) -> Tensor:
    out = values.new_zeros(len(values), n_words)
    return out.scatter_reduce(1, owner.expand(len(values), -1), values, reduce, include_self=False)


@torch.no_grad()
def check_lens(lm: LanguageModel) -> float:
    """Largest absolute gap between lens log-probabilities at the last layer and the model's own, in nats.

    As ``check_readout``, but the state is taken where prompts pass together, so that a gap may also mean that they see
    one another.

    Raises:
        InputError: It is more than rounding, or there is no readout; names the model class.
    """
    prompts = ["7 * 8 =", "7 * 5 + 3 =", "12 - 4 ="]
    ids = torch.tensor([lm.tokenizer(prompts[0])["input_ids"]], device=device_of(lm.model))
    model: Any = lm.model
    expected = model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
    last = residual_stream(lm, prompts)[-1, :1]
    return checked_gap(lm.model, lm.readout.logits(last)[0].cpu(), expected)
