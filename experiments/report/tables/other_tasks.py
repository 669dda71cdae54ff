"""Tables of the study on other tasks; see ``tables``."""

from collections.abc import Mapping
from typing import Any

from classifier_emergence.numbers import accuracy_text, interval_text, number, percent, small_share
from experiments.report.tables.training import ARMS, FOLDER, Results
from experiments.report.typeset import write_table

TASKS = ("comparison", "places")
PARTS = {"held_out_groups": "groups", "held_out_templates": "templates"}
"""Keys of the results, and what the tables call them."""
TRAINED = {"dual_reward": "dual reward", **{key: ARMS[key] for key in ("arbitrary_words", "shuffled_targets")}}


def write(other: Results) -> None:
    """Write every table."""
    probes(other)
    lens(other)
    training(other)


def probes(other: Results) -> None:
    """Probe accuracy on held-out groups and templates, with baselines."""
    columns = ["Model", "Task", "Held out", "emb", "L0", "Chosen layer", "Shuffled", "Token counts", "Chosen"]
    rows = []
    for model, result in other.items():
        for task in TASKS:
            for part, name in PARTS.items():
                found = result[task]["probing"][part]
                selected = found["selected"]
                rows.append(
                    [
                        model, task, name, percent(found["accuracy"][0]), percent(found["accuracy"][1]),
                        accuracy_text(selected), percent(selected["shuffled_accuracy"]),
                        accuracy_text(found["bag_of_tokens"]), ", ".join(selected["layers"]),
                    ]
                )  # fmt: skip
    n = next(iter(other.values()))[TASKS[0]]["probing"]["held_out_groups"]["n"]
    write_table(FOLDER / "other_tasks_probes", columns, rows, caption=f"Probes on other tasks, n = {n} in every cell.")


def lens(other: Results) -> None:
    """Alignment at the classifier layer and at the layer where it is largest, against the null."""
    columns = ["Model", "Task", "Layer", "Alignment", "Interval", "Median rank", "Null 95 %", "p", "Contrast p"]
    rows = []
    for model, result in other.items():
        for task in TASKS:
            found, largest = result[task]["lens"], result[task]["lens"]["largest"]
            row = result["layers"].index(result["layer"])
            null = {"null_95": found["null"]["alignment_95"][row], "p": found["null"]["p"][row]}
            rows.append([model, task, result["layer"], *_lens_cells(found, row, null)])
            row = result["layers"].index(largest["layer"])
            # Of the largest over layers; so is its null.
            rows.append([model, task, f"{largest['layer']} (largest)", *_lens_cells(found, row, largest)])
    caption = "Alignment of the prompt's own class word before training, against words matched in unembedding norm."
    write_table(FOLDER / "other_tasks_lens", [*columns, "Choice"], rows, caption=caption)


def _lens_cells(found: Mapping[str, Any], row: int, null: Mapping[str, Any]) -> list[str]:
    low, high = found["alignment"]["interval"][row]
    return [
        small_share(found["alignment"]["mean"][row]), f"[{small_share(low)}, {small_share(high)}]",
        number(found["rank"][row], 0), small_share(null["null_95"]), number(null["p"], 3),
        number(found["null"]["contrast_p"][row], 3), percent(found["choice"]["accuracy"][row]),
    ]  # fmt: skip


def training(other: Results) -> None:
    """The lens and the answers before and after dual reward, on held-out groups and on held-out templates."""
    columns = ["Model", "Task", "Arm", "Held out", "Top token", "Choice", "Alignment", "Exact answers", "Change"]
    rows = []
    for model, result in other.items():
        for task in TASKS:
            arms = {"before training": result[task]["before"], **{TRAINED[key]: result[task][key] for key in TRAINED}}
            for name, arm in arms.items():
                seeds = f" × {number(arm['seeds'])}" if arm.get("seeds", 1) > 1 else ""
                for part, held_out in PARTS.items():
                    found = arm[part]
                    rows.append(
                        [
                            model, task, name + seeds, held_out, _share(found["top"]), _share(found["choice"]),
                            small_share(_mean(found["alignment"])), _share(found["answers_exact"]),
                            number(_mean(found["answers_change"]), 2) if arm is not result[task]["before"] else "–",
                        ]
                    )  # fmt: skip
    caption = "Dual-reward training on other tasks and its controls."
    write_table(FOLDER / "other_tasks_training", columns, rows, caption=caption)


def _share(item: Mapping[str, Any]) -> str:
    """An accuracy before training, or a share over seeds with the interval that spans them."""
    return accuracy_text(item) if "accuracy" in item else f"{percent(item['value'])} {interval_text(item['interval'])}"


def _mean(item: Mapping[str, Any]) -> float:
    """A mean before training, or that over seeds."""
    return float(item["value"] if "value" in item else item["mean"])
