"""What MLPs and experts write: what they add to the residual stream at the last token of a prompt.

A router's row is what an expert reads; what it writes is the other half. In the vocabulary of experts of Ternovtsii and
Bilak (2026), arXiv:2604.14434, output vectors go through the unembedding; an expert of full rank has no one output
vector, so here it is the mean over prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import first_tensor
from classifier_emergence.reading.sites import site_states
from classifier_emergence.reading.tree import batches, one_pass


@dataclass(frozen=True)
class Written:
    """What is added to the stream of width d at B blocks."""

    total: Tensor
    """(B, prompts, d): by the MLP, or by the experts that the router chooses, weighted and added."""
    experts: Tensor | None
    """(B, E, d): by each expert alone, whether the router chooses it or not: mean over prompts. None of a dense MLP."""


@torch.no_grad()
def written(lm: LanguageModel, prompts: Sequence[Sequence[int]], blocks: Sequence[int]) -> Written:
    """What MLPs add to the residual stream at the last token of prompts.

    Args:
        lm: Dense, or a mixture of a family that ``routers.load_routers`` knows: norm, then MLP or experts.
        prompts: Token ids of each.
        blocks: Numbers of the blocks, either all with a router or all without.

    Raises:
        InputError: A block has no such norm.
    """
    rows = [layer_row(block) for block in blocks]
    before: Tensor | None = None
    for batch in batches(prompts):
        inputs, paths = one_pass([prompts[i] for i in batch], lm.model)
        states = site_states(lm, inputs, [path[-1] for path in paths], rows, "resid_mid")
        if before is None:
            before = states.new_empty(len(rows), len(prompts), states.shape[-1])
        before[:, batch] = states
    assert before is not None
    totals, experts = [], []
    for number, states in zip(blocks, before, strict=True):
        block: Any = lm.blocks[number]
        mlp = getattr(block, "mlp", None) or block.block_sparse_moe
        read = block.post_attention_layernorm(states.to(lm.model.device, lm.model.dtype))
        totals.append(first_tensor(mlp(read[None]))[0].float().cpu())
        if hasattr(mlp, "experts"):
            experts.append(_each(mlp.experts, read))
    return Written(torch.stack(totals), torch.stack(experts) if experts else None)


def _each(experts: Any, read: Tensor) -> Tensor:
    """(E, d): the mean output of every expert where all goes to it alone."""
    chosen = torch.zeros(len(read), 1, dtype=torch.int64, device=read.device)
    alone = torch.ones(len(read), 1, dtype=read.dtype, device=read.device)
    means = [experts(read, chosen + e, alone).float().mean(0).cpu() for e in range(experts.num_experts)]
    return torch.stack(means)
