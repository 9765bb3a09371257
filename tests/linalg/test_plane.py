"""The closed form of a turn of rank one against the general map of a 2 by 2 core."""

from __future__ import annotations

import math

import pytest
import torch

from riemann_unn.linalg import unitary_core
from riemann_unn.linalg.plane import turn_of_plane
from tests.support import gaussian

PHIS = ["exp", "cayley", "polar"]
DOUBLES = [torch.float64, torch.complex128]


def oracle(w, phi, special=False):
    q, r = torch.linalg.qr(w)
    core = unitary_core(r[:, :1] @ r[:, 1:].mH, phi=phi, special=special)
    return q @ (core - torch.eye(2, dtype=w.dtype)) @ q.mH


def pairs(dtype, size):
    for seed in range(12):
        w = gaussian(7, 2, dtype=dtype, seed=seed)
        yield torch.cat([size * w[:, :1], w[:, 1:] / w[:, 1:].norm()], dim=1)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("dtype", DOUBLES)
@pytest.mark.parametrize("size", [1e-12, 1e-3, 0.3, 3.0, 100.0])
def test_against_the_general_map(phi, dtype, size):
    for w in pairs(dtype, size):
        for special in (False, True)[: 1 if w.is_complex() else 2]:
            turn, loss = turn_of_plane(w.mH @ w, phi=phi, special=special)
            expected = oracle(w, phi, special)
            limit = 1e-14 * max(loss, 1) * max(size, 1)
            assert (w @ turn @ w.mH - expected).abs().max() <= limit
            moved = torch.eye(7, dtype=dtype) + w @ turn @ w.mH
            assert (moved.mH @ moved - torch.eye(7)).abs().max() <= 4e-15 * max(loss, 1)
    other = "cayley" if phi == "exp" else "exp"
    if size >= 0.3:  # where the maps differ the check can fail
        assert (w @ turn @ w.mH - oracle(w, other)).abs().max() > 1e-3


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("dtype", DOUBLES)
def test_batches_equal_single_ones(phi, dtype):
    w = torch.stack(list(pairs(dtype, 0.7)))
    turns, loss = turn_of_plane(w.mH @ w, phi=phi)
    alone = [turn_of_plane(one.mH @ one, phi=phi) for one in w]
    for turn, (single, _) in zip(turns, alone, strict=True):
        assert (turn - single).abs().max() <= 1e-13
    assert loss == pytest.approx(max(loss for _, loss in alone), rel=1e-9)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("dtype", DOUBLES)
def test_degenerate_pairs(phi, dtype):
    for batch in ((), (3,)):
        # A zero vector turns nothing.
        gram = torch.diag(torch.tensor([0.0, 1.0], dtype=dtype)).expand(*batch, 2, 2)
        turn, loss = turn_of_plane(gram, phi=phi)
        assert not turn.any() and loss == 0
        # Parallel vectors, and numbers beyond all range, are told by the loss.
        beyond = torch.tensor([[math.inf, 1.0], [1.0, 1.0]], dtype=dtype)
        for bad in (torch.ones(2, 2, dtype=dtype), beyond, math.inf * beyond):
            assert not turn_of_plane(bad.expand(*batch, 2, 2), phi=phi)[1] <= 1e6
        assert not turn_of_plane(torch.zeros(*batch, 2, 2, dtype=dtype), phi=phi)[1] <= 1e6


@pytest.mark.parametrize("dtype", DOUBLES)
def test_straight_steps_through_the_centre_keep_to_the_nearest(dtype):
    # I + Z = diag(1 - s, 1) for c = -a/|a| but for a small angle: the polar factor of a
    # matrix without inverse is not unique, yet unitary.
    eye = torch.eye(4, dtype=dtype)
    for lean in (1e-2, 1e-3):
        a, c = eye[:, :1], (-eye[:, :1] + lean * eye[:, 1:2]) / math.hypot(1, lean)
        w = torch.cat([a, c], dim=1)
        turn, loss = turn_of_plane(w.mH @ w, phi="polar")
        moved = eye + w @ turn @ w.mH
        assert (moved.mH @ moved - eye).abs().max() <= 4e-15 * max(loss, 1)
