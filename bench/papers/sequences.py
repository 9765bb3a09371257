"""Recurrent networks built from plain options, and a loop that trains one and can be interrupted.

An orthogonal RNN, an LSTM or an unconstrained RNN reads a task of ``riemann_unn.demo.tasks``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

import riemann_unn as ru
from bench.contenders import reference_module
from riemann_unn.demo.models import SequenceModel, count_parameters, smallest
from riemann_unn.demo.tasks import Adding, Batch, Copy, Pictures, Task
from riemann_unn.nn import OrthogonalRNN, gate_inputs_

from .experiment import Options, Place, Result

__all__ = ["AUTHORS", "DEFAULTS", "build", "parameters", "task_of", "train"]

AUTHORS = "authors"
DEFAULTS: Options = {
    "model": "orthogonal",  # or "LSTM", "RNN"
    "nonlinearity": "modrelu",
    "init": "henaff",
    "algorithm": "T",  # or "D", or "authors": their code, ProjUNN-T
    "rank": 1,  # None: whole
    "sketch": "tangent",
    "base": "RMSprop",
    "slowdown": 32,  # the recurrence's rate is the others' over this
    "input_slowdown": 1,  # and so is that of the recurrent layer's other weights
    "input_gain": 1.0,  # factor on the input weights as they are drawn
    "thresholds": None,  # what modReLU's start at, None: as they are drawn
    "gates": None,  # scale of gated inputs, see riemann_unn.nn.gate_inputs_
    "decay": 1.0,  # factor on the rates after every epoch
    "weight_decay": 0.0,
    "clip": 0.0,  # largest norm of the gradient, 0: none
    "head": 0,  # width of the head's hidden layer, 0: a linear head
    "stop": None,  # a held-out loss that ends the run once two checks in a row are below it
    "seed": 0,
}
"""What a run's options are where it names none."""

_TASKS: dict[str, type[Task]] = {"copy": Copy, "adding": Adding, "pixels": Pictures}
_OTHERS: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "RNN": nn.RNN}
_EVALUATED_AT_ONCE = 1000  # sequences


def task_of(options: Options) -> Task:
    """The task of a run: its kind by name, with the arguments of the class.

    Args:
        options: Of the run; ``task`` is a name and arguments, ``head`` the width of the head.
    """
    arguments = dict(options["task"])
    kind = _TASKS[arguments.pop("name")]
    return type(kind.__name__, (kind,), {"head_width": options["head"]})(**arguments)


def build(options: Options) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A fresh model and its optimizer.

    An LSTM or an unconstrained RNN is the smallest with at least as many parameters as the
    orthogonal RNN with ``hidden`` states.

    Args:
        options: Of the run, whole.
    """
    task = task_of(options)
    torch.manual_seed(options["seed"])
    if options["model"] != "orthogonal":
        model: nn.Module = smallest(_OTHERS[options["model"]], task, parameters=parameters(options))
        base = getattr(torch.optim, options["base"])
        decay = options["weight_decay"]
        return model, base(model.parameters(), lr=options["lr"], weight_decay=decay)
    rnn = OrthogonalRNN(
        task.features,
        options["hidden"],
        nonlinearity=options["nonlinearity"],
        init=options["init"],
    )
    with torch.no_grad():
        rnn.get_parameter("weight_ih_l0").mul_(options["input_gain"])
    if options["thresholds"] is not None:
        nn.init.constant_(rnn.get_parameter("activations.0.bias"), options["thresholds"])
    if options["gates"] is not None:
        gate_inputs_(rnn, options["gates"])
    model = SequenceModel(rnn, options["hidden"], task)
    return model, _optimizer(model, options)


def _optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    if options["algorithm"] == AUTHORS:
        return _authors(model, options)
    kind = {"T": ru.optim.ProjUNNT, "D": ru.optim.ProjUNND}[options["algorithm"]]
    lr, decay = options["lr"], {"weight_decay": options["weight_decay"]}
    groups = ru.param_groups(
        model, lr=lr, tagged_lr=lr / options["slowdown"], tagged_weight_decay=0.0, **decay
    )
    if options["input_slowdown"] != 1:
        inputs = ru.param_groups(model.get_submodule("rnn"), lr=lr / options["input_slowdown"])[1:]
        head = {"params": list(model.get_submodule("head").parameters())}
        groups = [groups[0], *({**group, **decay} for group in [*inputs, head])]
    return kind(
        groups,
        lr=lr,
        rank=options["rank"],
        sketch=options["sketch"],
        base=getattr(torch.optim, options["base"]),
        seed=options["seed"],
    )


def _authors(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The authors' RMSprop with their projection, used as their scripts use it."""
    utils, optimizers = reference_module("utils"), reference_module("optimizers")

    def projector(x: Tensor, update: Tensor) -> Tensor:
        a, b = utils.LSI_approximation(update / options["slowdown"], k=options["rank"])
        return cast("Tensor", utils.projUNN_T(x.data, a, b, project_on=False))

    for _, parameter in ru.tagged_parameters(model):
        cast("Any", parameter).needs_projection = True
    found: torch.optim.Optimizer = optimizers.RMSprop(
        model.parameters(), projector=projector, lr=options["lr"]
    )
    return found


def parameters(options: Options) -> int:
    """Parameters of the orthogonal RNN of these options.

    Args:
        options: Of the run; ``model`` is not looked at.
    """
    task, hidden = task_of(options), options["hidden"]
    rnn = OrthogonalRNN(task.features, hidden, nonlinearity=options["nonlinearity"])
    return count_parameters(SequenceModel(rnn, hidden, task))


def train(options: Options, place: Place) -> Result:
    """Train one network, with a check on held-out data after every epoch.

    Interrupted at any batch, the run goes on from its last saved state, and ends with the numbers
    of a run that was not interrupted.

    Args:
        options: Of the run; what is missing is taken from ``DEFAULTS``.
        place: Where it works.

    Returns:
        ``train_loss`` of every batch; ``loss`` and ``score`` on held-out data and ``seconds_train``
        of every epoch; ``parameters``; ``off``, the largest orthogonality error of any epoch.
    """
    options = DEFAULTS | options
    run = _Training(options)
    state = place.load()
    if state is not None and state["options"] == options:  # not of a run with other options
        run.load(state)
    while not run.ended:
        for batch in run.epoch():
            run.step(batch)
            if run.batches < run.task.batches_per_epoch:
                place.save(run.state)
            place.tell(run.share, run.words)
        run.check()
        place.save(run.state)
    run.found["parameters"] = count_parameters(run.model)
    return run.found


class _Training:
    """A run's model, optimizer and history."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.task = task_of(options)
        self.model, self.optimizer = build(options)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, options["decay"])
        self.generator = torch.Generator().manual_seed(options["seed"])
        self.drawn = self.generator.get_state()  # at the start of the epoch
        self.batches = 0  # done in this epoch
        self.spent = 0.0
        self.found: Result = {
            "train_loss": [],
            "loss": [],
            "score": [],
            "seconds_train": [],
            "off": 0.0,
        }

    @property
    def ended(self) -> bool:
        epochs, stop = self.options["epochs"], self.options["stop"]
        losses = self.found["loss"]
        below = stop is not None and len(losses) >= 2 and max(losses[-2:]) < stop
        return len(losses) >= epochs or below

    @property
    def share(self) -> float:
        """How much is done."""
        epochs = len(self.found["loss"]) + self.batches / self.task.batches_per_epoch
        return float(epochs / self.options["epochs"])

    @property
    def words(self) -> str:
        score = self.found["score"]
        return f"loss {self.found['train_loss'][-1]:.4f}" + (f", {score[-1]:.1%}" if score else "")

    def epoch(self) -> Iterator[Batch]:
        """What is left of the epoch's batches."""
        self.generator.set_state(self.drawn)
        for index, batch in enumerate(self.task.train_batches(self.generator)):
            if index >= self.batches:
                yield batch

    def step(self, batch: Batch) -> None:
        inputs, targets = batch
        begin = time.perf_counter()
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(inputs), targets)
        loss.backward()
        if self.options["clip"]:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options["clip"])
        self.optimizer.step()
        self.spent += time.perf_counter() - begin
        self.found["train_loss"].append(loss.item())
        self.batches += 1

    @torch.no_grad()
    def check(self) -> None:
        """End the epoch."""
        self.model.eval()
        inputs, targets = self.task.test_batch()
        parts = inputs.split(_EVALUATED_AT_ONCE, dim=1)
        dimension = 1 if self.task.every_step else 0
        answers = torch.cat([self.model(part) for part in parts], dimension)
        self.found["loss"].append(self.task.loss(answers, targets).item())
        self.found["score"].append(self.task.accuracy(answers, targets))
        self.found["seconds_train"].append(self.spent)
        if ru.tagged_parameters(self.model):
            errors = ru.orthogonality_error(self.model).values()
            self.found["off"] = max(self.found["off"], *(error.item() for error in errors))
        self.schedule.step()
        self.drawn, self.batches, self.spent = self.generator.get_state(), 0, 0.0

    def state(self) -> dict[str, Any]:
        """All that is needed to go on."""
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            "options": self.options,
            "drawn": self.drawn,
            "batches": self.batches,
            "spent": self.spent,
            "found": self.found,
            "random": torch.get_rng_state(),  # the authors' sketches draw from it
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From ``state``.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.drawn, self.batches, self.spent = state["drawn"], state["batches"], state["spent"]
        self.found = state["found"]
        torch.set_rng_state(state["random"])
