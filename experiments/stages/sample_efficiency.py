"""Stage sample_efficiency@model: how few problems does the dual reward need, and how fast may it learn?

The main arm of ``dual_reward`` on 4, 16, ... distinct problems, as many of each operation, at several learning rates,
for as many steps and several seeds; what the lens says on operands never trained on, in symbols, words and stories.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from classifier_emergence.tasks.arithmetic import STYLES
from classifier_emergence.training.adapters import Start, adapted_together
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.supervised import train_together
from experiments.params import Params
from experiments.shared.dual_reward import DualRewardArm, DualRewardStudy, measure_held_out
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.summaries import summary_over_seeds

NUMBERS = ("top", "alignment", "choice")


class Cell(NamedTuple):
    """One cell of the grid with a seed."""

    problems: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its run and its adapter, whose name may hold no dot."""
        return f"{self.problems}-at-{self.learning_rate:g}-seed-{self.seed}".replace(".", "_")


def run(params: Params, key: str) -> None:
    """Train every cell and write one result; all cells of a learning rate train together."""
    settings, seeds = params.sample_efficiency, params.dual_reward.seeds
    with Runs("sample_efficiency", key, params, DualRewardStudy, "dual_reward") as runs:
        before = runs.once("before", lambda study, _: {style: measure_held_out(study, style) for style in STYLES})
        groups = {
            rate: [Cell(n, rate, seed) for n in settings.problems for seed in seeds] for rate in settings.learning_rates
        }
        calls = [
            Run(f"rate-{rate:g}", train_cells, (cells,), tuple(cell.name for cell in cells))
            for rate, cells in groups.items()
        ]
        results, study = runs.all(calls), runs.study
        grid = {
            f"{n}_at_{i}": {
                "problems": n,
                "learning_rate": rate,
                **summary([results[Cell(n, rate, seed).name] for seed in seeds]),
            }
            for n in settings.problems
            for i, rate in enumerate(settings.learning_rates)
        }
        result = {
            "model": key,
            "layer": study.lm.layers[study.row],
            "steps": settings.steps,
            # Of the problems that a cell may train on, those that its steps come to.
            "drawn": settings.steps * params.dual_reward.batch_size,
            "before": before,
            "cells": grid,
        }
        runs.finish(result)


def train_cells(
    study: DualRewardStudy, work: Path, wanted: Sequence[str], cells: Sequence[Cell]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cells of one learning rate, together; then what the lens says after each."""
    settings, arm = study.params.sample_efficiency, DualRewardArm()
    schedule = Schedule(settings.steps, study.settings.batch_size, cells[0].learning_rate, 0, settings.every)
    with adapted_together(study.lm, {cell.name: Start(study.adapter(arm), cell.seed) for cell in cells}) as wrapped:
        members = {cell.name: study.member(replace(arm, problems=cell.problems), cell.seed) for cell in cells}
        text = f"dual reward of {study.lm.key} at {schedule.learning_rate:g}: {len(cells)} cells"
        trained = train_together(study.lm, wrapped, members, schedule, work=work, description=text)
        for name in wanted:
            wrapped.set_adapter(name)
            yield (
                name,
                {
                    "watched": trained[name].watched,
                    **{style: measure_held_out(study, style) for style in STYLES},
                },
            )


def summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A cell over its seeds, with every seed's alignment by step."""
    return {
        "watched": [seed["watched"] for seed in seeds],
        **summary_over_seeds(seeds, [f"{style}.{number}" for style in STYLES for number in NUMBERS]),
    }


if __name__ == "__main__":
    main(run, __doc__)
