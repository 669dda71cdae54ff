"""Measurements that guide and README show: kept as JSON under ``results/benchmarks``, and tables of them there."""

import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from classifier_emergence.results import read_result, write_result

FOLDER, GUIDE, README = Path("results/benchmarks"), Path("docs/guide.md"), Path("README.md")
PEERS = "peers"
"""Every job against the packages that do the same: job -> model -> piece of work -> what ``compared`` gives."""
PROCESSORS = Path("/proc/cpuinfo")


def kept(name: str) -> dict[str, Any]:
    """What was measured so far, by model or job."""
    file = FOLDER / f"{name}.json"
    return read_result(file) if file.exists() else {}


def keep(name: str, key: str, found: Any) -> dict[str, Any]:
    """Put what was measured on a model, or of a job, in the place of what is kept of it; all that is kept then."""
    write_result(FOLDER / f"{name}.json", kept(name) | {key: found})
    return kept(name)  # in the order of the file


def compared(
    seconds: Mapping[str, Sequence[float]], gap: float, *, gigabytes: Mapping[str, float] | None = None,
    operations: float | None = None, limit: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of one piece of work by several packages, and ours against the best of the others.

    Args:
        seconds: Package, one of them ``ours`` -> of every repetition.
        gap: What their outputs differ by at most.
        gigabytes: Peak memory of each package's process, where each has one.
        operations: Multiplications and additions that the work needs, where they can be counted.
        limit: How many of them a second this machine does in one large product.
    """
    medians = {package: statistics.median(found) for package, found in seconds.items()}
    best = min((package for package in medians if package != "ours"), key=lambda package: medians[package])
    return {
        "machine": machine(),
        "seconds": {
            package: {"median": medians[package], "least": min(found), "largest": max(found), "n": len(found)}
            for package, found in seconds.items()
        },
        "gigabytes": gigabytes,
        "summary": {
            "ratio_to_best_peer": medians[best] / medians["ours"],
            "best_peer": best,
            "memory_ratio": gigabytes["ours"] / gigabytes[best] if gigabytes else None,
            "fraction_of_limit": operations / limit / medians["ours"] if operations and limit else None,
            "outputs_equal_within": gap,
        },
    }


def machine() -> str:
    """Processor, widest instructions and threads of this machine."""
    text = PROCESSORS.read_text(encoding="utf-8") if PROCESSORS.exists() else ""
    name = re.search(r"model name\s*: (.+)", text)
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{name[1] if name else platform.machine()}, {widest}, {torch.get_num_threads()} threads"


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16; others emulate it, many times slower than float32."""
    return PROCESSORS.exists() and "bf16" in PROCESSORS.read_text(encoding="utf-8")


def float32_limit(size: int = 2048, repetitions: int = 7) -> float:
    """Operations a second of this machine in a product of two square float32 matrices, a median."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    seconds = []
    for _ in range(1 + repetitions):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:])


def keep_comparison(job: str, model: str, work: str, found: Mapping[str, Any]) -> None:
    """Keep what ``compared`` gives of a job on a model, under the piece of work; show it here and in the README."""
    models = kept(PEERS).get(job, {})
    keep(PEERS, job, models | {model: models.get(model, {}) | {work: found}})
    print(f"{model}, {work}: {found['summary']['ratio_to_best_peer']:.2f} times as fast as the best peer")
    for package, of in found["seconds"].items():
        print(f"  {package:18} {of['median']:8.3f} s  [{of['least']:.3f}, {of['largest']:.3f}], n = {of['n']}")
    show("bench", comparisons(), README)


def comparisons() -> str:
    """All jobs against their peers, and where they were measured."""
    head = ["job", "model", "work", "seconds, median [least, largest]", "best peer", "times as fast", "memory",
            "of the limit", "outputs differ by"]  # fmt: skip
    rows, machines = [], []
    for job, models in kept(PEERS).items():
        for model, works in models.items():
            for work, found in works.items():
                summary, ours = found["summary"], found["seconds"]["ours"]
                shares = (summary[key] for key in ("memory_ratio", "fraction_of_limit"))
                rows.append([
                    job, f"`{model}`", work, f"{ours['median']:.3g} [{ours['least']:.3g}, {ours['largest']:.3g}]",
                    summary["best_peer"], f"{summary['ratio_to_best_peer']:.2f}",
                    *("–" if share is None else f"{share:.2f}" for share in shares),
                    f"{summary['outputs_equal_within']:.0e}",
                ])  # fmt: skip
                machines.append(found["machine"])
    return f"{table(head, rows)}\n\nMeasured on {' and '.join(dict.fromkeys(machines))}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def shown(name: str, text: str, file: Path = GUIDE) -> str:
    """The guide, or another file, with ``text`` between its marks of that name."""
    start, end = f"<!-- {name}, written by [^>]+ -->", f"<!-- end of {name} -->"
    page = file.read_text(encoding="utf-8")
    return re.sub(f"({start}\n).*?({end})", lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.DOTALL)


def show(name: str, text: str, file: Path = GUIDE) -> None:
    """Write that file."""
    file.write_text(shown(name, text, file), encoding="utf-8")
