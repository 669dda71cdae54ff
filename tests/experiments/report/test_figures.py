from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from classifier_emergence.results import read_result
from experiments.params import load_params
from experiments.report.figures import arithmetic as figures
from experiments.report.figures import mixtures as figures_moe
from experiments.report.figures import other_tasks as figures_tasks
from experiments.report.figures import reinforcement as figures_reinforcement
from experiments.report.tables import reinforcement as reinforcement_tables
from experiments.report.tables.mixtures import projected, upcycled
from experiments.report.tables.other_tasks import TASKS
from experiments.report.tables.training import ARMS, FORMATS

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("name", "stages", "names"),
    [
        ("probe_depth", ["probing"], None),
        ("alignment_null", ["logit_lens"], None),
        ("lens_heatmap", ["logit_lens"], None),
        ("dual_reward_steps", ["dual_reward"], None),
        ("dual_reward_arms", ["dual_reward"], ARMS),
        ("fine_tuning_answers", ["cot_alignment"], FORMATS),
        ("fine_tuning_depth", ["lora_sft", "cot_alignment"], FORMATS),
        ("other_tasks", ["other_tasks"], TASKS),
    ],
)
def test_the_committed_figures_are_what_the_results_give(
    name: str, stages: list[str], names: Any, tmp_path: Path
) -> None:
    params = load_params(ROOT / "params.yaml")
    models = params.models if stages[0] in ("probing", "logit_lens") else params.trained_models
    results = [{model: read_result(ROOT / "results" / stage / f"{model}.json") for model in models} for stage in stages]
    draw = getattr(figures_tasks if hasattr(figures_tasks, name) else figures, name)
    check(draw, [*results, *([] if names is None else [names])], name, tmp_path)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("grpo_steps", [reinforcement_tables.TRAININGS]),
        ("grpo_depth", []),
    ],
)
def test_the_committed_figures_on_reinforcement_are_what_the_results_give(
    name: str, names: list[Any], tmp_path: Path
) -> None:
    models = load_params(ROOT / "params.yaml").reinforcement_models
    results = {model: read_result(ROOT / "results" / "grpo" / f"{model}.json") for model in models}
    check(getattr(figures_reinforcement, name), [results, *names], name, tmp_path)


def check(draw: Callable[..., Figure], arguments: list[Any], name: str, folder: Path) -> None:
    """The same bytes twice, and those that are committed."""
    figures.save(draw(*arguments), folder / name)  # warnings are errors: a missing glyph fails here
    figures.save(draw(*arguments), folder / "again")
    assert (folder / f"{name}.svg").read_bytes() == (folder / "again.svg").read_bytes()
    assert (folder / f"{name}.svg").read_bytes() == (ROOT / "paper" / "figures" / f"{name}.svg").read_bytes()


@pytest.mark.parametrize("name", ["router_maxima", "routing_load", "routing_domains", "routing_layers", "mixture_lens"])
def test_the_committed_figures_of_mixtures_are_what_the_results_give(name: str, tmp_path: Path) -> None:
    models = load_params(ROOT / "params.yaml").moe_models
    moe = {model: read_result(ROOT / "results" / "moe_routers" / f"{model}.json") for model in models}
    shown = {m: projected(result) for m, result in moe.items()} if name == "router_maxima" else upcycled(moe)
    figures.save(getattr(figures_moe, name)(shown), tmp_path / name)
    assert (tmp_path / f"{name}.svg").read_bytes() == (ROOT / "paper" / "figures" / f"{name}.svg").read_bytes()


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        figures.save(Figure(), tmp_path / "figure")
    assert not list(tmp_path.iterdir())
