"""What the tests share: dtypes, tolerances from dtype and size, points, and dense references."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import riemann_unn as ru

REAL = [torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
DTYPES = REAL + COMPLEX
SHAPES = {"square": (12, 12), "tall": (20, 6), "wide": (6, 20), "batched": (3, 8, 8)}


def every(
    names: str | Sequence[str], values: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for all of some values in one go, and name those that fail.

    For grids of quick cases: what pytest does for a case of its own takes longer than they do.
    Written as ``pytest.mark.parametrize`` is; function fixtures are shared by the cases.
    """
    keys = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    cases = [value if len(keys) > 1 else (value,) for value in values]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            assert cases, "there is no case"
            failed: dict[str, Exception] = {}
            for case in cases:
                given = dict(zip(keys, case, strict=True))
                try:
                    test(**fixtures, **given)
                except Exception as error:
                    failed[", ".join(f"{key}={value}" for key, value in given.items())] = error
            if failed:
                named = "\n".join(f"{case}: {error}" for case, error in failed.items())
                first = next(iter(failed.values()))
                raise AssertionError(f"{len(failed)} of {len(cases)} fail\n{named}") from first

        signature = inspect.signature(test)
        kept = [p for p in signature.parameters.values() if p.name not in keys]
        assert len(kept) == len(signature.parameters) - len(keys), f"not parameters: {keys}"
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return run

    return decorate


def every_second(*lists: Iterable[Any]) -> list[Any]:
    """All combinations as pytest's parameters, every second one for the long tests.

    In what is left any two entries of three lists meet.
    """
    found = []
    for places in itertools.product(*(list(enumerate(some)) for some in lists)):
        is_long = sum(place for place, _ in places) % 2 == 1
        marks = [pytest.mark.long] if is_long else []
        found.append(pytest.param(*(value for _, value in places), marks=marks))
    return found


def rounding(dtype: torch.dtype, n: int = 1, factor: float = 8.0) -> float:
    """The error that rounding explains for results of length ``n`` in this dtype."""
    return factor * torch.finfo(dtype).eps * max(n, 1) ** 0.5


def double(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def error(x: Tensor, manifold: object = None) -> float:
    return float(ru.orthogonality_error(x, manifold))  # type: ignore[call-overload]


def assert_on_manifold(x: Tensor, manifold: object = None) -> None:
    """The shared assertion: as orthonormal as values of this dtype can be kept."""
    limit = {torch.float32: 5e-7, torch.complex64: 5e-7}.get(x.dtype, 2e-15)
    measured = error(x, manifold)
    assert measured <= limit, f"{measured:.1e} off, more than {limit:.0e}"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def point(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A random plain tensor with orthonormal columns (or rows)."""
    x = ru.Stiefel().random(*shape, dtype=dtype, generator=generator(seed))
    return x.as_subclass(Tensor).clone()


def parameter(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, manifold: object = None
) -> torch.nn.Parameter:
    """A tagged parameter on its manifold."""
    p = torch.nn.Parameter(point(*shape, dtype=dtype, seed=seed))
    return ru.tag_(p, manifold if manifold is not None else ru.Stiefel())  # type: ignore[arg-type]


def low_rank(
    n: int, p: int, k: int, *, dtype: torch.dtype = torch.float64, size: float = 1.0, seed: int = 0
) -> Tensor:
    """A matrix of rank k and spectral norm ``size`` with well separated directions."""
    left = point(n, k, dtype=dtype, seed=2 * seed + 1)
    right = point(p, k, dtype=dtype, seed=2 * seed + 2)
    values = torch.linspace(1, 0.5, k, dtype=torch.float64).to(dtype) * size
    return (left * values) @ right.mH


def dense_step(x: Tensor, delta: Tensor, phi: str) -> Tensor:
    """The slow oracle of one step, in double precision with n by n matrices."""
    x, delta = double(x), double(delta)
    if x.shape[-2] < x.shape[-1]:
        return dense_step(x.mH, delta.mH, phi).mH
    k = 0.5 * (delta @ x.mH - x @ delta.mH)
    if phi == "exp":
        return torch.linalg.matrix_exp(k) @ x
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    if phi == "polar":
        u, _, vh = torch.linalg.svd(eye + k)
        return u @ vh @ x
    return torch.linalg.inv(eye - 0.5 * k) @ (eye + 0.5 * k) @ x


def slope(distances: list[float], sizes: list[float]) -> float:
    """Least-squares slope of log distance against log size."""
    t, d = torch.tensor(sizes).double().log(), torch.tensor(distances).double().log()
    t, d = t - t.mean(), d - d.mean()
    return float((t * d).sum() / (t * t).sum())
