"""L-BFGS on manifolds: for deterministic problems, without a learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..errors import ManifoldError, ManifoldTypeError, StateError
from ..interruption import no_grad, undoing
from ..scalars import plain_scalars
from .coordinates import Coordinates
from .descent import Closure, Descent, Memory
from .hooks import hooked
from .states import coordinates_of
from .tagged import TaggedParams, admit_, as_groups, check_duplicates

__all__ = ["LBFGS"]

_SEARCHES = ("strong_wolfe", None)
_COORDINATES, _EUCLIDEAN = "coordinates", "Euclidean"
# Entries of the first parameter's state that hold vectors over all parameters.
_LISTS = ("steps", "changes")


class LBFGS(Optimizer):
    r"""L-BFGS on manifold parameters and others together: minimises a loss that is deterministic.

    .. math::

        d = -H \operatorname{grad} f(X), \qquad X^+ = X(t), \qquad
        y = \operatorname{grad} f(X^+) - T \operatorname{grad} f(X), \qquad s = T\,(t\,d)

    The direction d comes from the last ``history_size`` pairs (s, y) over the coordinates of all
    parameters. Square X moves along :math:`X \operatorname{Cayley}(t\,\Omega)`, in the Lie algebra,
    where vectors mean the same at every point and T does nothing; tall X along the polar factor of
    :math:`X + t D`, with T the projection P on the tangent space at X⁺, and d is projected too;
    parameters without a tag along a line. Pairs stay as they were found: P H P is definite on the
    tangent space as H is. The step t meets the strong Wolfe conditions on the loss itself, whose
    derivative along the curve is known exactly. A pair without positive curvature is left out, and
    the memory is dropped where no step along d lowers the loss. The loss never rises.

    After the first iteration a loss that was concave along it in the space of all matrices, and
    that has tagged parameters alone, is tried at :math:`-\operatorname{polar}(G)` with the
    Euclidean gradient G: a concave loss is at most its linear part, which is least there, on the
    whole manifold.

    A step runs up to ``max_iter`` iterations, each of one evaluation of the closure or a few more,
    and one evaluation to begin with. It is not for losses that change from call to call, such as
    those of mini-batches or with dropout: where the line search cannot succeed because of that it
    raises. The optimizers of :class:`ManifoldOptimizer` are.

    Args:
        params: parameters or named parameters, as ``torch.optim`` takes them, in one group. At
            least one must be tagged, see :func:`riemann_unn.tag_`.
        lr: the first step that is tried along d, and without a line search the one that is taken.
        max_iter: iterations of a step.
        max_eval: evaluations of the closure in a step, after which no iteration begins;
            1.25 ``max_iter`` by default.
        tolerance_grad: a step ends where no entry of the gradient along the manifold is larger.
        tolerance_change: a step ends where no entry of a move, or the change of the loss, is
            larger.
        history_size: number of pairs.
        line_search_fn: ``"strong_wolfe"``, or None for moves of ``lr`` times d, which may raise the
            loss.

    Shapes: whatever the manifolds take: square, tall, wide, batched, kernels; real and complex, in
    single or double precision.

    Raises:
        ManifoldError: no parameter is tagged, one is given twice, there are several groups, or an
            option is wrong.
        ManifoldTypeError: a parameter is stored in half precision or sharded, or the parameters
            are on several devices.
        OffManifoldError: a parameter does not satisfy its constraint.

    Reference:
        Huang, Gallivan and Absil, "A Broyden class of quasi-Newton methods for Riemannian
        optimization" (2015); Abrudan, Eriksson and Koivunen, "Conjugate gradient algorithm for
        optimization under unitary matrix constraint" (2009), for searches along curves of the
        group; Liu and Nocedal, "On the limited memory BFGS method" (1989). The options are those of
        :class:`torch.optim.LBFGS`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1.0,
        max_iter: int = 100,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-10,
        tolerance_change: float = 0.0,
        history_size: int = 10,
        line_search_fn: str | None = "strong_wolfe",
    ) -> None:
        groups = as_groups(params)
        for group in groups:
            check_duplicates(group["params"])
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        defaults = plain_scalars(defaults)
        for group in groups:
            _check_options(defaults | group)
        super().__init__(groups, defaults)
        self._begin()
        if not self._tagged.members():
            raise ManifoldError(
                "no parameter is tagged, so every one would be trained unconstrained; tag some "
                "with riemann_unn.tag_, or use torch.optim.LBFGS itself"
            )
        self._coordinates()

    def _begin(self) -> None:
        self._tagged = TaggedParams(self, are_replicas=False)
        self._last_step: dict[Tensor, dict[str, Tensor]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the one group there can be.

        Raises:
            ManifoldError: there is one already, since one memory holds for all parameters.
        """
        if self.param_groups:
            raise ManifoldError(
                "LBFGS takes one group of parameters, since one line search and one memory hold "
                "for all of them; give them in one list. Nothing was changed"
            )
        super().add_param_group(param_group)

    # The state -------------------------------------------------------------

    @property
    def _first(self) -> Tensor:
        first: Tensor = self.param_groups[0]["params"][0]
        return first

    def _names(self) -> list[str]:
        """Return the coordinates of each parameter by name."""
        known = {member.param: coordinates_of(member.manifold) for member in self._tagged.members()}
        return [known.get(p, _EUCLIDEAN) for p in self.param_groups[0]["params"]]

    def _load_memory(self) -> Memory:
        kept = self.state.get(self._first, {})
        return Memory(**{key: kept[key] for key in Memory.__dataclass_fields__ if key in kept})

    def _save_memory(self, memory: Memory) -> None:
        # One call, so that an interruption leaves all of it or nothing.
        self.state[self._first].update(vars(memory))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as :meth:`torch.optim.Optimizer.state_dict` does.

        The entries for all parameters together are in the state of the first, as in torch's class:
        ``n_iter``, ``func_evals``, and the pairs as lists of vectors, ``steps`` and ``changes``.
        """
        found = super().state_dict()
        found["param_groups"][0][_COORDINATES] = self._names()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as :meth:`torch.optim.Optimizer.load_state_dict` does.

        Args:
            state_dict: from :meth:`state_dict`.

        Raises:
            StateError: it is of another optimizer, or of parameters of other shapes or manifolds;
                nothing has changed.
        """
        groups = state_dict["param_groups"]
        theirs = groups[0].get(_COORDINATES) if len(groups) == 1 else None
        if theirs is None:
            raise StateError(
                "this is not a state of riemann_unn.optim.LBFGS; load it in an optimizer of the "
                "class that saved it. Nothing was loaded"
            )
        if theirs != self._names():
            raise StateError(
                f"the state is in the coordinates {theirs}, and the parameters are in "
                f"{self._names()}; tag them as they were. Nothing was loaded"
            )
        size = self._coordinates().size
        kept = dict(state_dict["state"].get(groups[0]["params"][0], {}))
        pairs = [v for key in _LISTS for v in kept.get(key, [])]
        if any(v.shape != (size,) for v in pairs):
            raise StateError(
                f"the state has vectors of {len(pairs[0])} numbers, and the parameters have "
                f"{size}: it is of others. Nothing was loaded"
            )
        super().load_state_dict(state_dict)
        self.param_groups[0].pop(_COORDINATES, None)
        if kept:  # torch casts to the dtype of the first parameter, which may not be that of all
            c = self._coordinates()
            for key in _LISTS:
                kept[key] = [v.to(c.device, c.dtype, copy=True) for v in kept.get(key, [])]
            self.state[self._first] = kept

    # The step ----------------------------------------------------------------

    # Read by Monitor: there may be no gradients when a step begins.
    needs_closure = True
    # torch wraps the step of every optimizer class by this method.
    profile_hook_step = staticmethod(hooked)  # type: ignore[assignment]

    @no_grad
    def step(self, closure: Closure | None = None) -> Any:
        """Take up to ``max_iter`` iterations.

        Args:
            closure: clears the gradients, evaluates the loss, calls its ``backward`` and returns
                it: the same at the same point.

        Returns:
            The closure's first loss.

        Raises:
            ManifoldTypeError: there is no closure, or it does not return a loss.
            NonFiniteError: the loss or its gradient is not finite at the point itself, or at every
                step along two directions.
            LineSearchError: no step lowers the loss, and the closure gives another loss at the
                same point.
            OffManifoldError: a parameter was moved off its manifold since the last step.
            LostTagError: a parameter has lost its tag since, other than by ``untag_``.
        """
        if closure is None:
            raise ManifoldTypeError(
                "LBFGS evaluates the loss several times in a step, so it needs a closure that "
                "clears the gradients, computes the loss, calls backward and returns the loss: "
                "optimizer.step(closure)"
            )
        c = self._coordinates()
        descent = Descent(closure, c, self._load_memory(), dict(self.param_groups[0]))

        def undo() -> None:
            c.write_(descent.point)

        loss = undoing(partial(descent.run_, self._save_memory), undo)
        c.mark_on_manifold()
        evaluation = descent.evaluation
        if evaluation is not None:
            norms = c.tangent_norms(evaluation.point, evaluation.gradient)
            self._last_step = {p: {"gradient": norm} for p, norm in norms.items()}
        return loss

    def _coordinates(self) -> Coordinates:
        """Return the coordinates of all parameters, after the checks."""
        self._tagged.refuse_none()
        members = self._tagged.members()
        written = [m for m in members if m.has_new_storage() or m.version != m.memory._version]
        for member in written:
            if member.is_shared:
                raise ManifoldTypeError(
                    f"{member.name} is sharded, and the inner products of L-BFGS are taken in one "
                    "process; use an optimizer with a base, such as ProjUNNT"
                )
            member.refresh()
            member.check_supported()
        found = Coordinates(members, self._tagged.others)
        admit_(written, off_manifold="raise")
        return found

    def last_step(self) -> dict[Tensor, dict[str, Tensor]]:
        """Return for each tagged parameter the norm of its ``"gradient"`` where the step ended.

        It is that of Ω for square matrices, and of W = ½ (G Xᴴ - X Gᴴ) for others.
        """
        return self._last_step


def _check_options(options: dict[str, Any]) -> None:
    """Refuse invalid options."""
    search = options["line_search_fn"]
    if search not in _SEARCHES:
        raise ManifoldError(f"line_search_fn={search!r} is unknown; choose from {_SEARCHES}")
    for key in ("max_iter", "max_eval", "history_size"):
        value, least = options[key], 0 if key == "history_size" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ManifoldError(f"{key}={value!r} must be an int of at least {least}")
    for key in ("tolerance_grad", "tolerance_change"):
        if not options[key] >= 0:
            raise ManifoldError(f"{key}={options[key]!r} must be a number of at least 0")
    if not 0 < float(options["lr"]) < math.inf:
        raise ManifoldError(f"lr={options['lr']!r} must be a positive number; 1 is the usual one")
