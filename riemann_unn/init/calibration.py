"""Calibration data: the forms of ``calibration=`` that all initializers accept.

====================================  ==============================================================
``calibration=``                      what the model is called with
====================================  ==============================================================
a tensor                              ``model(x)``, one batch
a tuple                               ``model(*inputs)``, one batch of positional inputs
a dict, or another ``Mapping``        ``model(**inputs)``, one batch of keyword inputs
a list, a ``DataLoader``, a           one batch after another, each a tensor, a tuple or list of
generator, any other iterable         positional inputs, or a dict; it is read once
any of these, with ``forward=``       ``forward(model, batch)``, the batch passed as it is
====================================  ==============================================================

Labels are left out, by one rule for every tuple, list and dict:

- Positional entries fill the parameters that the model's forward requires, at least one (all are
  passed to ``*args``). What is left over are labels. Where forward has an optional parameter in
  that place it may be an input as well, so that this is an error: name such inputs in a dict.
  Flags (True or False by default) and parameters with the name of labels are no such place.
- Keywords are passed if forward accepts them. Others are left out if they are ``label``,
  ``labels``, ``target`` or ``targets``; any other name is an error.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..graph.program import unwrapped

__all__ = [
    "Batch",
    "Forward",
    "Split",
    "batches_of",
    "cannot_run",
    "cloned",
    "examples",
    "split",
    "tensors_of",
]

Forward = Callable[[nn.Module, Any], Any]
_LABELS = ("label", "labels", "target", "targets")
_HELD_OUT_SHARE = 5  # one in this many
_GRAMMAR = (
    "give a tensor, a tuple of positional inputs, a dict of keyword inputs, or an iterable of "
    "batches such as a DataLoader; for anything else forward=, a function (model, batch) -> output"
)
_ONE_OR_SEVERAL = "a tuple is one batch, a list is several"


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of a model or a layer, which may modify copies of them.

    Attributes:
        args: positional arguments; with ``forward`` the batch alone.
        kwargs: keyword arguments.
        forward: how to call a model instead.
        number: its index in the calibration data.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forward: Forward | None = None
    number: int = 0

    def __call__(self, module: nn.Module) -> Any:
        if self.forward is not None:
            return self.forward(module, cloned(self.args[0]))
        return module(*cloned(self.args), **cloned(self.kwargs))

    def __str__(self) -> str:
        parts = [_described(value) for value in self.args]
        parts += [f"{name}: {_described(value)}" for name, value in self.kwargs.items()]
        return ", ".join(parts)


class Split(NamedTuple):
    """Batches for fitting, and held-out batches."""

    fit: list[Batch]
    held_out: list[Batch]


def batches_of(
    calibration: Any, model: nn.Module, *, forward: Forward | None = None
) -> list[Batch]:
    """Return calibration data as a list of batches, without labels.

    Args:
        calibration: the data, in the grammar of this module.
        model: the model, whose forward determines which entries are inputs.
        forward: how to run it on a batch, ``(model, batch) -> output``; the batches are then passed
            on unchanged.

    Raises:
        TypeError: the data, one batch, or ``forward`` is something else.
        ValueError: there is no batch, one is empty, holds NaN, infinity or meta tensors, or has
            inputs that forward does not take.
    """
    if forward is not None and not callable(forward):
        raise TypeError(f"forward= is a function (model, batch) -> output, got {forward!r}")
    alone = (Tensor, PackedSequence, tuple, Mapping)
    if isinstance(calibration, alone):
        items = [calibration]
    elif isinstance(calibration, Iterable) and not isinstance(calibration, (str, bytes)):
        items = list(calibration)
    else:
        raise TypeError(f"calibration is a {type(calibration).__name__}; {_GRAMMAR}")
    if not items:
        raise ValueError(
            "calibration is empty, it holds no batch; give at least one (a generator is read once)"
        )
    if forward is not None:
        return [Batch((item,), {}, forward, i) for i, item in enumerate(items)]
    signature = _signature(model)
    found = []
    for i, item in enumerate(items):
        batch = _batch(item, i, signature)
        _check_values(batch)
        found.append(batch)
    return found


def _signature(model: nn.Module) -> inspect.Signature | None:
    """Return the signature of the wrapped model's forward, if there is one."""
    try:
        return inspect.signature(unwrapped(model).forward)
    except (TypeError, ValueError):
        return None


def _batch(item: Any, i: int, signature: inspect.Signature | None) -> Batch:
    if isinstance(item, (Tensor, PackedSequence)):
        return Batch((item,), {}, number=i)
    if isinstance(item, Mapping):
        return Batch((), _keywords(item, i, signature), number=i)
    if isinstance(item, (tuple, list)):
        return Batch(_positional(tuple(item), i, signature), {}, number=i)
    raise TypeError(f"calibration batch {i} is a {type(item).__name__}; {_GRAMMAR}")


def _positional(
    entries: tuple[Any, ...], i: int, signature: inspect.Signature | None
) -> tuple[Any, ...]:
    """Leave the labels out of positional inputs."""
    if signature is None:
        return entries
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return entries
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not places:
        raise ValueError(
            f"calibration batch {i} has positional inputs, and the model's forward{signature} "
            "takes none; give a dict of keyword inputs"
        )
    sure = max(1, sum(p.default is p.empty for p in places))
    for place, p in enumerate(places[sure : len(entries)], start=sure):
        if p.name not in _LABELS and not isinstance(p.default, bool):
            names = ", ".join(f"'{q.name}': ..." for q in places[: place + 1])
            raise ValueError(
                f"entry {place} of calibration batch {i} may be labels, or the optional input "
                f"{p.name!r} of the model's forward. If it is that input give a dict, {{{names}}}; "
                "otherwise leave it out, or pass forward=lambda model, batch: model(batch[0])"
            )
    return entries[:sure]


def _keywords(
    items: Mapping[Any, Any], i: int, signature: inspect.Signature | None
) -> dict[str, Any]:
    """Leave the labels out of keyword inputs that the model does not take."""
    named = dict(items)
    parameters = [] if signature is None else list(signature.parameters.values())
    if signature is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return named
    taken = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [name for name in named if name not in taken and name not in _LABELS]
    if unknown:
        raise ValueError(
            f"calibration batch {i} has {', '.join(map(repr, unknown))}, and the model's forward "
            f"takes {', '.join(map(repr, taken)) or 'no keywords'}; leave out or rename what it "
            "does not take. A model that takes the dict itself is given it in a tuple, (batch,)"
        )
    return {name: value for name, value in named.items() if name in taken}


def _check_values(batch: Batch) -> None:
    i = batch.number
    tensors = tensors_of((batch.args, batch.kwargs))
    if not tensors or all(t.numel() == 0 for t in tensors):
        raise ValueError(f"calibration batch {i} is empty, it holds no example; {_GRAMMAR}")
    for t in tensors:
        if t.is_meta:
            raise ValueError(
                f"calibration batch {i} is on the meta device, where tensors have no values; give "
                "inputs on the device of the model"
            )
        if not _is_finite(t):
            raise ValueError(
                f"calibration batch {i} holds NaN or infinity ({_described(t)}); leave such "
                "examples out. In a mask, torch.finfo(dtype).min stands for minus infinity"
            )


def _is_finite(t: Tensor) -> bool:
    if not (t.is_floating_point() or t.is_complex()):
        return True
    if t.layout is torch.sparse_coo:
        t = t.detach().coalesce().values()
    elif t.layout is not torch.strided:
        t = t.values()
    try:
        return bool(torch.isfinite(t).all())
    except NotImplementedError:  # eight-bit floats
        return True


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in nested mappings, tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_of(v)]
    return []


def cloned(value: Any) -> Any:
    """Copy the tensors of arguments, so that operations in place do not change them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(cloned(v) for v in value)
    if type(value) is dict:
        return {k: cloned(v) for k, v in value.items()}
    return value


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return f"({', '.join(map(_described, value))})"
    return type(value).__name__


# Holding out ---------------------------------------------------------------


def _entries(batch: Batch) -> list[Any] | None:
    """Return the arguments of a batch, or None where it cannot be taken apart."""
    if batch.forward is None:
        return [*batch.args, *batch.kwargs.values()]
    value = batch.args[0]
    if isinstance(value, Tensor):
        return [value]
    if type(value) is dict:
        return list(value.values())
    return list(value) if type(value) is tuple else None


def examples(batch: Batch) -> int | None:
    """Return how many examples a batch holds: the first dimension that its tensors share.

    None if they do not share it, or if the batch holds more than tensors and single numbers, which
    cannot be divided into examples.
    """
    entries = _entries(batch)
    if entries is None or not all(
        value is None or isinstance(value, (Tensor, bool, int, float)) for value in entries
    ):
        return None
    tensors = [t for t in entries if isinstance(t, Tensor) and t.ndim > 0]
    if any(t.layout is not torch.strided or t.is_nested for t in tensors):
        return None
    counts = {t.shape[0] for t in tensors}
    return counts.pop() if len(counts) == 1 else None


def _part(value: Any, chosen: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value if value.ndim == 0 else value[chosen.to(value.device)]
    if type(value) is tuple:
        return tuple(_part(v, chosen) for v in value)
    if type(value) is dict:
        return {k: _part(v, chosen) for k, v in value.items()}
    return value


def split(batches: Sequence[Batch]) -> Split:
    """Hold out one in five batches, at least one of several; of a single one, examples.

    Args:
        batches: at least one. A single one is kept whole if it cannot be split into
            :func:`examples`, or holds fewer than five.
    """
    if len(batches) > 1:
        share = min(_HELD_OUT_SHARE, len(batches))
        kept = [b for i, b in enumerate(batches) if i % share != share - 1]
        return Split(kept, list(batches[share - 1 :: share]))
    (batch,) = batches
    count = examples(batch)
    if count is None or count < _HELD_OUT_SHARE:
        return Split([batch], [])
    held = torch.arange(count) % _HELD_OUT_SHARE == _HELD_OUT_SHARE - 1
    fit, rest = [
        Batch(_part(batch.args, chosen), _part(batch.kwargs, chosen), batch.forward)
        for chosen in (~held, held)
    ]
    return Split([fit], [rest])


# Errors --------------------------------------------------------------------

_OF_DTYPES = re.compile(
    r"d(ata)?[ -]?type|scalar type|Input type|not implemented for '|not supported"
)
_CASTS = {
    torch.float16: ".half()",
    torch.bfloat16: ".bfloat16()",
    torch.float32: ".float()",
    torch.float64: ".double()",
}


def cannot_run(error: Exception, batch: Batch, model: nn.Module) -> ValueError:
    """Return the error for a model that does not run on a batch, with cause and remedy.

    Args:
        error: what the model raised.
        batch: what it was run on.
        model: the model.
    """
    return ValueError(
        f"the model cannot be run on calibration batch {batch.number}: {type(error).__name__}: "
        f"{str(error).rstrip('. ')}. The batch holds {batch}. {_remedy(error, batch, model)}. "
        + (
            ""
            if batch.number == 0 or batch.forward
            else f"It is one of several: {_ONE_OR_SEVERAL}. "
        )
        + "The model was not changed"
    )


def _remedy(error: Exception, batch: Batch, model: nn.Module) -> str:
    given, own = tensors_of((batch.args, batch.kwargs)), list(model.parameters())
    here, there = {str(t.device) for t in given}, {str(p.device) for p in own}
    if here and there and not here <= there:
        return (
            f"The batch is on {_listed(here)} and the model on {_listed(there)}: move one of them, "
            f"such as by .to({min(there)!r})"
        )
    dtypes = {t.dtype for t in given}
    wanted = {p.dtype for p in own if p.is_floating_point() or p.is_complex()}
    if _OF_DTYPES.search(str(error)):
        if "'indices'" in str(error):
            return f"The batch is {_listed(dtypes)}, and an embedding takes integers: .long()"
        if len(wanted) == 1 and dtypes - wanted:
            (dtype,) = wanted
            cast = _CASTS.get(dtype, f".to({dtype})")
            return (
                f"The batch is {_listed(dtypes - wanted)} and the model {dtype}: give the inputs "
                f"as {cast} (autocast is off here)"
            )
    layouts = {t.layout for t in given} - {torch.strided}
    if layouts:
        return f"The batch is {_listed(layouts)}; if the model takes none, .to_dense()"
    if batch.forward is not None:
        return "It was run by forward=, which is given the model and the batch"
    return (
        f"A batch holds the inputs of the model's forward: {_ONE_OR_SEVERAL}, and forward= takes "
        "what is neither"
    )


def _listed(things: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, things)))
