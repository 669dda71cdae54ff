"""The readout: final norm, then unembedding. What turns a residual stream into logits over the vocabulary."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from classifier_emergence.errors import InputError

_NORM_NAMES = (
    "norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm", "embedding_norm", "layer_norm",
    "ln_out", "out_norm",
)  # fmt: skip
_BLOCKS_NAMES = ("layers", "h", "blocks")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_offloaded: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Readout:
    """Final norm and unembedding of a model: ``logits(h) = cap((W_U norm(h) + b) / s)``, in float32.

    Weights that are held in half precision are widened as they are read.
    """

    norm: nn.Module
    """With OPT's map to the width of its embeddings (``projection``) after it, if it has one."""
    weight: Tensor
    """W_U, (vocabulary, d), as the model holds it; ``rows`` gives it in float32."""
    bias: Tensor | None
    divisor: float
    """Granite's ``logits_scaling``, one over Cohere's ``logit_scale``; else 1."""
    softcap: float | None
    """Gemma 2's ``final_logit_softcapping``, else None."""
    projection: Tensor | None = None
    """(d of the embeddings, d), or None."""

    def logits(self, states: Tensor) -> Tensor:
        """Logits of pre-norm states: (rows, d) -> (rows, vocabulary)."""
        return self.unembed(self.norm(states.to(self.weight.device)))

    def rows(self, tokens: slice | Tensor = slice(None)) -> Tensor:
        """Rows of the unembedding in float32; what is so already is not copied."""
        return self.weight[tokens].float()

    def unembed(self, normed: Tensor, tokens: slice | Tensor = slice(None), *, out: Tensor | None = None) -> Tensor:
        """Logits of some tokens from normed states.

        Args:
            normed: (rows, d) states after the final norm.
            tokens: Which rows of the unembedding.
            out: (rows, tokens) buffer to write into; fresh memory costs more than the arithmetic.
        """
        logits = torch.mm(normed.float(), self.rows(tokens).T, out=out)
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
        """(d,) elementwise gain of the final norm, so that ``norm(h) = gain * h / rms(h)`` for an RMS norm.

        Of ones where a projection follows it, for which ``directions`` has it.
        """
        if self.projection is not None:
            return torch.ones_like(self.rows(slice(1))[0])
        return self._gain(self.norm, self.weight.shape[1])

    def directions(self, tokens: slice | Tensor = slice(None)) -> Tensor:
        """(tokens, d of the states): what raises each token, ``gain * W_U[t]``, through the projection if any."""
        if self.projection is None:
            return self.rows(tokens) * self.gain
        assert isinstance(self.norm, nn.Sequential)
        width = self.projection.shape[1]
        return self.rows(tokens) @ self.projection * self._gain(self.norm[0], width)

    def _gain(self, norm: nn.Module, width: int) -> Tensor:
        if type(norm) is nn.LayerNorm and norm.weight is not None:
            return norm.weight.detach()
        # Families store the gain as g or as 1 + g, and some take out the mean or add a bias; what the module does to a
        # state of mean 0 and rms 1, and to its negative, is the gain.
        state = torch.ones(1, width, device=self.weight.device)
        state[:, 1::2] = -1
        up, down = norm(state), norm(-state)
        gain: Tensor = ((up - down) / 2 * state)[0]
        return gain


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks, in order.

    Raises:
        InputError: None found; names the model class.
    """
    decoder = model.get_decoder()
    blocks = _attribute(decoder, _BLOCKS_NAMES)
    if not isinstance(blocks, nn.ModuleList):  # under another name, but then as many as the configuration says
        n = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        lists = [part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part) == n]
        if len(lists) != 1:
            raise InputError(
                f"model {type(model).__name__}: no list of decoder blocks named {' or '.join(_BLOCKS_NAMES)}"
            )
        blocks = lists[0]
    return blocks


def find_readout(model: PreTrainedModel) -> Readout:
    """Final norm and unembedding of a causal language model, where the unembedding lies; the norm in float32.

    Raises:
        InputError: One of them cannot be found; names the model class and the part. A guess would give a lens that
            looks plausible and is wrong.
    """
    decoder = model.get_decoder()
    norm, out = _attribute(decoder, _NORM_NAMES), getattr(decoder, "project_out", None)
    if not isinstance(norm, nn.Module):
        if out is None:
            raise InputError(f"model {type(model).__name__}: no final norm named {' or '.join(_NORM_NAMES)}")
        norm = nn.Identity()  # OPT-350m norms within its blocks
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise InputError(f"model {type(model).__name__}: no unembedding (get_output_embeddings() gives {head!r})")
    config: Any = model.config.get_text_config()
    held = _held(head)
    weight = held["weight"]
    return Readout(
        norm=_widened(norm if out is None else nn.Sequential(norm, out), weight.device),
        weight=weight,
        bias=held.get("bias"),
        divisor=float(getattr(config, "logits_scaling", None) or 1.0) / _multiplier(model),
        softcap=next((cap for name in _CAPS if (cap := getattr(config, name, None)) is not None), None),
        projection=None if out is None else _held(out)["weight"].to(weight.device).float(),
    )


_checked: WeakSet[PreTrainedModel] = WeakSet()


@torch.no_grad()
def check_readout(model: PreTrainedModel, readout: Readout, ids: list[int]) -> None:
    """Compare the readout of the last block's output with the model's own output, once a model.

    The lens at the last block is the model's output by definition; a gap means a wrong norm, a norm applied twice, a
    wrong unembedding or an unknown scaling of the logits.

    Args:
        model: In evaluation mode.
        readout: From ``find_readout``.
        ids: A text.

    Raises:
        InputError: They differ by more than rounding; names the model class.
    """
    if model in _checked:
        return
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output)[:, -1])

    handle = decoder_blocks(model)[-1].register_forward_hook(keep)
    try:
        passing: Any = model
        own = passing(input_ids=torch.tensor([ids], device=device_of(model)), use_cache=False).logits[0, -1]
    finally:
        handle.remove()
    checked_gap(model, readout.logits(kept[0].float())[0].cpu(), own.float().cpu())
    _checked.add(model)


def checked_gap(model: PreTrainedModel, seen: Tensor, own: Tensor) -> float:
    """Largest absolute gap between log-probabilities of two rows of logits, the lens's and the model's own, in nats.

    Raises:
        InputError: It is more than rounding.
    """
    gap = float((own.log_softmax(-1) - seen.log_softmax(-1)).abs().max())
    tolerance = max(1e-3, 4 * torch.finfo(model.dtype).eps * float(own.abs().max()))
    if not gap <= tolerance:
        raise InputError(
            f"model {type(model).__name__}: the lens at the last layer misses the model's own log-probabilities by "
            f"{gap:.2g} nats (at most {tolerance:.2g} is rounding); its readout is not final norm, then unembedding"
        )
    return gap


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs; the CPU for one whose embedding accelerate keeps on the disk."""
    device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def _multiplier(model: PreTrainedModel) -> float:
    """Cohere's and Falcon-H1's factor of the logits."""
    holders = ((model, "logit_scale"), (model.get_decoder(), "lm_head_multiplier"))
    return float(next((value for part, name in holders if (value := getattr(part, name, None)) is not None), 1.0))


def _widened(norm: nn.Module, device: torch.device) -> nn.Module:
    """The norm itself if it is float32 on the device, else a copy that is."""
    tensors = list(norm.parameters())
    if all(tensor.dtype == torch.float32 and tensor.device == device for tensor in tensors):
        return norm
    with _in_memory(norm):
        wide = _unhooked(copy.deepcopy(norm)).to(device=device, dtype=torch.float32)
    wide.register_forward_pre_hook(lambda _, args: (args[0].float(),))  # states come as the blocks hold them
    return wide


def _held(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module, also where accelerate keeps them on the disk; those are read once."""
    tensors = {name: tensor.detach() for name, tensor in module.named_parameters(recurse=False)}
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        if module not in _offloaded:
            with _in_memory(module):
                _offloaded[module] = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
        return _offloaded[module]
    return tensors


@contextmanager
def _in_memory(module: nn.Module) -> Iterator[None]:
    """Hold the weights of a module, and of those within it, that accelerate keeps on the disk."""
    with ExitStack() as stack:
        for part in module.modules():
            if any(tensor.device.type == "meta" for tensor in part.parameters(recurse=False)):
                from accelerate.utils import align_module_device  # it is there, for it has put them on the disk

                stack.enter_context(align_module_device(part, execution_device=torch.device("cpu")))
        yield


def _unhooked(module: nn.Module) -> nn.Module:
    if any(hasattr(part, "_hf_hook") for part in module.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module, recurse=True)
    return module


def _attribute(module: nn.Module, names: tuple[str, ...]) -> object:
    return next((part for name in names if (part := getattr(module, name, None)) is not None), None)
