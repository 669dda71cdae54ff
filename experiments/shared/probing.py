"""Linear probes on held-out groups and as the originals fitted them; what the surface of a prompt gives away."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from classifier_emergence.reading.layers import layer_labels
from classifier_emergence.reading.probes import Probes, fit_probes, shuffled_labels
from classifier_emergence.tasks.splits import rotations
from experiments.params import OtherTasks, Probing
from experiments.shared.summaries import accuracy_curve, share_of

# Relative to the objective. Ten times tighter changes one prediction in a thousand and takes half as long again.
TOLERANCE = 1e-4


def as_reported(x: Tensor, y: Tensor, *, C: float = 1.0) -> Probes:
    """Probes as the originals fitted them: scikit-learn's ``LogisticRegression`` on states as they are, by layer.

    The objective is that of ``fit_probes``, the solver L-BFGS from zero. It stops where no component of the gradient of
    the mean loss exceeds 1e-4, or after 1000 iterations: on states of large norm well above the minimum.

    Args:
        x: (layers, n, d).
        y: (n,) classes.
        C: Inverse strength of the penalty.
    """
    fits = []
    with warnings.catch_warnings(), threadpool_limits(1):  # matrices of a dozen rows: threads only wait for each other
        warnings.simplefilter("ignore", ConvergenceWarning)  # to stop early is what this is about
        for rows in x.double().numpy():
            fits.append(LogisticRegression(C=C, max_iter=1000).fit(rows, y.numpy()))
    coef, intercept = (torch.from_numpy(np.stack([getattr(f, name) for f in fits])) for name in ("coef_", "intercept_"))
    penalty = coef.square().sum((1, 2)) / 2
    if coef.shape[1] == 1:  # of two classes scikit-learn has the difference
        coef, intercept = (torch.cat([-part, part], 1) / 2 for part in (coef, intercept))
    iterations = torch.tensor([int(f.n_iter_[0]) for f in fits])
    probes = Probes(coef, intercept, torch.from_numpy(fits[0].classes_), penalty, iterations)
    own = torch.searchsorted(probes.classes, y)
    loss = -probes.logits(x).log_softmax(-1)[:, torch.arange(len(y)), own].sum(-1)
    return replace(probes, objective=penalty + C * loss)


@dataclass(frozen=True)
class HeldOutProbes:
    """Whether probes are right on groups that they were not fitted on; row 0 of the label sets is the true one."""

    correct: Tensor
    """(layers, 1 + shuffles, n): at every layer."""
    selected: Tensor
    """(1 + shuffles, n): at the layer that each rotation chose."""
    layers: list[str]
    """That layer, by rotation."""

    def curve(self, confidence: float, clusters: Sequence[object] | None = None) -> dict[str, Any]:
        """Accuracy at every layer, and the largest one over layers that shuffled labels reach.

        ``clusters`` (n,) of prompts are what intervals resample: that by which prompts are held out.
        """
        peaks = self.correct[:, 1:].double().mean(-1).amax(0)
        return {
            **accuracy_curve(self.correct[:, 0], confidence, clusters=_labels(clusters)),
            "shuffled_peak_accuracy_95": torch.quantile(peaks, 0.95),
        }

    def with_selectivity(
        self, confidence: float, dtype: torch.dtype = torch.float64, clusters: Sequence[object] | None = None
    ) -> dict[str, Any]:
        """The curve with its chance level and, at the chosen layers, accuracy and selectivity.

        Shuffled accuracies are averaged in ``dtype``.
        """
        score = share_of(self.selected[0], confidence, clusters=_labels(clusters))
        shuffled = self.selected[1:].to(dtype).mean(-1).mean()
        return {
            **self.curve(confidence, clusters),
            "shuffled_accuracy": self.correct[:, 1:].double().mean((1, 2)),
            "selected": {
                "layers": self.layers,
                **score,
                "shuffled_accuracy": shuffled,
                "selectivity": score["accuracy"] - shuffled,
            },
        }


def _labels(clusters: Sequence[object] | None) -> list[str] | None:
    return clusters if clusters is None else [str(label) for label in clusters]


def held_out_probes(
    states: Tensor, y: Tensor, groups: Sequence[object], settings: Probing | OtherTasks, *, seed: int
) -> HeldOutProbes:
    """Standardised probes on held-out groups, rotated so that every prompt is tested once.

    Each rotation chooses its layer on its validation groups. Shuffled labels are permuted on the training part and
    judged on the true test labels.

    Args:
        states: (layers, n, d).
        y: (n,) classes.
        groups: The group of each prompt.
        settings: C, folds and shuffles.
        seed: Of the folds and the shuffles.
    """
    correct = torch.zeros(len(states), 1 + settings.shuffles, len(y), dtype=torch.bool)
    selected, layers = torch.zeros_like(correct[0]), []
    for k, (fit, validation, test) in enumerate(_parts(groups, settings.folds, seed)):
        label_sets = torch.cat([y[None, fit], shuffled_labels(y[fit], settings.shuffles, seed=seed + k)])
        probes = fit_probes(states[:, fit], label_sets, C=settings.C, standardise=True, tol=TOLERANCE)
        valid = (probes.predict(states[:, validation])[:, 0] == y[validation]).double().mean(-1)
        best = int(valid.argmax())
        correct[:, :, test] = probes.predict(states[:, test]) == y[test]
        selected[:, test] = correct[best][:, test]
        layers.append(layer_labels(len(states) - 1)[best])
    return HeldOutProbes(correct, selected, layers)


def bag_of_tokens(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    y: Tensor,
    groups: Sequence[object],
    settings: Probing | OtherTasks,
    *,
    seed: int,
) -> Tensor:
    """(n,) whether a probe on token counts is right on the same held-out groups: what the surface alone gives away."""
    counter = CountVectorizer(analyzer=lambda text: tokenizer(text)["input_ids"])
    counts = torch.from_numpy(counter.fit_transform(texts).toarray())[None].float()
    correct = torch.zeros(len(y), dtype=torch.bool)
    for fit, _, test in _parts(groups, settings.folds, seed):
        correct[test] = fit_probes(counts[:, fit], y[fit], C=settings.C).predict(counts[:, test])[0] == y[test]
    return correct


def _parts(groups: Sequence[object], folds: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for split in rotations(groups, folds, seed=seed):
        fit, validation, test = (torch.from_numpy(part) for part in (split.train, split.validation, split.test))
        yield fit, validation, test
