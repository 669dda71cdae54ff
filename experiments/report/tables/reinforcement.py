"""Tables of the studies on reinforcement learning; see ``tables``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from classifier_emergence.numbers import accuracy_text, interval_text, number, percent, small_share
from classifier_emergence.reading.layers import layer_at, layer_row
from experiments.report.tables.training import FOLDER, Results
from experiments.report.typeset import write_table
from experiments.shared.summaries import over_seeds

TRAININGS = {
    "controlled": "controlled", "reported": "as reported", "reported_without_flaws": "as reported, without flaws",
}  # fmt: skip
"""Arms of ``grpo`` as the paper names them."""

ATTEMPTS = {
    "reported_first": "weight 0.4", "reported_own_targets": "+ balanced, own targets",
    "reported_entropy_bonus": "+ entropy bonus", "reported_low_rate": "+ low learning rate",
    "reported_class_focus": "weight 0.9, no KL",
}  # fmt: skip
"""The originals' configurations."""

IN_32_BITS = {
    "reported_first_in_32_bits": "weight 0.4, 32 bits", "reported_own_targets_in_32_bits": "+ own targets, 32 bits",
}  # fmt: skip
"""The first two, made without half precision."""

FACTORIAL = {
    f"{place}_{part}": (trained, loss)
    for place, trained in (("whole", "whole model"), ("vo", "V and O"))
    for part, loss in (("grpo", "GRPO"), ("class", "class loss"), ("both", "both"))
}
"""Cells of the factorial: what is trained, and on what."""

FLAWS = {
    "flaw_signed_kl": "signed divergence", "flaw_shared_target": "one target a step",
    "flaw_half_precision": "half precision", "without_half_precision": "its learning rate alone",
}  # fmt: skip

ORDERS = {
    "dual_then_grpo": "dual reward, then GRPO", "grpo_then_dual": "GRPO, then dual reward",
    "together": "both from the start",
}  # fmt: skip
"""Orders of ``staged``."""

REWARDS = {"dual": "dual reward", "grpo": "GRPO", "together": "both"}
"""What one part of ``staged`` trains on."""

DEPTHS = [layer / 22 for layer in (0, 2, 4, 8, 10, 14, 16, 20)]
"""Of the layers in the originals' table of probes."""


def grpo_probe(grpo: Results) -> None:
    """The originals' table: accuracy for true statements by layer, on 20 items and on held-out operands."""
    columns = ["Model", "Layer", "20 items, before", "20 items, after", "Held out, before", "Held out, after"]
    rows = []
    for model, result in grpo.items():
        first, seed = result["arms"]["reported"]["runs"][0], result["arms"]["controlled"]["runs"][0]
        for depth in DEPTHS:
            row = layer_row(layer_at(depth, len(result["layers"]) - 1))
            rows.append(
                [
                    model, result["layers"][row], percent(result["before"]["reported"]["curve"][row]),
                    percent(first["reported"]["curve"][row]), accuracy_text(result["before"]["statements"], row),
                    accuracy_text(seed["statements"], row),
                ]
            )  # fmt: skip
    caption = "Probes for true statements by layer, before and after GRPO."
    write_table(FOLDER / "grpo_probe", columns, rows, caption=caption)


def grpo_reported(grpo: Results) -> None:
    """What the originals measured before and after."""
    columns = [
        "Model", "Training", "Probe", "Deviation", "Truth words", "Separation", "Rank", "Probability", "d",
        "Weights changed",
    ]  # fmt: skip
    rows = []
    for model, result in grpo.items():
        row = result["layers"].index(result["probe_layer"])
        rows.append([model, "before training", *_reported(result["before"]["reported"], row), "–", "–"])
        for key, name in TRAININGS.items():
            run, found = result["arms"][key]["runs"][0], result["arms"][key]["summary"]
            last = [number(found["cohens_d"][0]), percent(run["share_of_weights_changed"])]
            rows.append([model, name, *_reported(run["reported"], row), *last])
    caption = "GRPO under the reported protocol, before and after training."
    write_table(FOLDER / "grpo_reported", columns, rows, caption=caption)


def _reported(found: Mapping[str, Any], row: int) -> list[str]:
    """Accuracy over trials and its deviation, words, separation, rank and probability of the answer's first token."""
    token = found["first_token"]
    return [
        percent(found["accuracy"][row]), f"± {percent(found['std'][row])}", number(len(found["direction"]["found"])),
        number(found["separation"], 3), number(token["rank"]["mean"], 1), number(token["probability"]["mean"], 3),
    ]  # fmt: skip


def grpo_controlled(grpo: Results) -> None:
    """Alignment against its null, probes for true statements, and answers."""
    columns = [
        "Model", "Seed", "At the layer", "p", "Largest", "Largest null", "Statements", "Exact answers", "Reward",
        "Change", "KL",
    ]  # fmt: skip
    rows = []
    for model, result in grpo.items():
        runs = result["arms"]["controlled"]["runs"]
        named = {"before": result["before"], **{number(seed): run for seed, run in enumerate(runs)}}
        for name, run in named.items():
            lens, row = run["alignment"], result["layers"].index(result["layer"])
            peak = 1 + int(np.argmax(lens["alignment"][1:]))
            kl = run["steps"][-1].get("kl") if "steps" in run else None
            rows.append(
                [
                    model, name, small_share(lens["alignment"][row]), number(lens["null"]["p"][row], 3),
                    f"{small_share(lens['alignment'][peak])} at {result['layers'][peak]}",
                    small_share(lens["null"]["alignment_max"][peak]), accuracy_text(run["statements"]["selected"]),
                    accuracy_text(run["answers"]["exact"]), percent(run["sampled_reward"]["mean"]),
                    number(run["answers"]["change"]["mean"], 2), "–" if kl is None else number(kl, 3),
                ]
            )  # fmt: skip
    caption = "GRPO under the controlled protocol: alignment, probes and answers, before training and with each seed."
    write_table(FOLDER / "grpo_controlled", columns, rows, caption=caption)


def collapse_prompts(collapse: Results) -> None:
    """The originals' table: six prompts before and after their first configuration."""
    columns = ["Model", "Layer", "Prompt", "Before", "Own word", "After", "Top", "Own word after"]
    rows = [
        [
            model, result["layer"], old["prompt"], old["top_token"], small_share(old["own_probability"]),
            new["top_token"], percent(new["top_probability"]), small_share(new["own_probability"]),
        ]
        for model, result in collapse.items()
        for old, new in zip(
            result["before"]["reported"]["prompts"],
            result["arms"]["reported_first"]["runs"][0]["reported"]["prompts"],
            strict=True,
        )
    ]  # fmt: skip
    caption = "GRPO and the class loss under the reported protocol: six prompts before and after training."
    write_table(FOLDER / "collapse_prompts", columns, rows, caption=caption, tokens=["Prompt", "Before", "After"])


def collapse_attempts(collapse: Results) -> None:
    """The originals' table of training: five configurations."""
    columns = [
        "Model", "Configuration", "Steps", "Class loss", "Reward", "Divergence", "Six prompts", "One word", "Commonest",
        "Accuracy", "Collapsed",
    ]  # fmt: skip
    rows = []
    for model, result in collapse.items():
        before = result["before"]
        rows.append([model, "before training", *["–"] * 4, percent(before["reported"]["score"]["accuracy"]), "–",
                     *_classes(before["reported"]["classes"]), "–"])  # fmt: skip
        for key, name in {**ATTEMPTS, **IN_32_BITS}.items():
            (run, *_), found = result["arms"][key]["runs"], result["arms"][key]["summary"]
            first, last = run["steps"][0], run["steps"][-1]
            divergence = last.get("signed_kl", last.get("kl"))
            rows.append(
                [
                    model, name, number(last["step"]), _from_to(first, last, "class_loss"),
                    _from_to(first, last, "reward"), "–" if divergence is None else number(divergence, 1),
                    percent(found["reported_score"]["value"]), percent(found["reported_one_word"]["value"]),
                    *_classes(run["reported"]["classes"]), "yes" if found["reported_collapsed"] else "no",
                ]
            )  # fmt: skip
    caption = (
        "GRPO and the class loss: the originals' five configurations, with their flaws, and two of them in 32 bits."
    )
    write_table(FOLDER / "collapse_attempts", columns, rows, caption=caption)


def _classes(found: Mapping[str, Any]) -> list[str]:
    name = max(found["shares"], key=found["shares"].__getitem__)
    return [f"{percent(found['modal_share'])} {name}", percent(found["balanced_accuracy"]["accuracy"])]


def _from_to(first: Mapping[str, Any], last: Mapping[str, Any], name: str) -> str:
    return f"{number(first[name])} → {number(last[name])}"


def collapse_factorial(collapse: Results) -> None:
    """What is trained, and on what: classes, reward, distance and answers over seeds."""
    columns = [
        "Model", "Trained", "Loss", "Entropy", "Commonest", "Accuracy", "Alignment", "Reward", "KL", "Exact",
        "Collapsed",
    ]  # fmt: skip
    rows = []
    for model, result in collapse.items():
        before = result["before"]
        rows.append(
            [
                model, "before training", "–", number(before["classes"]["entropy"]),
                percent(before["classes"]["modal_share"]), accuracy_text(before["classes"]["balanced_accuracy"]),
                small_share(before["classes"]["alignment"]), percent(before["sampled_reward"]["mean"]), "–",
                percent(before["answers"]["accuracy"]), "–",
            ]
        )  # fmt: skip
        for key, (trained, loss) in FACTORIAL.items():
            found = result["arms"][key]["summary"]
            rows.append(
                [
                    model, trained, loss, number(found["classes_entropy"]["value"]),
                    percent(found["classes_modal_share"]["value"]), _over(found["classes_balanced_accuracy"]),
                    small_share(found["classes_alignment"]["value"]), percent(found["sampled_reward"]["value"]),
                    _mean(found["final_kl"]), percent(found["answers"]["value"]),
                    f"{number(found['collapsed'])} of {number(found['seeds'])}",
                ]
            )  # fmt: skip
    caption = "What collapses: whole model or V and O, GRPO or the class loss or both."
    write_table(FOLDER / "collapse_factorial", columns, rows, caption=caption)


def collapse_flaws(collapse: Results) -> None:
    """What each flaw does to both parts of the loss on the whole model."""
    columns = [
        "Model", "Flaw", "Class loss", "Commonest", "Accuracy", "Reward", "Signed", "k3", "Collapsed",
    ]  # fmt: skip
    rows = []
    for model, result in collapse.items():
        for key, name in {"whole_both": "none", **FLAWS}.items():
            (run, *_), last = result["arms"][key]["runs"], result["arms"][key]["runs"][0]["steps"][-1]
            signed = last.get("signed_kl")
            rows.append(
                [
                    model, name, _from_to(run["steps"][0], last, "class_loss"),
                    *_classes(run["classes"]), _reward(run["sampled_reward"]),
                    "–" if signed is None else number(signed, 1), number(last["kl"], 3),
                    "yes" if run["classes"]["collapsed"] else "no",
                ]
            )  # fmt: skip
    caption = "Flaws of the originals, switched on one by one in training the whole model on both parts of the loss."
    write_table(FOLDER / "collapse_flaws", columns, rows, caption=caption)


def staged(staged: Results) -> None:
    """What each part of staged training leaves: lens, answers, reward."""
    columns = ["Model", "Order", "After", "Alignment", "Own word on top", "Reward", "Exact answers", "Change"]
    rows = []
    for model, result in staged.items():
        named = [("–", "no training", [result["before"]])]
        for key, name in ORDERS.items():
            runs = result["orders"][key]["runs"]
            named += [
                (name, REWARDS[part["reward"]], [run["stages"][i] for run in runs])
                for i, part in enumerate(runs[0]["stages"])
            ]
        for order, after, found in named:
            seeds = {
                path: over_seeds(found, path)
                for path in ("lens.alignment", "lens.top", "sampled_reward", "answers.exact", "answers.change")
            }
            rows.append(
                [
                    model, order, after, small_share(seeds["lens.alignment"]["value"]), _over(seeds["lens.top"]),
                    _over(seeds["sampled_reward"]), _over(seeds["answers.exact"]),
                    number(seeds["answers.change"]["value"], 2),
                ]
            )  # fmt: skip
    caption = "Dual reward and GRPO one after the other, and together: lens, reward and answers after each part."
    write_table(FOLDER / "staged", columns, rows, caption=caption)


def _over(item: Mapping[str, Any]) -> str:
    """A share over seeds, with the interval that spans them."""
    return accuracy_text({**item, "accuracy": item["value"]})


def _reward(item: Mapping[str, Any]) -> str:
    return f"{percent(item['mean'])} {interval_text(item['interval'])}"


def _mean(values: Sequence[float | None]) -> str:
    """Mean over seeds; a dash where there is no such number."""
    known = [value for value in values if value is not None]
    return number(float(np.mean(known)), 3) if known else "–"
