"""The optimizer: any ``torch.optim`` class, whose displacement is applied by a retraction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ..errors import ManifoldError, NonFiniteError
from ..interruption import no_grad
from ..linalg import Angle, Phi, TangentMethod
from ..linalg.precision import full_precision
from ..retractions import Retraction
from .base import check_base, check_rates, displace_, is_plain_sgd
from .batch import START, Batch, Batches
from .seeds import Seeds
from .tagged import TaggedParam, TaggedParams, admit_, as_groups, check_duplicates

__all__ = ["ManifoldOptimizer"]

_RESERVED = {"base", "phi", "seed", "nonfinite", "off_manifold", "polish"}


class ManifoldOptimizer(Optimizer):
    r"""Any ``torch.optim`` class on manifold parameters: optimizer = base × retraction.

    .. math::

        \Delta = \mathrm{base}(\Omega_k), \qquad X^+ = X\,\phi(\operatorname{skew} \Delta), \qquad
        \Omega_k \approx \Omega = \tfrac12 (X^H \nabla f - \nabla f^H X)

    In each step the base sees a zero tensor in the place of every tagged parameter and, as its
    gradient, the Riemannian one on the k directions of the sketch (all of it for ``rank=None``):
    for square matrices in coordinates of the Lie algebra, which mean the same at every point, so
    that momentum needs no transport; for others as a tangent vector at X. It writes its
    displacement Δ there, with its own momentum, state and schedule, and φ turns the parameter by
    it. So fixed points are the critical points. Untagged parameters get exactly what ``base``
    alone would do, bit for bit. Weight decay does not pull tagged parameters.

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
        max_angle: no plane turns by more in a step, in radians: a larger step is shortened.
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
        NonFiniteError: a learning rate is NaN or infinity.
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
        phi: Phi | Angle = "exp",
        rank: int | None = 1,
        base: type[Optimizer] = SGD,
        sketch: TangentMethod = "tangent",
        max_angle: float | None = None,
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
        self._phi: Phi | Angle = phi
        self._options = {"rank": rank, "sketch": sketch, "max_angle": max_angle}
        self._seed, self._polish = int(seed), bool(polish)
        self._nonfinite, self._off_manifold = nonfinite, off_manifold
        self._retraction(self._options)
        groups = as_groups(params)
        for group in groups:
            check_duplicates(group["params"])
        inner: Any = base
        check_rates([{"lr": lr}])
        check_rates(groups)
        self._link(inner(groups, lr=lr, **base_kwargs))
        if not self._tagged.members():
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
        self._tagged, self._batches = TaggedParams(base.param_groups), Batches()
        self._seeds = Seeds(self._seed)
        self._stepped: list[Batch] = []
        super().__setstate__(
            {"defaults": base.defaults, "state": base.state, "param_groups": base.param_groups}
        )

    def _complete(self, group: dict[str, Any]) -> None:
        reserved = sorted(_RESERVED.intersection(group))
        if reserved:
            raise ManifoldError(
                f"a group has the options {reserved}, which hold for the whole optimizer; give "
                "them to the optimizer, or use one optimizer for each"
            )
        for key, value in self._options.items():
            group.setdefault(key, value)
        self._retraction(group)

    def _retraction(self, group: dict[str, Any]) -> Retraction:
        try:
            return _make_retraction(self._phi, group["rank"], group["sketch"], group["max_angle"])
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
        super().load_state_dict(_translated(state_dict))
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        members = self._tagged.members()
        for kept in (self.state.get(member.param, {}) for member in members):
            kept.pop(_OLD_START, None)
            if START in kept:  # which is written in place, and may be another optimizer's too
                kept[START] = kept[START].clone()
        half = {member.param for member in members if member.is_half}
        for key, p in zip(saved, ours, strict=True):
            if p in half:
                for name, value in state_dict["state"].get(key, {}).items():
                    floats = isinstance(value, Tensor) and value.is_floating_point()
                    if floats and name in self.state[p]:
                        device = self.state[p][name].device
                        self.state[p][name] = value.detach().to(device, copy=True)

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
        self.base.add_param_group(group)
        try:
            self._admit_new()
        except ManifoldError:
            self.param_groups.pop()
            raise

    def _admit_new(self) -> None:
        members = [member for member in self._tagged.members() if member.version is None]
        for member in members:
            member.check_kind()
        admit_(members, off_manifold=self._off_manifold)

    # The step ---------------------------------------------------------------

    @no_grad
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss (optional).

        Returns:
            The closure's loss, or None.

        Raises:
            NonFiniteError: a learning rate is not finite, a tagged parameter's gradient holds NaN
                or infinity, or its displacement overflows.
            OffManifoldError: a parameter was moved off its manifold since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_rates(self.param_groups)
        groups, written = self._tagged.with_gradients()
        with full_precision(self._tagged.device_types):
            batches = [batch for some in groups for batch in self._batches.of(some, self.state)]
            batches, skipped = self._sketch_(batches, written)
            self._displace_(batches, skipped)
            for batch in batches:
                batch.retract_(self.state, polish=self._polish)
        self._stepped = batches
        return loss

    def _sketch_(
        self, batches: list[Batch], written: list[TaggedParam]
    ) -> tuple[list[Batch], list[TaggedParam]]:
        """Find the tangent coordinates of all gradients, after the checks; nothing has changed.

        Returns:
            The batches that take the step, and the parameters left out of it.
        """
        # The sketch of a gradient shows if it is finite, but for those that fail on one, and where
        # a point is to be mended before.
        blind = batches if written else [b for b in batches if not self._sees(b)]
        skipped = self._nonfinite_in(blind)
        batches = self._without(skipped, batches)
        admit_([m for m in written if m not in skipped], off_manifold=self._off_manifold)
        for batch in batches:
            plain, group = is_plain_sgd(self.base, batch.group), batch.group
            scale = group["lr"] * (1 if group.get("maximize") else -1) if plain else None
            batch.sketch_(self._retraction(group), self._seeds, scale)
        wrong = [batch for batch in batches if not batch.is_finite]
        if not wrong:
            return batches, skipped
        late = self._nonfinite_in(wrong)
        if not late:
            _refuse_overflow(wrong)
        batches, later = self._sketch_(self._without(late, batches), [])
        return batches, skipped + late + later

    def _sees(self, batch: Batch) -> bool:
        return self._retraction(batch.group).shows_nonfinite

    def _nonfinite_in(self, batches: list[Batch]) -> list[TaggedParam]:
        bad = [member for batch in batches for member in batch.nonfinite_gradients()]
        if bad and self._nonfinite == "raise":
            raise NonFiniteError(
                f"the gradient of {', '.join(m.name for m in bad)} holds NaN or infinity; clip or "
                'rescale the loss, or pass nonfinite="skip". Nothing was changed'
            )
        return bad

    def _without(self, bad: list[TaggedParam], batches: list[Batch]) -> list[Batch]:
        if not bad:
            return batches
        kept = [[m for m in batch.members if m not in bad] for batch in batches]
        return [batch for some in kept if some for batch in self._batches.of(some, self.state)]

    def _displace_(self, batches: list[Batch], skipped: list[TaggedParam]) -> None:
        """Run the base: on tangent coordinates, and on parameters without a tag as they are."""
        shown = [batch for batch in batches if not is_plain_sgd(self.base, batch.group)]
        if not shown and all(p.grad is None for p in self._tagged.others):
            return  # the base has nothing to do
        plain = [m for batch in batches if batch not in shown for m in batch.members]
        displace_(
            self.base,
            chain.from_iterable(batch.show() for batch in shown),
            [member.param for member in (*plain, *skipped)],
        )
        for batch in shown:
            batch.read_()
        overflowing = [batch for batch in shown if not batch.is_finite]
        if overflowing:
            _refuse_overflow(overflowing)

    def last_step(self) -> dict[Tensor, dict[str, Tensor]]:
        r"""Return what the last step did to each tagged parameter that took part.

        Returns:
            For low-rank steps the largest ``"angle"`` that a plane turned by, in radians, the
            ``"directions"`` v and the ``"coordinates"`` :math:`\Omega v` of the gradient on
            them, shape ``(matrices, n, k)``; for whole steps nothing.
        """
        return {p: told for batch in self._stepped for p, told in batch.report()}


# What 0.1.0 called its default sketch, and the start of the next one.
_OLD_SKETCH, _OLD_START = "power", "sketch_start"


def _translated(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state of 0.1.0 as one of today, and say what it cannot tell."""
    groups = state_dict["param_groups"]
    if not any("rank" in group and "max_angle" not in group for group in groups):
        return state_dict
    warnings.warn(
        "this state was saved by riemann_unn 0.1.0: its sketches start anew, and the momentum of "
        "low-rank steps, which was kept in Euclidean coordinates, fades within some steps",
        stacklevel=3,
    )
    renamed = [
        group | {"sketch": "tangent"} if group.get("sketch") == _OLD_SKETCH else group
        for group in groups
    ]
    return {**state_dict, "param_groups": renamed}


def _refuse_overflow(batches: list[Batch]) -> None:
    names = ", ".join(member.name for batch in batches for member in batch.overflowing())
    raise NonFiniteError(
        f"the step of {names} overflows to NaN or infinity although the gradient is finite; "
        "lower the learning rate. No tagged parameter was moved"
    )


# Options are read from the groups at every step, since users may change them there.
_make_retraction = lru_cache(maxsize=64, typed=True)(Retraction)
