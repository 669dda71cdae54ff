"""Cells that tables share; see also ``classifier_emergence.numbers``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from classifier_emergence.numbers import interval_text, number, percent, small_share

NOTHING = "–"
"""What was not measured."""


def value(item: Any) -> Any:
    """A mean over seeds, an accuracy, a mean over prompts, or a mere number."""
    return item[next(key for key in ("value", "accuracy", "mean") if key in item)] if isinstance(item, dict) else item


def known(x: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return NOTHING if x is None else number(x, digits)


def share(item: Mapping[str, Any]) -> str:
    """Such a number in percent, with its interval."""
    return f"{percent(value(item))} {interval_text(item['interval'])}"


def at_layer(result: Mapping[str, Any], values: Sequence[float], row: int, shown: Callable[[float], str]) -> str:
    """A number of a curve over layers, and at which layer it is."""
    return f"{shown(values[row])} at {result['layers'][row]}"


def decimals(interval: Sequence[float], digits: int = 3, shown: Callable[..., str] = number) -> str:
    """An interval of numbers that are no shares."""
    return f"[{', '.join(shown(end, digits) for end in interval)}]"


def small_interval(interval: Sequence[float]) -> str:
    """An interval of shares over many orders of magnitude."""
    return f"[{', '.join(map(small_share, interval))}]"


def yes(condition: bool) -> str:
    """Yes or no."""
    return "yes" if condition else "no"


def distinct(texts: Iterable[str]) -> str:
    """Each text once."""
    return ", ".join(dict.fromkeys(texts))


def times_seeds(found: Mapping[str, Any]) -> str:
    """By how many seeds a summary rests on, where they are several."""
    seeds = found.get("seeds", 1)
    return f" × {number(seeds)}" if seeds > 1 else ""
