"""What the training stages share: where runs and adapters lie, runs that are done once, and summaries of effects."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import ArrayLike

from classifier_emergence.progress import progress
from classifier_emergence.results import plain, read_result, write_result
from classifier_emergence.statistics import Proportion, bootstrap_mean
from experiments.params import Params
from experiments.shared.second import helping, second_process
from experiments.shared.stage import result_path

RUNS = Path("data/runs")
ADAPTERS = Path("data/adapters")

Compute = Callable[[Path], Mapping[str, Any]]
"""Makes the result of a run, with a folder for checkpoints."""


class Runs:
    """Runs of one stage, each kept as soon as it is done: a killed stage goes on with the run that it was in.

    What is kept belongs to one state of the parameters (the section named as the stage, and ``sections``), the imported
    modules and the weights (of a wheel or a hub they are pinned by the parameters; of a folder stage ``fetch`` has the
    hash); another starts afresh.
    """

    def __init__(self, stage: str, model: str, params: Params, *sections: str) -> None:
        self.folder = RUNS / stage / model
        self.adapters = self.folder / "adapters"
        self.kept = ADAPTERS / stage / model
        self.result = result_path(stage, model)
        # By its spec, as the stage itself runs under the name __main__.
        specs = [module.__spec__ for module in list(sys.modules.values()) if getattr(module, "__spec__", None)]
        ours = ("classifier_emergence.", "experiments.")
        code = {Path(spec.origin) for spec in specs if spec and spec.name.startswith(ours) and spec.origin}
        fetched = result_path("fetch", model)
        state = hashlib.sha256(fetched.read_bytes() if fetched.exists() else b"")
        for path in sorted(code):  # by the whole path: two modules of one name would come in another order every time
            state.update(path.read_bytes())
        settings = params.model_dump(mode="json", include={stage, "logit_lens", "registry", "confidence", *sections})
        state.update(json.dumps(settings, sort_keys=True).encode())
        self.state = state.hexdigest()

    def once(self, name: str, compute: Compute) -> dict[str, Any]:
        """The result of a run: read if it was done before, else computed (in a folder for checkpoints) and kept."""
        if (kept := self._kept(name)) is not None:
            return kept
        done = plain(compute(self.folder / name))
        write_result(self.folder / f"{name}.json", {"state": self.state, "result": done})
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return dict(read_result(self.folder / f"{name}.json")["result"])

    def all(self, jobs: Mapping[str, Compute]) -> dict[str, dict[str, Any]]:
        """The results of runs that do not need one another, two at a time where there are processors for it.

        Steps on a few short texts keep one processor busy and hardly two. So a second process runs the same command;
        each takes the next run that the other has not taken, on half of the threads. Of an odd number the last run is
        made by the first process, on all of them.
        """
        pairs = list(jobs)[: len(jobs) // 2 * 2]
        missing = [name for name in pairs if self._kept(name) is None]
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"beside-{next(iter(jobs))}.log"
        with second_process(log, needed=len(missing) > 1):
            for name in missing:
                try:
                    with FileLock(self.folder / f"{name}.lock", timeout=0):
                        self.once(name, jobs[name])
                except Timeout:
                    continue  # the other process is at it
            if helping(log):
                sys.exit()
            for name in (name for name in missing if self._kept(name) is None):
                with (
                    progress(f"waiting for the second process: {name}", total=1),
                    FileLock(self.folder / f"{name}.lock"),
                ):
                    self.once(name, jobs[name])  # only if that process did not end it
        return {name: self.once(name, compute) for name, compute in jobs.items()}

    def by_arm(self, jobs: Mapping[str, Mapping[str, Compute]]) -> dict[str, list[dict[str, Any]]]:
        """The same for the runs of several arms."""
        found = self.all({name: compute for arm in jobs.values() for name, compute in arm.items()})
        return {arm: [found[name] for name in names] for arm, names in jobs.items()}

    def _kept(self, name: str) -> dict[str, Any] | None:
        file = self.folder / f"{name}.json"
        if file.exists() and (kept := read_result(file))["state"] == self.state:
            result: dict[str, Any] = kept["result"]
            return result
        return None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the stage's result, put the adapters where they stay, and forget the runs."""
        shutil.rmtree(self.kept, ignore_errors=True)
        shutil.copytree(self.adapters, self.kept)
        write_result(self.result, result)
        shutil.rmtree(self.folder)


def mean_of(values: ArrayLike, params: Params, resamples: int) -> dict[str, Any]:
    """Mean over the last axis with its bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    low, high = bootstrap_mean(array, confidence=params.confidence, resamples=resamples, seed=0)
    return {"mean": array.mean(-1), "interval": np.stack([low, high], axis=-1), "n": array.shape[-1]}


def share_of(hits: ArrayLike, params: Params) -> Proportion:
    """Accuracy with its Wilson interval."""
    array = np.asarray(hits, dtype=bool)
    return Proportion.of(array, np.ones_like(array), confidence=params.confidence)


def summary_over_seeds(runs: Sequence[Mapping[str, Any]], paths: Iterable[str]) -> dict[str, Any]:
    """Numbers of every seed's run under the keys that they have there; see ``over_seeds``."""
    found: dict[str, Any] = {}
    for path in paths:
        *parts, last = path.split(".")
        node = found
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = over_seeds(runs, path)
    return found


def over_seeds(runs: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
    """A number of every seed's run: mean, least and largest.

    Where the number is an accuracy or a mean with an interval, ``interval`` runs from the lowest lower end to the
    highest upper end: as wide as the seeds and the prompts of the worst and best seed make it.
    """
    found = []
    for run in runs:
        node: Any = run
        for part in path.split("."):
            node = node[int(part)] if isinstance(node, list) else node[part]
        found.append(node)
    if isinstance(found[0], dict):
        values = [item["accuracy"] if "accuracy" in item else item["mean"] for item in found]
        ends = {
            "interval": [min(i["interval"][0] for i in found), max(i["interval"][1] for i in found)],
            "n": found[0]["n"],
        }
    else:
        values, ends = found, {}
    return {"value": float(np.mean(values)), "least": min(values), "largest": max(values), "by_seed": values, **ends}
