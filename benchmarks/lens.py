"""The logit lens at every layer against other packages, each in a process of its own, in turns.

``python -m benchmarks.lens smollm2-135m-instruct [--prompts N] [--rounds N]`` reads the last token of word prompts of
the bank and keeps, in results/benchmarks/lens.json, seconds and memory of every package. The packages are those of
``benchmarks.peers``; ``nox -s bench`` makes their environments in .nox/peers. All must give the same probabilities.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import LENSES
from benchmarks.recorded import compared, float32_limit, keep_comparison
from classifier_emergence.models.loading import load
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.tasks.arithmetic import OPERATIONS, prompt_bank
from experiments.params import load_params

ENVIRONMENTS = Path(".nox/peers")
TOLERANCE, LEAST = 1e-2, 1e-30
"""Nats between log-probabilities: what float32 in another order of sums may do through all layers; and what is none."""


class Worker:
    """A package in its own process, with the model loaded."""

    def __init__(self, package: str, folder: Path, job: Mapping[str, Any]) -> None:
        environment = ENVIRONMENTS / package / "bin" / "python"
        python = environment if environment.exists() else Path(sys.executable)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if environment.exists():
            env.pop("PYTHONPATH", None)
        self.package = package
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("peers.py"), package, folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip
        self._say(json.dumps(job))
        self._hear()

    def measure(self, save: Path | str = "") -> dict[str, float]:
        """Seconds and bytes of one reading; what was read goes into a file if one is named."""
        self._say(str(save))
        found: dict[str, float] = json.loads(self._hear())
        return found

    def end(self) -> None:
        """Stop it."""
        self.process.kill()
        self.process.communicate()  # closes its pipes

    def _say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _hear(self) -> str:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            sys.exit(f"{self.package}: it ended; run {sys.executable} benchmarks/peers.py to see why")
        return line


@contextmanager
def workers(folder: Path, job: Mapping[str, Any]) -> Iterator[list[Worker]]:
    """All packages, ready; they end with the block."""
    ready: list[Worker] = []
    try:
        ready += (Worker(package, folder, job) for package in LENSES)
        yield ready
    finally:
        for worker in ready:
            worker.end()


def needed(lm: LanguageModel, tokens: int, prompts: int) -> float:
    """Operations, prompt by prompt: two by weight of the blocks and token, and of the unembedding, layer and prompt."""
    blocks = sum(weight.numel() for block in lm.blocks for weight in block.parameters())
    return 2.0 * (blocks * tokens + lm.readout.weight.numel() * lm.n_layers * prompts)


def main() -> None:
    """Measure, compare and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a key of registry in params.yaml")
    parser.add_argument("--prompts", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="after one that warms up; default: %(default)s")
    arguments = parser.parse_args()
    params = load_params()
    lm = load(arguments.model, params.registry)
    texts = [prompt.text for prompt in prompt_bank("word", params.bank)][: arguments.prompts]
    prompts = lm.tokenizer(texts)["input_ids"]
    wanted = [word_tokens(operation, lm.tokenizer).strict_id for operation in OPERATIONS]
    folder = Path(lm.model.name_or_path)
    operations, limit = needed(lm, sum(map(len, prompts)), len(prompts)), float32_limit()
    del lm
    seconds: dict[str, list[float]] = {package: [] for package in LENSES}
    memory: dict[str, float] = {}
    job = {"texts": texts, "prompts": prompts, "wanted": wanted}
    with tempfile.TemporaryDirectory() as work, workers(folder, job) as ready:
        files = [Path(work) / f"{i}.npy" for i in range(len(ready))]
        for worker, file in zip(ready, files, strict=True):
            worker.measure(file)
        read = [np.load(file) for file in files]
        for _ in range(arguments.rounds):
            for worker in ready:
                found = worker.measure()
                seconds[worker.package].append(found["seconds"])
                memory[worker.package] = found["bytes"] / 2**30
    logs = [np.log(np.maximum(found, LEAST)) for found in read]
    gap = max(float(np.abs(other - logs[0]).max()) for other in logs[1:])
    found = compared(seconds, gap, gigabytes=memory, operations=operations, limit=limit)
    keep_comparison("lens", arguments.model, f"{len(texts)} prompts, all layers", found)
    if not gap <= TOLERANCE:
        sys.exit(f"the log-probabilities differ by {gap:.1e} nats: these are not the same readings")


if __name__ == "__main__":
    main()
