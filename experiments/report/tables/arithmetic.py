"""Stage tables: the paper's tables from the results, as CSV (which the paper reads), Markdown and LaTeX."""

from collections.abc import Mapping
from typing import Any

from classifier_emergence.numbers import accuracy_text, number, percent, small_share
from classifier_emergence.reading.layers import layer_at, layer_row
from classifier_emergence.tasks.arithmetic import OPERATIONS, STYLES
from experiments.report.tables.training import FOLDER, Results
from experiments.report.typeset import write_table


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
                    f"{percent(curve['accuracy'][low])} at {result['layers'][low]}", accuracy_text(peak), peak["layer"],
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
                        accuracy_text(selected), percent(selected["shuffled_accuracy"]),
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
                        percent(curve["accuracy"][-1]), accuracy_text(curve["peak"]), curve["peak"]["layer"],
                    ]
                )  # fmt: skip
    write_table(FOLDER / "flaws", columns, rows, caption="Flaw ablations under the reported protocol, n = 16.")


def lens_reported(lens: Results) -> None:
    """The originals' table of top tokens."""
    columns = ["Model", "Layer", "Prompt", "Top token", "Top", *OPERATIONS]
    rows = [
        [
            model, result["reported"]["layer"], entry["prompt"], entry["top_token"],
            percent(entry["top_probability"]), *(small_share(entry["probability"][op]) for op in OPERATIONS),
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
                        model, style, result["layers"][row] + mark, small_share(word["alignment"][row]),
                        f"[{small_share(low)}, {small_share(high)}]", number(word["rank"][row], 0),
                        small_share(word["null"]["alignment_95"][row]), number(word["null"]["p"][row], 3),
                        number(word["null"]["contrast_p"][row], 3), percent(word["choice"]["accuracy"][row]),
                    ]
                )  # fmt: skip
    caption = "Alignment of the prompt's own operation word, against words matched in unembedding norm."
    write_table(FOLDER / "lens_controlled", columns, rows, caption=caption)


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
