"""The stages grpo and collapse: what is trained on, and the originals' statistics by their definitions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from classifier_emergence.tasks.arithmetic import LENS, SIGNS, labelled, prompt_bank
from classifier_emergence.tasks.problems import Problem
from classifier_emergence.training.evaluation import Alignment
from experiments.params import load_params
from experiments.shared.reinforcement import REPORTED_OPERANDS, reported_problems, reported_prompt
from experiments.stages import collapse, grpo

ROOT = Path(__file__).resolve().parents[3]
PARAMS = load_params(ROOT / "params.tiny.yaml")


def last_problem(prompt: str) -> Problem:
    return Problem.parse(prompt.rpartition("\n")[2])


@pytest.fixture
def study(tiny_models: Path) -> grpo.GrpoStudy:
    return grpo.GrpoStudy(PARAMS, str(tiny_models / "tiny-llama"))


def test_no_operands_that_are_measured_are_trained_on(study: grpo.GrpoStudy) -> None:
    tasks = [task for seed in range(20) for task in grpo.tasks(study, seed, reported=False)]
    trained = {last_problem(task.prompt).operands for task in tasks}
    measured = {problem.operands for problem in study.problems.test}
    measured |= {frozenset(prompt.pair) for prompt in prompt_bank("symbol", PARAMS.bank)}
    measured |= {Problem.parse(text).operands for text in labelled(LENS)[0]}
    assert trained
    assert not trained & measured
    for task in tasks:
        problem = last_problem(task.prompt)
        assert task.answer == problem.answer
        assert task.target == study.targets[problem.operation].strict_id


def test_the_originals_problems_are_in_their_ranges_and_may_be_negative() -> None:
    problems = reported_problems(2000, seed=0)
    assert {problem.operation for problem in problems} == set(REPORTED_OPERANDS)
    for problem in problems:
        low, high = REPORTED_OPERANDS[problem.operation]
        assert low <= problem.a <= high
        assert low <= problem.b <= high
    assert any(int(problem.answer) < 0 for problem in problems)
    assert reported_prompt(Problem("add", 23, 45)) == "Calculate: 23 + 45 = "


def test_separation_is_one_for_orthogonal_clusters_and_zero_for_noise() -> None:
    y = torch.arange(40) % 2
    generator = torch.Generator().manual_seed(0)
    assert abs(grpo.separation(torch.randn(40, 500, generator=generator), y)) < 0.01
    torch.testing.assert_close(grpo.separation(torch.eye(2)[y], y), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("reported", [False, True])
def test_balanced_tasks_name_their_own_class_and_shared_ones_that_of_the_first(
    study: grpo.GrpoStudy, reported: bool
) -> None:
    arm = collapse.CollapseArm(0.4, 0.1, 1e-5, steps=12, reported=reported)
    words = {token: name for name, token in study.spaced_targets().items()}
    own = collapse.tasks(study, arm, seed=0)
    size = collapse.prompts_a_step(study, arm)
    assert len(own) == arm.steps * size
    signs = [SIGNS[words[task.target]] for task in own]
    assert all(f" {sign} " in task.prompt.rpartition("\n")[2] for sign, task in zip(signs, own, strict=True))
    assert [signs.count(sign) for sign in ("*", "+", "-")] == [len(own) // 3] * 3
    shared = collapse.tasks(study, replace(arm, shared_target=True), seed=0)
    for step in range(arm.steps):
        part = shared[step * size : (step + 1) * size]
        assert len({task.target for task in part}) == 1
        assert f" {SIGNS[words[part[0].target]]} " in part[0].prompt.rpartition("\n")[2]


def test_arms_differ_in_what_is_trained_on_what_and_under_which_flaw_alone() -> None:
    arms = collapse.all_arms(PARAMS, PARAMS.reinforcement_models[0])
    factorial = collapse.all_arms(PARAMS, "another")
    assert factorial.items() <= arms.items()
    cells = {(arm.vo, arm.class_weight) for arm in factorial.values()}
    assert cells == {(vo, weight) for vo in (False, True) for weight in (0.0, PARAMS.collapse.class_weight, 1.0)}
    assert all(arm.precision == "bf16" for name, arm in arms.items() if name.startswith("reported"))
    causes = collapse.cause_arms(PARAMS)
    assert len(causes) == len({*causes.values()}) == 12
    sound = causes["fp32_own_k3"]
    assert causes["bf16_shared_signed"] == replace(sound, precision="bf16", shared_target=True, signed_kl=True)


def test_an_effect_counts_new_words_alone_and_never_the_embedding(study: grpo.GrpoStudy) -> None:
    n = len(study.problems.test)

    def run(alignment: list[float], rank: float, found: list[str], right: int = 0) -> dict[str, Any]:
        share = {"accuracy": 0.5, "mean": 0.5, "interval": [0.4, 0.6], "n": 10}
        token = {"rank": {"mean": rank}, "probability": {"mean": 1 / rank}}
        return {
            "alignment": {"alignment": alignment, "interval": [[x, x] for x in alignment], "n": 3},
            "items": {"exact": [i < right for i in range(n)], "reward": [0.25] * n},
            "statements": {"selected": share},
            "reported": {"direction": {"found": found}, "first_token": token},
        }

    before = run([0.0, 0.0, 0.0, 0.0], 4.0, ["bad", "no"])
    effect = grpo.effect(study, run([0.9, 0.1, 0.3, 0.2], 2.0, ["no", "yes"], right=n // 2), before)
    at_row = [0.9, 0.1, 0.3, 0.2][study.row]
    assert effect["alignment_at_classifier"] == {"mean": at_row, "interval": [at_row, at_row], "n": 3}
    assert effect["alignment_peak"]["mean"] == 0.3
    assert effect["truth_words_gained"] == 1
    assert (effect["reported_rank_ratio"], effect["reported_probability_ratio"]) == (0.5, 2.0)
    # Paired by problem: where none changes the interval has no width, whatever the rewards are.
    assert effect["answers_exact_change"]["mean"] == pytest.approx(n // 2 / n)
    assert effect["sampled_reward_change"]["mean"] == 0
    assert effect["sampled_reward_change"]["interval"].tolist() == [0, 0]


def test_one_word_is_the_share_of_the_commonest_class_on_top() -> None:
    def share(*tops: str) -> float:
        return collapse.one_word([{"top_token": top} for top in tops])

    assert share(" add", "add", "Add") == 1
    assert share(" add", "multiply", "政", "政") == 0.25
    assert share("政", "政") == 0  # the same token everywhere, but no class


def test_contrasts_pair_problems_and_give_what_the_other_half_of_the_loss_takes(study: grpo.GrpoStudy) -> None:
    n = len(study.problems.test)

    def arm(*right: int) -> dict[str, Any]:
        found = [[1] * k + [0] * (n - k) for k in right]
        return {"runs": [{"items": {"right": hits, "reward": hits[: n // 2]}} for hits in found]}

    arms = {f"{place}_{part}": arm(6, 6) for place in ("whole", "vo") for part in ("grpo", "class", "both")}
    arms |= {"whole_both": arm(3, 4), "whole_class": arm(9, 9)}
    found = collapse.contrasts(study, arms)
    assert found["whole_accuracy"]["by_seed"] == pytest.approx([-6 / n, -5 / n])
    assert found["whole_reward"]["by_seed"] == pytest.approx([-6 / n, -4 / n])
    assert found["vo_accuracy"]["interval"] == [0, 0]  # the same problems
    assert found["vo_against_whole_accuracy"]["value"] == pytest.approx(2.5 / n)


def test_a_cause_is_compared_with_the_level_that_is_no_flaw_and_all_else_alike() -> None:
    def arm(*reward: float) -> dict[str, Any]:
        share = {"accuracy": 0.5, "interval": [0.4, 0.6], "n": 9}
        rewards = [{"mean": r, "interval": [r, r], "n": 9} for r in reward]
        lens = {"one_word": share, "balanced_accuracy": share}
        return {"runs": [{"classes": lens, "spread": {"separation": share}, "sampled_reward": r} for r in rewards]}

    arms = {name: arm(0.5, 0.6) for name in collapse.cause_arms(PARAMS)}
    arms["bf16_own_signed"] = arm(0.1, 0.6)
    found = collapse.causes(arms)
    assert set(found) == {"fp16", "bf16", "shared", "signed"}
    assert found["bf16"]["reward"]["by_seed"] == pytest.approx([-0.1, 0.0])  # one pair of four
    assert found["signed"]["reward"]["by_seed"] == pytest.approx([-0.4 / 6, 0.0])
    assert found["fp16"]["reward"]["value"] == found["shared"]["one_word"]["value"] == 0
    assert collapse.causes({}) == {}


def test_a_collapse_has_its_word_on_top(study: grpo.GrpoStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    problems, n = study.problems.test, len(study.problems.test)
    add, other = study.words[1].ids[0], study.words[0].ids[0]

    def found(choice: list[int], top: list[int]) -> dict[str, Any]:
        ones = torch.ones(1, n)
        read = Alignment(ones, ones, torch.tensor([top]), ones, ones.bool(), torch.tensor([choice]))
        monkeypatch.setattr(type(study), "read_problems", lambda *_: read)
        return collapse.classes(study, problems, study.prompt)

    least_unlikely = found([1] * n, [other] * n)
    assert (float(least_unlikely["modal_share"]), least_unlikely["collapsed"]) == (1, False)
    assert least_unlikely["one_word"]["accuracy"] == 0
    assert found([1] * n, [add] * n)["collapsed"]
    some = found([1] * n, [add] * (n // 2) + [other] * (n - n // 2))
    assert (some["one_word"]["accuracy"], some["collapsed"]) == (n // 2 / n, False)


def test_spread_tells_classes_apart_from_noise_and_from_a_single_state(seeded: Any) -> None:
    def found(states: torch.Tensor) -> dict[str, Any]:
        return collapse.spread(states, torch.arange(300) % 3, confidence=0.95, resamples=200)

    noise, y = seeded(300, 40), torch.arange(300) % 3
    apart = found(noise + 100 * torch.eye(40)[y])
    assert apart["separation"]["mean"] > 0.95
    alike = found(noise)
    assert alike["null"] == 2 / 299
    assert alike["separation"]["mean"] == pytest.approx(alike["null"], rel=0.5)
    low, high = apart["separation"]["interval"]
    assert low <= apart["separation"]["mean"] <= high
    assert found(noise + 1000)["concentration"]["mean"] > 0.999
    assert alike["concentration"]["mean"] < 0.02
    total = ((noise - noise.mean(0)) ** 2).sum()
    between = sum(100 * ((noise[y == c].mean(0) - noise.mean(0)) ** 2).sum() for c in range(3))
    assert alike["separation"]["mean"] == pytest.approx(float(between / total), rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_arm_with_the_originals_optimiser_says_how_many_weights_moved(
    study: grpo.GrpoStudy, precision: str, tmp_path: Path
) -> None:
    arm = replace(collapse.cause_arms(PARAMS)[f"{precision}_own_k3"], learning_rate=1e-5)
    run = collapse.train_arm(study, tmp_path, "arm", arm, 0)
    assert run["reached"] is None
    assert len(run["steps"]) == arm.steps
    assert 0 < run["share_of_weights_changed"] <= 1
    assert (run["share_of_weights_changed"] > 0.5) == (precision == "fp32")


def test_adapters_of_the_factorial_train_together(study: grpo.GrpoStudy, tmp_path: Path) -> None:
    settings = PARAMS.collapse
    arms = {name: (arm, 0) for name, arm in collapse.all_arms(PARAMS, "other").items() if arm.vo}
    plain = collapse.CollapseArm(0.0, PARAMS.grpo.kl_weight, settings.vo_learning_rate, settings.steps, vo=True)
    assert all(replace(arm, class_weight=0.0) == plain for arm, _ in arms.values())  # one schedule is that of all
    found = dict(collapse.train_adapters(study, tmp_path, ["vo_class", "vo_both"], arms))
    assert list(found) == ["vo_class", "vo_both"]
    for name, drawn in (("vo_class", False), ("vo_both", True)):
        run = found[name]
        assert [step["step"] for step in run["steps"]] == list(range(1, settings.steps + 1))
        assert all("class_loss" in step and ("reward" in step) == drawn for step in run["steps"])
        assert run["watched"][0]["step"] == 0
        assert {"items", "classes", "answers", "share_of_weights_changed", "reached", "parameters"} <= set(run)
    assert found["vo_class"]["watched"][0] == found["vo_both"]["watched"][0]  # fresh adapters
