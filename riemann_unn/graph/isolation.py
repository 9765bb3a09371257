"""Isolation: running a model's code without changing the model."""

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

__all__ = ["drop_references", "preserved", "silenced", "without_weak_references"]


def preserved(model: nn.Module) -> ExitStack:
    """Restore attributes of modules and the global random states at exit.

    Tensors that were written in place are not restored.
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


def silenced() -> ExitStack:
    """Suppress torch's logs and warnings on tensors without values; errors report the same."""
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


def drop_references(mode: Any) -> None:
    """Drop the weak references that a fake tensor mode keeps to the real tensors.

    Its attributes are private and may change; :func:`without_weak_references` collects the rest,
    which takes longer.
    """
    meta = getattr(getattr(mode, "fake_tensor_converter", None), "meta_converter", None)
    describer = getattr(meta, "describer", None)
    for name in ("lookup_tensor", "lookup_storage"):
        known = getattr(describer, name, None)
        if known is not None:
            known.clear()


# A collection may free the last references to objects that only the next one frees.
_COLLECTIONS = 4


def without_weak_references(model: nn.Module) -> ExitStack:
    """Leave no weak references to tensors of a model, as fake tensors keep them.

    With weak references ``torch.utils.swap_tensors`` refuses a parameter. The body must have
    dropped all fake tensors; cycles of them are collected here.
    """
    tensors = [*model.parameters(), *model.buffers()]
    counts = list(map(getweakrefcount, tensors))

    def collect() -> None:
        # torch's exporter keeps these until its next call.
        getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
        for _ in range(_COLLECTIONS):
            now = map(getweakrefcount, tensors)
            if all(n <= before for n, before in zip(now, counts, strict=True)):
                break
            gc.collect()

    return afterwards(collect)
