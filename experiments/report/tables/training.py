"""Tables of the training studies; see ``tables``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from classifier_emergence.numbers import accuracy_text, interval_text, number, percent, small_share
from experiments.report.typeset import write_table

FOLDER = Path("paper/tables")
Results = Mapping[str, dict[str, Any]]
"""Model -> result of one stage."""


def dual_reward_reported(dual: Results) -> None:
    """The originals' table: eight prompts before and after."""
    columns = ["Model", "Layer", "Prompt", "Before", "Own word", "After", "Top", "Own word after"]
    rows = [
        [
            model, result["layer"], old["prompt"], old["top_token"], small_share(old["own_probability"]),
            new["top_token"],
            percent(new["top_probability"]), percent(new["own_probability"]),
        ]
        for model, result in dual.items()
        for old, new in zip(
            result["before"]["reported"]["prompts"], result["main"]["reported"]["prompts"], strict=True
        )
    ]  # fmt: skip
    caption = "Dual reward under the reported protocol: the lens at one layer, before and after training."
    write_table(FOLDER / "dual_reward_reported", columns, rows, caption=caption, tokens=["Prompt", "Before", "After"])


ARMS = {
    "vo": "V and O (main)", "vo_all_layers": "V and O, all layers", "qk": "Q and K", "mlp": "MLP",
    "all_linear": "all linear maps", "class_only": "lens alone", "answer_only": "answers alone",
    "arbitrary_words": "arbitrary words", "shuffled_targets": "shuffled targets", "head": "separate head",
}  # fmt: skip
"""Arms as the paper names them; depths, weights and flaws name themselves."""


def arm_name(key: str) -> str:
    """What the tables and figures call an arm."""
    kind, _, value = key.rpartition("_")
    if kind in ("depth", "weight"):
        return f"{kind} {int(value) / 100:g}"
    return ARMS.get(key, key.replace("_", " "))


def in_order(arms: Mapping[str, Any]) -> dict[str, Any]:
    """The arms in the order of ``ARMS``, then depths and weights; flaws have a table of their own."""
    return {key: arms[key] for key in (*ARMS, *(key for key in arms if key not in ARMS and key not in FLAWS))}


def dual_reward_arms(dual: Results) -> None:
    """What each arm makes and costs."""
    columns = [
        "Model",
        "Arm",
        "Steps",
        "Parameters",
        "Symbols",
        "Words",
        "Alignment",
        "Answers",
        "Change",
        "KL",
        "Half at",
    ]
    rows = []
    for model, result in dual.items():
        before, main = result["before"], result["main"]
        rows.append(
            [
                model, "before training", number(0), "–", accuracy_text(before["symbol"]["top"]),
                percent(before["word"]["top"]["accuracy"]), small_share(before["symbol"]["alignment"]["mean"]),
                accuracy_text(before["answers"]["exact"]), "–", "–", "–",
            ]
        )  # fmt: skip
        rows.append(
            [
                model, ARMS["vo"], number(result["steps"]["main"]), number(main["parameters"]),
                accuracy_text(main["symbol"]["top"]), percent(main["word"]["top"]["accuracy"]),
                small_share(main["symbol"]["alignment"]["mean"]), accuracy_text(main["answers"]["exact"]),
                number(main["answers"]["change"]["mean"], 2), number(main["kl"]["mean"], 2),
                _first([main["first_step_above_threshold"]]),
            ]
        )  # fmt: skip
        for key, arm in in_order(result["arms"]).items():
            seeds = f" × {number(arm['seeds'])}" if arm["seeds"] > 1 else ""
            rows.append(
                [
                    model, arm_name(key), number(result["steps"]["arms"]) + seeds, number(arm["parameters"]),
                    _over(arm["symbol"]["top"]), percent(arm["word"]["top"]["value"]),
                    small_share(arm["symbol"]["alignment"]["value"]), _over(arm["answers"]["exact"]),
                    number(arm["answers"]["change"]["value"], 2), number(arm["kl"]["value"], 2),
                    _first(arm["first_step_above_threshold"]),
                ]
            )  # fmt: skip
    write_table(FOLDER / "dual_reward_arms", columns, rows, caption="Dual-reward training and its controls.")


def _over(item: Mapping[str, Any]) -> str:
    """A share over seeds, with the interval that spans them."""
    return f"{percent(item['value'])} {interval_text(item['interval'])}"


def _first(steps: list[int | None]) -> str:
    """The first step above the threshold for each seed, once if they agree; a dash where it was never reached."""
    shown = ["–" if step is None else number(step) for step in steps]
    return ", ".join(shown) if len(set(shown)) > 1 else shown[0]


def dual_reward_long(long: Results) -> None:
    """The main arm at full length, over seeds."""
    columns = ["Model", "Seeds", "Symbols", "Words", "Stories", "Alignment", "Answers", "Change", "KL", "Half at"]
    rows = [
        [
            model, number(main["seeds"]), _over(main["symbol"]["top"]), _over(main["word"]["top"]), _over(main["story"]["top"]),
            percent(main["symbol"]["alignment"]["value"]), _over(main["answers"]["exact"]),
            number(main["answers"]["change"]["value"], 2), number(main["kl"]["value"], 2),
            _first(main["first_step_above_threshold"]),
        ]
        for model, main in ((model, result["main"]) for model, result in long.items())
    ]  # fmt: skip
    write_table(FOLDER / "dual_reward_long", columns, rows, caption="Dual reward at full length, over seeds.")


def dual_reward_reading(long: Results) -> None:
    """What answers lose without the words' directions, before training and after it."""
    columns = ["Model", "Training", "Without the words", "Without random ones", "Difference", "Interval"]
    rows = []
    for model, result in long.items():
        before, main = result["reading_before"], result["main"]
        for name, found, value in (("before", before, "mean"), ("after", main["reading"], "value")):
            low, high = found["difference"]["interval"]
            rows.append(
                [
                    model, name, *(number(found[key][value], 3) for key in ("words", "random", "difference")),
                    f"[{number(low, 3)}, {number(high, 3)}]",
                ]
            )  # fmt: skip
    caption = "Change of the answers' log-probability, in nats, when directions are removed at the classifier layer."
    write_table(FOLDER / "dual_reward_reading", columns, rows, caption=caption)


def dual_reward_flaws(dual: Results) -> None:
    """What each flaw of the originals does to the main arm."""
    columns = ["Model", "Flaw", "Eight prompts", "Symbols", "Answer loss in training", "Exact answers"]
    rows = []
    for model, result in dual.items():
        main = result["main"]
        arms = {"none": result["arms"]["vo"], **{key: result["arms"][key] for key in FLAWS}}
        for key, arm in arms.items():
            rows.append(
                [
                    model, FLAWS.get(key, "none"), percent(arm["reported"]["top"]["value"]), _over(arm["symbol"]["top"]),
                    number(arm["final_losses"][0]["answer_loss"], 4), _over(arm["answers"]["exact"]),
                ]
            )  # fmt: skip
        for key, name in (("lone_space", "read at a lone space"), ("without_o", "reloaded without O")):
            rows.append([model, f"{name} (main)", percent(main[key]["top"]["accuracy"]), "–", "–", "–"])
    write_table(FOLDER / "dual_reward_flaws", columns, rows, caption="Flaws of the originals, switched on one by one.")


FLAWS = {
    "unshifted_answers": "answer labels not shifted",
    "read_after_answer": "lens trained after the answer",
    "bare_targets": "targets without a space",
}


def lora_sft(plain: Results) -> None:
    """Plain fine-tuning by step: the write-up's score beside alignment."""
    columns = ["Model", "Steps", "Score", "Other signs", "Alignment", "Largest at", "Words", "Exact answers"]
    rows = []
    for model, result in plain.items():
        before, final = result["before"], result["final"]
        rows.append(
            [
                model, number(0), percent(before["reported"]["score"], 2), percent(before["reported"]["control"], 2),
                small_share(before["symbol"]["peak"]["mean"]), before["symbol"]["peak_layer"],
                small_share(before["word"]["peak"]["mean"]), accuracy_text(before["answers"]["exact"]),
            ]
        )  # fmt: skip
        rows += [
            [
                model, number(entry["step"]), percent(entry["reported"]["score"]["value"], 2),
                percent(entry["reported"]["control"]["value"], 2), small_share(entry["symbol"]["peak"]["value"]),
                _distinct(entry["peak_layers"]), "–", "–",
            ]
            for entry in result["by_step"][1:-1]
        ]  # fmt: skip
        rows.append(
            [
                model, number(result["by_step"][-1]["step"]), percent(final["reported"]["score"]["value"], 2),
                percent(final["reported"]["control"]["value"], 2), small_share(final["symbol"]["peak"]["value"]),
                _distinct([seed["final"]["symbol"]["peak_layer"] for seed in result["by_seed"]]),
                small_share(final["word"]["peak"]["value"]), _over(final["answers"]["exact"]),
            ]
        )  # fmt: skip
    write_table(FOLDER / "lora_sft", columns, rows, caption="Plain LoRA fine-tuning.")


def _distinct(labels: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(labels))


FORMATS = {"before": "before training", "direct": "answer", "chain_of_thought": "word and answer"}
"""Formats of ``cot_alignment`` as the paper names them."""


def cot_alignment(chain: Results) -> None:
    """Fine-tuning with and without a word before the answer, under both protocols and with two flaws."""
    columns = ["Model", "Trained on", "Nine prompts", "Score", "Exact answers", "Writes the word", "At the layer",
               "Largest inner", "Last layer"]  # fmt: skip
    flaws = ["Model", "Trained on", "Nine prompts", "Reloaded", "Exact answers", "Reloaded: exact",
             "Word on top, last layer", "After a lone space"]  # fmt: skip
    rows, flawed = [], []
    for model, result in chain.items():
        before = result["before"]
        words = before["alignment"]
        rows.append(
            [
                model, FORMATS["before"], percent(before["reported"]["answers"]["accuracy"]),
                percent(before["reported"]["score"], 2), accuracy_text(before["answers"]["exact"]),
                percent(before["writes_word"]["accuracy"]), small_share(words["at_classifier"]["mean"]),
                f"{small_share(words['inner_peak']['mean'])} at {words['inner_peak_layer']}",
                small_share(words["last"]["mean"]),
            ]
        )  # fmt: skip
        for key in ("direct", "chain_of_thought"):
            found = result[key]
            layers = _distinct([run["alignment"]["inner_peak_layer"] for run in found["by_seed"]])
            rows.append(
                [
                    model, FORMATS[key], percent(found["reported"]["answers"]["value"]),
                    percent(found["reported"]["score"]["value"], 2), _over(found["answers"]["exact"]),
                    percent(found["writes_word"]["value"]), small_share(found["alignment"]["at_classifier"]["value"]),
                    f"{small_share(found['alignment']['inner_peak']['value'])} at {layers}",
                    small_share(found["alignment"]["last"]["value"]),
                ]
            )  # fmt: skip
            flawed.append(
                [
                    model, FORMATS[key], percent(found["reported"]["answers"]["value"]),
                    percent(found["flaws"]["reloaded_q_and_v"]["reported"]["answers"]["value"]),
                    percent(found["answers"]["exact"]["value"]), percent(found["flaws"]["reloaded_q_and_v"]["exact"]["value"]),
                    percent(found["alignment"]["last_top"]["value"]), percent(found["flaws"]["lone_space"]["last_top"]["value"]),
                ]
            )  # fmt: skip
    caption = "Fine-tuning on answers, and on a word before the answer."
    write_table(FOLDER / "cot_alignment", columns, rows, caption=caption)
    caption = "The same adapters with two flaws of the originals."
    write_table(FOLDER / "cot_flaws", flaws, flawed, caption=caption)
