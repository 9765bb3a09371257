"""A monitor: numbers that tell, step by step, how the tagged parameters of an optimizer fare."""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .diagnostics import orthogonality_error
from .errors import ManifoldTypeError
from .manifolds import MatrixManifold
from .tagging import manifold_of

__all__ = ["Monitor"]

Numbers = dict[str, float]
_TITLES = {
    "error": "off the manifold",
    "angle": "rotation angle of a step (radians)",
    "phase": "phase of the determinant (radians)",
    "captured": "share of the gradient's energy in the step",
}


class Monitor:
    r"""Records every few steps what an optimizer does to its tagged parameters.

    For each parameter and recorded step, as plain floats (the worst of a batch
    for errors and angles, the first matrix for the phase, the mean for the energy):

    - ``error``: :math:`\|X^H X - I\|_F / \sqrt p`;
    - ``angle``: the largest rotation angle of the step, in radians,
      :math:`2 \arcsin(\tfrac12 \|X^+ - X\|_2)`;
    - ``phase``: of the determinant of a square matrix, in radians: 0 or π if
      real, so a change of component shows;
    - ``captured``: for low-rank steps the share of the gradient's energy in the
      k left directions of the step, :math:`\|R G\|_F^2 / \|G\|_F^2`.

    The monitor is a pair of hooks on the optimizer and works on a copy of the
    points: it changes nothing, and costs a singular value decomposition of each
    parameter on the steps it records.

    Args:
        optimizer: an optimizer of :mod:`riemann_unn.optim`, or any that trains
            tagged parameters.
        every: record each ``every``-th step, from the first.
        log: called as ``log(name, value, step)`` with each number, such as
            ``SummaryWriter.add_scalar`` of TensorBoard.

    Raises:
        ManifoldTypeError: ``optimizer`` is none, or has no tagged parameter.
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
        if not _tagged(optimizer):
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

        kinds = ("error", "angle", "phase", "captured")
        figure = Figure(figsize=(10, 6), layout="constrained")
        for axes, kind in zip(figure.subplots(2, 2).flat, kinds, strict=True):
            for name, entries in self.history.items():
                steps = [entry["step"] for entry in entries if kind in entry]
                axes.plot(steps, [entry[kind] for entry in entries if kind in entry], label=name)
            axes.set(title=_TITLES[kind], xlabel="step")
            axes.grid(alpha=0.3)
            if kind in ("error", "angle"):
                axes.set_yscale("log")
            elif kind == "captured":
                axes.set_ylim(0, 1.05)
        if self.history:
            figure.axes[0].legend(fontsize="small")
        figure.savefig(path)

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer, *_: Any) -> None:
        if self._step % self.every == 0:
            self._before = {
                name: p.detach().clone()
                for name, p, _ in _tagged(optimizer)
                if p.grad is not None and p.numel() > 0
            }

    @torch.no_grad()
    def _record(self, optimizer: Optimizer, *_: Any) -> None:
        if self._step % self.every == 0:
            for name, p, manifold in _tagged(optimizer):
                if name in self._before:
                    numbers = _measure(self._before[name], p, manifold, optimizer.state.get(p, {}))
                    self.history.setdefault(name, []).append({"step": float(self._step)} | numbers)
                    if self._log is not None:
                        for key, value in numbers.items():
                            self._log(f"{name}/{key}", value, self._step)
            self._before = {}
        self._step += 1


def _tagged(optimizer: Optimizer) -> list[tuple[str, Tensor, MatrixManifold]]:
    found = []
    for i, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for j, p in enumerate(group["params"]):
            manifold = manifold_of(p)
            if manifold is not None:
                name = names[j] if names else getattr(p, "tagged_as", f"group{i}.param{j}")
                found.append((str(name), p, manifold))
    return found


def _measure(before: Tensor, p: Tensor, manifold: MatrixManifold, state: dict[str, Any]) -> Numbers:
    old, new = (_exact(manifold.to_matrices(x)) for x in (before, p.detach()))
    chord = torch.linalg.matrix_norm(new - old, ord=2).max()
    numbers = {
        "error": float(orthogonality_error(p.detach(), manifold)),
        "angle": 2 * math.asin(min(float(chord) / 2, 1.0)),
    }
    if new.shape[-1] == new.shape[-2]:
        sign = torch.linalg.slogdet(new)[0].reshape(-1)[0]
        numbers["phase"] = float(torch.angle(sign))
    rows, grad = state.get("sketch_start"), p.grad
    if isinstance(rows, Tensor) and grad is not None:
        g = _exact(manifold.to_matrices(grad))
        energy = g.abs().square().sum(dim=(-2, -1))
        captured = (_exact(rows) @ g).abs().square().sum(dim=(-2, -1))
        numbers["captured"] = float((captured / energy.clamp_min(1e-300)).mean())
    return numbers


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)
