"""The line search finds steps that meet the strong Wolfe conditions, or says that there is none."""

from __future__ import annotations

import math

import pytest

from riemann_unn.optim.line_search import Trial, strong_wolfe


def searched(function, slope, step, **options):
    asked = []

    def evaluate(t):
        asked.append(t)
        return Trial(t, function(t), slope(t))

    found = strong_wolfe(
        evaluate, value=function(0.0), slope=slope(0.0), step=step, noise=1e-14, **options
    )
    return found, asked


LOSSES = {
    "parabola": (lambda t: (t - 3) ** 2, lambda t: 2 * (t - 3)),
    "period": (lambda t: -math.sin(t), lambda t: -math.cos(t)),
    "quartic": (lambda t: (t - 2) ** 4 - t, lambda t: 4 * (t - 2) ** 3 - 1),
    "steep": (lambda t: -t / (t * t + 2), lambda t: (t * t - 2) / (t * t + 2) ** 2),
}


@pytest.mark.parametrize("step", [1e-6, 1e-2, 1.0, 20.0, 1e6])
@pytest.mark.parametrize("name", LOSSES)
def test_steps_meet_the_strong_wolfe_conditions(name, step):
    f, slope = LOSSES[name]
    found, asked = searched(f, slope, step)
    t = found.trial.step
    assert t in asked and len(asked) <= 25
    assert f(t) <= f(0) + 1e-4 * t * slope(0)
    assert abs(slope(t)) <= 0.9 * abs(slope(0))


def test_what_is_not_finite_is_too_long():
    found, _ = searched(
        lambda t: math.nan if t > 0.1 else (t - 3) ** 2, lambda t: 2 * (t - 3), step=50.0
    )
    assert 0 < found.trial.step <= 0.1
    found, asked = searched(lambda t: math.inf if t else 0.0, lambda t: -1.0, step=1.0)
    assert found.trial is None and len(asked) <= 25
    assert found.nearest.step == min(asked)


def test_a_rising_loss_is_refused():
    """The control: a slope that is not the loss's own."""
    found, _ = searched(lambda t: t, lambda t: -1.0, step=1.0)
    assert found.trial is None
