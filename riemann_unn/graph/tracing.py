"""From a module to an fx graph, without leaving a mark on the module."""

from __future__ import annotations

import linecache
import traceback
from contextlib import ExitStack
from typing import Any

from torch import fx, nn

from ..errors import GraphError
from ..interruption import afterwards, random_states

__all__ = ["symbolic_trace", "untouched"]

_LAYERS = __name__.partition(".")[0] + ".nn."


class _Tracer(fx.Tracer):
    """fx's tracer; remembers where it is, and takes modules it could not enter as leaves."""

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: str | None = None
        self._names: dict[int, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith(_LAYERS)
        return (
            ours
            or module_qualified_name in self.opaque
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:  # the innermost: it sees the exception first
                self.failed = self.path_of_module(m)
            raise


def symbolic_trace(model: nn.Module) -> tuple[fx.Graph, set[str]]:
    """Trace a model; submodules that fx cannot enter become leaves.

    Args:
        model: the model; its forward runs on proxies, inside :func:`untouched`.

    Returns:
        The graph, and the paths of the submodules that could not be entered.

    Raises:
        GraphError: the model's own forward cannot be traced.
    """
    opaque: set[str] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            return tracer.trace(model), opaque
        except Exception as error:
            if tracer.failed and tracer.failed not in opaque:
                opaque.add(tracer.failed)
                continue
            nodes = [n.name for n in getattr(tracer, "graph", fx.Graph()).nodes]
            place = f"after node '{nodes[-1]}'" if nodes else "at its first line"
            raise GraphError(
                f"torch.fx cannot trace {type(model).__name__}.forward {place}"
                f"{_source_line(model, error)}: {_first_line(error)}. Move the part whose Python "
                "control flow depends on data into a submodule, which then counts as one closed "
                "block, or trace the part of the model before it"
            ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")


def _source_line(model: nn.Module, error: BaseException) -> str:
    """The line of the model's own forward that failed, if it can be told."""
    code = getattr(type(model).forward, "__code__", None)
    steps = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in steps if frame.f_code is code]
    if code is None or not lines:
        return ""
    text = linecache.getline(code.co_filename, lines[-1]).strip()
    return f", at line {lines[-1]}" + (f" '{text}'" if text else "")


def untouched(model: nn.Module) -> ExitStack:
    """Undo whatever the body does to attributes of modules and to the global random states.

    Tensors that are written in place are not restored.
    """
    saved = []
    for module in model.modules():
        inner = ("_parameters", "_buffers", "_modules")
        saved.append((module, dict(vars(module)), {k: dict(vars(module)[k]) for k in inner}))
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
