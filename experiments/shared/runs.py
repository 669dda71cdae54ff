"""Runs of a stage that trains: each is kept as soon as it is done, and two are made at a time where that helps."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from joblib.externals.loky import ProcessPoolExecutor  # type: ignore[import-untyped]

from classifier_emergence.errors import InputError
from classifier_emergence.manifest import MANIFEST, damage, seal
from classifier_emergence.progress import notice, progress
from classifier_emergence.results import digest, plain, read_result, write_result
from experiments.params import Params
from experiments.shared.stage import again, residuals_path, result_path

RUNS = Path("data/runs")
ADAPTERS = Path("data/adapters")
TIDY = "ignore:resource_tracker:UserWarning"


class Run(NamedTuple):
    """A call whose result is kept: ``function(study, folder for checkpoints, *arguments)``.

    The function is one of a module and its arguments can be pickled, so that another process can make the run. One
    with ``members`` trains several runs together: it is called as ``function(study, folder, wanted, *arguments)`` and
    yields the name and the result of every wanted member.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def results(self) -> tuple[str, ...]:
        """Names of what it leaves."""
        return self.members or (self.name,)


class Runs:
    """Runs of one stage on one model: a killed stage goes on with the run that it was in.

    What is kept belongs to one state of the parameters (the section named as the stage, and ``sections``), the imported
    modules, the weights (of a wheel or a hub they are pinned by the parameters; of a folder stage ``fetch`` has the
    hash), the residual streams and the adapters that the stages of ``sections`` left; another starts afresh. Within
    ``with``, no other process may run the stage on the model.

    Args:
        stage: Its name.
        key: Of the model.
        params: All parameters.
        build: Makes the study that every run gets, from the parameters and the key; once in each process.
        sections: Of the parameters, what else decides the runs.
    """

    def __init__(
        self, stage: str, key: str, params: Params, build: Callable[[Params, str], Any], *sections: str
    ) -> None:
        self.stage, self.key, self.params, self.build = stage, key, params, build
        self.folder = RUNS / stage / key
        self.adapters = self.folder / "adapters"
        self.kept = ADAPTERS / stage / key
        self.result = result_path(stage, key)
        self.state = _state(stage, key, params, sections)
        self._lock: FileLock | None = FileLock(RUNS / stage / f"{key}.lock", timeout=0)
        self._study: Any = None

    def __enter__(self) -> "Runs":
        for folder in (RUNS, self.folder.parent, self.folder):  # the user's alone
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        assert self._lock is not None
        try:
            self._lock.acquire()
        except Timeout as error:
            raise InputError(
                f"{self.stage}: another process is running this stage on {self.key}; wait for it or stop it"
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._lock is not None
        self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which has its own study and no lock."""
        return {**vars(self), "_lock": None, "_study": None}

    @property
    def study(self) -> Any:
        """What every run gets."""
        if self._study is None:
            self._study = self.build(self.params, self.key)
        return self._study

    def once(self, name: str, function: Callable[..., Mapping[str, Any]], *arguments: Any) -> dict[str, Any]:
        """The result of a run: read if it was done before, else computed and kept."""
        return self._made(Run(name, function, arguments))[name]

    def all(self, runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        """The results of runs that do not need one another, by name; two at a time where there are processors for it.

        Steps of a small model on short texts keep one processor busy and hardly two. So two workers make a run each, on
        half of the threads. Of an odd number the last run is made by this process, on all of them, and so are all runs
        of a model of a billion parameters, which fill the processors and the memory alone.

        Raises:
            InputError: A run raised it, or a worker died. What was done by then is kept.
        """
        import torch  # late: stages tell bad input before the seconds that this takes

        pairs = [run for run in runs[: len(runs) // 2 * 2] if self._wanted(run)]
        threads = torch.get_num_threads()
        if len(pairs) > 1 and threads > 1 and not torch.cuda.is_available() and self._small():
            self._side_by_side(pairs, threads // 2)
        return {name: result for run in runs for name, result in self._made(run).items()}

    def by_arm(self, arms: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, Any]]]:
        """The same for the runs of several arms."""
        results = self.all([run for runs in arms.values() for run in runs])
        return {arm: [results[run.name] for run in runs] for arm, runs in arms.items()}

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the stage's result, put adapters where they stay, and forget the runs."""
        shutil.rmtree(self.kept, ignore_errors=True)
        if self.adapters.exists():
            shutil.copytree(self.adapters, self.kept)
            seal(self.kept)
        write_result(self.result, result)
        shutil.rmtree(self.folder)

    def _small(self) -> bool:
        fetched = result_path("fetch", self.key)
        return not fetched.exists() or read_result(fetched).get("parameters", 0) < 1e9

    def _made(self, run: Run) -> dict[str, dict[str, Any]]:
        if wanted := self._wanted(run):
            work = self.folder / f"{run.name}-{self.state[:16]}"  # checkpoints belong to the state, too
            if run.members:
                for name, result in run.function(self.study, work, wanted, *run.arguments):
                    self._keep(name, result)
            else:
                self._keep(run.name, run.function(self.study, work, *run.arguments))
            shutil.rmtree(work, ignore_errors=True)
        return {name: self._kept(name) or {} for name in run.results}

    def _wanted(self, run: Run) -> list[str]:
        return [name for name in run.results if self._kept(name) is None]

    def _keep(self, name: str, result: Mapping[str, Any]) -> None:
        kept = plain(result)
        done = {"name": name, "state": self.state, "result": kept, "digest": digest(kept)}
        write_result(self.folder / f"{name}.json", done)

    def _kept(self, name: str) -> dict[str, Any] | None:
        file = self.folder / f"{name}.json"
        try:
            kept = read_result(file) if file.exists() else {}
            if kept and (kept["name"], kept["digest"]) != (name, digest(kept["result"])):
                raise InputError(f"{file}: another run, or another digest")
        except (InputError, KeyError):
            notice(f"{file}: damaged; its run is made again")
            shutil.rmtree(file, ignore_errors=True)  # should it be a folder
            return None
        return dict(kept["result"]) if kept and kept["state"] == self.state else None

    def _side_by_side(self, runs: Sequence[Run], threads: int) -> None:
        count = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
        start = (os.getpid(), threads, self.folder / "workers.log")
        # When a worker dies, what it shared is gone before the process that tidies up comes to it, which would warn.
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), TIDY]))
        workers = ProcessPoolExecutor(2, initializer=_start_worker, initargs=start, env=count)
        try:
            with progress(f"{self.stage} of {self.key}: {len(runs)} runs, two at a time", total=len(runs)) as advance:
                waiting = list(runs)
                busy: dict[Future[None], str] = {}
                while waiting or busy:
                    while waiting and len(busy) < 2:  # loky's shutdown fails if more than its workers' calls wait
                        run = waiting.pop(0)
                        busy[workers.submit(_work, self, run)] = run.name
                    for done in wait(busy, return_when=FIRST_COMPLETED).done:
                        done.result()
                        advance(1, busy.pop(done))
            workers.shutdown()
        except BrokenProcessPool as error:
            raise InputError(
                f"{self.stage}: a process that made a run died, perhaps for want of memory; finished runs are kept: "
                f"start the stage again, with OMP_NUM_THREADS=1 for one run at a time"
            ) from error
        finally:
            workers.shutdown(kill_workers=True)


def kept_adapter(stage: str, key: str, name: str) -> Path:
    """The folder of an adapter that a stage left; without a manifest, as earlier versions left it, it is taken so.

    Raises:
        InputError: What the stage left is not as it was written.
    """
    folder = ADAPTERS / stage / key
    if (folder / MANIFEST).exists() and (found := damage(folder)):
        raise InputError(f"{folder}: damaged ({found}); {again(stage, key)}")
    return folder / name


_STUDIES: dict[tuple[str, str, str], Any] = {}
"""Of a worker: the study that its runs share."""


def _start_worker(parent: int, threads: int, log: Path) -> None:
    import torch
    import transformers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Two processes cannot share a terminal's line: bars and warnings go to a file.
    sys.stderr = log.open("a", encoding="utf-8", buffering=1)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _work(runs: Runs, run: Run) -> None:
    of = (runs.stage, runs.key, runs.state)
    runs._study = _STUDIES.get(of)
    with contextlib.redirect_stdout(sys.stderr):
        runs._made(run)
    _STUDIES[of] = runs._study


def _state(stage: str, key: str, params: Params, sections: Sequence[str]) -> str:
    # By its spec, as the stage itself runs under the name __main__.
    specs = [module.__spec__ for module in list(sys.modules.values()) if getattr(module, "__spec__", None)]
    ours = ("classifier_emergence.", "experiments.")
    code = {Path(spec.origin) for spec in specs if spec and spec.name.startswith(ours) and spec.origin}
    fetched = result_path("fetch", key)
    state = hashlib.sha256(fetched.read_bytes() if fetched.exists() else b"")
    # Some runs read what other stages left.
    left = [Path(f"{residuals_path(key)}.sha256"), *(ADAPTERS / section / key / MANIFEST for section in sections)]
    for file in left:
        state.update(file.read_bytes() if file.is_file() else b"")
    for path in sorted(code):  # by the whole path: two modules of one name would come in another order every time
        state.update(path.read_bytes())
    settings = params.model_dump(mode="json", include={stage, "logit_lens", "registry", "confidence", *sections})
    state.update(json.dumps(settings, sort_keys=True).encode())
    return state.hexdigest()
