"""Time and steps to a target: a unitary matrix, digits, copying memory; rates from one grid."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.parametrize import cached

from riemann_unn.demo.models import SequenceModel
from riemann_unn.demo.tasks import Copy, Digits, Task
from riemann_unn.nn import OrthogonalRNN

from .matrices import distance, weight_of
from .page import Section, notes, short, table
from .plan import Clock, Plan
from .race import Runner, best, outcome, race
from .recipes import RECIPES, Recipe
from .steps import CONTENDERS, Contender, present

__all__ = ["run"]

_HEAD = ["", "best rate", "steps", "seconds", "ms a step", "orthogonality error"]
_BATCH = 16
# All with plain gradient descent.
_QUICK_LEARNERS = (
    "ProjUNN-T, rank 1",
    "ProjUNN-T, rank 8",
    "Cayley, dense",
    "geoopt SGD, QR",
    "POGO",
    "parametrization, cayley",
)
_LEARNERS = (
    *_QUICK_LEARNERS,
    "ProjUNN-D, rank 1",
    "ProjUNN-D, rank 8",
    "Expm, dense",
    "geoopt SGD, canonical",
    "parametrization, matrix_exp",
    "geotorch, cayley",
    "projUNN authors, T, rank 1",
    "projUNN authors, D, rank 1",
)
_COPY_HIDDEN, _COPY_BATCH = 128, 32
_COPY_LEARNERS = (  # a step is a long one, so fewer take part
    "unconstrained, Adam",
    "ProjUNN-T, rank 1, RMSprop base",
    "Cayley, dense, RMSprop base",
    "geoopt Adam, QR",
)
_COPY_RATES, _DIGIT_RATES = (1e-3, 3e-3), (1e-3, 2e-3, 4e-3)


# A matrix ------------------------------------------------------------------------


def _haar(n: int, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=dtype, generator=source))
    haar: Tensor = q * r.diagonal().sgn()
    return haar


def _matrix_runner(c: Contender, start: Tensor, goal: Tensor, rate: float, seed: int) -> Runner:
    module = c.column.module(start)
    optimizer = c.column.optimizer(module, rate)

    source = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(goal.shape[-1], _BATCH, dtype=goal.dtype, generator=source)

    def step(z: Tensor) -> None:
        size = goal.shape[-1]
        c.column.descend(module, optimizer, lambda w: ((w @ z - goal @ z) / size) @ z.mH)

    def off() -> float:
        return distance(weight_of(module))

    def score() -> float:
        gap = torch.linalg.vector_norm(weight_of(module) - goal)
        return float(gap) ** 2 / (2 * goal.shape[-1])

    return Runner(c.name, rate, step, score, off, draw)


def _matrices(plan: Plan, dtype: torch.dtype, seconds: float) -> tuple[list[str], dict[str, float]]:
    n = plan.target_size
    source = torch.Generator().manual_seed(plan.seed)
    start, goal = (_haar(n, dtype, source) for _ in range(2))
    if not dtype.is_complex:  # the two components of O(n) are not connected
        goal[:, 0] *= torch.linalg.det(start).sign() * torch.linalg.det(goal).sign()
    words = ("unitary", "complex64") if dtype.is_complex else ("orthogonal", "float32")
    chosen = _LEARNERS if plan.full else _QUICK_LEARNERS
    contenders, absent = present([c for c in CONTENDERS if c.name in chosen])
    runners, refused = [], {}
    for c in contenders:
        for rate in plan.rates:
            try:
                runners.append(_matrix_runner(c, start.clone(), goal, rate, plan.seed))
            except Exception as error:  # a peer that refuses is a result
                refused[c.name] = type(error).__name__
    race(
        runners,
        target=plan.target,
        every=5,
        most=20_000,
        seconds=seconds,
        turn=0.05,
        seed=plan.seed,
        title=f"{words[0]} target",
    )
    values = {}
    for name, runner in best(runners).items():
        if runner.reached:
            values[f"target/{words[0]}/{name}"] = runner.seconds
    lines = [
        f"### A random {words[0]} matrix, n = {n}, {words[1]}",
        "",
        f"It is learned from its action on {_BATCH} random vectors z at a time, by stochastic "
        "gradient descent on half the mean squared error, times a constant that makes 1 a full "
        "step, until ‖X − U‖² is "
        f"{plan.target:g} of 2 n, about its value at the start. Looked at every 5 steps. "
        f"Rates {_grid(plan.rates)}.",
        "",
        *table(_HEAD, ([name, *outcome(r)] for name, r in best(runners).items())),
        "",
        *notes(refused),
        *absent,
        "",
    ]
    return lines, values


# Nets -----------------------------------------------------------------------------


def _endless(task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    while True:
        yield from task.train_batches(source)


def _net(task: Task, hidden: int, seed: int) -> SequenceModel:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        rnn = OrthogonalRNN(task.features, hidden, nonlinearity=task.nonlinearity, init=task.init)
        return SequenceModel(rnn, hidden, task)
    finally:
        torch.set_rng_state(state)


def _net_runner(
    recipe: Recipe,
    task: Task,
    model: SequenceModel,
    rate: float,
    seed: int,
    score: Callable[[SequenceModel, Sequence[float]], float],
) -> Runner:
    optimizers = recipe.build(model, rate)
    recent: deque[float] = deque(maxlen=10)
    batches = _endless(task, seed)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with cached():  # a parametrization works once in a forward pass
            loss = task.loss(model(batch[0]), batch[1])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        recent.append(loss.item())

    def off() -> float | None:
        if recipe.name.startswith("unconstrained"):
            return None
        return distance(weight_of(model.rnn, "weight_hh_l0"))

    return Runner(recipe.name, rate, step, lambda: score(model, recent), off, lambda: next(batches))


def _nets(
    plan: Plan,
    task: Task,
    *,
    learners: Sequence[str],
    hidden: int,
    rates: Sequence[float],
    score: Callable[[SequenceModel, Sequence[float]], float],
    target: float,
    every: int,
    most: int,
    seconds: float,
    title: str,
    words: str,
) -> list[str]:
    recipes = [r for r in RECIPES if r.missing() is None and r.name in learners]
    runners = [
        _net_runner(recipe, task, _net(task, hidden, plan.seed), rate, plan.seed, score)
        for recipe in recipes
        for rate in rates
    ]
    race(
        runners,
        target=target,
        every=every,
        most=most,
        seconds=seconds,
        turn=0.3,
        seed=plan.seed,
        title=title,
    )
    rows = ([name, *outcome(r)] for name, r in best(runners).items())
    missing = {
        r.name: why for r in RECIPES if r.name in learners and (why := r.missing()) is not None
    }
    return [f"### {title}", "", words, "", *table(_HEAD, rows), "", *notes(missing), ""]


def _digits(plan: Plan, seconds: float) -> list[str]:
    task = Digits()
    inputs, targets = task.test_batch()

    def wrong(model: SequenceModel, recent: Sequence[float]) -> float:
        model.eval()
        with torch.no_grad():
            share = 1 - task.accuracy(model(inputs), targets)
        model.train()
        return share

    return _nets(
        plan,
        task,
        learners=[r.name for r in RECIPES if r.name != "ProjUNN-T, rank 1"],
        hidden=task.hidden,
        rates=_DIGIT_RATES,
        score=wrong,
        target=0.05 + 1e-9,  # 18 of 360 is on it
        every=task.batches_per_epoch,
        most=plan.digits_epochs * task.batches_per_epoch,
        seconds=seconds,
        title="Digits, pixel by pixel, to 95 %",
        words=f"An orthogonal RNN of {task.hidden} states as in the demo, looked at after every "
        f"epoch of {task.batches_per_epoch} steps; what came nearest is the share of test images "
        f"it gets wrong. Rates {_grid(_DIGIT_RATES)}, the recurrence at 1/32 of them, no schedule.",
    )


def _copying(plan: Plan, seconds: float) -> list[str]:
    task = Copy(delay=200, batch_size=_COPY_BATCH)
    return _nets(
        plan,
        task,
        learners=_COPY_LEARNERS,
        hidden=_COPY_HIDDEN,
        rates=_COPY_RATES,
        score=lambda model, recent: statistics.fmean(recent),
        target=0.03,
        every=10,
        most=plan.copy_steps,
        seconds=seconds,
        title="Copying memory over 200 steps, to a loss of 0.03",
        words=f"{_COPY_HIDDEN} states, batches of {_COPY_BATCH}, the mean loss of ten steps; "
        f"without memory it is {short(task.baseline, 3)}. Rates {_grid(_COPY_RATES)}.",
    )


def _grid(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def run(plan: Plan, clock: Clock) -> Section:
    parts = 5 if plan.full else 1  # the nets take longer: twice the time of both matrices
    lines, values = _matrices(plan, torch.complex64, clock.left / (2 * parts))
    more, found = _matrices(plan, torch.float32, clock.left / (2 * parts - 1))
    lines, values = lines + more, values | found
    if plan.full:
        lines += _digits(plan, 0.45 * clock.left)
        lines += _copying(plan, 0.95 * clock.left)
    words = (
        "Every optimizer has the same few learning rates, runs with all of them, in turn with the "
        "others, and the rate with the shortest time is shown; where none reaches the target, the "
        "one that came nearest. Time is that of the steps, with their gradients, and does not hold "
        "the looks at the score. A race ends when its time is up, however far they are."
    )
    return Section("Time and steps to a target", [words, "", *lines], values)
