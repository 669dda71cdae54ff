"""Before and after: differences of paired readings, with intervals that hold what they should."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.comparison import MapComparison, changes, compare
from classifier_emergence.instruments.lens import lens
from classifier_emergence.instruments.lens_map import lens_map
from classifier_emergence.instruments.probe import probe
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.results import write_result

PROMPTS = [f"{a} {sign} {b} =" for sign in "*+" for a, b in ((7, 8), (12, 5), (3, 9), (6, 7))]


def test_a_lens_compared_is_a_paired_difference_over_prompts(lm: LanguageModel, tmp_path: Path) -> None:
    before = lens(lm, PROMPTS, ["add", "multiply"], null_words=0)
    rise = np.linspace(0.1, 0.2, len(PROMPTS))
    after = replace(before, model="after", alignment=before.alignment + rise)
    both = compare(before, after)
    assert both.difference == pytest.approx(np.full((2, 5), 0.15))
    assert both.interval is not None
    assert (both.interval[..., 0] > 0.1).all()
    assert (both.interval[..., 0] < 0.15).all()
    assert (both.interval[..., 1] > 0.15).all()
    write_result(tmp_path / "both.json", both.to_dict())
    assert isinstance(both.plot(), Figure)
    assert compare(lens(lm, PROMPTS[:1], ["add"]), lens(lm, PROMPTS[:1], ["add"])).interval is None


def test_probes_compared_have_newcombes_interval(lm: LanguageModel) -> None:
    before = probe(lm, PROMPTS, [1] * 4 + [0] * 4, shuffles=1)
    both = compare(before, before)
    assert not both.difference.any()
    assert both.interval is not None
    assert (both.interval[..., 0] < 0).all()
    assert (both.interval[..., 1] > 0).all()


@pytest.mark.parametrize("colour", ["probability", "entropy", "add"])
def test_maps_compared_are_before_after_and_the_difference(colour: str, lm: LanguageModel, tmp_path: Path) -> None:
    before = lens_map(lm, "7 * 8 =", ["add"])
    after = replace(
        before,
        model="after",
        alignment=before.alignment + 0.25,
        entropy=before.entropy - 1,
        probability=before.probability / 2,
    )
    both = compare(before, after)
    assert isinstance(both, MapComparison)
    expected = {"probability": -before.probability[..., 0] / 2, "entropy": -1.0, "add": 0.25}[colour]
    assert both.difference(colour) == pytest.approx(np.broadcast_to(expected, before.entropy.shape))
    for row in both.rows():
        assert row["add after"] - row["add before"] == pytest.approx(0.25)
    write_result(tmp_path / "both.json", both.to_dict())
    figure = both.plot(colour)
    maps = [axis for axis in figure.axes if axis.texts]
    assert len(maps) == 3
    digits = [text.get_text() for text in maps[2].texts]
    assert {"entropy": "-1.00", "add": "+25"}.get(colour, digits[0]) == digits[0]
    assert changes(np.array([[0.5, -1e-5, -0.25]]), colour)[0][1] == "·"
    low, high = maps[2].images[0].get_clim()
    assert low == -high
    assert [axis.images[0].get_clim() for axis in maps[:2]] == [maps[0].images[0].get_clim()] * 2


def test_a_long_text_is_compared_in_panels_below_one_another(lm: LanguageModel) -> None:
    seen = lens_map(lm, "7 * 8 = " * 8, layers=["L1"])
    parts = -(-len(seen.read) // 16)
    assert parts > 1
    figure = compare(seen, seen).plot()
    assert len([axis for axis in figure.axes if axis.texts]) == 3 * parts
    with pytest.raises(InputError, match="differ in tokens, positions; "):
        compare(seen, lens_map(lm, "7 * 8 =", layers=["L1"]))


def test_readings_that_are_not_alike_are_refused(lm: LanguageModel) -> None:
    one, other = (lens(lm, PROMPTS[:1], [word], null_words=0) for word in ("add", "multiply"))
    with pytest.raises(InputError, match="differ in targets; "):
        compare(one, other)
    with pytest.raises(InputError, match="at least one target"):
        compare(*[lens(lm, PROMPTS[:1])] * 2)
    with pytest.raises(InputError, match=r"differ in layers read \(5 and 1\); .*of one depth"):
        compare(one, lens(lm, PROMPTS[:1], ["add"], null_words=0, layers=["L1"]))
    probed = probe(lm, PROMPTS, [1] * 4 + [0] * 4, shuffles=1)
    with pytest.raises(InputError, match="two readings of lens, of lens_map or of probe"):
        compare(one, probed)
    seen = lens_map(lm, PROMPTS[0])
    for reading in (one, probed, seen):
        with pytest.raises(InputError, match="differ in site; "):
            compare(reading, replace(reading, site="attn_out"))
    others = replace(probed, prompts=PROMPTS[::-1], n_by_class=(3, 5), C=2.0, folds=3)
    with pytest.raises(InputError, match="differ in prompts, class sizes, C, folds; "):
        compare(probed, others)
