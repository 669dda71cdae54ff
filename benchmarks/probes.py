"""Probes for all layers together against a scikit-learn loop over layers, folds and label vectors.

``python -m benchmarks.probes data/residuals/smollm2-135m-instruct.safetensors`` takes 400 of the word prompts and five
folds, and prints the ratios with and without label shuffles. The peer is timed on one shuffle of one fold and
multiplied: it needs many minutes for twenty. Its default tolerance leaves its objective above the minimum.
"""

import argparse
import sys
import time
import warnings

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from classifier_emergence.reading.probes import fit_probes, shuffled_labels, stratified_folds
from classifier_emergence.tasks.arithmetic import OPERATIONS, prompt_bank
from experiments.params import load_params

N, FOLDS, SHUFFLES = 400, 5, 20
Folds = list[tuple[Tensor, Tensor]]


def peer(x: Tensor, y: Tensor, folds: Folds, *, standardise: bool) -> tuple[float, np.ndarray]:
    """Seconds and objectives (layers, folds) of scikit-learn's lbfgs at its default tolerance."""
    started, objectives = time.perf_counter(), np.zeros((len(x), len(folds)))
    for layer, features in enumerate(x.double().numpy()):
        for f, (train, _) in enumerate(folds):
            rows, labels = features[train], y[train].numpy()
            rows = StandardScaler().fit_transform(rows) if standardise else rows
            model = LogisticRegression(C=1.0, max_iter=100_000).fit(rows, labels)
            log_p = model.predict_log_proba(rows)[np.arange(len(labels)), labels]
            objectives[layer, f] = -log_p.sum() + (model.coef_**2).sum() / 2
    return time.perf_counter() - started, objectives


def ours(x: Tensor, sets: Tensor, folds: Folds, *, standardise: bool) -> tuple[float, np.ndarray]:
    """Seconds and objectives of the first label set (layers, folds)."""
    started = time.perf_counter()
    fits = (fit_probes(x[:, train], sets[:, train], standardise=standardise) for train, _ in folds)
    objectives = torch.stack([fitted.objective[:, 0] for fitted in fits], dim=-1).numpy()
    return time.perf_counter() - started, objectives


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")  # lbfgs gives up on some of the unscaled problems; that shows in the objective
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("residuals", help="file of the residuals stage")
    parser.add_argument("--folds", type=int, default=5, help="how many of the five folds to time; default: %(default)s")
    arguments = parser.parse_args()
    x = load_file(arguments.residuals)["bank/word"][:, :N]
    y = torch.tensor([OPERATIONS.index(prompt.operation) for prompt in prompt_bank("word", load_params().bank)][:N])
    folds, shuffles = stratified_folds(y, FOLDS)[: arguments.folds], shuffled_labels(y, SHUFFLES, seed=0)
    print(f"{len(x)} layers x {len(folds)} folds, {N} prompts, d = {x.shape[-1]}; seconds")
    for standardise in (False, True):
        real, objectives = ours(x, y[None], folds, standardise=standardise)
        every, _ = ours(x, torch.cat([y[None], shuffles]), folds, standardise=standardise)
        real_peer, objectives_peer = peer(x, y, folds, standardise=standardise)
        shuffle_peer, _ = peer(x, shuffles[0], folds[:1], standardise=standardise)
        every_peer = real_peer + SHUFFLES * len(folds) * shuffle_peer
        gap = objectives / objectives_peer - 1
        print("standardised features" if standardise else "unscaled features")
        print(f"  objective against the peer's: {gap.min():+.1e} to {gap.max():+.1e}")
        for name, theirs, own in (("real labels", real_peer, real), (f"and {SHUFFLES} shuffles", every_peer, every)):
            print(f"  {name:16}  scikit-learn {theirs:8.2f}  together {own:6.2f}  ratio {theirs / own:6.1f}")
        if gap.max() > 1e-6:
            sys.exit("an objective lies above the peer's by more than the stated tolerance")


if __name__ == "__main__":
    main()
