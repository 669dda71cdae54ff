"""Run what is stale as jobs of a cluster, through submitit: on Slurm, or as processes of this machine.

A job is ``dvc repro`` of one stage, which records its result in dvc.lock itself. Where a job runs and when is the
cluster's affair; it is only held back here until what it needs has ended well.
"""

import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import submitit

from classifier_emergence.progress import notice
from experiments.pipeline.graph import has_remote, minutes_of, select, stale, to_run

JOBS = Path("data/jobs")
"""A folder for each stage, with its logs and what submitit keeps of its jobs."""
POLL = 1.0
"""Seconds between looks at the jobs."""
SLACK = 4
"""A job may take so many times the minutes of dvc.yaml, and an hour at least."""
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")


def submit(
    picks: Collection[str], cluster: str | None, at_once: int | None, options: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Run the stale ones of what ``graph.select`` gives as jobs, and wait for them.

    Args:
        picks: Stages and models.
        cluster: ``slurm`` or ``local``; none is Slurm where there is one.
        at_once: Most jobs that are queued or running at once.
        options: Parameters of ``submitit.AutoExecutor``, beside ours or in their place.

    Returns:
        The stages that ended well, and those that did not: they failed, or need one that failed.
    """
    stages = select(picks)
    found = stale([*stages])
    needs = to_run(found)
    if (absent := [name for name in needs if name not in found]) and has_remote():
        _dvc("pull", *absent)  # what the remote lacks is made again
        needs = to_run(found)
    waiting = [name for name in stages if name in needs]
    running: dict[str, submitit.Job[str]] = {}
    done: list[str] = []
    failed: list[str] = []
    try:
        while True:
            for name in [name for name, job in running.items() if job.done()]:
                (done if _ended_well(name, running.pop(name)) else failed).append(name)
            free = len(waiting) if at_once is None else at_once - len(running)
            unmet = {*waiting, *running, *failed}
            for name in [name for name in waiting if not needs[name] & unmet][:free]:
                waiting.remove(name)
                running[name] = _job(name, minutes_of(stages[name]), cluster, options)
            if not running:
                break
            time.sleep(POLL)
    except KeyboardInterrupt:
        notice("jobs that are with Slurm go on; the same command waits for them")
        raise
    if done and has_remote():
        _dvc("push", *done)
    return done, failed + waiting


def _job(name: str, minutes: float, cluster: str | None, options: Mapping[str, Any]) -> "submitit.Job[str]":
    """The job of a stage: one that an earlier command left with Slurm, else a new one."""
    executor = submitit.AutoExecutor(JOBS / name, cluster)
    if executor.cluster == "slurm":
        for file in (JOBS / name).glob("*_submitted.pkl"):
            job: submitit.Job[str] = submitit.SlurmJob(JOBS / name, file.name.partition("_")[0])
            if not job.done(force_check=True) and job.state != "UNKNOWN":
                notice(f"{name}: job {job.job_id}, submitted before")
                return job
    limit = max(60, round(SLACK * minutes))
    executor.update_parameters(**{"name": name, "timeout_min": limit, "stderr_to_stdout": True, **options})
    job = executor.submit(submitit.helpers.CommandFunction([*DVC, "repro", "--single-item", name]))
    notice(f"{name}: job {job.job_id}")
    return job


def _ended_well(name: str, job: "submitit.Job[str]") -> bool:
    well = job.exception() is None
    notice(f"{name}: " + ("done" if well else f"failed; its log is {job.paths.stdout.relative_to(Path.cwd())}"))
    return well


def _dvc(command: str, *names: str) -> None:
    """A transfer; where it fails, DVC says so, and what was not transferred is made again."""
    subprocess.run([*DVC, command, "--quiet", *names], check=False)
