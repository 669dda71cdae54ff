"""Trainings with other seeds: each is the training of the stage that made it first."""

from pathlib import Path

import numpy as np
import pytest

from classifier_emergence.results import plain, read_result
from experiments.params import Params
from experiments.shared.chain_of_thought import ChainOfThoughtStudy
from experiments.shared.dual_reward import DualRewardArm, train_arms
from experiments.stages import cot_alignment, grpo, replication, staged
from experiments.stages.replication import ReplicationStudy

POLICY, SUPERVISED = "tiny-gemma", "tiny-llama"
SEED = 3


def test_grpo_changes_what_it_changes_in_its_own_stage(params: Params, tmp_path: Path) -> None:
    ((_, changed),) = replication.grpo(ReplicationStudy(params, POLICY), tmp_path / "a", ["x"], {"x": SEED})
    of_stage = grpo.train_arm(grpo.GrpoStudy(params, POLICY), tmp_path / "b", "controlled", SEED)
    assert changed["log_prob"].abs().max() > 0
    assert float(changed["log_prob"].mean()) == pytest.approx(of_stage["answers"]["change"]["mean"], rel=1e-6)


def test_the_second_reward_takes_from_the_first_what_it_takes_in_its_own_stage(params: Params, tmp_path: Path) -> None:
    made = replication.dual_then_grpo(
        ReplicationStudy(params, POLICY), tmp_path / "a", ["x", "y"], {"x": SEED, "y": SEED + 1}
    )
    changed = {name: float(change["alignment"].mean()) for name, change in made}
    for name, seed in (("x", SEED), ("y", SEED + 1)):
        order = f"dual_then_grpo-{seed}"
        ((_, of_stage),) = staged.train_orders(staged.PolicyStudy(params, POLICY), tmp_path / name, [order], seed)
        dual, end = (stage["lens"]["alignment"]["mean"] for stage in of_stage["stages"])
        assert changed[name] == pytest.approx(end - dual, abs=1e-6)


def test_dual_reward_changes_what_it_changes_in_its_own_stage(params: Params, tmp_path: Path) -> None:
    study = ReplicationStudy(params, SUPERVISED)
    seeds = {"x": SEED, "y": SEED + 1}
    arms, steps = {name: (DualRewardArm(), seed) for name, seed in seeds.items()}, params.dual_reward.arm_steps
    of_stage = dict(train_arms(study.dual, tmp_path / "a", [*seeds], arms, steps))
    for name, changed in replication.dual_reward(study, tmp_path / "b", [*seeds], seeds):
        expected = of_stage[name]["answers"]["change"]["mean"]
        assert float(changed["log_prob"].mean()) == pytest.approx(float(expected), rel=1e-6)


def test_fine_tuning_changes_what_it_changes_in_its_own_stage(params: Params, tmp_path: Path) -> None:
    study = ReplicationStudy(params, SUPERVISED)
    ((_, changed),) = replication.direct(study, tmp_path / "a", ["x"], {"x": SEED})
    tested = study.chain.params
    chain = ChainOfThoughtStudy(tested, SUPERVISED)
    assert len(chain.problems.test) == 3 * params.replication.test_problems
    before = plain(cot_alignment.measure_both(chain, None))
    ((_, of_stage),) = cot_alignment.train_format(
        chain, tmp_path / "b", ["x"], "direct", {"x": SEED}, before, tmp_path / "c"
    )
    assert np.mean(changed["exact"]) == pytest.approx(of_stage["answers"]["change"]["mean"])


@pytest.mark.parametrize("key", [POLICY, SUPERVISED])
def test_every_training_has_its_seeds_and_a_stopped_stage_goes_on(
    params: Params, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params.of_model(key)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(replication, "summary", interrupted)
        with pytest.raises(KeyboardInterrupt):
            replication.run(params, key)
    with monkeypatch.context() as patch:  # all that is left is to sum up
        for name, (_, *how) in replication.TRAININGS.items():
            patch.setitem(replication.TRAININGS, name, (interrupted, *how))
        replication.run(params, key)
    trainings = read_result(f"results/replication/{key}.json")["trainings"]
    assert {*trainings} == {*params.replication.seeds}
    for training, found in trainings.items():
        assert found.pop("seeds") == params.replication.seeds[training]
        for number in found.values():
            assert len(number["by_seed"]) == 2
            assert number["value"] == pytest.approx(np.mean(number["by_seed"]))
            assert number["interval"][0] <= number["value"] <= number["interval"][1]
