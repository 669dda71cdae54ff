"""Rows of routers projected on the vocabulary: cosines with every token, in one pass over the unembedding.

What raises an expert's score is its row times the gain of the norm in front of the router; what raises a token is its
unembedding row times the final norm's gain. The cosine of the two asks whether an expert reads a token's direction.
What all experts share, or all tokens, decides nothing and is taken out of either: rows of rare tokens lie near their
mean, and with it in them a row that reads such a token is like half of the vocabulary and stands out for none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor
from torch.nn.functional import normalize

from classifier_emergence.errors import InputError
from classifier_emergence.mixtures.routers import RouterWeights
from classifier_emergence.progress import progress

BLOCK_ROWS = 2048
"""Rows of the unembedding that are held, and scored, at once: their scores stay in cache between the passes."""
RUN = 256
"""Rows of each run that ``mean_row`` reads."""


@dataclass(frozen=True)
class Directions:
    """Directions of the residual stream to compare with the vocabulary, (..., d)."""

    rows: Tensor
    gains: bool
    """Whether a token's direction is ``g_f * (W_U[t] - mean W_U)``, what raises it above others, or ``W_U[t]``."""


def reported(weights: RouterWeights) -> Directions:
    """The originals' directions: router rows as they are stored, (L, E, d), against unembedding rows as stored."""
    return Directions(weights.weight.float(), gains=False)


def controlled(weights: RouterWeights) -> Directions:
    """What really decides: (L, E, d) rows ``g_l * (R[e] - mean_e R)``, against ``g_f * (W_U[t] - mean W_U)``.

    The gains are those of the norms through which router and unembedding read the residual stream. What all experts of
    a layer share changes neither who is chosen nor with what weight (a softmax, and an order, do not see it), so it
    says nothing about an expert and is taken out; so is what all tokens share.
    """
    rows = weights.weight.float()
    return Directions((rows - rows.mean(1, keepdim=True)) * weights.gain.float()[:, None], gains=True)


def mean_row(weights: RouterWeights) -> Tensor:
    """(d,) float32 mean row of the unembedding: of all, or of a large vocabulary of sixteen evenly spaced runs."""
    vocabulary = weights.vocabulary
    starts = range(0, vocabulary, max(RUN, -(-vocabulary // 16)))
    total, n = torch.zeros(weights.final_gain.shape[0], dtype=torch.float64), 0
    for start in starts:
        rows = weights.checkpoint.read(weights.unembedding, slice(start, min(start + RUN, vocabulary)))
        total, n = total + rows.float().sum(0), n + len(rows)
    return (total / n).float()


def token_directions(weights: RouterWeights, ids: Sequence[int]) -> Tensor:
    """(n, d) directions of tokens as controlled rows are compared with them: ``g_f * (W_U[t] - mean W_U)``."""
    rows = [weights.checkpoint.read(weights.unembedding, slice(i, i + 1)).float() for i in ids]
    return (torch.cat(rows) - mean_row(weights)) * weights.final_gain.float()


def random_rows(rows: Tensor, n: int, *, seed: int) -> Tensor:
    """(L, n, d) random rows with the norm and the covariance that the rows (L, E, d) of the other layers have.

    The null of a projection. Rows are normal, with the covariance of other layers' rows, each less its layer's mean and
    of length 1: not of the layer's own, so that what is looked for is no part of its null. d is larger than there are
    rows, so the covariance is shrunk towards that of an isotropic row, as much as Ledoit and Wolf find best: with rows
    that share nothing nearly all the way, and where a few dimensions dominate they do in the null as well. With one
    layer it is isotropic.

    Raises:
        InputError: There are fewer than two rows a layer, of which nothing is left when their mean is taken out.

    Source: Ledoit and Wolf (2004), A well-conditioned estimator for large-dimensional covariance matrices, Journal of
    Multivariate Analysis 88.
    """
    layers, experts, width = rows.shape
    if min(n, experts) < 2:
        raise InputError(f"experts: {min(n, experts)}: a null needs at least 2 rows a layer")
    generator = torch.Generator().manual_seed(seed)
    null: Tensor = torch.randn(layers, n, width, generator=generator) / width**0.5
    seen = normalize(rows.float() - rows.float().mean(1, keepdim=True), dim=-1)
    for layer in range(layers if layers > 1 else 0):
        others = torch.cat([seen[:layer], seen[layer + 1 :]]).flatten(0, 1)
        shrunk = float(ledoit_wolf_shrinkage(others.double().numpy(), assume_centered=True))
        mixed = torch.randn(n, len(others), generator=generator) @ others / len(others) ** 0.5
        null[layer] = shrunk**0.5 * null[layer] + (1 - shrunk) ** 0.5 * mixed
    return null


def random_routers(weights: RouterWeights, experts: int, *, seed: int) -> RouterWeights:
    """Routers with so many random rows a layer; gains and the vocabulary stay what they are. See ``random_rows``."""
    return replace(weights, weight=random_rows(weights.weight, experts, seed=seed), bias=None)


def planted(rows: Tensor, tokens: Tensor, cosines: Sequence[float]) -> Directions:
    """(cosines, n, d): rows (n, d) turned towards the directions of tokens (n, d) until they have these cosines.

    Args:
        rows: Controlled ones.
        tokens: Of ``token_directions``, one for each.
        cosines: Within -1..1.
    """
    along = normalize(tokens, dim=-1)
    across = normalize(rows - (rows * along).sum(-1, keepdim=True) * along, dim=-1)
    weight = torch.tensor(cosines)[:, None, None]
    return Directions(weight * along + (1 - weight.square()).sqrt() * across, gains=True)


@dataclass(frozen=True)
class RouterProjection:
    """Cosines of directions (...) with the whole vocabulary."""

    top_ids: Tensor
    """(..., k): tokens with the highest scores."""
    top_scores: Tensor
    """(..., k) float32."""
    mean: Tensor
    """(...) float64 mean over the vocabulary; a z-score is ``(score - mean) / std``."""
    std: Tensor
    """(...) float64 standard deviation over the vocabulary (divided by V)."""
    score: Tensor
    """(..., words): best score among a word's token ids."""
    rank: Tensor
    """(..., words): rank of that score over the vocabulary, 1 + number of strictly higher; 1 is the top."""

    @property
    def z(self) -> Tensor:
        """(...) z-score of the top token: how far it stands out of the direction's own scores."""
        return (self.top_scores[..., 0] - self.mean) / self.std


@dataclass(frozen=True)
class TokenRows:
    """Unembedding rows that a projection kept: of every token at a top of a set with gains, and of those asked for."""

    ids: Tensor
    """(m,) token ids, ascending."""
    rows: Tensor
    """(m, d) in the stored dtype."""
    mean: Tensor
    """(d,) ``mean_row``."""
    final_gain: Tensor
    """(d,)."""

    def of(self, ids: Tensor) -> Tensor:
        """(..., d) float32 directions of unit length, as a controlled projection scores tokens (...) that were kept.

        Raises:
            InputError: A token was not kept.
        """
        at = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        if not torch.equal(self.ids[at], ids):
            raise InputError(f"ids: {int(ids[self.ids[at] != ids][0])} was not kept; name it in keep")
        return normalize((self.rows[at].float() - self.mean) * self.final_gain.float(), dim=-1)


@torch.no_grad()
def project_routers(
    weights: RouterWeights,
    sets: Sequence[Directions],
    *,
    top: int = 10,
    words: Sequence[Sequence[int]] = (),
    keep: Sequence[int] = (),
    block_rows: int = BLOCK_ROWS,
    description: str | None = None,
) -> tuple[list[RouterProjection], TokenRows]:
    """Cosine of every direction with every token, in one pass over the unembedding for all sets.

    Memory: n x (block_rows + d + 2 top) numbers for n directions, block_rows x d, and the rows that are kept.

    Args:
        weights: Whose checkpoint holds the unembedding.
        sets: Such as ``[reported(weights), controlled(weights), controlled(random_routers(weights, 32, seed=0))]``.
        top: How many top tokens to keep.
        words: Token ids of each word whose best score and rank are wanted.
        keep: Other tokens whose rows are wanted.
        block_rows: Rows of the unembedding held at once.
        description: Shown with the progress bar.

    Raises:
        InputError: ``top`` or ``block_rows`` is not positive, a word has no ids or one outside the vocabulary, or the
            unembedding holds NaN or infinity.
    """
    vocabulary, checkpoint = weights.vocabulary, weights.checkpoint
    if top < 1 or block_rows < 1:
        raise InputError(f"top, block_rows: {top}, {block_rows}: both must be at least 1")
    for ids in (*words, keep or [0]):
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise InputError(f"words, keep: {list(ids)[:9]}: pass at least one id, each within 0..{vocabulary - 1}")
    # One by one and first: a rank counts what is above a score that must be known before the pass.
    wanted = sorted({i for ids in words for i in ids})
    width = weights.final_gain.shape[0]
    read = [checkpoint.read(weights.unembedding, slice(i, i + 1)) for i in wanted]
    rows = torch.cat(read) if read else torch.empty(0, width)
    gain, mean = weights.final_gain.float(), mean_row(weights)
    folded = {True: (rows.float() - mean) * gain, False: rows.float()}
    sweeps = [_Sweep(each, folded[each.gains], wanted, words, top) for each in sets]
    asked = torch.tensor(sorted({*wanted, *keep}), dtype=torch.int64)
    kept = _Kept(width)
    finite = True
    with progress(description, total=vocabulary) as advance:
        for start in range(0, vocabulary, block_rows):
            stored = checkpoint.read(weights.unembedding, slice(start, min(start + block_rows, vocabulary)))
            block = stored.float()
            finite &= bool(block.isfinite().all())
            tokens: dict[bool, Tensor] = {}
            if any(not each.gains for each in sets):
                tokens[False] = normalize(block, dim=-1)
            if any(each.gains for each in sets):
                tokens[True] = normalize((block - mean) * gain, dim=-1)
            for each, sweep in zip(sets, sweeps, strict=True):
                sweep.add(tokens[each.gains], start)
            tops = [sweep.top_ids.flatten() for each, sweep in zip(sets, sweeps, strict=True) if each.gains]
            needed = torch.cat([asked, *tops]).unique()
            kept.add(stored, start, needed)
            advance(len(block))
    if not finite:
        raise InputError(f"{checkpoint.root}: {weights.unembedding} holds NaN or infinity; download it again")
    projections = [sweep.finish(each.rows.shape[:-1], vocabulary) for each, sweep in zip(sets, sweeps, strict=True)]
    return projections, TokenRows(*kept.of(needed), mean, weights.final_gain)


class _Kept:
    """Rows of tokens, gathered block by block. Most leave the tops again: they are dropped when they are the most.

    They go into room that is taken at once: small pieces between the blocks' would keep freed memory from being used.
    """

    def __init__(self, width: int) -> None:
        self.ids = torch.empty(0, dtype=torch.int64)
        self.room = torch.empty(0, width)

    def add(self, stored: Tensor, start: int, needed: Tensor) -> None:
        """Take what is needed of a block that begins at token ``start``."""
        new = needed[(needed >= start) & (needed < start + len(stored))]
        if len(self.ids) + len(new) > len(self.room):
            self.ids, rows = self.of(needed)
            if len(self.room) < 2 * len(needed):
                self.room = stored.new_empty(2 * len(needed), stored.shape[1])
            self.room[: len(rows)] = rows
        self.room[len(self.ids) : len(self.ids) + len(new)] = stored[new - start]
        self.ids = torch.cat([self.ids, new])

    def of(self, needed: Tensor) -> tuple[Tensor, Tensor]:
        """Ids, ascending, and rows of the tokens that are still needed."""
        stays = torch.isin(self.ids, needed)
        return self.ids[stays], self.room[: len(self.ids)][stays]


class _Sweep:
    """What is known of one set of directions after some blocks of the vocabulary."""

    def __init__(
        self, directions: Directions, wanted: Tensor, ids: list[int], words: Sequence[Sequence[int]], top: int
    ) -> None:
        self.rows = normalize(directions.rows.float(), dim=-1).flatten(0, -2)
        self.ids = torch.tensor(ids, dtype=torch.int64)
        self.exact = self.rows @ normalize(wanted, dim=-1).T  # (n, wanted)
        columns = {i: column for column, i in enumerate(ids)}
        n = len(self.rows)
        best = [self.exact[:, [columns[i] for i in word]].amax(-1) for word in words]
        self.best = torch.stack(best, dim=-1) if best else torch.empty(n, 0)
        self.higher = torch.zeros(n, len(words), dtype=torch.int64)
        self.total, self.squares = torch.zeros(2, n, dtype=torch.float64)
        self.top = top
        self.top_scores, self.top_ids = torch.empty(n, 0), torch.empty(n, 0, dtype=torch.int64)

    def add(self, tokens: Tensor, start: int) -> None:
        """Score a block of tokens."""
        scores = self.rows @ tokens.T
        # A product of another shape rounds otherwise: a token would rank below itself.
        inside = (self.ids >= start) & (self.ids < start + len(tokens))
        scores[:, self.ids[inside] - start] = self.exact[:, inside]
        self.total += scores.sum(-1)
        self.squares += torch.linalg.vector_norm(scores, dim=-1).double().square()
        for column in range(self.higher.shape[1]):
            self.higher[:, column] += (scores > self.best[:, column, None]).sum(-1)
        if self.top_ids.shape[1] < self.top:
            changed = torch.arange(len(scores))
        else:  # the more tokens have been seen, the fewer directions find a better one in a block
            changed = (scores.amax(-1) > self.top_scores[:, -1]).nonzero()[:, 0]
        best, at = scores[changed].topk(min(self.top, scores.shape[1]), dim=-1)
        together = torch.cat([self.top_scores[changed], best], -1)
        ids = torch.cat([self.top_ids[changed], at + start], -1)
        best, kept = together.topk(min(self.top, together.shape[1]), dim=-1)
        if len(changed) == len(scores):
            self.top_scores, self.top_ids = best, ids.gather(-1, kept)
        else:
            self.top_scores[changed], self.top_ids[changed] = best, ids.gather(-1, kept)

    def finish(self, shape: torch.Size, vocabulary: int) -> RouterProjection:
        """The result, in the shape of the directions."""
        mean = self.total / vocabulary
        std = (self.squares / vocabulary - mean.square()).clamp(min=0).sqrt()
        parts = (self.top_ids, self.top_scores, mean, std, self.best, 1 + self.higher)
        return RouterProjection(*(part.unflatten(0, shape) for part in parts))
