"""Stage dual_reward@model: does a loss on the lens make it say the operation, what does that cost, and who reads it?

Reported protocol: the eight prompts, full-vocabulary top token at layer int(depth * n). Controlled: operands never
trained on, in symbols, words and stories; controls that tell learning from construction; answers and text before and
after. Flaws of the originals are arms of their own. How an arm is trained and measured is in ``shared.dual_reward``.
"""

from classifier_emergence.errors import InputError
from classifier_emergence.training.modules import MLP, QK, QKVO
from experiments.params import Params
from experiments.shared.dual_reward import (
    DualRewardArm,
    DualRewardStudy,
    against,
    arm_summary,
    measure_wide,
    train_arms,
    train_main,
)
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main

COMPARED = ("vo", "all_linear", "head", "answer_only")
"""Arms that are compared pair by pair."""
GROUPS = 3  # of arms that train together: beside the main arm they keep two workers busy


def run(params: Params, key: str) -> None:
    """Train every arm, measure what each did and write one result."""
    settings = params.dual_reward
    with Runs("dual_reward", key, params, DualRewardStudy) as runs:
        before = runs.once("base", lambda study, _: measure_wide(study, None))
        first, arms = settings.seeds[0], arms_of(params)
        every = settings.arms != "all"
        seeds = {
            name: settings.seeds if every or arm.several_seeds else settings.seeds[:1] for name, arm in arms.items()
        }
        members = [(f"{name}-{seed}", (arm, seed)) for name, arm in arms.items() for seed in seeds[name]]
        groups = [dict(members[i::GROUPS]) for i in range(GROUPS)]
        calls = [Run("main", train_main, (first, runs.adapters / f"seed-{first}"))]
        calls += [
            Run(f"group-{i}", train_arms, (group, settings.arm_steps), tuple(group)) for i, group in enumerate(groups)
        ]
        results = runs.all(calls)
        study = runs.study
        by_arm = {name: [results[f"{name}-{seed}"] for seed in seeds[name]] for name in arms}
        result = {
            "model": key,
            "layers": study.lm.layers,
            "layer": study.lm.layers[study.row],
            "n_trained_on": {operation: len(problems) for operation, problems in study.problems.train.items()},
            "before": before,
            "steps": {"main": settings.steps, "arms": settings.arm_steps, "further": settings.further_steps},
            "main": results["main"],
            "arms": {name: arm_summary(measured) for name, measured in by_arm.items()},
            # Arm minus arm, problem by problem.
            "contrasts": {
                "vo_against_all_linear": against(study, by_arm["vo"], by_arm["all_linear"], "top"),
                "head_against_lens": against(study, by_arm["head"], by_arm["vo"], "head", "top"),
                **(
                    {"vo_against_answer_only": against(study, by_arm["vo"], by_arm["answer_only"], "log_prob")}
                    if every
                    else {}
                ),
            },
        }
        runs.finish(result)


def arms_of(params: Params) -> dict[str, DualRewardArm]:
    """The arms that the parameters ask for.

    Raises:
        InputError: One of them does not exist, or one that others are compared with is not among them.
    """
    arms, asked = all_arms(params), params.dual_reward.arms
    if asked == "all":
        return arms
    if unknown := [name for name in asked if name not in arms]:
        raise InputError(f"dual_reward.arms: {unknown[0]!r} is no arm; known: {', '.join(arms)}")
    if missing := [name for name in COMPARED if name not in asked]:
        raise InputError(f"dual_reward.arms: {missing[0]!r} is missing, which others are compared with")
    return {name: arms[name] for name in asked}


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
        "arbitrary_words": DualRewardArm(targets="arbitrary", several_seeds=True),
        "shuffled_targets": DualRewardArm(targets="shuffled"),
        "class_only": DualRewardArm(class_weight=1.0),
        "answer_only": DualRewardArm(class_weight=0.0),
        "head": DualRewardArm(head=True, several_seeds=True),
        "unshifted_answers": DualRewardArm(answer_shifted=False),
        "read_after_answer": DualRewardArm(read="answer"),
        "bare_targets": DualRewardArm(targets="bare"),
    }


if __name__ == "__main__":
    main(run, __doc__)
