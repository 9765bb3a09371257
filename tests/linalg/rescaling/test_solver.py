"""Rescaling against a loop over neurons, at its optimum, and where channels are dead."""

from itertools import pairwise

import pytest
import torch

from riemann_unn.linalg.rescaling import EnergyBlock, balance_energies
from riemann_unn.linalg.rescaling.sweeps import _quadratic
from tests.linalg.rescaling.dense import Dense, dense, neuron_by_neuron, objective
from tests.support import generator

TOL = 1e-8


def mlp_energies(widths: list[int], *, seed: int = 0, spread: float = 0.0) -> Dense:
    """Random energies of a chain of dense layers; spread scales whole layers by powers of ten."""
    g = generator(seed)
    blocks, first = [], 0
    channels = sum(widths[1:-1])
    for k, (i, o) in enumerate(pairwise(widths)):
        energy = torch.rand(o, i, dtype=torch.float64, generator=g).square() / i
        energy *= 10.0 ** float(spread * torch.randn((), generator=g))
        feeds = (
            torch.arange(first, first + o) if k < len(widths) - 2 else torch.full((o,), channels)
        )
        start = first - i
        reads = torch.arange(start, first) if k else torch.full((i,), channels)
        blocks.append(EnergyBlock(energy[None], feeds[None], reads[None]))
        blocks.append(
            EnergyBlock(
                torch.rand(1, o, 1, dtype=torch.float64, generator=g),
                feeds[None],
                torch.full((1, 1), channels),
            )
        )
        first += o
    return blocks, channels


def grouped(seed: int = 0) -> Dense:
    """Grouped, depthwise and pointwise layers with several parameters in each entry."""
    g = generator(seed)

    def block(batch: int, rows: int, columns: int, feeds: int, reads: int | None) -> EnergyBlock:
        into = feeds + torch.arange(batch * rows).reshape(batch, rows)
        if reads is None:
            read = torch.full((batch, columns), 20)
        else:
            read = reads + torch.arange(batch * columns).reshape(batch, columns)
        energy = torch.rand(batch, rows, columns, dtype=torch.float64, generator=g) ** 4
        return EnergyBlock(energy, into.clamp_max(20), read, 9)

    return [
        block(1, 8, 3, 0, None),
        block(8, 1, 1, 8, 0),
        block(2, 2, 4, 16, 8),
        block(1, 5, 4, 20, 16),
    ], 20


def residual(seed: int = 0) -> Dense:
    """A channel space that a layer reads and feeds itself, as x + conv(x) does."""
    g = generator(seed)
    space, fixed = torch.arange(6)[None], torch.full((1, 6), 6)
    energies = [torch.rand(1, 6, 6, dtype=torch.float64, generator=g) ** 3 for _ in range(4)]
    places = [(space, fixed), (space, space), (space, space), (fixed, space)]
    return [EnergyBlock(e, a, b) for e, (a, b) in zip(energies, places, strict=True)], 6


CASES = {
    "one hidden layer": lambda: mlp_energies([5, 7, 3]),
    "narrow": lambda: mlp_energies([3, 1, 4, 1, 2]),
    "wide": lambda: mlp_energies([20, 60, 40, 10]),
    "deep": lambda: mlp_energies([6] * 12),
    "deep, layers scaled apart": lambda: mlp_energies([6] * 12, spread=2.0),
    "wide, layers scaled apart": lambda: mlp_energies([20, 60, 40, 10], spread=3.0),
    "grouped": grouped,
    "grouped, another": lambda: grouped(1),
    "residual": residual,
    "residual, another": lambda: residual(1),
}
every_case = pytest.mark.parametrize("case", CASES)


@every_case
@pytest.mark.parametrize("linear", [True, False], ids=["logdet", "norm"])
def test_the_gradient_of_the_objective_vanishes(case, linear):
    blocks, channels = CASES[case]()
    found = balance_energies(blocks, channels, linear=linear)
    assert found.converged and found.gradient <= TOL
    z = found.z.clone().requires_grad_()
    value = objective(dense(blocks, channels), z, linear=linear)
    (gradient,) = torch.autograd.grad(value, z)
    (at_zero,) = torch.autograd.grad(
        objective(
            dense(blocks, channels), zero := torch.zeros_like(z, requires_grad=True), linear=linear
        ),
        zero,
    )
    assert gradient.norm() <= TOL * at_zero.norm()
    assert float(value.detach()) == pytest.approx(found.after, rel=1e-12, abs=1e-9)


@every_case
def test_it_is_no_worse_than_ten_sweeps_neuron_by_neuron(case):
    blocks, channels = CASES[case]()
    found = balance_energies(blocks, channels)
    problem = dense(blocks, channels)
    slow = objective(problem, neuron_by_neuron(problem, channels, sweeps=10))
    rounding = 1e-12 * abs(float(slow)) + 1e-9
    assert found.after <= float(slow) + rounding
    assert found.after <= found.before


@every_case
def test_random_perturbations_never_lower_it(case):
    blocks, channels = CASES[case]()
    problem, found = dense(blocks, channels), balance_energies(blocks, channels)
    best = float(objective(problem, found.z))
    g = generator(5)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            step = size * torch.randn(channels, dtype=torch.float64, generator=g)
            assert float(objective(problem, found.z + step)) >= best - 1e-12 * abs(best)


def test_the_check_of_the_optimum_can_fail():
    blocks, channels = CASES["wide"]()
    problem, found = dense(blocks, channels), balance_energies(blocks, channels)
    off = found.z.clone()
    off[0] += 0.1
    assert float(objective(problem, off)) > found.after + 1e-6


@pytest.mark.parametrize("power", [1, 2])
def test_roots_solve_their_equation_and_give_their_sum(power):
    g = generator(4)
    i, o = (10 ** (4 * torch.rand(9, dtype=torch.float64, generator=g) - 2) for _ in range(2))
    slope = 0.1 * torch.randn(9, dtype=torch.float64, generator=g)
    x, total = _quadratic(i, o, slope, 3.0, power)
    assert total == pytest.approx(3.0 + float((o * x + i / x).sum()) / power, rel=1e-12)
    assert torch.allclose(o * x - i / x, slope * total, rtol=1e-10, atol=1e-12) and (x > 0).all()


@pytest.mark.parametrize("case", ["wide", "deep", "wide, layers scaled apart"])
def test_a_few_sweeps_are_enough_for_dense_layers(case):
    assert balance_energies(*CASES[case]()).iterations <= 8


def test_newton_finishes_what_sweeps_cannot(monkeypatch):
    blocks, channels = CASES["deep, layers scaled apart"]()
    want = balance_energies(blocks, channels)
    monkeypatch.setattr("riemann_unn.linalg.rescaling.solver._CYCLES", 2)
    found = balance_energies(blocks, channels)
    assert found.converged and torch.allclose(found.z, want.z, atol=1e-6)


def test_dead_channels_are_left_alone():
    blocks, channels = CASES["wide"]()
    blocks[0].energy[:, 3] = 0
    blocks[1].energy[:, 3] = 0  # nothing feeds channel 3
    blocks[2].energy[:, :, 5] = 0  # nothing reads channel 5
    found = balance_energies(blocks, channels)
    assert torch.nonzero(found.unscaled).squeeze(1).tolist() == [3, 5]
    assert found.z[3] == found.z[5] == 0
    assert found.converged and torch.isfinite(found.z).all()


def test_frozen_channels_are_left_alone():
    blocks, channels = CASES["wide"]()
    frozen = torch.arange(channels) % 2 == 0
    found = balance_energies(blocks, channels, frozen=frozen)
    assert found.converged and (found.z[frozen] == 0).all() and (found.z[~frozen] != 0).all()


def test_no_energy_at_all_changes_nothing():
    blocks, channels = CASES["wide"]()
    for block in blocks:
        block.energy.zero_()
    found = balance_energies(blocks, channels)
    assert found.converged and found.unscaled.all() and not found.z.any()


def test_a_common_factor_of_the_energies_changes_nothing_but_the_objective():
    blocks, channels = CASES["wide"]()
    one = balance_energies(blocks, channels)
    scaled = [EnergyBlock(1e30 * b.energy, b.feeds, b.reads, b.count) for b in blocks]
    other = balance_energies(scaled, channels)
    assert torch.allclose(one.z, other.z, atol=1e-8)


def test_a_shift_of_the_solution_is_undone():
    """The energies of a rescaled network have the same minimum, moved by the rescaling."""
    blocks, channels = CASES["deep"]()
    shift = torch.cat(
        [3 * torch.randn(channels, dtype=torch.float64, generator=generator(2)), torch.zeros(1)]
    )
    moved = [
        EnergyBlock(
            b.energy * (shift[b.reads].unsqueeze(-2) - shift[b.feeds].unsqueeze(-1)).exp(),
            b.feeds,
            b.reads,
            b.count,
        )
        for b in blocks
    ]
    one, other = balance_energies(blocks, channels), balance_energies(moved, channels)
    assert torch.allclose(one.z, other.z + shift[:-1], atol=1e-6)
