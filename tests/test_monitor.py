"""The monitor measures what a step did, and changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

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
        optimizer = ru.optim.ProjUNNT([("w", p)], lr=0.1, rank=2)
        monitor = ru.Monitor(optimizer)
        run(p, optimizer, rank=rank)
        assert all(low < entry["captured"] < high for entry in monitor.history["w"])


def test_every_and_log_and_remove():
    p = parameter(2, 6, 6)
    optimizer = ru.optim.ProjUNND([("w", p)], lr=0.1)
    logged = []
    monitor = ru.Monitor(optimizer, every=3, log=lambda *entry: logged.append(entry))
    run(p, optimizer, 7)
    assert [entry["step"] for entry in monitor.history["w"]] == [0.0, 3.0, 6.0]
    assert {name for name, _, _ in logged} == {
        f"w/{k}" for k in ("error", "angle", "phase", "captured")
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
