"""The nearest unitary matrix by backpropagation through the exponential of a Lie algebra."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...linalg import exp_skew, skew
from ..progress import progress_bar

__all__ = ["Descent", "descend"]

_SEED = 0
# For angles up to this the exponential is nearly linear, and any optimizer works well.
_REBASE = 1.0
_PATIENCE = 50
_LBFGS: dict[str, Any] = {
    "lr": 1.0,
    "max_iter": 10,
    "history_size": 20,
    "line_search_fn": "strong_wolfe",
    "tolerance_grad": 1e-12,  # torch's defaults would end earlier
    "tolerance_change": 1e-14,
}
_LR = 0.05


class Descent:
    """The course of :func:`descend`.

    Attributes:
        loss: relative squared distance ‖W - gain·U‖² / ‖W‖² after each step of the optimizer.
        converged: whether the gradient fell below the tolerance.
    """

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.converged = False


def descend(
    w: Tensor,
    *,
    det: int | None,
    base: type[torch.optim.Optimizer],
    base_kwargs: dict[str, Any],
    max_steps: int,
    tolerance: float,
    name: str,
    progress: bool,
) -> tuple[Tensor, Descent]:
    r"""Return the nearest matrices with orthonormal columns, without decomposing W.

    .. math:: \min_L \|W - g\,U\|_F^2, \qquad U = F \exp(L)_{:, 1:p}, \qquad L^H = -L

    For W of shape ``(..., n, p)`` the exponential is ``n`` by ``n`` and its first
    p columns are used. The gain g is held at :math:`\|W\|_F / \sqrt p`: the best U
    is the same for every positive gain. The exponential of a real matrix has
    determinant +1, so F, which reflects one axis, takes square real W to the
    component of their own determinant, or of ``det``. When angles have become large, exp(L) is
    absorbed into F and L starts from zero again; U remains a product of exponentials. Computed in
    double precision.

    Args:
        w: shape ``(..., n, p)``, ``p <= n``, real or complex, finite and not zero.
        det: the determinant, or None for that of W.
        base: any class of torch.optim that takes dense gradients.
        base_kwargs: its arguments.
        max_steps: bound on the number of its steps.
        tolerance: stop when the gradient, relative to that of a random U, is less.
        name: of the parameter, for the progress bar.
        progress: show one, if tqdm is installed.

    Returns:
        U, of the shape and dtype of ``w``, and the course of the descent.

    Raises:
        FloatingPointError: the descent diverged.

    Reference:
        Chang, "A projection algorithm for the unitary weights" (2021); Chang and
        Wang, "Deep unitary convolutional neural networks" (2021), for truncation;
        Lezcano-Casado, "Trivializations for gradient-based optimization on
        manifolds" (2019), section 6, for starting again from a new F.
    """
    double = torch.complex128 if w.is_complex() else torch.float64
    n, p = w.shape[-2:]
    batch = w.shape[:-2].numel()
    size = torch.linalg.matrix_norm(w.to(double), keepdim=True)
    goal = w.to(double) * (math.sqrt(p) / size.clamp_min(torch.finfo(torch.float64).tiny))
    generator = torch.Generator().manual_seed(_SEED)
    shape = (*w.shape[:-2], n, n)
    # Slightly off zero: for a symmetric W, U = I would be a saddle point.
    l = (1e-3 * torch.randn(shape, generator=generator, dtype=double)).to(w.device)
    l.requires_grad_()
    frame = torch.eye(n, dtype=double, device=w.device).repeat(*w.shape[:-2], 1, 1)
    if n == p and not w.is_complex():
        sign = torch.linalg.slogdet(goal)[0]
        wanted = torch.full_like(sign, det) if det is not None else sign
        frame[..., 0, 0] = torch.where(wanted < 0, -1.0, 1.0)
    defaults = _LBFGS if base is torch.optim.LBFGS else {"lr": _LR}
    optimizer = base([l], **(defaults | base_kwargs))
    record = Descent()

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A line search may try an L so large that exp_skew uses eigenvectors, which are not
        # differentiable at repeated eigenvalues.
        u = (frame @ torch.matrix_exp(skew(l)))[..., :p]
        loss: Tensor = 0.5 * (goal - u).abs().square().sum()
        loss.backward()
        return loss

    bar = progress_bar(max_steps, f"lie {name}", "step", show=progress)
    try:
        for _ in range(max_steps):
            with torch.enable_grad():
                loss = float(torch.as_tensor(optimizer.step(closure)).detach())  # type: ignore[arg-type]
            assert l.grad is not None
            if not math.isfinite(loss) or not bool(torch.isfinite(l).all()):
                raise FloatingPointError(
                    f"the descent for {name!r} diverged after {len(record.loss) + 1} steps; lower "
                    "lr, or use another base. No parameter was changed"
                )
            slope = float(torch.linalg.vector_norm(l.grad)) / math.sqrt(p * batch)
            record.loss.append(2 * loss / (p * batch))
            bar.update()
            bar.set_postfix_str(f"loss {record.loss[-1]:.3e}, gradient {slope:.1e}", refresh=False)
            record.converged = slope <= tolerance
            if record.converged or _stalled(record.loss):
                break
            with torch.no_grad():
                if float(torch.linalg.matrix_norm(l).max()) > _REBASE:
                    frame = frame @ exp_skew(skew(l))
                    l.zero_()
    finally:
        bar.close()
    with torch.no_grad():
        u = (frame @ exp_skew(skew(l)))[..., :p]
    return u.detach().to(w.dtype), record


def _stalled(loss: list[float]) -> bool:
    """Whether the last steps have not lowered the loss."""
    recent = loss[-_PATIENCE:]
    return len(loss) > _PATIENCE and min(loss[:-_PATIENCE]) - min(recent) <= 1e-9 * recent[-1]
