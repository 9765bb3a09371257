"""Warm start: replacing trained weights by points on their manifolds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...diagnostics import orthogonality_error
from ...errors import ManifoldError, ManifoldTypeError, OffManifoldError
from ...interruption import no_grad, undoing
from ...linalg.precision import in_full_precision
from ...linalg.procrustes import inner
from ...manifolds import MatrixManifold, rounding_level
from ...parallel import as_whole, is_sharded
from ...tagging import manifold_of, tagged_parameters
from ..calibration import Batch, Forward, batches_of
from ..recording import evaluating, in_double
from ..snapshot import ModelSnapshot
from .conversion import Conversion
from .folding import Folding
from .lie import descend
from .matching import Placed
from .report import WarmStart, WarmStartReport
from .source import load_
from .untrained import set_initial_gains_

__all__ = ["Method", "WarmStart", "WarmStartReport", "warm_start_"]

Method = Literal["polar", "lie", "procrustes"]
_SINGLE = "parameter"


def warm_start_(
    target: nn.Module | nn.Parameter,
    *,
    method: Method = "polar",
    source: Mapping[str, Tensor] | nn.Module | None = None,
    calibration: Any = None,
    forward: Forward | None = None,
    fold_gain: bool = True,
    refit: bool = True,
    base: type[torch.optim.Optimizer] | None = None,
    max_steps: int = 1000,
    tolerance: float = 1e-5,
    progress: bool = True,
    **base_kwargs: Any,
) -> WarmStartReport:
    r"""Move every tagged parameter onto its manifold, keeping what it has learned, in place.

    .. math:: U = \arg\min_{U^H U = I} \|W - U\|_F = W (W^H W)^{-1/2}

    is the nearest point, by ``"polar"`` in closed form and by ``"lie"`` through
    backpropagation in the Lie algebra. ``"procrustes"`` instead preserves the layers' functions: on
    calibration inputs each layer, in the order in which they run, is matched to its original
    outputs, given the layers already converted:

    .. math:: \min_{U, g, b} \|Y - (g\, X U^H + b)\|_F

    and then the last untagged linear layer is fitted to its original outputs.

    Trained weights are :math:`g\,U` rather than U. Where the operations around a
    layer are positively homogeneous, as ReLU, pooling and sums are, its gain g is
    folded into neighbours: their weights and biases are scaled so that the model
    computes what it would compute with :math:`g\,U`. Untrained weights, as an initialiser draws
    them, get other gains, which preserve the size of signals. ``fold_gain=False`` does not change
    anything without a tag.

    For a sharded model (DTensors) every process calls it; each weight is gathered to find its
    nearest point, and gains are not folded.

    Args:
        target: a module with tagged parameters, or one tagged parameter.
        method: ``"polar"``, ``"lie"`` or ``"procrustes"``.
        source: a state dict or a model with the trained weights. All its entries
            are taken over first; the tagged ones must be among them. Weights that
            parametrizations compute are taken as they are, of a state dict those of
            ``weight_norm`` alone, since no other's entries determine them. By default the
            values in place.
        calibration: inputs of the model: a tensor, a tuple of positional or a dict
            of keyword inputs, or a list or ``DataLoader`` of these; labels are left
            out (``docs/calibration.md``). Needed for ``"procrustes"``; otherwise function errors
            are measured on it, and the better of folded gains and none is taken. The recorded
            layers' outputs on all batches are held in memory.
        forward: how to run the model on a batch of any other kind,
            ``(model, batch) -> output``.
        fold_gain: fold gains into neighbours where that is possible.
        refit: fit the last untagged linear layer in ``"procrustes"``.
        base: optimizer class of ``"lie"``, any of ``torch.optim``; by default LBFGS.
        max_steps: bound on the steps of ``"lie"``.
        tolerance: ``"lie"`` stops when its gradient is smaller, relative to that of
            random weights.
        progress: show a progress bar for ``"lie"`` if tqdm is installed.
        base_kwargs: arguments of ``base``.

    Returns:
        A dict by parameter name of what was measured, see :class:`WarmStartReport`.
        If something fails, the model is left as it was.

    Raises:
        ManifoldError: nothing is tagged, or the source does not fit.
        OffManifoldError: weights with NaN or infinity, which have no nearest point.
        ManifoldTypeError: an argument is of a kind that cannot be used.
        ValueError: unknown method, empty calibration, or inputs the model cannot take.
        FloatingPointError: ``"lie"`` diverged.

    Warns:
        UserWarning: weights are rank-deficient, so that their nearest point is not
            unique, or ``"lie"`` did not converge.

    Reference:
        Chang, "A projection algorithm for the unitary weights" (2021), for the
        warm start and ``"lie"``; Higham, "Functions of Matrices" (2008), chapter 8,
        for the polar factor; Schönemann (1966) for Procrustes.
    """
    model, tagged = _tagged(target)
    _check_arguments(target, method, calibration, forward, base, base_kwargs, max_steps, tolerance)
    any_sharded = any(is_sharded(p) for p in model.parameters())
    if any_sharded and (source is not None or calibration is not None):
        raise ManifoldTypeError(
            "the model is sharded, and its layers are compared on whole weights; give source= and "
            "calibration= before fully_shard or parallelize_module. Nothing was changed"
        )
    record = ModelSnapshot(model)
    record.keep(model.parameters())

    @in_full_precision
    @no_grad
    def work() -> WarmStartReport:
        with evaluating(model):
            batches = []
            if calibration is not None:
                batches = batches_of(calibration, model, forward=forward)
            if source is not None:
                load_(model, source, [name for name, _ in tagged])
            placed = {name: _nearest(name, p, method) for name, p in tagged}
            conditions = {item.name: _condition(item) for item in placed.values()}
            _warn_of_rank(conditions, placed)
            if method == "lie":
                for item in placed.values():
                    _descend_(item, base, base_kwargs, max_steps, tolerance, progress)
            folding = None
            if fold_gain and isinstance(target, nn.Module) and not any_sharded:
                folding = Folding(model, placed, batches[0] if batches else Batch((), {}))
            conversion = Conversion(model, placed, folding, batches)
            if folding is not None and folding.foldable and set_initial_gains_(placed.values()):
                conversion.notes.append(
                    "the weights are as they were drawn: gains keep the size of signals"
                )
            conversion.convert_(match=method == "procrustes", refit=refit)
            return conversion.report(conditions)

    return undoing(work, record.restore)


def _tagged(target: object) -> tuple[nn.Module, list[tuple[str, nn.Parameter]]]:
    """Return a module and its tagged parameters; a single parameter is put in a module."""
    if isinstance(target, nn.Module):
        model, tagged = target, tagged_parameters(target)
    else:
        model, tagged = nn.Module(), []
        if isinstance(target, nn.Parameter) and manifold_of(target) is not None:
            model.register_parameter(_SINGLE, target)
            tagged = [(_SINGLE, target)]
    if not tagged:
        raise ManifoldError("nothing is tagged; tag parameters with riemann_unn.tag_ first")
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ManifoldTypeError(f"{name!r} has no shape yet; run the model once, then convert")
    return model, tagged


def _check_arguments(
    target: object,
    method: str,
    calibration: object,
    forward: object,
    base: object,
    base_kwargs: Mapping[str, Any],
    max_steps: int,
    tolerance: float,
) -> None:
    if method not in get_args(Method):
        raise ValueError(f"{method=} is unknown; choose 'polar', 'lie' or 'procrustes'")
    if calibration is not None and not isinstance(target, nn.Module):
        raise ManifoldTypeError("calibration inputs need a module to run; pass the model")
    if forward is not None and calibration is None:
        raise ValueError("forward= runs the model on calibration= batches, which are missing")
    if method == "procrustes" and calibration is None:
        raise ValueError("method='procrustes' needs calibration inputs; pass calibration=...")
    if method != "lie" and (base is not None or base_kwargs):
        names = ", ".join(["base"] * (base is not None) + list(base_kwargs))
        raise TypeError(f"{names}: only method='lie' takes an optimizer and its arguments")
    if base is not None and not (
        isinstance(base, type) and issubclass(base, torch.optim.Optimizer)
    ):
        raise TypeError(f"{base=} is no optimizer class; pass one such as torch.optim.Adam")
    if max_steps < 1 or not tolerance >= 0:
        raise ValueError(f"{max_steps=} must be at least 1, and {tolerance=} not negative")


def _nearest(name: str, p: nn.Parameter, method: str) -> Placed:
    manifold = manifold_of(p)
    assert manifold is not None
    weight = as_whole(p).as_subclass(Tensor).clone()
    if not bool(torch.isfinite(weight).all()):
        raise OffManifoldError(
            f"{name!r} holds NaN or infinity, so no point of {manifold!r} is nearest; "
            "initialise it again. No parameter was changed"
        )
    point = manifold.projx(weight)
    note = "the parameter is sharded, so its gain was not folded" if is_sharded(p) else ""
    return Placed(name, p, manifold, weight, point, _gain(weight, point, manifold), method, note)


def _gain(weight: Tensor, point: Tensor, manifold: MatrixManifold) -> float:
    r"""Return the g > 0 for which g U is closest to W: argmin ‖(W - g U) W^H‖, or 0.

    The weighting models inputs along the directions in which W is large, as those of a trained
    layer; unweighted, the gain would be the mean singular value, and signals would vanish in deep
    models.
    """
    size = inner(weight, weight)
    if size == 0:
        return 0.0
    w, u = (manifold.to_matrices(in_double(x)) for x in (weight, point))
    gain = inner(weight, manifold.from_matrices(u @ (w.mH @ w), weight.shape)) / size
    # Differences from one by rounding are ignored.
    half = weight.dtype in (torch.float16, torch.bfloat16)
    level = 4 * torch.finfo(weight.dtype).eps if half else rounding_level(weight.dtype)
    return 1.0 if abs(gain - 1) <= level else max(gain, 0.0)


def _condition(item: Placed) -> float:
    """Return the largest ratio of extreme singular values among the matrices of a weight."""
    matrices = item.manifold.to_matrices(item.weight)
    if matrices.numel() == 0:
        return 1.0
    if matrices.dtype in (torch.float16, torch.bfloat16):
        matrices = matrices.float()
    s = torch.linalg.svdvals(matrices)
    largest, smallest = s[..., 0].double(), s[..., -1].double()
    level = max(matrices.shape[-2:]) * torch.finfo(matrices.dtype).eps
    deficient = smallest <= level * largest
    ratio = torch.where(deficient, math.inf, largest / smallest.clamp_min(1e-300))
    return float(ratio.max())


def _warn_of_rank(conditions: Mapping[str, float], placed: Mapping[str, Placed]) -> None:
    names = [repr(name) for name, value in conditions.items() if math.isinf(value)]
    if names:
        warnings.warn(
            f"{', '.join(names)} is rank-deficient, so its nearest point is not unique; one of the "
            "nearest was taken. Train it longer, or initialise it again",
            UserWarning,
            stacklevel=7,
        )


def _descend_(
    item: Placed,
    base: type[torch.optim.Optimizer] | None,
    base_kwargs: dict[str, Any],
    max_steps: int,
    tolerance: float,
    progress: bool,
) -> None:
    """Find the point by descent in the Lie algebra, unless the weights are on the manifold."""
    manifold, weight = item.manifold, item.weight
    off = float(orthogonality_error(weight, manifold))
    matrices = manifold.to_matrices(weight)
    if weight.numel() == 0:
        return
    if off <= rounding_level(weight.dtype) and manifold.has_det(weight):
        return
    u, record = descend(
        matrices,
        det=manifold.det,
        base=torch.optim.LBFGS if base is None else base,
        base_kwargs=base_kwargs,
        max_steps=max_steps,
        tolerance=tolerance,
        name=item.name,
        progress=progress,
    )
    if not record.converged:
        item.note = f"the descent stopped after {len(record.loss)} steps above its tolerance"
        warnings.warn(f"{item.name!r}: {item.note}; raise max_steps", UserWarning, stacklevel=7)
    item.point = manifold.projx(manifold.from_matrices(u, weight.shape))
    item.gain, item.loss = _gain(weight, item.point, manifold), tuple(record.loss)
