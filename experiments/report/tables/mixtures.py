"""Tables of the mixtures of experts."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from classifier_emergence.numbers import interval_text, number, percent, small_share
from classifier_emergence.results import lookup
from classifier_emergence.tasks.arithmetic import OPERATIONS
from experiments.report.names import NAMES, router_readings
from experiments.report.tables.cells import NOTHING, cells, known, share, value
from experiments.report.tables.table import Result, Rows, table

SHOWN = 5
"""Experts of a model in the table of tokens, by each of two rules."""
TOKENS = 3


@table(
    "moe_routers",
    "Routers | Seed | Experts | Largest cosine | Random rows, 95 % | Random rows, largest "
    "| Cosine | z | Cosine, gains folded in | Coherence | Words, smallest q",
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
        counts = cells(part, "reported.found | controlled.found | largest.found | coherence.found")
        smallest = min((word["q"] for word in part["words"]), default=None)
        yield [name, seed, np.size(part["reported"]["q"]), *cosines, *counts, number(smallest, 3)]


@table(
    "moe_routers",
    "Rows | Layer | Expert | Category | `Top tokens (cosine)` | z | q of z | Coherence | q of coherence",
)
def router_rows(result: Result) -> Rows:
    """Experts with the largest cosines, those whose top tokens are most alike, and those whose output stands out."""
    read = _last_reading(result)
    plain, written = read["reported"], read.get("written")
    kinds = [("as stored", plain, read["coherence"], plain["value"])]
    kinds += [("gains folded in", read["controlled"], read["coherence"], read["coherence"]["value"])]
    if written:
        kinds += [("what experts write", written["controlled"], written["coherence"], written["controlled"]["value"])]
    for name, part, alike, order in kinds:
        for layer, expert in _largest(order):
            at, where = f"{layer}.{expert}", [read["layers"][layer], _expert_name(result, expert)]
            stored = part is plain
            scores = [*cells(part, f"{'z' if stored else 'value'}.{at}:1 | q.{at}:3")]
            scores += [NOTHING, NOTHING] if stored else cells(alike, f"value.{at}:2 | q.{at}:3")
            yield [name, *where, plain["category"][layer][expert] if stored else NOTHING, _tokens(part, at), *scores]


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


@table(
    "moe_routers",
    "Prompts | Layer | Base | Mixture | Dense twin | Contrast, mixture | Equally frequent, 95 % | Least p",
)
def written_alignment(result: Result) -> Rows:
    """The own operation word in what MLPs write: alignment, and contrast (nats) against equally frequent tokens.

    Means over seeds.
    """
    if result["kind"] != "upcycled":
        return
    for style in result["written_minus_twin"]:
        mixtures, twins = ([run["after"]["written"][style] for run in result[kind]] for kind in ("mixtures", "twins"))
        for i, layer in enumerate(mixtures[0]["layers"]):
            sets = ([result["base"]["written"][style]], mixtures, twins)
            aligned = [small_share(fmean(each["alignment"]["mean"][i] for each in found)) for found in sets]
            contrast = fmean(each["log_contrast"][i] for each in mixtures)
            high = fmean(each["null"]["log_contrast_95"][i] for each in mixtures)
            p = min(each["null"]["contrast_p"][i] for each in mixtures)
            yield [style, layer, *aligned, number(contrast), number(high), number(p, 3)]


PATHS = {
    "layer": "the best layer", "path": "the path", "token": "the token", "both": "token and path",
    "beyond_layer": "path beyond the best layer", "beyond_token": "path beyond the token",
}  # fmt: skip
"""What tells of the operation -> how it is called."""


@table("moe_routers", "Prompts | What | Fresh routers | Trained routers | Interval | Permuted labels, 95 %")
def router_paths(result: Result) -> Rows:
    """Bits of the operation that the last token's experts tell, operand pairs held out: means over seeds."""
    for style in ("symbol", "word"):
        for key, what in PATHS.items():
            runs = result.get("mixtures", [{"after": result}])
            read = {
                when: [run[when] for run in runs if when in run and run[when]["routing"]] for when in NAMES["routers"]
            }
            bits = {when: [each["routing"]["prompts"][style]["path"][key] for each in of] for when, of in read.items()}
            if not (trained := bits["after"]):
                return
            means = [known(fmean(each["mean"] for each in of) if of else None) for of in bits.values()]
            ends = [min(each["interval"][0] for each in trained), max(each["interval"][1] for each in trained)]
            yield [style, what, *means, interval_text(ends, 2, scale=1),
                   number(max(each["shuffled_95"] for each in trained))]  # fmt: skip


@table("moe_routers", "What | Base | Fresh routers | Mixture | Dense twin | Mixture − twin")
def mixture_twin(result: Result) -> Rows:
    """A mixture of experts and its dense twin."""
    if result["kind"] != "upcycled":
        return

    def compared(key: str) -> list[Mapping[str, Any]]:
        """A number of the base model, then over seeds of the joined experts, of the mixture and of the twin."""
        return [
            lookup(result["base"], key),
            *(lookup(result["over_seeds"][kind], key) for kind in ("joined", "mixture", "twin")),
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
