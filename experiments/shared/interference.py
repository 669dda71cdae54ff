"""Do two losses pull a model's weights apart? Inner products of their gradients, block by block.

A batch of problems is drawn and split into two disjoint halves; GRPO's loss and the class loss have a gradient on each.
How a loss's gradient on one half agrees with its own on the other says how much of it is noise, and is what the
agreement between the two losses, across halves too, is to be compared with. Above the layer that the lens reads the
gradient of the class loss is 0, so the blocks are those up to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classifier_emergence.reading.residuals import outputs_of
from classifier_emergence.reading.tree import Tree, last_states
from classifier_emergence.tasks.problems import Problem, sample
from classifier_emergence.training.rl.rollouts import token_log_probs
from experiments.shared.reinforcement import PolicyStudy

Floats = NDArray[np.float64]


def gradient_products(study: PolicyStudy, draws: int, problems: int) -> dict[str, Tensor]:
    """Inner products of gradients, (draws, blocks) each; what is random goes on from torch's generator and leaves it.

    ``policy`` and ``class`` are those of one loss on the two halves, ``across`` of one loss on a half with the other
    loss on the other half, ``policy_squared`` and ``class_squared`` of a gradient with itself.

    Args:
        study: Its model requires gradients.
        draws: Of problems to train on, and of completions.
        problems: In each half.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        found = [_products(study, int(torch.randint(2**31, ())), problems) for _ in range(draws)]
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def cosines(products: Mapping[str, Any], *, confidence: float, resamples: int) -> dict[str, Any]:
    """What the products of draws say, over all blocks with an interval over draws, and block by block.

    ``cosine`` is that between the two losses' expected gradients: ``across / sqrt(policy * class)``, each summed over
    draws, as noise is in none of them; of the class loss, which shrinks in training, the gradient of every draw counts
    by its direction alone. Where the draws cannot tell the expected gradient of GRPO from 0 its interval is
    that of any cosine, -1 to 1. ``across``, ``policy_halves`` and ``class_halves`` are cosines of the gradients that
    half a batch gives; ``class_share`` is the length of the class loss's over the sum of both lengths.
    """
    parts = {name: np.asarray(values, dtype=np.float64) for name, values in products.items()}
    n = len(parts["across"])
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)
    length = np.sqrt(parts["class_squared"].sum(1, keepdims=True)).clip(min=1e-30)
    powers = {"across": 1, "class": 2, "class_squared": 2}
    scaled = {name: part / length ** powers.get(name, 0) for name, part in parts.items()}
    # The draws as they are come first, then the resamples.
    counts = np.vstack([np.ones(n), drawn])
    policy_length, class_length = (np.sqrt(counts @ parts[f"{loss}_squared"].sum(1)) for loss in ("policy", "class"))
    ratios = _cosines({name: counts @ part.sum(1) for name, part in scaled.items()})
    ratios["class_share"] = class_length / (class_length + policy_length)
    found, tail = {}, (1 - confidence) / 2
    for name, values in ratios.items():
        known = np.isfinite(values[1:])
        # What is not known may be anything.
        ends = [np.quantile(np.where(known, values[1:], x), q) for x, q in ((-1.0, tail), (1.0, 1 - tail))]
        found[name] = {"mean": float(np.nan_to_num(values[0])), "interval": ends, "n": n}
    by_block = _cosines({name: part.sum(0) for name, part in scaled.items()})
    return {**found, "by_block": {name: np.nan_to_num(values) for name, values in by_block.items()}}


def _cosines(sums: Mapping[str, Floats]) -> dict[str, Floats]:
    policy, own, across = sums["policy"], sums["class"], sums["across"]
    policy_squared, class_squared = sums["policy_squared"], sums["class_squared"]
    return {
        "cosine": _cosine(across, policy, own),
        "across": _cosine(across, policy_squared, class_squared),
        "policy_halves": _cosine(policy, policy_squared, policy_squared),
        "class_halves": _cosine(own, class_squared, class_squared),
    }


def _cosine(product: Floats, one: Floats, other: Floats) -> Floats:
    """NaN where a squared length is not positive."""
    known = (one > 0) & (other > 0)
    length = np.sqrt(np.where(known, one * other, 1.0))
    return np.where(known, np.clip(product / length, -1, 1), np.nan)


def _products(study: PolicyStudy, seed: int, problems: int) -> dict[str, Tensor]:
    drawn = sample(study.problems.train, 2 * problems, seed=seed)
    (policy, own), (other_policy, other_own) = (_gradients(study, drawn[half::2]) for half in (0, 1))
    return {
        "policy": _dots(policy, other_policy),
        "class": _dots(own, other_own),
        "across": (_dots(policy, other_own) + _dots(other_policy, own)) / 2,
        "policy_squared": (_dots(policy, policy) + _dots(other_policy, other_policy)) / 2,
        "class_squared": (_dots(own, own) + _dots(other_own, other_own)) / 2,
    }


def _dots(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([x @ y for x, y in zip(one, other, strict=True)]).double()


def _gradients(study: PolicyStudy, problems: Sequence[Problem]) -> list[list[Tensor]]:
    """Of each block the flat gradient of GRPO's loss without its divergence, and of the class loss."""
    lm, readout, blocks = study.lm, study.lm.readout, study.lm.blocks[: study.layer + 1]
    prompts, completions, rewards = study.draw(problems)
    group = study.sampling.group
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)  # as trl
    tree = Tree([prompts[i // group] + ids for i, ids in enumerate(completions)])
    with outputs_of(blocks[-1]) as outputs:
        states = last_states(tree.inputs(lm.model), lm.model)
    starts = [len(prompts[i // group]) - 1 for i in range(len(completions))]
    # A token is predicted at the node before it.
    nodes = [node for path, start in zip(tree.paths, starts, strict=True) for node in path[start:-1]]
    tokens = torch.tensor([token for ids in completions for token in ids])
    weight = [float(a) / len(ids) for a, ids in zip(advantages.flatten(), completions, strict=True) for _ in ids]
    log_probs, _ = token_log_probs(states[nodes], readout, tokens)
    policy = -(torch.tensor(weight) * log_probs).sum() / len(completions)
    targets = study.spaced_targets()
    ends = [path[start] for path, start in zip(tree.paths[::group], starts[::group], strict=True)]
    named = torch.tensor([targets[problem.operation] for problem in problems])
    own = -token_log_probs(readout.norm(outputs[0].flatten(0, 1)[ends]), readout, named)[0].mean()
    trained = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
    found = []
    for loss in (policy, own):
        gradients = iter(torch.autograd.grad(loss, [p for part in trained for p in part], retain_graph=loss is policy))
        found.append([torch.cat([next(gradients).flatten() for _ in part]) for part in trained])
    return found
