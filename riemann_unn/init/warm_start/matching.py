"""Matching layers to their original outputs, one after another, on calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...linalg import procrustes, ridge_by_gcv
from ...linalg.procrustes import inner
from ...manifolds import MatrixManifold, rounding_level
from ...tagging import manifold_of
from ..calibration import Batch
from ..recording import Order, Recorder, relative_error, rounding_of
from .folding import Folding
from .layers import AffineLayer, NotAffineError, widened

__all__ = ["Placed", "match_layers_", "own_gains", "owners", "remaining_gain"]

# The weight of the prior, in units of the data's energy: a little always, for directions that the
# data do not determine, and as much as a few rows for each input.
_RIDGE = 1e-3
_ROWS = 0.1
_FLOOR = 0.05
# The number of rows that the old bias counts as; with no more rows nothing is fitted.
_MEAN = 4.0

Owner = tuple[nn.Module, str]


@dataclass
class Placed:
    """A tagged parameter with its point: ``gain * point`` approximates ``weight``."""

    name: str
    parameter: nn.Parameter
    manifold: MatrixManifold
    weight: Tensor
    point: Tensor
    gain: float
    method: str
    note: str = ""
    loss: tuple[float, ...] = ()


def owners(model: nn.Module) -> dict[nn.Parameter, list[Owner]]:
    """Return for each parameter the modules that hold it, and its name there."""
    found: dict[nn.Parameter, list[Owner]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                found.setdefault(p, []).append((module, name))
    return found


def _last_linear(
    model: nn.Module, order: Order, held: Mapping[nn.Parameter, Sequence[Owner]]
) -> nn.Linear | None:
    """Return the linear layer without a tag that runs last, if its weight is its own."""
    for module in reversed(order.modules):
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight is not None and manifold_of(weight) is None:
            return module if len(held[weight]) == 1 else None
    return None


def match_layers_(
    model: nn.Module,
    placed: Mapping[str, Placed],
    batches: Sequence[Batch],
    folding: Folding | None,
    *,
    refit: bool,
) -> list[str]:
    """Replace tagged weights by gain times the best point, in order, given the earlier ones.

    Args:
        model: the model with its trained weights; it is run in the mode it is in.
        placed: the tagged parameters with their nearest points; rewritten as they are matched.
        batches: what to run it on.
        folding: which gains are free; None if none is.
        refit: fit the last linear layer without a tag, too.

    Returns:
        The names of the biases and weights that were fitted.
    """
    held = owners(model)
    by_module: dict[nn.Module, Placed] = {}
    for item in placed.values():
        found = held[item.parameter]
        if len(found) > 1:
            item.note, item.method = "its weight is shared by several modules", "polar"
        elif found[0][0] in by_module:
            for one in (item, by_module[found[0][0]]):
                one.note, one.method = "its module has several tagged weights", "polar"
        else:
            by_module[found[0][0]] = item
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    recorder = Recorder(model, batches)
    outputs, order = recorder.outputs({*by_module, *linears})
    head = _last_linear(model, order, held) if refit else None
    gains: dict[str, float] = {}
    for module, item in by_module.items():
        if item.method == "procrustes" and module not in outputs:
            item.note, item.method = "no module that returns one tensor calls it", "polar"
    for item in placed.values():
        if item.method == "polar":
            _write_(item, folding, gains)
    fitted: list[str] = []
    names = {p: name for name, p in model.named_parameters()}
    for module in order.modules:
        if module in by_module and by_module[module].method == "procrustes":
            item = by_module[module]
            bias = _own_bias(module, held)
            calls = recorder.inputs(module, order)
            if _match_(item, module, bias, calls, outputs[module], folding, gains):
                fitted += [names[module.get_parameter(bias)]] if bias is not None else []
            _write_(item, folding, gains)
        elif module is head and placed:
            assert isinstance(module, nn.Linear)
            if _refit_(module, recorder.inputs(module, order), outputs[module]):
                fitted += [names[p] for p in module.parameters(recurse=False)]
    return fitted


def _own_bias(module: nn.Module, held: Mapping[nn.Parameter, Sequence[Owner]]) -> str | None:
    bias = module._parameters.get("bias")
    free = bias is not None and manifold_of(bias) is None and len(held[bias]) == 1
    return "bias" if free else None


def own_gains(placed: Mapping[str, Placed], folding: Folding | None) -> dict[str, float]:
    """Return the gains that are folded, by name."""
    free = folding.foldable if folding is not None else set()
    return {name: item.gain for name, item in placed.items() if name in free and item.gain > 0}


def remaining_gain(name: str, folding: Folding | None, gains: Mapping[str, float]) -> float:
    """Return the gain of a layer whose own is not folded, from the scales of its neighbours."""
    into, out = folding.scales(name, gains) if folding is not None else (1.0, 1.0)
    return into / out


def _write_(item: Placed, folding: Folding | None, gains: dict[str, float]) -> None:
    """Write gain times the point, and record the gain if it is folded."""
    gains.update(own_gains({item.name: item}, folding))
    gain = gains.get(item.name) or remaining_gain(item.name, folding, gains)
    item.parameter.copy_(gain * item.point)


def _match_(
    item: Placed,
    module: nn.Module,
    bias: str | None,
    calls: list[Batch],
    outputs: list[Tensor],
    folding: Folding | None,
    gains: Mapping[str, float],
) -> bool:
    """Find the best point, gain and bias for one layer; return whether the bias was fitted."""
    manifold, weight = item.manifold, widened(item.weight)
    name = next(n for n, p in module._parameters.items() if p is item.parameter)
    if _is_solved(item, module, calls, outputs):
        return False
    try:
        layer = AffineLayer(module, name, bias, calls)
    except NotAffineError:
        item.note, item.method = "its layer is not affine in it, or ignores it here", "polar"
        return False
    target = layer.target(outputs)
    cross, normal = layer.adjoint(layer.centred(target)), layer.normal_map()
    prior = _prior(manifold, weight)
    energy = inner(weight, normal(weight)) / max(inner(weight, prior(weight)), 1e-300)
    rows = sum(y.numel() for y in outputs) / max(weight.shape[0], 1)
    ridge = energy * (_RIDGE + _ROWS * weight[0].numel() / rows)
    if not ridge > 0 or rows <= _MEAN:
        item.note, item.method = (
            "there are too few calibration inputs, or all alike: give more",
            "polar",
        )
        return False
    free = folding is not None and item.name in folding.foldable
    point, gain = procrustes(
        cross + ridge * prior(weight),
        lambda u: normal(u) + ridge * prior(u),
        project=manifold.projx,
        starts=[widened(item.point)],
        gain=None if free else remaining_gain(item.name, folding, gains),
    )
    if not (gain > 0 and bool(torch.isfinite(point).all())):
        item.note, item.method = "its outputs do not correlate with its inputs", "polar"
        return False
    item.point = point.to(item.weight.dtype)
    if free:
        item.gain = gain
    values = layer.bias_of(
        [t - gain * o for t, o in zip(target, layer(widened(item.point)), strict=True)]
    )
    if values is not None and bias is not None:
        old = module.get_parameter(bias)
        old.add_((values - old) * (rows / (rows + _MEAN)))
    return values is not None


def _prior(manifold: MatrixManifold, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the normal equations of the prior, inputs distributed like the weight's rows.

    Its solution alone is the nearest point with the warm start's gain.
    """
    m, shape = manifold.to_matrices(weight), weight.shape
    gram = m.mH @ m
    mean = gram.diagonal(dim1=-2, dim2=-1).real.mean()
    gram = gram / mean
    gram.diagonal(dim1=-2, dim2=-1).add_(_FLOOR)
    return lambda u: manifold.from_matrices(manifold.to_matrices(u) @ gram, shape)


def _is_solved(
    item: Placed, module: nn.Module, calls: Sequence[Batch], outputs: Sequence[Tensor]
) -> bool:
    """Whether the weight is on the manifold, and gives the target outputs, to rounding."""
    off = item.manifold.orthogonality_error(item.weight)
    if off.numel() and float(off.max()) > rounding_level(item.weight.dtype):
        return False
    if not item.manifold.has_det(item.weight):
        return False
    return _agrees([call(module) for call in calls], outputs)


def _agrees(new: Sequence[Tensor], old: Sequence[Tensor]) -> bool:
    return relative_error(new, old) <= rounding_of(old)


def _refit_(module: nn.Linear, calls: Sequence[Batch], outputs: Sequence[Tensor]) -> bool:
    """Fit a linear layer to its old outputs, near its old weights; return whether it moved."""
    now = [call(module) for call in calls]
    rows = sum(y.numel() for y in outputs) // max(module.out_features, 1)
    if rows <= _MEAN or _agrees(now, outputs):
        return False
    double = torch.complex128 if module.weight.is_complex() else torch.float64
    width = module.in_features
    x = torch.cat([(*c.args, *c.kwargs.values())[0].reshape(-1, width) for c in calls]).to(double)
    wanted = [(y - a).reshape(-1, module.out_features) for y, a in zip(outputs, now, strict=True)]
    y = torch.cat(wanted).to(double)
    bias = module._parameters.get("bias")
    x_mean, y_mean = x.mean(0), y.mean(0)
    if bias is None:
        x_mean, y_mean = torch.zeros_like(x_mean), torch.zeros_like(y_mean)
    change = ridge_by_gcv(x - x_mean, y - y_mean)
    module.weight.add_(change.mT.to(module.weight.dtype))
    if bias is not None:
        shift = y_mean * (rows / (rows + _MEAN)) - x_mean @ change
        bias.add_(shift.to(bias.dtype))
    return True
