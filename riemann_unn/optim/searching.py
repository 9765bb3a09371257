"""Line-search bases: torch's L-BFGS, which evaluates the loss several times in a step.

The class is wrapped as it is. It sees a zero tensor in the place of every tagged parameter and
moves it along a line; each of its evaluations runs the closure at the point of the corresponding
curve from the last accepted point, and returns the gradient there. Each call takes one iteration
and starts at zero again, so that nothing has to be transported along a curve.
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
from .coordinates import Coordinates, JointCurve, Point
from .descent import loss_value
from .entries import COORDINATES, STEP
from .states import as_tensor, coordinates_of
from .tagged import TaggedParam, admit_

if TYPE_CHECKING:
    from .optimizer import ManifoldOptimizer

__all__ = ["check_search", "search_"]

_SET_VALUE = Tensor.data.__set__  # type: ignore[attr-defined]
_SET_GRAD = Tensor.grad.__set__  # type: ignore[union-attr]
# Entries of torch's state from which it builds the next pair, vectors over all parameters.
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
        ManifoldTypeError: there is no closure, or a parameter is not supported.
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
        if member.has_new_storage() or member.version != member.memory._version:
            member.refresh()
            member.check_supported()
    admit_([m for m in members if m.version is None], off_manifold=optimizer._off_manifold)
    return _Search(base, members, tagged.others, str(optimizer._phi), closure).run()


@dataclass
class _Evaluation:
    """One evaluation: the displacements, and the loss and gradients returned to torch's class.

    ``where`` and ``shown`` are the displacements of tagged parameters and the gradients shown for
    them, then the values and gradients of the others.
    """

    where: list[Tensor]
    shown: list[Tensor]
    value: float
    loss: Any
    point: Point
    gradient: Tensor  # of the tagged parameters, at the point itself

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
        self._untagged = [p.detach() for p in others]
        # Attributes of torch's class that it does not restore when it is copied or unpickled.
        vars(base).setdefault("_params", self._group["params"])
        vars(base).setdefault("_numel_cache", None)
        self._point, self._values = self._c.current_point(), [p.clone() for p in self._untagged]
        self._evaluations: list[_Evaluation] = []  # since the last accepted point
        self._evals, self._first, self._value = 0, None, math.inf
        self._zeros: list[Tensor] = []
        self._grads: list[Tensor | None] = [p.grad for p in self._tagged]

    def run(self) -> Any:
        """Take the step; return the first loss."""
        options = {key: self._group[key] for key in ("max_iter", "max_eval")}

        def undo() -> None:
            torch._foreach_copy_(
                [*self._memory, *self._untagged], [*self._point.values, *self._values]
            )

        def work() -> None:
            undo()  # the points with their rounding errors corrected
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
        self._c.mark_on_manifold()
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
        undoing(
            lambda: displace_(self._base, shown, [], self._closure_at_zeros),
            lambda: self._keep(before),
        )
        each(_SET_GRAD, self._tagged, self._grads)
        moves, where = self._zeros, [*self._zeros, *self._untagged]
        start, found = self._value, self._find(where)
        if self._state["n_iter"] == before.get("n_iter", 0):
            return True  # the gradient is below its tolerance
        sizes = [*moves, *(a - b for a, b in zip(self._untagged, self._values, strict=True))]
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

    def _accept(self, moves: list[Tensor], found: _Evaluation | None) -> None:
        """Move to the accepted point, and start at zero displacement there."""
        point = found.point if found else self._curve(self._c.vector(moves)).point(1.0)
        self._project_pair(point)
        self._point, self._values = point, [p.clone() for p in self._untagged]
        torch._foreach_copy_(self._memory, point.values)
        self._evaluations = []
        if found is not None:
            # From now on the gradient is the one at the point, not that along the line that led to
            # it.
            self._value = found.value
            where = [*(torch.zeros_like(m) for m in moves), *self._values]
            shown = [*self._c.tensors(found.gradient), *found.shown[len(moves) :]]
            self._evaluations = [replace(found, where=where, shown=shown)]

    def _project_pair(self, point: Point) -> None:
        """Project the vectors of the next pair on the tangent spaces at the next point."""
        state = self._state
        names = [name for name in _VECTORS if isinstance(state.get(name), Tensor)]
        moved = self._projected(point, [state[name] for name in names])
        state.update(zip(names, moved, strict=True))

    def _projected(self, point: Point, vectors: list[Tensor]) -> list[Tensor]:
        """Project vectors over all parameters, in the order of torch's class."""
        params = self._group["params"]
        counts = [p.numel() * (2 if p.is_complex() else 1) for p in params]
        at = {p: i for i, p in enumerate(params)}
        order = [at[p] for p in self._tagged]
        found = []
        for vector in vectors:
            pieces = list(vector.split(counts))
            (own,) = self._c.project(point, [torch.cat([pieces[i] for i in order])])
            for i, piece in zip(order, own.split([counts[i] for i in order]), strict=True):
                pieces[i] = piece
            found.append(torch.cat(pieces))
        return found

    # Evaluations -------------------------------------------------------------

    def _closure_at_zeros(self) -> Any:
        """Evaluate the closure at the current displacements, and set the gradients to show."""
        where = [*(z.clone() for z in self._zeros), *(p.clone() for p in self._untagged)]
        evaluation = self._find(where) or self._evaluate(where)

        def put_in_place() -> None:
            each(_SET_VALUE, self._tagged, self._zeros)
            each(_SET_GRAD, [*self._tagged, *self._others], evaluation.shown)

        without_torch_function(put_in_place)
        return evaluation.loss

    def _curve(self, vector: Tensor) -> JointCurve:
        # Its pairs are not in the tangent space at this point.
        (tangent,) = self._c.project(self._point, [vector])
        return self._c.curve(self._point, tangent)

    def _find(self, where: list[Tensor]) -> _Evaluation | None:
        return next(
            (evaluation for evaluation in reversed(self._evaluations) if evaluation.is_at(where)),
            None,
        )

    def _evaluate(self, where: list[Tensor]) -> _Evaluation:
        c, count = self._c, len(self._tagged)
        vector = c.vector(where[:count])
        is_away = bool(vector.any())
        line = self._curve(vector)
        point = line.point(1.0) if is_away else self._point
        torch._foreach_copy_(self._memory, point.values)

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
        gradient = shown = c.gradient(point, c.euclidean())
        if is_away:  # its slope along the line is that along the curve
            slope = gradient @ line.velocity(1.0) - gradient @ vector
            shown = gradient + slope / (vector @ vector) * vector
        untagged = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._others]
        evaluation = _Evaluation(
            where, [*c.tensors(shown), *untagged], value, loss, point, gradient
        )
        self._evaluations.append(evaluation)
        return evaluation


def _copied(item: tuple[str, Any]) -> tuple[str, Any]:
    """Copy the values that torch's class writes to in place."""
    name, value = item
    if isinstance(value, list):
        return name, list(value)
    return name, value.clone() if isinstance(value, Tensor) else value
