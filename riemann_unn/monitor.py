"""A monitor: numbers, step by step, on the tagged parameters of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .errors import ManifoldTypeError
from .linalg import tangent_energies
from .linalg.precision import in_full_precision
from .manifolds import MatrixManifold
from .parallel import as_whole
from .tagging import KnownTags, manifold_of

__all__ = ["Monitor"]

Numbers = dict[str, float]
_TITLES = {
    "error": "off the manifold",
    "gradient": "Riemannian gradient",
    "captured": "share of the gradient's energy in the step",
    "missed": "Riemannian gradient outside the step",
    "angle": "rotation angle of a step (radians)",
    "phase": "phase of the determinant (radians)",
}
# Above this size errors are estimated, and determinants and singular values not computed.
_LARGE = 512


class Monitor:
    r"""Records every few steps what an optimizer does to its tagged parameters.

    For each parameter and recorded step, as plain floats (the worst of a batch for errors and
    angles, the first matrix for the phase, the whole for gradients):

    - ``error``: :math:`\|X^H X - I\|_F / \sqrt p`;
    - ``gradient``: :math:`\|\Omega\|_F`, with :math:`\Omega = \tfrac12 (X^H G - G^H X)` of square
      or wide X: zero exactly at critical points;
    - ``captured``: for low-rank steps the share of this energy that the step follows,
      :math:`1 - \|\Omega - \Omega_k\|_F^2 / \|\Omega\|_F^2`;
    - ``missed``: for low-rank steps :math:`\|\Omega - \Omega_k\|_F`. Where it stagnates together
      with the loss, a few noisy planes take all of the rank: a rank above their number helps;
    - ``angle``: the largest rotation angle of the step, in radians; of whole steps
      :math:`2 \arcsin(\tfrac12 \|X^+ - X\|_2)`;
    - ``phase``: of the determinant of a square matrix of up to 512 rows, in radians: 0 or π if
      real, so a change of component shows.

    The monitor is a pair of hooks on the optimizer and works on copies of the parameters: it
    changes nothing. Matrices above 512 by 512 cost products with a few dozen columns, O(n p), no
    more. Sharded parameters (DTensors) are gathered for it, so every process needs a monitor.

    Args:
        optimizer: an optimizer of :mod:`riemann_unn.optim`, or any that trains
            tagged parameters.
        every: record each ``every``-th step, from the first.
        log: called as ``log(name, value, step)`` with each number, such as
            ``SummaryWriter.add_scalar`` of TensorBoard.

    Raises:
        ManifoldTypeError: ``optimizer`` is none, or has no tagged parameter.
        LostTagError: an untagged parameter is where a module remembers a tagged one; at a step
            also where one has lost its tag since the monitor last saw it.
        ValueError: ``every`` is below 1.

    Attributes:
        history: for each parameter's name the recorded numbers, oldest first,
            each with its ``step``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        every: int = 1,
        log: Callable[[str, float, int], Any] | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ManifoldTypeError(f"an optimizer is needed, got a {type(optimizer).__name__}")
        if every < 1:
            raise ValueError(f"{every=} must be at least 1")
        self._known = KnownTags()
        if not self._tagged(optimizer):
            raise ManifoldTypeError("the optimizer has no tagged parameter to monitor")
        self.every = every
        self.history: dict[str, list[Numbers]] = {}
        self._log = log
        self._step = 0
        self._before: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._record),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizer; the history stays."""
        for handle in self._handles:
            handle.remove()

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the history, one panel for each kind of number, and save the picture.

        Args:
            path: the file, in a format that matplotlib writes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 6), layout="constrained")
        for axes, kind in zip(figure.subplots(2, 3).flat, _TITLES, strict=True):
            for name, entries in self.history.items():
                steps = [entry["step"] for entry in entries if kind in entry]
                axes.plot(steps, [entry[kind] for entry in entries if kind in entry], label=name)
            axes.set(title=_TITLES[kind], xlabel="step")
            axes.grid(alpha=0.3)
            if kind == "captured":
                axes.set_ylim(0, 1.05)
            elif kind != "phase":
                axes.set_yscale("log")
        if self.history:
            figure.axes[0].legend(fontsize="small")
        figure.savefig(path)

    def _tagged(self, optimizer: Optimizer) -> list[tuple[str, Tensor, MatrixManifold]]:
        found, known = [], []
        for i, group in enumerate(optimizer.param_groups):
            names = group.get("param_names")
            for j, p in enumerate(group["params"]):
                manifold = manifold_of(p)
                if manifold is not None:
                    name = names[j] if names else getattr(p, "tagged_as", f"group{i}.param{j}")
                    found.append((str(name), p, manifold))
                    known.append((repr(str(name)), p, group))
        self._known.update(optimizer.param_groups, known)
        return found

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer, *_: Any) -> None:
        if self._step % self.every == 0:
            by_closure = getattr(optimizer, "needs_closure", False)
            self._before = {
                name: as_whole(p).clone()
                for name, p, _ in self._tagged(optimizer)
                if (p.grad is not None or by_closure) and p.numel() > 0
            }

    @in_full_precision
    @torch.no_grad()
    def _record(self, optimizer: Optimizer, *_: Any) -> None:
        if self._step % self.every == 0:
            last_step = getattr(optimizer, "last_step", dict)  # other optimizers have none
            step_report: dict[Tensor, dict[str, Tensor]] = last_step()
            for name, p, manifold in self._tagged(optimizer):
                if name in self._before:
                    numbers = _measure(self._before[name], p, manifold, step_report.get(p, {}))
                    self.history.setdefault(name, []).append({"step": float(self._step)} | numbers)
                    if self._log is not None:
                        for key, value in numbers.items():
                            self._log(f"{name}/{key}", value, self._step)
            self._before = {}
        self._step += 1


def _measure(
    before: Tensor, p: Tensor, manifold: MatrixManifold, step_report: dict[str, Tensor]
) -> Numbers:
    now = as_whole(p)
    old, new = (_wide(manifold.to_matrices(_single(x))) for x in (before, now))
    is_large = max(new.shape[-2:]) > _LARGE
    error = manifold.estimated_error if is_large else manifold.orthogonality_error
    numbers = {"error": float(torch.as_tensor(error(now)).max())}
    if "gradient" in step_report:  # of the last evaluation of a closure
        numbers["gradient"] = float(step_report["gradient"])
    elif p.grad is not None:
        grad = _wide(manifold.displacement_matrices(_single(as_whole(p.grad))))
        v, z = (
            t.reshape(*old.shape[:-2], *t.shape[-2:]) if t is not None else None
            for t in (step_report.get("directions"), step_report.get("coordinates"))
        )
        total, missed = (float(energy.sum()) for energy in tangent_energies(old, grad, v, z))
        numbers["gradient"] = total**0.5
        if v is not None:
            numbers["captured"] = 1 - missed / total if total > 0 else 1.0
            numbers["missed"] = missed**0.5
    if "angle" in step_report:
        numbers["angle"] = float(step_report["angle"])
    else:
        chord = _largest_singular_value(new - old) if is_large else _spectral_norm(old, new)
        numbers["angle"] = 2 * math.asin(min(chord / 2, 1.0))
    if new.shape[-1] == new.shape[-2] and not is_large:
        sign = torch.linalg.slogdet(new)[0].reshape(-1)[0]
        numbers["phase"] = float(torch.angle(sign))
    return numbers


def _spectral_norm(old: Tensor, new: Tensor) -> float:
    double = torch.complex128 if new.is_complex() else torch.float64
    return float(torch.linalg.matrix_norm(new.to(double) - old.to(double), ord=2).max())


def _largest_singular_value(x: Tensor) -> float:
    """Estimate the spectral norm from below, by subspace iteration."""
    generator = torch.Generator(x.device).manual_seed(0)
    v = torch.randn(x.shape[-1], 8, generator=generator, device=x.device).to(x.dtype)
    for _ in range(8):
        v = torch.linalg.qr(x.mH @ (x @ v))[0]
    return float(torch.linalg.matrix_norm(x @ v, ord=2).max())


def _wide(matrices: Tensor) -> Tensor:
    return matrices.mH if matrices.shape[-2] > matrices.shape[-1] else matrices


def _single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
