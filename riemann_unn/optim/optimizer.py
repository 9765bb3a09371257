"""The optimizer: any ``torch.optim`` class, whose displacement is applied by a retraction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from ..errors import ManifoldError
from ..interruption import no_grad
from ..linalg import Angle, Phi, TangentMethod
from ..linalg.precision import full_precision, is_full_precision
from ..linalg.value_branches import WithoutReading
from ..parallel import Group, is_sharded, together
from ..retractions import Retraction
from ..scalars import plain_scalars
from .base import (
    can_be_captured,
    check_base,
    check_rates,
    check_sharded,
    displace_,
    is_plain_sgd,
    kept_whole,
    plain_scale,
)
from .batch import Batch
from .hooks import hooked
from .initial_state import begin_states_
from .local_step import LocalStep
from .partition import untagged_rank
from .proxies import step_proxies
from .searching import check_search, search_
from .seeds import Seeds
from .states import BASE_CLASS, loading, with_every_parameter
from .tagged import (
    TaggedParam,
    TaggedParams,
    admit_,
    as_groups,
    check_duplicates,
    refuse_overflow,
)

if TYPE_CHECKING:
    from .shared import SharedParam
    from .shared_step import SharedParams

__all__ = ["ManifoldOptimizer"]

_RESERVED = {*("base", "phi", "seed", "nonfinite", "off_manifold", "polish", "process_group")}
_KEPT = ("base", "_phi", "_options", "_seed", "_polish", "_nonfinite", "_off_manifold",
         "_process_group", "_capturable")  # fmt: skip


class ManifoldOptimizer(Optimizer):
    r"""Any ``torch.optim`` class on manifold parameters: optimizer = base × retraction.

    .. math::

        \Delta = \mathrm{base}(\Omega_k), \qquad X^+ = X\,\phi(\operatorname{skew} \Delta), \qquad
        \Omega_k \approx \Omega = \tfrac12 (X^H \nabla f - \nabla f^H X)

    In each step the base sees a zero tensor in the place of every tagged parameter and, as its
    gradient, the Riemannian one on the k directions of the sketch (all of it for ``rank=None``):
    for square matrices in coordinates of the Lie algebra, which mean the same at every point, so
    that momentum needs no transport; for others as a tangent vector at X. It writes its
    displacement Δ there, with its own momentum, state and schedule, and φ rotates the parameter by
    it. So fixed points are the critical points. Untagged parameters get exactly what ``base`` alone
    would do, bit for bit. Weight decay does not pull tagged parameters.

    A step leaves every tagged parameter on its manifold to rounding or raises
    an error that names the parameter. Gradients and points are checked before
    anything changes; a displacement that overflows although its gradient is
    finite is caught before any tagged parameter moves, but, unless the base is
    plain SGD, after the base has stepped the others.

    Parameters stored in half precision move as a master copy in float32, kept in
    the state; the stored values are its rounding.

    Args:
        params: parameters, named parameters or groups, as ``torch.optim`` takes
            them. At least one must be tagged, see :func:`riemann_unn.tag_`. A group
            may set its own ``rank``, ``sketch`` and ``max_angle``, also between steps.
        lr: the base's learning rate, a float or a tensor.
        phi: the map φ: ``"exp"``, ``"cayley"``, ``"polar"``, or a function of the angles of
            planes, in radians, odd and with slope 1 at zero.
        rank: directions k of a step; ``None`` for all, as from half of n on.
        base: a class of ``torch.optim``; its arguments follow as keywords.
        sketch: how directions are found, see :func:`riemann_unn.linalg.tangent_directions`.
        max_angle: the largest rotation angle of a step, in radians: a larger step is shortened.
        seed: seeds the sketches, which never touch the global generator.
        nonfinite: at a gradient with NaN or infinity ``"raise"``, or ``"skip"``
            the parameter for this step.
        off_manifold: at a parameter off its manifold ``"raise"``, or
            ``"project"`` it to the nearest point.
        polish: keep rounding errors from accumulating (recommended; off for study).
        capturable: read nothing from the device, so that a step can be captured in a CUDA graph
            with all of a training step. A gradient that is not finite then leaves everything
            unchanged on the device, and is raised by a later step or by :meth:`synchronize`. It is
            passed on to a base that has such an argument.
        process_group: of data-parallel training with a replica of each tagged parameter on every
            process: the step averages the sketches of their gradients, which need not be averaged
            before. Sharded parameters, DTensors, need none.
        **base_kwargs: arguments of ``base``.

    Raises:
        ManifoldError: no parameter is tagged, one is given twice or shares memory with another or
            with itself, or an option is wrong.
        ManifoldTypeError: ``base`` is no optimizer class, or one that cannot work.
        LostTagError: an untagged parameter is where a module remembers a tagged one.
        NonFiniteError: a learning rate is NaN or infinity.
        OffManifoldError: a parameter does not satisfy its constraint.

    Reference:
        Kiani et al., "projUNN: efficient method for training deep networks with
        unitary matrices" (2022); Lezcano-Casado, "Trivializations for
        gradient-based optimization on manifolds" (2019), section 5, for steps
        taken in the tangent space at the current point.
    """

    base: Optimizer
    _capturable = False
    _shared: SharedParams | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        phi: Phi | Angle = "exp",
        rank: int | None = 1,
        base: type[Optimizer] = SGD,
        sketch: TangentMethod = "tangent",
        max_angle: float | None = None,
        seed: int = 0,
        nonfinite: Literal["raise", "skip"] = "raise",
        off_manifold: Literal["raise", "project"] = "raise",
        polish: bool = True,
        capturable: bool = False,
        process_group: Group | None = None,
        **base_kwargs: Any,
    ) -> None:
        check_base(base, ManifoldOptimizer)
        if nonfinite not in ("raise", "skip"):
            raise ManifoldError(f"{nonfinite=} is unknown; choose 'raise' or 'skip'")
        if off_manifold not in ("raise", "project"):
            raise ManifoldError(f"{off_manifold=} is unknown; choose 'raise' or 'project'")
        self._phi: Phi | Angle = phi
        self._options = plain_scalars({"rank": rank, "sketch": sketch, "max_angle": max_angle})
        self._seed, self._polish = int(seed), bool(polish)
        self._nonfinite, self._off_manifold = nonfinite, off_manifold
        self._process_group, self._capturable = process_group, bool(capturable)
        check_search(base, phi, self._options, capturable=capturable, process_group=process_group)
        self._retraction(self._options)
        groups = as_groups(params)
        for group in groups:
            check_duplicates(group["params"])
        if capturable and can_be_captured(base, groups):
            base_kwargs = {"capturable": True, **base_kwargs}
        check_rates([{"lr": lr}])
        check_rates(groups)
        self._link(base(groups, **plain_scalars({"lr": lr, **base_kwargs})))
        if not self._tagged.members():
            raise ManifoldError(
                "no parameter is tagged, so every one would be trained unconstrained; tag "
                f"some with riemann_unn.tag_, or use torch.optim.{base.__name__} itself"
                + untagged_rank()
            )
        self._admit_new()

    # The base, whose groups and state are shared -----------------------------

    def _link(self, base: Optimizer) -> None:
        self.base = base
        for group in base.param_groups:
            self._complete(group)
        are_replicas = self._process_group is not None
        self._tagged = TaggedParams(base, are_replicas=are_replicas)
        self._seeds, self._shared = Seeds(self._seed), None
        self._own = LocalStep(
            base,
            self._tagged,
            self._seeds,
            self._retraction,
            capturable=self._capturable,
            nonfinite=self._nonfinite,
            off_manifold=self._off_manifold,
        )
        self._stepped: list[Batch | SharedParam] = []
        super().__setstate__(
            {"defaults": base.defaults, "state": base.state, "param_groups": base.param_groups}
        )

    def _take_over(self) -> None:
        """Pass on to the base the groups and state that users may have assigned."""
        self.base.param_groups, self.base.state = self.param_groups, self.state

    def _complete(self, group: dict[str, Any]) -> None:
        reserved = sorted(_RESERVED.intersection(group))
        if reserved:
            raise ManifoldError(
                f"a group has the options {reserved}, which hold for the whole optimizer; give "
                "them to the optimizer, or use one optimizer for each"
            )
        for key, value in self._options.items():
            group.setdefault(key, value)
        group[BASE_CLASS] = type(self.base).__name__
        self._retraction(group)

    def _retraction(self, group: dict[str, Any]) -> Retraction:
        try:
            made = _make_retraction(self._phi, group["rank"], group["sketch"], group["max_angle"])
        except (TypeError, ValueError) as error:
            raise ManifoldError(str(error)) from None
        if self._capturable and (callable(made.phi) or made.sketch != "tangent"):
            raise ManifoldError(
                f"capturable=True with phi={made.phi!r} and sketch={made.sketch!r}: only the named "
                'φ and the sketch "tangent" need no factorisation that waits for the device'
            )
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" in state:
            self.__dict__.update(state)
        else:  # from load_state_dict, with new groups and state for the base to take over
            self.base.__setstate__(state)
        self._link(self.base)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as :meth:`torch.optim.Optimizer.state_dict` does.

        It has an entry for every parameter that is trained, empty where nothing is kept of it.
        """
        return with_every_parameter(super().state_dict(), self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as :meth:`torch.optim.Optimizer.load_state_dict` does.

        The options of the groups become the saved ones, and the state of parameters stored in
        half precision keeps its own precision, which torch would round to theirs. The state has
        to be of the same base, rank and shapes, and in the same coordinates. The four optimizers
        share theirs, so that each continues from the state of any other; so do ``Orthogonal``,
        ``Unitary`` and ``Stiefel`` without ``flatten``. A state of 0.1.0, and one of ``base``
        alone, which is in Euclidean coordinates, are accepted with a warning.

        Args:
            state_dict: from :meth:`state_dict`.

        Raises:
            StateError: the state is of another base, rank or shape, or in other coordinates;
                it says what differs, and nothing has changed.
        """
        self._take_over()
        self._tagged.refuse_none()  # a lost tag is reported before the state changes
        with loading(self, self.base, lambda: self._tagged.members()):
            super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as :meth:`torch.optim.Optimizer.add_param_group` does.

        Args:
            param_group: ``params`` and options; ``rank``, ``sketch`` and ``max_angle`` may be
                among them.

        Raises:
            ManifoldError: a parameter is given twice or off its manifold; nothing is added.
        """
        (group,) = as_groups([param_group])
        check_duplicates(group["params"])
        check_rates([group], start=len(self.param_groups))
        self._complete(group)
        self._take_over()
        self.base.add_param_group(group)
        try:
            self._admit_new()
        except ManifoldError:
            self.param_groups.pop()
            raise

    def _admit_new(self) -> None:
        new = [member for member in self._tagged.members() if member.version is None]
        for member in new:
            member.check_supported()
            if is_sharded(member.param):
                check_sharded(self.base, member.name)
        own = [member for member in new if not member.is_shared]
        admit_(own, off_manifold=self._off_manifold)
        points = [point for point in self._shared_params() if point.member.version is None]
        if points:
            self._sharing().admit_(points, off_manifold=self._off_manifold)
        with full_precision(self._tagged.device_types):
            begin_states_(own, points, self.state, self._seeds, self._retraction)

    def _shared_params(self) -> list[SharedParam]:
        """Return the tagged parameters that are sharded, or replicated in the process group."""
        members = self._tagged.shared()
        return self._sharing().of(members) if members else []

    def _sharing(self) -> SharedParams:
        if self._shared is None:
            from .shared_step import SharedParams  # takes as long to import as the whole package

            self._shared = SharedParams(self._process_group)
        return self._shared

    # The step ---------------------------------------------------------------

    # torch wraps the step of every optimizer class by this method.
    profile_hook_step = staticmethod(hooked)  # type: ignore[assignment]

    @no_grad
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss (optional, but for LBFGS).

        Returns:
            The closure's loss, or None.

        Raises:
            NonFiniteError: a learning rate is not finite, a tagged parameter's gradient holds NaN
                or infinity, or its displacement overflows.
            OffManifoldError: a parameter was moved off its manifold since the last step.
            LostTagError: a parameter has lost its tag since, other than by ``untag_``.
            ManifoldError: parameters have come to share memory, or one has another dtype than its
                state.
        """
        if isinstance(self.base, LBFGS):
            return search_(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_over()
        self._own.raise_arrived()
        if not self._capturable and is_full_precision(self._tagged.device_types):
            self._step_()
            return loss
        reading = WithoutReading() if self._capturable else nullcontext()
        with full_precision(self._tagged.device_types), reading:
            self._step_()
        return loss

    def _step_(self) -> None:
        batches, skipped, error = self._sketch_own_()
        points, left_out = self._sketch_shared_(error) if self._tagged.has_shared else ([], [])
        self._displace_(batches, points, [*skipped, *left_out])
        for batch in batches:
            batch.retract_(self.state, polish=self._polish)
        if points:
            together(
                (point.placement.group, point.retract_(self.state, polish=self._polish))
                for point in points
            )
        self._stepped = [*batches, *points]

    def synchronize(self) -> None:
        """Wait for accelerators, and raise the faults that they have recorded.

        Raises:
            NonFiniteError: a gradient held NaN or infinity, or a step overflowed.
            OffManifoldError: a parameter was off its manifold.
        """
        self._own.synchronize()

    def _sketch_own_(self) -> tuple[list[Batch], list[TaggedParam], Exception | None]:
        """Sketch the parameters of this process; return an error that all processes must raise."""
        try:
            check_rates(self.param_groups, reads_tensors=not self._capturable)
            return *self._own.sketch_(), None
        except Exception as error:
            if not self._tagged.has_shared:
                raise
            return [], [], error

    def _sketch_shared_(
        self, error: Exception | None
    ) -> tuple[list[SharedParam], list[TaggedParam]]:
        """Sketch the parameters that processes share, together; nothing has changed."""
        # A process with an error joins the sums over the former parameters, to report it to all.
        points = self._shared_params() if error is None else self._sharing().known
        if not points:
            return [], []
        stepping, left_out = self._sharing().sketch_(
            points,
            self.state,
            retraction=self._retraction,
            seeds=self._seeds,
            error=error,
            nonfinite=self._nonfinite,
            off_manifold=self._off_manifold,
        )
        for point in stepping:
            scale = plain_scale(self.base, point.group)
            if scale is not None:
                point.scale(scale)
        return stepping, [point.member for point in left_out]

    def _displace_(
        self, batches: list[Batch], points: list[SharedParam], skipped: list[TaggedParam]
    ) -> None:
        """Run the base, with tangent coordinates in the place of tagged parameters."""
        shown = self._own.shown(batches)
        shared = [point for point in points if not is_plain_sgd(self.base, point.group)]
        if not (shown or shared or any(p.grad is not None for p in self._tagged.others)):
            return  # the base has nothing to do
        plain = [m for batch in batches if batch not in shown for m in batch.members]
        plain += [point.member for point in points]  # the base sees a proxy of each
        whole = kept_whole(self.base)
        shown_proxies = together((point.placement.group, point.show(whole)) for point in shared)
        proxies = [one for one in shown_proxies if one is not None]
        tangents = chain.from_iterable(batch.show() for batch in shown)
        hidden = [member.param for member in (*plain, *skipped)]

        def step() -> None:
            step_proxies(self.base, proxies, lambda: displace_(self.base, tangents, hidden))

        self._own.step_base_(step, shown)
        for batch in shown:
            batch.read_()
        together((point.placement.group, point.read(self.state, whole)) for point in shared)
        moving: list[Batch | SharedParam] = [*shown, *shared]
        overflowing = [one for one in moving if not one.is_finite]
        if overflowing:
            refuse_overflow(member for one in overflowing for member in one.overflowing())

    def last_step(self) -> dict[Tensor, dict[str, Tensor]]:
        r"""Return what the last step did to each tagged parameter that it moved.

        Returns:
            For low-rank steps the largest rotation ``"angle"`` of a plane, in radians, the
            ``"directions"`` v and the ``"coordinates"`` :math:`\Omega v` of the gradient on
            them, shape ``(matrices, n, k)``; for whole steps nothing.
        """
        return {p: entry for batch in self._stepped for p, entry in batch.report()}


# Options are read from the groups at every step, since users may change them there.
_make_retraction = lru_cache(maxsize=64, typed=True)(Retraction)
