"""Completions drawn and scored: a prompt passes through the model once for all completions that answer it.

Source: prompts that a group shares pass once in Prefix Grouper, Liu et al. (2025), arXiv:2506.05433.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.kernels import ChunkedLogProbFunction

from classifier_emergence.errors import InputError
from classifier_emergence.readout import Readout, find_readout

BLOCK_TOKENS = 4096  # vocabulary rows whose logits are held at once: they stay in cache


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    rows: Sequence[int],
    *,
    new_tokens: int,
    temperature: float,
    stop: Sequence[int],
) -> list[list[int]]:
    """Draw completions, several of a prompt from one pass over it.

    Args:
        model: Base model; the adapter that it carries, if any, is on.
        prompts: Token ids.
        rows: For each completion the prompt that it answers.
        new_tokens: Completions end here at the latest.
        temperature: Logits are divided by it.
        stop: Tokens that end a completion; they are part of it.

    Returns:
        Token ids of each completion, drawn with torch's global generator.

    Raises:
        InputError: The model's logits are not finite.
    """
    decoder, readout, device = model.get_decoder(), find_readout(model), model.device
    width, at = max(map(len, prompts)), torch.tensor(rows, device=device)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    seen = _decode(decoder, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))
    cache = seen.past_key_values
    cache.batch_select_indices(at)
    state, mask, position = seen.last_hidden_state[at, -1], mask[at], mask.sum(-1, keepdim=True)[at]
    ends = torch.tensor(list(stop), device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    drawn: list[Tensor] = []
    while True:
        logits = readout.unembed(state).float() / temperature
        if not logits.isfinite().all():
            raise InputError("model: its logits are not finite; if it is in training, choose a smaller learning_rate")
        token = torch.multinomial(logits.softmax(-1), 1)
        drawn.append(token)
        done |= torch.isin(token[:, 0], ends)
        if done.all() or len(drawn) == new_tokens:
            break
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        state = _decode(decoder, token, mask, position, cache).last_hidden_state[:, -1]
        position = position + 1
    texts: list[list[int]] = torch.cat(drawn, dim=1).tolist()
    return [text[: next((i + 1 for i, t in enumerate(text) if t in set(stop)), len(text))] for text in texts]


def line_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that hold a line break, as byte-level, SentencePiece and byte-fallback vocabularies spell it."""
    return sorted(i for token, i in tokenizer.get_vocab().items() if "\n" in token or "Ċ" in token or token == "<0x0A>")


def sequence_log_probs(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(rows, width - 1) log-probability of every token given those before, 0 for padding and the first token."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    asked = (mask[:, 1:] == 1) & (mask[:, :-1] == 1)
    states = output.last_hidden_state[:, :-1][asked]
    found, _ = token_log_probs(states, live_readout(model), ids[:, 1:][asked])
    return torch.zeros(asked.shape, device=found.device).masked_scatter(asked, found)


def completion_states(model: PreTrainedModel, ids: Tensor, mask: Tensor, start: int) -> Tensor:
    """(rows, completion width, d) normed states that predict the completions' tokens."""
    prompts, seen, rows = distinct_rows(ids[:, :start], mask[:, :start])
    decoder = model.get_decoder()
    output = _decode(decoder, prompts, seen, (seen.cumsum(-1) - 1).clamp(min=0))
    last: Tensor = output.last_hidden_state[rows, -1:]
    if ids.shape[1] - start == 1:
        return last
    cache = output.past_key_values
    cache.batch_select_indices(rows)
    positions = seen.sum(-1)[rows, None] + torch.arange(ids.shape[1] - start - 1, device=ids.device)
    later = _decode(decoder, ids[:, start:-1], mask[:, :-1], positions, cache).last_hidden_state
    return torch.cat([last, later], dim=1)


def _decode(decoder: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Any:
    return decoder(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)


def distinct_rows(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask of the distinct rows, and for each row its number among them."""
    both, rows = torch.cat([ids, mask], dim=1).unique(dim=0, return_inverse=True)
    return both[:, : ids.shape[1]], both[:, ids.shape[1] :], rows


def token_log_probs(
    normed: Tensor, readout: Readout, target: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of target tokens and entropy of the distribution, (rows,) each, in nats."""
    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
        normed,
        readout.weight,
        readout.bias,
        target,
        temperature,
        BLOCK_TOKENS,
        readout.softcap,
        1 / readout.divisor,
        ("entropy",),
    )
    return log_probs, entropy


def live_readout(model: PreTrainedModel) -> Readout:
    """The readout, its unembedding with the gradient that ``find_readout`` cuts off."""
    head: Any = model.get_output_embeddings()
    return replace(find_readout(model), weight=head.weight, bias=getattr(head, "bias", None))


def base_of(model: Any) -> PreTrainedModel:
    """The model itself, without the wrapper of its adapter."""
    found: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base: PreTrainedModel = found
    return base
