"""Tables of the claims, and of the models as they are published: probes and the lens on arithmetic."""

from collections.abc import Mapping
from typing import Any

from classifier_emergence.numbers import NONE, number, percent, small_share
from classifier_emergence.reading.layers import layer_row
from classifier_emergence.tasks.arithmetic import OPERATIONS, STYLES
from experiments.report.tables.cells import NOTHING, at_layer, decimals, share, small_interval, yes
from experiments.report.tables.table import FOLDER, Result, Results, Rows, table
from experiments.report.typeset import write_table

L0 = layer_row(0)


def claims(ledger: Mapping[str, dict[str, Any]]) -> None:
    """Every claim with its verdict."""
    rows = []
    for key, claim in ledger.items():
        met = [item["met"] for item in claim["evidence"] if item["protocol"] != "flaw ablation"]
        tally = f"{sum(met)} of {len(met)}" if met else NOTHING
        rows.append([key, claim["claim"], claim["reported"], claim["verdict"], tally])
    columns = ["Id", "Claim", "Reported", "Verdict", "Evidence met"]
    write_table(FOLDER / "claims", columns, rows, caption="The claims of the sources and our verdicts.")


def evidence(ledger: Mapping[str, dict[str, Any]]) -> None:
    """The evidence behind each verdict."""
    columns = ["Claim", "Protocol", "Quantity", "Model", "Value", "Interval", "n", "Claimed", "Met"]
    rows = [
        [
            key, item["protocol"], item["what"], item["model"], number(item["value"], 3),
            decimals(item["interval"]) if item["interval"] else NONE, number(item["n"]), item["expected"],
            yes(item["met"]),
        ]
        for key, claim in ledger.items()
        for item in claim["evidence"]
    ]  # fmt: skip
    write_table(FOLDER / "evidence", columns, rows, caption="Every number behind the verdicts.")


@table("fetch", "Architecture | Layers | d | Vocabulary | Parameters | Licence | `Weights (sha256)`")
def models(facts: Result) -> Rows:
    """Models."""
    source = facts["source"]
    pin = {"wheel": "sha256", "hub": "revision"}.get(source["source"])
    yield [
        facts["architecture"], facts["n_layers"], facts["d_model"], number(facts["vocabulary"]),
        f"{facts['parameters'] / 1e6:,.0f} M", source["licence"], source[pin][:12] if pin else "local",
    ]  # fmt: skip


@table("fetch", "Operation | Single-token forms | Multi-piece forms | Strict target")
def words(facts: Result) -> Rows:
    """How the vocabularies spell the operation words."""
    for operation in OPERATIONS:
        word = facts["words"][operation]["word"][0]
        single = ", ".join(f"“{form}”" for form in word["forms"])
        pieces = "; ".join(f"{form.strip()} = {'+'.join(parts)}" for form, parts in word["multi_piece"].items())
        yield [operation, single, pieces or NOTHING, "whole word" if word["strict_is_whole"] else "first piece only"]


@table("probing", "Prompts | L0 | Lowest | Peak | Peak at | Chance peak, 95 % | p")
def probing_reported(result: Result) -> Rows:
    """Probes under the reported protocol, n = 16."""
    for name in ("symbol", "no_space", "word"):
        accuracy, peak = result["reported"][name]["accuracy"], result["reported"][name]["peak"]
        lowest = min(range(L0, len(accuracy)), key=accuracy.__getitem__)
        yield [
            name.replace("_", " "), percent(accuracy[L0]), at_layer(result, accuracy, lowest, percent), share(peak),
            peak["layer"], percent(peak["shuffled_accuracy_95"]), number(peak["p"], 3),
        ]  # fmt: skip


@table(
    "probing",
    "Prompts | Held out | emb | L0 | Chosen layer | Shuffled | Bag of tokens | Chosen",
    n="controlled.symbol.held_out_operands.n",
)
def probing_controlled(result: Result) -> Rows:
    """Probes under the controlled protocol, n = {n} in every cell."""
    for style in STYLES:
        for split in ("operands", "templates"):
            part = result["controlled"][style][f"held_out_{split}"]
            chosen = part["selected"]
            yield [
                style, split, percent(part["accuracy"][0]), percent(part["accuracy"][L0]), share(chosen),
                percent(chosen["shuffled_accuracy"]), percent(part["bag_of_tokens"]["accuracy"]),
                ", ".join(chosen["layers"]),
            ]  # fmt: skip


def held_out(probing: Results) -> None:
    """The eight held-out symbol prompts, a column for each model."""
    by_model = [result["reported"]["held_out"]["prompts"] for result in probing.values()]
    rows = [
        [
            guesses[0]["prompt"], guesses[0]["operation"],
            *(f"{guess['predicted']} ({percent(guess['probability'])})" for guess in guesses),
        ]
        for guesses in zip(*by_model, strict=True)
    ]  # fmt: skip
    columns = ["Prompt", "Operation", *probing]
    write_table(FOLDER / "held_out", columns, rows, caption="Held-out symbol prompts.", tokens=["Prompt"])


@table("probing", "Prompts | Forward pass | L0 | Last layer | Peak | Peak at")
def flaws(result: Result) -> Rows:
    """Flaw ablations under the reported protocol, n = 16."""
    for name in ("symbol", "word"):
        for flaw, curves in {"sound": result["reported"], **result["flaws"]}.items():
            accuracy, peak = curves[name]["accuracy"], curves[name]["peak"]
            yield [
                name, flaw.replace("_", " "), percent(accuracy[L0]), percent(accuracy[-1]), share(peak), peak["layer"],
            ]  # fmt: skip


@table("logit_lens", f"Layer | `Prompt` | `Top token` | Top | {' | '.join(OPERATIONS)}")
def lens_reported(result: Result) -> Rows:
    """Logit lens under the reported protocol: top token and probability of the bare words' first tokens."""
    for entry in result["reported"]["prompts"]:
        yield [
            result["reported"]["layer"], entry["prompt"], entry["top_token"], percent(entry["top_probability"]),
            *(small_share(entry["probability"][operation]) for operation in OPERATIONS),
        ]  # fmt: skip


@table("logit_lens", "Prompts | Layer | Alignment | Interval | Median rank | Null 95 % | p | Contrast p | Choice")
def lens_controlled(result: Result) -> Rows:
    """Alignment of the prompt's own operation word, against words matched in unembedding norm."""
    for style in STYLES:
        word = result["controlled"][style]["word"]
        null = word["null"]
        fixed = result["layers"].index(result["reported"]["layer"])
        largest = max(range(L0, len(word["alignment"])), key=word["alignment"].__getitem__)
        for row, mark in ((fixed, ""), (largest, " (largest)")):
            yield [
                style, result["layers"][row] + mark, small_share(word["alignment"][row]),
                small_interval(word["interval"][row]), number(word["rank"][row], 0),
                small_share(null["alignment_95"][row]), number(null["p"][row], 3),
                number(null["contrast_p"][row], 3), percent(word["choice"]["accuracy"][row]),
            ]  # fmt: skip


@table("probing", f"Prompts | Direction | Layer | {' | '.join(OPERATIONS)} | Largest cosine | Chance")
def directions(result: Result) -> Rows:
    """Rank of each operation word in the vocabulary, seen from its class's direction (p against matched words)."""
    found = result["directions"]
    row = result["layers"].index(found["reported"]["layer"])
    for style in STYLES:
        for kind in ("probe", "class_mean"):
            part = found[style][kind]
            ranks = zip(part["rank"][row], part["p"][row], strict=True)
            yield [
                style, kind.replace("_", " "), result["layers"][row],
                *(f"{number(rank)} ({number(p, 3)})" for rank, p in ranks),
                number(max(part["max_cosine"][row]), 3), number(found["expected_max_cosine"], 3),
            ]  # fmt: skip
