"""Tag memory: modules record which of their parameters were tagged, and by what path.

Whatever replaces a parameter (a sharding, a move from the meta device, a quantiser) drops its tag.
The parameter's slot in its module stays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..errors import LostTagError
from ..manifolds import MatrixManifold
from .attribute import is_constrained
from .causes import cause_and_remedy
from .flattened import FSDP1, is_flat
from .foreign_optimizers import watch_foreign_optimizers

__all__ = [
    "TagMemory",
    "forget_",
    "on_untagging",
    "refuse_lost_in",
    "refuse_replaced",
    "remember_",
]

_ATTRIBUTE = "_tag_memory"


class Tagged(NamedTuple):
    """The record of one tagged parameter."""

    manifold: MatrixManifold
    was_meta: bool


class TagMemory:
    """The parameters tagged below a module, by path; it is copied and pickled with the module.

    It refers to the module weakly, and to no parameter: neither is kept alive by it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tagged: dict[str, Tagged] = {}
        self._bind(module)

    def _bind(self, module: nn.Module | None) -> None:
        self._module: Callable[[], nn.Module | None]
        self._module = (lambda: None) if module is None else weakref.ref(module)
        _memories.add(self)

    @property
    def module(self) -> nn.Module | None:
        """The module, or None if it was freed."""
        return self._module()

    def __getstate__(self) -> dict[str, Any]:
        # The module itself, so that a copy of it finds its own memory bound to the copy.
        return {"tagged": self.tagged, "module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.tagged = state["tagged"]
        self._bind(state["module"])
        watch_foreign_optimizers()  # a process may get its first tags by unpickling

    def slots(self, module: nn.Module | None = None) -> Iterator[tuple[str, Tagged, Slot]]:
        """Yield path, record and slot of each parameter, below the module or a copy."""
        root = self.module if module is None else module
        for path, tagged in list(self.tagged.items()) if root is not None else ():
            assert root is not None
            *parents, name = path.split(".")
            owner: nn.Module | None = root
            for parent in parents:
                owner = None if owner is None else owner._modules.get(parent)
            if owner is not None:
                yield path, tagged, Slot(owner, name)


class Slot(NamedTuple):
    """The name under which a module owns a parameter."""

    owner: nn.Module
    name: str

    @property
    def occupant(self) -> Any:
        """The current value of the slot, or None."""
        p = self.owner._parameters.get(self.name)
        return getattr(self.owner, self.name, None) if p is None else p

    @property
    def has_lost_its_tag(self) -> bool:
        """Whether the slot holds a tensor without a tag, and its original is not tagged either."""
        p = self.owner._parameters.get(self.name)
        if p is not None:
            return not is_constrained(p)
        # torch's pruning and parametrizations keep the parameter under another name.
        kept = {f"{self.name}_orig", f"parametrizations.{self.name}.original"}
        if any(is_constrained(q) for path, q in self.owner.named_parameters() if path in kept):
            return False
        return self.occupant is not None


_memories: weakref.WeakSet[TagMemory] = weakref.WeakSet()


class _Listener(Protocol):
    def forget(self, p: Tensor) -> None: ...


_listeners: weakref.WeakSet[_Listener] = weakref.WeakSet()


def _memory_of(module: nn.Module) -> TagMemory | None:
    memory: TagMemory | None = module.__dict__.get(_ATTRIBUTE)
    return memory


def remember_(module: nn.Module, paths: dict[str, MatrixManifold]) -> None:
    """Record in a module that the parameters at some paths from it are tagged."""
    memory = _memory_of(module)
    if memory is None:
        memory = TagMemory(module)
        module.__dict__[_ATTRIBUTE] = memory
    for path, manifold in paths.items():
        memory.tagged[path] = Tagged(manifold, module.get_parameter(path).is_meta)


def on_untagging(listener: _Listener) -> None:
    """Register a listener, weakly: ``listener.forget(p)`` is called for each untagged parameter."""
    _listeners.add(listener)


def forget_(target: Tensor | nn.Module) -> None:
    """Drop all records of an untagged parameter, or of those of an untagged module."""
    if isinstance(target, nn.Module):
        modules = {id(module) for module in target.modules()}
        for memory in list(_memories):
            gone = [path for path, _, slot in memory.slots() if id(slot.owner) in modules]
            for path in gone:
                del memory.tagged[path]
        for module in target.modules():
            own = _memory_of(module)
            if own is not None:  # with the records of submodules that are gone
                own.tagged.clear()
        params: Iterable[Tensor] = target.parameters()
    else:
        for memory in list(_memories):
            at = [path for path, _, slot in memory.slots() if slot.occupant is target]
            for path in at:
                del memory.tagged[path]
        params = [target]
    for p in params:
        for listener in list(_listeners):
            listener.forget(p)


def refuse_lost_in(module: nn.Module) -> None:
    """Refuse a module in which an untagged tensor has replaced a tagged parameter.

    Raises:
        LostTagError: naming the parameters, and the remedy for the first.
    """
    lost: dict[str, tuple[Tagged, Slot]] = {}
    for prefix, part in module.named_modules():
        memory = _memory_of(part)
        for path, tagged, slot in () if memory is None else memory.slots(part):
            if slot.has_lost_its_tag:
                lost[f"{prefix}.{path}" if prefix else path] = tagged, slot
    _refuse(lost)


def refuse_replaced(params: Iterable[Tensor]) -> None:
    """Refuse untagged parameters that have replaced a tagged one in any module.

    Raises:
        LostTagError: as :func:`refuse_lost_in`.
    """
    untagged = {id(p): p for p in params if not is_constrained(p)}
    lost: dict[int, tuple[str, Tagged, Slot]] = {}
    for memory in list(_memories):
        for path, tagged, slot in memory.slots():
            found = id(slot.owner._parameters.get(slot.name))
            # The longest path is that from the outermost module.
            if found in untagged and len(path) >= len(lost.get(found, ("",))[0]):
                lost[found] = path, tagged, slot
    in_order = [lost[key] for key in untagged if key in lost]
    _refuse({path: (tagged, slot) for path, tagged, slot in in_order})
    for p in untagged.values():
        if is_flat(p):
            _refuse_flat(p)


def _refuse(lost: dict[str, tuple[Tagged, Slot]]) -> None:
    if not lost:
        return
    path, (tagged, slot) = next(iter(lost.items()))
    what, remedy = cause_and_remedy(slot.owner, slot.occupant, was_meta=tagged.was_meta)
    others = "".join(f", {other!r}" for other in list(lost)[1:4])
    others += f" and {len(lost) - 4} more" if len(lost) > 4 else ""
    also = f" (so have {others[2:]})" if others else ""
    raise LostTagError(
        f"{path!r} of {type(slot.owner).__name__} was tagged {tagged.manifold!r} and is now "
        f"{what}{also}; {remedy}. Where it is to be free, call riemann_unn.untag_"
    )


def _refuse_flat(flat: Any) -> None:
    for name, module, path in flat._param_infos:
        memory = _memory_of(module)
        if memory is not None and name in memory.tagged:
            raise LostTagError(
                f"{f'{path}.{name}'.lstrip('.')!r} was tagged {memory.tagged[name].manifold!r} "
                f"and is now part of a flat parameter: {FSDP1}"
            )
