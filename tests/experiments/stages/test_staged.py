"""The stage staged: what its orders share and in what they differ."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.params import load_params
from experiments.shared.reinforcement import PolicyStudy
from experiments.stages import staged

PARAMS = load_params(Path(__file__).resolve().parents[3] / "params.tiny.yaml")


@pytest.fixture
def study(tiny_models: Path) -> PolicyStudy:
    return PolicyStudy(PARAMS, str(tiny_models / "tiny-llama"))


def test_orders_after_dual_reward_differ_in_rate_or_class_weight_alone() -> None:
    orders = staged.all_orders(PARAMS)
    middle, low, high, kept = (
        orders[f"dual_then_grpo{suffix}"] for suffix in ("", "_low_rate", "_high_rate", "_and_class")
    )
    assert low.learning_rate < middle.learning_rate < high.learning_rate
    assert middle.rewards == low.rewards == high.rewards
    assert replace(kept, rewards=middle.rewards, class_weight=0.0) == middle
    assert 0 < kept.class_weight < orders["together"].class_weight
    # Nothing but what GRPO alone reads has no loss on the lens.
    assert all(bool(order.class_weight) != ("grpo" in order.rewards) for order in orders.values())


def test_orders_that_begin_with_dual_reward_share_it_and_their_first_draws(study: PolicyStudy, tmp_path: Path) -> None:
    wanted = [f"{name}-0" for name in staged.all_orders(PARAMS) if name != "dual_then_grpo_low_rate"]
    found: dict[str, Any] = dict(staged.train_orders(study, tmp_path, wanted, 0))
    assert list(found) == wanted
    parts = {name: [part["reward"] for part in run["stages"]] for name, run in found.items()}
    assert parts["grpo_then_dual-0"] == ["grpo", "dual"]
    assert parts["together-0"] == ["together"]
    middle, high = (found[f"dual_then_grpo{suffix}-0"]["stages"] for suffix in ("", "_high_rate"))
    assert middle[0] == high[0]
    steps = [each[1]["steps"] for each in (middle, high)]
    assert steps[0][0] == pytest.approx(steps[1][0], abs=1e-6)  # nothing was updated yet
    assert steps[0][1] != steps[1][1]
    assert steps[0][0]["kl"] == pytest.approx(0, abs=1e-6)  # from the model with the classifier
    assert "class_loss" in found["dual_then_grpo_and_class-0"]["stages"][1]["steps"][0]
    assert "class_loss" not in steps[0][0]


def test_contrasts_are_paired_by_problem(study: PolicyStudy) -> None:
    n = len(study.problems.test)

    def measure(alignment: list[float]) -> dict[str, Any]:
        items = {"alignment": alignment, "reward": [0.5] * n, "exact": [True] * n}
        return {"stages": [{"items": items}]}

    spread = [i / n for i in range(n)]
    results = {
        "dual_then_grpo": [measure(spread)] * 2,
        "dual_then_grpo_and_class": [measure([x + 0.25 for x in spread]), measure([x + 0.5 for x in spread])],
    }
    kept = staged.kept_class_weight(study, results)
    assert kept["alignment"]["by_seed"] == pytest.approx([0.25, 0.5])
    assert kept["alignment"]["interval"] == pytest.approx([0.25, 0.5])  # no problem differs from another
    assert kept["reward"]["value"] == 0
