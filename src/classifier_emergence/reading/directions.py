"""Directions of the residual stream projected on the vocabulary: is a probe's direction a word?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from classifier_emergence.reading.readout import Readout

CHUNK_ROWS = 16384


@dataclass(frozen=True)
class Projection:
    """One projection of several directions on the whole vocabulary."""

    score: Tensor
    """(directions, words): best score among a word's token ids."""
    rank: Tensor
    """(directions, words): rank of that score over the whole vocabulary; 1 is the top."""
    top_ids: Tensor
    """(directions, k): tokens with the highest scores."""
    top_scores: Tensor
    """(directions, k)."""


@torch.no_grad()
def project(
    directions: Tensor, readout: Readout, words: Sequence[Sequence[int]], *, cosine: bool, top: int = 10
) -> Projection:
    """Score every vocabulary row against every direction.

    With ``cosine`` the score is ``cos(v, g * W_U[t])``: the final norm multiplies the state by its gain g before the
    unembedding reads it, so ``g * W_U[t]`` is the direction that raises token t, and lengths are divided out. Without,
    it is the originals' score ``W_U[t] . v``: no gain, long rows win.

    Args:
        directions: (directions, d).
        readout: Of the model the directions live in.
        words: Token ids of each word.
        cosine: Which score.
        top: How many top tokens to keep.
    """
    directions = directions.float().to(readout.weight.device)
    if cosine:
        directions = normalize(directions, dim=-1)
    scores = torch.empty(len(directions), len(readout.weight), device=directions.device)
    for start in range(0, len(readout.weight), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        rows = normalize(readout.directions(part), dim=-1) if cosine else readout.rows(part)
        scores[:, start : start + CHUNK_ROWS] = directions @ rows.T
    best = torch.stack([scores[:, list(ids)].amax(-1) for ids in words], dim=-1)
    ordered = scores.sort(dim=-1).values
    # Rank = 1 + number of strictly higher scores.
    rank = 1 + scores.shape[1] - torch.searchsorted(ordered, best, right=True)
    top_scores, top_ids = scores.topk(min(top, scores.shape[1]), dim=-1)
    return Projection(best.cpu(), rank.cpu(), top_ids.cpu(), top_scores.cpu())


@torch.no_grad()
def largest_cosines(directions: Tensor, readout: Readout) -> Tensor:
    """(directions,) the largest cosine of each direction (directions, d) with a token; see ``project``.

    Holds one block of cosines at a time, so that directions may be many, as those of a null are.
    """
    unit = normalize(directions.float().to(readout.weight.device), dim=-1)
    largest = unit.new_full((len(unit),), -1.0)
    for start in range(0, len(readout.weight), CHUNK_ROWS):
        cosines = unit @ normalize(readout.directions(slice(start, start + CHUNK_ROWS)), dim=-1).T
        largest = torch.maximum(largest, cosines.amax(-1))
    return largest.cpu()
