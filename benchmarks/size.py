"""Memory and time of each instrument and of a training step against parameters, vocabulary and prompts.

``python -m benchmarks.size smollm2-135m-instruct`` measures one model, each measurement in a process of its own: the
seconds that an instrument takes once the model is loaded (of training: a step), and the peak of the process's memory.
All models that were measured are kept in results/benchmarks/size.json; the guide's table is made of them, with a fit
and what it says of larger models. How wrong that may be is how wrong the fit of the other models is about the largest.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.recorded import keep, kept, show, table
from classifier_emergence import direction, lens, open_model, probe
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.tasks.arithmetic import OPERATIONS, prompt_bank
from experiments.params import load_params

COUNTS = {"load": (0,), "lens": (32, 128), "probe": (32, 128), "direction": (32, 128), "training step": (4, 16)}
"""Instrument -> numbers of prompts; of a training step, items."""
LARGER = {"8 billion": (8e9, 128_256), "20 billion": (20e9, 201_088)}
"""Name -> parameters and vocabulary, of Llama 3.1 8B and of GPT-OSS 20B."""
STEPS = 4


@dataclass(frozen=True)
class Point:
    """One measurement."""

    instrument: str
    prompts: int
    parameters: int
    vocabulary: int
    seconds: float
    gigabytes: float


def use(instrument: str, lm: LanguageModel, n: int) -> float:
    """Seconds of an instrument on ``n`` prompts of the bank, with its default settings."""
    prompts = prompt_bank("symbol", load_params().bank)[:n]
    texts, labels = [prompt.text for prompt in prompts], [prompt.operation for prompt in prompts]
    if instrument == "training step":
        from benchmarks.training import examples_of  # late: it brings transformers' trainer
        from benchmarks.training import measure as steps_of

        settings = load_params().dual_reward.model_copy(update={"batch_size": n})
        seconds, _ = steps_of(lm, settings, examples_of(lm, settings), STEPS, 1)
        return statistics.median(seconds[1:])  # the first warms up
    uses: dict[str, Callable[[], object]] = {
        "load": lambda: None,
        "lens": lambda: lens(lm, texts, OPERATIONS),
        "probe": lambda: probe(lm, texts, labels),
        "direction": lambda: direction(lm, texts, labels),
    }
    started = time.perf_counter()
    uses[instrument]()
    return time.perf_counter() - started


def one(model: str, instrument: str, n: int) -> Point:
    """Measure, in this process, which must have done nothing else."""
    started = time.perf_counter()
    lm = open_model(model, dtype="float32")
    loaded = time.perf_counter() - started
    seconds = use(instrument, lm, n)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    vocabulary = len(lm.readout.weight)
    return Point(instrument, n, parameters, vocabulary, seconds if n else loaded, peak / 1e9)


def features(parameters: float, vocabulary: float, prompts: float) -> list[float]:
    """What memory and time are sums of, with factors that are not negative."""
    return [1.0, parameters, vocabulary, prompts, parameters * prompts, vocabulary * prompts]


def fit(points: Sequence[Point], what: str) -> Callable[[float, float, float], float]:
    """Least squares of relative errors: (parameters, vocabulary, prompts) -> seconds or gigabytes."""
    x = np.array([features(p.parameters, p.vocabulary, p.prompts) for p in points])
    y = np.array([getattr(p, what) for p in points])
    unit = np.maximum(x.max(0), 1e-12)
    factors = nnls(x / unit / y[:, None], np.ones(len(y)))[0] / unit
    return lambda *size: float(np.dot(features(*size), factors))


def error(points: Sequence[Point], what: str) -> float:
    """By which factor at most the fit of the smaller models is wrong about the largest."""
    largest = max(point.parameters for point in points)
    law = fit([point for point in points if point.parameters < largest], what)
    told = [(point, law(point.parameters, point.vocabulary, point.prompts))
            for point in points if point.parameters == largest]  # fmt: skip
    return max(math.exp(abs(math.log(max(guess, 1e-9) / getattr(point, what)))) for point, guess in told)


def as_table(every: dict[str, Any]) -> str:
    """All models and what they say of larger ones, as the guide shows it."""
    if not every:
        return "No model has been measured yet."
    by_model = {model: [Point(**point) for point in entry["points"]] for model, entry in every.items()}
    by_model = dict(sorted(by_model.items(), key=lambda item: item[1][0].parameters))
    enough = len({points[0].parameters for points in by_model.values()}) > 2
    machines = [f"{every[model]['vectors']}, {every[model]['threads']} threads" for model in by_model]
    rows = [["measured with", "", *machines, *[""] * 3]]
    for instrument, counts in COUNTS.items():
        points = [point for some in by_model.values() for point in some if point.instrument == instrument]
        for n in counts if points else ():
            cells = [_cell(p.gigabytes, p.seconds) for p in points if p.prompts == n]
            for size in LARGER.values() if enough else ():
                cells.append(_cell(*(fit(points, what)(*size, n) for what in ("gigabytes", "seconds"))))
            wrong = [f"{error(points, what):.1f}" for what in ("gigabytes", "seconds")] if enough else ["–"]
            rows.append([instrument, str(n) if n else "", *cells, *([] if enough else ["–"] * 2), ", ".join(wrong)])
    return table(["", "prompts", *(f"`{model}`" for model in by_model), *LARGER, "error, factor"], rows)


def _cell(gigabytes: float, seconds: float) -> str:
    return f"{gigabytes:.3g} GB, {seconds:.2g} s" if seconds < 100 else f"{gigabytes:.3g} GB, {seconds:.0f} s"


def main() -> None:
    """Measure a model, keep what was found, and write the guide's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="whatever -m of the command line takes; none writes the table anew")
    parser.add_argument("--one", nargs=2, metavar=("INSTRUMENT", "PROMPTS"), help="this measurement alone, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(asdict(one(arguments.model, arguments.one[0], int(arguments.one[1])))))
        return
    if arguments.model:
        points = []
        for instrument, counts in COUNTS.items():
            for n in counts:
                command = [sys.executable, "-m", "benchmarks.size", arguments.model, "--one", instrument, str(n)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                points.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{instrument}, {n}: {points[-1]['gigabytes']:.2f} GB, {points[-1]['seconds']:.2f} s")
        machine = {"threads": torch.get_num_threads(), "vectors": torch.backends.cpu.get_cpu_capability()}
        keep("size", Path(arguments.model).name, {**machine, "points": points})
    show("size", as_table(kept("size")))


if __name__ == "__main__":
    main()
