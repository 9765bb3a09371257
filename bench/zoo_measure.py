"""One row of the zoo: a model is read, path-conditioned, and compared with what it was."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from zoo_authors import authors_objective, is_small
from zoo_models import Entry, perturb_

from riemann_unn.errors import GraphError
from riemann_unn.graph.opaque_modules import tensors_in
from riemann_unn.graph.program import unwrapped
from riemann_unn.init.path_condition import path_condition

__all__ = ["READINGS", "Row", "built", "change", "measure", "outputs"]

BATCH = 8
EXAMPLE = 2
READINGS = ("fx", "strict export", "jit.trace")
STAGES = ("trace", "origin_of", "path_energies", "solve")


@dataclass
class Row:
    """What was measured of a model; NaN is what was not.

    Attributes:
        source: the package that it comes from.
        name: its name.
        refused: why nothing was done, or an empty string.
        refusal: words of the expected refusal, if there is one.
        evaluation: relative change of the outputs in evaluation mode, float32.
        training: the same in training mode.
        random: the same for random scales in double precision, the larger of both modes.
        before: the objective.
        after: the objective at the end.
        authors: the objective after the authors' ten sweeps.
        rounding: relative difference of float32 and double precision, in either mode.
        is_converged: whether the solver says so.
        free: channels with a scale of their own.
        channels: all of them.
        blocks: opaque submodules, with the reason.
        closed: layers with closed channels, with the reason.
        seconds: by stage: the two passes, the whole call, and its parts.
        readings: whether other ways to read models manage, and in how many seconds.
    """

    source: str
    name: str
    refused: str = ""
    refusal: str = ""
    evaluation: float = math.nan
    training: float = math.nan
    random: float = math.nan
    before: float = math.nan
    after: float = math.nan
    authors: float = math.nan
    is_converged: bool = False
    rounding: tuple[float, float] = (math.nan, math.nan)
    free: int = 0
    channels: int = 0
    blocks: dict[str, str] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    readings: dict[str, float] = field(default_factory=dict)

    @property
    def is_refused_truly(self) -> bool:
        """Whether the refusal is the expected one."""
        is_known = bool(self.refusal) and self.refusal in self.refused
        return "there is no channel to rescale" in self.refused or is_known

    @property
    def fails(self) -> bool:
        """Whether the row misses a required bound."""
        if self.refused:
            return not self.is_refused_truly
        # The rounding of float32 is allowed.
        limits = [max(x, 2 * y) for x, y in zip((2e-6, 1e-4), self.rounding, strict=True)]
        is_exact = self.evaluation <= limits[0] and self.training <= limits[1]
        is_exact = is_exact and not self.random > 1e-9
        return not (is_exact and self.is_converged and self.after <= self.before)

    @property
    def ratio(self) -> float:
        """Seconds without the solver, over a forward and a backward pass."""
        s = self.seconds
        return (s.get("call", math.nan) - s.get("solve", 0.0)) / s.get("passes", math.nan)


def measure(entry: Entry, *, double: bool = True, readings: bool = False) -> Row:
    """Build a model, condition it, and compare."""
    row = Row(entry.source, entry.name, refusal=entry.refusal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        full = entry.full or entry.inputs
        row.seconds["passes"] = _passes(entry, built(entry), [entry.inputs(BATCH), full(BATCH)])
        example, batch = full(EXAMPLE), entry.inputs(BATCH)
        _other_readings(row, built(entry), example, READINGS if readings else READINGS[:1])
        model = built(entry).eval()
        before = [outputs(entry, model, batch, training) for training in (False, True)]
        views: list[Any] = []
        with _timed(row.seconds, views):
            spare = unwrapped(built(entry)) if double else None
            start = time.process_time()
            try:
                found = path_condition.path_condition_(model, inputs=example, forward=entry.forward)
            except (GraphError, ValueError, TypeError) as error:
                row.refused = f"{type(error).__name__}: {error}"
            row.seconds["call"] = time.process_time() - start - row.seconds.pop("kept", 0.0)
        if views:
            row.free, row.channels = int(views[0].free.sum()), len(views[0].reasons)
            row.blocks = dict(views[0].blocks)
        if not row.refused:
            after = [outputs(entry, model, batch, training) for training in (False, True)]
            row.evaluation, row.training = (
                change(a, b) for a, b in zip(before, after, strict=True)
            )
            row.before, row.after = found.objective_before, found.objective_after
            row.is_converged = found.converged
            row.authors = authors_objective(*views)
            for c in found.closed:
                row.closed.setdefault(c.layer, c.reason)
        del model
        gc.collect()
        if spare is not None and views and not row.refused:
            with suppress(RuntimeError):  # some models make single precision on their own
                row.rounding, row.random = _in_double(entry, spare, views[0], batch, before)
    gc.collect()
    return row


def built(entry: Entry) -> nn.Module:
    """The model, with the same weights every time."""
    torch.manual_seed(0)
    model = entry.make()
    perturb_(model)
    return model


def _call(entry: Entry, model: nn.Module, inputs: Any) -> list[Tensor]:
    if entry.forward is not None:
        return tensors_in(entry.forward(model, inputs))
    if isinstance(inputs, dict):
        return tensors_in(model(**inputs))
    return tensors_in(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def _passes(entry: Entry, model: nn.Module, batches: Sequence[Any]) -> float:
    """Seconds of a forward and a backward pass on the last batch; those before warm up."""
    seconds = 0.0
    model.train()
    for batch in batches:
        start = time.process_time()
        found = [x for x in _call(entry, model, batch) if x.requires_grad]
        sum(x.square().mean() for x in found).backward()
        seconds = time.process_time() - start
        model.zero_grad(set_to_none=True)
    return seconds


def outputs(entry: Entry, model: nn.Module, inputs: Any, training: bool) -> list[Tensor]:
    """What the model returns; buffers stay, random numbers are the same every time."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    model.train(training)
    with torch.no_grad():
        torch.manual_seed(1)
        found = [x.clone() for x in _call(entry, model, inputs)]
        for b, value in buffers:
            b.copy_(value)
    model.eval()
    return found


def change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest relative change of an output."""
    found = [0.0]
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return math.inf
        if a.is_floating_point():
            a, b = a.double(), b.double()
            found.append(float((a - b).norm()) / (float(a.norm()) or 1.0))
    return max(found) if all(map(math.isfinite, found)) else math.nan


@contextmanager
def _timed(seconds: dict[str, float], views: list[Any]) -> Iterator[None]:
    """Record the times of the parts of the pass, and the views."""
    kept = {name: getattr(path_condition, name) for name in STAGES}

    def timed(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            found = kept[name](*args, **kwargs)
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - start
            start = time.process_time()
            if name in ("trace", "origin_of"):
                views.append(found)
            if name == "path_energies":  # the solver divides them in place
                views.append({n: g.clone() for n, g in found.items()} if is_small(views[0]) else {})
            seconds["kept"] = seconds.get("kept", 0.0) + time.process_time() - start
            return found

        return call

    for name in STAGES:
        setattr(path_condition, name, timed(name))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(path_condition, name, function)


def _in_double(
    entry: Entry, model: nn.Module, view: Any, batch: Any, single: list[list[Tensor]]
) -> tuple[tuple[float, float], float]:
    """How far float32 is from double precision in either mode, and what random scales change.

    Scales lie between e^-3 and e^3, on every free channel; the larger change of both modes.
    """
    model, batch = model.double(), tree_map(_double, batch)
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(len(view.reasons), dtype=torch.float64, generator=generator)
    scales = scales.exp().where(view.free, 1.0)
    before = [outputs(entry, model, batch, training) for training in (False, True)]
    view.scale_({**dict(model.named_parameters()), **dict(model.named_buffers())}, scales)
    after = [outputs(entry, model, batch, training) for training in (False, True)]
    largest = max(change(a, b) for a, b in zip(before, after, strict=True))
    rounding = [change(a, b) for a, b in zip(before, single, strict=True)]
    return (rounding[0], rounding[1]), largest


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _other_readings(row: Row, model: nn.Module, example: Any, names: Sequence[str]) -> None:
    """Seconds of other ways to read the model in evaluation mode; NaN: it fails."""
    inner = unwrapped(model).eval()
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})

    def symbolic() -> object:
        return torch.fx.symbolic_trace(inner)

    def strict() -> object:
        return torch.export.export(inner, args, kwargs, strict=True)

    def scripted() -> object:
        given = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
        return torch.jit.trace(inner, **given, check_trace=False, strict=False)

    for name, read in zip(READINGS, (symbolic, strict, scripted), strict=True):
        if name not in names:
            continue
        torch.manual_seed(0)
        start = time.process_time()
        try:
            read()
        except Exception:
            row.readings[name] = math.nan
        else:
            row.readings[name] = time.process_time() - start
