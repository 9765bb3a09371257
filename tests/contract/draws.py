"""What the property tests draw, and the assertions they share."""

from __future__ import annotations

from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

import riemann_unn as ru
from tests.support import (
    DTYPES,
    double,
    error,
    gaussian,
    point,
)

PHIS = ["exp", "cayley", "polar"]
METHODS = ["lsi", "column", "svd"]
SKETCHES = ["tangent", *METHODS]
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
}
LIMITS = {torch.float32: 1e-6, torch.complex64: 1e-6}
GUARD = 7.0  # fills the memory beside a parameter that must not be written to

# Derandomized, so that a failure in CI is one here; --hypothesis-profile=slow draws more.
thorough = settings(
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# The negative controls ask only whether a failure is found.
hunt = settings(thorough, phases=[hypothesis.Phase.generate])


# What is drawn -----------------------------------------------------------------

seeds = st.integers(0, 2**20)
dtypes = st.sampled_from(DTYPES)
sizes = st.integers(1, 7)
shapes = st.one_of(
    st.tuples(sizes, sizes),
    sizes.map(lambda n: (n, n)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([(1, 1), (7, 1), (1, 7), (0, 0), (4, 0), (0, 4), (0, 3, 3), (2, 0, 0)]),
    st.sampled_from([(20, 3), (3, 20), (24, 7), (15, 8), (12, 12), (24, 23)]),
)


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    """Log-uniform numbers, the ends and 1 among them."""
    return st.one_of(st.floats(low, high), st.sampled_from([low, 0.0, high])).map(lambda e: 10.0**e)


KINDS = ["gaussian", "zero", "rank one", "one column", "equal columns", "the point", "minus it"]
DISPLACEMENTS = [
    *KINDS,
    "parallel",
    "minus a part",
    "zero columns",
    "more columns than rows",
    "outside",
]


def like(x: Tensor, kind: str, seed: int) -> Tensor:
    """A matrix of the shape of x, in general position or degenerate, of size about 1."""
    z = gaussian(*x.shape, dtype=x.dtype, seed=seed)
    if kind == "zero" or x.numel() == 0:
        return torch.zeros_like(z)
    if kind == "rank one":
        return z[..., :1] * z[..., :1, :]
    if kind == "one column":
        column = seed % x.shape[-1]
        z[..., :column], z[..., column + 1 :] = 0, 0
    if kind == "equal columns":
        z = z[..., :1].expand(z.shape).clone()
    return {"the point": x, "minus it": -x}.get(kind, z).clone()


def start_at(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return point(*shape, dtype=dtype, seed=seed) if 0 not in shape else torch.zeros(shape).to(dtype)


def laid_out(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same values in other strides, with the whole memory that holds them."""
    if layout == "transposed":
        memory = x.mT.contiguous()
        return memory.mT, memory
    if layout == "offset":
        memory = torch.full((x.numel() + 5,), GUARD, dtype=x.dtype)
        view = memory[3 : 3 + x.numel()].view(x.shape)
    elif layout == "sliced":
        memory = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), GUARD, dtype=x.dtype)
        view = memory[..., 1::2]
    elif layout == "expanded":
        memory = x.expand(2, *x.shape).clone().fill_(GUARD)
        view = memory[1]
    else:
        memory = view = x.clone()
    return view.copy_(x), memory


def limit(dtype: torch.dtype) -> float:
    return LIMITS.get(dtype, 1e-13)


def assert_exact(x: Tensor, manifold: Any = None) -> None:
    assert torch.isfinite(x).all()
    measured = error(x.detach().as_subclass(Tensor), manifold or ru.Stiefel())
    assert measured <= limit(x.dtype), f"{measured:.1e} off"


def nearly(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return one.numel() == 0 or float((double(one) - double(two)).abs().max()) <= tolerance
