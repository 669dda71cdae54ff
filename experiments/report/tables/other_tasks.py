"""Tables of the study on other tasks."""

from collections.abc import Mapping
from typing import Any

from classifier_emergence.numbers import number, percent, small_share
from classifier_emergence.reading.layers import layer_row
from experiments.report.names import HELD_OUT, OTHER_TASKS, OTHER_TASKS_ARMS
from experiments.report.tables.cells import NOTHING, share, small_interval, times_seeds, value
from experiments.report.tables.table import Result, Rows, table


@table(
    "other_tasks",
    "Task | Held out | emb | L0 | Chosen layer | Shuffled | Token counts | Chosen",
    n=f"{OTHER_TASKS[0]}.probing.held_out_groups.n",
)
def other_tasks_probes(result: Result) -> Rows:
    """Probes on other tasks, n = {n} in every cell."""
    for task in OTHER_TASKS:
        for part, name in HELD_OUT.items():
            found = result[task]["probing"][part]
            accuracy, chosen = found["accuracy"], found["selected"]
            yield [
                task, name, percent(accuracy[0]), percent(accuracy[layer_row(0)]), share(chosen),
                percent(chosen["shuffled_accuracy"]), share(found["bag_of_tokens"]), ", ".join(chosen["layers"]),
            ]  # fmt: skip


@table("other_tasks", "Task | Layer | Alignment | Interval | Median rank | Null 95 % | p | Contrast p | Choice")
def other_tasks_lens(result: Result) -> Rows:
    """Alignment of the prompt's own class word before training, against words matched in unembedding norm."""
    for task in OTHER_TASKS:
        found, largest = result[task]["lens"], result[task]["lens"]["largest"]
        row = result["layers"].index(result["layer"])
        there = {"null_95": found["null"]["alignment_95"][row], "p": found["null"]["p"][row]}
        yield [task, result["layer"], *_lens_cells(found, row, there)]
        row = result["layers"].index(largest["layer"])
        # Of the largest over layers; so is its null.
        yield [task, f"{largest['layer']} (largest)", *_lens_cells(found, row, largest)]


def _lens_cells(found: Mapping[str, Any], row: int, null: Mapping[str, Any]) -> list[str]:
    return [
        small_share(found["alignment"]["mean"][row]), small_interval(found["alignment"]["interval"][row]),
        number(found["rank"][row], 0), small_share(null["null_95"]), number(null["p"], 3),
        number(found["null"]["contrast_p"][row], 3), percent(found["choice"]["accuracy"][row]),
    ]  # fmt: skip


@table("other_tasks", "Task | Arm | Held out | Top token | Choice | Alignment | Exact answers | Change")
def other_tasks_training(result: Result) -> Rows:
    """Dual-reward training on other tasks and its controls."""
    for task in OTHER_TASKS:
        for key, name in OTHER_TASKS_ARMS.items():
            arm = result[task][key]
            for part, held_out in HELD_OUT.items():
                found = arm[part]
                yield [
                    task, name + times_seeds(arm), held_out, share(found["top"]), share(found["choice"]),
                    small_share(value(found["alignment"])), share(found["answers_exact"]),
                    NOTHING if key == "before" else number(value(found["answers_change"]), 2),
                ]  # fmt: skip
