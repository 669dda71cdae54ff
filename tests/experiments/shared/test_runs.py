"""Runs that are done once, by one process or by two, and whatever ends them early."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from classifier_emergence.errors import InputError
from classifier_emergence.results import read_result, write_result, write_text_atomic
from experiments.params import Params, load_params
from experiments.shared.runs import Run, Runs
from experiments.shared.summaries import over_seeds, share_of

ROOT = Path(__file__).resolve().parents[3]
PARAMS = load_params(ROOT / "params.tiny.yaml")
PATH = os.environ.get("PYTHONPATH", "")


def build(params: Params, key: str) -> str:
    return key


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.chdir(tmp_path)
    write_result("results/fetch/m.json", {"sha256": "a"})
    return Runs("dual_reward", "m", PARAMS, build)


def gives(result: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    return lambda study, work: result


def test_a_run_gets_the_study_and_its_arguments_and_is_done_once(runs: Runs) -> None:
    assert runs.once("a", lambda study, work, x: {"study": study, "x": x}, 1) == {"study": "m", "x": 1}
    assert runs.once("a", gives({"x": 2})) == {"study": "m", "x": 1}


def test_a_result_is_the_same_whether_computed_or_kept(runs: Runs) -> None:
    computed = runs.once("a", gives({"x": 1 / 3, "pair": (1, 2)}))
    assert computed == runs.once("a", gives({}))


def test_a_failed_run_leaves_no_result_but_its_checkpoints(runs: Runs) -> None:
    def fails(_: object, work: Path) -> dict[str, Any]:
        work.mkdir(parents=True)
        (work / "checkpoint").touch()
        raise KeyboardInterrupt

    def found(_: object, work: Path) -> dict[str, Any]:
        return {"resumed": (work / "checkpoint").exists()}

    with runs, pytest.raises(KeyboardInterrupt):
        runs.once("a", fails)
    work = runs.folder / f"a-{runs.state[:16]}"
    assert (work / "checkpoint").exists()
    assert not (runs.folder / "a.json").exists()
    params = PARAMS.model_copy(update={"dual_reward": PARAMS.dual_reward.model_copy(update={"steps": 99})})
    with Runs("dual_reward", "m", params, build) as others:  # whose run is another
        assert others.once("a", found) == {"resumed": False}
    others.folder.joinpath("a.json").unlink()
    with runs:
        assert runs.once("a", found) == {"resumed": True}
    assert not work.exists()


def test_members_that_were_measured_before_a_kill_are_not_measured_again(runs: Runs) -> None:
    asked: list[list[str]] = []

    def together(study: str, work: Path, wanted: list[str], end: int) -> Iterator[tuple[str, dict[str, Any]]]:
        asked.append(list(wanted))
        work.mkdir(parents=True, exist_ok=True)
        for name in wanted[:end]:
            yield name, {"study": study, "name": name}
        if end < len(wanted):
            raise KeyboardInterrupt

    def run(end: int) -> Run:
        return Run("group", together, (end,), ("a", "b", "c"))

    with runs, pytest.raises(KeyboardInterrupt):
        runs.all([run(2)])
    work = runs.folder / f"group-{runs.state[:16]}"
    assert work.exists()  # the checkpoints of all
    with runs:
        found = runs.all([run(3)])
        assert found == runs.all([run(3)]) == {name: {"study": "m", "name": name} for name in "abc"}
    assert asked == [["a", "b", "c"], ["c"]]
    assert not work.exists()


def test_every_process_finds_the_runs_of_another(runs: Runs) -> None:
    # Modules of one name in both packages, and sets in the order of the hash seed.
    code = """
import experiments.report.ledger, experiments.report.figures.__main__, experiments.report.build
from experiments.params import load_params
from experiments.shared.runs import Runs
print(Runs("dual_reward", "m", load_params(PARAMS), print).state)
""".replace("PARAMS", repr(str(ROOT / "params.tiny.yaml")))
    states = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{PATH}", "PYTHONHASHSEED": str(seed)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in range(2)
    }  # fmt: skip
    assert len(states) == 1


@pytest.mark.parametrize("changed", ["weights", "parameters", "residuals", "adapters"])
def test_runs_of_another_state_are_done_again(runs: Runs, changed: str) -> None:
    Runs("dual_reward", "m", PARAMS, build, "lora_sft").once("a", gives({"x": 1}))
    params = PARAMS
    if changed in ("residuals", "adapters"):
        file = {"residuals": "residuals/m.safetensors.sha256", "adapters": "adapters/lora_sft/m/manifest.json"}[changed]
        write_text_atomic(Path("data", file), "other")
    elif changed == "weights":
        write_result("results/fetch/m.json", {"sha256": "b"})
    else:
        params = PARAMS.model_copy(update={"dual_reward": PARAMS.dual_reward.model_copy(update={"steps": 99})})
    assert Runs("dual_reward", "m", params, build, "lora_sft").once("a", gives({"x": 2})) == {"x": 2}


def test_finishing_writes_the_result_and_keeps_only_the_adapters(runs: Runs) -> None:
    runs.once("a", gives({"x": 1}))
    (runs.adapters / "seed-0").mkdir(parents=True)
    runs.finish({"x": 1})
    assert read_result(runs.result) == {"x": 1}
    assert (runs.kept / "seed-0").is_dir()
    assert not runs.folder.exists()


def test_a_stage_runs_on_a_model_once_at_a_time(runs: Runs) -> None:
    other = Runs("dual_reward", "m", PARAMS, build)
    with runs, pytest.raises(InputError, match="dual_reward: another process is running this stage on m"), other:
        pass
    with other:
        pass


def test_an_accuracy_over_seeds_spans_the_seeds_intervals() -> None:
    seeds = [{"part": {"top": share_of(hits, 0.95)}} for hits in ([1, 1, 0, 1], [1, 0, 0, 0])]
    found = over_seeds(seeds, "part.top")
    assert (found["value"], found["least"], found["largest"], found["n"]) == (0.5, 0.25, 0.75, 4)
    low, high = found["interval"]
    assert low == seeds[1]["part"]["top"]["interval"][0]
    assert high == seeds[0]["part"]["top"]["interval"][1]


def test_with_one_thread_there_is_one_process(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with runs:  # of functions that no other process could be given
        assert runs.all([Run(name, gives({"process": os.getpid()})) for name in "ab"]) == {
            name: {"process": os.getpid()} for name in "ab"
        }


def test_names_of_arms_are_plain_file_names() -> None:
    from experiments.stages.dual_reward import all_arms

    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in all_arms(PARAMS))


# --- Two processes ---

STAGE = '''
"""Nine cheap runs."""

import os
import time
from pathlib import Path

import torch

from classifier_emergence.errors import InputError
from classifier_emergence.progress import progress
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main

CASE = os.environ["CASE"]


def build(params, key):
    note("built")
    return key


def note(what):
    with Path("notes").open("a") as file:
        file.write(f"{what} {os.getpid()}\\n")


def call(study, work, n):
    note(f"started-{n}")
    with progress(f"bar of run {n}", total=1):
        if CASE == "waits":
            time.sleep(60)
        if CASE in ("raises", "dies") and n == 4:
            while not Path("data/runs/dual_reward/tiny-gemma/run-2.json").exists():
                time.sleep(0.01)
            if CASE == "dies":
                os._exit(9)
            raise InputError("four: is refused; take five")
        time.sleep(0.3)  # for the other worker to start
    return {"study": study, "n": n, "process": os.getpid(), "threads": torch.get_num_threads()}


def run(params, key):
    with Runs("dual_reward", key, params, build) as runs:
        results = runs.all([Run(f"run-{n}", call, (n,)) for n in range(9)])
        runs.finish({"parent": os.getpid(), "order": list(results), "runs": list(results.values())})


if __name__ == "__main__":
    main(run, __doc__)
'''


LIBRARIES = {
    "torch": """
import os
from types import SimpleNamespace

_threads = int(os.environ["OMP_NUM_THREADS"])
cuda = SimpleNamespace(is_available=lambda: False)


def get_num_threads():
    return _threads


def set_num_threads(count):
    global _threads
    _threads = count


def manual_seed(seed):
    pass
""",
    "transformers": """
from types import SimpleNamespace

utils = SimpleNamespace(logging=SimpleNamespace(disable_progress_bar=lambda: None))
""",
}
"""What a stage asks of libraries before its runs: where only the ends of processes matter, these stand for them."""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a stage in an own folder, in which ``experiments`` has it beside its other stages."""
    (tmp_path / "light").mkdir()
    for name, text in LIBRARIES.items():
        (tmp_path / "light" / f"{name}.py").write_text(text)
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"__path__.append({str(ROOT / 'experiments')!r})\n")
    (folder / "nine.py").write_text(STAGE)
    write_result(tmp_path / "results/fetch/tiny-gemma.json", {"sha256": "a"})
    command = [sys.executable, "-m", "experiments.nine", "--model", "tiny-gemma"]

    def started(case: str = "", *, threads: int = 2, light: bool = True) -> subprocess.Popen[str]:
        places = [*([str(tmp_path / "light")] if light else []), str(tmp_path), PATH]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(places),
            "OMP_NUM_THREADS": f"{threads}",
            "CASE": case,
        }
        # A background job ignores interrupts, and so would its children, unless one of them was told otherwise.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(
            [*command, "--params", str(ROOT / "params.tiny.yaml")], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return started


def notes(folder: Path, what: str) -> list[int]:
    """Processes that noted something."""
    lines = (folder / "notes").read_text().split("\n") if (folder / "notes").exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith(what)]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


Start = Callable[..., subprocess.Popen[str]]


def test_two_workers_make_runs_on_half_of_the_threads_and_show_no_bars(start: Start, tmp_path: Path) -> None:
    stage = start(light=False)
    output, errors = stage.communicate()
    assert (stage.returncode, output, errors) == (
        0,
        "",
        "dual_reward of tiny-gemma: 8 runs, two at a time\nbar of run 8\n",
    )
    result = read_result(tmp_path / "results/dual_reward/tiny-gemma.json")
    assert result["order"] == [f"run-{n}" for n in range(9)]
    assert [(run["study"], run["n"]) for run in result["runs"]] == [("tiny-gemma", n) for n in range(9)]
    *paired, last = result["runs"]
    workers = {run["process"] for run in paired}
    assert len(workers) == 2
    assert result["parent"] not in workers
    assert {run["threads"] for run in paired} == {1}
    # The last of an odd number is made by the first process, on all threads.
    assert (last["process"], last["threads"]) == (result["parent"], 2)
    assert sorted(notes(tmp_path, "built")) == sorted([*workers, result["parent"]])  # once in each process
    assert not any(map(is_alive, workers))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("raises", "error: four: is refused; take five\n"),
        ("dies", "error: dual_reward: a process that made a run died"),
    ],
)
def test_what_ends_a_worker_is_told_in_one_line_and_finished_runs_are_kept(
    case: str, message: str, start: Start, tmp_path: Path
) -> None:
    stage = start(case)
    _, errors = stage.communicate()
    assert stage.returncode == 2
    told = errors.removeprefix("dual_reward of tiny-gemma: 8 runs, two at a time\n")
    assert told.startswith(message)
    assert told.count("\n") == 1
    assert not any(map(is_alive, notes(tmp_path, "started")))
    kept = {path.stem for path in (tmp_path / "data/runs/dual_reward/tiny-gemma").glob("*.json")}
    assert "run-2" in kept
    assert "run-4" not in kept
    if case == "raises":  # what goes on is the same
        return
    (tmp_path / "notes").unlink()
    again = start(threads=1)  # as the line says
    again.communicate()
    assert again.returncode == 0
    made = {line.split()[0] for line in (tmp_path / "notes").read_text().splitlines()} - {"built"}
    assert made == {f"started-{n}" for n in range(9) if f"run-{n}" not in kept}


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_stage(ending: signal.Signals, start: Start, tmp_path: Path) -> None:
    stage = start("waits")
    wait_for(lambda: len(notes(tmp_path, "started")) == 2)
    stage.send_signal(ending)
    _, errors = stage.communicate(timeout=120)
    if ending == signal.SIGINT:
        assert stage.returncode == 130
        assert errors.endswith("interrupted; finished runs are kept\n")
    wait_for(lambda: not any(map(is_alive, notes(tmp_path, "started"))), seconds=60)
