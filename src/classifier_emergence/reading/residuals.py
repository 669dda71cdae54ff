"""Residual streams at the last prompt token: one forward pass, every layer, nothing else kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from classifier_emergence.errors import InputError
from classifier_emergence.progress import progress
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.tree import batches, one_pass


@torch.no_grad()
def residual_stream(
    lm: LanguageModel,
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
        lm: Any causal language model; its tokenizer adds special tokens as it does by default. The adapter that it
            carries, if any, is on.
        prompts: Read position is the last token of each. What they begin with passes once.
        causal: False lets every position see every other, the flaw of the originals' extraction loop.
        rows: Keep these only, and stop after the block that the last of them comes from; default all.
        description: Shown with the progress bar.

    Returns:
        (n_layers + 1, prompts, d), or as many rows as were asked for.

    Raises:
        InputError: A prompt tokenises to nothing, or a state is not finite.
    """
    encoded = [_encode(lm.tokenizer, prompt) for prompt in prompts]
    if not encoded:
        raise InputError("prompts: none given")
    wanted = range(len(lm.layers)) if rows is None else rows
    states: Tensor | None = None
    with progress(description, total=sum(map(len, encoded))) as advance:
        for batch in batches(encoded):
            texts = [encoded[i] for i in batch]
            inputs, places = one_pass(texts, lm.model) if causal else _all_seen(texts, lm.model)
            found = states_at(lm, inputs, [place[-1] for place in places], wanted)
            if states is None:
                states = found.new_empty(len(found), len(prompts), found.shape[-1])
            states[:, batch] = found
            advance(sum(map(len, texts)))
    assert states is not None
    if not states.isfinite().all():
        where = int((~states.isfinite()).any(dim=(0, 2)).nonzero()[0])
        raise InputError(f"prompt {prompts[where]!r}: the model's residual stream is not finite (NaN or infinity)")
    return states


def states_at(lm: LanguageModel, inputs: dict[str, Tensor], positions: Sequence[int], rows: Sequence[int]) -> Tensor:
    """(rows, positions, d) pre-norm states of one pass, which stops after the block that the last row comes from.

    Args:
        lm: Its decoder is passed.
        inputs: Of its decoder.
        positions: Among the flattened states (batch * width, d).
        rows: Of the residual stream; 0 is the first block's input.
    """
    with _kept_states(lm, positions, rows) as states:
        lm.model.get_decoder()(**inputs, use_cache=False)
    return torch.stack([states[row] for row in rows]).float().cpu()


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not set(ids) - set(tokenizer.all_special_ids):
        raise InputError(f"prompt {prompt!r}: tokenises to nothing but special tokens; give it some text")
    return ids


def _all_seen(texts: Sequence[list[int]], model: PreTrainedModel) -> tuple[dict[str, Tensor], list[list[int]]]:
    """As ``one_pass``, but every token sees all of its text: a flaw."""
    positions = [position for text in texts for position in range(len(text))]
    owner = torch.tensor([i for i, text in enumerate(texts) for _ in text])
    hidden = torch.zeros(len(owner), len(owner), dtype=model.dtype)
    hidden = hidden.masked_fill(owner[:, None] != owner, torch.finfo(model.dtype).min)
    inputs = {
        "input_ids": torch.tensor([[token for text in texts for token in text]], device=model.device),
        "attention_mask": hidden[None, None].to(model.device),  # a 4-D mask is taken as it stands
        "position_ids": torch.tensor([positions], device=model.device),
    }
    return inputs, [(owner == i).nonzero()[:, 0].tolist() for i in range(len(texts))]


@contextmanager
def _kept_states(lm: LanguageModel, positions: Sequence[int], rows: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect some positions of the first block's input and of blocks' outputs, and stop after the last of them."""
    states: dict[int, Tensor] = {}
    blocks = lm.blocks
    at = torch.tensor(positions, device=lm.model.device)

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states[0] = (args[0] if args else kwargs["hidden_states"]).flatten(0, 1)[at]

    def after(row: int) -> Any:
        def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states[row] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)[at]

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
