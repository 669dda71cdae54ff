"""Residual streams at the last prompt token: one forward pass, every layer, nothing else kept."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from classifier_emergence.errors import InputError
from classifier_emergence.progress import progress
from classifier_emergence.reading.layers import layer_of
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import device_of
from classifier_emergence.reading.tree import batches, check_tokens, follows_masks, one_pass, row_inputs


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
        InputError: A prompt tokenises to nothing or to tokens that the model does not have, a state is not finite, or
            the model does not go by a mask and ``causal`` is False.
    """
    encoded = [_encode(lm.tokenizer, prompt) for prompt in prompts]
    if not encoded:
        raise InputError("prompts: none given")
    wanted = range(len(lm.layers)) if rows is None else rows
    states: Tensor | None = None
    with progress(description, total=sum(map(len, encoded))) as advance:
        for batch in batches(encoded):
            texts = [encoded[i] for i in batch]
            inputs, paths = one_pass(texts, lm.model) if causal else _all_seen(texts, lm.model)
            at_ends = states_at(lm, inputs, [path[-1] for path in paths], wanted)
            if states is None:
                states = at_ends.new_empty(len(at_ends), len(prompts), at_ends.shape[-1])
            states[:, batch] = at_ends
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
    at = torch.tensor(positions, device=device_of(lm.model))
    states: dict[int, Tensor] = {}

    def keep(row: int, output: Tensor) -> None:
        states[row] = output.flatten(0, 1)[at.to(output.device)].float().cpu()

    blocks = lm.blocks
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: keep(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    handles += [
        blocks[layer_of(row)].register_forward_hook(lambda _, __, output, row=row: keep(row, first_tensor(output)))
        for row in set(rows) - {0}
    ]
    with removing(handles), stopping_after(blocks[max(layer_of(max(rows)), 0)]):
        lm.model.get_decoder()(**inputs, use_cache=False)
    return torch.stack([states[row] for row in rows])


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not set(ids) - set(tokenizer.all_special_ids):
        raise InputError(f"prompt {prompt!r}: tokenises to nothing but special tokens; give it some text")
    return ids


def _all_seen(texts: Sequence[list[int]], model: PreTrainedModel) -> tuple[dict[str, Tensor], list[list[int]]]:
    """As ``one_pass``, but every token sees all of its text: a flaw."""
    if not follows_masks(model):
        raise InputError(
            f"model {type(model).__name__}: goes through a text from left to right, or by a mask of its own, so that "
            "no token can see later ones; choose another model for causal=False"
        )
    check_tokens([max(text) for text in texts], model)
    positions = [position for text in texts for position in range(len(text))]
    owner = torch.tensor([i for i, text in enumerate(texts) for _ in text])
    ids = [token for text in texts for token in text]
    inputs = row_inputs(ids, positions, owner[:, None] == owner, model)
    return inputs, [(owner == i).nonzero()[:, 0].tolist() for i in range(len(texts))]


def first_tensor(output: Any) -> Tensor:
    """The states that a block gives: some families' blocks give them alone, others in a tuple with more."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks off at the end of the ``with`` statement."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs_of(block: nn.Module | None) -> Iterator[list[Tensor]]:
    """The states that a block gives in the passes within, with their gradients; nothing of None."""
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        if block is not None:
            handle = block.register_forward_hook(lambda _, __, output: outputs.append(first_tensor(output)))
            hooks.callback(handle.remove)
        yield outputs


class _Stop(Exception):
    """Enough of the model has run."""


@contextmanager
def stopping_after(block: nn.Module) -> Iterator[None]:
    """End the forward pass within, and the body of the ``with`` statement, when the block has run.

    Hooks that were registered before see its output.
    """

    def stop(*_: object) -> None:
        raise _Stop

    with suppress(_Stop), removing([block.register_forward_hook(stop)]):
        yield
