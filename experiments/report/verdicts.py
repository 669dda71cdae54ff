"""The rule of the ledger: numbers become states, and the states of a claim's primary test its headline.

The methods section of the paper says it in words. A state depends on where an interval lies and not on where in it the
number is, so what moves within its uncertainty changes no verdict.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

from scipy.special import stdtr

from classifier_emergence.statistics import holm, student_interval

State = Literal["met", "violated", "open", "descriptive", "void"]
Headline = Literal[
    "untested", "reported protocol only", "contradicted", "supported", "mixed by model", "inconclusive"
]  # fmt: skip
FEWEST_MODELS = 5
"""Below it a trend across models is open whatever they show."""
_SLACK = 1e-6  # an end that is stored with ten digits lies on a bound that is computed with sixteen


@dataclass(frozen=True)
class Number:
    """What was measured on one model."""

    value: float
    interval: tuple[float, float] | None = None
    """Over examples; of several seeds the union of theirs, so that what it clears every seed clears by itself."""
    by_seed: tuple[float, ...] = ()
    n: int | None = None
    one_seed: bool = False
    """Of a training that was run once: no interval of it knows what another seed gives."""

    def shown(self, confidence: float) -> tuple[float, float] | None:
        """The interval, and where there is none Student's over seeds that differ."""
        if self.interval or len({*self.by_seed}) < 2:
            return self.interval
        return student_interval(self.by_seed, confidence=confidence)

    def over_seeds(self, confidence: float) -> tuple[float, float] | None:
        """Student's over seeds, in which a repetition on the same prompts lies; of one seed that over examples."""
        return replace(self, interval=None).shown(confidence) or self.interval

    def moved(self, by: float) -> "Number":
        """The same a little elsewhere, as a repetition might find it."""
        interval = self.interval and (self.interval[0] + by, self.interval[1] + by)
        return replace(self, value=self.value + by, interval=interval, by_seed=tuple(x + by for x in self.by_seed))


@dataclass(frozen=True)
class Bounds:
    """What a claim says of a number."""

    low: float = -math.inf
    high: float = math.inf

    def hold(self, value: float) -> bool:
        """Whether a value lies within."""
        return self.low <= value <= self.high


def decide(number: Number, bounds: Bounds, confidence: float) -> tuple[State, float]:
    """State of a number by itself, and the p-value of that: above 1 - ``confidence`` the state is open.

    Met if the interval lies within the bounds, violated if outside, else open. p is two-sided, of the hypothesis that
    the number lies on the bound.
    """
    if number.one_seed or not number.shown(confidence):
        return "descriptive", 1.0
    inside = max(_p(number, bounds.low, 1, confidence), _p(number, bounds.high, -1, confidence))
    outside = min(_p(number, bounds.low, -1, confidence), _p(number, bounds.high, 1, confidence))
    if not significant(min(inside, outside), confidence):
        return "open", min(inside, outside)
    return ("met", inside) if inside < outside else ("violated", outside)


def significant(p: float, confidence: float) -> bool:
    """Whether an adjusted p-value decides."""
    return p <= (1 - confidence) * (1 + _SLACK)


def corrected(decided: Sequence[tuple[State, float]], confidence: float) -> list[State]:
    """The states of a claim's controlled tests after Holm's correction: what does not survive it is open."""
    voting = [i for i, (state, _) in enumerate(decided) if state in ("met", "violated", "open")]
    adjusted = dict(zip(voting, holm([decided[i][1] for i in voting]), strict=True))
    return [
        "open" if i in adjusted and not significant(adjusted[i], confidence) else state
        for i, (state, _) in enumerate(decided)
    ]


def headline(primary: Mapping[str, State], reported: Sequence[State], *, away: bool = False) -> Headline:
    """The headline of a claim: the first that applies.

    Args:
        primary: State of the primary test on every model.
        reported: States of the tests under the reported protocol, all models.
        away: The models that the claim speaks of are not at hand.
    """
    states = {*primary.values()}
    if away or not states:
        return "untested"
    if states == {"violated"}:
        return "reported protocol only" if {*reported} == {"met"} else "contradicted"
    if states == {"met"}:
        return "supported"
    return "mixed by model" if states >= {"met", "violated"} else "inconclusive"


def tally(states: Sequence[State]) -> dict[str, int]:
    """How many there are of each state."""
    counts = Counter(states)
    return {state: counts[state] for state in ("met", "violated", "open", "descriptive", "void") if counts[state]}


def _p(number: Number, bound: float, side: int, confidence: float) -> float:
    """How unlikely a number is that is not above (side 1) or below (side -1) a bound."""
    if number.interval:
        return _interval_p(number.interval, bound, side, confidence)
    n, mean = len(number.by_seed), math.fsum(number.by_seed) / len(number.by_seed)
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in number.by_seed) / (n - 1) / n)
    return min(1.0, 2 * float(stdtr(n - 1, -side * (mean - bound) / error)))


def _interval_p(interval: tuple[float, float], bound: float, side: int, confidence: float) -> float:
    low, high = interval
    near, far = (low, high) if side > 0 else (high, low)
    if side * (near - bound) < -_SLACK * (high - low):
        return 1.0
    if low == high:
        return 0.0
    # An interval grows with the normal quantile z; with an end at 0 or 1 (Wilson's of none or all of n) with z squared.
    ratio = (low + high - 2 * bound) * side / (high - low)
    if far in (0.0, 1.0):
        ratio = math.sqrt((far - bound) / (far - near))
    return math.erfc(NormalDist().inv_cdf((1 + confidence) / 2) * ratio / math.sqrt(2))
