"""Cells that tables share; see also ``classifier_emergence.numbers``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from classifier_emergence.numbers import interval_text, number, percent, small_share
from classifier_emergence.results import lookup

NOTHING = "–"
"""What was not measured."""


def cells(found: Any, template: str) -> list[Any]:
    """Cells from numbers of a result.

    Args:
        found: The result, or a part of it.
        template: Dotted keys between bars (none: ``found`` itself), each with how to show its number after a colon
            (see ``cell``), such as ``"answers.exact:share | kl:2 | seeds"``.
    """
    wanted = (each.strip().partition(":") for each in template.split("|"))
    return [cell(lookup(found, key) if key else found, shown) for key, _, shown in wanted]


def cell(item: Any, shown: str) -> Any:
    """A cell: a number, or a summary of one (see ``value``), as text.

    Args:
        item: Of a list, such as an interval, each end is shown so, in brackets.
        shown: ``percent``, ``share`` (percent with its interval), ``small`` (a share over many orders of magnitude),
            ``yes`` (or no), or how many digits; if empty, the cell is the item itself.
    """
    if isinstance(item, list):
        return f"[{', '.join(cell(end, shown) for end in item)}]"
    if item is None or not shown:
        return item
    match shown:
        case "share":
            return share(item)
        case "percent":
            return percent(value(item))
        case "small":
            return small_share(value(item))
        case "yes":
            return "yes" if item else "no"
        case digits:
            return number(value(item), int(digits))


def value(item: Any) -> Any:
    """A mean over seeds, an accuracy, a mean over prompts, or a mere number."""
    return item[next(key for key in ("value", "accuracy", "mean") if key in item)] if isinstance(item, dict) else item


def share(item: Mapping[str, Any]) -> str:
    """Such a number in percent, with its interval."""
    return f"{percent(value(item))} {interval_text(item['interval'])}"


def known(x: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return NOTHING if x is None else number(x, digits)


def at_layer(result: Mapping[str, Any], values: Sequence[float], row: int, shown: Callable[[float], str]) -> str:
    """A number of a curve over layers, and at which layer it is."""
    return f"{shown(values[row])} at {result['layers'][row]}"


def distinct(texts: Iterable[str]) -> str:
    """Each text once."""
    return ", ".join(dict.fromkeys(texts))


def times_seeds(found: Mapping[str, Any]) -> str:
    """By how many seeds a summary rests on, where they are several."""
    seeds = found.get("seeds", 1)
    return f" × {number(seeds)}" if seeds > 1 else ""
