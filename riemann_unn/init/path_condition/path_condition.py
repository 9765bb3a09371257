"""Path conditioning: rescaling a ReLU network, without changing its function, to train well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ...errors import GraphError
from ...graph import ModelGraph, trace
from ...graph.isolation import preserved
from ...graph.lifting import path_energies
from ...graph.program import Called, named_tensors, unwrapped
from ...interruption import undoing
from ...linalg.precision import in_full_precision
from ...tagging import manifold_of
from ..calibration import Batch, batches_of
from ..renamed import renamed
from ..snapshot import ModelSnapshot
from .objective import origin_of, solve, weighted_by
from .report import ClosedLayer, PathConditioning, RescaledGroup

__all__ = ["ClosedLayer", "PathConditioning", "RescaledGroup", "path_condition_"]

_METHODS = ("logdet", "enorm")


@renamed(data="calibration", tol="tolerance")
def path_condition_(
    model: nn.Module,
    calibration: Any = None,
    *,
    method: Literal["logdet", "enorm"] = "logdet",
    reference: Mapping[str, Tensor] | None = None,
    inputs: Any = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    scale_frozen: bool = False,
    tolerance: float = 1e-9,
) -> PathConditioning:
    r"""Rescale the hidden channels of a ReLU network, in place, so that it trains faster.

    Its function does not change: weights that feed a channel are multiplied by a positive number,
    and weights that read the channel are divided by it. The numbers minimise

    .. math:: F(z) = n \log \sum_i r_i^{-1} g_i \, e^{(Bz)_i} - \sum_i (Bz)_i

    which aligns the diagonal g of the path kernel with the reference r. B has a row for each of the
    n parameters, +1 for the channel it reads and -1 for the one it feeds, and parameter i is
    multiplied by :math:`e^{-(Bz)_i/2}`. With ``"enorm"`` the sum of squares of all parameters,
    :math:`\sum_i \theta_i^2 e^{-(Bz)_i}`, is minimised instead.

    The model's operations are read by ``torch.export``, whatever its classes. Channels
    are rescaled across linear maps and convolutions, ReLUs, pooling, dropout, reshapes, sums,
    concatenation, gates, attention's values, and the affine part of normalisations. Other
    operations close them, that is keep their scale at one, as do parameters that are tagged with a
    manifold or do not require a gradient. Each part of the model through which positive scalings
    pass, such as the ReLU layers in a transformer's block, is a separate network with a separate F;
    the sum is reported. Mode, buffers, gradients and the global random state do not change. An
    optimizer's state is not rescaled: rescale first, then create the optimizer.

    Args:
        model: the model; it may be in training or in evaluation mode, and is exact in both.
            Compiled and data-parallel wrappers are removed.
        calibration: inputs whose squares feed the path kernel, ones if left out; a tensor, a tuple
            of positional or a dict of keyword inputs, or an iterable of these, as the page on
            calibration data says. Of several batches those with the shapes of the first are used.
        method: ``"logdet"`` (path conditioning) or ``"enorm"`` (equi-normalisation).
        reference: r by parameter name, positive, of the parameter's shape; one for any other.
        inputs: example inputs, as ``calibration``, of which only the shapes matter. Without it and
            without ``calibration`` an input is inferred from the first layer.
        forward: how the model is called on a batch, ``forward(model, batch)``, where that is not by
            the batch's inputs.
        scale_frozen: also scale parameters that do not require a gradient, and buffers.
        tolerance: relative size of the gradient at which the solver stops.

    Returns:
        The report; its ``undo()`` restores the weights.

    Raises:
        GraphError: the model cannot be read, an input is needed, or there is no channel to rescale;
            the message says why.
        ValueError: a parameter holds NaN or infinity, its energy overflows, or an argument is out
            of range. The model is then as it was.
        TypeError: ``model`` is no module, or its code or its values are not there.

    Reference:
        Lebeurrier, Vayer, Gribonval, "Path-conditioned training" (2026); Stock, Graham, Gribonval,
        Jégou, "Equi-normalization of neural networks" (2019).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, got a {type(model).__name__}")
    _check_arguments(method, reference, tolerance)
    model = unwrapped(model)
    record = ModelSnapshot(model)

    @in_full_precision
    def work() -> PathConditioning:
        read = _Read(model, calibration, inputs, forward, scale_frozen)
        return _path_condition(read, method, reference, tolerance, record)

    return undoing(work, record.restore)


class _Read:
    """A model as read for one call, with the inputs that it runs on."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Any,
        inputs: Any,
        forward: Callable[[nn.Module, Any], Any] | None,
        scale_frozen: bool,
    ) -> None:
        def batches(data: Any) -> list[Batch]:
            return [] if data is None else batches_of(data, model, forward=forward)

        closed = _closed_weights(model, scale_frozen)
        given = batches(calibration)
        examples = given if inputs is None else batches(inputs)
        first = examples[0] if examples else Batch((), {})
        self.model, self.forward = model, forward
        self.view = trace(
            model,
            *first.args,
            kwargs=first.kwargs,
            forward=forward,
            closed=closed,
            buffers=scale_frozen,
        )
        self.own = named_tensors(model)
        self._data = [tree_leaves((b.args, b.kwargs)) for b in given]
        self._args, self._kwargs = first.args, first.kwargs
        if not given:
            self._args, self._kwargs = _random_like(self.view)

    def energies(self, origin: Tensor | None) -> dict[str, Tensor]:
        """Return the path energies, averaged over the batches of calibration data.

        Args:
            origin: logarithms of squared scales ``(spaces,)`` that the weights have before.
        """
        tensors: dict[str, Tensor] = {}
        if origin is not None:
            tensors = {n: _double(self.own[n].detach()).clone() for n in self.view.scalings}
            self.view.scale_(tensors, origin.mul(0.5).exp())
        if not self._data:
            return path_energies(self.view, tensors=tensors)
        shapes = _shapes(tree_leaves((self.view.args, dict(self.view.kwargs))))
        fitting = [leaves for leaves in self._data if _shapes(leaves) == shapes]
        if not fitting:
            raise ValueError(
                "calibration and inputs have different shapes; leave inputs out, or give one of "
                "the shapes of a batch"
            )
        total: dict[str, Tensor] = {}
        for leaves in fitting:
            for name, g in path_energies(self.view, leaves, tensors=tensors).items():
                total[name] = total[name] + g if name in total else g
        return {name: g / len(fitting) for name, g in total.items()}

    def outputs(self, tensors: Mapping[str, Tensor] | None = None) -> list[Tensor] | None:
        """Return all output tensors, or None; buffers and the random state do not change."""
        args, kwargs = self._args, dict(self._kwargs)
        state = {name: b.clone() for name, b in self.model.named_buffers()}
        if tensors is not None:
            state = {name: _double(tensors.get(name, b)).clone() for name, b in state.items()}
            for name, p in self.model.named_parameters():
                value = tensors.get(name, _double(p.detach()))
                state[name] = nn.Parameter(value, requires_grad=False)
            args, kwargs = tree_map(
                lambda x: _double(x) if isinstance(x, Tensor) else x, (args, kwargs)
            )
        state = {f"model.{name}": value for name, value in state.items()}
        try:
            with preserved(self.model), torch.no_grad():
                torch.manual_seed(0)
                called = Called(self.model, self.forward)
                found: list[Tensor] = torch.func.functional_call(called, state, args, kwargs)
        except Exception:
            return None
        return found


def _shapes(leaves: Sequence[Any]) -> list[Any]:
    return [x.shape if isinstance(x, Tensor) else x for x in leaves]


def _path_condition(
    read: _Read,
    method: str,
    reference: Mapping[str, Tensor] | None,
    tolerance: float,
    record: ModelSnapshot,
) -> PathConditioning:
    view, own = read.view, read.own
    if not bool(view.free.any()):
        raise GraphError("there is no channel to rescale. " + _why_none(view))
    origin = origin_of(view, own)
    energies = read.energies(origin)
    for name, g in energies.items():
        if not _finite(g):
            raise ValueError(
                f"the path energies of '{name}' overflow; divide large weights or the data by a "
                "constant first. No parameter was changed"
            )
    weighted = weighted_by(energies, reference)
    solution = solve(view, weighted, own, method, tolerance, origin)
    scales = solution.scales
    names = list(view.scalings)
    values = record.keep(own[name] for name in names)
    original = {name: (own[name], value) for name, value in zip(names, values, strict=True)}
    before = read.outputs()
    view.scale_(own, scales)
    broken = [k for k, (p, _) in original.items() if not _finite(p)]
    if broken:
        raise ValueError(
            f"'{broken[0]}' overflows {own[broken[0]].dtype} when rescaled; use a wider type. "
            "No parameter was changed"
        )
    far = 1 / float(scales.min()) * float(scales.max())
    lost = [k for k, (p, old) in original.items() if _may_underflow(p, far) and _lost(p, old)]
    if lost:
        raise ValueError(
            f"entries of '{lost[0]}' underflow {own[lost[0]].dtype} when rescaled; use a wider "
            "type. No parameter was changed"
        )
    change = _change(before, read.outputs())
    if change > _limit(own):
        _check_in_double(read, original, scales, change)
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
        _groups(view, scales, solution.without_energy),
        _closed(view),
        change,
        _Factors(view, scales),
        original,
    )


class _Factors(Mapping[str, Tensor]):
    """The factor of each weight, computed on access, since it is as large as the weight."""

    def __init__(self, view: ModelGraph, scales: Tensor) -> None:
        self._scalings, self._scales = dict(view.scalings), scales
        self._shapes = {name: p.shape for name, p in view.tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._scalings[name].factor(self._scales).expand(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._scalings)

    def __len__(self) -> int:
        return len(self._scalings)


def _check_arguments(method: str, reference: object, tolerance: float) -> None:
    if method not in _METHODS:
        raise ValueError(f"{method=} is unknown; choose one of {_METHODS}")
    if not 0 < tolerance < 1:
        raise ValueError(f"{tolerance=} is relative, between 0 and 1")
    if reference is None:
        return
    if method != "logdet":
        raise ValueError(f"a reference has no meaning for {method=}; leave it out")
    if not isinstance(reference, Mapping):
        raise TypeError(
            "reference is a dict from parameter names to positive tensors, or None for the "
            f"identity, got a {type(reference).__name__}"
        )


def _closed_weights(model: nn.Module, scale_frozen: bool) -> dict[str, str]:
    """Return the parameters that must not be scaled, with the reason; refuse NaN and infinity."""
    closed = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if isinstance(p, nn.parameter.UninitializedParameter) or p.device.type == "meta":
            continue  # tracing raises a better error
        if not _finite(p):
            raise ValueError(
                f"'{name}' holds NaN or infinity; initialise it again. No parameter was changed"
            )
        manifold = manifold_of(p)
        if manifold is not None:
            closed[name] = f"'{name}' is tagged {manifold!r}"
        elif not (p.requires_grad or scale_frozen):
            closed[name] = f"'{name}' does not require a gradient; scale_frozen=True scales it"
    return closed


def _finite(x: Tensor) -> bool:
    x = x.detach()
    # The sum is faster to check, but may overflow.
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def _may_underflow(x: Tensor, factor: float) -> bool:
    return bool(torch.finfo(x.dtype).tiny * factor > 1e-20)


def _lost(new: Tensor, old: Tensor) -> bool:
    return int(torch.count_nonzero(new)) < int(torch.count_nonzero(old))


def _why_none(view: ModelGraph) -> str:
    closed = _closed(view)
    if not closed:
        return "No layer with a weight was found"
    return "; ".join(f"the output of '{c.layer}': {c.reason}" for c in closed)


def _random_like(view: ModelGraph) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return random inputs of the traced shapes, from a separate generator."""
    generator = torch.Generator().manual_seed(0)

    def draw(x: Any) -> Any:
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
            return x
        # An inferred input has two examples, too few for the statistics of batch normalisation.
        shape = (8, *x.shape[1:]) if view.is_inferred and x.shape[:1] == (2,) else x.shape
        return torch.randn(shape, dtype=x.dtype, generator=generator).to(x.device)

    args, kwargs = tree_map(draw, (view.args, dict(view.kwargs)))
    return args, kwargs


def _double(x: Tensor) -> Tensor:
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.is_floating_point() else x


def _change(before: list[Tensor] | None, after: list[Tensor] | None) -> float:
    """Return the largest relative change of an output."""
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
    """Return the change of outputs that rounding may explain."""
    dtypes = [p.dtype for p in own.values() if p.is_floating_point() or p.is_complex()]
    return math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes))


def _check_in_double(
    read: _Read, original: Mapping[str, tuple[Tensor, Tensor]], scales: Tensor, change: float
) -> None:
    """Check in double precision whether rescaling or rounding has changed the outputs.

    Batch statistics of two nearly equal examples, for instance, magnify the rounding of weights.
    """
    doubles = {name: _double(values).clone() for name, (_, values) in original.items()}
    scaled = {name: p.detach().clone() for name, (p, _) in original.items()}
    with (
        torch.no_grad()
    ):  # the model too, which may use parameters in ways that its graph does not show
        for p, values in original.values():
            p.copy_(values)
        before = read.outputs(doubles)
        for name, (p, _) in original.items():
            p.copy_(scaled[name])
    read.view.scale_(doubles, scales)
    exact = _change(before, read.outputs(doubles))
    if not exact <= 1e-6:
        raise GraphError(
            f"rescaling would change the model's output by {change:.1e}: either the model draws "
            "random numbers of its own, or it does something that tracing did not see. "
            "No parameter was changed"
        )


def _groups(view: ModelGraph, scales: Tensor, without_energy: Tensor) -> tuple[RescaledGroup, ...]:
    fed: list[list[str]] = [[] for _ in view.reasons]
    read: list[list[str]] = [[] for _ in view.reasons]
    for name, scaling in view.scalings.items():
        for index, lists in ((scaling.feeds, fed), (scaling.reads, read)):
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
            int(without_energy[ids].sum()),
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
