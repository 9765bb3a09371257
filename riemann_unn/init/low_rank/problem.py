"""The approximation problem of one layer: its function, and low-rank factors close to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...linalg import (
    Activation,
    Factors,
    calibrated_factors,
    fit_rows,
    fold_kernel,
    function_error,
    function_factors,
    spectral_factors,
    unfold_kernel,
    whitened_factors,
)
from ...linalg.factor import svd
from ...linalg.low_rank.activation_kernel import second_moment
from ...linalg.low_rank.data import OutputSpace, data_error, output_space
from ...linalg.low_rank.factors import SVD, angles, row_errors, row_scales
from ...linalg.low_rank.function import minimise
from .rows import Rows

__all__ = ["Method", "Problem"]

Method = Literal["spectral", "function", "linear"]
_ITERATIONS = 100
_OUTPUTS = 8  # with fewer outputs for each parameter a refinement overfits the rows
_NEURONS = 256
_VALIDATION_SHARE = 5  # one row in this many decides when the refinement ends


@dataclass
class Problem:
    r"""The function :math:`x \mapsto \varphi(W x + \beta)` of a layer, to be approximated.

    A batch normalisation that follows is part of W and β: row i of both is multiplied by its
    scale, and its offset added to β; :meth:`without_norm` undoes this.

    Attributes:
        weight: W, (m, n), of the layer alone, single or double precision.
        bias: the layer's bias, or None if it has none.
        activation: φ.
        scale: of the batch normalisation, (m,); None is one.
        offset: of the batch normalisation, (m,); None is zero.
        kernel: shape of a convolution that is split in space; None is a plain matrix.
        rows: inputs, if there are any.
        original: the inputs before earlier layers were replaced.
    """

    weight: Tensor
    bias: Tensor | None
    activation: Activation
    scale: Tensor | None = None
    offset: Tensor | None = None
    kernel: torch.Size | None = None
    rows: Rows | None = None
    original: Rows | None = field(default=None, init=False)
    _known: SVD | None = field(default=None, init=False)
    _space: OutputSpace | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.w, self.beta = self.weight, self.bias
        if self.scale is not None and self.offset is not None:
            # A channel with scale zero is constant, and cannot be divided by its scale.
            self.scale = torch.where(self.scale == 0, 1, self.scale)
            self.w = self.scale[:, None] * self.w
            self.beta = self.offset + (0 if self.bias is None else self.scale * self.bias)
        self.fit_bias = self.bias is not None and self.rows is not None
        self.matrix = self._unfold(self.w)
        self.original = self.rows

    def update_inputs(self, rows: Rows) -> None:
        """Set the layer's current inputs; the targets stay those of the original ones."""
        self.rows, self._space = rows, None

    def _unfold(self, w: Tensor) -> Tensor:
        return w if self.kernel is None else unfold_kernel(w.view(self.kernel), split="spatial")

    def fold(self, matrix: Tensor) -> Tensor:
        """Return the weight (m, n) whose unfolded matrix this is."""
        if self.kernel is None:
            return matrix
        return fold_kernel(matrix, shape=self.kernel, split="spatial").flatten(1)

    def decomposition(self) -> SVD:
        """Return the singular value decomposition of the unfolded matrix, computed once."""
        if self._known is None:
            self._known = svd(self.matrix)
        return self._known

    def unseen_directions(self) -> int:
        """Return the number of the layer's directions in which the inputs do not vary."""
        return 0 if self._space is None else min(self.w.shape) - self._space.directions

    def without_norm(self, factors: Factors) -> Factors:
        """Return the factors of the layer alone, without the batch normalisation."""
        if self.scale is None or self.offset is None:
            return factors
        bias = factors.bias
        if bias is not None:
            bias = (bias - self.offset) / self.scale if self.bias is not None else None
        return Factors(self._scaled(factors.A, 1 / self.scale), factors.B, bias)

    def _scaled(self, a: Tensor, scale: Tensor) -> Tensor:
        """Multiply the left factor so that row i of the weight is scaled."""
        return a * scale.repeat_interleave(len(a) // len(scale))[:, None]

    # Methods ---------------------------------------------------------------

    def spectral(self, rank: int) -> Factors:
        """Return the truncated singular value decomposition."""
        known = self.decomposition()
        return spectral_factors(self.matrix, rank=rank, bias=self.beta, decomposition=known)

    def solve(self, method: Method, rank: int, refine: int | None) -> Factors:
        """Return the factors of a method; ``refine`` bounds its iterations."""
        if method == "spectral":
            return self.spectral(rank)
        if self.rows is None or self.original is None:
            return self._gaussian(rank, refine)
        start = self._whitened(rank, self.rows.fit)
        # If the targets belong to these inputs, the linear solution is exact.
        linear = self.activation.slope == 1.0 and self.kernel is None and self.rows is self.original
        if method == "linear" or linear or refine == 0:
            return start
        inputs, targets = self.rows.fit, self.targets(self.original.fit)
        held_out = None
        if refine is None:
            parameters = start.A.numel() + start.B.numel()
            if targets.numel() < _OUTPUTS * parameters:
                return start
            kept = (
                torch.arange(len(inputs), device=inputs.device) % _VALIDATION_SHARE
                != _VALIDATION_SHARE - 1
            )
            held_out = inputs[~kept], targets[~kept]
            inputs, targets = inputs[kept], targets[kept]
        return calibrated_factors(
            start,
            inputs=inputs,
            targets=targets,
            activation=self.activation,
            fit_bias=self.fit_bias,
            fold=None if self.kernel is None else self.fold,
            iterations=_ITERATIONS if refine is None else refine,
            held_out=held_out,
        )

    def _whitened(self, rank: int, inputs: Tensor) -> Factors:
        if self.kernel is not None:
            # The spatial split is not a factorisation of W, so there is no closed form.
            return calibrated_factors(
                self.spectral(rank),
                inputs=inputs,
                targets=nn.functional.linear(inputs, self.w, self.beta),
                activation="identity",
                fit_bias=self.fit_bias,
                fold=self.fold,
                iterations=_ITERATIONS,
            )
        bias = self.beta if self.fit_bias else None
        if self._space is None:
            self._space = output_space(self.w, inputs=inputs, centred=self.fit_bias)
        found = whitened_factors(self.w, rank=rank, inputs=inputs, bias=bias, space=self._space)
        return found if self.fit_bias else Factors(found.A, found.B, self.beta)

    def _gaussian(self, rank: int, refine: int | None) -> Factors:
        phi = self.activation
        if self.kernel is None:
            return function_factors(
                self.w,
                rank=rank,
                activation=phi,
                bias=self.beta,
                iterations=refine,
                decomposition=self.decomposition(),
            )
        start = self.spectral(rank)
        if refine != 0:
            start = self._refine_spatial(start, 12 if refine is None else refine)
        p, q, c = angles(self.w, self.fold(start.A @ start.B))
        beta = None if self.beta is None else self.beta.double()
        best, _ = fit_rows(p, c.clamp_min(0), phi, bias=beta)
        now = row_errors(p, q, c, phi, p_bias=beta, q_bias=beta)
        then = row_errors(p, best, c, phi, p_bias=beta, q_bias=beta)
        scale = torch.where((then < now) & (q > 0), best / torch.where(q > 0, q, 1), 1)
        return Factors(self._scaled(start.A, scale.to(start.A)), start.B, self.beta)

    def _refine_spatial(self, start: Factors, iterations: int) -> Factors:
        phi, size = self.activation, self.w.square().sum()

        def loss(x: list[Tensor]) -> Tensor:
            v = self.fold(x[0] @ x[1])
            p, q = (torch.linalg.vector_norm(t, dim=-1) for t in (self.w, v))
            c = (self.w * v).sum(-1) / torch.where(p * q > 0, p * q, 1)
            c = c.clamp(-1, 1)
            return row_errors(p, q, c, phi, p_bias=self.beta, q_bias=self.beta).sum() / size

        a, b = minimise(loss, [start.A, start.B], iterations=iterations)
        return Factors(a, b, start.bias)

    # Errors ----------------------------------------------------------------

    def targets(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs after the activation."""
        return self.activation(nn.functional.linear(inputs, self.w, self.beta))

    def gaussian_error(self, factors: Factors) -> float:
        """Return the relative function error on Gaussian inputs."""
        v = self.fold(factors.A @ factors.B)
        return function_error(
            self.w, v, activation=self.activation, w_bias=self.beta, v_bias=factors.bias
        )

    def held_out_error(self, factors: Factors) -> float | None:
        """Return the relative function error on held-out inputs, or None without."""
        if self.rows is None or self.original is None or self.rows.held_out is None:
            return None
        if self.original.held_out is None:
            return None
        return self._error(factors, self.rows.held_out, self.targets(self.original.held_out))

    def _error(self, factors: Factors, inputs: Tensor, targets: Tensor) -> float:
        return data_error(
            self.fold(factors.A @ factors.B),
            factors.bias,
            inputs=inputs,
            targets=targets,
            activation=self.activation,
        )

    def curve(self, method: Method, ranks: list[int]) -> dict[int, tuple[float, float]]:
        """Return for each rank the errors of the spectral and of the unrefined factors.

        On the inputs fitted to, or on Gaussian ones if there are none; on a subset of many inputs
        or neurons.
        """
        if self.rows is None and self.kernel is None:
            return self._gaussian_curve(method, ranks)
        inputs = None if self.rows is None else _thinned(self.rows.fit)
        targets = None if inputs is None else self.targets(inputs)
        errors: dict[int, tuple[float, float]] = {}
        for rank in ranks:
            first, second = self.spectral(rank), self.solve(method, rank, 0)
            if inputs is None or targets is None:
                errors[rank] = (self.gaussian_error(first), self.gaussian_error(second))
            else:
                errors[rank] = (
                    self._error(first, inputs, targets),
                    self._error(second, inputs, targets),
                )
        return errors

    def _gaussian_curve(self, method: Method, ranks: list[int]) -> dict[int, tuple[float, float]]:
        u, s, _ = self.decomposition()
        coordinates, beta, phi = u * s, self.beta, self.activation
        if phi.slope is None:  # a sample of neurons, since each takes quadrature
            coordinates = _thinned(coordinates, _NEURONS)
            beta = None if beta is None else _thinned(beta, _NEURONS)
        p = torch.linalg.vector_norm(coordinates, dim=-1).double()
        own, beta = beta, None if beta is None else beta.double()
        size = second_moment(p, phi, bias=beta).sum().clamp_min(torch.finfo(p.dtype).tiny)
        errors: dict[int, tuple[float, float]] = {}
        for rank in ranks:
            q = torch.linalg.vector_norm(coordinates[:, :rank], dim=-1).double()
            c = (q / torch.where(p > 0, p, 1)).clamp(0, 1)
            spectral = float(row_errors(p, q, c, phi, p_bias=beta, q_bias=beta).sum() / size)
            chosen = spectral
            if method == "function":
                scale, _ = row_scales(coordinates, rank=rank, activation=phi, bias=own)
                best = row_errors(p, q * scale.double(), c, phi, p_bias=beta, q_bias=beta)
                chosen = float(best.sum() / size)
            errors[rank] = (spectral, chosen)
        return errors


def _thinned(rows: Tensor, most: int = 1024) -> Tensor:
    """Return evenly spaced rows, enough for a curve."""
    return rows[:: -(-len(rows) // most)]
