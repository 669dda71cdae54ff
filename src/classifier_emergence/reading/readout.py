"""The readout: final norm, then unembedding. What turns a residual stream into logits over the vocabulary."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from classifier_emergence.errors import InputError

_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
_BLOCKS_NAMES = ("layers", "h", "blocks")


@dataclass(frozen=True)
class Readout:
    """Final norm and unembedding of a model: ``logits(h) = cap(W_U norm(h) + b) / s``."""

    norm: nn.Module
    weight: Tensor
    """W_U, (vocabulary, d)."""
    bias: Tensor | None
    divisor: float
    """Granite's ``logits_scaling``, else 1."""
    softcap: float | None
    """Gemma 2's ``final_logit_softcapping``, else None."""

    def logits(self, states: Tensor) -> Tensor:
        """Logits of pre-norm states: (rows, d) -> (rows, vocabulary)."""
        return self.unembed(self.norm(states))

    def unembed(self, normed: Tensor, tokens: slice | Tensor = slice(None), *, out: Tensor | None = None) -> Tensor:
        """Logits of some tokens from normed states.

        Args:
            normed: (rows, d) states after the final norm.
            tokens: Which rows of the unembedding.
            out: (rows, tokens) buffer to write into; fresh memory costs more than the arithmetic.
        """
        logits = torch.mm(normed, self.weight[tokens].T, out=out)
        if self.bias is not None:
            logits += self.bias[tokens]
        if self.divisor != 1.0:
            logits /= self.divisor
        if self.softcap is not None and logits.requires_grad:  # the gradient needs the tanh
            logits = self.softcap * (logits / self.softcap).tanh()
        elif self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    @property
    def gain(self) -> Tensor:
        """(d,) elementwise gain of the final norm, so that ``norm(h) = gain * h / rms(h)`` for an RMS norm."""
        if isinstance(self.norm, nn.LayerNorm):
            return self.norm.weight.detach()
        # Families store the gain as g or as 1 + g; what the module does to the all-ones state (rms 1) is the gain.
        ones: Tensor = self.norm(torch.ones(1, self.weight.shape[1]))
        return ones[0]


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks, in order.

    Raises:
        InputError: None found; names the model class.
    """
    blocks = _attribute(model.get_decoder(), _BLOCKS_NAMES)
    if not isinstance(blocks, nn.ModuleList):
        raise InputError(f"model {type(model).__name__}: no list of decoder blocks named {' or '.join(_BLOCKS_NAMES)}")
    return blocks


def find_readout(model: PreTrainedModel) -> Readout:
    """Final norm and unembedding of a causal language model.

    Raises:
        InputError: One of them cannot be found; names the model class and the part. A guess would give a lens that
            looks plausible and is wrong.
    """
    norm = _attribute(model.get_decoder(), _NORM_NAMES)
    if not isinstance(norm, nn.Module):
        raise InputError(f"model {type(model).__name__}: no final norm named {' or '.join(_NORM_NAMES)}")
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise InputError(f"model {type(model).__name__}: no unembedding (get_output_embeddings() gives {head!r})")
    config: Any = model.config.get_text_config()
    return Readout(
        norm=norm,
        weight=head.weight.detach(),
        bias=None if getattr(head, "bias", None) is None else head.bias.detach(),
        divisor=float(getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _attribute(module: nn.Module, names: tuple[str, ...]) -> object:
    return next((part for name in names if (part := getattr(module, name, None)) is not None), None)
