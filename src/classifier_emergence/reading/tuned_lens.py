"""The tuned lens: for every layer an affine map after which the readout says what the model's last layer says.

``KL(softmax(W_U norm(h_L)) || softmax(W_U norm(A_l h_l + b_l)))`` is minimised over positions of a corpus.

Source: Belrose et al. (2023), Eliciting Latent Predictions from Transformers with the Tuned Lens, arXiv:2303.08112.
Two things are other than there, as text and time are short. Maps do not start at the identity but at the least-squares
map to the last state (Din et al., 2023, arXiv:2303.09435). And a step's softmax runs over the tokens that the model
finds most probable at its positions and a fresh sample of all others, weighted to stand for them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from classifier_emergence.progress import progress
from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.reading.readout import Readout

RIDGE = 0.01
"""Of the least-squares map, as a share of the states' mean variance."""
CHUNK_POSITIONS = 32
"""Of the divergence over the full vocabulary."""


@dataclass(frozen=True)
class Tuning:
    """How maps are trained: by Adam at a rate that falls to nought along a half cosine, all layers at once."""

    steps: int
    positions: int
    """Of a step."""
    learning_rate: float
    """On states and maps that are scaled to a mean square of one."""
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
        validation: The same of other texts: of each layer the map with the least divergence there is kept, the
            least-squares map among them.
        readout: Of the model.
        tuning: How.
        seed: Of the positions of every step and the sampled tokens.
        description: Shown with the progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = states.square().mean((1, 2)).sqrt()[:, None, None]
    inputs, weight, bias = states[:-1] / scale[:-1], *_least_squares(states / scale)
    held, best_weight, best_bias = validation[:-1] / scale[:-1], weight.clone(), bias.clone()
    judged = _Vocabulary(readout, validation[-1], tuning, generator)
    with torch.no_grad():
        best = judged.divergence(LensMaps(weight, bias)(held)).mean(-1)
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
                with torch.no_grad():
                    now = judged.divergence(LensMaps(weight, bias)(held)).mean(-1)
                    better = now < best
                    best = torch.where(better, now, best)
                    best_weight[better], best_bias[better] = weight[better], bias[better]
            advance(1, f"KL {float(loss.detach().mean()):.2f}")
    identity = torch.eye(states.shape[-1])[None]
    return LensMaps(
        torch.cat([best_weight / scale[:-1] * scale[-1], identity]),
        torch.cat([best_bias * scale[-1, 0], identity.new_zeros(1, states.shape[-1])]),
    )


def _least_squares(states: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression of the last row on each other one: (layers - 1, d, d) and (layers - 1, d)."""
    mean = states.mean(1, keepdim=True)
    target, maps = (states[-1] - mean[-1]).T, []
    for row, centre in zip(states[:-1], mean[:-1], strict=True):
        x = row - centre
        gram = x.T @ x
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        maps.append(torch.linalg.solve(gram, (target @ x).T).T)
    weight = torch.stack(maps)
    return weight, (mean[-1] - (mean[:-1] @ weight.mT))[:, 0]


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
