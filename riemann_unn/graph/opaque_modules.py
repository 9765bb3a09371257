"""Opaque modules: submodules that are one operation of the graph each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import GraphError
from .isolation import preserved

__all__ = ["OpaqueModules", "opaque_path", "tensors_in"]

_Call = tuple[list[Any], TreeSpec]  # leaves, with tensors replaced by their metadata

# Results of the calls of the opaque modules of the model being read, by path.
_CALLS: dict[str, list[_Call]] = {}


def _outputs(path: str, call: int) -> list[Tensor]:
    leaves, _ = _CALLS[path][call]
    return [x.new_empty() for x in leaves if isinstance(x, _Like)]


@torch.library.custom_op("riemann_unn::opaque", mutates_args=())
def _opaque(tensors: Sequence[Tensor], path: str, call: int) -> list[Tensor]:
    return _outputs(path, call)


@_opaque.register_fake
def _(tensors: Sequence[Tensor], path: str, call: int) -> list[Tensor]:
    return _outputs(path, call)


class _Like:
    """Shape, dtype and device of a tensor."""

    def __init__(self, x: Tensor) -> None:
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device

    def new_empty(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)


def opaque_path(target: object, args: Sequence[Any]) -> str | None:
    """Return the path of the opaque submodule of a node; None for other nodes."""
    if target is torch.ops.riemann_unn.opaque.default:
        return str(args[1])
    return None


class OpaqueModules:
    """The submodules of a model that are replaced by one operation while it is read.

    Args:
        model: the model.
        call: calls it on real inputs.
    """

    def __init__(self, model: nn.Module, call: Callable[[], object]) -> None:
        self.model, self._call = model, call
        self._replaced: list[str] = []

    def replace_(self, reasons: Mapping[str, str]) -> None:
        """Replace the forward of some submodules; the caller restores it."""
        # Submodules of opaque ones are never called.
        outer = [p for p in reasons if not any(p.startswith(f"{q}.") for q in reasons)]
        if outer != self._replaced:  # the same modules need no further run
            _CALLS.clear()
            self._run(outer)
            self._replaced = outer
        for path in outer:
            module = self.model.get_submodule(path)
            vars(module)["forward"] = _OpaqueForward(path)
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                vars(module)[hooks].clear()

    def _run(self, paths: Sequence[str]) -> None:
        """Run the model, and record the results of the submodules."""

        def record(path: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                leaves, spec = tree_flatten(output)
                kept = [_Like(x) if isinstance(x, Tensor) else x for x in leaves]
                _CALLS.setdefault(path, []).append((kept, spec))

            return hook

        handles = []
        kept = [(b, b.detach().clone()) for b in self.model.buffers()]
        try:
            with preserved(self.model), torch.no_grad():
                for path in paths:
                    module = self.model.get_submodule(path)
                    handles.append(module.register_forward_hook(record(path)))
                self._call()
        except Exception as error:
            raise GraphError(
                f"{type(self.model).__name__} does not run on the example inputs: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            for buffer, value in kept:
                buffer.detach().copy_(value)


class _OpaqueForward:
    """The forward of an opaque submodule."""

    def __init__(self, path: str) -> None:
        self._path, self._count = path, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = _CALLS[self._path][self._count]
        found = iter(_opaque(tensors_in((args, kwargs)), self._path, self._count))
        self._count += 1
        return tree_unflatten([next(found) if isinstance(x, _Like) else x for x in leaves], spec)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value: in containers, and in attributes of objects."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def visit(x: Any) -> None:
        if isinstance(x, Tensor):
            found.append(x)
            return
        if x is None or isinstance(x, (str, bytes, int, float, complex, type)) or id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, Mapping):
            x = list(x.values())
        elif not isinstance(x, (list, tuple, set, frozenset)):
            x = list(getattr(x, "__dict__", {}).values())
        for item in x:
            visit(item)

    visit(value)
    return found
