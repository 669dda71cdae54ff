from functools import partial
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from classifier_emergence import figures
from classifier_emergence.results import read_result
from experiments.tables import ARMS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("probe_depth", "probing"),
        ("alignment_null", "logit_lens"),
        ("lens_heatmap", "logit_lens"),
        ("dual_reward_steps", "dual_reward"),
        ("dual_reward_arms", "dual_reward"),
    ],
)
def test_the_committed_figures_are_what_the_results_give(name: str, stage: str, tmp_path: Path) -> None:
    import yaml

    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    models = params["trained_models" if stage == "dual_reward" else "models"]
    results = {model: read_result(ROOT / "results" / stage / f"{model}.json") for model in models}
    draw = partial(getattr(figures, name), **({"names": ARMS} if name == "dual_reward_arms" else {}))
    figures.save(draw(results), tmp_path / name)  # warnings are errors: a missing glyph fails here
    figures.save(draw(results), tmp_path / "again")
    assert (tmp_path / f"{name}.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    assert (tmp_path / f"{name}.svg").read_bytes() == (ROOT / "paper" / "figures" / f"{name}.svg").read_bytes()


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        figures.save(Figure(), tmp_path / "figure")
    assert not list(tmp_path.iterdir())
