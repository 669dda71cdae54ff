"""Do two results agree? Numbers within a tolerance that their kind sets, everything else exactly.

Byte equality across CPUs and thread counts does not exist (reduction order), and one tolerance for everything
is either blind or noisy. ``RULES`` is the table of kinds. The kind of a value is that of the nearest name on
its path that a rule matches, list indices left out: ``accuracy.L3`` and ``accuracy`` are both accuracies.
What is called ``interval``, ``std`` or ``by_...`` takes the kind of what stands beside it. A deviation is
allowed up to the larger of the absolute and the relative tolerance. What no rule matches: floats within 1e-6
or 0.1 %, all other values exactly.

Keys and lengths of lists are exact. Types are strict: 1, 1.0 and true differ from each other. NaN and
infinity always differ, also from themselves.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classifier_emergence.results import read_result


@dataclass(frozen=True)
class Rule:
    """A kind of quantity and how far two values of it may lie apart.

    Attributes:
        kind: Its name, for messages.
        pattern: Regular expression that is searched for in a key.
        absolute: Allowed absolute deviation; infinity allows any value of the same type.
        relative: Allowed deviation as a fraction of the expected value.
        flips: Examples that may flip; for a count this replaces ``absolute``, for a float ``flips / n`` does
            if there is an ``n``.
        types: Types of the values that follow the rule.
    """

    kind: str
    pattern: str
    absolute: float = 0.0
    relative: float = 0.0
    flips: int = 0
    types: tuple[type, ...] = (float,)


RULES: tuple[Rule, ...] = (
    # Integers that are settings or sizes, also where they stand under a rank or an accuracy.
    Rule("exact", r"(^|_)(n|k|seed|layer|id|index|size|step)s?$|^n_", types=(int,)),
    # Near ties change order across CPUs. A LoRA rank is a setting.
    Rule("rank", r"(?<!lora_)rank", absolute=2.0, relative=0.02, types=(int, float)),
    # float32 attention and softmax drift by 1e-5 to 1e-3 between instruction sets.
    Rule("log-probability", r"^log_|^logits?$|^logp|log_gap$", absolute=1e-3),
    # A count over a null, so it moves in steps.
    Rule("p-value", r"(^|_)p(_value)?$", absolute=0.01, relative=0.05),
    # Drift adds up over training steps.
    Rule("loss", r"loss|^kl", absolute=1e-4, relative=0.01),
    # float32 dot products.
    Rule("cosine", r"cosine", absolute=1e-4),
    # Two examples at the boundary flip; n is that of the nearest object around the value that has one.
    Rule("accuracy", r"accuracy|chance|selectivity|correct", absolute=0.02, flips=2, types=(int, float)),
    # Exponentials of logits.
    Rule("probability", r"probabilit|align|^probs?$|^strict$", absolute=1e-5, relative=0.02),
)
"""In order of precedence. A caller that lets more vary puts its own in front: ``[Rule("choice", "^layer$",
absolute=math.inf, types=(int, str)), *RULES]`` lets a selected layer flip."""

STRUCTURE = ("missing", "new", "length")
"""Reasons of a ``Difference`` that are no other number."""

_OTHER = Rule("other", "", absolute=1e-6, relative=1e-3)
_EXACT = Rule("exact", "")
_BESIDE = re.compile(r"interval$|std$|by_")
# Values are stored with ten digits, so 2 / n itself arrives with an error; "just two flips" must still pass.
_SLACK = 1e-6


@dataclass(frozen=True)
class Difference:
    """Two values at one place.

    Attributes:
        path: Dotted key, as ``results.lookup`` takes it.
        expected: The value on the left, None if there is none.
        actual: The value on the right, None if there is none.
        reason: The kind of the number, or what is wrong: ``missing``, ``new``, ``type``, ``length``,
            ``exact``, ``not finite``, ``apart``.
        tolerance: Allowed absolute deviation.
        used: Deviation as a fraction of the tolerance: above 1 is a difference, infinite if none is allowed.
    """

    path: str
    expected: Any
    actual: Any
    reason: str
    tolerance: float = 0.0
    used: float = math.inf

    def __str__(self) -> str:
        """``$.probe.accuracy: 0.98 != 0.9 (tolerance 0.01, accuracy)``."""
        allowed = f"tolerance {self.tolerance:.3g}, " if 0 < self.tolerance < math.inf else ""
        left = "nothing" if self.reason == "new" else _shown(self.expected)
        right = "nothing" if self.reason == "missing" else _shown(self.actual)
        return f"$.{self.path}: {left} != {right} ({allowed}{self.reason})"


@dataclass(frozen=True)
class Comparison:
    """A result file against another version of itself.

    Attributes:
        values: Number of values compared.
        differences: What differs by more than its tolerance.
        worst: Largest deviation as a fraction of its tolerance; infinite where an exact value differs.
        worst_path: Where that is; empty if all values are equal.
    """

    values: int
    differences: tuple[Difference, ...]
    worst: float
    worst_path: str


def differences(expected: Any, actual: Any, *, rules: Sequence[Rule] = RULES) -> list[Difference]:
    """What differs between two JSON trees by more than the tolerance of its kind; empty if they agree."""
    return [pair for pair in _walk(expected, actual, rules) if pair.used > 1]


def compare_files(expected: Path, actual: Path, *, rules: Sequence[Rule] = RULES) -> Comparison:
    """Compare two result files, for instance the committed and the regenerated one.

    Raises:
        InputError: A file is missing or is not a result.
    """
    pairs = list(_walk(read_result(expected), read_result(actual), rules))
    worst = max((pair for pair in pairs if pair.used), key=lambda pair: pair.used, default=None)
    found = tuple(pair for pair in pairs if pair.used > 1)
    return Comparison(len(pairs), found, worst.used if worst else 0.0, worst.path if worst else "")


def apart_over_seeds(expected: Any, actual: Any) -> tuple[list[Difference], int]:
    """Intervals over several seeds (``interval`` beside a ``by_seed`` of two or more) that do not overlap.

    Returns:
        Those, and how many were compared.
    """
    left, right = dict(_over_seeds(expected)), dict(_over_seeds(actual))
    shared = [Difference(path, left[path], right[path], "apart") for path in left if path in right]
    apart = [d for d in shared if d.expected[1] < d.actual[0] or d.actual[1] < d.expected[0]]
    return apart, len(shared)


def _over_seeds(tree: Any, prefix: str = "") -> Iterator[tuple[str, list[float]]]:
    if isinstance(tree, dict) and "interval" in tree and len(tree.get("by_seed", ())) > 1:
        yield f"{prefix}interval", tree["interval"]
    for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _over_seeds(item, f"{prefix}{key}.")


def _walk(
    expected: Any, actual: Any, rules: Sequence[Rule], path: str = "", names: tuple[str, ...] = (), n: int = 0
) -> Iterator[Difference]:
    """One item a leaf, equal ones too; ``names`` are those that may tell its kind, nearest first."""
    prefix = f"{path}." if path else ""
    if isinstance(expected, dict) and isinstance(actual, dict):
        size = expected.get("n")
        n = size if type(size) is int and size > 0 else n
        for key in sorted({*expected, *actual}):
            if key in expected and key in actual:
                beside = sorted(expected) if _BESIDE.match(key) else []
                yield from _walk(expected[key], actual[key], rules, f"{prefix}{key}", (key, *beside, *names), n)
            else:
                reason = "missing" if key in expected else "new"
                yield Difference(f"{prefix}{key}", expected.get(key), actual.get(key), reason)
    elif isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            yield Difference(path, len(expected), len(actual), "length")
            return
        for i, pair in enumerate(zip(expected, actual, strict=True)):
            yield from _walk(*pair, rules, f"{prefix}{i}", names, n)
    elif type(expected) is not type(actual):
        yield Difference(path, expected, actual, "type")
    else:
        yield _leaf(expected, actual, path, _rule(names, type(expected), rules), n)


def _leaf(expected: Any, actual: Any, path: str, rule: Rule, n: int) -> Difference:
    if isinstance(expected, float) and not (math.isfinite(expected) and math.isfinite(actual)):
        return Difference(path, expected, actual, "not finite")
    tolerance = rule.absolute
    if rule.flips and (n or type(expected) is int):
        tolerance = rule.flips if type(expected) is int else rule.flips / n
    if rule.relative:
        tolerance = max(tolerance, rule.relative * abs(expected))
    if expected == actual or tolerance == math.inf:
        return Difference(path, expected, actual, rule.kind, tolerance, 0.0)
    used = abs(expected - actual) / tolerance if tolerance else math.inf
    return Difference(path, expected, actual, rule.kind, tolerance, 1.0 if 1 < used <= 1 + _SLACK else used)


def _rule(names: Sequence[str], kind: type, rules: Sequence[Rule]) -> Rule:
    found = (rule for name in names for rule in rules if kind in rule.types and re.search(rule.pattern, name))
    return next(found, _OTHER if kind is float else _EXACT)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
