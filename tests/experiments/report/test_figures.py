import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from classifier_emergence.results import read_result
from experiments.params import load_params
from experiments.report.figures import draw
from experiments.report.figures.__main__ import FIGURES
from experiments.report.figures.draw import PaperFigure
from experiments.report.figures.reinforcement import apart
from experiments.report.names import NAMES
from experiments.shared.stage import STAGES, result_path

ROOT = Path(__file__).resolve().parents[3]
COMMITTED = ROOT / "paper" / "figures"
SMALLEST = 7.0
"""Points, in print."""
IN_PIXELS = "lens_heatmap"


def results_of(figure: PaperFigure) -> list[dict[str, dict[str, Any]]]:
    params = load_params(ROOT / "params.yaml")
    return [
        {model: read_result(ROOT / result_path(stage, model)) for model in getattr(params, STAGES[stage])}
        for stage in figure.stages
    ]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_the_committed_figures_are_what_the_results_give_with_readable_text(
    figure: PaperFigure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings are errors: a missing glyph fails here, too. Pixels are drawn of one: all have the same parts."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def saved(self: Figure, to: Any, *, format: str, **options: Any) -> None:
        drawn.append(self)
        if format == "svg" or figure.name == IN_PIXELS:
            save(self, to, format=format, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    figure.write(*results_of(figure), folder=tmp_path)
    svg, png = (tmp_path / f"{figure.name}.{ending}" for ending in ("svg", "png"))
    assert svg.read_bytes() == (COMMITTED / svg.name).read_bytes()
    assert figure.name != IN_PIXELS or png.read_bytes().startswith(b"\x89PNG")
    drawn[0].set_layout_engine("none")  # as it was saved
    with mpl.rc_context(draw.STYLE):
        found = visible(drawn[0])
    check_legible(drawn[0], found)


def repeated(results: Mapping[str, dict[str, Any]], models: int) -> dict[str, dict[str, Any]]:
    """The results again and again, under so many names, those of the paper's models first."""
    names = [*load_params(ROOT / "params.yaml").models, *(f"another-model-{i}" for i in range(models))][:models]
    return {
        name: {**found, "model": name} for name, found in zip(names, itertools.cycle(results.values()), strict=False)
    }


def visible(drawn: Figure) -> list[tuple[Text, Bbox]]:
    """Every text that a drawn figure shows, with its box; tick labels only within the limits of their axis."""
    drawn.draw_without_rendering()
    found = [text for text in drawn.findobj(Text) if isinstance(text, Text) and text.get_text().strip()]
    hidden: set[Text] = set()
    for axes in drawn.axes:
        if not axes.axison:
            hidden |= set(axes.findobj(Text))
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not min(limits) <= tick.get_loc() <= max(limits):
                    hidden |= {tick.label1, tick.label2}
    return [(text, text.get_window_extent()) for text in found if text.get_visible() and text not in hidden]


# Of all figures, to keep it short, those that wrap in different ways.
WRAPPING = ("summary", "probe_depth", "lens_heatmap", "dual_reward_arms", "cost", "collapse_arms")


@pytest.mark.parametrize("models", [1, 5])  # 5: two rows, of which one is not full
@pytest.mark.parametrize("figure", [each for each in FIGURES if each.name in WRAPPING], ids=lambda figure: figure.name)
def test_text_is_readable_whole_and_apart_for_any_number_of_models(figure: PaperFigure, models: int) -> None:
    with mpl.rc_context(draw.STYLE):
        drawn = figure.draw(*(repeated(results, models) for results in results_of(figure)))
        found = visible(drawn)
    check_legible(drawn, found)


def check_legible(drawn: Figure, found: list[tuple[Text, Bbox]]) -> None:
    page = drawn.bbox
    for text, box in found:
        assert float(text.get_fontsize()) >= SMALLEST, f"{text.get_text()!r} is too small"
        assert page.x0 - 1 <= box.x0, f"{text.get_text()!r} is cut on the left"
        assert box.x1 <= page.x1 + 1, f"{text.get_text()!r} is cut on the right"
        assert page.y0 - 1 <= box.y0, f"{text.get_text()!r} is cut below"
        assert box.y1 <= page.y1 + 1, f"{text.get_text()!r} is cut above"
    for (one, a), (other, b) in itertools.combinations(found, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width <= 1 or height <= 1, f"{one.get_text()!r} lies on {other.get_text()!r}"


def test_a_model_and_a_training_look_the_same_everywhere_and_no_two_alike() -> None:
    names = [*NAMES["looks"]["models"], *(f"other-{i}" for i in range(6))]
    looks = [draw.look(name, names) for name in names]
    assert len({look["color"] for look in looks}) == len(names) == 9
    trainings = [draw.training(name) for name in NAMES["looks"]["trainings"]]
    assert len({tuple(look.values()) for look in trainings}) == len(trainings)


@pytest.mark.parametrize(
    "heights", [(0.0, 0.5), (0.5, 0.52), (0.52, 0.5), (1.0, 1.0), (0.0, 0.0), (0.98, 0.02), (0.3, 0.9)]
)
def test_two_labels_stand_apart_and_within_the_axis(heights: tuple[float, float]) -> None:
    placed = apart(heights, 0.16)
    assert abs(placed[0] - placed[1]) >= 0.16 - 1e-9
    assert all(0.08 - 1e-9 <= height <= 0.92 + 1e-9 for height in placed)
    assert heights[0] == heights[1] or (placed[0] < placed[1]) == (heights[0] < heights[1])
    if heights == (0.3, 0.9):
        assert placed == [0.3, 0.9]


def test_every_committed_figure_is_drawn() -> None:
    drawn = {f"{figure.name}.{ending}" for figure in FIGURES for ending in ("svg", "png")}
    assert {path.name for path in COMMITTED.iterdir()} == drawn


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        PaperFigure(Figure, ()).write(folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_figure_fits_on_a_page_with_its_caption() -> None:
    for file in sorted((ROOT / "paper" / "figures").glob("*.svg")):
        height = re.search(r'height="([\d.]+)pt"', file.read_text(encoding="utf-8"))
        assert height, file
        assert float(height[1]) <= 620, f"{file.name} is higher than what a page leaves beside a caption"
