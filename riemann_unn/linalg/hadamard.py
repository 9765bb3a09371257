r"""Hadamard matrices: entries +1 and -1, and :math:`H H^T = n I`.

Sylvester's construction doubles the order; Paley's two give the orders q + 1 and 2 (q + 1) from the
squares of the field with q elements, q a power of an odd prime; Kronecker products of Hadamard
matrices are Hadamard matrices.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count, product
from operator import index

import torch
from torch import Tensor

__all__ = ["hadamard", "hadamard_factors", "nearest_hadamard_orders", "quadratic_character"]


def hadamard(n: int) -> Tensor:
    r"""Return a Hadamard matrix of order n, :math:`H H^T = n I`, with entries +1 and -1.

    It is the Kronecker product of those of the orders :func:`hadamard_factors`, for powers of two
    Sylvester's. Its determinant is positive for all orders but 2.

    Args:
        n: the order.

    Returns:
        An int8 tensor of shape ``(n, n)``.

    Raises:
        ValueError: no such matrix can be made; the nearest orders are named.

    Reference:
        Sylvester (1867); Paley, "On orthogonal matrices" (1933).
    """
    factors = hadamard_factors(n)
    if factors is None:
        below, above = nearest_hadamard_orders(n)
        raise ValueError(
            f"no Hadamard matrix of order {n} can be made of Sylvester's and Paley's; the nearest "
            f"orders are {below} and {above}"
        )
    found = torch.ones(1, 1, dtype=torch.int8)
    for factor in factors:
        found = torch.kron(found, _core(factor))
    return found


@lru_cache(maxsize=4096)
def hadamard_factors(n: int) -> tuple[int, ...] | None:
    """Return the orders of the Hadamard matrices of which :func:`hadamard` is a product.

    Args:
        n: the order, at least 1.

    Returns:
        2 for each doubling and the orders of Paley's matrices; None if there are no such orders.
    """
    n = index(n)
    if n < 1:
        raise ValueError(f"{n=} must be at least 1")
    if n == 1:
        return ()
    if n % 2:
        return None
    for order in (2, *range(4, n + 1, 4)):
        if n % order == 0 and _is_core(order):
            rest = hadamard_factors(n // order)
            if rest is not None:
                return (order, *rest)
    return None


def nearest_hadamard_orders(n: int) -> tuple[int, int]:
    """Return the nearest orders below and above n that :func:`hadamard` can construct."""
    below = next(m for m in range(n - 1, 0, -1) if hadamard_factors(m) is not None) if n > 1 else 1
    return below, next(m for m in count(n + 1) if hadamard_factors(m) is not None)


def quadratic_character(q: int) -> Tensor:
    r"""Return the matrix :math:`\chi(a - b)` over the elements a, b of the field with q elements.

    :math:`\chi` is 0 at 0, 1 at squares and -1 elsewhere.

    Args:
        q: a power of an odd prime.

    Returns:
        An int8 tensor of shape ``(q, q)``.
    """
    p, m = _prime_power(q) or (0, 0)
    if p < 3:
        raise ValueError(f"{q=} must be a power of an odd prime")
    elements = torch.arange(q)
    powers = p ** torch.arange(m)
    digits = elements[:, None] // powers % p
    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[_squares(digits, p, powers)] = 1
    chi[0] = 0
    difference = torch.zeros(q, q, dtype=torch.int32)
    for digit, power in zip(digits.T.int(), powers.tolist(), strict=True):
        difference += power * ((digit[:, None] - digit[None, :]) % p)
    return chi[difference]


def _squares(digits: Tensor, p: int, powers: Tensor) -> Tensor:
    """Return the squares of all elements, polynomials of degree below m over the integers mod p.

    They are multiplied modulo a polynomial of degree m. In a field, of odd order q, the squares
    are (q + 1) / 2; with divisors of zero a b = 0 the squares of (a + b) / 2 and (a - b) / 2 are
    the same, so that there are fewer.
    """
    q, m = digits.shape
    product_ = torch.zeros(q, 2 * m - 1, dtype=torch.int64)
    for i in range(m):
        product_[:, i : i + m] += digits[:, i : i + 1] * digits
    for low in product(range(p), repeat=m):
        rest = product_.clone()
        for degree in range(2 * m - 2, m - 1, -1):  # x^m is minus the rest of the polynomial
            rest[:, degree - m : degree] -= rest[:, degree : degree + 1] * torch.tensor(low)
            rest %= p
        found = (rest[:, :m] % p * powers).sum(1)
        if len(found.unique()) == (q + 1) // 2:
            return found
    raise AssertionError("there is an irreducible polynomial of every degree")


@lru_cache(maxsize=4096)
def _prime_power(q: int) -> tuple[int, int] | None:
    """Return p and m with q = p^m, p a prime; None for other numbers."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    m = 0
    while q % p == 0:
        q, m = q // p, m + 1
    return (p, m) if q == 1 else None


def _is_core(order: int) -> bool:
    """Tell whether there is a matrix of this order that is not a product."""
    return order == 2 or _is_first(order) or _is_second(order)


def _is_first(order: int) -> bool:
    return order % 4 == 0 and _prime_power(order - 1) is not None


def _is_second(order: int) -> bool:
    return order % 4 == 0 and (order // 2) % 4 == 2 and _prime_power(order // 2 - 1) is not None


def _core(order: int) -> Tensor:
    """Return Sylvester's matrix of order 2, Paley's first or Paley's second."""
    if order == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    is_first = _is_first(order)
    q = order - 1 if is_first else order // 2 - 1
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = -1 if is_first else 1
    bordered[1:, 1:] = quadratic_character(q)
    eye = torch.eye(q + 1, dtype=torch.int8)
    if is_first:  # q = 3 mod 4: the bordered matrix is skew
        return bordered + eye
    # q = 1 mod 4: it is symmetric
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    other = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(bordered, two) + torch.kron(eye, other)
