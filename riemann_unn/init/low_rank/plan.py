"""The choice of layers to make low-rank, and of their ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...errors import ManifoldError
from ...scalars import plain_scalars
from ...tagging import manifold_of
from .targets import Target, has_counterpart, is_dense_layer, target_of

__all__ = ["Budget", "Candidates", "Curve", "RankSpec", "allocate", "by_pattern", "candidates"]

T = TypeVar("T")
Curve = dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Budget:
    """A budget that :func:`~riemann_unn.init.low_rank_` allocates to the layers.

    Exactly one of the two is given. Every layer starts at rank 1; the step of rank that lowers
    the error most for each parameter it adds is repeated until the budget is used up or met. A
    layer may end up dense. With calibration inputs, in a budget of parameters, the error of a layer
    is weighted by its effect on the model's outputs, measured with that layer alone replaced;
    otherwise all layers have the same weight.

    Attributes:
        parameters: of all matched weights together: a number, or a fraction in (0, 1] of their
            current number.
        error: the mean over the layers of the relative function error, in (0, 1), before the
            refinement, on the inputs that are fitted to; of layers that can be replaced.
    """

    parameters: int | float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if (self.parameters is None) == (self.error is None):
            raise ValueError("a Budget is of parameters or of error: give exactly one")
        if self.error is not None and not 0 < self.error < 1:
            raise ValueError(f"an error budget lies between 0 and 1, got error={self.error!r}")
        p = self.parameters
        if p is not None and (isinstance(p, bool) or p <= 0 or (isinstance(p, float) and p > 1)):
            raise ValueError(f"parameters={p!r} must be a positive number, or a fraction in (0, 1]")


RankSpec = int | float | Mapping[str, int | float] | Budget


@dataclass(frozen=True)
class Candidates:
    """The matched layers: those to replace, and the reasons for skipping others.

    Attributes:
        layers: by name, shared ones once.
        names: every name of each layer.
        skipped: reasons by name.
    """

    layers: dict[str, Target]
    names: dict[str, list[str]]
    skipped: dict[str, str]

    def put_(self, model: nn.Module, name: str, layer: nn.Module) -> None:
        """Replace a layer by another module, wherever it is registered."""
        for alias in self.names[name]:
            parent, _, own = alias.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)


def _matches(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def by_pattern(spec: Mapping[str, T], among: Candidates, what: str) -> dict[str, T]:
    """Return the value of each layer to replace that a pattern matches.

    Args:
        spec: values by pattern.
        among: the layers.
        what: the name of the values, for an error.

    Raises:
        ValueError: a pattern matches no layer, or two give a layer different values.
    """
    found: dict[str, tuple[str, T]] = {}
    for pattern, value in spec.items():
        matched = [name for name, aliases in among.names.items() if _matches(aliases, pattern)]
        if not matched and not _matches(list(among.skipped), pattern):
            raise ValueError(f"{what} pattern {pattern!r} matches no layer; {_listed(among.names)}")
        for name in matched:
            first = found.setdefault(name, (pattern, value))
            if first[1] != value:
                raise ValueError(
                    f"{name!r} is matched by {what} patterns {first[0]!r} and {pattern!r} with "
                    f"{first[1]!r} and {value!r}; keep one"
                )
    return {name: value for name, (_, value) in found.items()}


def _listed(names: Iterable[str]) -> str:
    every = [repr(name) for name in names]
    shown = ", ".join(every[:20]) + (", ..." if len(every) > 20 else "")
    return f"the linear and convolution layers are: {shown or 'none'}"


def candidates(
    model: nn.Module, patterns: str | Iterable[str], *, split: str = "channel"
) -> Candidates:
    """Return the linear and convolution layers whose names match, and those to skip.

    Raises:
        ManifoldError: one of them is tagged.
        TypeError: the patterns are no strings.
        ValueError: a pattern matches none of them, or the model is itself a layer.
    """
    if has_counterpart(model):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place: "
            "pass the module that holds it, or use riemann_unn.nn.LowRankLinear.from_dense"
        )
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in wanted):
        raise TypeError(f"layers must be a name pattern or several, got {patterns!r}")
    modules: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_dense_layer(module):
            modules.setdefault(id(module), (module, []))[1].append(name)
    every = {names[0]: names for _, names in modules.values()}
    for pattern in wanted:
        if not any(_matches(names, pattern) for names in every.values()):
            raise ValueError(f"layers pattern {pattern!r} matches no layer; {_listed(every)}")
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    layers: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    for module, names in modules.values():
        name = names[0]
        if not any(_matches(names, pattern) for pattern in wanted):
            continue
        reason = _why_not(module, names, owners)
        target = None if reason is not None else target_of(module, split=split)
        if target is not None:
            _refuse_tagged(module, name)
            layers[name] = target
        elif reason is not None:
            skipped[name] = reason
    return Candidates(layers, {name: every[name] for name in layers}, skipped)


def _refuse_tagged(module: nn.Module, name: str) -> None:
    for own, p in module.named_parameters(recurse=False):
        manifold = manifold_of(p)
        if manifold is not None:
            raise ManifoldError(
                f"'{name}.{own}' is tagged {manifold!r}, and a low-rank weight cannot be on that "
                "manifold; leave it out with layers=, or call riemann_unn.untag_ on it first. "
                "No layer was changed"
            )


def _why_not(module: nn.Module, names: list[str], owners: dict[int, list[str]]) -> str | None:
    if not has_counterpart(module):
        return f"a {type(module).__name__}, whose forward may differ from that of its base class"
    if isinstance(module, _ConvNd) and module.groups == module.in_channels > 1:
        return f"a depthwise convolution (groups={module.groups}), which mixes no channels"
    if isinstance(module, _ConvNd) and module.groups != 1:
        return f"a grouped convolution (groups={module.groups}), which is block diagonal already"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    if any(hooks) or module._backward_pre_hooks:
        return "it has hooks, which the new layer would lose"
    weight = module._parameters.get("weight")
    if not isinstance(weight, Tensor):
        return "its weight is computed, not a parameter"
    if isinstance(weight, nn.parameter.UninitializedParameter) or weight.is_meta:
        return "its weight has no values yet"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; real floating point is needed"
    for own, p in module.named_parameters(recurse=False):
        mine = {f"{name}.{own}" for name in names}
        others = [name for name in owners.get(id(p), []) if name not in mine]
        if others:
            return f"its {own} is shared with {others[0]!r}, and would no longer be"
    return None


def as_rank(value: object, full: int, name: str) -> int:
    """Return the rank given as a number or as a fraction of the full rank.

    Raises:
        ValueError: it is out of range.
        TypeError: it is no number.
    """
    value = plain_scalars(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"rank of {name!r} must be an int, a fraction, a dict of them by name pattern or a "
            f"riemann_unn.init.Budget, got {value!r}"
        )
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"rank={value} of {name!r} must be at least 1")
        return value
    if not 0 < value <= 1:
        raise ValueError(
            f"rank={value} of {name!r} is a fraction of the full rank, so it must be in (0, 1]; "
            "give an int for a number of directions"
        )
    return max(1, round(value * full))


def rank_grid(most: int, points: int) -> list[int]:
    """Return ranks from 1 to ``most``, evenly spread on a logarithmic scale."""
    return sorted({round(most ** (i / (points - 1))) for i in range(points)}) if most else []


def allocate(
    budget: Budget,
    curves: dict[str, Curve],
    shapes: dict[str, tuple[int, int]],
    *,
    kept: int,
    weights: Mapping[str, float] | None = None,
) -> dict[str, int | None]:
    """Return the rank of each layer under a budget, None for a layer that stays dense.

    Args:
        budget: the budget.
        curves: error by rank of each layer, the ranks ascending from 1; a layer without one stays
            dense.
        shapes: (m, n) of each layer's matrix.
        kept: parameters of each direction besides those in the two factors.
        weights: of the errors of the layers in a budget of parameters; one by default.

    Raises:
        ValueError: rank 1 everywhere takes more parameters than there may be.
    """
    sizes = {name: m * n for name, (m, n) in shapes.items()}
    dense = sum(sizes.values())
    points: dict[str, list[tuple[int | None, int, float]]] = {}
    for name, curve in curves.items():
        m, n = shapes[name]
        weight = 1.0 if weights is None or budget.error is not None else weights[name]
        steps: list[tuple[int | None, int, float]] = [
            (rank, rank * (m + n + kept), weight * errors[1])
            for rank, errors in sorted(curve.items())
        ]
        points[name] = [s for s in steps if s[1] < m * n] + [(None, m * n, 0.0)]
    at = dict.fromkeys(points, 0)
    used = sum(points[name][0][1] if name in points else size for name, size in sizes.items())
    most = float("inf")
    if budget.parameters is not None:
        p = budget.parameters
        most = p * dense if isinstance(p, float) else p
        if used > most:
            raise ValueError(
                f"a budget of {most:,.0f} parameters is less than the {used:,} that the layers "
                "take at rank 1; raise it, or match fewer layers"
            )
    goal = 0.0 if budget.error is None else budget.error * len(points)
    while sum(points[name][i][2] for name, i in at.items()) > goal:
        best: tuple[float, str, int] | None = None
        for name, i in at.items():
            _, cost, error = points[name][i]
            # A later point may have a larger decrease per parameter than the next one.
            for j in range(i + 1, len(points[name])):
                _, other, lower = points[name][j]
                if used + other - cost <= most:
                    decrease = (error - lower) / (other - cost)
                    if best is None or decrease > best[0]:
                        best = (decrease, name, j)
        if best is None or best[0] <= 0:
            break
        _, name, j = best
        used += points[name][j][1] - points[name][at[name]][1]
        at[name] = j
    return {name: points[name][i][0] for name, i in at.items()}
