"""Stage dual_reward@model: does a loss on the lens make it say the operation, what does that cost, and who reads it?

Reported protocol: the eight prompts, full-vocabulary top token at layer int(depth * n). Controlled: operands never
trained on, in symbols, words and stories; controls that tell learning from construction; answers and text before and
after. Flaws of the originals are arms of their own. How an arm is trained and measured is in ``shared.dual_reward``.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.tasks.arithmetic import STYLES
from classifier_emergence.training.adapters import Start, adapted_together, head_of
from classifier_emergence.training.modules import MLP, QK, QKVO
from classifier_emergence.training.supervised import train_together
from experiments.params import Params
from experiments.shared.dual_reward import (
    DualRewardArm,
    DualRewardStudy,
    arm_summary,
    curve,
    measure_arm,
    measure_wide,
    train_main,
)
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.study import schedule_of

GROUPS = 3  # of arms that train together: beside the main arm they keep two workers busy


def run(params: Params, key: str) -> None:
    """Train every arm, measure what each did and write one result."""
    settings = params.dual_reward
    with Runs("dual_reward", key, params, DualRewardStudy) as runs:
        before = runs.once("base", lambda study, _: measure_wide(study, None))
        first = settings.seeds[0]
        arms = all_arms(params)
        seeds = {name: settings.seeds if arm.several_seeds else settings.seeds[:1] for name, arm in arms.items()}
        members = [(f"{name}-{seed}", (arm, seed)) for name, arm in arms.items() for seed in seeds[name]]
        groups = [dict(members[i::GROUPS]) for i in range(GROUPS)]
        calls = [Run("main", train_main, (first, runs.adapters / f"seed-{first}"))]
        calls += [Run(f"group-{i}", train_arms, (group,), tuple(group)) for i, group in enumerate(groups)]
        results = runs.all(calls)
        study = runs.study
        result = {
            "model": key,
            "layers": study.lm.layers,
            "layer": study.lm.layers[study.row],
            "n_trained_on": {operation: len(problems) for operation, problems in study.problems.train.items()},
            "before": before,
            "steps": {"main": settings.steps, "arms": settings.arm_steps, "further": settings.further_steps},
            "main": results["main"],
            "arms": {name: arm_summary([results[f"{name}-{seed}"] for seed in seeds[name]]) for name in arms},
        }
        runs.finish(result)


def all_arms(params: Params) -> dict[str, DualRewardArm]:
    """Every arm by name; ``vo`` is the main one, over seeds and as short as the others, to compare with."""
    depths = {f"depth_{round(100 * depth)}": DualRewardArm(depth=depth) for depth in params.dual_reward.depths}
    weights = {f"weight_{round(100 * w)}": DualRewardArm(class_weight=w) for w in params.dual_reward.class_weights}
    return {
        "vo": DualRewardArm(several_seeds=True),
        "qk": DualRewardArm(QK, several_seeds=True),
        "mlp": DualRewardArm(MLP),
        "all_linear": DualRewardArm((*QKVO, *MLP), several_seeds=True),
        "vo_all_layers": DualRewardArm(all_layers=True),
        **depths,
        **weights,
        "arbitrary_words": DualRewardArm(targets="arbitrary"),
        "shuffled_targets": DualRewardArm(targets="shuffled"),
        "class_only": DualRewardArm(class_weight=1.0),
        "answer_only": DualRewardArm(class_weight=0.0),
        "head": DualRewardArm(head=True, several_seeds=True),
        "unshifted_answers": DualRewardArm(answer_shifted=False),
        "read_after_answer": DualRewardArm(read="answer"),
        "bare_targets": DualRewardArm(targets="bare"),
    }


def train_arms(
    study: DualRewardStudy, work: Path, wanted: Sequence[str], arms: Mapping[str, tuple[DualRewardArm, int]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Any arms but the main one, with a seed each, together and for fewer steps; then what each of them did."""
    starts = {name: Start(study.adapter(arm), seed, study.classes_of(arm)) for name, (arm, seed) in arms.items()}
    schedule = schedule_of(study.settings, 0, study.settings.arm_steps)
    with adapted_together(study.lm, starts) as wrapped:
        members = {name: study.member(arm, seed) for name, (arm, seed) in arms.items()}
        text = f"dual reward of {study.lm.key}: {len(arms)} arms"
        trained = train_together(study.lm, wrapped, members, schedule, work=work, description=text)
        for name in wanted:
            arm, layer = arms[name][0], study.layer_of(arms[name][0])
            wrapped.set_adapter(name)
            measured = measure_arm(study, wrapped, layer, study.words_of(arm))
            if (head := head_of(study.lm, name)) is not None:
                measured["head"] = head_accuracy(study, head, layer)
            yield name, {**curve(trained[name], study.settings.threshold), **measured}


def head_accuracy(study: DualRewardStudy, head: nn.Linear, layer: int) -> dict[str, Any]:
    """How often the linear head names the operation, at the classifier layer."""
    accuracy = {}
    for style in STYLES[:2]:
        states = residual_stream(study.lm, study.prompts(style))[layer_row(layer)]
        with torch.no_grad():
            guess = head(study.lm.readout.norm(states)).argmax(-1)
        accuracy[style] = study.share(guess == torch.tensor(study.own))
    return accuracy


if __name__ == "__main__":
    main(run, __doc__)
