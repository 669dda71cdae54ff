"""Tables of the mixtures of experts."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from classifier_emergence.numbers import interval_text, number, percent, small_share
from classifier_emergence.results import lookup
from classifier_emergence.tasks.arithmetic import OPERATIONS
from experiments.report.names import NAMES, router_readings
from experiments.report.tables.cells import NOTHING, cells, share, value
from experiments.report.tables.table import Result, Rows, table

SHOWN = 5
"""Experts of a model in the table of tokens, by each of two rules."""
TOKENS = 3


@table(
    "moe_routers",
    "Routers | Seed | Experts | Largest cosine | Random rows, 95 % | Random rows, largest "
    "| Cosine | z | Coherence | Words, smallest q",
)
def router_found(result: Result) -> Rows:
    """Experts that stand out from random rows."""
    if result["kind"] == "mixture":
        read = [("as published", NOTHING, result)]
    else:
        phases = (("fresh", "before"), ("trained", "after"))
        read = [(name, str(run["seed"]), run[when]) for name, when in phases for run in result["mixtures"]]
    for name, seed, routers in read:
        part = routers["projection"]
        cosines = cells(part["reported"], "largest:3 | null_95:3 | null_largest:3")
        counts = cells(part, "reported.found | controlled.found | coherence.found")
        smallest = min((word["q"] for word in part["words"]), default=None)
        yield [name, seed, np.size(part["reported"]["q"]), *cosines, *counts, number(smallest, 3)]


@table(
    "moe_routers",
    "Rows | Layer | Expert | Category | `Top tokens (cosine)` | z | q of z | Coherence | q of coherence",
)
def router_rows(result: Result) -> Rows:
    """Experts with the largest cosines, and those whose top tokens are most alike."""
    read = _last_reading(result)
    plain, folded, alike = read["reported"], read["controlled"], read["coherence"]
    for layer, expert in _largest(plain["value"]):
        at, where = f"{layer}.{expert}", [read["layers"][layer], _expert_name(result, expert)]
        scores = [*cells(plain, f"z.{at}:1 | q.{at}:3"), NOTHING, NOTHING]
        yield ["as stored", *where, plain["category"][layer][expert], _tokens(plain, at), *scores]
    for layer, expert in _largest(alike["value"]):
        at, where = f"{layer}.{expert}", [read["layers"][layer], _expert_name(result, expert)]
        scores = [*cells(folded, f"value.{at}:1 | q.{at}:3"), *cells(alike, f"value.{at}:2 | q.{at}:3")]
        yield ["gains folded in", *where, NOTHING, _tokens(folded, at), *scores]


def _last_reading(result: Result) -> Mapping[str, Any]:
    """Rows of the routers against the vocabulary, of those that were trained where there are such."""
    *_, last = router_readings(result).values()
    projection: Mapping[str, Any] = last["projection"]
    return projection


def _expert_name(result: Result, expert: int) -> str:
    """The domain that an expert was trained on, or its number."""
    names: Sequence[str] = result.get("experts", ())
    return names[expert] if names else str(expert)


def _largest(values: Any) -> list[tuple[int, int]]:
    array = np.asarray(values)
    order = np.argsort(-array, axis=None, kind="stable")[:SHOWN]
    return [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, array.shape), strict=True)]


def _tokens(part: Mapping[str, Any], at: str) -> str:
    pairs = zip(lookup(part, f"top_tokens.{at}"), lookup(part, f"top_scores.{at}"), strict=True)
    return ", ".join(f"“{token}” {number(score, 3)}" for token, score in list(pairs)[:TOKENS])


@table("moe_routers", "Word | Forms | Layer | Expert | Rank | p | p, equal frequency | q")
def router_words(result: Result) -> Rows:
    """Words looked up for every expert: the expert whose row fits each best."""
    for word in _last_reading(result)["words"]:
        found = cells(word, "rank | p:3 | p_equal_frequency:3 | q:3")
        yield [word["word"], len(word["forms"]), word["layer"], _expert_name(result, word["expert"]), *found]


@table("moe_routers", f"Trained on | {' | '.join(OPERATIONS)} | text")
def expert_losses(result: Result) -> Rows:
    """Mean loss on held-out texts, in nats a token, of MLPs trained apart."""
    if result["kind"] != "upcycled":
        return
    shown = " | ".join(f"{domain}:3" for domain in result["experts"])
    yield ["before training", *cells(result["base"]["losses"], shown)]
    for name in (*result["experts"], "all"):
        losses = cells(result["branches"][name]["test_losses"], shown)
        yield ["all (the dense twin)" if name == "all" else name, *losses]


IN_USE: dict[str, tuple[str, str | None, Callable[[float], str]]] = {
    "evenness of the load": ("usage.load_entropy", None, number),
    "left open by a token": ("usage.token_entropy", None, number),
    "domain of the text, bits": ("domain.bits", "domain.shuffled_95", number),
    "token, bits": ("token.bits", "token.shuffled_95", number),
    "operation of symbol prompts, bits": (
        "prompts.symbol.operation.bits", "prompts.symbol.operation.shuffled_95", number,
    ),
    "operation of word prompts, bits": ("prompts.word.operation.bits", "prompts.word.operation.shuffled_95", number),
    "own expert first, symbol prompts": ("prompts.symbol.first_choice.accuracy", "prompts.symbol.chance", percent),
    "own expert first, word prompts": ("prompts.word.first_choice.accuracy", "prompts.word.chance", percent),
    "experts that another context changes": ("context.change", "context.other_tokens", percent),
}  # fmt: skip
"""What routing in use is asked: keys of the number and of its chance level, and how both are printed."""


@table("moe_routers", "What | Fresh routers | Trained routers | By chance")
def routing_use(result: Result) -> Rows:
    """Routing in use: means over layers, ranges over seeds."""
    if result["kind"] != "upcycled":
        return

    def by_seed(when: str, key: str) -> list[float]:
        """A number, or its mean over layers, for every seed."""
        return [float(np.mean(lookup(run[when]["routing"], key))) for run in result["mixtures"]]

    for what, (key, chance, shown) in IN_USE.items():
        ranges = [
            f"{shown(fmean(values))} [{shown(min(values))}, {shown(max(values))}]"
            for values in (by_seed(when, key) for when in NAMES["routers"])
        ]
        yield [what, *ranges, shown(fmean(by_seed("after", chance))) if chance else NOTHING]


@table("moe_routers", "What | Base | Fresh routers | Mixture | Dense twin | Mixture − twin")
def mixture_twin(result: Result) -> Rows:
    """A mixture of experts and its dense twin."""
    if result["kind"] != "upcycled":
        return

    def compared(key: str) -> list[Mapping[str, Any]]:
        """A number of the base model, then over seeds of the joined experts, of the mixture and of the twin."""
        return [
            lookup(result["base"], key),
            *(result["over_seeds"][kind][key] for kind in ("joined", "mixture", "twin")),
        ]

    for domain in result["experts"]:
        yield [f"loss on {domain}", *map(_loss, compared(f"losses.{domain}")), NOTHING]
    yield ["exact answers", *map(share, compared("answers")), NOTHING]
    for style, gap in result["mixture_minus_twin"].items():
        low, high = map(_signed, gap["interval"])
        alignment = (small_share(value(item)) for item in compared(f"lens.{style}.at_depth"))
        yield [f"alignment, {style} prompts", *alignment, f"{_signed(gap['mean'])} [{low}, {high}]"]
        yield [f"probe, {style} prompts", *map(share, compared(f"probe.{style}.at_depth")), NOTHING]


def _loss(item: Mapping[str, Any]) -> str:
    return f"{number(value(item), 3)} {interval_text(item['interval'], 3, scale=1)}"


def _signed(x: float) -> str:
    """A difference of small shares."""
    return small_share(x) if x >= 0 else f"−{small_share(-x)}"
