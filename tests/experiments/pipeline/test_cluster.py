"""Stages as jobs: on submitit's local executor, and on a Slurm of three shell scripts."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from classifier_emergence.cli.app import run
from experiments.pipeline import cluster
from experiments.pipeline.__main__ import NAME, app
from experiments.pipeline.graph import stale, to_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning"),  # in DVC
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),  # what submitit started
]

CONFIG = "[core]\n    no_scm = true\n    analytics = false\n"
SLURM = {
    "sbatch": """
        id=$(($(ls $HERE | wc -l) + 100)); touch $HERE/$id
        export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
        (bash $1; echo COMPLETED >$HERE/$id) >/dev/null 2>&1 &
        echo RUNNING >$HERE/$id
        echo Submitted batch job $id""",
    "srun": """
        while [ "$1" != "${1#--}" ]; do [ $1 = --output ] && { log=$2; shift; }; shift; done
        "$@" >$(echo $log | sed "s/%j/$SLURM_JOB_ID/; s/%t/0/") 2>&1""",
    "sacct": """
        echo "JobID|State|NodeList"
        for id in $(ls $HERE); do echo "$id|$(cat $HERE/$id)|here"; done""",
}


def pipeline(folder: Path, stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline in a folder, which becomes the current one; what its commands print is nobody's."""
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text(CONFIG)
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cluster, "POLL", 0.05)


def submit(*words: str) -> int:
    return run(["submit", *words], app, NAME)


def test_jobs_run_in_the_order_of_the_graph_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {
        "last": {"cmd": "cat first middle >last", "deps": ["first", "middle"], "outs": ["last"]},
        "middle": {"cmd": "echo so it is; cat first mended >middle", "deps": ["first"], "outs": ["middle"]},
        "first": {"cmd": "echo 1 >first", "outs": ["first"]},
    }
    pipeline(tmp_path, stages, monkeypatch)
    assert submit("--cluster", "local", "--at-once", "1") == 1
    shown = capsys.readouterr()
    assert "failed, or waiting for what failed: middle, last; fix it" in shown.out
    said = [line.partition(": ") for line in shown.err.splitlines()]
    assert [(name, what.split()[0]) for name, _, what in said] == [
        ("first", "job"), ("first", "done"), ("middle", "job"), ("middle", "failed;"),
    ]  # fmt: skip
    log = tmp_path / said[-1][2].removeprefix("failed; its log is ")
    assert log.is_relative_to(tmp_path / "data" / "jobs" / "middle")
    assert "so it is" in log.read_text()
    assert "mended: No such file" in log.read_text()

    (tmp_path / "mended").write_text("2\n")
    assert submit("--cluster", "local") == 0
    shown = capsys.readouterr()
    assert "first" not in shown.err
    assert shown.out == "2 of 2 stages done\n"
    assert (tmp_path / "last").read_text() == "1\n1\n2\n"
    assert stale(["first", "middle", "last"]) == {}
    assert submit() == 0
    assert capsys.readouterr().out == "nothing is stale\n"


def test_what_is_outside_git_goes_through_the_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {
        "make": {"cmd": "echo x >>runs; echo 1 >made", "outs": ["made"]},
        "use": {"cmd": "cat made own >used", "deps": ["made", "own"], "outs": [{"used": {"cache": False}}]},
    }
    pipeline(tmp_path, stages, monkeypatch)
    (tmp_path / ".dvc" / "config").write_text(CONFIG + "    remote = it\n['remote \"it\"']\n    url = ../../it\n")
    (tmp_path / "own").write_text("2\n")
    assert submit("--cluster", "local") == 0
    assert [file.read_text() for file in (tmp_path.parent / "it").rglob("*") if file.is_file()] == ["1\n"]

    (tmp_path / "own").write_text("3\n")
    (tmp_path / "made").unlink()
    shutil.rmtree(tmp_path / ".dvc" / "cache")
    assert to_run(["use"]) == {"use": {"make"}, "make": set()}
    assert submit("--cluster", "local") == 0
    assert (tmp_path / "used").read_text() == "1\n3\n"
    assert (tmp_path / "runs").read_text() == "x\n"


def test_a_job_that_is_still_with_slurm_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    for name, text in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\nHERE={tmp_path / 'jobs'}\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))
    cmd = "until [ -e go ]; do sleep 0.05; done; echo x >>runs; echo 1 >made"
    pipeline(tmp_path, {"make": {"cmd": cmd, "outs": ["made"]}}, monkeypatch)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(cluster.time, "sleep", interrupted)
        assert submit("--set", "slurm_partition=cpu") == 130
    assert "go on; the same command waits for them" in capsys.readouterr().err
    sheet = next((tmp_path / "data" / "jobs" / "make").glob("*_submission.sh")).read_text()
    assert "#SBATCH --partition=cpu\n" in sheet
    assert "#SBATCH --time=60\n" in sheet

    (tmp_path / "go").touch()
    assert submit() == 0
    assert "submitted before" in capsys.readouterr().err
    assert (tmp_path / "runs").read_text() == "x\n"
    assert stale(["make"]) == {}


@pytest.mark.parametrize("word", ["slurm_partition", "nonsense=1"])
def test_an_option_that_submitit_does_not_know_is_one_line(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(tmp_path, {"make": {"cmd": "echo 1 >made", "outs": ["made"]}}, monkeypatch)
    assert submit("--cluster", "local", "--set", word) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "made").exists()
