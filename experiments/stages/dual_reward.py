"""Stage dual_reward@model: does a loss on the lens make it say the operation, what does that cost, and who reads it?

Reported protocol: the eight prompts, full-vocabulary top token at layer int(depth * n). Controlled: operands never
trained on, in symbols, words and stories; controls that tell learning from construction; answers and text before and
after. Flaws of the originals are arms of their own. How an arm is trained and measured is in ``shared.dual_reward``.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.tasks.arithmetic import STYLES
from classifier_emergence.training.adapters import HEAD, adapted
from classifier_emergence.training.supervised import MLP, QK, QKVO
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


def run(params: Params, key: str) -> None:
    """Train every arm, measure what each did and write one result."""
    settings = params.dual_reward
    with Runs("dual_reward", key, params, DualRewardStudy) as runs:
        before = runs.once("base", lambda study, _: measure_wide(study, None))
        first = settings.seeds[0]
        calls = {"main": [Run(f"main-{first}", train_main, (first, runs.adapters / f"seed-{first}"))]}
        for name, arm in all_arms(params).items():
            seeds = settings.seeds if arm.several_seeds else settings.seeds[:1]
            calls[name] = [Run(f"{name}-{seed}", train_arm, (name, arm, seed)) for seed in seeds]
        results = runs.by_arm(calls)
        (full,), study = results.pop("main"), runs.study
        result = {
            "model": key,
            "layers": study.lm.layers,
            "layer": study.lm.layers[study.row],
            "n_trained_on": {operation: len(problems) for operation, problems in study.problems.train.items()},
            "before": before,
            "steps": {"main": settings.steps, "arms": settings.arm_steps, "further": settings.further_steps},
            "main": full,
            "arms": {name: arm_summary(seeds) for name, seeds in results.items()},
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


def train_arm(study: DualRewardStudy, work: Path, name: str, arm: DualRewardArm, seed: int) -> dict[str, Any]:
    """Any arm but the main one, for fewer steps."""
    layer, classes = study.layer_of(arm), len(study.operations) if arm.head else None
    with adapted(study.lm, study.adapter(arm), seed=seed, classes=classes) as wrapped:
        trained = study.train(wrapped, arm, seed, study.settings.arm_steps, work, name.replace("_", " "))
        measured = measure_arm(study, wrapped, layer, study.words_of(arm))
        if arm.head:
            measured["head"] = head_accuracy(study, wrapped, layer)
    return {**curve(trained, study.settings.threshold), **measured}


def head_accuracy(study: DualRewardStudy, wrapped: PeftModel, layer: int) -> dict[str, Any]:
    """How often the linear head names the operation, at the classifier layer."""
    head, norm = wrapped.get_base_model().get_submodule(HEAD), study.lm.readout.norm
    accuracy = {}
    for style in STYLES[:2]:
        states = residual_stream(study.lm, study.prompts(style))[layer_row(layer)]
        with torch.no_grad():
            guess = head(norm(states)).argmax(-1)
        accuracy[style] = study.share(guess == torch.tensor(study.own))
    return accuracy


if __name__ == "__main__":
    main(run, __doc__)
