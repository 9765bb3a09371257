"""Properties that hypothesis tries to break: exact or loud, whatever the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import riemann_unn as ru
from tests.contract.draws import (
    BASES,
    DISPLACEMENTS,
    GUARD,
    KINDS,
    LIMITS,
    METHODS,
    PHIS,
    SKETCHES,
    assert_exact,
    dtypes,
    hunt,
    laid_out,
    like,
    nearly,
    powers,
    seeds,
    shapes,
    start_at,
    thorough,
)
from tests.support import (
    COMPLEX,
    dense_step,
    double,
    gaussian,
    generator,
    low_rank,
)

# One step of an optimizer --------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn, steps: st.SearchStrategy[int]) -> dict[str, Any]:
    """A parameter, an optimizer, and the gradients it is to be given."""
    shape = draw(shapes)
    return {
        "shape": shape,
        "dtype": draw(dtypes),
        "layout": draw(
            st.sampled_from(["contiguous", "transposed", "offset", "sliced", "expanded"])
        ),
        "seed": draw(seeds),
        "det": draw(st.booleans()),
        "lr": draw(powers(-12, 3)),
        "rank": draw(st.one_of(st.none(), st.integers(1, max(shape[-2:]) + 2))),
        "sketch": draw(st.sampled_from(SKETCHES)),
        "base": draw(st.sampled_from(sorted(BASES))),
        "grads": [
            (draw(st.sampled_from(KINDS)), draw(powers(-30, 30)) if draw(st.booleans()) else 1.0)
            for _ in range(draw(steps))
        ],
    }


def take(run: dict[str, Any], phi: str) -> None:
    """Run an optimizer and check after every step that it was exact, or loud."""
    x, memory = laid_out(start_at(run["shape"], run["dtype"], run["seed"]), run["layout"])
    manifold: ru.Stiefel | ru.Orthogonal = ru.Stiefel()
    if run["det"] and x.ndim == 2 and x.shape[0] == x.shape[1] > 0 and not x.is_complex():
        manifold = ru.Orthogonal(det=int(torch.linalg.det(x).sign()))  # type: ignore[arg-type]
    p = ru.tag_(torch.nn.Parameter(x), manifold)
    base, options = BASES[run["base"]]
    optimizer = ru.optim.ManifoldOptimizer(
        [p],
        lr=run["lr"],
        phi=phi,  # type: ignore[arg-type]
        rank=run["rank"],
        sketch=run["sketch"],
        base=base,
        **options,
    )
    place, moment = (p.data_ptr(), p.stride(), p.storage_offset()), torch.get_rng_state()
    guards = memory == GUARD
    for step, (kind, scale) in enumerate(run["grads"]):
        p.grad = grad = like(x.detach(), kind, run["seed"] + step) * scale
        given_, before = grad.clone(), p.detach().clone()
        try:
            optimizer.step()
        except ru.NonFiniteError:
            assert torch.equal(p.detach(), before)
            # Only a displacement out of reach of the dtype may be refused.
            assert max(1.0, scale) * run["lr"] > torch.finfo(p.dtype).max * 1e-7
        assert_exact(p, manifold)
        assert p.grad is grad and torch.equal(grad, given_)
        assert place == (p.data_ptr(), p.stride(), p.storage_offset())
        if run["base"] == "sgd" and kind == "zero":
            assert torch.equal(p.detach(), before)
        if isinstance(manifold, ru.Orthogonal):
            assert manifold.has_det(p.detach())
    assert torch.equal(memory == GUARD, guards)
    assert torch.equal(torch.get_rng_state(), moment)


@pytest.mark.parametrize("phi", PHIS)
@given(run=runs(st.just(1)))
@thorough
def test_one_step_is_exact_or_loud(phi: str, run: dict[str, Any]) -> None:
    take(run, phi)


@given(run=runs(st.integers(5, 20)), phi=st.sampled_from(PHIS))
@thorough
def test_any_sequence_of_gradients_is_exact_or_loud(phi: str, run: dict[str, Any]) -> None:
    take(run, phi)


# The kernel ------------------------------------------------------------------------


@st.composite
def updates(draw: st.DrawFn, exponents: float = 30.0) -> tuple[Tensor, Tensor, Tensor, float]:
    """A tall point X, the factors A and B of a displacement of it, and their scale."""
    *batch, n, p = draw(shapes.filter(lambda s: s[-2] >= s[-1]))
    dtype, seed = draw(dtypes), draw(seeds)
    kind = draw(st.sampled_from(DISPLACEMENTS))
    scale = draw(powers(-exponents, exponents))
    x = start_at((*batch, n, p), dtype, seed)
    k = p if kind in KINDS else draw(st.one_of(st.integers(1, 2), st.integers(1, n + 3)))
    eye = torch.eye(p, dtype=dtype)
    b = eye if kind in KINDS else gaussian(*batch, p, k, dtype=dtype, seed=seed + 1)
    a = gaussian(*batch, n, k, dtype=dtype, seed=seed + 2)
    if kind in KINDS:
        a = like(x, kind, seed + 2)
    elif kind == "parallel":
        a = x @ b
    elif kind == "minus a part":
        a = -(x @ b) / max(k, p) ** 0.5
    elif kind == "zero columns":
        a[..., seed % k] = 0
    elif kind == "more columns than rows":
        k = n + 1 + seed % 3
        a, b = a.repeat(*[1] * (a.ndim - 1), k)[..., :k], b.repeat(*[1] * (b.ndim - 1), k)[..., :k]
    elif kind == "outside":
        a = a - x @ (x.mH @ a)
    return x, a * scale, b, scale


def reference(x: Tensor, delta: Tensor, phi: str) -> Tensor:
    """The dense oracle, but for exp a Taylor series, since for one small matrix of norm 0.04
    torch.matrix_exp is 3.5e-11 off in double precision."""
    if phi != "exp":
        return dense_step(x, delta, phi)
    x, delta = double(x), double(delta)
    k = 0.5 * (delta @ x.mH - x @ delta.mH)
    moved = term = x
    for i in range(1, 30):
        term = k @ term / i
        moved = moved + term
    return moved


def move(x: Tensor, a: Tensor, b: Tensor, phi: str) -> None:
    """Check one move of the kernel for exactness, and against the dense oracle where it can be."""
    kept = x.clone(), a.clone(), b.clone()
    moved = ru.linalg.retract_low_rank(x, a, b, phi=phi)  # type: ignore[arg-type]
    assert moved.shape == x.shape and moved.dtype == x.dtype
    assert all(torch.equal(*pair) for pair in zip((x, a, b), kept, strict=True))
    assert_exact(moved)
    if x.numel() == 0:
        return
    delta = double(a) @ double(b).mH
    if torch.linalg.matrix_norm(delta, ord=2).max() > 1:
        return
    single = x.dtype in LIMITS
    assert nearly(moved, reference(x, delta, phi), 2e-5 if single else 1e-12)


@pytest.mark.parametrize("phi", PHIS)
@given(update=updates())
@thorough
def test_the_kernel_on_degenerate_displacements_of_any_size(phi: str, update: Any) -> None:
    move(*update[:3], phi)


@pytest.mark.parametrize("phi", PHIS)
@given(update=updates(exponents=2.0))
@thorough
def test_the_kernel_against_the_dense_oracle(phi: str, update: Any) -> None:
    move(*update[:3], phi)


# The maps ----------------------------------------------------------------------------


@st.composite
def matrices(draw: st.DrawFn, square: bool) -> Tensor:
    """Matrices of any size that the dtype holds with some room, degenerate ones among them."""
    shape, dtype = draw(shapes), draw(dtypes)
    if square:
        shape = (*shape[:-1], shape[-2])
    reach = 30 if dtype in LIMITS else 140
    x = start_at(shape, dtype, draw(seeds))
    return like(x, draw(st.sampled_from(KINDS)), draw(seeds)) * draw(powers(-reach, reach))


@given(x=matrices(square=False), det=st.sampled_from([None, 1, -1]))
@thorough
def test_polar_is_orthonormal_and_nearest(x: Tensor, det: int | None) -> None:
    if x.is_complex() or x.shape[-1] != x.shape[-2]:
        det = None
    u = ru.linalg.polar(x, det=det)
    assert u.shape == x.shape and u.dtype == x.dtype
    assert_exact(u)
    if x.numel() == 0:
        return
    if det is not None:
        assert torch.equal(torch.linalg.det(u).sign(), torch.full(x.shape[:-2], det).to(u.dtype))
    else:  # its inner product with X is the sum of the singular values, the largest there is
        unit = double(x) / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
        reached = (double(u).conj() * unit).sum(dim=(-2, -1)).real
        best = torch.linalg.svdvals(unit).sum(dim=-1)
        assert nearly(reached, best, 1e-4 if x.dtype in LIMITS else 1e-11)


@pytest.mark.parametrize("phi", ["exp", "cayley"])
@given(z=matrices(square=True))
@thorough
def test_maps_of_skew_matrices_are_unitary(phi: str, z: Tensor) -> None:
    k = ru.linalg.skew(z)
    u = {"exp": ru.linalg.exp_skew, "cayley": ru.linalg.cayley}[phi](k)
    assert u.shape == k.shape and u.dtype == k.dtype
    assert_exact(u)
    if k.numel() and torch.linalg.matrix_norm(double(k), ord=2).max() <= 1:
        eye = torch.eye(k.shape[-1], dtype=k.dtype)
        # K is its own skew part, so a displacement of K from I leads to φ(K).
        assert nearly(u, reference(eye, k, phi), 5e-6 if k.dtype in LIMITS else 1e-12)
    # The inverse is the map of the inverse generator while angles keep their digits.
    if k.numel() and torch.linalg.matrix_norm(double(k), ord=2).max() <= 1e3:
        back = {"exp": ru.linalg.exp_skew, "cayley": ru.linalg.cayley}[phi](-k)
        assert nearly(back, u.mH, 1e-2 if k.dtype in LIMITS else 1e-9)


# Sketches ------------------------------------------------------------------------------


@given(n=st.integers(2, 12), p=st.integers(2, 12), data=st.data(), dtype=dtypes, seed=seeds)
@pytest.mark.parametrize("method", METHODS)
@thorough
def test_sketches_are_exact_on_low_rank(
    method: Any, n: int, p: int, data: st.DataObject, dtype: torch.dtype, seed: int
) -> None:
    true = data.draw(st.integers(1, min(n, p)), label="rank of the matrix")
    k = data.draw(st.integers(true, min(n, p) + 2), label="rank of the sketch")
    delta = low_rank(n, p, true, dtype=dtype, seed=seed)
    a, b = ru.linalg.sketch(delta, rank=k, method=method, generator=generator(seed))
    eps = torch.finfo(dtype).eps
    assert nearly(a @ b.mH, delta, 2e4 * eps)
    assert nearly(b.mH @ b, torch.eye(b.shape[-1]), 100 * eps)


@given(shape=shapes, dtype=dtypes, seed=seeds, k=st.integers(1, 9), data=st.data())
@pytest.mark.parametrize("method", METHODS)
@thorough
def test_sketches_scale_with_the_matrix_and_draw_from_their_generator(
    method: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    k: int,
    data: st.DataObject,
) -> None:
    if 0 in shape:
        shape = (3, 4)
    kind = data.draw(st.sampled_from(KINDS[:5]), label="kind")
    exponent = data.draw(st.integers(-90, 90) if dtype in LIMITS else st.integers(-400, 400))
    delta = like(start_at(shape, dtype, seed), kind, seed)
    moment = torch.get_rng_state()
    once, again, scaled = (
        ru.linalg.sketch(z, rank=k, method=method, generator=generator(seed))
        for z in (delta, delta, delta * 2.0**exponent)
    )
    assert torch.equal(torch.get_rng_state(), moment)
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
    # A power of two changes no digit, so nothing but its own scale may make a difference.
    products = once[0] @ once[1].mH, scaled[0] @ scaled[1].mH * 2.0**-exponent
    assert all(torch.isfinite(z).all() for z in products)
    assert nearly(*products, 1e4 * torch.finfo(dtype).eps)


# Negative controls: the checkers find a broken kernel ------------------------------------

Kernel = Callable[..., Tensor]


def broken_kernels(right: Kernel) -> dict[str, Kernel]:
    def conjugated(x: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        return right(x, a, b.conj().resolve_conj(), **options)

    return {
        "flipped sign": lambda x, a, b, **options: right(x, -a, b, **options),
        "doubled step": lambda x, a, b, **options: right(x, 2 * a, b, **options),
        "missing conjugate": conjugated,
        "no retraction": lambda x, a, b, **options: x.add_(a @ b.mH),
        "last column lost": lambda x, a, b, **options: right(x, a[..., 1:], b[..., 1:], **options),
    }


@pytest.mark.parametrize("name", sorted(broken_kernels(ru.linalg.retract_low_rank_)))
@pytest.mark.parametrize("phi", PHIS)
def test_negative_control_a_broken_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, phi: str
) -> None:
    update = ru.linalg.step.update  # type: ignore[attr-defined]
    broken = broken_kernels(update.retract_low_rank_)[name]
    monkeypatch.setattr(update, "retract_low_rank_", broken)

    @given(drawn=updates(exponents=2.0))
    @hunt
    def property_(drawn: Any) -> None:
        move(*drawn[:3], phi)

    with pytest.raises(AssertionError):
        property_()


@pytest.mark.parametrize("phi", PHIS)
def test_negative_control_an_optimizer_that_leaves_is_found(
    monkeypatch: pytest.MonkeyPatch, phi: str
) -> None:
    def along_the_tangent(x: Tensor, v: Tensor, d: Tensor, xv: Tensor, **_: Any) -> Any:
        x.add_((x @ d) @ v.mH - (x @ v) @ d.mH)
        return lambda: torch.linalg.vector_norm(d, dim=(-2, -1)), v

    monkeypatch.setattr(ru.retractions, "rotate_low_rank_lazily_", along_the_tangent)  # type: ignore[attr-defined]

    @given(run=runs(st.just(1)))
    @hunt
    def property_(run: dict[str, Any]) -> None:
        take(run, phi)

    with pytest.raises(AssertionError):
        property_()


def test_the_draws_reach_complex_and_degenerate_cases() -> None:
    for wanted in (
        lambda r: r["dtype"] in COMPLEX and 0 not in r["shape"] and len(r["shape"]) == 3,
        lambda r: r["rank"] is not None and r["rank"] > max(r["shape"]) and r["lr"] > 100,
        lambda r: r["layout"] == "sliced" and r["shape"][-2] < r["shape"][-1],
    ):
        searching = hypothesis.settings(thorough, max_examples=20_000)
        hypothesis.find(runs(st.just(1)), wanted, settings=searching)
