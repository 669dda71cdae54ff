"""Before and after: differences of paired readings, with intervals that hold what they should."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.comparison import compare
from classifier_emergence.instruments.lens import lens
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


def test_readings_that_are_not_alike_are_refused(lm: LanguageModel) -> None:
    one, other = (lens(lm, PROMPTS[:1], [word], null_words=0) for word in ("add", "multiply"))
    with pytest.raises(InputError, match="the same prompts, and at least one target"):
        compare(one, other)
    with pytest.raises(InputError, match="layers read; take models of one depth"):
        compare(one, lens(lm, PROMPTS[:1], ["add"], layers=["L1"]))
    with pytest.raises(InputError, match="two readings of lens, or two of probe"):
        compare(one, probe(lm, PROMPTS, [1] * 4 + [0] * 4, shuffles=1))
