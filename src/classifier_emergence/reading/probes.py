"""Linear probes: softmax regressions for all layers and many label vectors at once.

Written out for one layer with rows x_i (n of them, d features) and labels y_i in k classes, a probe minimises

    C * sum_i CE(softmax(W x_i + b), y_i) + ||W||^2 / 2,        W: (k, d), b: (k,) not penalised,

the objective of scikit-learn's ``LogisticRegression(C=C)``. How it is minimised, and why it is fast:

* W = sum_i a_i x_i for the centred rows (centring only moves b), so that only their Gram matrix matters. With its
  eigenvectors V and eigenvalues s, and A = V u, the logits are V s u + b: n numbers a class in place of d, from one
  decomposition a layer that is shared by all label vectors.
* Newton's method with a line search; each Newton equation is solved by conjugate gradients, only as exactly as it pays
  (inexact Newton: Nocedal & Wright, Numerical Optimization, 2006, section 7.1). All label vectors and classes stand
  side by side, so that an iteration is two wide matrix products.
* In these coordinates the Hessian with every example's curvature p (1 - p) replaced by its mean is diagonal:
  a preconditioner for nothing, which takes the huge spread of scales in a residual stream out of the problem. It
  also lets the conjugate gradients work in float32; objective, gradient and steps are float64.
* A few layers at a time, so that their matrices stay in the caches, and none waits for a much slower one.
* What has not converged then (it happens where features are far from any scale) is finished with factored Hessians.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from classifier_emergence.errors import InputError

# Numbers in one array of the solver (layers x examples x classes x label vectors) that keep it within the caches.
_BLOCK = 2**16
# Layers that are solved together at most: all of them wait for the slowest.
_LAYERS = 4
# Newton iterations by conjugate gradients before what is left is solved with factored Hessians.
_PATIENCE = 30
# Conjugate gradients stop at this fraction of the first preconditioned residual norm.
_FORCING = 0.3


class ProbeConvergenceError(RuntimeError):
    """A probe did not reach its tolerance; the message names the layer, the label vector and the iterations."""


@dataclass(frozen=True)
class Probes:
    """Fitted probes. All tensors are float64; the axis ``sets`` is there if the labels had it.

    Attributes:
        coef: (layers, [sets,] classes, d), for raw features also where they were standardised in the fit.
        intercept: (layers, [sets,] classes).
        classes: (classes,) the labels that the rows of ``coef`` stand for, ascending.
        objective: (layers, [sets,]) the minimum reached, in standardised features if the fit was.
        iterations: (layers, [sets,]) Newton iterations.
    """

    coef: Tensor
    intercept: Tensor
    classes: Tensor
    objective: Tensor
    iterations: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(layers, [sets,] n, classes) for x (layers, n, d)."""
        if x.ndim != 3 or (len(x), x.shape[-1]) != (len(self.coef), self.coef.shape[-1]):
            wanted = f"({len(self.coef)}, n, {self.coef.shape[-1]})"
            raise InputError(f"x: shape {tuple(x.shape)}, but these probes were fitted on {wanted}; pass those layers")
        rows = self.coef.flatten(1, -2)
        scores: Tensor = (rows @ x.double().mT).unflatten(1, self.coef.shape[1:-1])
        return (scores + self.intercept[..., None]).mT

    def predict_proba(self, x: Tensor) -> Tensor:
        """(layers, [sets,] n, classes) for x (layers, n, d)."""
        return self.logits(x).softmax(-1)

    def predict(self, x: Tensor) -> Tensor:
        """(layers, [sets,] n) labels for x (layers, n, d).

        Logits within 1e-6 tie, and the first class wins: where features say nothing, rounding must not decide.
        """
        return self.classes[(self.logits(x) * 1e6).round().argmax(-1)]


def fit_probes(
    x: Tensor,
    labels: Tensor,
    *,
    C: float = 1.0,
    standardise: bool = False,
    tol: float = 1e-6,
    max_iterations: int = 100,
) -> Probes:
    """Fit a softmax regression for every layer and label vector.

    With two classes this is scikit-learn's binary regression: one weight vector w = W_1 - W_0, penalised by
    ``||w||^2 / 2``.

    Args:
        x: (layers, n, d) features. Time and memory grow with n^2 a layer, so this is for n up to some thousands.
        labels: (n,) or (sets, n) integers; every set holds the same classes.
        C: Inverse strength of the penalty.
        standardise: Divide every feature by its standard deviation over these rows (constant features by 1), so
            that the penalty does not depend on units. The result takes raw features all the same.
        tol: Relative tolerance of the objective: the last Newton step promises to lower it by no more than
            ``tol`` times the objective, and is then taken.
        max_iterations: Of Newton's method.

    Raises:
        InputError: Shapes do not match, x is not finite, or a class has fewer than two examples.
        ProbeConvergenceError: ``tol`` is not reached within ``max_iterations``.
    """
    classes, targets = _check(x, labels, C)
    # One weight vector w in place of the pair -w/2, w/2, whose penalty would be half as large: C twice as small.
    strength, unit = (C / 2, 2.0) if len(classes) == 2 else (C, 1.0)
    size = min(_LAYERS, max(1, _BLOCK // targets.numel()))

    def fit(start: int) -> tuple[Tensor, ...]:
        block = x[start : start + size].double()
        mean = block.mean(1, keepdim=True)
        rows = block - mean
        scale = _scale(rows, mean) if standardise else torch.ones_like(mean)
        if standardise:
            rows /= scale
        dual, bias, objective, iterations = _minimise(rows @ rows.mT, targets, strength, tol, max_iterations, start)
        coef = _times(dual, rows) / scale[:, None]
        bias = bias.squeeze(-1) - (coef @ mean[:, None].mT).squeeze(-1)
        return coef, bias, objective * unit, iterations

    with _one_thread_per_block() as pool:
        parts = [torch.cat(part) for part in zip(*pool.map(fit, range(0, len(x), size)), strict=True)]
    coef, intercept, objective, iterations = parts if labels.ndim == 2 else (part.squeeze(1) for part in parts)
    return Probes(coef, intercept, classes, objective, iterations)


def shuffled_labels(labels: Tensor, n: int, *, seed: int) -> Tensor:
    """(n, examples): ``n`` random permutations of ``labels`` (examples,), the control task of selectivity."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([labels[torch.randperm(len(labels), generator=generator)] for _ in range(n)])


def stratified_folds(labels: Tensor, n_splits: int) -> list[tuple[Tensor, Tensor]]:
    """(train, test) indices of scikit-learn's unshuffled ``StratifiedKFold`` for ``labels`` (n,).

    Raises:
        InputError: A class has fewer examples than there are folds.
    """
    values, counts = labels.unique(return_counts=True)
    if counts.min() < n_splits:
        scarce = f"class {values[counts.argmin()].item()} has {counts.min().item()} examples"
        raise InputError(f"n_splits: {n_splits} folds, but {scarce}; use at most that many folds")
    folds = StratifiedKFold(n_splits).split(labels, labels)
    return [(torch.from_numpy(train), torch.from_numpy(test)) for train, test in folds]


def _check(x: Tensor, labels: Tensor, C: float) -> tuple[Tensor, Tensor]:
    """Classes (k,) and one-hot targets (sets, k, n)."""
    if x.ndim != 3:
        raise InputError(f"x: shape {tuple(x.shape)}; pass (layers, examples, features)")
    if labels.ndim not in (1, 2) or labels.shape[-1] != x.shape[1]:
        raise InputError(f"labels: shape {tuple(labels.shape)} for {x.shape[1]} examples in x; pass (n,) or (sets, n)")
    if not C > 0:
        raise InputError(f"C: {C} is not positive; pass scikit-learn's C, the inverse strength of the penalty")
    finite = x.isfinite().all(-1).all(-1)
    if not finite.all():
        raise InputError(f"x: layer {int(finite.int().argmin())} holds NaN or infinity; leave out those examples")
    classes = labels.unique()
    if len(classes) < 2:
        raise InputError(f"labels: {len(classes)} distinct; a probe needs at least two classes")
    targets = (torch.atleast_2d(labels)[:, None] == classes[:, None]).double()
    counts = targets.sum(-1)
    if counts.min() < 2:
        label_set, c = divmod(int(counts.argmin()), len(classes))
        scarce = f"class {classes[c].item()} has {int(counts.min())} examples in label set {label_set}"
        raise InputError(f"labels: {scarce}; every label set needs at least 2 of every class")
    return classes, targets


def _scale(rows: Tensor, mean: Tensor) -> Tensor:
    """Standard deviations (layers, 1, d) of centred rows, 1 for constants (scikit-learn's bound on rounding)."""
    n, epsilon = rows.shape[1], torch.finfo(rows.dtype).eps
    variance: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True).square() / n
    constant = variance <= n * epsilon * variance + (n * epsilon * mean) ** 2
    scale: Tensor = variance.sqrt().masked_fill(constant, 1.0)
    return scale


@contextmanager
def _one_thread_per_block() -> Iterator[ThreadPoolExecutor]:
    # The matrices of a layer are too small to be worth splitting: threads over layers, and one thread each, it is.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Axes:
    """Principal axes of the rows of every layer, with the intercept for first coordinate.

    The rows are centred, so that the smallest eigenvalue is zero: its place is free.

    Attributes:
        axes: (layers, n, n) ones, and the other eigenvectors V of the Gram matrix.
        weights: (layers, 1, 1, n) 1, and the eigenvalues s, zero where they are rounding.
        squares: (layers, 1, 1, n) n, and s: weights times the squared norms of the axes.
        penalty: (n,) 0, and ones.
    """

    axes: Tensor
    weights: Tensor
    squares: Tensor
    penalty: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> "_Axes":
        n = gram.shape[-1]
        values, axes = torch.linalg.eigh(gram)
        noise = values <= n * torch.finfo(values.dtype).eps * values[:, -1:]
        weights = values.masked_fill(noise, 0.0)[:, None, None]
        squares, penalty = weights.clone(), weights.new_ones(n)
        axes[..., 0], weights[..., 0], squares[..., 0], penalty[0] = 1, 1, n, 0
        return cls(axes, weights, squares, penalty)

    def float(self) -> "_Axes":
        return _Axes(self.axes.float(), self.weights.float(), self.squares.float(), self.penalty.float())

    def logits(self, u: Tensor) -> Tensor:
        return _times(self.weights * u, self.axes.mT)


@dataclass(frozen=True)
class _Point:
    """Where Newton's method stands. Axes are layers, label vectors, classes (or 1), then coordinates or examples."""

    u: Tensor
    logits: Tensor
    log_p: Tensor
    objective: Tensor

    @classmethod
    def at(cls, axes: _Axes, y: Tensor, u: Tensor, logits: Tensor, C: float) -> "_Point":
        log_p = logits.log_softmax(2)
        return cls(u, logits, log_p, _total(axes.penalty * axes.weights * u * u) / 2 - C * _total(y * log_p))


def _total(a: Tensor) -> Tensor:
    return a.sum((2, 3), keepdim=True)


def _times(a: Tensor, matrix: Tensor) -> Tensor:
    """(layers, sets, k, n) times (layers, n, m)."""
    # A few rows times a matrix: several times faster here than a matrix times a few columns.
    product: Tensor = (a.flatten(1, 2) @ matrix).unflatten(1, a.shape[1:3])
    return product


def _minimise(
    gram: Tensor, y: Tensor, C: float, tol: float, max_iterations: int, first_layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton's method for every problem of a block of layers.

    Args:
        gram: (layers, n, n) products of the centred rows.
        y: (sets, k, n) one-hot labels.
        C: Inverse strength of the penalty.
        tol: As in ``fit_probes``.
        max_iterations: As in ``fit_probes``.
        first_layer: Of the block, for error messages.

    Returns:
        A (layers, sets, k, n), b (layers, sets, k, 1), objective and iterations (layers, sets).
    """
    axes = _Axes.of(gram)
    axes32 = axes.float()
    logits = gram.new_zeros(len(gram), *y.shape)
    point = _Point.at(axes, y, logits, logits, C)
    done = torch.zeros_like(point.objective, dtype=torch.bool)
    iterations = torch.zeros_like(done, dtype=torch.int64)
    for _ in range(min(_PATIENCE, max_iterations)):
        iterations += ~done
        p = point.log_p.exp()
        gradient = axes.penalty * point.u + _times(C * (p - y), axes.axes)
        step = _newton_step(axes32, C, p.float(), gradient.float(), ~done).double()
        slope = _total(axes.weights * gradient * step)
        point = _line_search(axes, y, point, step, slope, done, C)
        # The quadratic model promises half the slope; a rising direction (rounding) promises nothing.
        done = done | ((slope <= 0) & (-slope / 2 <= tol * point.objective))
        if done.all():
            break
    dual, bias = _times(point.u[..., 1:], axes.axes[..., 1:].mT), point.u[..., :1].clone()
    objective, iterations = point.objective[..., 0, 0].clone(), iterations[..., 0, 0]
    for layer in (~done).flatten(1).any(1).nonzero().flatten().tolist():
        rest = (~done[layer]).flatten().nonzero().flatten()
        exact = _newton_exact(gram[layer], y[rest], C, tol, max_iterations, first_layer + layer)
        dual[layer, rest], bias[layer, rest], objective[layer, rest] = exact[:3]
        iterations[layer, rest] += exact[3]
    return dual, bias, objective, iterations


def _newton_step(axes: _Axes, C: float, p: Tensor, gradient: Tensor, active: Tensor) -> Tensor:
    """Preconditioned conjugate gradients for the Newton equation of the active problems, all in float32."""
    cp = C * p
    # The mean eigenvalue of C (diag(p) - p p^T), less the one that is always zero.
    curvature = _total(cp * (1 - p)) / (p.shape[3] * (p.shape[2] - 1))
    inverse = 1 / (axes.penalty + curvature * axes.squares).clamp_min(1e-30)
    # Scaled by the roots of the weights, the Hessian is symmetric.
    root = axes.weights.sqrt()
    z = axes.axes * root.squeeze(1)
    r = -root * gradient
    d = inverse * r
    u = torch.zeros_like(r)
    rho = _total(r * d)
    goal = _FORCING**2 * rho
    active = active & (rho > 0)
    for _ in range(r.shape[2] * r.shape[3]):
        t = _times(d, z.mT).mul_(cp)
        t -= p * t.sum(2, keepdim=True)
        h = _times(t, z).addcmul_(axes.penalty, d)
        a = torch.where(active, rho / _total(d * h), 0.0)
        u.addcmul_(a, d)
        r.addcmul_(a, h, value=-1)
        s = inverse * r
        new = _total(r * s)
        active = active & (new > goal)
        if not active.any():
            break
        d.mul_(torch.where(active, new / rho, 0.0)).add_(s)
        rho = new
    return torch.where(root > 0, u / root, 0.0)


def _line_search(axes: _Axes, y: Tensor, point: _Point, step: Tensor, slope: Tensor, done: Tensor, C: float) -> _Point:
    """Halve the step until the objective falls enough (Armijo); problems that are done stay where they are."""
    moved = axes.logits(step)
    t = (~done).to(slope)
    for _ in range(60):
        new = _Point.at(axes, y, point.u + t * step, point.logits + t * moved, C)
        worse = new.objective > point.objective + 1e-4 * t * slope + 1e-12 * point.objective
        if not worse.any():
            break
        t = torch.where(worse, t / 2, t)
    return new


def _newton_exact(
    gram: Tensor, y: Tensor, C: float, tol: float, max_iterations: int, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton's method with factored Hessians, for one layer: time grows with (k n)^3, and no conditioning can hurt.

    For gram (n, n) and y (sets, k, n) gives A (sets, k, n), b (sets, k, 1), objective and iterations (sets,).

    Raises:
        ProbeConvergenceError: ``tol`` is not reached within ``max_iterations``.
    """
    sets, k, n = y.shape
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(0).sqrt().masked_fill(values <= n * torch.finfo(values.dtype).eps * values[-1], 0.0)
    # The rows' coordinates in their principal axes; the last one is the intercept.
    z = torch.cat([vectors * root, vectors.new_ones(n, 1)], dim=1)
    r = z.shape[1]
    penalty = z.new_ones(r)
    penalty[-1] = 0
    outer = (z[:, :, None] * z[:, None, :]).flatten(1)
    # Shifting all intercepts alike changes nothing; the outer product pins that direction.
    intercepts = (1 - penalty).repeat(k)
    fixed = torch.diag(penalty.repeat(k)) + torch.outer(intercepts, intercepts)

    def value(w: Tensor) -> Tensor:
        return (penalty * w * w).sum((1, 2)) / 2 - C * (y * (w @ z.T).log_softmax(1)).sum((1, 2))

    w = z.new_zeros(sets, k, r)
    now, done = value(w), torch.zeros(sets, dtype=torch.bool)
    iterations = torch.zeros(sets, dtype=torch.int64)
    for _ in range(max_iterations):
        iterations += ~done
        p = (w @ z.T).softmax(1)
        gradient = penalty * w + C * (p - y) @ z
        curvature = torch.diag_embed(p.mT) - p.mT[..., :, None] * p.mT[..., None, :]  # (sets, n, k, k)
        hessian = (C * curvature.permute(0, 2, 3, 1) @ outer).view(sets, k, k, r, r).transpose(2, 3)
        step = -torch.linalg.solve(hessian.reshape(sets, k * r, k * r) + fixed, gradient.flatten(1)).view_as(w)
        slope = (gradient * step).sum((1, 2))
        t = (~done).to(w)
        for _ in range(60):
            new = value(w + t[:, None, None] * step)
            worse = new > now + 1e-4 * t * slope + 1e-12 * now
            if not worse.any():
                break
            t = torch.where(worse, t / 2, t)
        w, now, done = w + t[:, None, None] * step, new, done | (-slope / 2 <= tol * now)
        if done.all():
            dual = w[..., :-1] * torch.where(root > 0, 1 / root, 0.0) @ vectors.T
            return dual, w[..., -1:], now, iterations
    raise ProbeConvergenceError(
        f"layer {layer}, label set {int((~done).nonzero()[0])}: no convergence to tol {tol:g} within"
        f" {max_iterations} iterations; standardise the features, lower C or raise max_iterations"
    )
