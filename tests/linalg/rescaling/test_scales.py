"""Rescaling from scales of twenty orders of magnitude: it converges, and never ends higher.

What it finds is judged without its help: by the gradient and the value of the objective as one long
sum in logarithms, and on small networks by L-BFGS on that sum.
"""

import math

import pytest
import torch

from riemann_unn.linalg.rescaling import (
    EnergyBlock,
    balance_energies,
    log_balanced,
    may_overflow,
    solver,
)
from tests.linalg.rescaling.networks import KINDS, blocks, network, path_energies, squares
from tests.support import generator

MODES = {True: path_energies, False: squares}
modes = pytest.mark.parametrize("linear", MODES, ids=["logdet", "norm"])


class LongSum:
    """The objective term by term, in logarithms."""

    def __init__(self, energies, channels, linear):
        found = [
            torch.stack(
                [
                    b.energy.log().reshape(-1),
                    b.feeds.unsqueeze(-1).expand(b.energy.shape).reshape(-1).double(),
                    b.reads.unsqueeze(-2).expand(b.energy.shape).reshape(-1).double(),
                ]
            )
            for b in energies
        ]
        logs, feeds, reads = torch.cat(found, 1)
        self.logs, self.feeds, self.reads = logs, feeds.long(), reads.long()
        self.n, self.linear, self.channels = len(logs) if linear else 1, linear, channels

    def exponent(self, z):
        z = torch.cat([z, z.new_zeros(1)])
        return z[self.reads] - z[self.feeds]

    def value(self, z):
        b = self.exponent(z)
        return self.n * (self.logs + b).logsumexp(0) - (b.sum() if self.linear else 0.0)

    def residual(self, z):
        """The largest entry of the gradient beside the terms it is made of, by channel."""
        terms = self.logs + self.exponent(z)
        share = self.n * (terms - terms.logsumexp(0)).exp()
        fed, read = torch.zeros(2, self.channels + 1, dtype=torch.float64)
        if self.linear:
            fed.index_add_(0, self.feeds, share - 1)
            read.index_add_(0, self.reads, share - 1)
            size = torch.zeros_like(fed).index_add_(0, self.feeds, share + 1)
            size.index_add_(0, self.reads, share + 1)
            return float(((read - fed) / size)[:-1].abs().max())
        # The energies of one channel may all be beyond the range of the sum of all.
        found = []
        for h in range(self.channels):
            into, out = terms[self.feeds == h], terms[self.reads == h]
            found.append(float((out.logsumexp(0) - into.logsumexp(0)).abs() / 2))
        return math.tanh(max(found))


def check(seed, linear, **options):
    net = network(seed, **options)
    energies, _ = blocks(net, MODES[linear](net))
    found = balance_energies(energies, net.channels, linear=linear)
    problem, zero = LongSum(energies, net.channels, linear), torch.zeros(net.channels).double()
    before, after = float(problem.value(zero)), float(problem.value(found.z))
    assert after <= before and found.after <= found.before, (seed, before, after)
    assert found.before == pytest.approx(before, rel=1e-10, abs=1e-9)
    assert found.after == pytest.approx(after, rel=1e-10, abs=1e-9 * max(1, abs(before)))
    assert found.converged and problem.residual(found.z) <= 1e-8, (seed, found)
    return net, energies, found, problem


@modes
def test_networks_of_every_kind_converge_from_scales_of_twenty_orders(linear):
    kinds = {check(seed, linear)[0].kind for seed in range(25)}
    assert kinds == set(KINDS)


@pytest.mark.parametrize(
    "count", [pytest.param(150, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.long)]
)
@modes
def test_many_networks_converge_from_scales_of_twenty_orders(linear, count):
    for seed in range(count):
        check(seed, linear)


@modes
@pytest.mark.parametrize("seed", range(6))
def test_no_other_method_gets_lower(seed, linear):
    _, _, found, problem = check(seed, linear, decades=1.5, widest=4)
    z = torch.zeros_like(found.z, requires_grad=True)
    descent = torch.optim.LBFGS([z], max_iter=3000, tolerance_grad=1e-11, tolerance_change=0,
                                history_size=50, line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        descent.zero_grad()
        value = problem.value(z)
        value.backward()
        return value

    descent.step(closure)
    least = float(problem.value(z.detach()))
    assert found.after <= least + 1e-9 * (1 + abs(least))
    assert least <= found.after + 1e-5 * problem.n  # or the other method has shown nothing


@modes
def test_the_checks_can_fail(linear):
    _, _, found, problem = check(3, linear)
    off = found.z.clone()
    off[0] += 0.1
    assert problem.residual(off) > 1e-3
    assert float(problem.value(off)) > found.after + 1e-7


@modes
def test_scales_do_not_matter(linear):
    """However a network is scaled, its optimal energies are the same."""
    g = generator(7)
    for seed in range(8):
        net = network(seed, decades=0.0)
        energies, _ = blocks(net, MODES[linear](net))
        one = balance_energies(energies, net.channels, linear=linear)
        z = 40 * torch.randn(net.channels, dtype=torch.float64, generator=g)
        net.rescale(z)
        energies, _ = blocks(net, MODES[linear](net))
        other = balance_energies(energies, net.channels, linear=linear)
        sign = 1 if linear else -1  # squares grow where path energies shrink
        assert torch.allclose(other.z + sign * z, one.z, atol=1e-5), seed


def test_a_worse_point_is_never_returned(monkeypatch):
    net = network(3)
    energies, _ = blocks(net, path_energies(net))

    def lost(problem, state, *rest):
        return problem.at(state.z + torch.tensor([400.0] * (len(state.z) - 1) + [0.0])), 1

    monkeypatch.setattr(solver, "_iterate", lost)
    found = balance_energies(energies, net.channels)
    assert not found.converged and found.after == found.before and not found.z.any()
    assert found.gradient > 1e-3


def test_a_problem_without_a_minimum_is_told():
    """A chain of two channels; ten parameters that no path passes want the second one fed."""
    a, b, fixed = (torch.tensor([[k]]) for k in range(3))
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    energies = [EnergyBlock(one, *places) for places in ((a, fixed), (b, a), (fixed, b))]
    assert balance_energies(energies, 2).converged
    found = balance_energies([*energies, EnergyBlock(0 * one, b, fixed, 10)], 2)
    assert not found.converged and found.gradient > 1e-3
    assert found.after <= found.before and torch.isfinite(found.z).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_energies_that_are_not_finite_are_named(value):
    net = network(3)
    energies, _ = blocks(net, path_energies(net))
    energies[1].energy[0, 0, 0] = value
    with pytest.raises(ValueError, match="block 1 hold NaN or infinity"):
        balance_energies(energies, net.channels)


def test_a_sum_that_overflows_is_no_obstacle():
    net = network(3, decades=0.0)
    energies, _ = blocks(net, path_energies(net))
    large = [EnergyBlock(1.7e308 * b.energy, b.feeds, b.reads, b.count) for b in energies]
    one, other = (balance_energies(e, net.channels) for e in (energies, large))
    assert other.converged and torch.allclose(one.z, other.z, atol=1e-7)
    assert other.after - other.before == pytest.approx(one.after - one.before, rel=1e-9)


# --- the start in logarithms -------------------------------------------------------------------


@modes
def test_least_squares_of_logarithms_take_scales_away(linear):
    g = generator(8)
    for seed in range(10):
        net = network(seed, decades=0.0)
        energies, _ = blocks(net, MODES[linear](net))
        one = log_balanced(energies, net.channels)
        problem = LongSum(energies, net.channels, linear)
        at = (problem.logs + problem.exponent(one))[problem.logs > -math.inf]
        for _ in range(5):
            near = one + 0.1 * torch.randn(len(one), dtype=torch.float64, generator=g)
            moved = (problem.logs + problem.exponent(near))[problem.logs > -math.inf]
            assert at.var() <= moved.var() + 1e-6
        z = 40 * torch.randn(net.channels, dtype=torch.float64, generator=g)
        net.rescale(z)
        other = log_balanced(blocks(net, MODES[linear](net))[0], net.channels)
        assert torch.allclose(other + (1 if linear else -1) * z, one, atol=0.05)


def test_least_squares_leave_alone_what_has_no_energy_or_is_frozen():
    net = network(3)
    energies, _ = blocks(net, squares(net))
    frozen = torch.arange(net.channels) % 2 == 0
    z = log_balanced(energies, net.channels, frozen=frozen)
    assert not z[frozen].any() and z[~frozen].any() and torch.isfinite(z).all()
    nothing = [EnergyBlock(0 * b.energy, b.feeds, b.reads, b.count) for b in energies]
    assert not log_balanced(nothing, net.channels).any()


def test_weights_balanced_first_give_the_same_solution_relative_to_zero():
    """As path conditioning calls it: balance weights, lift those, and solve from there."""
    for seed in range(15):
        net = network(seed)
        energies, peak = blocks(net, path_energies(net))
        direct = balance_energies(energies, net.channels)
        z = -log_balanced(blocks(net, squares(net))[0], net.channels)
        net.rescale(z)
        energies, other_peak = blocks(net, path_energies(net))
        found = balance_energies(energies, net.channels, origin=z)
        n = sum(b.energy.numel() for b in energies)
        shift = n * (other_peak - peak)
        rounding = 1e-10 * n * (1 + abs(peak) + abs(other_peak))
        assert found.converged
        assert found.before + shift == pytest.approx(direct.before, rel=1e-10, abs=rounding)
        assert found.after + shift == pytest.approx(direct.after, rel=1e-10, abs=rounding)


def test_dead_channels_keep_zero_whatever_the_origin():
    net = network(3, decades=0.0)
    energies, _ = blocks(net, path_energies(net))
    for b in energies:
        b.energy[b.feeds == 0] = 0
    origin = torch.randn(net.channels, dtype=torch.float64, generator=generator(9))
    found = balance_energies(energies, net.channels, origin=origin)
    assert found.converged and found.unscaled[0] and found.z[0] == 0


def test_products_out_of_range_are_foreseen():
    net = network(3, decades=0.0)
    assert not may_overflow(blocks(net, squares(net))[0])
    chain = [
        EnergyBlock(
            torch.full((1, 2, 2), 1e40, dtype=torch.float64), *[torch.zeros(1, 2).long()] * 2
        )
    ] * 8
    assert may_overflow(chain)
