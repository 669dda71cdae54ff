"""Residual streams at the last prompt token: one forward pass, every layer, nothing else kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from classifier_emergence.errors import InputError
from classifier_emergence.progress import progress
from classifier_emergence.readout import decoder_blocks

BATCH_TOKENS = 512  # more gains nothing on two cores, and activations outgrow what malloc reuses


@torch.no_grad()
def residual_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    causal: bool = True,
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
        description: Shown with the progress bar.

    Returns:
        (n_layers + 1, prompts, d).

    Raises:
        InputError: A prompt tokenises to nothing, or a state is not finite.
    """
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    rows: Tensor | None = None
    with progress(description, total=sum(map(len, encoded))) as advance:
        for batch in batches([len(ids) for ids in encoded]):
            states = _forward([encoded[i] for i in batch], model, tokenizer, causal=causal)
            if rows is None:
                rows = states.new_empty(len(states), len(prompts), states.shape[-1])
            rows[:, batch] = states
            advance(sum(len(encoded[i]) for i in batch))
    if rows is None:
        raise InputError("prompts: none given")
    if not rows.isfinite().all():
        where = int((~rows.isfinite()).any(dim=(0, 2)).nonzero()[0])
        raise InputError(f"prompt {prompts[where]!r}: the model's residual stream is not finite (NaN or infinity)")
    return rows


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
    batch: list[list[int]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, causal: bool
) -> Tensor:
    width = max(map(len, batch))
    pad = tokenizer.pad_token_id or 0  # masked, so any id serves where the tokenizer has none
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    attention_mask: Tensor = mask
    if not causal:  # a 4-D mask is taken as it stands: only padding stays hidden
        hidden = torch.zeros(mask.shape, dtype=model.dtype, device=model.device)
        hidden = hidden.masked_fill(mask == 0, torch.finfo(model.dtype).min)
        attention_mask = hidden[:, None, None, :].expand(-1, 1, width, -1)
    with _last_token_states(model) as states:
        model.get_decoder()(input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
    return torch.stack(states).float().cpu()


@contextmanager
def _last_token_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the last position of the first block's input and of every block's output, in order."""
    states: list[Tensor] = []
    blocks = decoder_blocks(model)

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[:, -1])

    def after(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[:, -1])

    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
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
