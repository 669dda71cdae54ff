"""Lenses that carry a middle state to the last layer by an affine map before the readout reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class LensMaps:
    """For every row of a residual stream a map to the last one; the lens is ``W_U norm(weight h + bias)``.

    With the identity it is the logit lens. The readout's norm takes out the scale of what is mapped.
    """

    weight: Tensor
    """(layers, d, d)."""
    bias: Tensor
    """(layers, d)."""

    @classmethod
    def linear(cls, weight: Tensor) -> "LensMaps":
        """Maps without a bias."""
        return cls(weight, weight.new_zeros(weight.shape[:2]))

    @classmethod
    def mean(cls, parts: Sequence["LensMaps"]) -> "LensMaps":
        """The mean of several, as of Jacobians over texts."""
        return cls(sum_of([p.weight for p in parts]) / len(parts), sum_of([p.bias for p in parts]) / len(parts))

    def __call__(self, states: Tensor) -> Tensor:
        """(layers, n, d) states, each row through its own map."""
        return torch.baddbmm(self.bias[:, None], states, self.weight.mT)

    def permuted(self, seed: int, *, layers: bool = False) -> "LensMaps":
        """The same numbers at other places: a null that keeps what a map does to norms.

        Args:
            seed: Of the permutations.
            layers: Give every row the map of another one; else permute the outputs of every map, each in its own way.
        """
        generator = torch.Generator().manual_seed(seed)
        n, d = self.bias.shape
        if layers:
            order = torch.randperm(n, generator=generator)
            return LensMaps(self.weight[order], self.bias[order])
        rows = torch.stack([torch.randperm(d, generator=generator) for _ in range(n)])
        at = torch.arange(n)[:, None]
        return LensMaps(self.weight[at, rows], self.bias[at, rows])

    def save(self, file: Path) -> None:
        """Write both as safetensors, atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, partial)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> "LensMaps":
        """Read what ``save`` wrote."""
        return cls(**load_file(file))


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, in order, in the memory of one."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total
