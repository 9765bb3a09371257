"""Saved states: the notes that they carry, and which ones an optimizer accepts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..errors import StateError
from ..manifolds import MatrixManifold, Orthogonal, Stiefel, Unitary
from ..parallel import placed_like
from ..scalars import plain_scalars
from .entries import COORDINATES, MASTER, OWN, START, STEP
from .tagged import TaggedParam

__all__ = [
    "BASE_CLASS",
    "StateDict",
    "as_tensor",
    "coordinates_of",
    "loading",
    "with_every_parameter",
]

StateDict = dict[str, Any]

# Key of a group: the class of the base.
BASE_CLASS = "base_class"
# The names in 0.1.0 of its default sketch, and of the start of the next one.
_OLD_SKETCH, _OLD_START = "power", "sketch_start"
_OURS = {*OWN, _OLD_START}


def coordinates_of(manifold: MatrixManifold) -> str:
    """Return a name for a manifold's tangent coordinates, which depend on its matrix view."""
    same_view = isinstance(manifold, Orthogonal | Unitary)
    return repr(Stiefel(blocks=manifold.blocks) if same_view else manifold)


def as_tensor(name: str, device: torch.device) -> Tensor:
    """Return a name as a tensor of bytes, since torch does not flatten strings in a state."""
    return torch.tensor(list(name.encode()), dtype=torch.uint8, device=device)


def _as_name(tensor: Tensor) -> str:
    return bytes(tensor.to(torch.uint8).tolist()).decode(errors="replace")


def with_every_parameter(state_dict: StateDict, groups: list[dict[str, Any]]) -> StateDict:
    """Return a state with an entry, maybe empty, for every parameter that is trained.

    Its groups hold plain values, also where a schedule has written numpy scalars.
    torch's strict checkpoints refuse a state that has entries for some parameters only, as that of
    plain SGD, which has none for untagged parameters.
    """
    state = dict(state_dict["state"])
    for group, saved in zip(groups, state_dict["param_groups"], strict=False):
        for p, key in zip(group["params"], saved["params"], strict=False):
            if p.requires_grad:
                state.setdefault(key, {})
    plain = [
        {k: v if k == "params" else plain_scalars(v) for k, v in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": state, "param_groups": plain}


@contextmanager
def loading(
    optimizer: Optimizer, base: Optimizer, members: Callable[[], list[TaggedParam]]
) -> Iterator[None]:
    """A context in which ``optimizer`` loads a state: check it, and keep what torch would round.

    Both happen between the hooks of users, which may edit the state and see what was loaded.

    Raises:
        StateError: the state belongs to another optimizer; nothing has changed.
    """
    checked: list[StateDict] = []
    notes: list[str] = []

    def check(_: Optimizer, state_dict: StateDict) -> StateDict:
        checked.append(_translated(_without_missing(state_dict), notes))
        _check(checked[0], base, members(), notes)
        return checked[0]

    def restore_precision(_: Optimizer) -> None:
        _restore_precision_(optimizer, checked[0], members())

    handles = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore_precision, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for note in notes:
        warnings.warn(note, stacklevel=4)


def _is_missing(value: object) -> bool:
    return isinstance(value, dict) and not value


def _without_missing(state_dict: StateDict) -> StateDict:
    """Return a state without the empty dicts that torch's flat states have for missing entries."""
    state = {
        key: {name: value for name, value in kept.items() if not _is_missing(value)}
        if any(map(_is_missing, kept.values()))
        else kept
        for key, kept in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _translated(state_dict: StateDict, notes: list[str]) -> StateDict:
    """Convert a state of 0.1.0, and note what it lacks."""
    groups = state_dict["param_groups"]
    if not any("rank" in group and "max_angle" not in group for group in groups):
        return state_dict
    notes.append(
        "this state was saved by riemann_unn 0.1.0: its sketches start anew, and the momentum of "
        "low-rank steps, which was kept in Euclidean coordinates, fades within some steps"
    )
    renamed = [
        group | {"sketch": "tangent"} if group.get("sketch") == _OLD_SKETCH else group
        for group in groups
    ]
    return {**state_dict, "param_groups": renamed}


def _restore_precision_(optimizer: Optimizer, saved: StateDict, members: list[TaggedParam]) -> None:
    """Copy loaded tensors in the precision in which they were saved, which torch may lower."""
    is_tensor = getattr(optimizer, "_capturable", False)
    _restore_counts_(optimizer, saved)
    for member in members:
        kept = optimizer.state.get(member.param, {})
        kept.pop(_OLD_START, None)
        if START in kept:  # it is written in place, and may belong to another optimizer too
            kept[START] = kept[START].clone()
        if STEP in kept:
            kept[STEP] = _count_as(kept[STEP], is_tensor, member.memory.device)
            kept[COORDINATES] = as_tensor(coordinates_of(member.manifold), member.memory.device)
    half = {member.param for member in members if member.is_half}
    keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, p in zip(keys, params, strict=True):
        for name, value in saved["state"].get(key, {}).items():
            # Scalars such as ASGD's eta do not have the parameter's dtype either.
            if isinstance(value, Tensor) and (p in half or value.ndim == 0):
                now = optimizer.state[p].get(name)
                if now is not None and value.is_floating_point() and value.dtype is not now.dtype:
                    optimizer.state[p][name] = value.detach().to(now.device, copy=True)
    for p in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        kept = optimizer.state.get(p, {})
        for name, value in kept.items():
            if name != START and isinstance(value, Tensor) and value.shape == p.shape:
                kept[name] = placed_like(value, p)


def _restore_counts_(optimizer: Optimizer, saved: StateDict) -> None:
    """Restore saved step counts, which torch casts to the parameter's dtype."""
    keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, p in zip(keys, params, strict=True):
        if STEP in saved["state"].get(key, {}):
            optimizer.state[p][STEP] = saved["state"][key][STEP]


def _count_as(count: int | Tensor, is_tensor: bool, device: torch.device) -> int | Tensor:
    """Return a copy of a step count, as a tensor or an int."""
    if not is_tensor:
        return int(count)
    return torch.full((), int(count), dtype=torch.int64, device=device)


# Checks -----------------------------------------------------------------------------


def _check(
    state_dict: StateDict, base: Optimizer, members: list[TaggedParam], notes: list[str]
) -> None:
    """Refuse a state of another base, rank, shape or other coordinates."""
    groups, saved_groups = base.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        return  # torch refuses it
    tagged = {member.param: member for member in members}
    euclidean = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_class(base, group, saved, f"param_groups[{index}]")
        if any(p in tagged for p in group["params"]):
            _check_rank(group, saved, f"param_groups[{index}]")
        for i, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            kept = state_dict["state"].get(key)
            if not kept:
                continue
            member = tagged.get(p)
            where = f"param_groups[{index}]['params'][{i}]"
            name = member.name if member else repr(key) if isinstance(key, str) else where
            of_base = {
                entry: value
                for entry, value in kept.items()
                if entry not in _OURS and isinstance(value, Tensor) and value.ndim > 0
            }
            if member and of_base and STEP not in kept and "rank" not in saved:
                euclidean.append(name)
            else:
                _check_coordinates(kept, bool(of_base), member, name)
            _check_shapes(p, of_base if _is_torchs(base) else {}, kept, member, name)
    if euclidean:
        notes.append(
            f"this is a state of {type(base).__name__} alone: what it keeps of the tagged "
            f"{', '.join(euclidean)} is in Euclidean coordinates, is read as of the tangent space, "
            "and fades within some steps; to begin them anew drop their entries of "
            "state_dict['state']"
        )


def _is_torchs(base: Optimizer) -> bool:
    """Whether the base is torch's, so that the shapes of its state are known."""
    # L-BFGS keeps vectors over all parameters in the state of the first.
    return type(base).__module__.startswith("torch.optim.") and not isinstance(base, LBFGS)


def _check_class(base: Optimizer, group: dict[str, Any], saved: dict[str, Any], name: str) -> None:
    ours, theirs = type(base).__name__, saved.get(BASE_CLASS)
    if theirs is not None and theirs != ours:
        raise StateError(
            f"{name} was saved with base={theirs}, and this optimizer has base={ours}; build it "
            f"with base={theirs}. Nothing was loaded"
        )
    if theirs is None and _is_torchs(base):
        # A state of an older torch may lack options, which the class fills in, as when unpickled.
        probe = object.__new__(type(base))
        filled = [{**saved, "params": []}]
        probe.__setstate__({"defaults": dict(base.defaults), "state": {}, "param_groups": filled})
        lacking = sorted((base.defaults.keys() & group.keys()) - probe.param_groups[0].keys())
        if lacking:
            raise StateError(
                f"{name} of the state lacks {', '.join(lacking)}, options of {ours}: it was saved "
                "by another class, so build the optimizer with that as its base. Nothing was loaded"
            )


def _check_rank(group: dict[str, Any], saved: dict[str, Any], name: str) -> None:
    ours, theirs = group["rank"], saved.get("rank", group["rank"])
    if ours != theirs:
        raise StateError(
            f"{name} was saved with rank={theirs}, and this optimizer has rank={ours}; build it "
            f"with rank={theirs}, which a group may change afterwards. Nothing was loaded"
        )


def _check_shapes(
    p: Tensor, of_base: StateDict, kept: StateDict, member: TaggedParam | None, name: str
) -> None:
    shapes = {
        entry: value.shape
        for entry, value in of_base.items()
        if len(value.shape) != p.ndim
        or any(n not in (1, m) for n, m in zip(value.shape, p.shape, strict=True))
    }
    if MASTER in kept and kept[MASTER].shape != p.shape:
        shapes[MASTER] = kept[MASTER].shape
    if member is not None and START in kept and not _can_start(kept[START], member):
        shapes[START] = kept[START].shape
    if shapes:
        entry, shape = next(iter(shapes.items()))
        raise StateError(
            f"{name} has shape {tuple(p.shape)}, and {entry!r} of its state {tuple(shape)}: it "
            f"is of another parameter; {_REMEDY}"
        )


def _can_start(rows: Tensor, member: TaggedParam) -> bool:
    """Whether these are rows (..., k, n) of a sketch of the parameter's matrices."""
    x = torch.empty(member.param.shape, dtype=member.param.dtype, device="meta")
    matrices = member.manifold.to_matrices(x)
    shape = list(rows.shape)
    if matrices.is_complex() and not member.param.is_complex() and shape.pop() != 2:
        return False
    batch = torch.Size(shape[:-2]).numel()  # sharded parameters have one batch dimension
    return (batch, shape[-1]) == (matrices.shape[:-2].numel(), matrices.shape[-2])


def _check_coordinates(
    kept: StateDict, has_memory: bool, member: TaggedParam | None, name: str
) -> None:
    if member is None:
        if STEP in kept:
            raise StateError(
                f"{name} has no tag, and its state was saved when it had one, in coordinates of "
                f"the tangent space; tag it, or {_REMEDY}"
            )
        return
    if has_memory and STEP not in kept:
        raise StateError(
            f"{name} is tagged {member.manifold!r}, and its state was saved when it had no tag, "
            f"in Euclidean coordinates; {_REMEDY}"
        )
    ours = coordinates_of(member.manifold)
    theirs = _as_name(kept[COORDINATES]) if COORDINATES in kept else ours
    if theirs != ours:
        raise StateError(
            f"{name} is tagged {member.manifold!r}, and its state is in the coordinates of "
            f"{theirs}; tag it so, or {_REMEDY}"
        )


_REMEDY = (
    "to begin it anew drop its entry of state_dict['state'] and load again. Nothing was loaded"
)
