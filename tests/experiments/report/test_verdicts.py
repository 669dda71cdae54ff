"""The rule of the ledger as theorems: what may change a state and a headline, and what may not."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier_emergence.results import read_result
from classifier_emergence.statistics import wilson
from experiments.params import load_params
from experiments.pipeline.compare import STEADY
from experiments.report import verdicts
from experiments.report.claims import LEDGER, load_claims
from experiments.report.ledger import DRAWS, Piece, judge, measure, repetitions
from experiments.report.verdicts import Bounds, Number, corrected, decide, headline
from experiments.shared.stage import STAGES, results_of

ROOT = Path(__file__).resolve().parents[3]
CONFIDENCE = 0.95
ENDS = st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 6))
STATES = st.sampled_from(["met", "violated", "open", "descriptive", "void"])


@st.composite
def intervals(draw: st.DrawFn) -> tuple[float, float]:
    low, high = sorted((draw(ENDS), draw(ENDS)))
    return low, high + 0.01


@st.composite
def bounds(draw: st.DrawFn) -> Bounds:
    low, high = sorted((draw(ENDS), draw(ENDS)))
    return draw(st.sampled_from([Bounds(low=low), Bounds(high=high), Bounds(low, high)]))


def state(number: Number, of: Bounds) -> str:
    return decide(number, of, CONFIDENCE)[0]


@pytest.mark.parametrize(
    ("interval", "of", "expected"),
    [
        ((0.5, 0.7), Bounds(low=0.4), "met"),
        ((0.5, 0.7), Bounds(low=0.6), "open"),
        ((0.5, 0.7), Bounds(low=0.8), "violated"),
        ((0.5, 0.7), Bounds(high=0.8), "met"),
        ((0.5, 0.7), Bounds(high=0.6), "open"),
        ((0.5, 0.7), Bounds(high=0.4), "violated"),
        ((0.5, 0.7), Bounds(0.4, 0.8), "met"),
        ((0.5, 0.7), Bounds(0.6, 0.8), "open"),
        ((0.5, 0.7), Bounds(0.1, 0.4), "violated"),
        ((-0.16, 0.19), Bounds(low=0.01), "open"),
        (wilson(8, 8, confidence=CONFIDENCE), Bounds(low=wilson(8, 8, confidence=CONFIDENCE)[0]), "met"),
        (wilson(7, 8, confidence=CONFIDENCE), Bounds(low=wilson(8, 8, confidence=CONFIDENCE)[0]), "open"),
    ],
)
def test_a_state_says_where_the_interval_lies(interval: tuple[float, float], of: Bounds, expected: str) -> None:
    assert state(Number(sum(interval) / 2, interval), of) == expected


@given(intervals(), bounds())
@settings(deadline=None)
def test_the_state_is_that_of_the_definition(interval: tuple[float, float], of: Bounds) -> None:
    low, high = interval
    inside, outside = of.low <= low and high <= of.high, high < of.low or of.high < low
    near = min(abs(end - bound) for end in interval for bound in (of.low, of.high))
    if near > 1e-4:  # where an end lies on a bound it may go either way
        expected = "met" if inside else "violated" if outside else "open"
        assert state(Number(low, interval), of) == expected


@given(intervals(), intervals(), bounds())
@settings(deadline=None)
def test_narrowing_never_turns_a_state_into_its_contrary(
    interval: tuple[float, float], other: tuple[float, float], of: Bounds
) -> None:
    narrow = (max(interval[0], min(other[0], interval[1])), min(interval[1], max(other[1], interval[0])))
    wide = state(Number(0.0, interval), of)
    if narrow[0] < narrow[1] and wide in ("met", "violated"):
        assert state(Number(0.0, narrow), of) == wide


@given(intervals(), bounds(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_a_number_that_moves_within_its_interval_changes_nothing(
    interval: tuple[float, float], of: Bounds, one: float, other: float
) -> None:
    low, high = interval
    states = {state(Number(low + share * (high - low), interval), of) for share in (one, other)}
    assert len(states) == 1


def test_seeds_decide_where_there_is_no_interval_and_one_seed_never() -> None:
    above = Bounds(low=0.5)
    assert state(Number(0.6, None, (0.59, 0.6, 0.61)), above) == "met"
    assert state(Number(0.6, None, (0.4, 0.6, 0.8)), above) == "open"
    assert state(Number(0.3, None, (0.29, 0.3, 0.31)), above) == "violated"
    assert state(Number(0.6, (0.55, 0.65), (0.6,), one_seed=True), above) == "descriptive"
    assert state(Number(0.6), above) == state(Number(0.6, None, (0.6, 0.6)), above) == "descriptive"


def test_holm_opens_what_does_not_survive_that_there_are_many() -> None:
    found = [("met", 0.04), ("violated", 0.001), ("open", 0.3), ("void", 1.0), ("descriptive", 1.0)]
    assert corrected(found, CONFIDENCE) == ["open", "violated", "open", "void", "descriptive"]  # type: ignore[arg-type]
    assert corrected(found[:1], CONFIDENCE) == ["met"]  # type: ignore[arg-type]
    assert corrected([], CONFIDENCE) == []


@pytest.mark.parametrize(
    ("primary", "reported", "expected"),
    [
        ([], [], "untested"),
        (["violated", "violated"], ["met", "met"], "reported protocol only"),
        (["violated", "violated"], ["met", "open"], "contradicted"),
        (["violated"], [], "contradicted"),
        (["met", "met"], ["violated"], "supported"),
        (["met", "violated", "open"], [], "mixed by model"),
        (["met", "open"], [], "inconclusive"),
        (["void"], [], "inconclusive"),
        (["descriptive"], ["met"], "inconclusive"),
    ],
)
def test_the_headline_is_the_first_that_applies(primary: list, reported: list, expected: str) -> None:
    assert headline(dict(enumerate(primary)), reported) == expected  # type: ignore[arg-type]
    assert headline(dict(enumerate(primary)), reported, away=True) == "untested"  # type: ignore[arg-type]


@given(st.dictionaries(st.text(max_size=3), STATES, max_size=5), st.lists(STATES, max_size=4), st.randoms())
@settings(deadline=None)
def test_the_order_of_models_is_irrelevant(primary: dict, reported: list, order: random.Random) -> None:
    items = list(primary.items())
    order.shuffle(items)
    assert headline(dict(items), sorted(reported)) == headline(primary, reported)


@pytest.fixture(scope="module")
def paper(committed: Path) -> dict:
    """Of every claim of the paper, as committed, what ``judge`` takes: claim, pieces, confidence, facts."""
    params, ledger = load_params(ROOT / "params.yaml"), load_claims(ROOT / LEDGER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(committed)
        results = {stage: results_of(stage, params) for stage in STAGES if stage != "residuals"}
    return {
        key: (claim, measure(claim, results, params.models, params.confidence), params.confidence, results["fetch"])
        for key, claim in ledger.items()
    }


def test_the_order_of_models_changes_no_claim(paper: dict) -> None:
    for claim, pieces, *rest in paper.values():
        assert judge(claim, pieces[::-1], *rest)[0] == judge(claim, pieces, *rest)[0]


UNSTEADY = {"C11", "C21"}
"""Eight seeds do not settle what the answers of the largest model pay: little, if anything."""


def test_a_repetition_elsewhere_within_the_intervals_gives_the_same_headlines(paper: dict) -> None:
    said = {key: judge(*judged)[0] for key, judged in paper.items()}
    repeated = {key: repetitions(*judged) for key, judged in paper.items()}
    unsteady = {key for key in said if repeated[key].count(said[key]) < STEADY * DRAWS}
    assert unsteady == UNSTEADY
    flipped = sum(any(repeated[key][i] != said[key] for key in said.keys() - UNSTEADY) for i in range(DRAWS))
    assert flipped / DRAWS <= 1 - STEADY


def test_the_repetitions_would_show_a_headline_that_hangs_on_a_number(paper: dict) -> None:
    claim, pieces, *rest = paper["C14"]
    atoms = {p.atom: p.atom.model_copy(update={"at_least": 0.36}) for p in pieces if p.atom.primary}
    close = [replace(piece, atom=atoms.get(piece.atom, piece.atom)) for piece in pieces]
    assert len({*repetitions(claim, close, *rest)}) > 1


def test_correcting_primary_tests_with_the_others_changes_no_steady_headline(paper: dict) -> None:
    for claim, pieces, confidence, facts in (paper[key] for key in paper.keys() - UNSTEADY):
        flat = [replace(p, atom=p.atom.model_copy(update={"primary": False})) for p in pieces]
        states = judge(claim, flat, confidence, facts)[1]
        primary = {p.model: s for p, s in zip(pieces, states, strict=True) if p.atom.primary}
        reported = [s for p, s in zip(pieces, states, strict=True) if p.atom.protocol == "reported"]
        alone = judge(claim, pieces, confidence, facts)[0]
        assert verdicts.headline(primary, reported, away=claim.needs is not None) == alone


def over_seeds_too(piece: Piece, confidence: float) -> Piece:
    """With an interval that covers Student's over seeds as well."""
    number = piece.number
    parts = [x for x in (number.interval, replace(number, interval=None).shown(confidence)) if x]
    both = (min(low for low, _ in parts), max(high for _, high in parts)) if parts else None
    return replace(piece, number=replace(number, interval=both))


def test_asking_students_interval_over_seeds_as_well_changes_no_steady_headline(paper: dict) -> None:
    for claim, pieces, *rest in (paper[key] for key in paper.keys() - UNSTEADY):
        asked = [over_seeds_too(piece, rest[0]) for piece in pieces]
        assert judge(claim, asked, *rest)[0] == judge(claim, pieces, *rest)[0]


def test_what_moves_around_its_bound_inside_its_interval_is_open(committed: Path) -> None:
    claims = read_result(committed / "results" / "claims.json")
    (added,) = [piece for piece in claims["C23"]["evidence"] if "adds to the reward" in piece["what"]]
    assert added["interval"][0] < 0.006 < 0.01 < 0.017 < added["interval"][1]
    assert added["state"] == "open"
