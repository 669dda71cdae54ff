"""Stage tables: the paper's tables from the results, as CSV (which the paper reads), Markdown and LaTeX."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from classifier_emergence.layers import layer_at, layer_row
from classifier_emergence.params import load_params
from classifier_emergence.results import read_result
from classifier_emergence.tasks import OPERATIONS, STYLES
from classifier_emergence.typeset import interval_text, number, percent, write_table
from experiments.stage import RESULTS, exit_on_bad_input, result_path

FOLDER = Path("paper/tables")
Results = Mapping[str, dict[str, Any]]


def run() -> None:
    """Write every table."""
    params = load_params()
    fetched, probing, lens = (
        {model: read_result(result_path(stage, model)) for model in params.models}
        for stage in ("fetch", "probing", "logit_lens")
    )
    dual = {model: read_result(result_path("dual_reward", model)) for model in params.trained_models}
    claims(read_result(RESULTS / "claims.json"))
    models(fetched)
    words(fetched)
    probing_reported(probing)
    probing_controlled(probing)
    held_out(probing)
    flaws(probing)
    lens_reported(lens)
    lens_controlled(lens, params.logit_lens.depth)
    directions(probing, params.logit_lens.depth)
    dual_reward_reported(dual)
    dual_reward_arms(dual)
    dual_reward_reading(dual)
    dual_reward_flaws(dual)


def accuracy(tally: Mapping[str, Any], at: int | None = None) -> str:
    """An accuracy with its interval: ``81.2 % [57.0, 93.4]``."""
    value, interval = tally["accuracy"], tally["interval"]
    if at is not None:
        value, interval = value[at], interval[at]
    return f"{percent(value)} {interval_text(interval)}"


def claims(ledger: Mapping[str, dict[str, Any]]) -> None:
    """Table 1, and the evidence behind each verdict."""
    columns = ["Id", "Claim", "Reported", "Verdict", "Evidence met"]
    rows: list[list[Any]] = []
    for key, claim in ledger.items():
        counted = [item["met"] for item in claim["evidence"] if item["protocol"] != "flaw ablation"]
        tally = f"{sum(counted)} of {len(counted)}" if counted else "–"
        rows.append([key, claim["claim"], claim["reported"], claim["verdict"], tally])
    write_table(FOLDER / "claims", columns, rows, caption="The claims of the sources and our verdicts.")
    columns = ["Claim", "Protocol", "Quantity", "Model", "Value", "Interval", "n", "Claimed", "Met"]
    rows = [
        [
            key, item["protocol"], item["what"], item["model"], number(item["value"], 3), _interval(item),
            number(item["n"]), item["expected"], "yes" if item["met"] else "no",
        ]
        for key, claim in ledger.items()
        for item in claim["evidence"]
    ]  # fmt: skip
    write_table(FOLDER / "evidence", columns, rows, caption="Every number behind the verdicts.")


def _interval(item: Mapping[str, Any]) -> str:
    ends = item["interval"]
    return "n/a" if ends is None else f"[{number(ends[0], 3)}, {number(ends[1], 3)}]"


def models(fetched: Results) -> None:
    """What the models are."""
    columns = [
        "Model",
        "Architecture",
        "Layers",
        "d",
        "Vocabulary",
        "Parameters",
        "Licence",
        "Weights (sha256)",
    ]
    rows = [
        [
            model, facts["architecture"], facts["n_layers"], facts["d_model"], number(facts["vocabulary"]),
            f"{facts['parameters'] / 1e6:,.0f} M", facts["source"]["licence"], _pin(facts["source"]),
        ]
        for model, facts in fetched.items()
    ]  # fmt: skip
    write_table(FOLDER / "models", columns, rows, caption="Models.", tokens=["Weights (sha256)"])


def _pin(source: Mapping[str, Any]) -> str:
    return (
        str(source["sha256" if source["source"] == "wheel" else "revision"])[:12]
        if source["source"] != "path"
        else "local"
    )


def words(fetched: Results) -> None:
    """How each vocabulary spells the operations."""
    columns = ["Model", "Operation", "Single-token forms", "Multi-piece forms", "Strict target"]
    rows = []
    for model, facts in fetched.items():
        for operation in OPERATIONS:
            word = facts["words"][operation]["word"][0]
            pieces = [f"{form.strip()} = {'+'.join(parts)}" for form, parts in word["multi_piece"].items()]
            strict = "whole word" if word["strict_is_whole"] else "first piece only"
            single = ", ".join(f"“{form}”" for form in word["forms"])
            rows.append([model, operation, single, "; ".join(pieces) or "–", strict])
    write_table(FOLDER / "words", columns, rows, caption="How the vocabularies spell the operation words.")


def probing_reported(probing: Results) -> None:
    """The originals' summary on 16 prompts."""
    columns = ["Model", "Prompts", "L0", "Lowest", "Peak", "Peak at", "Chance peak, 95 %", "p"]
    rows = []
    for model, result in probing.items():
        for name in ("symbol", "no_space", "word"):
            curve = result["reported"][name]
            peak = curve["peak"]
            low = min(range(1, len(curve["accuracy"])), key=curve["accuracy"].__getitem__)
            rows.append(
                [
                    model, name.replace("_", " "), percent(curve["accuracy"][1]),
                    f"{percent(curve['accuracy'][low])} at {result['layers'][low]}", accuracy(peak), peak["layer"],
                    percent(peak["shuffled_accuracy_95"]), number(peak["p"], 3),
                ]
            )  # fmt: skip
    write_table(FOLDER / "probing_reported", columns, rows, caption="Probes under the reported protocol, n = 16.")


def probing_controlled(probing: Results) -> None:
    """Accuracy on held-out groups, with baselines."""
    columns = [
        "Model",
        "Prompts",
        "Held out",
        "emb",
        "L0",
        "Chosen layer",
        "Shuffled",
        "Bag of tokens",
        "Chosen",
    ]
    rows = []
    for model, result in probing.items():
        for style in STYLES:
            for split in ("operands", "templates"):
                part = result["controlled"][style][f"held_out_{split}"]
                selected = part["selected"]
                rows.append(
                    [
                        model, style, split, percent(part["accuracy"][0]), percent(part["accuracy"][1]),
                        accuracy(selected), percent(selected["shuffled_accuracy"]),
                        percent(part["bag_of_tokens"]["accuracy"]), ", ".join(selected["layers"]),
                    ]
                )  # fmt: skip
    n = next(iter(probing.values()))["controlled"]["symbol"]["held_out_operands"]["n"]
    caption = f"Probes under the controlled protocol, n = {n} in every cell."
    write_table(FOLDER / "probing_controlled", columns, rows, caption=caption)


def held_out(probing: Results) -> None:
    """The eight held-out symbol prompts."""
    first = next(iter(probing.values()))["reported"]["held_out"]["prompts"]
    rows = [
        [entry["prompt"], entry["operation"]]
        + [
            f"{(guess := result['reported']['held_out']['prompts'][i])['predicted']} ({percent(guess['probability'])})"
            for result in probing.values()
        ]
        for i, entry in enumerate(first)
    ]
    columns = ["Prompt", "Operation", *probing]
    write_table(FOLDER / "held_out", columns, rows, caption="Held-out symbol prompts.", tokens=["Prompt"])


def flaws(probing: Results) -> None:
    """The reported protocol on states of a flawed forward pass."""
    columns = ["Model", "Prompts", "Forward pass", "L0", "Last layer", "Peak", "Peak at"]
    rows = []
    for model, result in probing.items():
        runs = {"sound": result["reported"], **result["flaws"]}
        for name in ("symbol", "word"):
            for flaw, curves in runs.items():
                curve = curves[name]
                rows.append(
                    [
                        model, name, flaw.replace("_", " "), percent(curve["accuracy"][1]),
                        percent(curve["accuracy"][-1]), accuracy(curve["peak"]), curve["peak"]["layer"],
                    ]
                )  # fmt: skip
    write_table(FOLDER / "flaws", columns, rows, caption="Flaw ablations under the reported protocol, n = 16.")


def lens_reported(lens: Results) -> None:
    """The originals' table of top tokens."""
    columns = ["Model", "Layer", "Prompt", "Top token", "Top", *OPERATIONS]
    rows = [
        [
            model, result["reported"]["layer"], entry["prompt"], entry["top_token"],
            percent(entry["top_probability"]), *(_tiny(entry["probability"][op]) for op in OPERATIONS),
        ]
        for model, result in lens.items()
        for entry in result["reported"]["prompts"]
    ]  # fmt: skip
    caption = "Logit lens under the reported protocol: top token and probability of the bare words' first tokens."
    write_table(FOLDER / "lens_reported", columns, rows, caption=caption, tokens=["Prompt", "Top token"])


def lens_controlled(lens: Results, depth: float) -> None:
    """Alignment at the reported depth and at its best layer, against the null."""
    columns = [
        "Model",
        "Prompts",
        "Layer",
        "Alignment",
        "Interval",
        "Median rank",
        "Null 95 %",
        "p",
        "Contrast p",
        "Choice",
    ]
    rows = []
    for model, result in lens.items():
        for style in STYLES:
            word = result["controlled"][style]["word"]
            fixed = layer_row(layer_at(depth, len(result["layers"]) - 1))
            best = max(range(1, len(word["alignment"])), key=word["alignment"].__getitem__)
            for row, mark in ((fixed, ""), (best, " (largest)")):
                low, high = word["interval"][row]
                rows.append(
                    [
                        model, style, result["layers"][row] + mark, _tiny(word["alignment"][row]),
                        f"[{_tiny(low)}, {_tiny(high)}]", number(word["rank"][row], 0),
                        _tiny(word["null"]["alignment_95"][row]), number(word["null"]["p"][row], 3),
                        number(word["null"]["contrast_p"][row], 3), percent(word["choice"]["accuracy"][row]),
                    ]
                )  # fmt: skip
    caption = "Alignment of the prompt's own operation word, against words matched in unembedding norm."
    write_table(FOLDER / "lens_controlled", columns, rows, caption=caption)


def _tiny(share: float) -> str:
    """A share over many orders of magnitude: percent where that reads well, else a power of ten."""
    if share >= 0.0005 or share == 0:
        return percent(share, 2)
    return number(share, 1)


def directions(probing: Results, depth: float) -> None:
    """Ranks of the operation words from the classes' directions."""
    columns = ["Model", "Prompts", "Direction", "Layer", *OPERATIONS, "Largest cosine", "Chance"]
    rows = []
    for model, result in probing.items():
        row = layer_row(layer_at(depth, len(result["layers"]) - 1))
        for style in STYLES:
            for kind in ("probe", "class_mean"):
                part = result["directions"][style][kind]
                cells = [
                    f"{number(r)} ({number(p, 3)})" for r, p in zip(part["rank"][row], part["p"][row], strict=True)
                ]
                rows.append(
                    [
                        model, style, kind.replace("_", " "), result["layers"][row], *cells,
                        number(max(part["max_cosine"][row]), 3), number(result["directions"]["expected_max_cosine"], 3),
                    ]
                )  # fmt: skip
    caption = (
        "Rank of each operation word in the vocabulary, seen from its class's direction (p against matched words)."
    )
    write_table(FOLDER / "directions", columns, rows, caption=caption)


def dual_reward_reported(dual: Results) -> None:
    """The originals' table: eight prompts before and after."""
    columns = ["Model", "Layer", "Prompt", "Before", "Own word", "After", "Top", "Own word after"]
    rows = [
        [
            model, result["layer"], old["prompt"], old["top_token"], _tiny(old["own_probability"]), new["top_token"],
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
                model, "before training", number(0), "–", accuracy(before["symbol"]["top"]),
                percent(before["word"]["top"]["accuracy"]), _tiny(before["symbol"]["alignment"]["mean"]),
                accuracy(before["answers"]["exact"]), "–", "–", "–",
            ]
        )  # fmt: skip
        rows.append(
            [
                model, ARMS["vo"], number(result["steps"]["main"]), number(main["parameters"]),
                accuracy(main["symbol"]["top"]), percent(main["word"]["top"]["accuracy"]),
                _tiny(main["symbol"]["alignment"]["mean"]), accuracy(main["answers"]["exact"]),
                number(main["answers"]["change"]["mean"], 2), number(main["kl"]["mean"], 2),
                _first([main["first_step_above_threshold"]]),
            ]
        )  # fmt: skip
        for key, arm in in_order(result["arms"]).items():
            seeds = f" × {number(arm['seeds'])}" if arm["seeds"] > 1 else ""
            rows.append(
                [
                    model, arm_name(key), number(result["steps"]["arms"]) + seeds, number(arm["parameters"]),
                    _over(arm["symbol_top"]), percent(arm["word_top"]["value"]),
                    _tiny(arm["symbol_alignment"]["value"]), _over(arm["answers_exact"]),
                    number(arm["answers_change"]["value"], 2), number(arm["kl"]["value"], 2),
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


def dual_reward_reading(dual: Results) -> None:
    """What answers lose without the words' directions."""
    columns = ["Model", "Directions", "Without the words", "Without random ones", "Difference", "Interval"]
    rows = [
        [
            model, number(reading["directions"]), number(reading["words"]["mean"], 3),
            number(reading["random"]["mean"], 3), number(reading["difference"]["mean"], 3),
            f"[{number(reading['difference']['interval'][0], 3)}, {number(reading['difference']['interval'][1], 3)}]",
        ]
        for model, reading in ((model, result["main"]["reading"]) for model, result in dual.items())
    ]  # fmt: skip
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
                    model, FLAWS.get(key, "none"), percent(arm["reported_top"]["value"]), _over(arm["symbol_top"]),
                    number(arm["final_losses"][0]["answer_loss"], 4), _over(arm["answers_exact"]),
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


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    exit_on_bad_input(run)
