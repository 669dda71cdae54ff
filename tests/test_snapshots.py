"""The committed numbers, and those of the pipeline on tiny models, against their snapshots."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from classifier_emergence.results import read_result
from experiments.pipeline import tiny
from experiments.pipeline.reproduce import TRAINING

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted(str(path.relative_to(ROOT / "results")) for path in (ROOT / "results").rglob("*.json"))


@pytest.mark.parametrize("name", COMMITTED, ids=lambda name: name.replace("/", "-"))  # ids name the snapshot files
def test_committed_results(name: str, numbers: SnapshotAssertion) -> None:
    assert key_numbers(read_result(ROOT / "results" / name)) == numbers


SHAKY = r"^((top|bottom)_tokens?|null_words|texts|hits|(null_)?categor(y|ies))$"
COARSE = r"(^|_)p$"
"""On tiny models: p-values over few null words, in steps of one twentieth, of contrasts that are nearly none."""


def key_numbers(result: dict[str, Any], left_out: str = SHAKY) -> dict[str, Any]:
    """Everything but tokens and generated text: those of near ties flip between machines, and they are no claim."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if not re.search(left_out, k)}
        return [kept(item) for item in value] if isinstance(value, list) else value

    return {key: kept(value) for key, value in result.items()}


CHAOTIC = ("grpo", "collapse", "staged", "moe_routers")
"""Where one drawn token, or one choice between experts, that a rounding error turns changes all that follows."""


def shape(value: Any) -> Any:
    """What stands where, without the numbers."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [shape(value[0])]
    return "text" if isinstance(value, str) else "numbers, if any"


def judged(claim: dict[str, Any]) -> dict[str, Any]:
    """A claim without numbers, which stand in other snapshots, and without what training decides in tiny models."""
    evidence = []
    for piece in claim["evidence"]:
        trained = Path(piece["result"]["file"]).parent.name in TRAINING
        evidence.append({**piece, "value": None, "interval": None, "met": None if trained else piece["met"]})
    settled = all(piece["met"] is not None for piece in evidence)
    return {**claim, "evidence": evidence, "verdict": claim["verdict"] if settled else None}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the whole pipeline on tiny models in a temporary copy."""
    folder = tmp_path_factory.mktemp("tiny") / "copy"
    tiny.copy(folder)
    tiny.build(folder / "models")
    tiny.run(folder)
    return folder


TINY = [f"{stage}/tiny-{name}.json" for stage in ("fetch", "probing", "logit_lens") for name in ("llama", "gemma")]
# Training on one model: seconds count here.
TINY += [f"{stage}/tiny-{'llama' if stage == 'moe_routers' else 'gemma'}.json" for stage in TRAINING]


@pytest.mark.tiny
@pytest.mark.parametrize("name", [*TINY, "claims.json"], ids=lambda name: name.replace("/", "-"))
def test_tiny_results(name: str, tiny_run: Path, tiny_numbers: SnapshotAssertion) -> None:
    result = key_numbers(read_result(tiny_run / "results" / name), f"{SHAKY}|{COARSE}")
    if name.startswith("fetch"):
        del result["source"]  # hashes of weights that were trained just now
    if name == "claims.json":
        result = {key: judged(claim) for key, claim in result.items()}
    assert (shape(result) if name.startswith(CHAOTIC) else result) == tiny_numbers


@pytest.mark.tiny
def test_the_tiny_run_ends_with_a_paper(tiny_run: Path) -> None:
    assert (tiny_run / "paper" / "paper.pdf").read_bytes().startswith(b"%PDF")
    for name in ("claims", "probing_reported", "lens_controlled"):
        for ending in ("csv", "md", "tex"):
            assert "tiny-llama" in (tiny_run / "paper" / "tables" / f"{name}.{ending}").read_text() or name == "claims"
    for name in ("probe_depth", "lens_heatmap", "alignment_null", "dual_reward_steps", "dual_reward_arms",
                 "fine_tuning_depth", "fine_tuning_answers", "other_tasks", "grpo_steps", "grpo_depth",
                 "collapse_map", "staged"):  # fmt: skip
        assert (tiny_run / "paper" / "figures" / f"{name}.svg").stat().st_size > 1000
    for name in ("router_maxima", "routing_load", "routing_domains", "routing_layers", "mixture_lens"):
        assert (tiny_run / "paper" / "figures" / f"{name}.svg").stat().st_size > 1000


@pytest.mark.tiny
def test_a_finished_run_has_nothing_to_do(tiny_run: Path) -> None:
    assert "Running stage" not in tiny.repro(tiny_run, tiny.environment(tiny_run))


@pytest.mark.tiny
def test_results_are_finite_json_without_time_or_place(tiny_run: Path) -> None:
    for path in (tiny_run / "results").rglob("*.json"):
        text = path.read_text()
        json.loads(text, parse_constant=pytest.fail)
        assert str(tiny_run) not in text
