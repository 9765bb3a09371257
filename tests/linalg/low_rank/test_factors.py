"""Low-rank factors: never worse than spectral, and as good as slow references in tiny cases."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from riemann_unn.linalg import (
    ACTIVATIONS,
    activation_kernel,
    balanced,
    calibrated_factors,
    fold_kernel,
    function_error,
    function_factors,
    spectral_factors,
    unfold_kernel,
    whitened_factors,
)
from riemann_unn.linalg.low_rank.data import data_error, output_space
from tests.support import gaussian, generator, rounding


def he(m: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return gaussian(m, n, dtype=dtype, seed=seed) * (2 / n) ** 0.5


def error(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The oracle: the objective over both factors, straight from the definition."""
    v = a @ b
    own = activation_kernel(w, w).sum()
    return (own - 2 * activation_kernel(w, v).sum() + activation_kernel(v, v).sum()) / own


def descend(w: Tensor, a: Tensor, b: Tensor, iterations: int = 400) -> float:
    """L-BFGS over both factors at once until it converges."""
    x = [t.contiguous().clone().requires_grad_() for t in (a, b)]
    optimizer = torch.optim.LBFGS(
        x,
        max_iter=iterations,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = error(w, *x)
        value.backward()
        return value

    optimizer.step(closure)
    return float(error(w, *x).detach())


def shapes(count: int, most: int, seed: int) -> list[tuple[int, int, int]]:
    source = generator(seed)
    drawn = torch.rand(count, 3, generator=source).tolist()
    sizes = [(2 + int(a * (most - 1)), 2 + int(b * (most - 1)), c) for a, b, c in drawn]
    return [(m, n, 1 + int(c * (min(m, n) - 1))) for m, n, c in sizes]


@pytest.mark.parametrize("iterations", [0, None])
def test_never_worse_than_spectral(iterations):
    gains = []
    for seed, (m, n, r) in enumerate(shapes(100, 48, seed=1)):
        w = he(m, n, seed=seed)
        base, found = (
            spectral_factors(w, rank=r),
            function_factors(w, rank=r, iterations=iterations),
        )
        before, after = (float(error(w, f.A, f.B)) for f in (base, found))
        assert after <= before + rounding(torch.float64, n)
        assert function_error(w, found.A @ found.B) == pytest.approx(after, abs=1e-12)
        gains.append(before - after)
    assert max(gains) > 0.02


def test_nearly_all_that_can_be_gained():
    for seed, (m, n, r) in enumerate([(64, 64, 1), (64, 64, 4), (96, 32, 3), (32, 96, 8)]):
        w = he(m, n, seed=seed)
        base, found = spectral_factors(w, rank=r), function_factors(w, rank=r)
        start, got = float(error(w, base.A, base.B)), float(error(w, found.A, found.B))
        best = descend(w, base.A, base.B)
        assert start - got >= 0.95 * (start - best)


def test_eight_percent_at_rank_one():
    w = he(512, 512, dtype=torch.float32)
    base, found = spectral_factors(w, rank=1), function_factors(w, rank=1, iterations=0)
    before, after = (function_error(w, f.A @ f.B) for f in (base, found))
    assert after <= 0.92 * before


def global_optimum(w: Tensor, rank: int, starts: int = 16, steps: int = 300) -> Tensor:
    """The slow reference for matrices (k, m, n): Adam over both factors from many starts."""
    source = generator(5)
    x = []
    for shape in ((w.shape[-2], rank), (rank, w.shape[-1])):
        start = torch.randn(starts, len(w), *shape, dtype=w.dtype, generator=source)
        x.append(start.requires_grad_())
    own = activation_kernel(w, w).sum(-1)

    def relative() -> Tensor:
        v = x[0] @ x[1]
        cross = activation_kernel(w.expand_as(v), v).sum(-1)
        return (own - 2 * cross + activation_kernel(v, v).sum(-1)) / own

    optimizer = torch.optim.Adam(x, lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        relative().sum().backward()
        optimizer.step()
        schedule.step()
    return relative().detach().min(0).values


def test_within_a_percent_of_the_global_optimum():
    near = spectral_near = reached = cases = 0
    for m, n, r in [(6, 6, 2), (6, 6, 1), (4, 6, 2), (12, 5, 2), (3, 3, 1)]:
        w = gaussian(20, m, n, seed=m + r)
        best = global_optimum(w, r)
        for matrix, optimum in zip(w, best.tolist(), strict=True):
            base, found = spectral_factors(matrix, rank=r), function_factors(matrix, rank=r)
            got = float(error(matrix, found.A, found.B))
            near += got <= 1.01 * optimum
            spectral_near += float(error(matrix, base.A, base.B)) <= 1.01 * optimum
            reached += optimum <= 1.005 * got
            cases += 1
    assert cases == 100
    assert reached >= 95  # or it is no reference
    assert near >= 95, near
    assert spectral_near < 50  # the control


@pytest.mark.parametrize("name", ["leaky_relu", "tanh", "gelu", "relu"])
@pytest.mark.parametrize("biased", [False, True])
def test_other_activations_and_biases(name, biased):
    w = he(40, 24, seed=4) * 1.5
    bias = 0.5 * gaussian(40, seed=5) if biased else None
    x = gaussian(40_000, 24, seed=6)
    base = spectral_factors(w, rank=3, bias=bias)
    f = ACTIVATIONS[name]

    def sampled(a: Tensor, b: Tensor, gamma: Tensor | None) -> float:
        out = f(torch.nn.functional.linear(x @ b.mH, a, gamma))
        target = f(torch.nn.functional.linear(x, w, bias))
        return float((out - target).square().sum() / target.square().sum())

    errors = [sampled(*base)]
    for iterations, fit_bias in [(0, False), (None, False), (None, True)]:
        found = function_factors(
            w, rank=3, activation=name, bias=bias, fit_bias=fit_bias, iterations=iterations
        )
        errors.append(sampled(*found))
        exact = function_error(
            w, found.A @ found.B, activation=name, w_bias=bias, v_bias=found.bias
        )
        assert exact == pytest.approx(errors[-1], abs=0.01)
    assert errors[1] < errors[0] - 0.005
    assert errors[2] <= errors[1] + 1e-3
    assert errors[3] <= errors[2] + 1e-3
    if biased:
        assert errors[3] < errors[2] - 0.01


class Largest(TorchDispatchMode):
    """The size of the largest tensor made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        self.size = max([self.size, *(t.numel() for t in made if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize(
    ("name", "biased", "iterations"),
    [("relu", False, None), ("relu", True, 0), ("gelu", False, 0), ("gelu", True, 0)],
)
def test_nothing_larger_than_the_layer_is_formed(name, biased, iterations):
    w, bias = he(256, 256), gaussian(256, seed=1) if biased else None
    with Largest() as seen:
        function_factors(w, rank=4, activation=name, bias=bias, iterations=iterations)
    assert seen.size == w.numel()
    with Largest() as seen:  # the control: the mode sees what is made in between
        w.flatten()[:, None] * w[0, :2]
    assert seen.size == 2 * w.numel()


def test_lengths_are_the_minimum():
    """No other length of any row gives a smaller error: the closed form against a grid."""
    w = he(12, 8, seed=7)
    found = function_factors(w, rank=2, iterations=0)
    best = error(w, found.A, found.B)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert error(w, factor * found.A, found.B) > best


def test_full_rank_reproduces():
    for dtype in (torch.float32, torch.float64):
        w = he(9, 14, seed=8, dtype=dtype)
        for found in (spectral_factors(w, rank=9), function_factors(w, rank=9)):
            limit = rounding(dtype, 14) * float(w.norm())
            assert float((found.A @ found.B - w).norm()) <= limit


def test_degenerate_weights():
    w = he(6, 5, seed=9)
    w[2] = 0
    w[3] = w[4]
    for weight in (w, torch.zeros(6, 5, dtype=torch.float64), w[:1].expand(6, 5).clone()):
        found = function_factors(weight, rank=2)
        assert torch.isfinite(found.A).all() and torch.isfinite(found.B).all()
        assert function_error(weight, found.A @ found.B) <= 1


def correlated(samples: int, n: int, *, seed: int) -> Tensor:
    scale = torch.logspace(0, -3, n, dtype=torch.float64)
    turn = torch.linalg.qr(gaussian(n, n, seed=seed))[0]
    return 2 + gaussian(samples, n, seed=seed + 1) * scale @ turn


@pytest.mark.parametrize("shape", [(10, 16), (16, 10), (12, 12)])
@pytest.mark.parametrize("biased", [True, False])
def test_whitened_against_the_textbook(shape, biased):
    w, x = gaussian(*shape, seed=10), correlated(400, shape[1], seed=11)
    bias = gaussian(shape[0], seed=13) if biased else None
    found = whitened_factors(w, rank=3, inputs=x, bias=bias)
    centred = x - x.mean(0) if biased else x
    root = torch.linalg.cholesky(centred.mH @ centred / len(x))
    u, s, vh = torch.linalg.svd(w @ root)
    want = (u[:, :3] * s[:3]) @ vh[:3] @ torch.linalg.inv(root)
    weighted = torch.linalg.matrix_norm((found.A @ found.B - want) @ root)
    assert float(weighted) <= 1e-4 * float(s[0])
    if bias is not None and found.bias is not None:
        mean = (x @ w.mH + bias - x @ (found.A @ found.B).mH - found.bias).mean(0)
        assert float(mean.abs().max()) <= 1e-12 * float(x.abs().max() * w.norm())


def test_degenerate_inputs():
    w = gaussian(8, 6, seed=14)
    x = gaussian(100, 2, seed=15) @ gaussian(2, 6, seed=16)
    assert output_space(w, inputs=x, centred=False).directions == 2
    for inputs in (x, torch.ones(3, 6, dtype=torch.float64), torch.zeros(1, 6).double()):
        found = whitened_factors(w, rank=4, inputs=inputs, bias=torch.zeros(8).double())
        assert torch.isfinite(found.A).all() and torch.isfinite(found.B).all()
        out, want = inputs @ (found.A @ found.B).mH + found.bias, inputs @ w.mH
        assert torch.allclose(out, want, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_directions_that_no_input_reaches_go_by_the_weights(shape):
    w = gaussian(*shape, seed=14)
    x = gaussian(100, 2, seed=15) @ gaussian(2, shape[1], seed=16)
    found = whitened_factors(w, rank=4, inputs=x)
    seen = torch.linalg.qr(w @ x.mH[:, :2])[0]
    rest = torch.linalg.svdvals(w - seen @ (seen.mH @ w))
    left = float(torch.linalg.matrix_norm(w - found.A @ found.B))
    assert left == pytest.approx(float(rest[2:].norm()), rel=1e-4)


def test_calibrated_lowers_the_function_error():
    w, x = he(20, 16, seed=17), correlated(600, 16, seed=18)
    bias = gaussian(20, seed=19)
    target = torch.relu(x @ w.mH + bias)
    start = whitened_factors(w, rank=2, inputs=x, bias=bias)
    found = calibrated_factors(start, inputs=x, targets=target)
    errors = [
        data_error(f.A @ f.B, f.bias, inputs=x, targets=target)
        for f in (spectral_factors(w, rank=2, bias=bias), start, found)
    ]
    assert errors[2] < errors[1] < errors[0]
    kept = calibrated_factors(start, inputs=x, targets=target, fit_bias=False)
    assert kept.bias is start.bias


def test_kernels_fold_back():
    weight = gaussian(4, 3, 5, 2)
    for split, shape in (("channel", (4, 30)), ("spatial", (8, 15))):
        matrix = unfold_kernel(weight, split=split)
        assert matrix.shape == shape
        assert torch.equal(fold_kernel(matrix, shape=weight.shape, split=split), weight)


def test_balanced_is_a_singular_value_decomposition():
    a, b = gaussian(9, 3), gaussian(3, 7, seed=1)
    u, s, vh = balanced(a, b)
    assert torch.allclose(u * s @ vh, a @ b, atol=1e-12)
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(u.mH @ u, eye) and torch.allclose(vh @ vh.mH, eye)
    assert (s.diff() <= 0).all()


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_bad_rank(rank):
    for make in (spectral_factors, function_factors):
        with pytest.raises(ValueError, match="between 1 and 4"):
            make(gaussian(4, 6), rank=rank)


def test_bad_input():
    with pytest.raises(ValueError, match="a real matrix"):
        function_factors(gaussian(4, 6).to(torch.complex128), rank=1)
    with pytest.raises(ValueError, match="inputs of shape"):
        whitened_factors(gaussian(4, 6), rank=1, inputs=gaussian(10, 5))
