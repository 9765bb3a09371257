"""Tagged parameters: which parameters of an optimizer are tagged, and the admission checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, repeat
from operator import attrgetter, is_
from typing import Any, Literal, NoReturn

import geoopt
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import (
    LostTagError,
    ManifoldError,
    ManifoldTypeError,
    NonFiniteError,
    OffManifoldError,
)
from ..interruption import without_torch_function
from ..manifolds import MatrixManifold, acceptance_level, rounding_level
from ..parallel import is_sharded, local_part
from ..scalars import plain_scalars
from ..tagging import KnownTags, manifold_of, refuse_flattened
from .conversion import refuse_conversions
from .overlap import refuse_overlaps

__all__ = [
    "TaggedParam",
    "TaggedParams",
    "admit_",
    "as_groups",
    "check_duplicates",
    "gradients_of",
    "refuse_gradients",
    "refuse_off_manifold",
    "refuse_overflow",
]


# What parameters of one batch have in common: group, manifold, shape, dtype, id and device; the id
# is 0 for small matrices, so that large ones are in a batch of their own.
BatchKey = tuple[int, MatrixManifold, torch.Size, torch.dtype, int, torch.device]
# Matrices up to this size are cheaper to step together than one by one.
_BATCH_UP_TO = 128 * 128
# Up to so many are checked one by one.
_FEW = 4
# C loops over attributes: with many parameters the interpreter's loops take longer.
_PARAM, _GRAD, _LAYOUT = attrgetter("param"), attrgetter("grad"), attrgetter("layout")
_MEMORY, _VERSION, _COUNT = attrgetter("memory"), attrgetter("version"), attrgetter("_version")
_DTYPE = attrgetter("dtype")


@dataclass(eq=False, slots=True)
class TaggedParam:
    """A tagged parameter in its group, under the name that messages give it.

    ``memory`` is the parameter's tensor when last refreshed, and ``value`` is what a step moves:
    the same, or the single-precision master copy of a parameter that is stored in half.
    ``version`` is its version counter when it was last found on its manifold; parameters of one
    ``batch_key``, an index into ``keys``, can be stepped together. ``is_inexact`` says that its
    error was then above rounding, which the next step corrects. Where ``is_shared`` with other
    processes, memory and value are the local part.
    """

    name: str
    param: Tensor
    group: dict[str, Any]
    tag: object
    manifold: MatrixManifold
    keys: dict[BatchKey, int]
    is_shared: bool
    memory: Tensor = field(init=False)
    value: Tensor = field(init=False)
    version: int | None = field(init=False)
    batch_key: int = field(init=False)
    is_half: bool = field(init=False)
    is_inexact: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Read the parameter's current storage; its values have yet to be checked."""
        # A plain tensor, since torch checks each parameter in a list for overridden functions.
        value = local_part(self.param)
        self.version = None
        fits = not self.is_shared and self.manifold.why_not(value.shape, value.dtype) is None
        is_small = fits and _matrix_of(self.manifold, value).numel() <= _BATCH_UP_TO
        alone = 0 if is_small else id(self)
        key = (id(self.group), self.manifold, value.shape, value.dtype, alone, value.device)
        self.batch_key = self.keys.setdefault(key, len(self.keys))
        # Half precision is too coarse for a point: a master copy is kept.
        self.is_half = value.dtype in (torch.float16, torch.bfloat16)
        # Last, so that an interrupted refresh is repeated.
        self.value = self.memory = value

    def has_new_storage(self) -> bool:
        """Whether the parameter's storage, shape, strides or dtype have changed."""
        now, then = local_part(self.param), self.memory
        return (now.data_ptr(), now.shape, now.stride(), now.dtype) != (
            then.data_ptr(),
            then.shape,
            then.stride(),
            then.dtype,
        )

    def check_supported(self) -> None:
        """Refuse a parameter whose shape or dtype its manifold does not take.

        Raises:
            ManifoldError: naming the parameter.
        """
        refuse_flattened(self.name, self.param)
        reason = self.manifold.why_not(self.param.shape, self.param.dtype)
        if reason is not None:
            raise ManifoldError(f"{self.name} is tagged {self.manifold!r} but {reason}")


def _matrix_of(manifold: MatrixManifold, value: Tensor) -> torch.Size:
    """Return the shape of a value's matrices, without computing a transform."""
    if not manifold.views_memory:
        return manifold.matrices_shape(value.shape)[-2:]
    return manifold.to_matrices(value).shape[-2:]


def _same_storage(params: list[Tensor], memories: list[Tensor]) -> bool:
    """Tell quickly whether storages are unchanged; False may be wrong, True never is."""
    try:
        same = all(map(Tensor.is_set_to, params, memories))
    except NotImplementedError:  # on some devices
        return False
    return same and all(map(is_, map(_DTYPE, params), map(_DTYPE, memories)))


def _get_each(get: Callable[[Tensor], Any], params: Iterable[Tensor]) -> list[Any]:
    # Parameters are a subclass, of which torch would look up overridden functions each time.
    return without_torch_function(lambda: list(map(get, params)))


def gradients_of(members: list[TaggedParam]) -> list[Any]:
    """Return the gradients of members, None for those that have none."""
    return _get_each(_GRAD, map(_PARAM, members))


def _are_unchanged(members: list[TaggedParam]) -> bool:
    """Tell whether all have dense gradients and were not written to, for a few members.

    False may be wrong, True never is.
    """
    for member in members:
        p, memory = member.param, member.memory
        grad = p.grad
        if grad is None or grad.layout is not torch.strided or p._version != member.version:
            return False
        if not _same_storage([p], [memory]):
            return False
    return True


def _with_new_storage(members: list[TaggedParam]) -> list[TaggedParam]:
    found = []
    for member in members:
        if member.has_new_storage():
            found.append(member)
    return found


def _refuse_sparse(members: list[TaggedParam], grads: list[Tensor]) -> None:
    for member, grad in zip(members, grads, strict=True):
        if grad.layout is not torch.strided:
            raise ManifoldTypeError(
                f"{member.name} has a sparse gradient, and a manifold step is dense; "
                "use sparse=False in its module. Nothing was changed"
            )


class TaggedParams:
    """The tagged parameters of a base's groups, kept between steps until the groups change."""

    def __init__(self, base: Optimizer, *, are_replicas: bool) -> None:
        self._base, self._are_replicas = base, are_replicas
        self._known = KnownTags()
        self._seen: list[tuple[Tensor, object, dict[str, Any]]] = []
        self._members: list[TaggedParam] = []
        self._by_group: list[list[TaggedParam]] = []
        self._shared: list[TaggedParam] = []
        self._others: list[Tensor] = []
        self._keys: dict[BatchKey, int] = {}
        self._counted, self._types = 0, set[str]()

    def with_gradients(self) -> tuple[list[list[TaggedParam]], list[TaggedParam]]:
        """Return by group the parameters with a gradient, and those written to since the last step.

        Raises:
            LostTagError: no parameter is tagged any more, or see :meth:`members`.
            ManifoldTypeError: a gradient is sparse, or see :meth:`members`.
            ManifoldError: a parameter's shape or dtype no longer fits its manifold, it shares
                memory, or it has another dtype than its state.
        """
        groups: list[list[TaggedParam]] = []
        written: list[TaggedParam] = []
        self.refuse_none()
        for members in self._by_group:
            if len(members) <= _FEW and _are_unchanged(members):
                groups.append(members)
                continue
            params = list(map(_PARAM, members))
            grads = _get_each(_GRAD, params)
            if any(map(is_, grads, repeat(None))):
                members = [m for m, grad in zip(members, grads, strict=True) if grad is not None]
                params = list(map(_PARAM, members))
                grads = [grad for grad in grads if grad is not None]
            if not members:
                continue
            if set(map(_LAYOUT, grads)) != {torch.strided}:
                _refuse_sparse(members, grads)
            memories = list(map(_MEMORY, members))
            if not without_torch_function(partial(_same_storage, params, memories)):
                self._refresh(_with_new_storage(members))
            counts = _get_each(_COUNT, params)
            if counts != list(map(_VERSION, members)):
                for member, count in zip(members, counts, strict=True):
                    if member.version != count:
                        if member.memory._version != count:
                            member.refresh()  # torch.utils.swap_tensors separates their counters
                        member.check_supported()
                        written.append(member)
            groups.append(members)
        return groups, written

    def refuse_none(self) -> None:
        """Refuse groups in which no parameter is tagged any more.

        Raises:
            LostTagError: that, or see :meth:`members`.
        """
        if not self.members() and self._others:
            raise LostTagError(
                "no parameter of the optimizer is tagged any more, so every one would be trained "
                "unconstrained; tag some with riemann_unn.tag_, or use a class of torch.optim. "
                "Nothing was changed"
            )

    def members(self) -> list[TaggedParam]:
        """Return the tagged parameters in their order.

        Raises:
            LostTagError: a parameter has lost its tag, and was not untagged.
            ManifoldError: parameters share memory, or have another dtype than their state.
            ManifoldTypeError: a parameter is on a manifold that this package does not support, so
                that it would be trained unconstrained.
        """
        if not self._is_current():
            known = {(id(member.param), id(member.group)): member for member in self._members}
            found = []
            for member in _tagged(self._base.param_groups, self._keys, self._are_replicas):
                old = known.get((id(member.param), id(member.group)))
                found.append(member if old is None or old.tag is not member.tag else old)
            self._check_changes(found, known.values())
            self._members = found
            own = [member for member in found if not member.is_shared]
            self._shared = [member for member in found if member.is_shared]
            by_group = groupby(own, key=lambda member: id(member.group))
            self._by_group = [list(members) for _, members in by_group]
            seen = [
                (p, getattr(p, "manifold", None), group)
                for group in self._base.param_groups
                for p in group["params"]
            ]
            self._others = self._without(found)
            self._seen = seen  # last, so that an interrupted update is repeated
        return self._members

    def shared(self) -> list[TaggedParam]:
        """Return the trained parameters that are sharded or replicated."""
        self.members()
        return [m for m in self._shared if m.param.requires_grad or m.param.grad is not None]

    @property
    def has_shared(self) -> bool:
        """Whether a step communicates with other processes."""
        return bool(self._shared)

    def _check_changes(self, found: list[TaggedParam], known: Iterable[TaggedParam]) -> None:
        """Refuse lost tags, changed dtypes and shared memory."""
        self._known.update(self._base.param_groups, [(m.name, m.param, m.group) for m in found])
        dtypes = {id(old.param): old.memory.dtype for old in known}
        changed = ((m.name, m.param, dtypes.get(id(m.param), m.param.dtype)) for m in found)
        refuse_conversions(changed, self._base.state)
        refuse_overlaps(((m.name, m.param) for m in found), self._without(found))

    def _without(self, members: list[TaggedParam]) -> list[Tensor]:
        tagged = {id(member.param) for member in members}
        return [
            p for group in self._base.param_groups for p in group["params"] if id(p) not in tagged
        ]

    def _refresh(self, moved: list[TaggedParam]) -> None:
        if moved:
            refuse_conversions(((m.name, m.param, m.memory.dtype) for m in moved), self._base.state)
            refuse_overlaps(((m.name, m.param) for m in self._members), self._others)
        for member in moved:
            member.refresh()

    @property
    def device_types(self) -> set[str]:
        """The types of the devices that tagged parameters are, or once were, on."""
        if len(self._keys) != self._counted:
            self._counted = len(self._keys)
            self._types = {key[-1].type for key in self._keys}
        return self._types

    @property
    def others(self) -> list[Tensor]:
        """The parameters without a tag, at the last call of :meth:`members`."""
        return self._others

    def _is_current(self) -> bool:
        if self._known.is_stale:
            return False
        seen = iter(self._seen)
        for group in self._base.param_groups:
            for p in group["params"]:
                was, tag, owner = next(seen, (None, None, None))
                if was is not p or owner is not group or tag is not getattr(p, "manifold", None):
                    return False
        return next(seen, None) is None


def _tagged(
    groups: list[dict[str, Any]], keys: dict[BatchKey, int], are_replicas: bool
) -> Iterator[TaggedParam]:
    for index, group in enumerate(groups):
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            tag, manifold = getattr(p, "manifold", None), manifold_of(p)
            if manifold is not None:
                given = names[i] if names else getattr(p, "tagged_as", None)
                where = f"param_groups[{index}]['params'][{i}] of shape {tuple(p.shape)}"
                name = where if given is None else repr(given)
                yield TaggedParam(
                    name, p, group, tag, manifold, keys, are_replicas or is_sharded(p)
                )
            elif isinstance(tag, geoopt.Manifold) and not isinstance(tag, geoopt.Euclidean):
                raise ManifoldTypeError(
                    f"a parameter of shape {tuple(p.shape)} is on {tag!r}, which is not a "
                    "manifold of this package, so it would be trained unconstrained; tag it with "
                    "riemann_unn.tag_"
                )


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Return groups with their parameters in lists; the caller's dicts are left as they are."""
    if isinstance(params, Tensor):
        raise ManifoldTypeError(
            "params must be an iterable of parameters or groups, not one tensor"
        )
    items = list(params)
    if not items:
        raise ManifoldError("the optimizer got an empty parameter list")
    groups = [dict(g) for g in items] if isinstance(items[0], dict) else [{"params": items}]
    for group in groups:
        given = group["params"]
        if not isinstance(given, set):  # torch refuses sets with a message of its own
            group["params"] = [given] if isinstance(given, Tensor) else list(given)
        group.update({k: plain_scalars(v) for k, v in group.items() if k != "params"})
    return groups


def check_duplicates(params: Iterable[Any]) -> None:
    """Refuse a list of parameters, or of names with parameters, that holds one twice.

    Raises:
        ManifoldError: naming the parameter.
    """
    seen: set[int] = set()
    for i, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) else item
        if id(p) in seen:
            name = repr(item[0]) if isinstance(item, tuple) else f"number {i}"
            raise ManifoldError(
                f"parameter {name} is given twice and would be moved twice a step; give it once"
            )
        seen.add(id(p))


def admit_(members: list[TaggedParam], *, off_manifold: Literal["raise", "project"]) -> None:
    """Check that parameters are on their manifolds; project or refuse those that are not.

    Raises:
        OffManifoldError: naming the parameter and the remedy; nothing is changed.
    """
    if not members:
        return
    off: list[tuple[TaggedParam, str]] = []
    for member in members:
        error = member.manifold.estimated_error(member.param)
        if not error <= acceptance_level(member.param.dtype):
            off.append((member, f"is {error:.1e} off {member.manifold!r}"))
        elif not member.manifold.has_det(member.param):
            off.append((member, f"has the other determinant than {member.manifold!r}"))
        elif error > rounding_level(member.param.dtype):
            member.is_inexact = True
    for member, reason in off:
        finite = bool(torch.isfinite(member.param).all())
        if off_manifold == "raise" or not finite:
            refuse_off_manifold(member, reason, is_finite=finite)
    with torch.no_grad():
        for member, _ in off:
            member.param.copy_(member.manifold.projx(member.param.detach()))
    for member in members:
        member.version, member.value = member.memory._version, member.memory


def refuse_off_manifold(member: TaggedParam, reason: str, *, is_finite: bool) -> NoReturn:
    """Raise the error for a parameter off its manifold, with the remedy."""
    remedy = (
        'call riemann_unn.init.warm_start_ or pass off_manifold="project"'
        if is_finite
        else "it holds NaN or infinity, so initialise it again"
    )
    raise OffManifoldError(f"{member.name} {reason}; {remedy}")


def refuse_gradients(members: Iterable[TaggedParam]) -> NoReturn:
    """Raise the error for gradients that hold NaN or infinity."""
    raise NonFiniteError(
        f"the gradient of {', '.join(m.name for m in members)} holds NaN or infinity; clip or "
        'rescale the loss, or pass nonfinite="skip". Nothing was changed'
    )


def refuse_overflow(members: Iterable[TaggedParam]) -> NoReturn:
    """Raise the error for moves that are not finite although the gradients are."""
    raise NonFiniteError(
        f"the step of {', '.join(m.name for m in members)} overflows to NaN or infinity although "
        "the gradient is finite; lower the learning rate. No tagged parameter was moved"
    )
