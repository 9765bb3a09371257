"""Path conditioning: of all weights that compute a ReLU network, those that train well."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ...errors import GraphError
from ...graph import ModelGraph, trace
from ...graph.lifting import path_energies
from ...graph.tracing import untouched
from ...interruption import undoing
from ...linalg.precision import in_full_precision
from ...linalg.rescaling import EnergyBlock, Rescaling, balance_energies
from ...tagging import manifold_of
from ..record import ModelRecord
from .report import ClosedLayer, PathConditioning, RescaledGroup

__all__ = ["ClosedLayer", "PathConditioning", "RescaledGroup", "path_condition_"]

_METHODS = ("logdet", "enorm")


def path_condition_(
    model: nn.Module,
    data: Any = None,
    *,
    method: Literal["logdet", "enorm"] = "logdet",
    reference: Mapping[str, Tensor] | None = None,
    inputs: Any = None,
    tol: float = 1e-9,
) -> PathConditioning:
    r"""Rescale the hidden channels of a ReLU network, in place, so that it trains faster.

    Its function stays as it is: what feeds a channel is multiplied by a positive number, and what
    reads the channel is divided by it. The numbers minimise

    .. math:: F(z) = n \log \sum_i r_i^{-1} g_i \, e^{(Bz)_i} - \sum_i (Bz)_i

    which aligns the diagonal g of the path kernel with the reference r. B has a row for each of the
    n parameters, +1 for the channel it reads and -1 for the one it feeds, and parameter i is
    multiplied by :math:`e^{-(Bz)_i/2}`. With ``"enorm"`` the sum of squares of all parameters,
    :math:`\sum_i \theta_i^2 e^{-(Bz)_i}`, is minimised instead.

    The model is traced, and channels are rescaled across linear and convolutional layers, ReLUs,
    pooling, dropout, reshapes, sums, concatenation and batch normalisation, whose affine part is
    scaled. Everything else closes them, as do parameters that are tagged with a manifold or do not
    require a gradient. Mode, buffers, gradients and the global random state stay as they are. State
    of an optimizer does not follow: rescale first, then create the optimizer.

    Args:
        model: the model; it may be in training or in evaluation mode, and is exact in both.
        data: an input, or a tuple of inputs, whose squares feed the path kernel; ones if left out.
        method: ``"logdet"`` (path conditioning) or ``"enorm"`` (equi-normalisation).
        reference: r by parameter name, positive, of the parameter's shape; one for any other.
        inputs: an example input, or a tuple of them, of which only the shapes matter. Without it
            and without ``data`` they are guessed from the first layer.
        tol: relative size of the gradient at which the solver stops.

    Returns:
        What was done; its ``undo()`` takes it back.

    Raises:
        GraphError: the model cannot be traced, an input shape is needed, or there is no channel to
            rescale; the message says why.
        ValueError: a parameter holds NaN or infinity, its energy overflows, or an argument is out
            of range. The model is then as it was.
        TypeError: ``model`` is no module.

    Reference:
        Lebeurrier, Vayer, Gribonval, "Path-conditioned training" (2026); Stock, Graham, Gribonval,
        Jégou, "Equi-normalization of neural networks" (2019).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, got a {type(model).__name__}")
    _check_arguments(method, reference, tol)
    record = ModelRecord(model)

    @in_full_precision
    def work() -> PathConditioning:
        return _path_condition(model, data, method, reference, inputs, tol, record)

    return undoing(work, record.restore)


def _path_condition(
    model: nn.Module,
    data: Any,
    method: str,
    reference: Mapping[str, Tensor] | None,
    inputs: Any,
    tol: float,
    record: ModelRecord,
) -> PathConditioning:
    rigid = _rigid(model)
    given = None if data is None else _tuple(data)
    examples = given if inputs is None else _tuple(inputs)
    view = trace(model, *(examples or ()), rigid=rigid)
    if not bool(view.free.any()):
        raise GraphError("there is no channel to rescale. " + _why_none(view))
    own = dict(model.named_parameters(remove_duplicate=False))
    energies = path_energies(model, view, given)
    for name, g in energies.items():
        if not _finite(g):
            raise ValueError(
                f"the path energies of '{name}' overflow; divide large weights or the data by a "
                "constant first. No parameter was changed"
            )
    channels = int(view.free.sum())
    number = torch.where(view.free, view.free.cumsum(0) - 1, channels)
    solution, frozen = _solve(view, number, channels, energies, own, method, reference, tol)
    scales = torch.cat([solution.z, solution.z.new_zeros(1)])[number].mul(0.5).exp()
    samples = given or _random_inputs(view, model, guessed=not examples)
    names = list(view.scalings)
    values = record.keep(own[name] for name in names)
    original = {name: (own[name], value) for name, value in zip(names, values, strict=True)}
    before = _outputs(model, samples)
    view.scale_(own, scales)
    broken = [k for k, (p, _) in original.items() if not _finite(p)]
    if broken:
        raise ValueError(
            f"'{broken[0]}' overflows {own[broken[0]].dtype} when rescaled; use a wider type. "
            "No parameter was changed"
        )
    change = _change(before, _outputs(model, samples))
    if change > _limit(own):
        _check_in_double(model, view, original, scales, samples, change)
    size = scales[view.free].log().abs()
    return PathConditioning(
        method,
        solution.before,
        solution.after,
        solution.gradient,
        solution.iterations,
        solution.converged,
        sum(p.numel() for p, _ in original.values()),
        float(size.max().exp()),
        float(size.median().exp()),
        _groups(view, number, scales, torch.cat([frozen, frozen.new_zeros(1)])),
        _closed(view),
        change,
        {name: scaling.factor(scales) for name, scaling in view.scalings.items()},
        original,
    )


def _check_arguments(method: str, reference: object, tol: float) -> None:
    if method not in _METHODS:
        raise ValueError(f"{method=} is unknown; choose one of {_METHODS}")
    if not 0 < tol < 1:
        raise ValueError(f"tol is a relative tolerance, between 0 and 1, got {tol}")
    if reference is None:
        return
    if method != "logdet":
        raise ValueError(f"a reference has no meaning for {method=}; leave it out")
    if not isinstance(reference, Mapping):
        raise TypeError(
            "reference is a dict from parameter names to positive tensors, or None for the "
            f"identity, got a {type(reference).__name__}"
        )


def _rigid(model: nn.Module) -> dict[str, str]:
    """Parameters that stay as they are, each with the reason; NaNs are found on the way."""
    rigid = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if isinstance(p, nn.parameter.UninitializedParameter):
            continue  # tracing says so better
        if not _finite(p):
            raise ValueError(
                f"'{name}' holds NaN or infinity; initialise it again. No parameter was changed"
            )
        manifold = manifold_of(p)
        if manifold is not None:
            rigid[name] = f"'{name}' is tagged {manifold!r}"
        elif not p.requires_grad:
            rigid[name] = f"'{name}' does not require a gradient"
    return rigid


def _finite(x: Tensor) -> bool:
    largest = torch.linalg.vector_norm(x.detach(), ord=math.inf) if x.numel() else x.new_zeros(())
    return bool(torch.isfinite(largest))


def _tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _why_none(view: ModelGraph) -> str:
    closed = _closed(view)
    if not closed:
        return "No layer with a weight was found"
    return "; ".join(f"the output of '{c.layer}': {c.reason}" for c in closed)


def _solve(
    view: ModelGraph,
    number: Tensor,
    channels: int,
    energies: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    method: str,
    reference: Mapping[str, Tensor] | None,
    tol: float,
) -> tuple[Rescaling, Tensor]:
    weighted = dict(energies)
    for name, r in (reference or {}).items():
        if name not in weighted or r.shape != weighted[name].shape or not bool((r > 0).all()):
            names = ", ".join(f"'{n}' {tuple(g.shape)}" for n, g in weighted.items())
            raise ValueError(
                f"the reference of '{name}' must be positive, of the shape of one of the traced "
                f"parameters: {names}; got {tuple(r.shape)}"
            )
        weighted[name] = weighted[name] / r.detach().double().to(weighted[name].device)
    blocks = _blocks(view, number, channels, weighted)
    if method == "logdet":
        # A common factor shifts the objective and nothing else; it keeps sums from overflowing.
        peak = max(float(b.energy.max()) for b in blocks)
        unit = 2.0 ** math.frexp(peak)[1] if peak > 0 else 1.0
        for block in blocks:
            block.energy.div_(unit)
        solution = _told(balance_energies(blocks, channels, tol=tol), tol)
        shift = sum(g.numel() for g in weighted.values()) * math.log(unit)
        return _shifted(solution, shift), solution.dead
    # What no path passes is left alone here too: its norm could shrink for ever.
    dead = balance_energies(blocks, channels, tol=1.0).dead
    squares = {name: own[name].detach().abs().double().square() for name in energies}
    norms = _blocks(view, number, channels, squares)
    solution = _told(balance_energies(norms, channels, linear=False, tol=tol, frozen=dead), tol)
    before, after = math.exp(solution.before), math.exp(solution.after)
    solution = Rescaling(-solution.z, before, after, *_rest(solution))
    return solution, solution.dead


def _told(solution: Rescaling, tol: float) -> Rescaling:
    """Warn if the solver stopped early."""
    if not solution.converged:
        warnings.warn(
            f"path conditioning stopped at a relative gradient of {solution.gradient:.1e}, above "
            f"{tol=}: the weights are no worse than before, but not optimal. Where many weights "
            "are exactly zero there may be no optimum; otherwise raise tol, or call undo()",
            UserWarning,
            stacklevel=8,
        )
    return solution


def _shifted(solution: Rescaling, shift: float) -> Rescaling:
    return Rescaling(solution.z, solution.before + shift, solution.after + shift, *_rest(solution))


def _rest(solution: Rescaling) -> tuple[float, int, bool, Tensor]:
    return solution.gradient, solution.iterations, solution.converged, solution.dead


def _blocks(
    view: ModelGraph, number: Tensor, channels: int, values: Mapping[str, Tensor]
) -> list[EnergyBlock]:
    """The blocks of the solver; rows and columns that nothing scales are summed."""
    blocks = []
    for name, scaling in view.scalings.items():
        energy, gain, loss = scaling.matrices(values[name].cpu())
        gain = number[gain]
        columns = (
            torch.full((len(gain), energy.shape[2]), channels) if loss is None else number[loss]
        )
        if bool((columns == channels).all()):
            energy, columns = energy.sum(2, keepdim=True), columns[:, :1]
        if bool((gain == channels).all()):
            energy, gain = energy.sum(1, keepdim=True), gain[:, :1]
        count = values[name].numel() // energy.numel()
        blocks.append(EnergyBlock(energy.contiguous(), gain, columns, count))
    return blocks


def _random_inputs(view: ModelGraph, model: nn.Module, *, guessed: bool) -> tuple[Any, ...]:
    """Inputs of the traced shapes, from a generator of their own."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def draw(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        # A guess has two examples, too few for the statistics of batch normalisation.
        shape = (8, *x.shape[1:]) if guessed and x.shape[:1] == (2,) else x.shape
        if x.is_floating_point() or x.is_complex():
            return torch.randn(shape, dtype=x.dtype, generator=generator).to(device)
        return torch.zeros(shape, dtype=x.dtype, device=device)

    return tuple(tree_map(draw, x) for x in view.inputs.values())


def _outputs(
    model: nn.Module, inputs: Sequence[Any], parameters: Mapping[str, Tensor] | None = None
) -> list[Tensor] | None:
    """All output tensors, or None; the model's buffers and the random state are not touched."""
    state = {name: b.clone() for name, b in model.named_buffers()}
    if parameters is not None:
        state = {name: _double(b) for name, b in state.items()}
        for name, p in model.named_parameters():
            value = parameters.get(name, _double(p.detach()))
            state[name] = nn.Parameter(value, requires_grad=False)
        inputs = tree_map(lambda x: _double(x) if isinstance(x, Tensor) else x, tuple(inputs))
    try:
        with untouched(model), torch.no_grad():
            torch.manual_seed(0)
            result = torch.func.functional_call(model, state, tuple(inputs))
    except Exception:
        return None
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def _double(x: Tensor) -> Tensor:
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.is_floating_point() else x


def _change(before: list[Tensor] | None, after: list[Tensor] | None) -> float:
    """The largest relative change of an output."""
    if before is None or after is None:
        return math.nan
    found = [0.0]
    for a, b in zip(before, after, strict=True):
        if a.is_floating_point() or a.is_complex():
            a, b = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b))
            size = float(torch.linalg.vector_norm(a))
            found.append(float(torch.linalg.vector_norm(a - b)) / (size or 1.0))
    return max(found)


def _limit(own: Mapping[str, Tensor]) -> float:
    """The change of an output that rounding may explain; above it one looks closer."""
    dtypes = [p.dtype for p in own.values() if p.is_floating_point() or p.is_complex()]
    return math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes))


def _check_in_double(
    model: nn.Module,
    view: ModelGraph,
    original: Mapping[str, tuple[Tensor, Tensor]],
    scales: Tensor,
    inputs: Sequence[Any],
    change: float,
) -> None:
    """Tell a function that rounding changes this much from one that rescaling changes.

    Batch statistics of two nearly equal examples, for instance, magnify any rounding of weights.
    """
    parameters = {name: _double(values).clone() for name, (_, values) in original.items()}
    scaled = {name: p.detach().clone() for name, (p, _) in original.items()}
    with torch.no_grad():  # the model too, in case that it reads parameters by stealth
        for p, values in original.values():
            p.copy_(values)
        before = _outputs(model, inputs, parameters)
        for name, (p, _) in original.items():
            p.copy_(scaled[name])
    view.scale_(parameters, scales)
    exact = _change(before, _outputs(model, inputs, parameters))
    if not exact <= 1e-6:
        raise GraphError(
            f"rescaling would change the model's output by {change:.1e}: either the model draws "
            "random numbers of its own, or it does something that tracing did not see. "
            "No parameter was changed"
        )


def _groups(
    view: ModelGraph, number: Tensor, scales: Tensor, dead: Tensor
) -> tuple[RescaledGroup, ...]:
    fed: list[list[str]] = [[] for _ in view.reasons]
    read: list[list[str]] = [[] for _ in view.reasons]
    for name, scaling in view.scalings.items():
        for index, lists in ((scaling.gain, fed), (scaling.loss, read)):
            for i in index.unique().tolist() if index is not None else ():
                lists[i].append(name)
    members: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for i in torch.nonzero(view.free).squeeze(1).tolist():
        members.setdefault((tuple(fed[i]), tuple(read[i])), []).append(i)
    return tuple(
        RescaledGroup(
            *names,
            len(ids),
            float(scales[ids].log().abs().max().exp()),
            int(dead[number[ids]].sum()),
        )
        for names, ids in members.items()
    )


def _closed(view: ModelGraph) -> tuple[ClosedLayer, ...]:
    found = []
    for layer in view.layers:
        counts: dict[str, int] = {}
        for i in layer.outputs.tolist():
            reason = view.reasons[i]
            if reason is not None:
                counts[reason] = counts.get(reason, 0) + 1
        found += [ClosedLayer(layer.module or layer.node, c, why) for why, c in counts.items()]
    return tuple(found)
