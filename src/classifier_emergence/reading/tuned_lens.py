"""The tuned lens: for every layer an affine map after which the readout says what the model's last layer says.

``KL(softmax(W_U norm(h_L)) || softmax(W_U norm(A_l h_l + b_l)))`` is minimised over positions of a corpus.

Source: Belrose et al. (2023), Eliciting Latent Predictions from Transformers with the Tuned Lens, arXiv:2303.08112.
Two things differ from the original, because text and time are limited. A map starts not at the identity but at the
best, on validation text, of the identity and ridge regressions on the last state (Din et al., 2023, Jump to
Conclusions, arXiv:2303.09435). And a step's softmax runs over the tokens that the model finds most probable at its
positions and a fresh sample of all others, weighted to stand for them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from classifier_emergence.progress import progress
from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.reading.readout import Readout

RIDGES = (0.001, 0.01, 0.1, 1.0)
"""Penalties of the regressions, as shares of the inputs' variance."""
CHUNK_POSITIONS = 32
"""Of the divergence over the full vocabulary."""


@dataclass(frozen=True)
class Tuning:
    """How maps are trained: by Adam at a rate that decays to zero along a half cosine, all layers at once."""

    steps: int
    positions: int
    """Of a step."""
    learning_rate: float
    """On inputs of unit deviation in every dimension, and outputs of unit mean square."""
    every: int
    """Steps between looks at the validation states; each layer keeps its best map."""
    top: int
    """Most probable tokens of each position that are in the softmax of a step."""
    tail: int
    """Other tokens that stand for the rest."""


def tuned_maps(
    states: Tensor,
    validation: Tensor,
    readout: Readout,
    tuning: Tuning,
    *,
    seed: int,
    description: str | None = None,
) -> LensMaps:
    """Train a map for every row but the last, whose map is the identity.

    Args:
        states: (layers, positions, d) pre-norm states; the last row is the model's own.
        validation: The same of other texts: of each layer the map with the least divergence there is kept, those that
            it may start from among them.
        readout: Of the model.
        tuning: How.
        seed: Of the positions of every step and the sampled tokens.
        description: Shown with the progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    target, out = states[-1], states[-1].square().mean().sqrt()
    scale = states[:-1].std(1, keepdim=True)
    scale = scale.clamp(min=1e-3 * float(scale.mean()))
    inputs, held = states[:-1] / scale, validation[:-1] / scale
    judged = _Vocabulary(readout, validation[-1], tuning, generator)
    best_weight, best_bias = torch.diag_embed(scale[:, 0]) / out, torch.zeros_like(scale[:, 0])
    best = torch.full((len(inputs),), torch.inf)

    @torch.no_grad()
    def keep_better(weight: Tensor, bias: Tensor) -> None:
        nonlocal best
        now = judged.divergence(LensMaps(weight, bias)(held)).mean(-1)
        better = now < best
        best = torch.where(better, now, best)
        best_weight[better], best_bias[better] = weight[better], bias[better]

    keep_better(best_weight.clone(), best_bias.clone())
    for ridge in RIDGES:
        keep_better(*_regression(inputs, target / out, ridge))
    weight, bias = best_weight.clone(), best_bias.clone()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=tuning.learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, tuning.steps)
    with progress(description, total=tuning.steps) as advance:
        for step in range(1, tuning.steps + 1):
            at = torch.randint(states.shape[1], (tuning.positions,), generator=generator)
            vocabulary = _Vocabulary(readout, states[-1, at], tuning, generator)
            optimizer.zero_grad()
            loss = vocabulary.divergence(LensMaps(weight, bias)(inputs[:, at])).mean(-1)
            loss.sum().backward()
            optimizer.step()
            decay.step()
            if step % tuning.every == 0 or step == tuning.steps:
                keep_better(weight, bias)
            advance(1, f"KL {float(loss.detach().mean()):.2f}")
    identity = torch.eye(states.shape[-1])[None]
    return LensMaps(
        torch.cat([best_weight / scale * out, identity]),
        torch.cat([best_bias * out, identity.new_zeros(1, states.shape[-1])]),
    )


def _regression(inputs: Tensor, target: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Of (positions, d) on every row of (layers, positions, d): (layers, d, d) and (layers, d)."""
    mean, centre, maps = inputs.mean(1, keepdim=True), target.mean(0), []
    for row, middle in zip(inputs, mean, strict=True):
        x = row - middle
        gram = x.T @ x
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        maps.append(torch.linalg.solve(gram, x.T @ (target - centre)).T)
    weight = torch.stack(maps)
    return weight, centre - (mean @ weight.mT)[:, 0]


class _Vocabulary:
    """The tokens that stand for the vocabulary in one step, and what the model says of them."""

    def __init__(self, readout: Readout, last: Tensor, tuning: Tuning, generator: torch.Generator) -> None:
        self.readout = readout
        with torch.no_grad():
            logits = readout.logits(last)
            head = logits.topk(min(tuning.top, logits.shape[1]), dim=-1).indices.unique()
            rest = torch.ones(logits.shape[1], dtype=torch.bool)
            rest[head] = False
            others = rest.nonzero()[:, 0]
            tail = others[torch.randperm(len(others), generator=generator)[: tuning.tail]]
            self.tokens = torch.cat([head, tail])
            self.weight = torch.zeros(len(self.tokens))
            self.weight[len(head) :] = torch.tensor(len(others) / max(len(tail), 1)).log()
            self.expected = (logits[:, self.tokens] + self.weight).log_softmax(-1)

    def divergence(self, mapped: Tensor) -> Tensor:
        """(layers, positions), in nats, of states (layers, positions, d) that have been mapped."""
        normed = self.readout.norm(mapped.flatten(0, 1))
        said = (self.readout.unembed(normed, self.tokens) + self.weight).log_softmax(-1)
        return functional.kl_div(
            said.unflatten(0, mapped.shape[:2]), self.expected.expand(len(mapped), -1, -1), reduction="none",
            log_target=True,
        ).sum(-1)  # fmt: skip


@torch.no_grad()
def divergence(mapped: Tensor, last: Tensor, readout: Readout) -> Tensor:
    """(layers, positions) KL divergence of the model's own distribution from a lens's, in nats, full vocabulary.

    Args:
        mapped: (layers, positions, d) what the lens gives the readout.
        last: (positions, d) the model's own last state.
        readout: Of the model.
    """
    found = torch.empty(mapped.shape[:2])
    for start in range(0, len(last), CHUNK_POSITIONS):
        part = slice(start, start + CHUNK_POSITIONS)
        expected = readout.logits(last[part]).log_softmax(-1)
        for row, states in enumerate(mapped):
            said = readout.logits(states[part]).log_softmax(-1)
            found[row, part] = functional.kl_div(said, expected, reduction="none", log_target=True).sum(-1).cpu()
    return found
