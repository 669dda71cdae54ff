"""Before and after: the same reading of two models, and the difference with its interval."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.base import Reading
from classifier_emergence.instruments.lens import LensReading
from classifier_emergence.instruments.lens_map import ENTROPY, PROBABILITY, LensMap, colour_name, page_of
from classifier_emergence.instruments.probe import ProbeReading
from classifier_emergence.statistics import bootstrap_mean, newcombe_difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIDENCE, RESAMPLES = 0.95, 2000


@dataclass(frozen=True, eq=False)
class Comparison(Reading):
    """Two readings that differ in the model only."""

    other: str
    """Key of the model after."""
    site: str
    """Where in a block, see ``sites.SITES``."""
    what: tuple[str, ...]
    """What is compared: ``accuracy``, or the mean probability of each target."""
    n: int
    before: NDArray[np.float64]
    """(what, layers)"""
    after: NDArray[np.float64]
    difference: NDArray[np.float64]
    """After less before."""
    interval: NDArray[np.float64] | None
    """(what, layers, 2) of the difference; None where there is one prompt only, which says nothing of others."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a quantity and layer."""
        return [
            {"what": what, "layer": layer, "before": self.before[t, i], "after": self.after[t, i],
             "difference": self.difference[t, i],
             "low": None if self.interval is None else self.interval[t, i, 0],
             "high": None if self.interval is None else self.interval[t, i, 1], "n": self.n}
            for t, what in enumerate(self.what) for i, layer in enumerate(self.layers)
        ]  # fmt: skip

    def plot(self) -> "Figure":
        """The difference over depth with its interval, a panel for each quantity."""
        from classifier_emergence.instruments.drawing import drawable, layer_axis, panels

        figure, axes = panels(len(self.what), 1, (6.4, 0.8 + 2.4 * len(self.what)), sharex=True)
        for t, axis in enumerate(axes):
            x = np.arange(len(self.layers))
            axis.axhline(0, color="0.6", lw=0.7)
            axis.plot(x, self.difference[t], color="0.0")
            if self.interval is not None:
                axis.fill_between(x, *self.interval[t].T, color="0.0", alpha=0.15, lw=0)
            axis.set_ylabel("after − before")
            axis.set_title(drawable(self.what[t]), loc="left", fontsize="medium")
            layer_axis(axis, self.layers)
        axes[-1].set_xlabel(f"layer  ({drawable(self.other)} less {drawable(self.model)}, n = {self.n})")
        return figure


@dataclass(frozen=True, eq=False)
class MapComparison(Reading):
    """Two maps of one text that differ in the model only; of one text there is no interval."""

    other: str
    """Key of the model after."""
    before: LensMap
    after: LensMap

    def difference(self, colour: str = PROBABILITY) -> NDArray[np.float64]:
        """(layers, positions): after less before, of what ``LensMap.shade`` gives."""
        return self.after.shade(colour) - self.before.shade(colour)

    def rows(self) -> list[dict[str, Any]]:
        """One row a position and layer: the top tokens, and what a map can be coloured by, before and after."""
        shades = {
            name: (self.before.shade(name), self.after.shade(name))
            for name in (PROBABILITY, ENTROPY, *self.before.targets)
        }
        return [
            {"position": position, "token": self.before.tokens[position], "layer": layer,
             "top_token_before": self.before.top_tokens[i][j][0], "top_token_after": self.after.top_tokens[i][j][0],
             **{f"{name} {when}": pair[k][i, j] for name, pair in shades.items()
                for k, when in enumerate(("before", "after"))}}
            for j, position in enumerate(self.before.read) for i, layer in enumerate(self.layers)
        ]  # fmt: skip

    def plot(self, colour: str = PROBABILITY) -> "Figure":
        """Before and after with their top tokens, and the difference with its numbers."""
        from classifier_emergence.instruments.drawing import Cells, token_map

        change, what = self.difference(colour), colour_name(colour)
        pair = [
            Cells(title, [[cell[0] for cell in row] for row in seen.top_tokens], seen.shade(colour), what)
            for title, seen in ((self.model, self.before), (self.other, self.after))
        ]
        digits = changes(change, colour)
        title = f"after less before, {'nats' if colour == ENTROPY else 'points'}"
        return token_map([*pair, Cells(title, digits, change, what, signed=True)], *self.before.axes())

    def page(self, **how: Any) -> str:
        """The page of a map, with a choice of before, after and the difference."""
        return page_of([self.before, self.after], **how)


def changes(values: NDArray[np.float64], colour: str) -> list[list[str]]:
    """Differences as text: nats of entropy, else points of probability; a dot below a thousandth of the largest."""
    least = max(float(np.abs(values).max()), 1e-12) / 1000
    scale, form = (1, "+.2f") if colour == ENTROPY else (100, "+.2g")
    return [[format(scale * value, form) if abs(value) >= least else "·" for value in row] for row in values.tolist()]


def compare(before: Reading, after: Reading) -> Comparison | MapComparison:
    """Two readings of the same prompts by ``lens`` (with targets), ``lens_map`` or ``probe``.

    The interval of a lens is the percentile bootstrap over prompts of the paired difference; that of probes is made of
    the Wilson intervals of the two accuracies (Newcombe).

    Raises:
        InputError: They are not of one kind, or differ in anything but the model; names it.

    Example:
        >>> compare(lens(lm, prompts, ["multiply"]), lens(tuned, prompts, ["multiply"])).difference.shape
        (1, 31)
    """
    if isinstance(before, LensReading) and isinstance(after, LensReading):
        return _lenses(before, after)
    if isinstance(before, ProbeReading) and isinstance(after, ProbeReading):
        return _probes(before, after)
    if isinstance(before, LensMap) and isinstance(after, LensMap):
        return _maps(before, after)
    raise InputError("compare: takes two readings of lens, of lens_map or of probe")


def _check_alike(before: Reading, after: Reading, **what: str) -> None:
    """Refuse readings that differ in any of these fields, given with their names in words, or in layers."""
    differing = [name for field, name in what.items() if getattr(before, field) != getattr(after, field)]
    if before.layers != after.layers:
        differing.append(f"layers read ({len(before.layers)} and {len(after.layers)})")
    if differing:
        raise InputError(f"compare: the readings differ in {', '.join(differing)}; take both alike, of one depth")


def _lenses(before: LensReading, after: LensReading) -> Comparison:
    _check_alike(before, after, site="site", prompts="prompts", targets="targets")
    if not before.targets:
        raise InputError("compare: give both readings at least one target")
    n = len(before.prompts)
    paired = after.alignment - before.alignment
    interval = None
    if n > 1:
        ends = bootstrap_mean(paired.reshape(-1, n), confidence=CONFIDENCE, resamples=RESAMPLES, seed=0)
        interval = np.stack(ends, -1).reshape(*paired.shape[:2], 2)
    what = tuple(f"probability of {target}" for target in before.targets)
    means = before.alignment.mean(-1), after.alignment.mean(-1)
    return Comparison(before.model, before.layers, after.model, before.site, what, n, *means, paired.mean(-1), interval)


def _maps(before: LensMap, after: LensMap) -> MapComparison:
    _check_alike(before, after, site="site", tokens="tokens", read="positions", targets="targets")
    return MapComparison(before.model, before.layers, after.model, before, after)


def _probes(before: ProbeReading, after: ProbeReading) -> Comparison:
    _check_alike(
        before, after, site="site", prompts="prompts", classes="classes", n_by_class="class sizes", C="C", folds="folds"
    )
    ends = [
        newcombe_difference(a, a_ends, b, b_ends)
        for a, a_ends, b, b_ends in zip(after.accuracy, after.interval, before.accuracy, before.interval, strict=True)
    ]
    one, other = before.accuracy[None], after.accuracy[None]
    interval = np.array(ends)[None]
    return Comparison(
        before.model, before.layers, after.model, before.site, ("accuracy",), before.n, one, other, other - one,
        interval,
    )  # fmt: skip
