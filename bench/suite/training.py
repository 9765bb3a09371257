"""Whole training steps of a recurrent net, and the share of them that the optimizer takes."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.parametrize import cached
from tqdm import tqdm

from riemann_unn.demo.models import SequenceModel
from riemann_unn.demo.tasks import Copy
from riemann_unn.nn import OrthogonalRNN

from .matrices import distance, weight_of
from .page import Section, short, table
from .plan import Clock, Plan
from .recipes import RECIPES, Recipe

__all__ = ["run"]


@dataclass
class Trained:
    """A net in training, with the seconds of its steps and of its optimizer's part of them."""

    name: str
    model: SequenceModel
    optimizers: list[torch.optim.Optimizer]
    weight: Callable[[], Tensor]
    whole: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    def step(self, task: Copy, inputs: Tensor, targets: Tensor) -> None:
        begin = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with cached():  # a parametrization works once in a forward pass
            loss = task.loss(self.model(inputs), targets)
        loss.backward()
        middle = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        end = time.perf_counter()
        self.whole.append(end - begin)
        self.optimizer.append(end - middle)


def _prepare(recipe: Recipe, plan: Plan, task: Copy) -> Trained:
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(plan.seed)
        rnn = OrthogonalRNN(task.features, plan.hidden[0])
        model = SequenceModel(rnn, plan.hidden[0], task)
    finally:
        torch.set_rng_state(torch_state)
    optimizers = recipe.build(model, 1e-4)
    return Trained(recipe.name, model, optimizers, lambda: weight_of(rnn, "weight_hh_l0"))


def run(plan: Plan, clock: Clock) -> Section:
    hidden, batch, length = plan.hidden
    task = Copy(delay=max(length - 20, 1), batch_size=batch, batches=1)
    (inputs, targets) = next(iter(task.train_batches(torch.Generator().manual_seed(plan.seed))))
    recipes = [recipe for recipe in RECIPES if recipe.missing() is None]
    if not plan.full:
        recipes = recipes[:3]
    runs = [_prepare(recipe, plan, task) for recipe in recipes]
    for trained in runs:  # sets up states
        trained.step(task, inputs, targets)
        trained.whole.clear()
        trained.optimizer.clear()
    shuffle = random.Random(plan.seed)
    done = 0
    for done in tqdm(range(1, plan.training_steps + 1), desc="training steps", leave=False):
        for trained in shuffle.sample(runs, len(runs)):
            trained.step(task, inputs, targets)
        if clock.left < 0 and done < plan.training_steps:
            break
    plain = next(t for t in runs if t.name.startswith("unconstrained"))
    forward = _mean(plain.whole) - _mean(plain.optimizer)
    rows, values = [], {}
    for trained in runs:
        whole, part = _mean(trained.whole), _mean(trained.optimizer)
        if trained.name.startswith("parametrization"):
            part = max(whole - forward, part)  # its map runs in the forward and backward pass
        values[f"training/{trained.name}"] = part / whole
        error = "" if trained is plain else short(distance(trained.weight()), 1)
        rows.append(
            [
                trained.name,
                short(1e3 * whole, 3),
                short(1e3 * part, 3),
                f"{short(100 * part / whole)} %",
                short(100 * statistics.median(trained.optimizer) / whole) + " %",
                error,
            ]
        )
    words = (
        f"An `OrthogonalRNN` of {hidden} states reads {batch} sequences of {task.delay + 20} steps "
        f"in each of {done} training steps. Whole steps and the optimizer's part are means; the "
        "optimizer's share counts everything it does, also for the weights without a constraint. "
        "A parametrization works in the forward and backward pass: its part is what its whole step "
        "takes longer than the forward and backward pass of the unconstrained net."
    )
    head = ["", "step ms", "optimizer ms", "share", "median share", "orthogonality error"]
    return Section("Whole training steps", [words, "", *table(head, rows)], values)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan
