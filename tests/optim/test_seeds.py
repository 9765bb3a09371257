"""Draws of sketches: equal by seed, step and shape, on the host and on tensors alike."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.optim.seeds import Seeds, Source, multiplier

CPU = torch.device("cpu")


def test_a_step_on_the_device_counts_as_a_number():
    for step in (0, 1, 15, 16, 10**6, 2**40):
        assert int(multiplier(torch.tensor(step))) == multiplier(step)


@pytest.mark.parametrize("size", [(2, 9), (3, 2**13)])  # made ahead, and each for itself
def test_rows_are_the_same_from_any_start(size):
    some, other = Seeds(3), Seeds(3)
    steps = [some.rows(CPU, (9, 9), *size, step) for step in range(40)]
    for step in (39, 3, 17):
        again = other.rows(CPU, (9, 9), *size, step).to(steps[step].dtype)
        assert torch.equal(again, steps[step])
        counted = other.rows(CPU, (9, 9), *size, torch.tensor(step))
        assert torch.equal(counted.to(steps[step].dtype), steps[step])
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(Seeds(4).rows(CPU, (9, 9), *size, 0), steps[0])
    assert not torch.equal(some.rows(CPU, (9, 8), *size, 0), steps[0])


def test_numbers_have_variance_one_and_no_relation_from_step_to_step():
    seeds, drawn = Seeds(0), []
    for step in range(60):
        rows, unit = Source(seeds, CPU, (40, 40), step)(4, 100)
        drawn.append((rows.double() * unit).flatten())
    x = torch.stack(drawn)
    assert float(x.mean()) == pytest.approx(0, abs=0.02)
    assert float(x.square().mean()) == pytest.approx(1, abs=0.02)
    between = (x[:-1] * x[1:]).mean(dim=1).abs()
    assert float(between.mean()) < 0.1  # 1 / 20 is what 400 independent ones have
    assert float((x * x).mean(dim=1).mean()) > 0.9  # the control


def test_generators_begin_anew_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    source = Source(Seeds(1), CPU, (5, 5), 2)
    first = torch.rand(3, generator=source.generator())
    assert torch.equal(torch.rand(3, generator=source.generator()), first)
    source.step = 3
    assert not torch.equal(torch.rand(3, generator=source.generator()), first)
    assert torch.equal(torch.get_rng_state(), before)
