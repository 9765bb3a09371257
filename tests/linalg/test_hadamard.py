"""Hadamard matrices, exactly in integers, and the orders that there are."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg import hadamard, hadamard_factors, nearest_hadamard_orders
from riemann_unn.linalg.hadamard import quadratic_character
from tests.support import every

ORDERS = [n for n in range(1, 513) if hadamard_factors(n) is not None]


def orders_by_closure(limit: int) -> set[int]:
    """The oracle: prime powers by a sieve, Paley's orders of them, and all products."""
    powers = set()
    for p in range(2, limit):
        if all(p % d for d in range(2, p)):
            q = p
            while q < limit:
                powers.add(q)
                q *= p
    found = {1, 2} | {q + 1 for q in powers if q % 4 == 3}
    found |= {2 * (q + 1) for q in powers if q % 4 == 1}
    while True:
        more = {a * b for a in found for b in found if a * b <= limit} - found
        if not more:
            return {n for n in found if n <= limit}
        found |= more


@every("n", ORDERS)
def test_rows_are_orthogonal_in_integers(n):
    h = hadamard(n)
    assert h.dtype == torch.int8 and h.shape == (n, n)
    assert set(h.unique().tolist()) <= {-1, 1}
    wide = h.double()  # sums of at most n ones are exact
    assert torch.equal(wide @ wide.T, n * torch.eye(n, dtype=torch.float64))


@every("n", ORDERS)
def test_determinants_are_positive_but_for_order_two(n):
    assert float(torch.linalg.slogdet(hadamard(n).double())[0]) == (-1 if n == 2 else 1)


def test_the_orders_are_those_of_the_constructions():
    missing = [n for n in range(4, 1001, 4) if hadamard_factors(n) is None]
    assert missing == sorted(set(range(4, 1001, 4)) - orders_by_closure(1000))
    # Listed in the On-Line Encyclopedia of Integer Sequences, A046116.
    assert missing[:12] == [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324]
    assert len(missing) == 55
    assert [n for n in range(1, 400) if n % 4 and hadamard_factors(n) is not None] == [1, 2]


def test_powers_of_two_are_sylvesters():
    h = hadamard(64)
    bits = torch.arange(64)
    common = bits[:, None] & bits[None, :]
    parity = sum((common >> i) & 1 for i in range(6)) % 2
    assert torch.equal(h, (1 - 2 * parity).to(torch.int8))
    assert hadamard_factors(48) == (2, 2, 12)


@every("q", [3, 5, 7, 9, 25, 27, 49, 81, 125, 243, 343])
def test_characters_are_those_of_fields(q):
    """Jacobsthal's matrix: Q Qᵀ = q I - J and Q J = 0; symmetric or skew with q mod 4."""
    k = quadratic_character(q).double()
    eye, ones = torch.eye(q).double(), torch.ones(q, q).double()
    assert torch.equal(k @ k.T, q * eye - ones) and not (k @ ones).any()
    assert torch.equal(k, k.T if q % 4 == 1 else -k.T)


def test_differences_modulo_nine_are_no_field():
    """The negative control: squares of integers modulo 9, where 3 · 3 = 0."""
    a = torch.arange(9)
    chi = torch.full((9,), -1.0)
    chi[a**2 % 9], chi[0] = 1.0, 0.0
    k = chi[(a[:, None] - a) % 9]
    assert not torch.equal(k @ k.T, 9 * torch.eye(9) - torch.ones(9, 9))


@every("q", [1, 2, 4, 6, 15, 64])
def test_other_fields_have_no_character(q):
    with pytest.raises(ValueError, match="power of an odd prime"):
        quadratic_character(q)


@every(("n", "below", "above"), [(92, 88, 96), (7, 4, 8), (1, 1, 2), (3, 2, 4)])
def test_nearest_orders(n, below, above):
    assert nearest_hadamard_orders(n) == (below, above)
    if n in (92, 7):
        with pytest.raises(ValueError, match=f"nearest orders are {below} and {above}"):
            hadamard(n)


@pytest.mark.parametrize("n", [0, -4])
def test_orders_are_positive(n):
    with pytest.raises(ValueError, match="at least 1"):
        hadamard(n)
