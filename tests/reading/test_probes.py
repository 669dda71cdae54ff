import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from classifier_emergence.errors import InputError
from classifier_emergence.reading import probes
from classifier_emergence.reading.probes import ProbeConvergenceError, fit_probes, shuffled_labels, stratified_folds


def problem(n: int, d: int, k: int, *, scale: float = 1.0, layers: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features with a decaying spectrum, a huge common offset and outlier dimensions, as residual streams have."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % k
    means = torch.randn(layers, k, d, generator=generator, dtype=torch.float64)
    x = means[:, labels] + 2 * torch.randn(layers, n, d, generator=generator, dtype=torch.float64)
    spectrum = torch.logspace(0, -1, d, dtype=torch.float64)
    spectrum[:2] *= 10
    return scale * (x * spectrum + 10), labels


def objective(x: Tensor, y: Tensor, coef: np.ndarray, intercept: np.ndarray, C: float, *, binary: bool) -> float:
    scores = x.numpy() @ coef.T + intercept
    if binary:
        scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
    scores = scores - scores.max(1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    return float(-C * log_p[np.arange(len(y)), y.numpy()].sum() + 0.5 * (coef**2).sum())


CASES = [
    pytest.param(40, 100, 4, 1.0, 1.0, id="more features than rows"),
    pytest.param(80, 10, 4, 1.0, 1.0, id="more rows than features"),
    pytest.param(12, 300, 4, 30.0, 1.0, id="twelve rows of large norm"),
    pytest.param(40, 60, 4, 100.0, 1.0, id="norms of a late layer"),
    pytest.param(60, 50, 5, 1.0, 0.01, id="five classes, strong penalty"),
    pytest.param(60, 50, 2, 1.0, 1.0, id="two classes"),
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # the peer gives up first
@pytest.mark.parametrize(("n", "d", "k", "scale", "C"), CASES)
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_optimum_is_that_of_scikit_learn(n: int, d: int, k: int, scale: float, C: float, shuffled: bool) -> None:
    x, y = problem(n, d, k, scale=scale, layers=1)
    if shuffled:
        y = shuffled_labels(y, 1, seed=3)[0]
    fitted = fit_probes(x, y, C=C)
    for layer in range(len(x)):
        peer = LogisticRegression(C=C, tol=1e-6, max_iter=5_000)
        peer.fit(x[layer].numpy(), y.numpy())
        theirs = objective(x[layer], y, peer.coef_, peer.intercept_, C, binary=k == 2)
        # Not worse than the peer by more than the stated tolerance; on hard problems the peer stops early.
        assert float(fitted.objective[layer]) <= theirs * (1 + 1e-6) + 1e-12
        coef, intercept = fitted.coef[layer].numpy(), fitted.intercept[layer].numpy()
        if k == 2:
            coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
        ours = objective(x[layer], y, coef, intercept, C, binary=k == 2)
        assert ours == pytest.approx(float(fitted.objective[layer]), rel=1e-9)


def test_standardised_fits_take_raw_features_and_match_a_scaler() -> None:
    x, y = problem(80, 30, 4)
    x[..., 5] = 7.0  # a constant feature
    fitted = fit_probes(x, y, standardise=True)
    for layer in range(len(x)):
        scaled = StandardScaler().fit_transform(x[layer].numpy())
        peer = LogisticRegression(tol=1e-7, max_iter=5_000).fit(scaled, y.numpy())
        np.testing.assert_allclose(fitted.predict_proba(x)[layer], peer.predict_proba(scaled), atol=2e-3)
    assert fitted.coef[..., 5].abs().max() < 1e-9


def test_the_gradient_vanishes_at_the_solution() -> None:
    x, y = problem(80, 200, 4)
    fitted = fit_probes(x, y, tol=1e-12)
    residual = fitted.predict_proba(x) - torch.nn.functional.one_hot(y, 4)
    gradient = fitted.coef + residual.mT @ x
    assert gradient.abs().max() < 1e-4 * (x.abs().max() * len(y))
    assert residual.sum(1).abs().max() < 1e-4


def test_together_equals_one_at_a_time() -> None:
    x, y = problem(60, 100, 4)
    sets = torch.cat([y[None], shuffled_labels(y, 4, seed=0)])
    together = fit_probes(x, sets, tol=1e-10)
    for layer in range(len(x)):
        for s, labels in enumerate(sets):
            alone = fit_probes(x[layer : layer + 1], labels, tol=1e-10)
            torch.testing.assert_close(together.objective[layer, s], alone.objective[0], rtol=1e-8, atol=0)
            torch.testing.assert_close(together.coef[layer, s], alone.coef[0], rtol=1e-3, atol=1e-4)


def test_the_exact_finish_agrees_with_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem(24, 60, 4, scale=10)
    sets = torch.cat([y[None], shuffled_labels(y, 3, seed=0)])
    fast = fit_probes(x, sets)
    monkeypatch.setattr(probes, "_PATIENCE", 1)  # everything but the first step is left to factored Hessians
    torch.testing.assert_close(fit_probes(x, sets).objective, fast.objective, rtol=2e-6, atol=0)


def test_names_of_classes_do_not_matter() -> None:
    x, y = problem(60, 40, 4)
    plain, renamed = fit_probes(x, y), fit_probes(x, 10 - 3 * y)
    assert renamed.classes.tolist() == [1, 4, 7, 10]
    assert torch.equal(renamed.predict(x), 10 - 3 * plain.predict(x))
    permutation = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    again = fit_probes(x[:, permutation], y[permutation])
    torch.testing.assert_close(again.objective, plain.objective, rtol=1e-6, atol=0)


def test_a_shuffled_label_probe_sits_at_chance() -> None:
    x, y = problem(240, 50, 4, layers=1)
    train, test = torch.arange(160), torch.arange(160, 240)
    sets = torch.cat([y[None, train], shuffled_labels(y[train], 40, seed=1)])
    correct = (fit_probes(x[:, train], sets).predict(x[:, test]) == y[test]).double().mean(-1)[0]
    assert correct[0] > 0.7
    assert abs(float(correct[1:].mean()) - 0.25) < 0.03


def test_where_features_say_nothing_the_first_class_wins() -> None:
    y = torch.arange(40) % 4
    x = torch.full((1, 40, 6), 3.7)  # the embedding of the same last token on every prompt
    sets = torch.cat([y[None], shuffled_labels(y, 3, seed=0)])
    fitted = fit_probes(x, sets, standardise=True)
    assert fitted.coef.isfinite().all()
    assert (fitted.predict(x) == 0).all()


def test_shuffles_keep_the_counts_and_follow_their_seed() -> None:
    y = torch.arange(20) % 4
    shuffles = shuffled_labels(y, 5, seed=0)
    assert torch.equal(shuffles.sort(-1).values, y.sort().values.expand(5, -1))
    assert torch.equal(shuffles, shuffled_labels(y, 5, seed=0))
    assert not torch.equal(shuffles, shuffled_labels(y, 5, seed=1))


def test_folds_are_those_of_scikit_learn() -> None:
    y = torch.tensor([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4)
    for (train, test), peer in zip(stratified_folds(y, 4), StratifiedKFold(4).split(y, y), strict=True):
        assert train.tolist() == peer[0].tolist()
        assert test.tolist() == peer[1].tolist()
    assert stratified_folds(y, 4)[0][1].tolist() == [0, 4, 8, 12]  # fold k is row k of the table


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.randn(1, 6, 3), torch.tensor([0, 0, 0, 0, 0, 1]), "class 1 has 1 examples"),
        (torch.randn(1, 6, 3), torch.zeros(6), "1 distinct"),
        (torch.randn(1, 6, 3), torch.zeros(5), "for 6 examples in x"),
        (torch.randn(6, 3), torch.zeros(6), "pass (layers, examples, features)"),
        (torch.full((1, 6, 3), torch.nan), torch.tensor([0, 0, 0, 1, 1, 1]), "layer 0 holds NaN or infinity"),
    ],
)
def test_bad_input_is_named(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(InputError) as error:
        fit_probes(x, y)
    assert message in str(error.value)


def test_no_convergence_is_an_error_that_names_the_layer() -> None:
    x, y = problem(60, 100, 4)
    with pytest.raises(ProbeConvergenceError, match="layer 0, label set 0"):
        fit_probes(x, y, max_iterations=1)
