"""Stage collapse@model: what collapses when GRPO and a loss on the lens are trained together, and what makes it?

Reported protocol: the five attempts of the originals, with their flaws. Controlled: whole model or V/O adapter, GRPO,
the loss on the lens or both. Causes: the whole model on both, at the originals' learning rate and with their optimiser,
until the class loss is what they report of a collapsed model, or so many steps are over: precision of weights, one
target a step or each prompt's own, signed or k3 divergence. A model has collapsed if nearly all held-out prompts get
one class with its word on top of the lens. The originals' own explanations are measured: whether the gradients of the
two losses oppose each other, and how far apart the states of the classes are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.results import lookup
from classifier_emergence.tasks.arithmetic import LENS, labelled
from classifier_emergence.tasks.problems import Problem
from classifier_emergence.training.adapters import Start, adapted_together
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.rl.rewards import exact, parse_answer, parse_reported
from classifier_emergence.training.rl.run import GrpoRun, all_weights_trainable, train_grpo
from classifier_emergence.training.rl.together import PolicyMember, train_grpo_together
from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask
from experiments.params import Params
from experiments.shared.interference import cosines, gradient_products
from experiments.shared.reinforcement import PolicyStudy, early_and_late, reported_problems, reported_prompt
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.study import adapter_of
from experiments.shared.summaries import difference, over, summary_over_seeds, value_of

CLASSES = ("multiply", "add", "subtract")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""That weights are held in, updated in place."""
LEVELS = {"precision": (*PRECISIONS,), "targets": ("own", "shared"), "divergence": ("k3", "signed")}
"""Possible causes of the collapse; the first of each is no flaw."""


@dataclass(frozen=True)
class CollapseArm:
    """One way to train."""

    class_weight: float
    kl_weight: float
    learning_rate: float
    steps: int
    vo: bool = False
    """Train an adapter on V and O below the lens's layer, not the whole model."""
    reported: bool = False
    """The originals' prompts, operands, rule for the reward and group."""
    shared_target: bool = False
    """A flaw: every prompt of a step gets the class of its first one, and classes are drawn at random. Else each has
    its own and there are as many problems of each class as can be."""
    entropy_bonus: float = 0.0
    signed_kl: bool = False
    precision: str = "fp32"
    """A key of ``PRECISIONS``; half precision is a flaw."""
    bias_correction: bool = True
    """Of Adam's moments; False is a flaw, and makes the first steps several times as long."""
    until_reported: bool = False
    """A possible cause: end when the class loss is what the originals report of their collapsed model; a prompt of each
    class a step, and the originals' group, as these arms are many."""
    gradients: bool = False
    """Compare the gradients of the two losses on the way."""
    several_seeds: bool = True


def run(params: Params, key: str) -> None:
    """Train every arm and write one result."""
    sections = ("grpo", "bank", "reinforcement_models")
    with Runs("collapse", key, params, PolicyStudy, *sections) as runs:
        before, seeds = runs.once("base", lambda study, _: measure_base(study)), params.grpo.seeds
        of_arm = {
            name: {f"{name}-{s}": (arm, s) for s in seeds[: None if arm.several_seeds else 1]}
            for name, arm in all_arms(params, key).items()
        }
        each = {name: run for runs_of in of_arm.values() for name, run in runs_of.items()}
        adapters = {name: (arm, seed) for name, (arm, seed) in each.items() if arm.vo}
        calls = [Run(name, train_arm, (name, *each[name])) for name in each if name not in adapters]
        made = runs.all([*calls, Run("vo", train_adapters, (adapters,), tuple(adapters))])
        results = {name: [made[one] for one in runs_of] for name, runs_of in of_arm.items()}
        arms: dict[str, Any] = {
            name: {"runs": found, "summary": arm_summary(found, before, params)} for name, found in results.items()
        }
        attempts = [arms[name]["summary"] for name in reported_arms(params) if name in arms]
        result = {
            "model": key,
            "layer": runs.study.lm.layers[runs.study.row],
            "layers": runs.study.lm.layers,
            "classes": CLASSES,
            "before": before,
            "arms": arms,
            "contrasts": contrasts(runs.study, arms),
            "causes": causes(arms),
            "reported_collapsed": sum(each["reported_collapsed"] for each in attempts) if attempts else None,
        }
        runs.finish(result)


def all_arms(params: Params, key: str) -> dict[str, CollapseArm]:
    """Every arm by name; attempts and causes on the models of ``reinforcement_models`` alone."""
    settings = params.collapse
    kl, steps = params.grpo.kl_weight, settings.steps
    parts = {"grpo": 0.0, "class": 1.0, "both": settings.class_weight}
    factorial = {
        f"{name}_{part}": CollapseArm(
            weight, kl, rate, steps, vo=name == "vo", gradients=(name, part) == ("whole", "both")
        )
        for name, rate in (("whole", settings.learning_rate), ("vo", settings.vo_learning_rate))
        for part, weight in parts.items()
    }
    if key not in params.reinforcement_models:
        return factorial
    return {**reported_arms(params), **factorial, **cause_arms(params)}


def reported_arms(params: Params) -> dict[str, CollapseArm]:
    """The five attempts; weight of the divergence of the first three is that of the originals' default."""
    kl = params.grpo.reported.kl_weight
    short, middle, long = params.collapse.reported_steps
    first = CollapseArm(
        0.4, kl, 1e-5, short, reported=True, shared_target=True, signed_kl=True, precision="bf16",
        bias_correction=False, several_seeds=False,
    )  # fmt: skip
    own = replace(first, shared_target=False)
    return {
        "reported_first": first,
        "reported_own_targets": own,
        "reported_entropy_bonus": replace(own, entropy_bonus=0.5),
        "reported_low_rate": replace(own, learning_rate=2e-6, kl_weight=0.001, steps=middle),
        "reported_class_focus": replace(own, class_weight=0.9, kl_weight=0.0, signed_kl=False, steps=long),
    }


def cause_arms(params: Params) -> dict[str, CollapseArm]:
    """Every combination of ``LEVELS`` at the originals' rate and with their optimiser, to equal class loss."""
    settings = params.collapse
    start = CollapseArm(
        settings.class_weight, params.grpo.reported.kl_weight, settings.learning_rate, settings.cause_steps,
        bias_correction=False, until_reported=True,
    )  # fmt: skip
    return {
        f"{precision}_{targets}_{divergence}": replace(
            start, precision=precision, shared_target=targets == "shared", signed_kl=divergence == "signed"
        )
        for precision, targets, divergence in product(*LEVELS.values())
    }


def train_arm(study: PolicyStudy, work: Path, name: str, arm: CollapseArm, seed: int) -> dict[str, Any]:
    """Train the whole model, watching the classes, and measure."""
    settings = study.params.collapse
    few_drawn = arm.reported or arm.until_reported
    how = replace(study.sampling, group=settings.reported_group) if few_drawn else study.sampling
    until = settings.class_loss if arm.until_reported else -np.inf
    with all_weights_trainable(study.lm) as model:
        dtype = PRECISIONS[arm.precision]
        # With the originals' optimiser alone: it is about weights too coarse to move, and a copy is large.
        start = [] if arm.bias_correction else [(p, p.detach().to(dtype, copy=True)) for p in model.parameters()]
        trained = train_grpo(
            study.lm, model, tasks(study, arm, seed), exact(parse_reported if arm.reported else parse_answer),
            objective_of(study, arm), how,
            Schedule(arm.steps, prompts_a_step(study, arm), arm.learning_rate, seed, settings.every),
            work=work, watch=watch_of(study, arm), checkpoint_every=settings.checkpoint_every, dtype=dtype,
            bias_correction=arm.bias_correction, until=until,
            description=f"collapse of {study.lm.key}: {name.replace('_', ' ')}",
        )  # fmt: skip
        moved = sum(int((p != q).sum()) for p, q in start) / trained.parameters if start else None
        del start
        return outcome(study, trained, moved, measure_lens if arm.until_reported else measure_model)


def train_adapters(
    study: PolicyStudy, work: Path, wanted: Sequence[str], arms: Mapping[str, tuple[CollapseArm, int]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of V/O adapters, all arms and seeds together."""
    settings = study.params.collapse
    starts = {name: Start(adapter_of(settings, study.layer), seed) for name, (_, seed) in arms.items()}
    with adapted_together(study.lm, starts) as wrapped:
        members = {
            name: PolicyMember(tasks(study, arm, seed), objective_of(study, arm), seed, watch=watch_of(study, arm))
            for name, (arm, seed) in arms.items()
        }
        trained = train_grpo_together(
            study.lm, wrapped, members, exact(parse_answer), study.sampling,
            Schedule(settings.steps, settings.prompts, settings.vo_learning_rate, 0, settings.every), work=work,
            checkpoint_every=settings.checkpoint_every,
            description=f"collapse of {study.lm.key}: {len(members)} runs on V and O",
        )  # fmt: skip
        for name in wanted:
            wrapped.set_adapter(name)
            yield name, outcome(study, trained[name], None, measure_model)


def objective_of(study: PolicyStudy, arm: CollapseArm) -> PolicyObjective:
    """What an arm minimises."""
    return PolicyObjective(
        arm.kl_weight, arm.class_weight, study.layer, signed_kl=arm.signed_kl, entropy_bonus=arm.entropy_bonus
    )


def watch_of(study: PolicyStudy, arm: CollapseArm) -> Callable[[], dict[str, Any]]:
    """Measures the classes of a few problems and, in some arms, gradients."""
    settings, few = study.params.collapse, study.problems.test[: study.params.collapse.curve_problems]

    def watch() -> dict[str, Any]:
        spread = classes(study, few, reported_prompt if arm.reported else study.prompt)
        found = {"shares": {k: float(v) for k, v in spread["shares"].items()}, "modal": float(spread["modal_share"])}
        if arm.gradients:
            products = gradient_products(study, 1, settings.gradient_problems)
            found["gradients"] = {each: values[0].tolist() for each, values in products.items()}
        return found

    return watch


def outcome(
    study: PolicyStudy, trained: GrpoRun, moved: float | None, measure: Callable[[PolicyStudy], dict[str, Any]]
) -> dict[str, Any]:
    """A run, the first step at which the class loss was what the originals report, and what the model is now."""
    losses = ((step["step"], step.get("class_loss")) for step in trained.steps)
    reached = [step for step, loss in losses if loss is not None and loss <= study.params.collapse.class_loss]
    return {
        **vars(trained),
        "share_of_weights_changed": moved,
        "reached": reached[0] if reached else None,
        **measure(study),
    }


def prompts_a_step(study: PolicyStudy, arm: CollapseArm) -> int:
    """As many completions in all with the originals' group as with ours."""
    settings = study.params.collapse
    if arm.until_reported:
        return len(CLASSES)
    return settings.reported_prompts if arm.reported else settings.prompts


def tasks(study: PolicyStudy, arm: CollapseArm, seed: int) -> list[PolicyTask]:
    """Problems in the order in which they are trained on, with the class that each is told to name."""
    size, random, targets = prompts_a_step(study, arm), np.random.default_rng(seed), study.spaced_targets()
    pools: dict[str, list[Problem]] = {name: list(study.problems.train[name]) for name in CLASSES}
    if arm.reported:
        drawn = reported_problems(8 * arm.steps * size, seed)
        pools = {name: [p for p in drawn if p.operation == name] for name in CLASSES}
    prompt = reported_prompt if arm.reported else study.prompt
    ordered = []
    for step in range(arm.steps):
        if arm.shared_target:
            names = [CLASSES[i] for i in random.integers(len(CLASSES), size=size)]
        else:
            names = [CLASSES[(step * size + i) % len(CLASSES)] for i in range(size)]
        for name in names:
            problem = pools[name][int(random.integers(len(pools[name])))]
            target = targets[names[0] if arm.shared_target else name]
            ordered.append(PolicyTask(prompt(problem), problem.answer, target))
    return ordered


def classes(study: PolicyStudy, problems: Sequence[Problem], prompt: Callable[[Problem], str]) -> dict[str, Any]:
    """Which class the lens gives to problems, put as prompts: its spread and whether it is right."""
    lens = study.read_problems(problems, [prompt(problem) for problem in problems])
    choice, own = lens.choice[0], torch.tensor([CLASSES.index(problem.operation) for problem in problems])
    shares = choice.bincount(minlength=len(CLASSES)).double() / len(choice)
    on_top = torch.stack([torch.isin(lens.top_id[0], torch.tensor(word.ids)) for word in study.words])
    named, units = (choice == torch.arange(len(CLASSES))[:, None]) & on_top, study.units()[: len(problems)]
    one_word = study.share(named[named.sum(1).argmax()], units)
    return {
        "shares": dict(zip(CLASSES, shares, strict=True)),
        "entropy": -torch.special.xlogy(shares, shares).sum(),
        "modal_share": shares.max(),
        # With its word on top: before training one class may be the least unlikely everywhere.
        "one_word": one_word,
        "collapsed": one_word["accuracy"] >= study.params.collapse.modal_share,
        # As many problems of each class: accuracy is balanced accuracy, and a constant answer scores 1/3.
        "balanced_accuracy": study.share(choice == own, units),
        "alignment": lens.own_word[0].mean(),
        "right": choice == own,
    }


def spread(states: Tensor, own: Tensor, *, confidence: float, resamples: int) -> dict[str, Any]:
    """How far apart the states (n, d) of classes ``own`` are, with bootstrap intervals over problems of each class.

    ``separation`` is the share of their variance that lies between the classes' means, 0 if they are one and 1 if the
    states of a class are all alike; of labels that say nothing (k - 1) / (n - 1) is expected, ``null``.
    ``concentration`` is the squared length of the states' mean over their mean squared length: 1 if all states are one.
    """
    random, n, k = np.random.default_rng(0), len(states), int(own.max()) + 1
    means, squares, parts = [], [], []
    for c in range(k):
        x = states[own == c].double().numpy()
        m = len(x)
        weights = np.vstack([np.full(m, 1 / m), random.multinomial(m, np.full(m, 1 / m), size=resamples) / m])
        means.append(weights @ x)
        squares.append(weights @ (x**2).sum(1))
        parts.append(m / n)
    share = np.array(parts)[:, None]
    square = (share * squares).sum(0)
    centre = ((share[..., None] * means).sum(0) ** 2).sum(-1)
    between = (share * (np.array(means) ** 2).sum(-1)).sum(0) - centre
    ends = ((1 - confidence) / 2, (1 + confidence) / 2)
    found = {"separation": between / (square - centre), "concentration": centre / square}
    numbers = {
        name: {"mean": values[0], "interval": np.quantile(values[1:], ends), "n": n} for name, values in found.items()
    }
    return {**numbers, "null": (k - 1) / (n - 1)}


def measure_base(study: PolicyStudy) -> dict[str, Any]:
    """The model before training, and how the gradients of the two losses agree there."""
    settings = study.params.collapse
    with all_weights_trainable(study.lm):
        torch.manual_seed(0)
        products = gradient_products(study, settings.gradient_draws, settings.gradient_problems)
    return {**measure_model(study), "gradients": agreement(products, study.params)}


def agreement(products: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """See ``interference.cosines``."""
    return cosines(products, confidence=params.confidence, resamples=params.grpo.resamples)


def measure_model(study: PolicyStudy) -> dict[str, Any]:
    """Classes, states and rewards on held-out problems, and the originals' table."""
    table = [Problem.parse(text) for text in labelled(LENS)[0]]
    table = [problem for problem in table if problem.operation in CLASSES]
    prompts = [problem.symbol for problem in table]
    lens = study.read_problems(table, prompts)
    # Where the originals' configurations are trained: at the lone space.
    trained = classes(study, study.problems.test, reported_prompt)
    return {
        **measure_lens(study),
        "answers": study.share(study.answer().exact, study.units()),
        "reported": {
            "prompts": study.table(prompts, lens),
            "score": study.share(lens.is_top[0]),
            "classes": {name: number for name, number in trained.items() if name != "right"},
        },
    }


def measure_lens(study: PolicyStudy) -> dict[str, Any]:
    """Classes, states and rewards on held-out problems."""
    test, settings = study.problems.test, study.params
    states = residual_stream(study.lm, [study.prompt(problem) for problem in test], rows=[study.row])[0]
    with torch.no_grad():
        normed = study.lm.readout.norm(states)
    own, found = torch.tensor(study.own), classes(study, test, study.prompt)
    reward = study.sampled_reward(test[: settings.collapse.curve_problems])
    return {
        "items": {"right": found.pop("right"), "reward": reward.pop("by_problem")},
        "classes": found,
        "spread": spread(normed, own, confidence=settings.confidence, resamples=study.resamples),
        "sampled_reward": reward,
    }


def arm_summary(runs: Sequence[dict[str, Any]], before: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """The numbers of an arm over its seeds; what the untrained model does as well is no collapse."""
    known = (
        "classes.entropy", "classes.modal_share", "classes.one_word", "classes.balanced_accuracy", "classes.alignment",
        "spread.separation", "spread.concentration", "answers", "sampled_reward", "reported.score",
        "reported.classes.modal_share", "reported.classes.one_word", "reported.classes.balanced_accuracy",
    )  # fmt: skip
    paths = [path for path in known if path.partition(".")[0] in runs[0]]
    last = [run["steps"][-1] for run in runs]
    drawn = "reward" in last[0]  # the class loss alone draws no completions
    rewards = [early_and_late(run["steps"]) for run in runs] if drawn else []
    found: dict[str, Any] = {}
    if "reported" in runs[0]:
        at_first = before["reported"]["classes"]["collapsed"]
        found = {
            "reported_collapsed": sum(run["reported"]["classes"]["collapsed"] and not at_first for run in runs),
            "reported_one_word": over([one_word(run["reported"]["prompts"]) for run in runs]),
        }
    if "class_loss" in last[0]:
        found |= {
            "class_loss": over([step["class_loss"] for step in last]),
            "reached": sum(run["reached"] is not None for run in runs),
            # One more than there were, where it was not reached.
            "steps_to_class_loss": over([run["reached"] or len(run["steps"]) + 1 for run in runs]),
        }
    if runs[0]["share_of_weights_changed"] is not None:
        found["share_of_weights_changed"] = over([run["share_of_weights_changed"] for run in runs])
    if "gradients" in runs[0]["watched"][0]:
        along = [agreement(_stacked([each["gradients"] for each in run["watched"]]), params) for run in runs]
        found["gradients"] = {name: over([each[name] for each in along]) for name in along[0] if name != "by_block"}
        blocks = {name: [each["by_block"][name] for each in along] for name in along[0]["by_block"]}
        found["gradients"]["by_block"] = {name: np.mean(values, axis=0) for name, values in blocks.items()}
    return {
        "seeds": len(runs),
        "collapsed": sum(run["classes"]["collapsed"] and not before["classes"]["collapsed"] for run in runs),
        **summary_over_seeds(runs, paths),
        **{
            f"{name}_change": over([difference(run["spread"][name], before["spread"][name]) for run in runs])
            for name in ("separation", "concentration")
        },
        **{f"reward_{when}": over([reward[when] for reward in rewards]) for when in ("early", "late") if drawn},
        **{f"final_{name}": [step.get(name) for step in last] for name in ("reward", "kl", "signed_kl", "class_loss")},
        **found,
    }


def _stacked(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: [draw[name] for draw in draws] for name in draws[0]}


def one_word(prompts: Sequence[Mapping[str, Any]]) -> float:
    """Largest share of the prompts that have one and the same class's word on top: 1 is the originals' collapse."""
    tops = [entry["top_token"].strip().lower() for entry in prompts]
    return max(tops.count(name) for name in CLASSES) / len(tops)


def contrasts(study: PolicyStudy, arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Differences between cells of the factorial, by problem and by seed.

    What the combination loses against each half of the loss alone, and what it gains if V and O alone are trained.
    """
    pairs = {
        "whole_accuracy": ("whole_both", "whole_class", "right"),
        "whole_reward": ("whole_both", "whole_grpo", "reward"),
        "vo_accuracy": ("vo_both", "vo_class", "right"),
        "vo_reward": ("vo_both", "vo_grpo", "reward"),
        "vo_against_whole_accuracy": ("vo_both", "whole_both", "right"),
        "vo_against_whole_reward": ("vo_both", "whole_both", "reward"),
    }
    return {
        name: over([study.paired(x, y, item) for x, y in zip(arms[a]["runs"], arms[b]["runs"], strict=True)])
        for name, (a, b, item) in pairs.items()
    }


def causes(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What each flaw changes by itself: level minus the first of its ``LEVELS``, mean over all else, by seed."""
    paths = {
        "one_word": "classes.one_word", "accuracy": "classes.balanced_accuracy", "reward": "sampled_reward",
        "separation": "spread.separation",
    }  # fmt: skip
    cells = [cell for cell in product(*LEVELS.values()) if "_".join(cell) in arms]
    found: dict[str, Any] = {}
    for place, levels in enumerate(LEVELS.values()):
        for level in levels[1:] if cells else ():
            pairs = [(cell, (*cell[:place], levels[0], *cell[place + 1 :])) for cell in cells if cell[place] == level]
            found[level] = {
                name: over(
                    np.mean(
                        [
                            [value_of(lookup(a, path)) - value_of(lookup(b, path)) for a, b in zip(*both, strict=True)]
                            for both in ([arms["_".join(cell)]["runs"] for cell in pair] for pair in pairs)
                        ],
                        axis=0,
                    ).tolist()
                )
                for name, path in paths.items()
            }
    return found


if __name__ == "__main__":
    main(run, __doc__)
