"""Options of groups: caps of angles, ranks and sketches that change, φ of one's own, old states."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import riemann_unn as ru
from tests.support import DTYPES, assert_on_manifold, double, gaussian, parameter

CLASSES = {
    "T": ru.optim.ProjUNNT,
    "D": ru.optim.ProjUNND,
    "cayley": ru.optim.Cayley,
    "expm": ru.optim.Expm,
}


def angles(before: Tensor, after: Tensor) -> Tensor:
    """The angles that the planes of a square point have turned by."""
    return torch.angle(torch.linalg.eigvals(double(before).mH @ double(after))).abs()


# Caps ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_plane_turns_further_than_max_angle(name, rank, dtype):
    for base in (torch.optim.SGD, torch.optim.Adam):
        p = parameter(12, 12, dtype=dtype)
        optimizer = CLASSES[name]([p], lr=0.5, rank=rank, base=base, max_angle=0.1)
        for step in range(5):
            p.grad = gaussian(12, 12, dtype=dtype, seed=step)
            before = p.detach().clone()
            optimizer.step()
            noise = 1e-6 if dtype in (torch.float32, torch.complex64) else 1e-12
            turned = angles(before, p.detach()).max()
            assert turned <= 0.1 * (1 + 1e-6) + noise
            # What binds is the largest angle, and it stays the largest: 2 atan(θ/2), atan θ.
            assert turned >= math.atan(0.1) - noise
        assert_on_manifold(p)


@pytest.mark.parametrize("rank", [1, None])
def test_a_cap_that_does_not_bind_changes_no_bit(rank):
    ends = []
    for cap in (None, 3.0):
        p = parameter(12, 12)
        optimizer = ru.optim.ProjUNNT([p], lr=1e-3, rank=rank, max_angle=cap)
        for step in range(5):
            p.grad = gaussian(12, 12, dtype=torch.float32, seed=step)
            optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_caps_belong_to_groups_and_hold_for_tall_points_and_kernels():
    tall = parameter(12, 5, dtype=torch.float64)
    kernel = ru.tag_(
        nn.Parameter(ru.OrthogonalConv(1).random(4, 4, 6, dtype=torch.float64).clone()),
        ru.OrthogonalConv(1),
    )
    groups = [{"params": [tall], "max_angle": 0.2}, {"params": [kernel]}]
    optimizer = ru.optim.ProjUNNT(groups, lr=10.0, rank=1, max_angle=0.05)
    assert [group["max_angle"] for group in optimizer.param_groups] == [0.2, 0.05]
    for p in (tall, kernel):
        p.grad = gaussian(*p.shape, seed=1)
    before = kernel.detach().clone()
    optimizer.step()
    for p, cap in ((tall, 0.2), (kernel, 0.05)):
        assert float(optimizer.last_step()[p]["angle"]) == pytest.approx(cap, rel=1e-12)
    spectra = (kernel.manifold.to_matrices(x) for x in (before, kernel.detach()))
    assert angles(*spectra).max() <= 0.05 * (1 + 1e-9)


def test_with_a_cap_the_step_of_adam_does_not_grow_with_n():
    turned = {}
    for cap in (None, 0.05):
        for n in (16, 256):
            p = parameter(n, n, dtype=torch.float64)
            optimizer = ru.optim.Cayley([p], lr=0.02, base=torch.optim.Adam, max_angle=cap)
            before = p.detach().clone()
            p.grad = gaussian(n, n)
            optimizer.step()
            turned[cap, n] = float(angles(before, p.detach()).max())
    assert turned[None, 256] > 2 * turned[None, 16]
    assert turned[0.05, 256] == pytest.approx(turned[0.05, 16], rel=1e-6)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan"), float("inf")])
def test_caps_that_are_no_angle_are_refused(cap):
    with pytest.raises(ru.ManifoldError, match=r"max_angle=.* must be a positive number"):
        ru.optim.ProjUNNT([parameter(3, 3)], lr=0.1, max_angle=cap)


# Ranks and sketches that change ------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 12), (12, 5), (5, 12)])
def test_momentum_means_the_same_at_every_rank_and_sketch(shape):
    """One step at rank 1, then zero gradients: what momentum does then is read alike."""
    ends = {}
    for rank, sketch in ((1, "tangent"), (3, "tangent"), (None, "tangent"), (1, "lsi")):
        p = parameter(*shape, dtype=torch.float64)
        optimizer = ru.optim.ProjUNNT([p], lr=0.05, rank=1, momentum=0.9)
        p.grad = gaussian(*shape, seed=1)
        optimizer.step()
        state = optimizer.state[p]["momentum_buffer"].clone()
        optimizer.param_groups[0].update(rank=rank, sketch=sketch)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert (optimizer.state[p]["momentum_buffer"] - 0.9 * state).abs().max() < 1e-15
        ends[rank, sketch] = p.detach().clone()
        assert_on_manifold(p)
    # Whole steps apply all of it, which a few directions see a part of.
    before = parameter(*shape, dtype=torch.float64).detach()
    whole = ends[None, "tangent"] - before
    for end in ends.values():
        assert float(((end - before) * whole).sum()) > 0


@pytest.mark.parametrize("shape", [(12, 12), (12, 5), (5, 12)])
@pytest.mark.parametrize("name", CLASSES)
def test_the_first_step_with_momentum_is_the_plain_one_whole_or_not(shape, name):
    for rank in (1, 2, None) if shape == (12, 12) else (None,):
        ends = []
        for momentum in (0.0, 0.9):
            p = parameter(*shape, dtype=torch.float64)
            p.grad = gaussian(*shape, seed=2)
            CLASSES[name]([p], lr=0.1, rank=rank, momentum=momentum).step()
            ends.append(p.detach().clone())
        assert (ends[0] - ends[1]).abs().max() < 1e-14


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_whole_steps_at_every_rank_from_half_of_n_on(base):
    ends = []
    for rank in (None, 5, 9, 40):
        p = parameter(9, 9, dtype=torch.float64)
        optimizer = ru.optim.ProjUNND([p], lr=0.1, rank=rank, base=base)
        for step in range(4):
            p.grad = gaussian(9, 9, seed=step)
            optimizer.step()
        ends.append(p.detach().clone())
    assert all(torch.equal(ends[0], end) for end in ends[1:])


# φ of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, None])
def test_a_function_of_angles_is_a_phi(rank):
    ends = []
    for phi in ("cayley", lambda theta: 2 * torch.atan(theta / 2)):
        p = parameter(12, 12, dtype=torch.float64)
        optimizer = ru.optim.ManifoldOptimizer([p], lr=0.3, phi=phi, rank=rank)
        for step in range(5):
            p.grad = gaussian(12, 12, seed=step)
            optimizer.step()
        ends.append(p.detach().clone())
        assert_on_manifold(p)
    assert (ends[0] - ends[1]).abs().max() < 1e-13


def test_what_is_no_phi_is_refused():
    for phi, message in (("qr", "phi='qr' is unknown"), (torch.cos, "odd function of angles")):
        with pytest.raises(ru.ManifoldError, match=message):
            ru.optim.ManifoldOptimizer([parameter(3, 3)], lr=0.1, phi=phi)


# Reserved keys -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"), [("base", torch.optim.Adam), ("phi", "exp"), ("seed", 1), ("polish", False)]
)
def test_options_of_the_whole_optimizer_in_a_group_are_refused(key, value):
    p, q = parameter(3, 3), parameter(3, 3)
    with pytest.raises(ru.ManifoldError, match=rf"\['{key}'\], which hold for the whole optimizer"):
        ru.optim.ProjUNNT([{"params": [p], key: value}], lr=0.1)
    optimizer = ru.optim.ProjUNNT([p], lr=0.1)
    with pytest.raises(ru.ManifoldError, match=rf"\['{key}'\]"):
        optimizer.add_param_group({"params": [q], key: value})
    assert len(optimizer.param_groups) == 1


# States of 0.1.0 ------------------------------------------------------------------------


def old_state(optimizer, sketch="power"):
    """The state as 0.1.0 would have saved it: another sketch, its start under another name."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["max_angle"]
        group["sketch"] = sketch
    for kept in state["state"].values():
        if "sketch_directions" in kept:
            kept["sketch_start"] = kept.pop("sketch_directions")
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_of_0_1_0_loads_and_says_what_is_lost(dtype):
    p = parameter(8, 8).detach().to(dtype)
    p = ru.tag_(nn.Parameter(p), ru.Stiefel())
    optimizer = ru.optim.ProjUNNT([p], lr=0.1, momentum=0.9)
    for step in range(3):
        p.grad = gaussian(8, 8, seed=step).to(dtype)
        optimizer.step()
    saved = old_state(optimizer)
    kept = copy.deepcopy(saved)
    other = ru.optim.ProjUNNT([p], lr=0.1, momentum=0.9, max_angle=0.5)
    with pytest.warns(UserWarning, match=r"saved by riemann_unn 0\.1\.0: its sketches start anew"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["sketch"] == "tangent"
    assert other.param_groups[0]["max_angle"] == 0.5
    assert "sketch_start" not in other.state[p] and other.state[p]["retraction_step"] == 3
    assert saved["param_groups"] == kept["param_groups"]  # the caller's is left as it is
    other.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(other.state_dict())
        plain = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        other.load_state_dict(plain.state_dict())
    with pytest.warns(UserWarning, match=r"0\.1\.0"):
        other.load_state_dict(old_state(optimizer, "lsi"))
    assert other.param_groups[0]["sketch"] == "lsi"


def test_what_the_last_step_did():
    p, q, r = parameter(8, 8), parameter(3, 6, 6), parameter(5, 5)
    optimizer = ru.optim.ProjUNNT([{"params": [p, q]}, {"params": [r], "rank": None}], lr=0.1)
    assert optimizer.last_step() == {}
    for x in (p, q, r):
        x.grad = gaussian(*x.shape, dtype=x.dtype)
    before = p.detach().clone()
    optimizer.step()
    told = optimizer.last_step()
    assert told[r] == {}
    assert told[q]["directions"].shape == told[q]["coordinates"].shape == (3, 6, 1)
    assert float(told[p]["angle"]) == pytest.approx(float(angles(before, p.detach()).max()), 1e-5)
