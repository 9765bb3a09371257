"""Running a model's own code without leaving a mark on the model."""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack

from torch import nn

from ..interruption import afterwards, random_states

__all__ = ["quiet", "untouched"]


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
