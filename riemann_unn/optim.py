"""Optimizers: any ``torch.optim`` class, whose displacement is applied by a retraction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import geoopt
import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from .errors import ManifoldError, ManifoldTypeError, NonFiniteError, OffManifoldError
from .linalg import Phi, SketchMethod, newton_schulz_, polish_
from .manifolds import MatrixManifold, acceptance_level, rounding_level
from .retractions import Retraction
from .tagging import manifold_of

__all__ = ["ManifoldOptimizer", "ProjUNND", "ProjUNNT"]

# Matrices up to this size are cheaper to move together than one by one.
_STACK_UP_TO = 128 * 128
_REFUSED = {
    "LBFGS": "it evaluates the loss several times in a step, away from the manifold",
    "SparseAdam": "it takes sparse gradients only, and a manifold step is dense",
}
_STEP, _START = "retraction_step", "sketch_start"


@dataclass(eq=False)
class _Point:
    """A tagged parameter that takes part in a step."""

    name: str
    param: Tensor
    group: dict[str, Any]
    manifold: MatrixManifold
    grad: Tensor

    def matrices(self, x: Tensor) -> Tensor:
        return self.manifold.to_matrices(x)


@dataclass(eq=False)
class _Move:
    """Points that move in one batched call, with the factors of their displacement."""

    points: list[_Point]
    step: int
    retraction: Retraction
    a: Tensor
    b: Tensor


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
    an error that names the parameter, with the parameters unchanged.

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
        _check_base(base)
        if nonfinite not in ("raise", "skip"):
            raise ManifoldError(f"{nonfinite=} is unknown; choose 'raise' or 'skip'")
        if off_manifold not in ("raise", "project"):
            raise ManifoldError(f"{off_manifold=} is unknown; choose 'raise' or 'project'")
        self._phi: Phi = phi
        self._options = {"rank": rank, "sketch": sketch}
        self._seed, self._polish = int(seed), bool(polish)
        self._nonfinite, self._off_manifold = nonfinite, off_manifold
        self._retraction(self._options)
        groups = _as_groups(params)
        for group in groups:
            _check_duplicates(group["params"])
        inner: Any = base
        self._link(inner(groups, lr=lr, **base_kwargs))
        points = [point for group in self.param_groups for point in self._tagged(group)]
        if not points:
            raise ManifoldError(
                "no parameter is tagged, so every one would be trained unconstrained; tag "
                f"some with riemann_unn.tag_, or use torch.optim.{base.__name__} itself"
            )
        self._admit(points)

    # The base, its groups and its state are ours ---------------------------

    def _link(self, base: Optimizer) -> None:
        self.base = base
        for group in base.param_groups:
            self._complete(group)
        self._workspace: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}
        self._rough: set[Tensor] = set()
        super().__setstate__(
            {"defaults": base.defaults, "state": base.state, "param_groups": base.param_groups}
        )

    def _complete(self, group: dict[str, Any]) -> None:
        for key, value in self._options.items():
            group.setdefault(key, value)
        self._retraction(group)

    def _retraction(self, group: dict[str, Any]) -> Retraction:
        try:
            return Retraction(self._phi, group["rank"], group["sketch"])
        except ValueError as error:
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as :meth:`torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: ``params`` and options; ``rank`` and ``sketch`` may be among them.

        Raises:
            ManifoldError: a parameter is given twice or off its manifold; nothing is added.
        """
        (group,) = _as_groups([param_group])
        _check_duplicates(group["params"])
        self._complete(group)
        self.base.add_param_group(group)
        try:
            self._admit(list(self._tagged(group)))
        except ManifoldError:
            self.param_groups.pop()
            raise

    # Who takes part, and whether it may ------------------------------------

    def _tagged(self, group: dict[str, Any]) -> Iterator[_Point]:
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            manifold = manifold_of(p)
            if manifold is None:
                _check_foreign(p)
                continue
            given = names[i] if names else getattr(p, "tagged_as", None)
            if given is None:
                index = next(j for j, g in enumerate(self.param_groups) if g is group)
                name = f"param_groups[{index}]['params'][{i}] of shape {tuple(p.shape)}"
            else:
                name = repr(given)
            yield _Point(name, p, group, manifold, p)

    def _admit(self, points: list[_Point]) -> None:
        """Check that points are on their manifolds; mend or refuse those that are not."""
        off: list[tuple[_Point, str]] = []
        for point in points:
            reason = point.manifold.why_not(point.param.shape, point.param.dtype)
            if reason is not None:
                raise ManifoldError(f"{point.name} is tagged {point.manifold!r} but {reason}")
            error = point.manifold.estimated_error(point.param)
            if not error <= acceptance_level(point.param.dtype):
                off.append((point, f"is {error:.1e} off {point.manifold!r}"))
            elif not point.manifold.has_det(point.param):
                off.append((point, f"has the other determinant than {point.manifold!r}"))
            elif error > rounding_level(point.param.dtype):
                self._rough.add(point.param)
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
            self._versions[point.param] = point.param._version

    def _ready(self) -> tuple[list[_Point], list[_Point]]:
        """Return the tagged points with gradients: those to move and those to skip."""
        points = []
        for group in self.param_groups:
            for point in self._tagged(group):
                grad = point.param.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise ManifoldTypeError(
                        f"{point.name} has a sparse gradient, and a manifold step is dense; "
                        "use sparse=False in its module. Nothing was changed"
                    )
                point.grad = grad
                points.append(point)
        bad = _nonfinite_points(points, [point.grad for point in points])
        if bad and self._nonfinite == "raise":
            raise NonFiniteError(
                f"the gradient of {', '.join(p.name for p in bad)} holds NaN or infinity; clip or "
                'rescale the loss, or pass nonfinite="skip". Nothing was changed'
            )
        good = [point for point in points if point not in bad]
        self._admit([p for p in good if self._versions.get(p.param) != p.param._version])
        return good, bad

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
        points, skipped = self._ready()
        deltas, scales = self._displace(points, skipped)
        devices = {point.param.device.type for point in points}
        with torch.autocast(devices.pop() if len(devices) == 1 else "cpu", enabled=False):
            self._retract(points, deltas, scales)
        return loss

    def _is_plain_sgd(self, group: dict[str, Any]) -> bool:
        return type(self.base) is SGD and group["momentum"] == 0

    def _displace(
        self, points: list[_Point], skipped: list[_Point]
    ) -> tuple[list[Tensor], list[float | Tensor]]:
        """Run the base and return what it would add to each point, as tensors times scales."""
        # Plain SGD moves by -lr times the gradient: no tensor needs to be written for that.
        plain = [point for point in points if self._is_plain_sgd(point.group)]
        hidden = plain + skipped
        swapped = [point for point in points if not self._is_plain_sgd(point.group)]
        values = [point.param.data for point in swapped]
        try:
            for point in hidden:
                point.param.grad = None
            for point in swapped:
                point.param.data = self._zeros(point.param)
            _unhooked_step(self.base)
            displaced = {point: point.param.data for point in swapped}
        finally:
            for point, value in zip(swapped, values, strict=True):
                point.param.data = value
            for point in hidden:
                point.param.grad = point.grad
        deltas, scales = [], []
        for point in points:
            if point in displaced:
                deltas.append(displaced[point])
                scales.append(1.0)
            else:
                lr = point.group["lr"]
                deltas.append(point.grad)
                scales.append(lr if point.group["maximize"] else -lr)
        return deltas, scales

    def _zeros(self, p: Tensor) -> Tensor:
        # Kept between steps: allocating and faulting in fresh pages costs more than clearing.
        zeros = self._workspace.get(p)
        if zeros is None or zeros.shape != p.shape or (zeros.dtype, zeros.device) != (p.dtype, p.device):
            zeros = self._workspace[p] = torch.zeros_like(p.data)
            return zeros
        return zeros.zero_()

    def _retract(
        self, points: list[_Point], deltas: list[Tensor], scales: list[float | Tensor]
    ) -> None:
        """Factor all displacements, check them, then move all points."""
        batches: dict[Any, list[int]] = {}
        for i, point in enumerate(points):
            batches.setdefault(self._batch_key(i, point), []).append(i)
        moves = [
            self._factor([points[i] for i in batch], [deltas[i] for i in batch], scales[batch[0]])
            for batch in batches.values()
        ]
        factors = [(move.points[0], move.a, move.b) for move in moves]
        bad = _nonfinite_points([f[0] for f in factors], [f[1] for f in factors])
        if bad:
            raise NonFiniteError(
                f"the step of {', '.join(p.name for p in bad)} overflows to NaN or infinity although "
                "its gradient is finite; lower the learning rate. No tagged parameter was moved"
            )
        for move in moves:
            self._move(move)

    def _batch_key(self, i: int, point: _Point) -> Any:
        shape = point.matrices(point.param).shape[-2:]
        if shape.numel() > _STACK_UP_TO:
            return i
        state = self.state.get(point.param, {})
        return (
            id(point.group),
            shape,
            point.param.dtype,
            point.param.device,
            state.get(_STEP, 0),
            _START in state,
            point.manifold.det,
        )

    def _factor(self, points: list[_Point], deltas: list[Tensor], scale: float | Tensor) -> _Move:
        first = points[0]
        retraction = self._retraction(first.group)
        state = self.state.get(first.param, {})
        step = state.get(_STEP, 0)
        delta = _stack([p.matrices(d) for p, d in zip(points, deltas, strict=True)])
        start = None
        if _START in state:
            rank = first.group["rank"]
            start = _stack([self.state[p.param][_START] for p in points])
            start = start if start.shape[-2:] == (rank, delta.shape[-2]) else None
        if retraction.sketch == "svd" or retraction.is_dense_for(delta.shape):
            if bad := _nonfinite_points([first], [delta]):
                raise NonFiniteError(
                    f"the step of {bad[0].name} overflows to NaN or infinity although its gradient "
                    "is finite; lower the learning rate. No tagged parameter was moved"
                )
        a, b = retraction.factor(delta, start=start, generator=self._generator(delta, step))
        return _Move(points, step, retraction, a * scale, b)

    def _generator(self, delta: Tensor, step: int) -> torch.Generator:
        """Return the source of a sketch: the same for equal (seed, step, shape), on any replica."""
        entropy = [self._seed % 2**64, step, *delta.shape[-2:]]
        seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        return torch.Generator(delta.device).manual_seed(int(seed))

    def _move(self, move: _Move) -> None:
        first = move.points[0]
        params = [point.param for point in move.points]
        views = [point.matrices(point.param.detach()) for point in move.points]
        moved = move.a.abs().amax(dim=(-2, -1), keepdim=True) > 0 if move.a.numel() else None
        if moved is not None and bool(moved.any()):
            # One matrix that is a view of its parameter moves in place; others as a copy.
            in_place = len(params) == 1 and views[0].ndim == 2 and _shares(views[0], params[0])
            old = views[0] if in_place else _stack(views)
            x = old if in_place else old.clone()
            move.retraction.apply_(x, move.a, move.b, special=first.manifold.det is not None)
            if self._polish:
                polish_(x, step=move.step)
                if any(p in self._rough for p in params):
                    newton_schulz_(newton_schulz_(x))
            self._rough.difference_update(params)
            if not in_place:
                _unstack(torch.where(moved, x, old), move.points)
        starts = None
        if not move.retraction.is_dense_for(views[0].shape):
            starts = move.retraction.next_start(move.a)
        offset = 0
        for point, view in zip(move.points, views, strict=True):
            count = view.shape[:-2].numel()
            state = self.state[point.param]
            state[_STEP] = move.step + 1
            if starts is not None:
                rows = starts if starts.ndim == 2 else starts[offset : offset + count]
                state[_START] = rows.contiguous().clone()
            offset += count
            self._versions[point.param] = point.param._version


class ProjUNNT(ManifoldOptimizer):
    r"""ProjUNN-T: a rank-k step along the tangent space, by the exponential map.

    .. math:: X^+ = \exp\bigl(\tfrac12 (\Delta_k X^H - X \Delta_k^H)\bigr)\, X,
        \qquad \Delta_k = A B^H

    Cost O(k n p) for an (n, p) parameter. Arguments, errors and behaviour are
    those of :class:`ManifoldOptimizer`.

    Reference:
        Kiani et al., "projUNN" (2022), algorithm projUNN-T, section 4.
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor, **options: Any) -> None:
        super().__init__(params, lr, phi="exp", **options)


class ProjUNND(ManifoldOptimizer):
    r"""ProjUNN-D: a rank-k step straight ahead, then back by the nearest unitary matrix.

    .. math:: X^+ = \operatorname{polar}(X + \Delta_k)
        = (X + \Delta_k)\bigl((X + \Delta_k)^H (X + \Delta_k)\bigr)^{-1/2}

    Cost O(k n p) for an (n, p) parameter. Arguments, errors and behaviour are
    those of :class:`ManifoldOptimizer`.

    Reference:
        Kiani et al., "projUNN" (2022), algorithm projUNN-D, section 4.
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor, **options: Any) -> None:
        super().__init__(params, lr, phi="polar", **options)


# Small helpers -----------------------------------------------------------------


def _check_base(base: object) -> None:
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise ManifoldTypeError(f"{base=} must be a class of torch.optim, such as torch.optim.Adam")
    if issubclass(base, ManifoldOptimizer):
        raise ManifoldTypeError(f"base={base.__name__} is a manifold optimizer already")
    if base.__name__ in _REFUSED:
        raise ManifoldTypeError(
            f"base={base.__name__} cannot be used: {_REFUSED[base.__name__]}; "
            "use another class of torch.optim, such as Adam"
        )


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Return groups with their parameters in lists; the caller's dicts are left as they are."""
    if isinstance(params, Tensor):
        raise ManifoldTypeError("params must be an iterable of parameters or groups, not one tensor")
    items = list(params)
    if not items:
        raise ManifoldError("the optimizer got an empty parameter list")
    groups = [dict(g) for g in items] if isinstance(items[0], dict) else [{"params": items}]
    for group in groups:
        given = group["params"]
        if not isinstance(given, set):  # torch refuses sets with a message of its own
            group["params"] = [given] if isinstance(given, Tensor) else list(given)
    return groups


def _check_duplicates(params: Iterable[Any]) -> None:
    seen: set[int] = set()
    for i, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) else item
        if id(p) in seen:
            name = repr(item[0]) if isinstance(item, tuple) else f"number {i}"
            raise ManifoldError(f"parameter {name} is given twice; it would be moved twice a step")
        seen.add(id(p))


def _check_foreign(p: Tensor) -> None:
    manifold = getattr(p, "manifold", None)
    if isinstance(manifold, geoopt.Manifold) and not isinstance(manifold, geoopt.Euclidean):
        raise ManifoldTypeError(
            f"a parameter of shape {tuple(p.shape)} is on {manifold!r}, which is not a manifold of "
            "this package and would be trained unconstrained; tag it with riemann_unn.tag_"
        )


def _nonfinite_points(points: list[_Point], tensors: list[Tensor]) -> list[_Point]:
    """Return the points whose tensor holds NaN or infinity, with one look in the common case."""
    filled = [(point, t) for point, t in zip(points, tensors, strict=True) if t.numel() > 0]
    if not filled:
        return []
    # The sum of a finite tensor can overflow, so it only clears, never accuses.
    sums = [t.sum().abs().to(torch.float64).reshape(()) for _, t in filled]
    if len({t.device for t in sums}) == 1 and bool(torch.isfinite(torch.stack(sums)).all()):
        return []
    return [point for point, t in filled if not bool(torch.isfinite(t).all())]


def _unhooked_step(base: Optimizer) -> None:
    """Call the base's own step; torch's hooks and profiling belong to the outer optimizer."""
    step = type(base).step
    getattr(step, "__wrapped__", step)(base) if getattr(step, "hooked", False) else base.step()


def _stack(views: list[Tensor]) -> Tensor:
    if len(views) == 1:
        view = views[0]
        return view if view.ndim <= 3 else view.reshape(-1, *view.shape[-2:])
    return torch.cat([view.reshape(-1, *view.shape[-2:]) for view in views])


def _unstack(x: Tensor, points: list[_Point]) -> None:
    """Write a stack of matrices back to the parameters it was made from."""
    offset = 0
    for point in points:
        shape = point.matrices(point.param.detach()).shape
        count = shape[:-2].numel()
        part = x if x.ndim == 2 else x[offset : offset + count]
        point.param.copy_(point.manifold.from_matrices(part.reshape(shape), point.param.shape))
        offset += count


def _shares(view: Tensor, p: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
