"""The originals' flaws, to be switched on one by one: what does each of them do to a number?"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import removing


@contextmanager
def scaled_attention(lm: LanguageModel, scale: float) -> Iterator[None]:
    """Multiply what every attention block adds to the residual stream by ``scale``: a flaw, switched on.

    The originals' Granite multiplied attention *outputs* by 1/64, a number that belongs to the softmax. In families
    that norm the attention output before adding it (Gemma's sandwich), the norm would undo a factor on the attention
    itself, so the factor goes on the normed output there.
    """
    branches = []
    for block in lm.blocks:
        sandwich = hasattr(block, "pre_feedforward_layernorm")
        branch = block.post_attention_layernorm if sandwich else getattr(block, "self_attn", None)
        if not isinstance(branch, nn.Module):
            raise InputError(f"model {type(lm.model).__name__}: no attention module named self_attn to scale")
        branches.append(branch)
    with removing([b.register_forward_hook(lambda _, __, output: _scaled(output, scale)) for b in branches]):
        yield


@contextmanager
def scaled_embeddings(lm: LanguageModel, scale: float) -> Iterator[None]:
    """Multiply the embedding by ``scale``: a flaw, switched on.

    The originals' Granite left its ``embedding_multiplier`` of 12 out, so that a state is mostly what blocks add to it.
    """
    with removing([lm.model.get_input_embeddings().register_forward_hook(lambda _, __, output: output * scale)]):
        yield


def _scaled(output: Tensor | tuple[Tensor, ...], scale: float) -> Tensor | tuple[Tensor, ...]:
    return (output[0] * scale, *output[1:]) if isinstance(output, tuple) else output * scale


@contextmanager
def forgotten(wrapped: PeftModel, modules: Sequence[str]) -> Iterator[None]:
    """The adapter that is on, as a loader restores it that forgets some kinds of modules (``("k_proj", "o_proj")``)."""
    endings = tuple(f".{module}.lora_B.{wrapped.active_adapter}" for module in modules)
    lost: list[nn.Module] = [m for name, m in wrapped.named_modules() if name.endswith(endings)]
    if not lost:
        raise InputError(f"modules: the adapter has none of {', '.join(modules)} to forget")
    weights = [m.get_parameter("weight") for m in lost]
    kept = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.data.zero_()
    try:
        yield
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.data.copy_(values)


@torch.no_grad()
def round_to_dtype_(tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Round tensors, in place, to numbers that ``dtype`` has."""
    for tensor in tensors:
        tensor.copy_(tensor.to(dtype))


class HeldInDtype(TrainerCallback):
    """Weights and the optimiser's moments as numbers of a dtype, rounded after every step: a flaw of the originals.

    A step smaller than half the distance to the next number is lost. What is computed from them is computed in 32 bits:
    it is the rounding of weights that such training is about, and processors without arithmetic of 16 bits are twenty
    times slower at it. Moments stay in 32 bits where the dtype has not their range: in float16 squares of gradients are
    0, and a step divides by nothing.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Round."""
        round_to_dtype_((p for p in kwargs["model"].parameters() if p.requires_grad), self.dtype)
        if torch.finfo(self.dtype).tiny > torch.finfo(torch.bfloat16).tiny:
            return
        moments = kwargs["optimizer"].state.values()
        round_to_dtype_((moment[name] for moment in moments for name in ("exp_avg", "exp_avg_sq")), self.dtype)


class UncorrectedMoments(TrainerCallback):
    """Adam without the correction of moments that start at 0: a flaw of the originals, by their optimiser's default.

    Step t is then ``(1 - b1^t) / sqrt(1 - b2^t)`` times as long: 3.2 times at first, 6.6 times at most (about step 12),
    6.2 times in step 20 and 3.2 times in step 100.

    Source: ``mlx.optimizers.AdamW``, with ``bias_correction=False``; Kingma and Ba (2015), arXiv:1412.6980, section 3.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lengthen the step that comes; the schedule sets the rate anew after it."""
        step = state.global_step + 1
        for group in kwargs["optimizer"].param_groups:
            first, second = (1 - beta**step for beta in group["betas"])
            group["lr"] = args.learning_rate * first / second**0.5
