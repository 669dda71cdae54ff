"""Tables of reinforcement learning: GRPO alone, with a loss on the lens, and after or before the dual reward."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from classifier_emergence.numbers import accuracy_text, number, percent, small_share
from classifier_emergence.reading.layers import layer_at, layer_row
from experiments.report import names
from experiments.report.tables.cells import NOTHING, at_layer, known, share, value, yes
from experiments.report.tables.table import Result, Rows, table
from experiments.shared.summaries import summary_over_seeds

PROBE_DEPTHS = [layer / 22 for layer in (0, 2, 4, 8, 10, 14, 16, 20)]
"""Of the layers in the originals' table of probes."""


@table("grpo", "Layer | 20 items, before | 20 items, after | Held out, before | Held out, after")
def grpo_probe(result: Result) -> Rows:
    """Probes for true statements by layer, before and after GRPO."""
    before, arms = result["before"], result["arms"]
    first, seed = arms["reported"]["runs"][0], arms["controlled"]["runs"][0]
    for depth in PROBE_DEPTHS:
        row = layer_row(layer_at(depth, len(result["layers"]) - 1))
        yield [
            result["layers"][row], *(percent(run["reported"]["curve"][row]) for run in (before, first)),
            *(accuracy_text(run["statements"], row) for run in (before, seed)),
        ]  # fmt: skip


@table("grpo", "Training | Probe | Deviation | Truth words | Separation | Rank | Probability | d | Weights changed")
def grpo_reported(result: Result) -> Rows:
    """GRPO under the reported protocol, before and after training."""
    row = result["layers"].index(result["probe_layer"])

    def measured(found: Mapping[str, Any]) -> list[str]:
        rank, probability = (found["first_token"][key]["mean"] for key in ("rank", "probability"))
        return [
            percent(found["accuracy"][row]), f"± {percent(found['std'][row])}",
            number(len(found["direction"]["found"])), number(found["separation"], 3), number(rank, 1),
            number(probability, 3),
        ]  # fmt: skip

    yield ["before training", *measured(result["before"]["reported"]), NOTHING, NOTHING]
    for key, name in names.GRPO_ARMS.items():
        (run, *_), summary = result["arms"][key]["runs"], result["arms"][key]["summary"]
        changed = percent(run["share_of_weights_changed"])
        yield [name, *measured(run["reported"]), number(summary["cohens_d"][0]), changed]


@table("grpo", "Seed | At the layer | p | Largest | Largest null | Statements | Exact answers | Reward | Change | KL")
def grpo_controlled(result: Result) -> Rows:
    """GRPO under the controlled protocol: alignment, probes and answers, before training and with each seed."""
    runs = {number(seed): run for seed, run in enumerate(result["arms"]["controlled"]["runs"])}
    row = result["layers"].index(result["layer"])
    for name, run in {"before": result["before"], **runs}.items():
        alignment, null = run["alignment"]["alignment"], run["alignment"]["null"]
        peak = layer_row(int(np.argmax(alignment[layer_row(0) :])))
        kl = run["steps"][-1].get("kl") if "steps" in run else None
        yield [
            name, small_share(alignment[row]), number(null["p"][row], 3),
            at_layer(result, alignment, peak, small_share), small_share(null["alignment_max"][peak]),
            share(run["statements"]["selected"]), share(run["answers"]["exact"]),
            percent(run["sampled_reward"]["mean"]), number(run["answers"]["change"]["mean"], 2),
            known(kl, 3),
        ]  # fmt: skip


@table("collapse", "Layer | `Prompt` | `Before` | Own word | `After` | Top | Own word after")
def collapse_prompts(result: Result) -> Rows:
    """GRPO and the class loss under the reported protocol: six prompts before and after training."""
    first = result["arms"]["reported_first"]["runs"][0]
    for old, new in zip(*(run["reported"]["prompts"] for run in (result["before"], first)), strict=True):
        yield [
            result["layer"], old["prompt"], old["top_token"], small_share(old["own_probability"]), new["top_token"],
            percent(new["top_probability"]), small_share(new["own_probability"]),
        ]  # fmt: skip


@table(
    "collapse",
    "Configuration | Steps | Class loss | Reward | Divergence | Six prompts | One word | Commonest "
    "| Accuracy | Collapsed",
)
def collapse_attempts(result: Result) -> Rows:
    """GRPO and the class loss: the originals' five configurations, with their flaws, and two of them in 32 bits."""
    before = result["before"]["reported"]
    yield [
        "before training", *[NOTHING] * 4, percent(value(before["score"])), NOTHING, *_classes(before["classes"]),
        NOTHING,
    ]  # fmt: skip
    for key, name in {**names.COLLAPSE_ATTEMPTS, **names.COLLAPSE_IN_32_BITS}.items():
        (run, *_), summary = result["arms"][key]["runs"], result["arms"][key]["summary"]
        last = run["steps"][-1]
        divergence = last.get("signed_kl", last.get("kl"))
        yield [
            name, number(last["step"]), _from_to(run, "class_loss"), _from_to(run, "reward"),
            known(divergence, 1), percent(value(summary["reported"]["score"])),
            percent(value(summary["reported_one_word"])), *_classes(run["reported"]["classes"]),
            yes(summary["reported_collapsed"]),
        ]  # fmt: skip


def _classes(found: Mapping[str, Any]) -> list[str]:
    """The commonest class with its share, and the balanced accuracy."""
    name = max(found["shares"], key=found["shares"].__getitem__)
    return [f"{percent(found['modal_share'])} {name}", percent(value(found["balanced_accuracy"]))]


def _from_to(run: Mapping[str, Any], name: str) -> str:
    """A number of training on the first and the last step."""
    return " → ".join(number(run["steps"][i][name]) for i in (0, -1))


@table("collapse", "Trained | Loss | Entropy | Commonest | Accuracy | Alignment | Reward | KL | Exact | Collapsed")
def collapse_factorial(result: Result) -> Rows:
    """What collapses: whole model or V and O, GRPO or the class loss or both."""

    def measured(found: Mapping[str, Any]) -> list[str]:
        classes = found["classes"]
        kl = [each for each in found.get("final_kl", []) if each is not None]
        return [
            number(value(classes["entropy"])), percent(value(classes["modal_share"])),
            share(classes["balanced_accuracy"]), small_share(value(classes["alignment"])),
            percent(value(found["sampled_reward"])), known(float(np.mean(kl)) if kl else None, 3),
            percent(value(found["answers"])),
        ]  # fmt: skip

    yield ["before training", NOTHING, *measured(result["before"]), NOTHING]
    for key, (trained, loss) in names.COLLAPSE_FACTORIAL.items():
        found = result["arms"][key]["summary"]
        yield [trained, loss, *measured(found), f"{number(found['collapsed'])} of {number(found['seeds'])}"]


@table("collapse", "Flaw | Class loss | Commonest | Accuracy | Reward | Signed | k3 | Collapsed")
def collapse_flaws(result: Result) -> Rows:
    """Flaws of the originals, switched on one by one in training the whole model on both parts of the loss."""
    for key, name in {"whole_both": "none", **names.COLLAPSE_FLAWS}.items():
        run = result["arms"][key]["runs"][0]
        last = run["steps"][-1]
        yield [
            name, _from_to(run, "class_loss"), *_classes(run["classes"]), share(run["sampled_reward"]),
            known(last.get("signed_kl"), 1), number(last["kl"], 3), yes(run["classes"]["collapsed"]),
        ]  # fmt: skip


@table("staged", "Order | After | Alignment | Own word on top | Reward | Exact answers | Change")
def staged(result: Result) -> Rows:
    """Dual reward and GRPO one after the other, and together: lens, reward and answers after each part."""
    paths = ("lens.alignment", "lens.top", "sampled_reward", "answers.exact", "answers.change")
    parts = [(NOTHING, "no training", [result["before"]])]
    for key, order in names.STAGED_ORDERS.items():
        stages = zip(*(run["stages"] for run in result["orders"][key]["runs"]), strict=True)
        parts += [(order, names.STAGED_REWARDS[seeds[0]["reward"]], list(seeds)) for seeds in stages]
    for order, after, seeds in parts:
        found = summary_over_seeds(seeds, paths)
        yield [
            order, after, small_share(value(found["lens"]["alignment"])), share(found["lens"]["top"]),
            share(found["sampled_reward"]), share(found["answers"]["exact"]),
            number(value(found["answers"]["change"]), 2),
        ]  # fmt: skip
