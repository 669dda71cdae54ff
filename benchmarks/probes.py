"""Probes for all layers together against a scikit-learn loop over layers, folds and label vectors.

``python -m benchmarks.probes data/residuals/smollm2-135m-instruct.safetensors`` takes 400 of the word prompts, five
folds, standardised features, and prints the ratios with and without label shuffles. The peer is timed on one shuffle
and multiplied: it needs minutes for twenty.
"""

import argparse
import time

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from classifier_emergence.params import load_params
from classifier_emergence.probes import fit_probes, shuffled_labels, stratified_folds
from classifier_emergence.tasks import OPERATIONS, prompt_bank

N, FOLDS, SHUFFLES = 400, 5, 20


def peer(x: torch.Tensor, y: torch.Tensor, folds: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, np.ndarray]:
    """Seconds and objectives (layers, folds) of scikit-learn's lbfgs."""
    started, objectives = time.perf_counter(), np.zeros((len(x), len(folds)))
    for layer, features in enumerate(x.double().numpy()):
        for f, (train, _) in enumerate(folds):
            rows, labels = StandardScaler().fit_transform(features[train]), y[train].numpy()
            model = LogisticRegression(C=1.0, max_iter=100_000).fit(rows, labels)
            log_p = model.predict_log_proba(rows)[np.arange(len(labels)), labels]
            objectives[layer, f] = -log_p.sum() + (model.coef_**2).sum() / 2
    return time.perf_counter() - started, objectives


def ours(
    x: torch.Tensor, sets: torch.Tensor, folds: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[float, np.ndarray]:
    """Seconds and objectives of the first label set (layers, folds)."""
    started = time.perf_counter()
    fitted = [fit_probes(x[:, train], sets[:, train], standardise=True).objective[:, 0] for train, _ in folds]
    return time.perf_counter() - started, torch.stack(fitted, dim=-1).numpy()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("residuals", help="file of the residuals stage")
    x = load_file(parser.parse_args().residuals)["bank/word"][:, :N]
    labels = [OPERATIONS.index(prompt.operation) for prompt in prompt_bank("word", load_params().bank)]
    y = torch.tensor(labels[:N])
    folds, shuffles = stratified_folds(y, FOLDS), shuffled_labels(y, SHUFFLES, seed=0)

    real_peer, objectives_peer = peer(x, y, folds)
    shuffle_peer, _ = peer(x, shuffles[0], folds)
    real, objectives = min((ours(x, y[None], folds) for _ in range(3)), key=lambda pair: pair[0])
    every, _ = ours(x, torch.cat([y[None], shuffles]), folds)
    gap = float((objectives / objectives_peer - 1).max())
    assert gap < 1e-6, f"objective above the peer's by {gap:.1e}"

    every_peer = real_peer + SHUFFLES * shuffle_peer
    print(f"{len(x)} layers x {FOLDS} folds, {N} prompts, d = {x.shape[-1]}; objective at most {gap:+.1e} above")
    print(f"real labels       scikit-learn {real_peer:7.2f} s   together {real:6.2f} s   ratio {real_peer / real:6.1f}")
    print(
        f"with {SHUFFLES} shuffles  scikit-learn {every_peer:7.2f} s   together {every:6.2f} s   ratio {every_peer / every:6.1f}"
    )


if __name__ == "__main__":
    main()
