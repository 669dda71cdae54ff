"""The key outcomes of every stage, and of the whole pipeline on tiny models, against their snapshots."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from headlines import HEADLINES, headline, verdicts
from syrupy.assertion import SnapshotAssertion

from classifier_emergence.results import read_result
from experiments.params import load_params
from experiments.pipeline.reproduce import report
from experiments.shared.stage import RESULTS, STAGES, TRAINING, result_path

ROOT = Path(__file__).resolve().parents[1]


def results_of(params: str) -> list[tuple[str, str]]:
    """Stages with a result, each with every model that it runs on."""
    models = load_params(ROOT / params)
    return [(stage, model) for stage in HEADLINES for model in getattr(models, STAGES[stage])]


def test_every_stage_with_a_result_has_headlines() -> None:
    assert {*HEADLINES, "residuals"} == {*STAGES}


@pytest.fixture
def pinned(committed: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Of a file of results what a snapshot pins, as it is committed; the tree's must agree as ``reproduce`` asks it to.

    With ``--snapshot-update``, and of a result that is not committed yet, what is in the tree.
    """
    monkeypatch.chdir(ROOT)

    def read(file: Path) -> Any:
        if request.config.option.update_snapshots or not (committed / file).exists():
            return read_result(file)
        assert report(committed, [file]), "see the table above"
        return read_result(committed / file)

    return read


@pytest.mark.parametrize(("stage", "model"), results_of("params.yaml"))  # which name the snapshot files
def test_headlines(stage: str, model: str, pinned: Callable[[Path], Any], numbers: SnapshotAssertion) -> None:
    assert headline(pinned(result_path(stage, model)), HEADLINES[stage]) == numbers


def test_verdicts(pinned: Callable[[Path], Any], numbers: SnapshotAssertion) -> None:
    assert verdicts(pinned(RESULTS / "claims.json")) == numbers


SHAKY = r"^((top|bottom)_tokens?|null_words|texts|hits|(null_)?categor(y|ies))$"
"""Tokens and generated text: those of near ties flip between machines, and they are no claim."""
COARSE = r"(^|_)p$"
"""On tiny models: p-values over few null words, in steps of one twentieth, of contrasts that are nearly none."""
CHAOTIC = ("grpo", "collapse", "staged", "replication", "moe_routers", "tuning")
"""Where a drawn or written token, or a choice between experts, that a rounding error turns changes all that follows."""
DEPTH = 4


def key_numbers(tree: dict[str, Any], depth: int) -> dict[str, Any]:
    """Values and lists of numbers down to a depth, without those that are shaky or coarse."""
    found: dict[str, Any] = {}
    for key, item in tree.items():
        if re.search(f"{SHAKY}|{COARSE}", key):
            continue
        if isinstance(item, dict):
            found |= {key: inner} if depth > 1 and (inner := key_numbers(item, depth - 1)) else {}
        elif not isinstance(item, list) or all(isinstance(x, int | float) for x in item):
            found[key] = item
    return found


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A tree with all that is in either."""
    both = {key: merged(one[key], other[key]) for key in {*one} & {*other} if isinstance(one[key], dict)}
    return {**one, **other, **both}


def shape(value: Any) -> Any:
    """What stands where, without the numbers."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return "text" if isinstance(value, str) else "numbers, if any"


def settled(claim: dict[str, Any]) -> dict[str, Any]:
    """A claim without what training decides in tiny models."""
    trained = [Path(piece["result"]["file"]).parent.name in TRAINING for piece in claim["evidence"]]
    evidence = [{"state": None if t else piece["state"]} for piece, t in zip(claim["evidence"], trained, strict=True)]
    return {"headline": None if any(trained) else claim["headline"], "evidence": evidence}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the whole pipeline on tiny models."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say on the way; elsewhere in the tests it is an error
        tiny.run(folder)
    return folder


@pytest.mark.tiny
@pytest.mark.parametrize(("stage", "model"), results_of("params.tiny.yaml"))
def test_tiny_results(stage: str, model: str, tiny_run: Path, tiny_numbers: SnapshotAssertion) -> None:
    result = read_result(tiny_run / "results" / stage / f"{model}.json")
    result.pop("source", None)  # hashes of weights that were trained just now
    best = key_numbers(headline(result, HEADLINES[stage]), depth=9)
    found = merged(key_numbers(result, 2 if stage in CHAOTIC else DEPTH), best)
    assert (shape(found) if stage in CHAOTIC else found) == tiny_numbers


@pytest.mark.tiny
def test_tiny_verdicts(tiny_run: Path, tiny_numbers: SnapshotAssertion) -> None:
    claims = read_result(tiny_run / "results" / "claims.json")
    assert verdicts({key: settled(claim) for key, claim in claims.items()}) == tiny_numbers


@pytest.mark.tiny
def test_the_tiny_run_ends_with_a_paper(tiny_run: Path) -> None:
    assert (tiny_run / "paper" / "paper.pdf").read_bytes().startswith(b"%PDF")
    for name in ("claims", "probing_reported", "lens_controlled"):
        for ending in ("csv", "md", "tex"):
            assert "tiny-llama" in (tiny_run / "paper" / "tables" / f"{name}.{ending}").read_text() or name == "claims"
    for name in ("probe_depth", "lens_heatmap", "alignment_null", "dual_reward_steps", "dual_reward_arms",
                 "fine_tuning_depth", "fine_tuning_answers", "other_tasks", "grpo_steps", "grpo_depth",
                 "collapse_map", "collapse_gradients", "staged", "router_maxima", "routing_load", "routing_domains",
                 "routing_layers", "mixture_lens", "router_power", "written_words"):  # fmt: skip
        assert (tiny_run / "paper" / "figures" / f"{name}.svg").stat().st_size > 1000


@pytest.mark.tiny
def test_results_are_finite_json_without_time_or_place(tiny_run: Path) -> None:
    for path in (tiny_run / "results").rglob("*.json"):
        text = path.read_text()
        json.loads(text, parse_constant=pytest.fail)
        assert str(tiny_run) not in text
