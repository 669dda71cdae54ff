"""The logit lens: what the readout says of every layer, without ever holding layers x prompts x vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from classifier_emergence.errors import InputError
from classifier_emergence.progress import progress
from classifier_emergence.readout import Readout, find_readout
from classifier_emergence.residuals import residual_stream

CHUNK_BYTES = 64 * 2**20


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

    Rows go through the unembedding in chunks that share one buffer; of each row only the probabilities of the wanted
    words, their ranks and the top token are kept. Ranks are counted on logits: log-probabilities tie in float32.

    Args:
        states: (layers, prompts, d) pre-norm residual streams.
        readout: Of the same model.
        words: Token ids of each word; a word's alignment is the sum over its ids.
        ranked: For each prompt the words (indices) whose ranks are wanted, equally many; default all words. Each rank
            costs a pass over the vocabulary.
        description: Shown with the progress bar.

    Raises:
        InputError: A word has no token id.
    """
    for position, ids in enumerate(words):
        if not len(ids):
            raise InputError(f"word {position}: no single-token form in this vocabulary, so it has no alignment")
    n_layers, n_prompts, d = states.shape
    wanted_ranks = torch.tensor([range(len(words))] * n_prompts if ranked is None else ranked)
    rows = states.reshape(-1, d)
    vocabulary = len(readout.weight)
    chunk = max(1, min(len(rows), CHUNK_BYTES // (4 * vocabulary)))
    buffer = torch.empty(chunk, vocabulary)
    flat = torch.tensor([i for ids in words for i in ids])
    owner = torch.tensor([w for w, ids in enumerate(words) for _ in ids])

    log_alignment = torch.empty(len(rows), len(words))
    rank = torch.empty(len(rows), wanted_ranks.shape[1], dtype=torch.int64)
    top_id = torch.empty(len(rows), dtype=torch.int64)
    top_prob = torch.empty(len(rows))
    with progress(description, total=len(rows)) as advance:
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            logits = readout.logits(rows[part], out=buffer)
            wanted = logits[:, flat]
            best = _reduce_words(wanted, owner, len(words), "amax")
            prompt = torch.arange(start, start + len(logits)) % n_prompts
            rank[part] = _ranks(logits, best.gather(1, wanted_ranks[prompt]))
            top, top_id[part] = logits.max(dim=-1)
            # In place: a second chunk-sized tensor would cost more than the exponentials.
            total = logits.sub_(top[:, None]).exp_().sum(-1)
            top_prob[part] = 1 / total
            mass = _reduce_words((wanted - best[:, owner]).exp(), owner, len(words), "sum")
            log_alignment[part] = mass.log() + best - (top + total.log())[:, None]
            advance(len(logits))
    shape = (n_layers, n_prompts)
    return LensScores(
        log_alignment.view(*shape, -1), rank.view(*shape, -1), top_id.view(shape), top_prob.view(shape)
    )


def _ranks(logits: Tensor, values: Tensor) -> Tensor:
    # numpy, row by row: comparison and count stay in cache, ten times faster than torch.count_nonzero.
    pairs = zip(logits.numpy(), values.numpy(), strict=True)
    return torch.tensor([[1 + np.count_nonzero(row > value) for value in wanted] for row, wanted in pairs])


def _reduce_words(values: Tensor, owner: Tensor, n_words: int, reduce: str) -> Tensor:
    out = values.new_zeros(len(values), n_words)
    return out.scatter_reduce(1, owner.expand(len(values), -1), values, reduce, include_self=False)


@torch.no_grad()
def check_lens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, tolerance: float = 1e-3) -> float:
    """Largest absolute gap between lens log-probabilities at the last layer and the model's own, in nats.

    The lens at the last block is the model's output by definition; a gap means a wrong norm, a norm applied twice, a
    wrong unembedding or an unknown scaling of the logits.

    Raises:
        InputError: The gap exceeds ``tolerance``; names the model class.
    """
    prompt = "7 * 8 ="
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu().log_softmax(-1)
    last = residual_stream(model, tokenizer, [prompt])[-1]
    gap = float((own - find_readout(model).logits(last)[0].log_softmax(-1)).abs().max())
    if not gap <= tolerance:
        raise InputError(
            f"model {type(model).__name__}: the lens at the last layer misses the model's own log-probabilities by "
            f"{gap:.2g} nats (at most {tolerance:g} is rounding); its readout is not final norm, then unembedding"
        )
    return gap
