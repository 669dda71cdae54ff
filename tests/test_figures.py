from pathlib import Path

import pytest
from matplotlib.figure import Figure

from classifier_emergence import figures, figures_moe
from classifier_emergence.params import load_params
from classifier_emergence.results import read_result
from experiments.moe_tables import projected, upcycled
from experiments.training_tables import ARMS, FORMATS

ROOT = Path(__file__).resolve().parents[1]


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
    ],
)
def test_the_committed_figures_are_what_the_results_give(
    name: str, stages: list[str], names: dict[str, str] | None, tmp_path: Path
) -> None:
    params = load_params(ROOT / "params.yaml")
    models = params.models if stages[0] in ("probing", "logit_lens") else params.trained_models
    results = [{model: read_result(ROOT / "results" / stage / f"{model}.json") for model in models} for stage in stages]
    draw = getattr(figures, name)
    arguments = [*results, *([] if names is None else [names])]
    figures.save(draw(*arguments), tmp_path / name)  # warnings are errors: a missing glyph fails here
    figures.save(draw(*arguments), tmp_path / "again")
    assert (tmp_path / f"{name}.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    assert (tmp_path / f"{name}.svg").read_bytes() == (ROOT / "paper" / "figures" / f"{name}.svg").read_bytes()


@pytest.mark.parametrize("name", ["router_maxima", "routing_load", "routing_layers", "mixture_lens"])
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
