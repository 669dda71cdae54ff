"""LoRA adapters on a frozen model: one, or several that train together, each on the rows of a batch that are its own.

The base product of a linear map is the same for every adapter, so it is one product for all rows; only the low-rank
updates are made adapter by adapter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.training.modules import Targets, targets

HEAD = "classifier_head"
ALONE = "default"
"""Name of an adapter that is the only one, and of the run that trains it; peft saves it at the top of a folder."""


@dataclass(frozen=True)
class Adapter:
    """Which linear maps get a low-rank update, ``W + (alpha / rank) B A``, B starting at zero.

    Source: Hu et al. (2021), LoRA, arXiv:2106.09685.
    """

    modules: tuple[str, ...]
    rank: int
    scale: float
    """alpha / rank."""
    layers: tuple[int, ...]
    """0-based blocks."""


@dataclass(frozen=True)
class Start:
    """What a run trains, as it is before the first step."""

    adapter: Adapter
    seed: int
    """Of the initial A."""
    classes: int | None = None
    """Also train a linear head with so many outputs, zero at first; see ``head_of``."""


@contextmanager
def adapted(lm: LanguageModel, adapter: Adapter, *, seed: int, classes: int | None = None) -> Iterator[PeftModel]:
    """The model with a fresh adapter, taken off again at the end; the base weights are never touched.

    Args:
        lm: Frozen.
        adapter: Where the update goes.
        seed: Of the initial A.
        classes: Also add a trainable linear head, zero at first; see ``head_of``.

    Raises:
        InputError: The model has no such layers, or one of them has no linear map of one of these names.

    Example:
        >>> with adapted(lm, Adapter(VO, rank=16, scale=2.0, layers=(0, 1, 2)), seed=0) as wrapped:
        ...     train(lm, wrapped, examples, Objective(0.4, layer=2), schedule, work=Path("run"))
    """
    with adapted_together(lm, {ALONE: Start(adapter, seed, classes)}) as wrapped:
        yield wrapped


@contextmanager
def adapted_together(lm: LanguageModel, starts: Mapping[str, Start]) -> Iterator[PeftModel]:
    """The model with fresh adapters, the first of them on; ``wrapped.set_adapter(name)`` puts on another.

    Each starts as it would alone.

    Args:
        lm: Frozen.
        starts: By the name of the run.

    Raises:
        InputError: As ``adapted``.
    """
    maps = {name: _maps(lm, start.adapter) for name, start in starts.items()}
    model, wrapped = lm.model, None
    heads = nn.ModuleDict({name: _fresh_head(lm, s.classes) for name, s in starts.items() if s.classes is not None})
    if heads:
        model.add_module(HEAD, heads)
    try:
        for name, start in starts.items():
            torch.manual_seed(start.seed)
            if wrapped is None:
                wrapped = get_peft_model(model, _config(start.adapter, maps[name]), adapter_name=name)
            else:
                wrapped.add_adapter(name, _config(start.adapter, maps[name]))
        assert wrapped is not None
        make_trainable(wrapped, list(starts))
        for name in starts:
            maps[name].confine(wrapped, name)
        yield wrapped
    finally:
        if wrapped is not None:
            wrapped.unload()
        if heads:
            delattr(model, HEAD)
        model.requires_grad_(False).eval()


def parameters_of(wrapped: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter and its head, by their full names."""
    # Not by the name alone: an adapter called "mlp" would own every MLP.
    owned = (f".lora_A.{name}.", f".lora_B.{name}.", f".{HEAD}.{name}.")
    return {full: p for full, p in wrapped.named_parameters() if any(part in full for part in owned)}


def head_of(lm: LanguageModel, name: str = ALONE) -> nn.Linear | None:
    """The linear head that trains with an adapter, if it has one."""
    heads = getattr(lm.model, HEAD, None)
    return heads[name] if heads is not None and name in heads else None


def make_trainable(wrapped: PeftModel, names: Sequence[str]) -> None:
    """Let these adapters and their heads require gradients, and nothing else; ``set_adapter`` leaves it to one."""
    wrapped.requires_grad_(False)
    for name in names:
        for parameter in parameters_of(wrapped, name).values():
            parameter.requires_grad_(True)


def copy_adapter(wrapped: PeftModel, source: str, copies: Sequence[str]) -> None:
    """Give the weights of one adapter, and of its head, to others of its shape."""
    values = list(parameters_of(wrapped, source).values())
    for name in copies:
        for parameter, value in zip(parameters_of(wrapped, name).values(), values, strict=True):
            parameter.data.copy_(value.data)


def save_adapter(wrapped: PeftModel, name: str, folder: Path) -> None:
    """Put an adapter on and save it, in peft's layout, at the top of a folder as if it were the only one."""
    wrapped.set_adapter(name)
    wrapped.save_pretrained(str(folder), selected_adapters=[name])
    if name != ALONE:  # peft gives it a folder of its own within
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()


@contextmanager
def each_its_own(wrapped: PeftModel, owners: Sequence[str]) -> Iterator[None]:
    """Within, every row of a batch passes with the adapter that owns it, whichever is on.

    peft can do this for inference (``adapter_names``); its in-place sums would copy all rows for every adapter on the
    way back.

    Args:
        wrapped: The model.
        owners: Names of adapters, one for each row; rows of one adapter stand together.
    """
    if set(owners) == set(wrapped.active_adapters):
        yield  # the layers' own forward does just that
        return
    rows = {name: [row for row, owner in enumerate(owners) if owner == name] for name in dict.fromkeys(owners)}
    layers = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.forward = partial(_forward_by_row, layer, rows)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_by_row(layer: Any, rows: Mapping[str, list[int]], x: Tensor) -> Tensor:
    """``W x + scale B A x``, with the A and B of each row's own adapter where the layer has one."""
    result: Tensor = layer.base_layer(x)
    alike: dict[tuple[int, int], list[str]] = {}
    for name in rows:
        if name in layer.lora_A:
            alike.setdefault((layer.r[name], len(rows[name])), []).append(name)
    for names in alike.values():  # of one rank: one batched product
        index = torch.tensor([row for name in names for row in rows[name]], device=x.device)
        down = torch.stack([layer.lora_A[name].weight * layer.scaling[name] for name in names])
        up = torch.stack([layer.lora_B[name].weight for name in names])
        own = x if len(index) == len(x) else x[index]
        update = (own.reshape(len(names), -1, x.shape[-1]) @ down.mT @ up.mT).view(*own.shape[:-1], -1)
        result = result + update if len(index) == len(x) else result.index_add(0, index, update)
    return result


def _config(adapter: Adapter, maps: Targets) -> LoraConfig:
    # A whole number where it is one but for rounding; peft declares no other, but only divides it by the rank.
    alpha = adapter.scale * adapter.rank
    whole = math.isclose(alpha, round(alpha))
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=round(alpha) if whole else alpha,  # type: ignore[arg-type]
        target_modules=list(maps.names),
        fan_in_fan_out=maps.transposed,
        layers_to_transform=list(adapter.layers),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def _fresh_head(lm: LanguageModel, classes: int) -> nn.Linear:
    head = nn.Linear(
        lm.model.config.get_text_config().hidden_size, classes, device=lm.model.device, dtype=lm.model.dtype
    )
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _maps(lm: LanguageModel, adapter: Adapter) -> Targets:
    for layer in adapter.layers or (-1,):  # peft takes no layers for all of them, and is content if any map is found
        if not 0 <= layer < lm.n_layers:
            raise InputError(f"layers: {adapter.layers}: the model has blocks 0 to {lm.n_layers - 1}")
    return targets(lm.model, lm.blocks, adapter.modules, adapter.layers)
