"""Searching bases: torch's L-BFGS, which evaluates the loss several times in a step.

The class is wrapped as it is. It sees a zero tensor in the place of every tagged parameter and
moves it along a line; at each of its evaluations the closure sees the point that the curve from the
last accepted one reaches, and torch's class the gradient there. So that nothing has to be carried
along a curve that bends, it is asked for one iteration at a time, and begins each at zero again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..errors import ManifoldError, ManifoldTypeError, NonFiniteError
from ..interruption import each, restoring, undoing, without_torch_function
from ..linalg import Phi
from .base import displace_
from .coordinates import Coordinates, Line, Place
from .descent import loss_value
from .entries import COORDINATES, STEP
from .states import as_tensor, coordinates_of
from .tagged import TaggedParam, admit_

if TYPE_CHECKING:
    from .optimizer import ManifoldOptimizer

__all__ = ["check_search", "search_"]

_SET_VALUE = Tensor.data.__set__  # type: ignore[attr-defined]
_SET_GRAD = Tensor.grad.__set__  # type: ignore[union-attr]
# What torch's class makes the next pair of, of all parameters.
_VECTORS = ("d", "prev_flat_grad")


def check_search(base: type[Optimizer], phi: object, group: dict[str, Any], **options: Any) -> None:
    """Refuse options that mean nothing for a base that searches along lines.

    Args:
        base: the class.
        phi: the map of the optimizer.
        group: options of groups.
        options: others that have to be None or False.

    Raises:
        ManifoldTypeError: naming the option.
    """
    if not issubclass(base, LBFGS):
        return
    chosen = {key: group[key] for key in ("rank", "max_angle")}
    for key, value in (chosen | options).items():
        if value is not None and value is not False:
            why = {
                "rank": "its memory needs the whole gradient, so pass rank=None",
                "max_angle": "its line search decides how far to go, so leave it out",
                "capturable": "it reads losses from the device, so leave it out",
                "process_group": "its inner products are those of one process, so leave it out",
            }[key]
            raise ManifoldTypeError(f"{key}={value!r} with base={base.__name__}: {why}")
    if phi not in get_args(Phi):
        raise ManifoldTypeError(
            f"{phi=} with base={base.__name__}: the slope along a curve is known for the named φ "
            f"only; choose from {get_args(Phi)}"
        )


def search_(optimizer: ManifoldOptimizer, closure: Callable[[], Any] | None) -> Any:
    """Take a step of a base that searches; return the closure's first loss.

    Args:
        optimizer: of such a base.
        closure: see :meth:`ManifoldOptimizer.step`.

    Raises:
        ManifoldTypeError: there is no closure, or a parameter cannot take part.
        ManifoldError: there are several groups, or a rank was set in the group.
        NonFiniteError: the loss is not finite where the search ends.
    """
    optimizer._take_over()
    base, tagged = optimizer.base, optimizer._tagged
    if closure is None:
        raise ManifoldTypeError(
            f"base={type(base).__name__} evaluates the loss several times in a step, so it needs a "
            "closure that clears the gradients, computes the loss, calls backward and returns the "
            "loss: optimizer.step(closure)"
        )
    if len(base.param_groups) != 1 or base.param_groups[0]["rank"] is not None:
        raise ManifoldError(
            f"base={type(base).__name__} takes one group of parameters, with rank=None"
        )
    tagged.refuse_none()
    members = tagged.members()
    for member in members:
        if member.is_shared:
            raise ManifoldTypeError(
                f"{member.name} is sharded, and the inner products of {type(base).__name__} are "
                "taken in one process; use another base"
            )
        if member.has_moved() or member.version != member.memory._version:
            member.refresh()
            member.check_kind()
    admit_([m for m in members if m.version is None], off_manifold=optimizer._off_manifold)
    return _Search(base, members, tagged.others, str(optimizer._phi), closure).run()


@dataclass
class _Asked:
    """An evaluation: where, and what torch's class is told of it.

    ``where`` and ``shown`` are the displacements of tagged parameters and the gradients shown for
    them, then the values and gradients of the others.
    """

    where: list[Tensor]
    shown: list[Tensor]
    value: float
    loss: Any
    place: Place
    gradient: Tensor  # of the tagged parameters, at the place itself

    def is_at(self, where: list[Tensor]) -> bool:
        return all(map(torch.equal, self.where, where))


class _Search:
    """One step of torch's class, iteration by iteration."""

    def __init__(
        self,
        base: Optimizer,
        members: list[TaggedParam],
        others: list[Tensor],
        phi: str,
        closure: Callable[[], Any],
    ) -> None:
        self._base, self._members, self._closure = base, members, closure
        self._group = base.param_groups[0]
        Coordinates(members, others)  # refuses what cannot be in one vector
        self._c = Coordinates(members, [], phi=phi)
        self._tagged, self._others = self._c.params, others
        self._memory = [p.detach().as_subclass(Tensor) for p in self._tagged]
        self._free = [p.detach() for p in others]
        # Its own, which torch's class loses when it is copied or unpickled.
        vars(base).setdefault("_params", self._group["params"])
        vars(base).setdefault("_numel_cache", None)
        self._place, self._values = self._c.here(), [p.clone() for p in self._free]
        self._asked: list[_Asked] = []  # since the last accepted point
        self._evals, self._first, self._value = 0, None, math.inf
        self._zeros: list[Tensor] = []
        self._grads: list[Tensor | None] = [p.grad for p in self._tagged]

    def run(self) -> Any:
        """Take the step; return the first loss."""
        options = {key: self._group[key] for key in ("max_iter", "max_eval")}

        def undo() -> None:
            torch._foreach_copy_([*self._memory, *self._free], [*self._place.values, *self._values])

        def work() -> None:
            undo()  # to points that are mended
            for _ in range(options["max_iter"]):
                left = max(options["max_eval"] - self._evals, 1)
                self._group.update(max_iter=1, max_eval=left)
                if self._iterate() or self._evals >= options["max_eval"]:
                    break
            undo()

        restoring(lambda: undoing(work, undo), lambda: self._group.update(options))
        for member in self._members:
            kept = self._base.state[member.param]
            kept[STEP] = kept.get(STEP, 0) + 1
            kept[COORDINATES] = as_tensor(coordinates_of(member.manifold), member.memory.device)
        self._c.settle()
        return self._first

    @property
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._base.state[self._group["params"][0]]
        return state

    def _keep(self, state: dict[str, Any]) -> None:
        self._base.state[self._group["params"][0]] = state

    # One iteration ---------------------------------------------------------

    def _iterate(self) -> bool:
        """Let torch's class take one iteration; return whether it was the last."""
        before = dict(map(_copied, self._state.items()))
        self._zeros = [
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in self._memory
        ]
        shown = [(p, z, z) for p, z in zip(self._tagged, self._zeros, strict=True)]
        undoing(lambda: displace_(self._base, shown, [], self._tell), lambda: self._keep(before))
        each(_SET_GRAD, self._tagged, self._grads)
        moves, where = self._zeros, [*self._zeros, *self._free]
        start, found = self._value, self._find(where)
        if self._state["n_iter"] == before.get("n_iter", 0):
            return True  # the gradient is below its tolerance
        sizes = [*moves, *(a - b for a, b in zip(self._free, self._values, strict=True))]
        size = max((float(m.abs().max()) for m in sizes if m.numel()), default=0.0)
        if size == 0:
            return True
        if self._group["line_search_fn"] is not None and (found is None or found.value > start):
            self._keep({})  # the search has failed, and the next is to begin anew
            return True
        if found is not None and not math.isfinite(found.value):
            raise NonFiniteError(
                f"the loss is {found.value} after a step of {type(self._base).__name__}; mend the "
                "loss or pass line_search_fn='strong_wolfe'. Parameters are where the iteration "
                "before left them"
            )
        self._accept(moves, found)
        least = self._group["tolerance_change"]
        is_still = found is not None and abs(found.value - start) < least
        return size <= least or is_still

    def _accept(self, moves: list[Tensor], found: _Asked | None) -> None:
        """Go to where torch's class has moved; the next iteration begins at zero there."""
        place = found.place if found else self._line(self._c.vector(moves)).point(1.0)
        self._carry(place)
        self._place, self._values = place, [p.clone() for p in self._free]
        torch._foreach_copy_(self._memory, place.values)
        self._asked = []
        if found is not None:
            # From here on the gradient is seen as it is, not along the line that led here.
            self._value = found.value
            where = [*(torch.zeros_like(m) for m in moves), *self._values]
            shown = [*self._c.tensors(found.gradient), *found.shown[len(moves) :]]
            self._asked = [replace(found, where=where, shown=shown)]

    def _carry(self, place: Place) -> None:
        """Project what the next pair is made of on the tangent spaces at the next point."""
        state = self._state
        names = [name for name in _VECTORS if isinstance(state.get(name), Tensor)]
        moved = self._projected(place, [state[name] for name in names])
        state.update(zip(names, moved, strict=True))

    def _projected(self, place: Place, vectors: list[Tensor]) -> list[Tensor]:
        """Project vectors of torch's class, in which parameters follow one another."""
        params = self._group["params"]
        counts = [p.numel() * (2 if p.is_complex() else 1) for p in params]
        at = {p: i for i, p in enumerate(params)}
        order = [at[p] for p in self._tagged]
        found = []
        for vector in vectors:
            pieces = list(vector.split(counts))
            (own,) = self._c.project(place, [torch.cat([pieces[i] for i in order])])
            for i, piece in zip(order, own.split([counts[i] for i in order]), strict=True):
                pieces[i] = piece
            found.append(torch.cat(pieces))
        return found

    # Evaluations -------------------------------------------------------------

    def _tell(self) -> Any:
        """Evaluate the closure where torch's class has moved to, and show it the gradient."""
        where = [*(z.clone() for z in self._zeros), *(p.clone() for p in self._free)]
        asked = self._find(where) or self._ask(where)

        def put_in_place() -> None:
            each(_SET_VALUE, self._tagged, self._zeros)
            each(_SET_GRAD, [*self._tagged, *self._others], asked.shown)

        without_torch_function(put_in_place)
        return asked.loss

    def _line(self, vector: Tensor) -> Line:
        # Its memory is not of the tangent spaces here.
        (tangent,) = self._c.project(self._place, [vector])
        return self._c.curve(self._place, tangent)

    def _find(self, where: list[Tensor]) -> _Asked | None:
        return next((asked for asked in reversed(self._asked) if asked.is_at(where)), None)

    def _ask(self, where: list[Tensor]) -> _Asked:
        c, count = self._c, len(self._tagged)
        vector = c.vector(where[:count])
        is_away = bool(vector.any())
        line = self._line(vector)
        place = line.point(1.0) if is_away else self._place
        torch._foreach_copy_(self._memory, place.values)

        def put_in_place() -> None:
            each(_SET_VALUE, self._tagged, self._memory)
            each(_SET_GRAD, self._tagged, self._grads)

        without_torch_function(put_in_place)
        with torch.enable_grad():
            loss = self._closure()
        self._evals += 1
        value = loss_value(loss)
        if self._first is None:
            self._first, self._value = loss, value
        self._grads = [p.grad for p in self._tagged]
        gradient = shown = c.gradient(place, c.euclidean())
        if is_away:  # along the line exactly the slope of the curve
            slope = gradient @ line.velocity(1.0) - gradient @ vector
            shown = gradient + slope / (vector @ vector) * vector
        free = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._others]
        asked = _Asked(where, [*c.tensors(shown), *free], value, loss, place, gradient)
        self._asked.append(asked)
        return asked


def _copied(item: tuple[str, Any]) -> tuple[str, Any]:
    """Copy what torch's class writes to."""
    name, value = item
    if isinstance(value, list):
        return name, list(value)
    return name, value.clone() if isinstance(value, Tensor) else value
