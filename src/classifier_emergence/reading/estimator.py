"""Probes as a scikit-learn-style estimator on arrays of states: for whoever has states already."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from classifier_emergence.errors import InputError
from classifier_emergence.reading.probes import Probes, fit_probes


class LayerProbes(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A softmax regression for every layer of (layers, n, d) states; see ``probes``.

    Parameters follow scikit-learn: plain values in the constructor, what is learnt ends in ``_``.

    Attributes:
        C: Inverse strength of the L2 penalty.
        standardise: Divide every feature by its standard deviation over the training rows.
        classes_: (classes,) labels, sorted.
        probes_: The fitted ``Probes``, whose ``coef`` is (layers, classes, d).
    """

    classes_: NDArray[Any]
    probes_: Probes

    def __init__(self, C: float = 1.0, standardise: bool = True) -> None:
        self.C = C
        self.standardise = standardise

    def fit(self, x: ArrayLike, y: Sequence[Any] | ArrayLike) -> "LayerProbes":
        """Fit to states (layers, n, d) and labels (n,) of any sortable kind.

        Raises:
            InputError: See ``probes.fit_probes``.
        """
        self.classes_, numbers = np.unique(np.asarray(y), return_inverse=True)
        self.probes_ = fit_probes(_states(x), torch.from_numpy(numbers), C=self.C, standardise=self.standardise)
        return self

    def predict(self, x: ArrayLike) -> NDArray[Any]:
        """(layers, n) labels."""
        check_is_fitted(self)
        return np.asarray(self.classes_[self.probes_.predict(_states(x)).numpy()])

    def predict_proba(self, x: ArrayLike) -> NDArray[np.float64]:
        """(layers, n, classes) probabilities, in the order of ``classes_``."""
        check_is_fitted(self)
        return np.asarray(self.probes_.predict_proba(_states(x)).numpy())

    def score(self, x: ArrayLike, y: Sequence[Any] | ArrayLike) -> NDArray[np.float64]:
        """(layers,) accuracies."""
        return np.asarray((self.predict(x) == np.asarray(y)).mean(-1), dtype=np.float64)


def _states(x: ArrayLike) -> torch.Tensor:
    states = x if isinstance(x, torch.Tensor) else torch.from_numpy(np.asarray(x, dtype=np.float64))
    if states.ndim != 3:
        raise InputError(f"x: shape {tuple(states.shape)}; pass (layers, examples, features)")
    return states.detach().float() if states.dtype in (torch.float16, torch.bfloat16) else states.detach()
