"""Tables of reinforcement learning: GRPO alone, with a loss on the lens, and after or before the dual reward."""

from itertools import product

import numpy as np

from classifier_emergence.numbers import accuracy_text, number, percent, small_share
from classifier_emergence.reading.layers import layer_at, layer_row
from experiments.report.names import NAMES
from experiments.report.tables.cells import NOTHING, at_layer, cell, cells, known, value
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
        curves = (percent(run["reported"]["curve"][row]) for run in (before, first))
        yield [result["layers"][row], *curves, *(accuracy_text(run["statements"], row) for run in (before, seed))]


@table("grpo", "Training | Probe | Deviation | Truth words | Separation | Rank | Probability | d | Weights changed")
def grpo_reported(result: Result) -> Rows:
    """GRPO under the reported protocol, before and after training."""
    row = result["layers"].index(result["probe_layer"])
    cases = [("before training", result["before"], [NOTHING, NOTHING])]
    for key, name in NAMES["grpo_arms"].items():
        (run, *_), summary = result["arms"][key]["runs"], result["arms"][key]["summary"]
        cases.append((name, run, [number(round(summary["cohens_d"][0], 9)), percent(run["share_of_weights_changed"])]))
    for name, run, effect in cases:
        found = run["reported"]
        accuracy, deviation = percent(found["accuracy"][row]), f"± {percent(found['std'][row])}"
        words = cells(found, "separation:3 | first_token.rank:1 | first_token.probability:3")
        yield [name, accuracy, deviation, len(found["direction"]["found"]), *words, *effect]


@table("grpo", "Seed | At the layer | p | Largest | Largest null | Statements | Exact answers | Reward | Change | KL")
def grpo_controlled(result: Result) -> Rows:
    """GRPO under the controlled protocol: alignment, probes and answers, before training and with each seed."""
    runs = {number(seed): run for seed, run in enumerate(result["arms"]["controlled"]["runs"])}
    row = result["layers"].index(result["layer"])
    for name, run in {"before": result["before"], **runs}.items():
        alignment, largest_null = run["alignment"]["alignment"], run["alignment"]["null"]["alignment_max"]
        peak = layer_row(int(np.argmax(alignment[layer_row(0) :])))
        kl = run["steps"][-1].get("kl") if "steps" in run else None
        yield [
            name, *cells(run["alignment"], f"alignment.{row}:small | null.p.{row}:3"),
            at_layer(result, alignment, peak, small_share), small_share(largest_null[peak]),
            *cells(run, "statements.selected:share | answers.exact:share | sampled_reward:percent | answers.change:2"),
            known(kl, 3),
        ]  # fmt: skip


@table("collapse", "Layer | `Prompt` | `Before` | Own word | `After` | Top | Own word after")
def collapse_prompts(result: Result) -> Rows:
    """GRPO and the class loss under the reported protocol: six prompts before and after training."""
    if "reported_first" not in result["arms"]:
        return
    first = result["arms"]["reported_first"]["runs"][0]
    for old, new in zip(*(run["reported"]["prompts"] for run in (result["before"], first)), strict=True):
        after = cells(new, "top_token | top_probability:percent | own_probability:small")
        yield [result["layer"], *cells(old, "prompt | top_token | own_probability:small"), *after]


@table(
    "collapse",
    "Configuration | Steps | Class loss | Reward | Divergence | Six prompts | One word | Commonest "
    "| Accuracy | Moved | Collapsed",
)
def collapse_attempts(result: Result) -> Rows:
    """GRPO and the class loss: the originals' five configurations, with their flaws."""
    if "reported_first" not in result["arms"]:
        return
    before = result["before"]["reported"]
    yield [
        "before training", *[NOTHING] * 4, percent(value(before["score"])), NOTHING, *_classes(before["classes"]),
        NOTHING, NOTHING,
    ]  # fmt: skip
    for key, name in NAMES["collapse_attempts"].items():
        (run, *_), summary = result["arms"][key]["runs"], result["arms"][key]["summary"]
        last = run["steps"][-1]
        yield [
            name, last["step"], _from_to(run, "class_loss"), _from_to(run, "reward"),
            known(last.get("signed_kl", last.get("kl")), 1),
            *cells(summary, "reported.score:percent | reported_one_word:percent"),
            *_classes(run["reported"]["classes"]),
            *cells(summary, "share_of_weights_changed:percent | reported_collapsed:yes"),
        ]  # fmt: skip


def _classes(found: Result) -> list[str]:
    """The commonest class with its share, and the balanced accuracy."""
    name = max(found["shares"], key=found["shares"].__getitem__)
    return [f"{percent(found['modal_share'])} {name}", percent(value(found["balanced_accuracy"]))]


def _from_to(run: Result, name: str) -> str:
    """A number of training on the first and the last step."""
    return " → ".join(number(run["steps"][i][name]) for i in (0, -1))


@table(
    "collapse",
    "Trained | Loss | Entropy | Commonest | Accuracy | Alignment | Separation | Reward | KL | Exact | Collapsed",
)
def collapse_factorial(result: Result) -> Rows:
    """What collapses: whole model or V and O, GRPO or the class loss or both."""
    shown = "entropy:2 | modal_share:percent | balanced_accuracy:share | alignment:small"
    cases = [("before training", NOTHING, result["before"])]
    cases += [(*words, result["arms"][key]["summary"]) for key, words in NAMES["collapse_factorial"].items()]
    for trained, loss, found in cases:
        kl = [each for each in found.get("final_kl", []) if each is not None]
        yield [
            trained, loss, *cells(found["classes"], shown),
            *cells(found, "spread.separation:2 | sampled_reward:percent"),
            known(float(np.mean(kl)) if kl else None, 3), percent(value(found["answers"])),
            f"{found['collapsed']} of {found['seeds']}" if found is not result["before"] else NOTHING,
        ]  # fmt: skip


@table(
    "collapse",
    "Weights | Targets | Divergence | Class loss | Reached | Steps | Moved | One word | Accuracy | Separation | Reward "
    "| Collapsed",
)
def collapse_causes(result: Result) -> Rows:
    """Possible causes of the collapse, crossed, in training the whole model to the reported class loss."""
    if "reported_first" not in result["arms"]:
        return
    for levels in product(*(kind.items() for kind in NAMES["collapse_levels"].values())):
        found = result["arms"]["_".join(key for key, _ in levels)]["summary"]
        yield [
            *(name for _, name in levels), *cells(found, "class_loss:2"), f"{found['reached']} of {found['seeds']}",
            *cells(found, "steps_to_class_loss:1 | share_of_weights_changed:percent | classes.one_word:share"),
            *cells(found, "classes.balanced_accuracy:share | spread.separation:2 | sampled_reward:share"),
            f"{found['collapsed']} of {found['seeds']}",
        ]  # fmt: skip


@table("collapse", "Gradients | Cosine | Half batches | GRPO with itself | Class loss with itself | Class loss's share")
def collapse_gradients(result: Result) -> Rows:
    """Gradients of GRPO and of the class loss before and along training: cosines with their nulls, and lengths."""
    along = result["arms"]["whole_both"]["summary"]["gradients"]
    for when, found in {"before training": result["before"]["gradients"], "along training": along}.items():
        shown = ("cosine", "across", "policy_halves", "class_halves", "class_share")
        yield [when, *(_with_interval(found[name]) for name in shown)]


def _with_interval(found: Result) -> str:
    return f"{number(value(found))} {cell(found['interval'], '2')}"


@table("replication", "Claim | Training | Change of | Seeds | Mean | By seed | n")
def replication(result: Result) -> Rows:
    """What trainings on which a verdict hung change with many seeds of their own."""
    for key, (claim, training) in NAMES["replicated"].items():
        found = result["trainings"].get(key, {})
        for item, name in NAMES["replicated_changes"].items():
            if item in found:
                mean = " ".join(cells(found[item], "value:2 | interval:2"))
                by_seed = " to ".join(cells(found[item], "least:2 | largest:2"))
                yield [claim, training, name, len(found["seeds"]), mean, by_seed, found[item]["n"]]


@table("staged", "Order | After | Alignment | Own word on top | Reward | Exact answers | Change")
def staged(result: Result) -> Rows:
    """Dual reward and GRPO one after the other, and together: lens, reward and answers after each part."""
    shown = "lens.alignment:small | lens.top:share | sampled_reward:share | answers.exact:share | answers.change:2"
    paths = [each.partition(":")[0] for each in shown.split(" | ")]
    parts = [(NOTHING, "no training", [result["before"]])]
    for key, order in NAMES["staged_orders"].items():
        stages = zip(*(run["stages"] for run in result["orders"][key]["runs"]), strict=True)
        found = [(order, NAMES["staged_rewards"][seeds[0]["reward"]], list(seeds)) for seeds in stages]
        # Orders that begin alike share what they begin with.
        parts += [part for part in found if part[2] not in [seeds for _, _, seeds in parts]]
    for order, after, seeds in parts:
        yield [order, after, *cells(summary_over_seeds(seeds, paths), shown)]
