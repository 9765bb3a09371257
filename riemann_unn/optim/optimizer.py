"""The optimizer: any ``torch.optim`` class, whose displacement is applied by a retraction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ..errors import ManifoldError, NonFiniteError, OffManifoldError
from ..linalg import Phi, SketchMethod
from ..manifolds import acceptance_level, rounding_level
from ..retractions import Retraction
from .bases import check_base, unhooked_step
from .moves import MASTER, Displacement, Move, Seeds, apply_, plan, pulled_back
from .points import (
    Members,
    Point,
    Roster,
    as_groups,
    check_duplicates,
    check_kind,
    full_precision,
    nonfinite,
    without,
)
from .stacks import START, Stacks

__all__ = ["ManifoldOptimizer"]


class ManifoldOptimizer(Optimizer):
    r"""Any ``torch.optim`` class on manifold parameters: optimizer = base × retraction.

    .. math::

        \Delta_t = \mathrm{base}(\nabla f \text{ on the tangent space at } X_t), \qquad
        X_{t+1} = R_{X_t}(\Delta_t)

    In each step the base sees a zero tensor in the place of every tagged
    parameter, writes its displacement Δ there, with its own momentum, state and
    schedule, and the retraction moves the parameter by it. Untagged parameters
    get exactly what ``base`` alone would do, bit for bit. Weight decay does not
    pull tagged parameters, which cannot shrink.

    A step leaves every tagged parameter on its manifold to rounding or raises
    an error that names the parameter. Gradients and points are checked before
    anything changes; a displacement that overflows although its gradient is
    finite is caught before any tagged parameter moves, but, unless the base is
    plain SGD, after the base has stepped the others.

    For whole steps (``rank=None``) of square matrices by the exponential or
    Cayley map the base works in Lie-algebra coordinates, on
    :math:`\operatorname{skew}(X^H \nabla f)`, where momentum needs no transport.
    Parameters stored in half precision move as a master copy in float32, kept in
    the state; the stored values are its rounding.

    Args:
        params: parameters, named parameters or groups, as ``torch.optim`` takes
            them. At least one must be tagged, see :func:`riemann_unn.tag_`. A group
            may set its own ``rank`` and ``sketch``.
        lr: the base's learning rate, a float or a tensor.
        phi: the map φ: ``"exp"``, ``"cayley"`` or ``"polar"``.
        rank: columns k of the low-rank displacement; ``None`` for all of it.
        base: a class of ``torch.optim``; its arguments follow as keywords.
        sketch: how the low-rank factors are found, see :func:`riemann_unn.linalg.sketch`.
        seed: seeds the sketches, which never touch the global generator.
        nonfinite: at a gradient with NaN or infinity ``"raise"``, or ``"skip"``
            the parameter for this step.
        off_manifold: at a parameter off its manifold ``"raise"``, or
            ``"project"`` it to the nearest point.
        polish: keep rounding errors from accumulating (recommended; off for study).
        **base_kwargs: arguments of ``base``.

    Raises:
        ManifoldError: no parameter is tagged, one is given twice, or an option is wrong.
        ManifoldTypeError: ``base`` is no optimizer class, or one that cannot work.
        OffManifoldError: a parameter does not satisfy its constraint.

    Reference:
        Kiani et al., "projUNN: efficient method for training deep networks with
        unitary matrices" (2022); Lezcano-Casado, "Trivializations for
        gradient-based optimization on manifolds" (2019), section 5, for steps
        taken in the tangent space at the current point.
    """

    base: Optimizer

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        phi: Phi = "exp",
        rank: int | None = 1,
        base: type[Optimizer] = SGD,
        sketch: SketchMethod = "power",
        seed: int = 0,
        nonfinite: Literal["raise", "skip"] = "raise",
        off_manifold: Literal["raise", "project"] = "raise",
        polish: bool = True,
        **base_kwargs: Any,
    ) -> None:
        check_base(base, ManifoldOptimizer)
        if nonfinite not in ("raise", "skip"):
            raise ManifoldError(f"{nonfinite=} is unknown; choose 'raise' or 'skip'")
        if off_manifold not in ("raise", "project"):
            raise ManifoldError(f"{off_manifold=} is unknown; choose 'raise' or 'project'")
        self._phi: Phi = phi
        self._options = {"rank": rank, "sketch": sketch}
        self._seed, self._polish = int(seed), bool(polish)
        self._nonfinite, self._off_manifold = nonfinite, off_manifold
        self._retraction(self._options)
        groups = as_groups(params)
        for group in groups:
            check_duplicates(group["params"])
        inner: Any = base
        self._link(inner(groups, lr=lr, **base_kwargs))
        if not self._roster.points():
            raise ManifoldError(
                "no parameter is tagged, so every one would be trained unconstrained; tag "
                f"some with riemann_unn.tag_, or use torch.optim.{base.__name__} itself"
            )
        self._admit_new()

    # The base, its groups and its state are ours ---------------------------

    def _link(self, base: Optimizer) -> None:
        self.base = base
        for group in base.param_groups:
            self._complete(group)
        self._workspace: dict[Tensor, Tensor] = {}
        self._roster, self._stacks = Roster(base.param_groups), Stacks()
        self._rough: set[Point] = set()
        self._seeds = Seeds(self._seed)
        super().__setstate__(
            {"defaults": base.defaults, "state": base.state, "param_groups": base.param_groups}
        )

    def _complete(self, group: dict[str, Any]) -> None:
        for key, value in self._options.items():
            group.setdefault(key, value)
        self._retraction(group)

    def _retraction(self, group: dict[str, Any]) -> Retraction:
        try:
            return _make_retraction(self._phi, group["rank"], group["sketch"])
        except (TypeError, ValueError) as error:
            raise ManifoldError(str(error)) from None

    def __getstate__(self) -> dict[str, Any]:
        keys = ("base", "_phi", "_options", "_seed", "_polish", "_nonfinite", "_off_manifold")
        return {key: self.__dict__[key] for key in keys}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" in state:
            self.__dict__.update(state)
        else:  # from load_state_dict, with new groups and state for the base to take over
            self.base.__setstate__(state)
        self._link(self.base)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as :meth:`torch.optim.Optimizer.load_state_dict` does.

        The state of parameters stored in half precision keeps its own precision,
        which torch would round to theirs. A state of ``base`` alone is taken too.

        Args:
            state_dict: from :meth:`state_dict`.
        """
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        points = self._roster.points()
        for kept in (self.state.get(point.param, {}) for point in points):
            if START in kept:  # which is written in place, and may be another optimizer's too
                kept[START] = kept[START].clone()
        half = {point.param for point in points if point.is_half}
        for key, p in zip(saved, ours, strict=True):
            if p in half:
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor) and value.is_floating_point():
                        device = self.state[p][name].device
                        self.state[p][name] = value.detach().to(device, copy=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as :meth:`torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: ``params`` and options; ``rank`` and ``sketch`` may be among them.

        Raises:
            ManifoldError: a parameter is given twice or off its manifold; nothing is added.
        """
        (group,) = as_groups([param_group])
        check_duplicates(group["params"])
        self._complete(group)
        self.base.add_param_group(group)
        try:
            self._admit_new()
        except ManifoldError:
            self.param_groups.pop()
            raise

    # Who takes part, and whether it may ------------------------------------

    def _admit_new(self) -> None:
        points = [point for point in self._roster.points() if point.version is None]
        for point in points:
            check_kind(point)
        self._admit(points)

    def _admit(self, points: list[Point]) -> None:
        """Check that points are on their manifolds; mend or refuse those that are not."""
        off: list[tuple[Point, str]] = []
        for point in points:
            error = point.manifold.estimated_error(point.param)
            if not error <= acceptance_level(point.param.dtype):
                off.append((point, f"is {error:.1e} off {point.manifold!r}"))
            elif not point.manifold.has_det(point.param):
                off.append((point, f"has the other determinant than {point.manifold!r}"))
            elif error > rounding_level(point.param.dtype):
                self._rough.add(point)
        for point, reason in off:
            finite = bool(torch.isfinite(point.param).all())
            if self._off_manifold == "raise" or not finite:
                remedy = (
                    'call riemann_unn.init.warm_start_ or pass off_manifold="project"'
                    if finite
                    else "it holds NaN or infinity, so initialise it again"
                )
                raise OffManifoldError(f"{point.name} {reason}; {remedy}")
        with torch.no_grad():
            for point, _ in off:
                point.param.copy_(point.manifold.projx(point.param.detach()))
        for point in points:
            point.version = point.memory._version

    def _check_gradients(self, bad: list[Point]) -> None:
        if bad and self._nonfinite == "raise":
            raise NonFiniteError(
                f"the gradient of {', '.join(p.name for p in bad)} holds NaN or infinity; clip or "
                'rescale the loss, or pass nonfinite="skip". Nothing was changed'
            )

    def _ready(self, groups: list[Members], written: list[Point]) -> None:
        """Check the points that were written to since their last step, and find what moves."""
        if written:
            self._admit(written)
        for members in groups:
            for point in members.points:
                if point.is_half:
                    point.value = self._master(point)

    def _master(self, point: Point) -> Tensor:
        """Return the point in single precision that the stored parameter is the rounding of."""
        master = self.state.get(point.param, {}).get(MASTER)
        if master is not None and torch.equal(master.to(point.param.dtype), point.param):
            return cast(Tensor, master)
        # There is none yet, or the parameter was given other values.
        return point.manifold.projx(point.param.detach().float())

    # The step ---------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss (optional).

        Returns:
            The closure's loss, or None.

        Raises:
            NonFiniteError: a tagged parameter's gradient holds NaN or infinity,
                or its displacement overflows.
            OffManifoldError: a parameter was moved off its manifold since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, written = self._roster.with_gradients()
        early: list[Members] = []
        late: list[Members] = []
        for members in groups:
            (early if self._needs_no_base(members.points[0].group) else late).append(members)
        with full_precision(self._roster.device_types):
            moves, bad = self._plan_early(early)
            for members in late:
                bad += nonfinite(members.points, members.grads)
            self._check_gradients(bad)
            if bad:
                early, late = without(bad, early), without(bad, late)
                written = [point for point in written if point not in bad]
            self._ready(early + late, written)
            hidden = [*chain.from_iterable(members.points for members in early), *bad]
            moves += plan(self._displace(late, hidden), self.state, self._seeds, self._stacks)
            for move in moves:
                apply_(move, self.state, polish=self._polish, rough=self._rough)
        for members in early + late:
            for point in members.points:
                point.version = point.memory._version
        return loss

    def _needs_no_base(self, group: dict[str, Any]) -> bool:
        """Tell whether the gradient is the displacement, and its sketch shows if it is finite."""
        retraction = self._retraction(group)
        return (
            self._is_plain_sgd(group) and retraction.shows_nonfinite and not retraction.is_intrinsic
        )

    def _plan_early(self, groups: list[Members]) -> tuple[list[Move], list[Point]]:
        """Factor gradients before anything changes; return those with NaN or infinity too.

        This saves the pass over each gradient that a check on its own would take.
        """
        try:
            return plan(self._by_gradient(groups), self.state, self._seeds, self._stacks), []
        except NonFiniteError:
            bad = [p for members in groups for p in nonfinite(members.points, members.grads)]
            if not bad:
                raise  # it is the displacement that overflows
        if self._nonfinite == "raise":
            return [], bad
        return plan(
            self._by_gradient(without(bad, groups)), self.state, self._seeds, self._stacks
        ), bad

    def _is_plain_sgd(self, group: dict[str, Any]) -> bool:
        return type(self.base) is SGD and group["momentum"] == 0

    def _by_gradient(self, groups: list[Members]) -> list[Displacement]:
        """Plain SGD moves by -lr times the gradient: no tensor needs to be written for that."""
        return [
            Displacement(
                members.points,
                self._gradients_at(members),
                group["lr"] * (1 if group.get("maximize") else -1),
                self._retraction(group),
            )
            for members in groups
            for group in (members.points[0].group,)
        ]

    def _displace(self, groups: list[Members], hidden: list[Point]) -> list[Displacement]:
        """Run the base and return what it would add to each point; the points stay.

        The hidden ones have gradients that the base is not to see.
        """
        swapped = [m for m in groups if not self._is_plain_sgd(m.points[0].group)]
        plain = [m for m in groups if self._is_plain_sgd(m.points[0].group)]
        result = self._by_gradient(plain)
        shown = [self._gradients_at(members) for members in swapped]
        points = [*chain.from_iterable(members.points for members in groups), *hidden]
        if points and not swapped and all(p.grad is None for p in self._roster.others):
            return result  # the base has nothing to do
        kept = [(point.param, point.param.data, point.param.grad) for point in points]
        for members in swapped:
            zeros = [self._zeros(point) for point in members.points]
            retraction = self._retraction(members.points[0].group)
            result.append(Displacement(members.points, zeros, 1.0, retraction))
        try:
            for p, _, _ in kept:
                p.grad = None
            for displacement, grads in zip(result[len(plain) :], shown, strict=True):
                for point, zeros_, grad in zip(
                    displacement.points, displacement.tensors, grads, strict=True
                ):
                    point.param.data = zeros_
                    point.param.grad = grad
            unhooked_step(self.base)
        finally:
            for p, value, grad_ in kept:
                p.grad = None
                p.data = value
                p.grad = grad_
        return result

    def _gradients_at(self, members: Members) -> list[Tensor]:
        """Return gradients as the base is to see them: as they are, or in Lie coordinates."""
        points, grads = members.points, members.grads
        if any(point.is_half for point in points):
            grads = [g.float() if p.is_half else g for p, g in zip(points, grads, strict=True)]
        retraction = self._retraction(points[0].group)
        return pulled_back(points, grads, retraction) if retraction.is_intrinsic else grads

    def _zeros(self, point: Point) -> Tensor:
        # Kept between steps: allocating and faulting in fresh pages costs more than clearing.
        zeros, value = self._workspace.get(point.param), point.value
        if zeros is not None and (zeros.shape, zeros.dtype, zeros.device) == (
            value.shape,
            value.dtype,
            value.device,
        ):
            return zeros.zero_()
        zeros = self._workspace[point.param] = torch.zeros_like(value)
        return zeros


# Options are read from the groups at every step, since users may change them there.
_make_retraction = lru_cache(maxsize=64, typed=True)(Retraction)
