from pathlib import Path

import pytest
from matplotlib.figure import Figure

from classifier_emergence.results import read_result
from experiments.params import load_params
from experiments.report.figures.__main__ import FIGURES
from experiments.report.figures.draw import PaperFigure
from experiments.shared.stage import STAGES, result_path

ROOT = Path(__file__).resolve().parents[3]
COMMITTED = ROOT / "paper" / "figures"


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_the_committed_figures_are_what_the_results_give(figure: PaperFigure, tmp_path: Path) -> None:
    params = load_params(ROOT / "params.yaml")
    results = [
        {model: read_result(ROOT / result_path(stage, model)) for model in getattr(params, STAGES[stage])}
        for stage in figure.stages
    ]
    svg = f"{figure.name}.svg"
    figure.write(*results, folder=tmp_path)  # warnings are errors: a missing glyph fails here
    assert (tmp_path / svg).read_bytes() == (COMMITTED / svg).read_bytes()


def test_every_committed_figure_is_drawn() -> None:
    drawn = {f"{figure.name}.{ending}" for figure in FIGURES for ending in ("svg", "png")}
    assert {path.name for path in COMMITTED.iterdir()} == drawn


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        PaperFigure(Figure, ()).write(folder=tmp_path)
    assert not list(tmp_path.iterdir())
