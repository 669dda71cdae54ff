"""The probe on anyone's prompts: at which layers does a linear probe tell the classes apart, and can that be known?"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.base import (
    Reading,
    check_list,
    class_names,
    feed_prompts,
    one_position,
    pick_rows,
)
from classifier_emergence.instruments.kept_probe import Card, KeptProbe, check_new
from classifier_emergence.progress import progress
from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Fed, Position, read_states
from classifier_emergence.reading.probes import Probes, fit_probes, stratified_folds
from classifier_emergence.statistics import Proportion, permutation_p

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDS = 5
SHUFFLES = 40
TOLERANCE = 1e-4  # relative to a probe's objective, as in the paper's stage


@dataclass(frozen=True)
class Peak:
    """The layer that classifies best, from L0 on, against the best layer of permuted labels."""

    layer: str
    """The first such layer."""
    accuracy: float
    interval: tuple[float, float]
    null_95: float
    """95 % quantile of the best accuracy over layers under permuted labels: what chance gives to a maximum."""
    p: float
    """Permutation p-value of that maximum."""
    least_p: float
    """The p-value that a perfect accuracy would have; above ``1 - confidence`` the examples are too few to tell."""


@dataclass(frozen=True)
class Prediction:
    """What the probes, fitted on all examples, say of one new prompt."""

    prompt: str
    label: str
    """Of the peak layer's probe."""
    probability: float
    by_layer: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ProbeReading(Reading):
    """Cross-validated accuracy of linear probes at every layer."""

    site: str
    """Where in a block, see ``sites.SITES``."""
    prompts: tuple[str, ...]
    classes: tuple[str, ...]
    n: int
    n_by_class: tuple[int, ...]
    folds: int
    C: float
    shuffles: int
    seed: int
    confidence: float
    accuracy: NDArray[np.float64]
    """(layers,)"""
    interval: NDArray[np.float64]
    """(layers, 2) Wilson intervals; examples count as independent."""
    null_mean: NDArray[np.float64]
    """(layers,) mean accuracy under permuted labels."""
    null_95: NDArray[np.float64]
    """(layers,) its 95 % quantile."""
    peak: Peak
    verdict: str
    predictions: tuple[Prediction, ...]
    fed: tuple[Fed, ...]
    """What the model was fed for each prompt, and where it was read."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer."""
        return [
            {"layer": layer, "accuracy": a, "low": low, "high": high, "n": self.n, "null_mean": m, "null_95": q}
            for layer, a, (low, high), m, q in zip(
                self.layers, self.accuracy, self.interval, self.null_mean, self.null_95, strict=True
            )
        ]

    def plot(self) -> "Figure":
        """Accuracy over depth with its interval, beside permuted labels."""
        from classifier_emergence.instruments.drawing import drawable, one_panel

        figure, axis = one_panel(f"linear probes, n = {self.n}", self.layers)
        x = np.arange(len(self.layers))
        low, high = self.interval.T
        axis.plot(x, self.accuracy, color="0.0", label="held-out accuracy")
        axis.fill_between(x, low, high, color="0.0", alpha=0.15, lw=0)
        axis.plot(x, self.null_95, color="0.5", ls=":", label="permuted labels, 95 %")
        axis.plot(x, self.null_mean, color="0.5", ls="-", lw=0.7, label="permuted labels, mean")
        axis.set_ylim(-0.03, 1.05)
        axis.set_ylabel("accuracy")
        axis.legend(frameon=False)
        axis.set_title(drawable(self.model), loc="left", fontsize="medium")
        return figure


def probe(
    lm: LanguageModel,
    prompts: Sequence[str],
    labels: Sequence[Any],
    *,
    test: Sequence[str] = (),
    groups: Sequence[Hashable] | None = None,
    C: float = 1.0,
    shuffles: int = SHUFFLES,
    seed: int = 0,
    confidence: float = 0.95,
    position: Position = "last",
    chat: bool = False,
    system: str | None = None,
    site: str = "resid",
    output: str | Path | None = None,
    write: Callable[[ProbeReading], object] | None = None,
) -> ProbeReading:
    """At which layers does a linear probe tell the classes apart?

    Softmax regression on standardised states (see ``probes``), stratified cross-validation with as many folds as the
    smallest class has examples, at most five. The null permutes labels within folds, refits everything and takes the
    best layer again.

    Args:
        lm: Any causal language model.
        prompts: Examples.
        labels: The class of each.
        test: New prompts, to be classified by probes that were fitted on all examples.
        groups: What must not be in training and test at once (operands, templates); default every prompt for itself.
        C: Inverse strength of the L2 penalty, as scikit-learn's.
        shuffles: Label permutations.
        seed: Of the permutations.
        confidence: Of intervals, and of the verdict.
        position: Which token of every prompt is read, see ``positions.feed``.
        chat: Pass each prompt through the model's own chat template.
        system: What the system says in the chat.
        site: ``resid``, the state after each block; or inside of it, see ``sites.SITES``.
        output: New folder for the probe of the best layer, fitted on all examples; see ``kept_probe.KeptProbe``.
        write: Writes the result, before the probe: where the folder is, what this wrote is, too.

    Raises:
        InputError: A prompt cannot be read, a class has one example or one group, or there is only one class.
    """
    if output is not None:
        check_new(Path(output))
    check_list(prompts, "prompts")
    check_list(test, "test prompts")
    fed = feed_prompts(lm, [*prompts, *test], one_position(position), chat=chat, system=system)
    classes, y = encode_labels(prompts, labels)
    if shuffles < 1:
        raise InputError(f"shuffles: {shuffles} permutations are no null; pass at least 20")
    folds = folds_of(y, classes, groups, limit=FOLDS)
    rows = pick_rows(lm, None, site)
    states = read_states(lm, fed, rows=rows, site=site, description=f"{lm.key}: residual streams")
    x, new = states[:, : len(prompts)], states[:, len(prompts) :]

    sets = torch.cat([y[None], _permuted(y, folds, groups, shuffles, seed)])
    correct = torch.zeros(len(x), len(sets), len(y), dtype=torch.bool)
    with progress(f"{lm.key}: probes, {len(folds)} folds", total=len(folds)) as advance:
        for train, held_out in folds:
            probes = fit(x[:, train], sets[:, train], C=C)
            correct[:, :, held_out] = probes.predict(x[:, held_out]) == sets[:, held_out]
            advance(1)
    scores = correct.double().mean(-1).numpy()
    every = np.ones(len(y), dtype=bool)
    curve = [Proportion.of(row, every, confidence=confidence) for row in correct[:, 0].numpy()]
    first = rows.index(layer_row(0))
    best = first + int(scores[first:, 0].argmax())
    null = scores[first:, 1:].max(0)
    p, least_p = permutation_p([scores[best, 0], 1.0], null).tolist()
    row_labels = tuple(lm.layers[row] for row in rows)
    peak = Peak(
        layer=row_labels[best],
        accuracy=curve[best].accuracy,
        interval=curve[best].interval,
        null_95=float(np.quantile(null, 0.95)),
        p=p,
        least_p=least_p,
    )
    fitted = fit(x, y, C=C) if test or output is not None else None
    reading = ProbeReading(
        model=lm.key,
        layers=row_labels,
        site=site,
        prompts=tuple(prompts),
        classes=classes,
        n=len(y),
        n_by_class=tuple(torch.bincount(y).tolist()),
        folds=len(folds),
        C=C,
        shuffles=shuffles,
        seed=seed,
        confidence=confidence,
        accuracy=scores[:, 0],
        interval=np.array([item.interval for item in curve]),
        null_mean=scores[:, 1:].mean(1),
        null_95=np.quantile(scores[:, 1:], 0.95, axis=1),
        peak=peak,
        verdict=_verdict(peak, len(y), confidence),
        predictions=_predict(fitted, new, test, classes, best) if fitted is not None and test else (),
        fed=tuple(fed),
    )
    if write is not None:
        write(reading)
    if fitted is not None and output is not None:
        best_probe = KeptProbe(
            fitted.coef[best].float(),
            fitted.intercept[best].float(),
            Card(lm.key, peak.layer, site, classes, position, chat, system, len(y), peak.accuracy, peak.interval,
                 peak.null_95, peak.p),
        )  # fmt: skip
        best_probe.save(output)
    return reading


def _verdict(peak: Peak, n: int, confidence: float) -> str:
    if peak.least_p > 1 - confidence:
        return (
            f"too few examples to tell: with {n} even a perfect score would have p = {peak.least_p:.2g} against "
            "permuted labels; give more prompts of each class"
        )
    if peak.p > 1 - confidence:
        return f"not told apart: the best layer is no better than that of permuted labels (p = {peak.p:.2g}, n = {n})"
    return f"told apart: the best layer is better than that of permuted labels (p = {peak.p:.2g}, n = {n})"


def _predict(
    probes: Probes, x: Tensor, prompts: Sequence[str], classes: tuple[str, ...], best: int
) -> tuple[Prediction, ...]:
    probability = probes.predict_proba(x)
    choice = probes.predict(x)
    return tuple(
        Prediction(
            prompt=prompt,
            label=classes[int(choice[best, i])],
            probability=float(probability[best, i, int(choice[best, i])]),
            by_layer=tuple(classes[int(c)] for c in choice[:, i]),
        )
        for i, prompt in enumerate(prompts)
    )


def fit(x: Tensor, y: Tensor, *, C: float) -> Probes:
    """Standardised probes for x (layers, n, d) and y (n,) or (sets, n), also with one example of a class."""
    scarce = min(int(row.unique(return_counts=True)[1].min()) for row in torch.atleast_2d(y))
    if scarce > 1:
        return fit_probes(x, y, C=C, standardise=True, tol=TOLERANCE)
    # The solver asks for two of each. Every example twice at half the weight is the same objective.
    return fit_probes(torch.cat([x, x], 1), torch.cat([y, y], -1), C=C / 2, standardise=True, tol=TOLERANCE)


def encode_labels(prompts: Sequence[object], labels: Sequence[Any]) -> tuple[tuple[str, ...], Tensor]:
    """Classes in order of first appearance, and the class number of each example; ``1`` and ``True`` are named so.

    Raises:
        InputError: Prompts and labels differ in number, a label is empty or neither text nor a number, or there are
            fewer than two classes.
    """
    labels = class_names(labels)
    if len(prompts) != len(labels):
        raise InputError(f"labels: {len(labels)} for {len(prompts)} prompts; give each prompt one")
    classes = tuple(dict.fromkeys(labels))
    if len(classes) < 2:
        raise InputError(f"labels: {len(classes)} class; a probe needs at least two")
    return classes, torch.tensor([classes.index(label) for label in labels])


def folds_of(
    y: Tensor, classes: Sequence[str], groups: Sequence[Hashable] | None, *, limit: int
) -> list[tuple[Tensor, Tensor]]:
    """Stratified (train, test) indices; no group in both; as many folds as the scarcest class allows, up to ``limit``.

    Raises:
        InputError: A class has one example or one group.
    """
    if groups is not None and len(groups) != len(y):
        raise InputError(f"groups: {len(groups)} for {len(y)} prompts; give each prompt one")
    group_of = list(range(len(y))) if groups is None else list(groups)
    counts = [len({group_of[i] for i in (y == c).nonzero()[:, 0].tolist()}) for c in range(len(classes))]
    names = {group: i for i, group in enumerate(dict.fromkeys(group_of))}
    if min(counts) < 2:
        what = "example" if len(names) == len(y) else "group of examples"
        scarce = classes[int(np.argmin(counts))]
        raise InputError(f"class {scarce!r}: one {what}; give at least two, so that one can be held out")
    n = min(limit, *counts)
    if len(names) == len(y):
        return stratified_folds(y, n)
    numbers = [names[group] for group in group_of]
    parts = StratifiedGroupKFold(n).split(np.zeros(len(y)), y.numpy(), numbers)
    folds = [(torch.from_numpy(train), torch.from_numpy(test)) for train, test in parts]
    if any(len(test) == 0 or len(y[train].unique()) < len(counts) for train, test in folds):
        raise InputError("groups: no split leaves every class something to train on; give more groups of each class")
    return folds


def _permuted(
    y: Tensor, folds: list[tuple[Tensor, Tensor]], groups: Sequence[Hashable] | None, n: int, seed: int
) -> Tensor:
    """(n, examples): labels permuted within folds, which keeps these stratified.

    What is permuted is a group's label where all of a group share it (and only among groups of equal size), for then
    its examples are no independent evidence; else the examples'.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(range(len(y)) if groups is None else groups):
        members.setdefault(group, []).append(i)
    shared = all(len(set(y[ids].tolist())) == 1 for ids in members.values())
    units = [torch.tensor(ids) for ids in members.values()] if shared else [torch.tensor([i]) for i in range(len(y))]
    fold = torch.empty(len(y), dtype=torch.int64)
    for k, (_, test) in enumerate(folds):
        fold[test] = k
    blocks: dict[tuple[int, int], list[Tensor]] = {}
    for unit in units:
        blocks.setdefault((int(fold[unit[0]]), len(unit)), []).append(unit)
    random = np.random.default_rng(seed)
    sets = y.repeat(n, 1)
    for block in blocks.values():
        where = torch.stack(block)  # (units, size)
        values = y[where[:, 0]]
        for row in sets:
            row[where] = values[torch.from_numpy(random.permutation(len(block)))][:, None].expand_as(where)
    return sets
