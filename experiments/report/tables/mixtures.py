"""Tables of the mixtures of experts; see ``tables``."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from classifier_emergence.numbers import interval_text, number, percent, small_share
from classifier_emergence.results import lookup
from experiments.report.tables.training import FOLDER, Results
from experiments.report.typeset import write_table

SHOWN = 5
"""Experts of a model in the table of tokens, by each of two rules."""
TOKENS = 3


def write(moe: Results) -> None:
    """Write every table."""
    for table in (router_found, router_rows, router_words, expert_losses, routing_use, mixture_twin):
        table(moe)


def projected(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was read of a mixture: as published, or before and after its routers were trained (first seed)."""
    if result["kind"] == "mixture":
        return {"as published": result}
    first = result["mixtures"][0]
    return {"fresh": first["before"], "trained": first["after"]}


def upcycled(moe: Results) -> dict[str, dict[str, Any]]:
    """The results of models that were made into mixtures here."""
    return {model: result for model, result in moe.items() if result["kind"] == "upcycled"}


def expert_name(result: Mapping[str, Any], expert: int) -> str:
    """The domain that an expert was trained on, or its number."""
    names: Sequence[str] = result.get("experts", ())
    return names[expert] if names else str(expert)


def router_rows(moe: Results) -> None:
    """The write-up's table of top tokens, chosen by rule: the largest cosines, and the tokens most alike."""
    columns = ["Model", "Rows", "Layer", "Expert", "Category", "Top tokens (cosine)", "z", "q of z", "Coherence",
               "q of coherence"]  # fmt: skip
    rows = []
    for model, result in moe.items():
        read = list(projected(result).values())[-1]["projection"]
        plain, folded, alike = read["reported"], read["controlled"], read["coherence"]
        for layer, expert in _largest(plain["value"]):
            rows.append(
                [
                    model, "as stored", read["layers"][layer], expert_name(result, expert),
                    plain["category"][layer][expert], _tokens(plain, layer, expert),
                    number(plain["z"][layer][expert], 1), number(plain["q"][layer][expert], 3), "–", "–",
                ]
            )  # fmt: skip
        for layer, expert in _largest(alike["value"]):
            rows.append(
                [
                    model, "gains folded in", read["layers"][layer], expert_name(result, expert), "–",
                    _tokens(folded, layer, expert), number(folded["value"][layer][expert], 1),
                    number(folded["q"][layer][expert], 3), number(alike["value"][layer][expert]),
                    number(alike["q"][layer][expert], 3),
                ]
            )  # fmt: skip
    caption = "Experts with the largest cosines, and those whose top tokens are most alike."
    write_table(FOLDER / "router_rows", columns, rows, caption=caption, tokens=["Top tokens (cosine)"])


def _largest(values: Any) -> list[tuple[int, int]]:
    array = np.asarray(values)
    order = np.argsort(-array, axis=None, kind="stable")[:SHOWN]
    return [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, array.shape), strict=True)]


def _tokens(part: Mapping[str, Any], layer: int, expert: int) -> str:
    pairs = zip(part["top_tokens"][layer][expert], part["top_scores"][layer][expert], strict=True)
    return ", ".join(f"“{token}” {number(score, 3)}" for token, score in list(pairs)[:TOKENS])


def router_found(moe: Results) -> None:
    """What stands out, of fresh and of trained routers, for every seed."""
    columns = ["Model", "Routers", "Seed", "Experts", "Largest cosine", "Random rows, 95 %", "Random rows, largest",
               "Cosine", "z", "Coherence", "Words, smallest q"]  # fmt: skip
    rows = []
    for model, result in moe.items():
        runs = (
            [("as published", "–", result)] if result["kind"] == "mixture" else
            [(name, str(run["seed"]), run[key]) for key, name in (("before", "fresh"), ("after", "trained"))
             for run in result["mixtures"]]
        )  # fmt: skip
        for name, seed, read in runs:
            part = read["projection"]
            cosines = part["reported"]
            rows.append(
                [
                    model, name, seed, number(np.size(cosines["q"])), number(cosines["largest"], 3),
                    number(cosines["null_95"], 3), number(cosines["null_largest"], 3), number(cosines["found"]),
                    number(part["controlled"]["found"]), number(part["coherence"]["found"]),
                    number(min((word["q"] for word in part["words"]), default=None), 3),
                ]
            )  # fmt: skip
    write_table(FOLDER / "router_found", columns, rows, caption="Experts that stand out from random rows.")


def router_words(moe: Results) -> None:
    """Operation and truth words: the expert that fits each best."""
    columns = ["Model", "Word", "Forms", "Layer", "Expert", "Rank", "p", "p, equal frequency", "q"]
    rows = [
        [
            model, word["word"], number(len(word["forms"])), word["layer"], expert_name(result, word["expert"]),
            number(word["rank"]), number(word["p"], 3), number(word["p_equal_frequency"], 3), number(word["q"], 3),
        ]
        for model, result in moe.items()
        for word in list(projected(result).values())[-1]["projection"]["words"]
    ]  # fmt: skip
    caption = "Words looked up for every expert: the expert whose row fits each best."
    write_table(FOLDER / "router_words", columns, rows, caption=caption)


def expert_losses(moe: Results) -> None:
    """Loss of every expert, trained apart, on the held-out texts of every domain."""
    some = upcycled(moe)
    domains = list(next(iter(some.values()))["experts"]) if some else []
    rows = []
    for model, result in some.items():
        rows.append([model, "before training", *(number(result["base"]["losses"][d]["mean"], 3) for d in domains)])
        for name in (*domains, "all"):
            losses = result["branches"][name]["test_losses"]
            rows.append([model, "all (the dense twin)" if name == "all" else name,
                         *(number(losses[d], 3) for d in domains)])  # fmt: skip
    caption = "Mean loss on held-out texts, in nats a token, of MLPs trained apart."
    write_table(FOLDER / "expert_losses", ["Model", "Trained on", *domains], rows, caption=caption)


USED: dict[str, tuple[str, str | None, Callable[[float], str]]] = {
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


def routing_use(moe: Results) -> None:
    """Routing before and after the joint phase: means over layers, and the range over seeds."""
    columns = ["Model", "What", "Fresh routers", "Trained routers", "By chance"]
    rows = []
    for model, result in upcycled(moe).items():
        for what, (key, chance, shown) in USED.items():
            cells = []
            for when in ("before", "after"):
                values = _by_seed(result, when, key)
                cells.append(f"{shown(fmean(values))} [{shown(min(values))}, {shown(max(values))}]")
            rows.append([model, what, *cells, shown(fmean(_by_seed(result, "after", chance))) if chance else "–"])
    caption = "Routing in use: means over layers, ranges over seeds."
    write_table(FOLDER / "routing_use", columns, rows, caption=caption)


def _by_seed(result: Mapping[str, Any], when: str, key: str) -> list[float]:
    """A number of routing in use, or its mean over layers, for every seed."""
    return [float(np.mean(lookup(run[when]["routing"], key))) for run in result["mixtures"]]


def mixture_twin(moe: Results) -> None:
    """The mixture beside its dense twin and the model that both come from."""
    columns = ["Model", "What", "Base", "Fresh routers", "Mixture", "Dense twin", "Mixture − twin"]
    rows = []
    for model, result in upcycled(moe).items():
        for domain in result["experts"]:
            rows.append([model, f"loss on {domain}", *_compared(result, f"losses.{domain}", _loss), "–"])
        rows.append([model, "exact answers", *_compared(result, "answers", _accuracy), "–"])
        for style, gap in result["mixture_minus_twin"].items():
            low, high = gap["interval"]
            text = f"{_signed(gap['mean'])} [{_signed(low)}, {_signed(high)}]"
            aligned, probed = (_compared(result, f"{kind}.{style}.at_depth", shown)
                               for kind, shown in (("lens", _alignment), ("probe", _accuracy)))  # fmt: skip
            rows.append([model, f"alignment, {style} prompts", *aligned, text])
            rows.append([model, f"probe, {style} prompts", *probed, "–"])
    caption = "A mixture of experts and its dense twin."
    write_table(FOLDER / "mixture_twin", columns, rows, caption=caption)


def _compared(result: Mapping[str, Any], key: str, shown: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """A number of the base model, then over seeds of the joined experts, of the mixture and of the twin."""
    base = lookup(result["base"], key)
    base = {**base, "value": base["accuracy"] if "accuracy" in base else base["mean"]}
    return [shown(item) for item in (base, *(result["over_seeds"][kind][key] for kind in KINDS))]


KINDS = ("joined", "mixture", "twin")


def _loss(item: Mapping[str, Any]) -> str:
    return f"{number(item['value'], 3)} {interval_text(item['interval'], 3, scale=1)}"


def _accuracy(item: Mapping[str, Any]) -> str:
    return f"{percent(item['value'])} {interval_text(item['interval'])}"


def _alignment(item: Mapping[str, Any]) -> str:
    return small_share(item["value"])


def _signed(x: float) -> str:
    """A difference of small shares."""
    return small_share(x) if x >= 0 else f"−{small_share(-x)}"
