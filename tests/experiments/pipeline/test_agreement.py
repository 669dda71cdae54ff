"""When do regenerated results agree with the committed ones? Numbers of training may move, findings may not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from classifier_emergence.numbers import number
from classifier_emergence.results import write_result
from experiments.pipeline.reproduce import pace, report

ROOT = Path(__file__).resolve().parents[3]
MODEL = "smollm2-135m-instruct"
TRAINED, READ = Path(f"results/cot_alignment/{MODEL}.json"), Path(f"results/probing/{MODEL}.json")
CLAIMS = Path("results/claims.json")


@pytest.fixture
def regenerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, Any]:
    """The committed results, to be changed; the folder with the regenerated ones is the current one."""
    monkeypatch.chdir(tmp_path)
    return {file: json.loads((ROOT / file).read_text(encoding="utf-8")) for file in (TRAINED, READ, CLAIMS)}


def agree(results: dict[Path, Any]) -> bool:
    for file, result in results.items():
        write_result(file, result)
    return report(ROOT, results)


def test_the_committed_results_agree_with_themselves(
    regenerated: dict[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert agree(regenerated)
    assert "YES: all 3 regenerated results agree" in capsys.readouterr().out


def test_it_ends_with_the_primary_numbers_of_what_ran(
    regenerated: dict[Path, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.pipeline.reproduce.console", Console(highlight=False, width=250))
    piece = next(e for e in regenerated[CLAIMS]["C20"]["evidence"] if e["primary"] and e["model"] == MODEL)
    committed, piece["value"] = number(piece["value"], 3), 0.0421
    regenerated[CLAIMS]["C20"]["headline"] = "inconclusive"
    agree(regenerated)
    rows = [line for line in capsys.readouterr().out.splitlines() if "│ C" in line]
    assert {MODEL} == {re.split("[@ ]", row.split("│")[2].strip())[1] for row in rows}
    assert {"cot_alignment", "probing"} == {row.split("│")[2].strip().partition("@")[0] for row in rows}
    (changed,) = [[cell.strip() for cell in row.split("│")] for row in rows if "│ C20" in row]
    assert changed[4].startswith(committed)
    assert changed[5].startswith("0.042")
    assert changed[6] == "inconclusive"
    assert all("same" in row for row in rows if "│ C20" not in row)


def test_a_slow_start_is_no_forecast_but_a_slow_machine_is() -> None:
    assert pace(0, 0) == 1
    assert pace(5, 1) < 1.5  # a download
    assert pace(200, 100) == pytest.approx(2, rel=0.1)


def test_other_numbers_of_training_agree_as_long_as_seeds_overlap(
    regenerated: dict[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    chain = regenerated[TRAINED]["chain_of_thought"]
    chain["alignment"]["inner_peak"]["value"] *= 0.9
    chain["by_seed"][0]["losses"][0]["loss"] += 1.0
    assert agree(regenerated)
    assert "other 1, of training, over seeds" in " ".join(capsys.readouterr().out.split())
    for names, agrees in ((["inner_peak"], True), (["last", "last_top", "at_classifier"], False)):
        for name in names:  # one of ten may lie apart by chance
            chain["alignment"][name]["interval"] = [2.0, 3.0]
        assert agree(regenerated) is agrees
    assert f"cot_alignment/{MODEL} $.chain_of_thought.alignment.last.interval" in capsys.readouterr().out


def test_a_result_of_training_that_lost_a_part_does_not_agree(regenerated: dict[Path, Any]) -> None:
    del regenerated[TRAINED]["direct"]["answers"]["exact"]
    assert not agree(regenerated)


def test_what_no_training_made_agrees_within_its_tolerance_only(regenerated: dict[Path, Any]) -> None:
    curve = regenerated[READ]["controlled"]["symbol"]["held_out_operands"]["accuracy"]
    curve[5] -= 0.004  # two of 480
    assert agree(regenerated)
    curve[5] -= 0.01
    assert not agree(regenerated)


def test_claims_agree_by_headlines_and_states(regenerated: dict[Path, Any]) -> None:
    claims = regenerated[CLAIMS]
    moved = next(piece for piece in claims["C23"]["evidence"] if "adds to the reward" in piece["what"])
    assert moved["state"] == "open"
    moved["value"] = 0.017  # on the other side of its bound, and still within its interval
    claims["C07"]["evidence"][0]["value"] += 1  # a rank, and whole
    claims["C09"]["steady"] = 0.9
    assert agree(regenerated)
    moved["state"] = "met"  # what was open is decided: no contradiction
    assert agree(regenerated)
    decided = next(piece for piece in claims["C08"]["evidence"] if piece["state"] == "met")
    for state, agrees in (("open", True), ("violated", False)):
        decided["state"] = state
        assert agree(regenerated) is agrees
    decided["state"] = "met"
    said = claims["C09"]["headline"]
    for steady, headline, agrees in (
        (0.97, "inconclusive", True),
        (1, "inconclusive", False),
        (0.97, "untested", False),
    ):
        claims["C09"] |= {"steady": steady, "headline": headline}  # as other seeds might have it, or not
        assert agree(regenerated) is agrees
    claims["C09"]["headline"] = said
    claims["C08"]["headline"] = "inconclusive"
    assert not agree(regenerated)
    del claims["C08"]
    assert not agree(regenerated)
