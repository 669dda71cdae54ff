"""Do two results agree? Numbers within a tolerance that their kind sets, everything else exactly.

Byte equality across CPUs and thread counts does not exist (reduction order), and one tolerance for everything is either
blind or noisy. ``RULES`` is the table of kinds. The kind of a value is that of the nearest name on its path that a rule
matches, list indices left out: ``accuracy.L3`` and ``accuracy`` are both accuracies. What is called ``interval``,
``std`` or ``by_...`` takes the kind of what stands beside it. A deviation is allowed up to the larger of the absolute
and the relative tolerance. What no rule matches: floats within 1e-6 or 0.1 %, all other values exactly.
Lists of top tokens may differ in their order and in a fifth. Keys and lengths of lists are exact. Types are strict: 1,
1.0 and true differ. NaN and infinity differ, also from themselves. Where a solver stopped before it had converged
(``STOPPED``), rounding decides where, and only types and lengths are compared.

The ledger of claims is compared by what it says: headlines are the same, and what was met is not violated or the other
way round. Its numbers stand in the results that they come from, and a state that opens is no contradiction. Neither is
a headline that becomes inconclusive, or is no longer so, where the ledger says of it that other seeds might do that.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classifier_emergence.results import read_result

STEADY = 0.98
"""Share of repetitions within intervals over seeds from which on a headline must come out the same."""


@dataclass(frozen=True)
class Rule:
    """A kind of quantity and how far two values of it may lie apart."""

    kind: str  # its name, for messages
    pattern: str  # regular expression that is searched for in a key
    absolute: float = 0.0  # allowed deviation; infinity allows any value of the same type
    relative: float = 0.0  # allowed deviation as a fraction of the expected value
    flips: int = 0  # examples that may flip: in place of ``absolute`` for a count; flips / n for a float, if there is n
    types: tuple[type, ...] = (float,)  # of the values that follow the rule


RULES: tuple[Rule, ...] = (
    # Integers that are settings or sizes, also where they stand under a rank or an accuracy.
    Rule("exact", r"(^|_)(n|k|seed|layer|id|index|size|step)s?$|^n_", types=(int,)),
    # Near ties change order across CPUs. A LoRA rank is a setting.
    Rule("rank", r"(?<!lora_)rank", absolute=2.0, relative=0.02, types=(int, float)),
    # Written greedily: a near tie turns a word, and with it what follows. Whether a reply is right is exact.
    Rule("text", r"^reply$", absolute=math.inf, types=(str,)),
    # float32 attention and softmax drift by 1e-5 to 1e-3 between instruction sets.
    Rule("log-probability", r"^log_|^logits?$|^logp|log_gap$", absolute=1e-3),
    Rule("p-value", r"(^|_)p(_value)?$", absolute=0.01, relative=0.05),  # a count over a null, so it moves in steps
    Rule("loss", r"loss|^kl", absolute=1e-4, relative=0.01),  # drift adds up over training steps
    Rule("cosine", r"cosine", absolute=1e-4),  # float32 dot products
    # Two examples at the boundary flip; n is that of the nearest object around the value that has one.
    Rule(
        "accuracy",
        r"accuracy|chance|selectivity|correct|minus_(bag|lens|converged)",
        absolute=0.02,
        flips=2,
        types=(int, float),
    ),
    Rule(
        "probability", r"probabilit|align|^probs?$|^strict$|confidence|^excess$", absolute=1e-5, relative=0.02
    ),  # exponentials of logits
)
"""In order of precedence. A caller that lets more vary puts its own in front: ``[Rule("choice", "^layer$",
absolute=math.inf, types=(int, str)), *RULES]`` lets a selected layer flip."""

STRUCTURE = ("missing", "new", "length")
"""Reasons of a ``Difference`` that are no other number."""
STOPPED = re.compile(
    r"^(reported\.\w+\.(iterations|excess)"
    r"|directions\.reported\.(score|rank|rank_from_bottom|top_tokens|bottom_tokens))(\.|$)"
)
"""Paths of what the originals' instrument leaves unconverged, scikit-learn's probes on unscaled states: where it stops,
how far from the minimum, and its direction. The claims that rest on it are compared by their states, as all are."""
_OTHER = Rule("other", "", absolute=1e-6, relative=1e-3)
_EXACT = Rule("exact", "")
_TOKENS = re.compile(r"(top|bottom)_tokens$")
_BESIDE = re.compile(r"interval$|std$|by_")
_SLACK = 1e-6  # values are stored with ten digits: 2 / n itself arrives with an error, and "just two flips" must pass


@dataclass(frozen=True)
class Difference:
    """Two values at one place."""

    path: str  # dotted key, as ``results.lookup`` takes it
    expected: Any  # the value on the left, None if there is none
    actual: Any  # the value on the right, None if there is none
    reason: str  # kind of the number, or what is wrong: missing, new, type, length, exact, not finite, apart
    tolerance: float = 0.0  # allowed absolute deviation
    used: float = math.inf  # deviation as a fraction of it: above 1 is a difference, infinite if none is allowed

    def __str__(self) -> str:
        """``$.probe.accuracy: 0.98 != 0.9 (tolerance 0.01, accuracy)``."""
        allowed = f"tolerance {self.tolerance:.3g}, " if 0 < self.tolerance < math.inf else ""
        left = "nothing" if self.reason == "new" else _shown(self.expected)
        right = "nothing" if self.reason == "missing" else _shown(self.actual)
        return f"$.{self.path}: {left} != {right} ({allowed}{self.reason})"


@dataclass(frozen=True)
class Comparison:
    """A result file against another version of itself."""

    values: int  # how many were compared
    differences: list[Difference]  # what differs by more than its tolerance
    worst: float  # largest deviation as a fraction of its tolerance; infinite where an exact value differs
    worst_path: str  # where that is; empty if all values are equal


def differences(expected: Any, actual: Any, *, rules: Sequence[Rule] = RULES) -> list[Difference]:
    """What differs between two JSON trees by more than the tolerance of its kind; empty if they agree."""
    return [pair for pair in _walk(expected, actual, rules) if pair.used > 1]


def compare_files(expected: Path, actual: Path) -> Comparison:
    """Compare two result files, for instance the committed and the regenerated one.

    Raises:
        InputError: A file is missing or is not a result.
    """
    left, right = read_result(expected), read_result(actual)
    ledger = all(isinstance(claim, dict) and "headline" in claim for claim in left.values())
    pairs = list(_claims(left, right) if ledger else _walk(left, right, RULES))
    worst = max(pairs, key=lambda pair: pair.used, default=Difference("", None, None, "", used=0.0))
    found = [pair for pair in pairs if pair.used > 1]
    return Comparison(len(pairs), found, worst.used, worst.path if worst.used else "")


def apart_over_seeds(expected: Any, actual: Any) -> tuple[list[Difference], int]:
    """Intervals over seeds (beside a ``by_seed`` of two or more) that do not overlap, and how many were compared."""
    left, right = dict(_over_seeds(expected)), dict(_over_seeds(actual))
    shared = [Difference(path, left[path], right[path], "apart") for path in left if path in right]
    apart = [d for d in shared if d.expected[1] < d.actual[0] or d.actual[1] < d.expected[0]]
    return apart, len(shared)


def _over_seeds(tree: Any, prefix: str = "") -> Iterator[tuple[str, list[float]]]:
    if isinstance(tree, dict) and "interval" in tree and len(tree.get("by_seed", ())) > 1:
        yield f"{prefix}interval", tree["interval"]
    for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _over_seeds(item, f"{prefix}{key}.")


def _claims(expected: dict[str, Any], actual: dict[str, Any]) -> Iterator[Difference]:
    """One item a headline and a state."""
    left, right = _said(expected), _said(actual)
    unsteady = {key for claims in (expected, actual) for key, claim in claims.items() if claim["steady"] < STEADY}
    for path in sorted({*left, *right}):
        one, other = left.get(path), right.get(path)
        if path.endswith(".headline"):
            opened = path.removesuffix(".headline") in unsteady and "inconclusive" in (one, other)
            contrary = one != other and (None in (one, other) or not opened)
        else:
            contrary = {one, other} in ({"met", "violated"}, {one, None})
        reason = "missing" if other is None else "new" if one is None else "verdict"
        yield Difference(path, one, other, reason, used=math.inf if contrary else 0.0)


def _said(claims: dict[str, Any]) -> dict[str, str]:
    said = {f"{key}.headline": claim["headline"] for key, claim in claims.items()}
    return said | {
        f"{key}.{piece['protocol']}.{piece['what']}.{piece['model']}": piece["state"]
        for key, claim in claims.items() for piece in claim["evidence"]
    }  # fmt: skip


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
        tokens = names and _TOKENS.search(names[0]) and not STOPPED.match(path)
        if tokens and all(isinstance(item, str) for item in (*expected, *actual)):
            # Near ties change places, and with what comes next: as many tokens as a fifth may be others.
            others, allowed = (Counter(expected) - Counter(actual)).total(), max(1, len(expected) // 5)
            yield Difference(path, expected, actual, "tokens", allowed, others / allowed)
            return
        for i, pair in enumerate(zip(expected, actual, strict=True)):
            yield from _walk(*pair, rules, f"{prefix}{i}", names, n)
    elif type(expected) is not type(actual):
        yield Difference(path, expected, actual, "type")
    elif STOPPED.match(path):
        yield Difference(path, expected, actual, "stopped", math.inf, 0.0)
    else:
        fitting = (
            rule for name in names for rule in rules if type(expected) in rule.types and re.search(rule.pattern, name)
        )
        yield _leaf(expected, actual, path, next(fitting, _OTHER if type(expected) is float else _EXACT), n)


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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
