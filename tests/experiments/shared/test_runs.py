"""What the training stages share: runs that are done once, and numbers over seeds."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from classifier_emergence.results import read_result, write_result
from experiments.params import load_params
from experiments.shared.runs import Runs, over_seeds, share_of

ROOT = Path(__file__).resolve().parents[3]
PARAMS = load_params(ROOT / "params.tiny.yaml")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.chdir(tmp_path)
    write_result("results/fetch/m.json", {"sha256": "a"})
    return Runs("dual_reward", "m", PARAMS)


def test_a_run_is_done_once(runs: Runs) -> None:
    assert runs.once("a", lambda _: {"x": 1}) == {"x": 1}
    assert runs.once("a", lambda _: {"x": 2}) == {"x": 1}


def test_a_result_is_the_same_whether_computed_or_kept(runs: Runs) -> None:
    computed = runs.once("a", lambda _: {"x": 1 / 3, "pair": (1, 2)})
    assert computed == runs.once("a", lambda _: {})


def test_a_failed_run_leaves_no_result_but_its_checkpoints(runs: Runs) -> None:
    def fails(work: Path) -> dict[str, Any]:
        work.mkdir(parents=True)
        (work / "checkpoint").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.once("a", fails)
    assert (runs.folder / "a" / "checkpoint").exists()
    assert not (runs.folder / "a.json").exists()
    runs.once("a", lambda work: {"resumed": (work / "checkpoint").exists()})
    assert not (runs.folder / "a").exists()


def test_every_process_finds_the_runs_of_another(runs: Runs) -> None:
    # Modules of one name in both packages, and sets in the order of the hash seed.
    code = """
import experiments.report.ledger, experiments.report.figures.__main__, experiments.report.build
from experiments.params import load_params
from experiments.shared.runs import Runs
print(Runs("dual_reward", "m", load_params(PATH)).state)
""".replace("PATH", repr(str(ROOT / "params.tiny.yaml")))
    states = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in range(4)
    }  # fmt: skip
    assert len(states) == 1


@pytest.mark.parametrize("changed", ["weights", "parameters"])
def test_runs_of_other_weights_or_parameters_are_done_again(runs: Runs, changed: str) -> None:
    runs.once("a", lambda _: {"x": 1})
    params = PARAMS
    if changed == "weights":
        write_result("results/fetch/m.json", {"sha256": "b"})
    else:
        params = PARAMS.model_copy(update={"dual_reward": PARAMS.dual_reward.model_copy(update={"steps": 99})})
    assert Runs("dual_reward", "m", params).once("a", lambda _: {"x": 2}) == {"x": 2}


def test_finishing_writes_the_result_and_keeps_only_the_adapters(runs: Runs) -> None:
    runs.once("a", lambda _: {"x": 1})
    (runs.adapters / "seed-0").mkdir(parents=True)
    runs.finish({"x": 1})
    assert read_result(runs.result) == {"x": 1}
    assert (runs.kept / "seed-0").is_dir()
    assert not runs.folder.exists()


def test_an_accuracy_over_seeds_spans_the_seeds_intervals() -> None:
    seeds = [{"part": {"top": vars(share_of(hits, PARAMS))}} for hits in ([1, 1, 0, 1], [1, 0, 0, 0])]
    found = over_seeds(seeds, "part.top")
    assert (found["value"], found["least"], found["largest"], found["n"]) == (0.5, 0.25, 0.75, 4)
    low, high = found["interval"]
    assert low == seeds[1]["part"]["top"]["interval"][0]
    assert high == seeds[0]["part"]["top"]["interval"][1]


def test_names_of_arms_are_plain_file_names() -> None:
    from experiments.stages.dual_reward import all_arms

    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in all_arms(PARAMS))


SIDE_BY_SIDE = """
import os, sys, time
import torch
from pathlib import Path
from experiments.params import load_params
from experiments.shared.runs import Runs

FIRST = "CLASSIFIER_EMERGENCE_SECOND" not in os.environ

def job(_):
    if not FIRST and sys.argv[1] == "second-fails":
        raise MemoryError
    time.sleep(0.2 if FIRST else 0.3)
    return {"first": FIRST, "threads": torch.get_num_threads()}

def made(names):
    runs = Runs("dual_reward", "m", load_params(sys.argv[2]))
    found = runs.all(dict.fromkeys(names, job))
    assert list(found) == list(names)
    return [found[name] for name in names]

for run in made("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNO") + made("123"):
    print(run["first"], run["threads"])
"""


@pytest.mark.parametrize("case", ["both-work", "second-fails", "one-thread"])
def test_runs_are_made_side_by_side(case: str, tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "pairs.py").write_text(SIDE_BY_SIDE)
    write_result(tmp_path / "results/fetch/m.json", {"sha256": "a"})
    (tmp_path / "experiments" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'experiments')!r})\n")
    command = [sys.executable, "-m", "experiments.pairs", case, str(ROOT / "params.tiny.yaml")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "1" if case == "one-thread" else "2",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    both = case == "both-work"
    assert {first for first, _ in found} == ({"True", "False"} if both else {"True"}), done.stderr
    # The last of an odd number has all threads; with one thread there is no second process to share with.
    assert found[-1] == ["True", "1" if case == "one-thread" else "2"]
    assert {threads for _, threads in found[:40]} == {"1"}
    assert ("second process ended early" in done.stderr) == (case == "second-fails")
