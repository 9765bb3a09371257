"""Running a model's own code without leaving a mark on the model."""

from __future__ import annotations

import gc
import logging
import warnings
from contextlib import ExitStack
from typing import Any
from weakref import getweakrefcount

from torch import nn
from torch.fx.experimental import proxy_tensor

from ..interruption import afterwards, random_states

__all__ = ["forgotten", "let_go", "quiet", "untouched"]


def untouched(model: nn.Module) -> ExitStack:
    """Undo whatever the body does to attributes of modules and to the global random states.

    Tensors that are written in place are not restored.
    """
    saved = []
    for module in model.modules():
        attributes = vars(module)
        inner = {key: dict(value) for key, value in attributes.items() if isinstance(value, dict)}
        saved.append((module, dict(attributes), inner))
    restore_random_states = random_states(model)

    def restore() -> None:
        restore_random_states()
        for module, attributes, inner_dicts in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for key, values in inner_dicts.items():
                vars(module)[key].clear()
                vars(module)[key].update(values)

    return afterwards(restore)


_LOGGERS = (
    *("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export"),
    "torch._subclasses.fake_tensor",
)


def quiet() -> ExitStack:
    """Keep torch from saying what it cannot run without values; errors do."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]

    def restore() -> None:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    stack = afterwards(restore)
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    return stack


def let_go(mode: Any) -> None:
    """Drop the weak references that a mode of stand-ins keeps to what these stand for.

    What torch calls them may change; :func:`forgotten` collects what is left, which takes longer.
    """
    meta = getattr(getattr(mode, "fake_tensor_converter", None), "meta_converter", None)
    describer = getattr(meta, "describer", None)
    for name in ("lookup_tensor", "lookup_storage"):
        known = getattr(describer, name, None)
        if known is not None:
            known.clear()


# What one collection frees may hold the last reference to what the next one does.
_COLLECTIONS = 4


def forgotten(model: nn.Module) -> ExitStack:
    """Leave no weak references to tensors of a model, which stand-ins for them keep.

    With one a parameter cannot be swapped, ``torch.utils.swap_tensors``. The body must have let go
    of all stand-ins; those that refer to each other in a circle are collected here.
    """
    tensors = [*model.parameters(), *model.buffers()]
    counts = list(map(getweakrefcount, tensors))

    def collect() -> None:
        # What torch's exporter keeps of its last work, until the next.
        getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
        for _ in range(_COLLECTIONS):
            now = map(getweakrefcount, tensors)
            if all(n <= before for n, before in zip(now, counts, strict=True)):
                break
            gc.collect()

    return afterwards(collect)
