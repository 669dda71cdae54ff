"""Residual streams at the last prompt token: one forward pass, every layer, nothing else kept.

Tokens that all texts begin with (solved problems, an instruction) pass through the model once.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from classifier_emergence.errors import InputError
from classifier_emergence.progress import progress
from classifier_emergence.readout import decoder_blocks

BATCH_TOKENS = 512  # more gains nothing on two cores, and activations outgrow what malloc reuses
WORTH_SHARING = 8  # tokens; fewer gain less than the pass of their own costs


@torch.no_grad()
def residual_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    causal: bool = True,
    rows: Sequence[int] | None = None,
    description: str | None = None,
) -> Tensor:
    """Pre-norm residual stream at the last token of each prompt.

    Row 0 is the input of the first block (the embedding, scaled as the model scales it), row i+1 the output of block
    i. transformers replaces its last hidden state by the normed one; hooks do not have that trap.

    Args:
        model: Any causal language model of transformers, in memory.
        tokenizer: Its tokenizer; special tokens are added as it does by default.
        prompts: Read position is the last token of each. Batches are left-padded.
        causal: False lets every position see every other, the flaw of the originals' extraction loop.
        rows: Keep these only, and stop after the block that the last of them comes from; default all.
        description: Shown with the progress bar.

    Returns:
        (n_layers + 1, prompts, d), or as many rows as were asked for.

    Raises:
        InputError: A prompt tokenises to nothing, or a state is not finite.
    """
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    if not encoded:
        raise InputError("prompts: none given")
    start = Start(model, encoded if causal else [])
    wanted = range(len(decoder_blocks(model)) + 1) if rows is None else rows
    states: Tensor | None = None
    with progress(description, total=sum(map(len, encoded))) as advance:
        for batch in batches([len(ids) - len(start.ids) for ids in encoded]):
            found = _forward([encoded[i] for i in batch], model, tokenizer, start, wanted, causal=causal)
            if states is None:
                states = found.new_empty(len(found), len(prompts), found.shape[-1])
            states[:, batch] = found
            advance(sum(len(encoded[i]) for i in batch))
    assert states is not None
    if not states.isfinite().all():
        where = int((~states.isfinite()).any(dim=(0, 2)).nonzero()[0])
        raise InputError(f"prompt {prompts[where]!r}: the model's residual stream is not finite (NaN or infinity)")
    return states


class Start:
    """The tokens that all texts begin with, and the model's keys and values for them.

    Args:
        model: Base model; the adapter that it carries, if any, is on.
        texts: Token ids. At least one token of each is left to pass by itself.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[list[int]]) -> None:
        shared = shared_start(texts)
        self.ids: list[int] = list(texts[0][:shared]) if shared else []
        self._cache: Any = None
        if self.ids:
            ids = torch.tensor([self.ids], device=model.device)
            self._cache = model.get_decoder()(input_ids=ids, use_cache=True).past_key_values

    def cache(self, n: int) -> Any:
        """For a batch of ``n`` texts, which may append to it; None if they share nothing."""
        if self._cache is None:
            return None
        found = copy.deepcopy(self._cache)
        found.batch_repeat_interleave(n)
        return found


def shared_start(texts: Sequence[list[int]]) -> int:
    """Number of tokens that all texts begin with, the last token of none among them; 0 if too few to gain by it."""
    if len(texts) < 2:
        return 0
    first, last = min(texts), max(texts)  # of all texts these two differ soonest
    limit = min(map(len, texts)) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), limit)
    return same if (same := min(same, limit)) >= WORTH_SHARING else 0


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not set(ids) - set(tokenizer.all_special_ids):
        raise InputError(f"prompt {prompt!r}: tokenises to nothing but special tokens; give it some text")
    return ids


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts, by ascending length, in batches of at most ``BATCH_TOKENS`` with their padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[i] * (len(batch) + 1) > BATCH_TOKENS:  # the newest is the longest of its batch
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _forward(
    batch: list[list[int]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    start: Start,
    rows: Sequence[int],
    *,
    causal: bool,
) -> Tensor:
    shared = len(start.ids)
    width = max(map(len, batch)) - shared
    pad = tokenizer.pad_token_id or 0  # masked, so any id serves where the tokenizer has none
    gaps = [width + shared - len(row) for row in batch]
    ids = torch.tensor([[pad] * gap + row[shared:] for gap, row in zip(gaps, batch, strict=True)], device=model.device)
    mask = torch.tensor([[1] * shared + [0] * gap + [1] * (width - gap) for gap in gaps], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:]
    attention_mask: Tensor = mask
    if not causal:  # a 4-D mask is taken as it stands: only padding stays hidden
        hidden = torch.zeros(mask.shape, dtype=model.dtype, device=model.device)
        hidden = hidden.masked_fill(mask == 0, torch.finfo(model.dtype).min)
        attention_mask = hidden[:, None, None, :].expand(-1, 1, width, -1)
    cache = start.cache(len(batch))
    with _last_token_states(model, rows) as states:
        model.get_decoder()(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return torch.stack([states[row] for row in rows]).float().cpu()


@contextmanager
def _last_token_states(model: PreTrainedModel, rows: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the last position of the first block's input and of blocks' outputs, and stop after the last of them."""
    states: dict[int, Tensor] = {}
    blocks = decoder_blocks(model)

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states[0] = (args[0] if args else kwargs["hidden_states"])[:, -1]

    def after(row: int) -> Any:
        def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states[row] = (output[0] if isinstance(output, tuple) else output)[:, -1]

        return keep

    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [blocks[row - 1].register_forward_hook(after(row)) for row in set(rows) - {0}]
    try:
        with stopping_after(blocks[max(*rows, 1) - 1]):
            yield states
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):
    """Enough of the model has run."""


@contextmanager
def stopping_after(block: nn.Module) -> Iterator[None]:
    """End the forward pass within, and the body of the ``with`` statement, when the block has run.

    Hooks that were registered before see its output.
    """

    def stop(*_: object) -> None:
        raise _Stop

    handle = block.register_forward_hook(stop)
    try:
        yield
    except _Stop:
        pass
    finally:
        handle.remove()


@contextmanager
def scaled_attention(model: PreTrainedModel, scale: float) -> Iterator[None]:
    """Multiply what every attention block adds to the residual stream by ``scale``: a flaw, switched on.

    The originals' Granite multiplied attention *outputs* by 1/64, a number that belongs to the softmax. In families
    that norm the attention output before adding it (Gemma's sandwich), the norm would undo a factor on the attention
    itself, so the factor goes on the normed output there.
    """
    handles = []
    for block in decoder_blocks(model):
        sandwich = hasattr(block, "pre_feedforward_layernorm")
        branch = block.post_attention_layernorm if sandwich else getattr(block, "self_attn", None)
        if not isinstance(branch, nn.Module):
            raise InputError(f"model {type(model).__name__}: no attention module named self_attn to scale")
        handles.append(branch.register_forward_hook(lambda _, __, output: _scaled(output, scale)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scaled(output: Tensor | tuple[Tensor, ...], scale: float) -> Tensor | tuple[Tensor, ...]:
    return (output[0] * scale, *output[1:]) if isinstance(output, tuple) else output * scale
