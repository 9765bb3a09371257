"""Tagging: parameters, or those of a module that match patterns, are put on a manifold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import ManifoldError, ManifoldTypeError
from ..manifolds import MatrixManifold
from .attribute import drop_tag_, manifold_of, name_of, set_tag_
from .computed import REMEDY, Computed, computed_tensors, is_of_parametrization
from .flattened import FSDP1, is_flat, refuse_flattened
from .memory import forget_, refuse_lost_in, remember_

__all__ = ["remember_tags_", "tag_", "tagged_parameters", "untag_"]

T = TypeVar("T", Tensor, nn.Module)
_KEEPS = "_keeps_tags"


def _check(name: str, p: object, manifold: object) -> None:
    if not isinstance(manifold, MatrixManifold):
        raise ManifoldTypeError(
            f"{manifold!r} is no manifold of this package; "
            "use an instance such as riemann_unn.Orthogonal()"
        )
    if not isinstance(p, nn.Parameter):
        raise ManifoldTypeError(
            f"{name} is a {type(p).__name__}, not a torch.nn.Parameter; "
            "only parameters can be tagged, so wrap it in torch.nn.Parameter(...), or, if a "
            f"parametrization computes it, call {REMEDY.format('module', 'weight')}"
        )
    if isinstance(p, nn.parameter.UninitializedParameter):
        raise ManifoldTypeError(f"{name} has no shape yet; run the module once, then tag it")
    refuse_flattened(name, p)
    reason = manifold.why_not(p.shape, p.dtype)
    if reason is not None:
        raise ManifoldError(f"{name} cannot be tagged {manifold!r}: it {reason}")


def _keep_on_assign(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Carry tags over to the new parameters of ``load_state_dict(assign=True)``."""
    if not rest[0].get("assign_to_params_buffers", False):
        return
    for name, p in module.named_parameters(recurse=False):
        manifold, value = manifold_of(p), state.get(prefix + name)
        if manifold is not None and isinstance(value, Tensor) and value.shape == p.shape:
            # torch gives its hooks a copy of the caller's dict.
            state[prefix + name] = new = nn.Parameter(value.detach(), p.requires_grad)
            _check(repr(prefix + name), new, manifold)
            set_tag_(new, manifold, name_of(p))


def remember_tags_(module: nn.Module) -> None:
    """Make a module record which of its own parameters are tagged.

    Their tags then survive ``load_state_dict(assign=True)``, and it is an error if something else
    replaces them by an untagged tensor. :func:`tag_` with patterns does this for every module it
    finds parameters in; a module that tags its parameters one by one calls it once.
    """
    own = {name: manifold_of(p) for name, p in module.named_parameters(recurse=False)}
    remember_(module, {name: manifold for name, manifold in own.items() if manifold is not None})
    if not getattr(module, _KEEPS, False):
        module.register_load_state_dict_pre_hook(_keep_on_assign)
        setattr(module, _KEEPS, True)


def _matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern matches a name; an original must be named as such."""
    is_hidden = is_of_parametrization(name) and not is_of_parametrization(pattern)
    return fnmatchcase(name, pattern) and not is_hidden


def _computed_hint(pattern: object, skipped: list[Computed]) -> str:
    first, *others = skipped
    also = f" (so are {', '.join(repr(one.name) for one in others[:3])})" if others else ""
    return (
        f"pattern {pattern!r} matches {first.name!r}, which is no parameter but {first.by}{also}; "
        f"call {first.remedy}, and tag it after that"
    )


def _match(module: nn.Module, patterns: object) -> list[tuple[str, nn.Parameter, object]]:
    if not isinstance(patterns, Mapping):
        raise ManifoldTypeError(
            "a module is tagged with a dict of name patterns, such as "
            f'{{"*.weight_hh_*": riemann_unn.Orthogonal()}}, got {patterns!r}'
        )
    if not patterns:
        raise ManifoldError("no pattern was given, so nothing would be tagged")
    named = list(module.named_parameters(remove_duplicate=False))
    computed = list(computed_tensors(module))
    found = []
    for pattern, manifold in patterns.items():
        matches = [(name, p) for name, p in named if _matches(name, str(pattern))]
        skipped = [one for one in computed if fnmatchcase(one.name, str(pattern))]
        if skipped:
            told = _computed_hint(pattern, skipped)
            if not matches:
                raise ManifoldError(f"{told}. Nothing was tagged")
            warnings.warn(f"{told}; the others that match are tagged", UserWarning, stacklevel=3)
        elif not matches:
            names = ", ".join(repr(name) for name, _ in named) or "none"
            why = f". {FSDP1}" if any(is_flat(p) for _, p in named) else ""
            raise ManifoldError(
                f"pattern {pattern!r} matches no parameter; the names are: {names}{why}"
            )
        found += [(name, p, manifold) for name, p in matches]
    manifolds: dict[int, tuple[str, object]] = {}
    for name, p, manifold in found:
        first = manifolds.setdefault(id(p), (name, manifold))
        if first[1] != manifold:
            raise ManifoldError(
                f"{name!r} is matched by patterns with {first[1]!r} and {manifold!r}; keep one"
            )
    return found


def tag_(target: T, manifold: MatrixManifold | Mapping[str, MatrixManifold]) -> T:
    """Tag parameters in place: say which manifold each is to stay on.

    The parameter stays the same object with the same values: put it on its
    manifold with :func:`riemann_unn.init.warm_start_`, and train it with an
    optimizer of :mod:`riemann_unn.optim`. The tag survives ``deepcopy``,
    ``pickle``, ``.to()``, ``torch.compile`` and ``AveragedModel``, and for a module tagged by
    patterns ``load_state_dict(assign=True)``. That makes new parameters, so create the optimizer
    afterwards. ``fully_shard``, ``parallelize_module``, ``to_empty`` and whatever else replaces
    parameters loses their tags: tag again after it. A module tagged by patterns remembers them, so
    that an optimizer, :func:`tagged_parameters`, :func:`riemann_unn.orthogonality_error` or a
    :class:`riemann_unn.Monitor` that finds a parameter without its tag raises.

    A weight that a parametrization computes, of torch or geotorch, is no parameter: it is named in
    an error, or in a warning where a pattern matches others too, with the call that makes it one.
    ``torch.nn.Parameter(p)`` of a tagged p, which ``parametrizations.weight_norm`` makes, is
    refused by torch, since p is of a subclass; make one of ``p.detach()``, and tag that.
    Files of whole modules hold their classes, so that ``torch.load`` needs ``weights_only=False``;
    a ``state_dict`` has plain tensors, and is loaded into a tagged module as into any.

    Args:
        target: a parameter, or a module.
        manifold: for a parameter its manifold; for a module a dict from glob
            patterns over its parameter names to manifolds.

    Returns:
        ``target``.

    Raises:
        ManifoldError: a pattern matches nothing, or a shape or dtype does not
            fit; nothing is tagged then.
        ManifoldTypeError: the target is no parameter or module, or the
            manifold is none.
    """
    if isinstance(target, nn.Module):
        found = _match(target, manifold)
        for name, p, m in found:
            _check(repr(name), p, m)
        for name, p, m in found:
            assert isinstance(m, MatrixManifold)
            set_tag_(p, m, name)
        remember_(target, {name: m for name, _, m in found if isinstance(m, MatrixManifold)})
        for owner in target.modules():
            if any(manifold_of(p) is not None for p in owner.parameters(recurse=False)):
                remember_tags_(owner)
        return target
    if isinstance(manifold, Mapping):
        raise ManifoldTypeError(
            f"patterns need a module, got a {type(target).__name__}; "
            "give the parameter one manifold, or pass the module"
        )
    _check("the target", target, manifold)
    set_tag_(target, manifold)  # type: ignore[arg-type]
    return target


def untag_(target: T) -> T:
    """Remove the tag of a parameter, or all tags of a module, in place.

    Modules and optimizers drop their records of the tag.

    Args:
        target: a parameter or a module; untagged ones stay as they are.

    Returns:
        ``target``.

    Raises:
        ManifoldTypeError: the target is neither.
    """
    if not isinstance(target, (nn.Module, Tensor)):
        raise ManifoldTypeError(
            f"cannot untag a {type(target).__name__}: pass a parameter or module"
        )
    for p in target.parameters() if isinstance(target, nn.Module) else [target]:
        drop_tag_(p)
    forget_(target)
    return target


def tagged_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the name and parameter of every tagged parameter of a module, shared ones once.

    The list can be given to an optimizer as it is, names included.

    Raises:
        LostTagError: an untagged tensor is where a tagged parameter was, see :func:`tag_`.
        ManifoldTypeError: ``module`` is not a module, or FSDP1 has flattened a tagged parameter.
    """
    if not isinstance(module, nn.Module):
        raise ManifoldTypeError(f"a torch.nn.Module is needed, got a {type(module).__name__}")
    refuse_lost_in(module)
    found = [(name, p) for name, p in module.named_parameters() if manifold_of(p) is not None]
    for name, p in found:
        refuse_flattened(repr(name), p)
    return found
