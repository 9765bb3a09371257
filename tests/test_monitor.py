"""The monitor measures what a step did, and changes nothing."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import riemann_unn as ru
from tests.support import gaussian, low_rank, parameter


def run(p, optimizer, steps=6, rank=None):
    for step in range(steps):
        p.grad = gaussian(*p.shape, dtype=p.dtype, seed=step)
        if rank is not None:
            p.grad = low_rank(*p.shape, rank, dtype=p.dtype, seed=step)
        optimizer.step()


def test_numbers_of_a_known_rotation():
    p = torch.nn.Parameter(torch.eye(4, dtype=torch.float64))
    ru.tag_(p, ru.Orthogonal())
    optimizer = ru.optim.Expm([("turn", p)], lr=1.0)
    monitor = ru.Monitor(optimizer)
    p.grad = torch.zeros(4, 4, dtype=torch.float64)
    p.grad[0, 1] = 0.6  # skew part 0.3: a rotation by 0.3 in the first plane
    optimizer.step()
    (numbers,) = monitor.history["turn"]
    assert numbers["angle"] == pytest.approx(0.3, abs=1e-12)
    assert numbers["error"] < 1e-15 and numbers["phase"] == 0.0 and numbers["step"] == 0.0


def test_captured_energy_is_one_for_gradients_of_the_steps_rank_and_less_above():
    for rank, low, high in ((2, 1 - 1e-9, 1 + 1e-9), (8, 0.2, 0.95)):
        p = parameter(12, 12, dtype=torch.float64)
        optimizer = ru.optim.ProjUNNT([("w", p)], lr=0.1, rank=2, sketch="svd")
        monitor = ru.Monitor(optimizer)
        run(p, optimizer, rank=rank)
        assert all(low < entry["captured"] < high for entry in monitor.history["w"])


@pytest.mark.parametrize("shape", [(12, 12), (5, 12), (12, 5), (2, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rank", [1, None])
def test_gradients_against_the_dense_form(shape, dtype, rank):
    p = parameter(*shape, dtype=dtype)
    x = p.detach().clone()
    x = x.mH if shape[-2] > shape[-1] else x
    p.grad = gaussian(*shape, dtype=dtype, seed=3)
    g = p.grad.mH if shape[-2] > shape[-1] else p.grad
    optimizer = ru.optim.ProjUNNT([("w", p)], lr=0.1, rank=rank)
    monitor = ru.Monitor(optimizer)
    optimizer.step()
    (numbers,) = monitor.history["w"]
    omega = 0.5 * (x.mH @ g - g.mH @ x)
    assert numbers["gradient"] == pytest.approx(float(omega.norm()), rel=1e-12)
    if rank is None and shape[-2] == shape[-1]:
        assert "captured" not in numbers
        return
    v = optimizer.last_step()[p]["directions"].reshape(*omega.shape[:-2], omega.shape[-1], -1)
    rest = torch.eye(omega.shape[-1]) - v @ v.mH
    missed = float((rest @ omega @ rest).norm())
    assert numbers["missed"] == pytest.approx(missed, abs=1e-12)
    assert numbers["captured"] == pytest.approx(1 - (missed / float(omega.norm())) ** 2, abs=1e-12)


class NoDecompositions(TorchDispatchMode):
    """Refuses decompositions and products of whole 144 by 144 matrices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        whole = [t for t in tree_leaves(args) if torch.is_tensor(t) and t.shape[-2:] == (144, 144)]
        name = str(function)
        assert not (whole and any(word in name for word in ("svd", "eig", "slogdet", "_lu", "qr")))
        assert not (len(whole) > 1 and any(word in name for word in ("mm", "baddbmm")))
        return function(*args, **(kwargs or {}))


def test_large_matrices_are_measured_by_products_alone(monkeypatch):
    """Estimates are within a fifth."""
    found = []
    for large in (10_000, 16):
        monkeypatch.setattr("riemann_unn.monitor._LARGE", large)
        monkeypatch.setattr("riemann_unn.manifolds.base._EXACT_UP_TO", large)
        monkeypatch.setattr("riemann_unn.linalg.step.energies._EXACT", large**2)
        p = parameter(144, 144)
        optimizer = ru.optim.ProjUNNT([("w", p)], lr=0.1, rank=2)
        monitor = ru.Monitor(optimizer)
        p.grad = gaussian(144, 144, dtype=torch.float32, seed=2)
        with NoDecompositions() if large == 16 else nullcontext():
            optimizer.step()
        found.append(monitor.history["w"][0])
    exact, estimate = found
    for key in ("gradient", "captured", "missed"):
        assert estimate[key] == pytest.approx(exact[key], rel=0.2)
    with pytest.raises(AssertionError), NoDecompositions():  # the check can fail
        torch.linalg.svdvals(p.detach())


def test_starved_directions_show():
    """A plane of strong noise holds the one direction of rank 1; what it misses stays."""
    missed = {}
    for rank in (1, 4):
        x = torch.nn.Parameter(torch.eye(16, dtype=torch.float64))
        ru.tag_(x, ru.Orthogonal())
        optimizer = ru.optim.ProjUNNT([("w", x)], lr=1e-2, rank=rank)
        monitor = ru.Monitor(optimizer)
        for step in range(200):
            x.grad = starving_gradient(x.detach(), step)
            optimizer.step()
        missed[rank] = [entry["missed"] for entry in monitor.history["w"]][-20:]
    assert min(missed[1]) > 0.05 and max(missed[4]) < 1e-3


def starving_gradient(x, step):
    """G = X N - M: noise of changing sign in one plane, a small steady rotation in another."""
    noise, steady = torch.zeros(2, *x.shape, dtype=x.dtype)
    noise[0, 1] = 20.0 * (-1) ** step
    steady[2, 3] = 0.05
    return x @ (noise - noise.mT) - (steady - steady.mT)


def test_every_and_log_and_remove():
    p = parameter(2, 6, 6)
    optimizer = ru.optim.ProjUNND([("w", p)], lr=0.1)
    logged = []
    monitor = ru.Monitor(optimizer, every=3, log=lambda *entry: logged.append(entry))
    run(p, optimizer, 7)
    assert [entry["step"] for entry in monitor.history["w"]] == [0.0, 3.0, 6.0]
    assert {name for name, _, _ in logged} == {
        f"w/{k}" for k in ("error", "gradient", "captured", "missed", "angle", "phase")
    }
    assert all(isinstance(value, float) and math.isfinite(value) for _, value, _ in logged)
    monitor.remove()
    run(p, optimizer, 7)
    assert len(monitor.history["w"]) == 3


def test_the_run_is_the_same_with_and_without():
    ends = []
    for watched in (False, True):
        p = parameter(7, 7, dtype=torch.complex64, manifold=ru.Unitary())
        optimizer = ru.optim.ProjUNNT([p], lr=0.1, base=torch.optim.Adam)
        if watched:
            ru.Monitor(optimizer)
        run(p, optimizer)
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_bad_arguments():
    with pytest.raises(ru.ManifoldTypeError, match="an optimizer is needed"):
        ru.Monitor(parameter(3, 3))
    with pytest.raises(ru.ManifoldTypeError, match="no tagged parameter"):
        ru.Monitor(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1))
    with pytest.raises(ValueError, match="every=0"):
        ru.Monitor(ru.optim.ProjUNNT([parameter(3, 3)], lr=0.1), every=0)


def test_the_plot_shows_every_parameter(tmp_path):
    p, q = parameter(12, 12), parameter(9, 4)
    optimizer = ru.optim.ProjUNNT([("square", p), ("tall", q)], lr=0.1)
    monitor = ru.Monitor(optimizer)
    monitor.plot(tmp_path / "empty.png")
    for step in range(5):
        for x in (p, q):
            x.grad = gaussian(*x.shape, dtype=x.dtype, seed=step)
        optimizer.step()
    monitor.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 1000
