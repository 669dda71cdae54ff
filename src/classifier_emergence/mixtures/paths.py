"""Paths: the sequence of experts that a token goes to over the layers, against single layers and against the token.

A path may tell what no expert of it tells (Ye, Yuan and Sharkey, 2026, arXiv:2604.17837, hold that paths mean one thing
where experts mean many). There are many more paths than prompts, so mutual information is not counted in a table: it is
what a classifier gains on held-out prompts, and so a lower bound that chance does not raise.
"""

from collections.abc import Mapping, Sequence

import torch
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor

from classifier_emergence.mixtures.routing import Routing
from classifier_emergence.reading.probes import fit_probes, shuffled_labels
from classifier_emergence.tasks.splits import rotations

SCALES = (0.1, 0.3, 1.0)
"""Of features: with C = 1 as good as C = 0.01, 0.09 and 1. With the least one, what says nothing is left alone."""


def path_features(routing: Routing) -> dict[str, Tensor]:
    """What the last token of each of n texts shows: one-hot features, each (alternatives, n, features).

    ``layer``: its first expert, for every layer by itself. ``path``: the first experts of all layers and of every run
    of neighbouring layers, the whole path among them. ``token``: the token. ``both``: token and path. Each in several
    scales, which is to say penalties.
    """
    first = routing.experts[:, routing.last, 0]
    layer = torch.nn.functional.one_hot(first, routing.n_experts).double()
    texts = [" ".join(f"L{i}E{e}" for i, e in enumerate(path)) for path in first.T.tolist()]
    runs = CountVectorizer(lowercase=False, token_pattern=r"\S+", ngram_range=(1, len(first)))
    path = torch.from_numpy(runs.fit_transform(texts).toarray()).double()[None]
    kinds, token = routing.token[routing.last].unique(return_inverse=True)
    shown = torch.nn.functional.one_hot(token, len(kinds)).double()[None]
    found = {"layer": layer, "path": path, "token": shown, "both": torch.cat([shown, path], dim=-1)}
    return {name: torch.cat([x * scale for scale in SCALES]) for name, x in found.items()}


def told_bits(
    features: Mapping[str, Tensor], labels: Tensor, groups: Sequence[object], *, folds: int, shuffles: int, seed: int
) -> dict[str, Tensor]:
    """(1 + shuffles, n) bits that features tell of each held-out example's label: ``log2 p(label | x) / p(label)``.

    p is a softmax regression's (``fit_probes``) on other folds and the share of the label there; the mean over examples
    is at most the mutual information but for the noise of n examples. Of alternatives the one is taken that tells most
    on the fold for validation.

    Args:
        features: As of ``path_features``.
        labels: (n,) integers.
        groups: The group of each example; a group is not fitted and tested in one fold.
        folds: At least 3.
        shuffles: Permutations of the labels that are fitted, in the rows after the first.
        seed: Of folds and permutations.
    """
    bits = {name: torch.zeros(1 + shuffles, len(labels), dtype=torch.float64) for name in features}
    for k, part in enumerate(rotations(groups, folds, seed=seed)):
        train, *others = (torch.from_numpy(rows) for rows in (part.train, part.validation, part.test))
        known = torch.cat([labels[None, train], shuffled_labels(labels[train], shuffles, seed=seed + k)])
        for name, x in features.items():
            probes = fit_probes(x[:, train], known, tol=1e-4)
            at = torch.searchsorted(probes.classes, labels)
            prior = at[train].bincount(minlength=len(probes.classes)) / len(train)
            valid, tested = (
                (probes.predict_proba(x[:, rows]) / prior).log2()[..., torch.arange(len(rows)), at[rows]]
                for rows in others
            )  # each (alternatives, sets, examples)
            best = valid.mean(-1).argmax(0)
            bits[name][:, part.test] = tested[best, torch.arange(len(known))]
    return bits
