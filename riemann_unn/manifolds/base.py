"""The base of all manifolds: geoopt's interface, written once on the matrix view."""

from __future__ import annotations

import math
from abc import abstractmethod
from copy import copy
from typing import Any

import geoopt
import torch
from geoopt.utils import size2shape
from torch import Tensor

from ..errors import ManifoldError
from ..linalg import cayley, exp_skew, polar, retract_low_rank
from ..linalg.precision import in_full_precision

__all__ = ["MatrixManifold"]

_EXACT_UP_TO = 512
_PROBES = 8


def _hermitian(x: Tensor) -> Tensor:
    return 0.5 * (x + x.mH)


class MatrixManifold(geoopt.Manifold):  # type: ignore[misc]
    r"""Tensors that are, seen as a batch of matrices, orthonormal: :math:`X^H X = I`.

    A subclass says how its tensor is a batch of matrices, in :meth:`to_matrices`
    and :meth:`from_matrices`, linear over the reals and isometric (up to a factor
    for each matrix, which no retraction notices), and which tensors it accepts,
    in :meth:`why_not`. Everything else, from projections to
    geodesics, is written here once, on matrices of shape ``(..., n, p)``,
    ``p <= n``, with the Euclidean metric :math:`\langle u, v\rangle = \mathrm{Re}
    \sum \bar u v`.

    The retraction is the Cayley transform
    :math:`R_X(u) = \mathrm{Cayley}(W) X,\; W = P u X^H - X u^H P,\; P = I - \tfrac12 X X^H`,
    with its own isometric transport, so that it is reversible, as geoopt's samplers require;
    :meth:`expmap` is the geodesic.

    Reference:
        Edelman, Arias and Smith (1998); Wen and Yin (2013) for the retraction;
        Zimmermann and Hüper (2022), section 3, for the geodesic.
    """

    ndim = 2
    reversible = True
    det: int | None = None
    # The number of blocks along rows and columns, each one a matrix on the manifold.
    blocks: tuple[int, int] = (1, 1)
    # Whether the matrix view accepts a batch of points.
    takes_batches = False
    # Whether the matrix view is a view of the tensor's memory, for most strides.
    views_memory = True

    # The view -------------------------------------------------------------

    @abstractmethod
    def to_matrices(self, x: Tensor) -> Tensor:
        """Return ``x`` as ``(..., n, p)`` with ``p <= n``, a view of its memory where possible."""

    def displacement_matrices(self, u: Tensor) -> Tensor:
        """Return the same view of a displacement, which may be computed in lower precision."""
        return self.to_matrices(u)

    @abstractmethod
    def from_matrices(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """Return the tensor of the given shape whose matrix view is ``matrices``."""

    # Methods for views that are transforms of the memory, used by optimizers.

    def matrices_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of :meth:`to_matrices` of a tensor of a shape."""
        raise NotImplementedError

    def write_matrices(self, xs: list[Tensor], memory: Tensor, *, exact: bool) -> Tensor:
        """Return :meth:`to_matrices`, or if not exact :meth:`displacement_matrices`, in memory.

        Args:
            xs: tensors of one shape.
            memory: contiguous, of the shape and dtype of the matrices of all.
            exact: whether errors above rounding are not allowed.
        """
        raise NotImplementedError

    def write_point(self, matrices: Tensor, x: Tensor) -> None:
        """Write :meth:`from_matrices` to memory, in the precision of the matrices."""
        raise NotImplementedError

    def write_product(self, left: Tensor, right: Tensor, x: Tensor) -> None:
        """Write :meth:`from_matrices` of ``left @ right``, thin factors, to memory."""
        raise NotImplementedError

    @abstractmethod
    def why_not(self, shape: torch.Size, dtype: torch.dtype | None = None) -> str | None:
        """Say why a tensor of this shape and dtype cannot be a point, or None if it can."""

    def point_dims(self, x: Tensor) -> int:
        """Number of trailing dimensions that one point takes; those before are a batch."""
        return int(self.ndim)

    def with_blocks(self, rows: int, columns: int) -> MatrixManifold:
        """Return the same manifold for tensors of so many blocks, such as a local part."""
        other = copy(self)
        other.blocks = rows, columns
        return other

    # Identity ------------------------------------------------------------

    def extra_repr(self) -> str:
        """Return the arguments as they were given."""
        return "" if self.det is None else f"det={self.det:+d}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))

    # Errors ---------------------------------------------------------------

    @in_full_precision
    @torch.no_grad()
    def orthogonality_error(self, x: Tensor) -> Tensor:
        r"""Return :math:`\|X^H X - I\|_F / \sqrt p` of each matrix, in float64.

        Args:
            x: a tensor this manifold accepts.

        Returns:
            Errors of shape ``(...)``, one for each matrix of the view.
        """
        # In double from the start, so that rounding in the view is not counted.
        m = self.to_matrices(x.detach().to(torch.complex128 if x.is_complex() else torch.float64))
        gram = m.mH @ m
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        norm: Tensor = torch.linalg.matrix_norm(gram)
        return norm / math.sqrt(max(m.shape[-1], 1))

    @in_full_precision
    @torch.no_grad()
    def estimated_error(self, x: Tensor) -> float:
        """Return the worst orthogonality error, for large matrices from random probes.

        ``(XᴴX - I) Z`` with a thin Gaussian Z has, in the mean, the Frobenius
        norm sought: O(n p) work where the exact error costs O(n p²).
        """
        m = self.to_matrices(x.detach())
        if m.numel() == 0:
            return 0.0
        p = m.shape[-1]
        if p <= _EXACT_UP_TO:
            return float(self.orthogonality_error(x).max())
        generator = torch.Generator(m.device).manual_seed(p)
        z = torch.randn(_PROBES, p, dtype=m.real.dtype, device=m.device, generator=generator)
        z = z.to(m.dtype)
        image = (z @ m.mH) @ m - z
        worst = float(torch.linalg.matrix_norm(image).max())
        return worst / math.sqrt(_PROBES * p)

    def _check_shape(self, shape: torch.Size, name: str) -> tuple[bool, str | None]:
        reason = self.why_not(torch.Size(shape))
        return reason is None, None if reason is None else f"`{name}` {reason}"

    def _tolerance(self, x: Tensor, atol: float) -> float:
        # geoopt's tolerance is for single precision: smaller for doubles, larger for halves.
        scale = torch.finfo(x.dtype).eps / torch.finfo(torch.float32).eps
        return atol * min(max(scale, 1e-4), 2e3)

    @in_full_precision
    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        reason = self.why_not(x.shape, x.dtype)
        if reason is not None:
            return False, reason
        if x.numel() == 0:
            return True, None
        error, bound = float(self.orthogonality_error(x).max()), self._tolerance(x, atol)
        if not error <= bound:
            return False, f"|X^H X - I|/sqrt(n) = {error:.1e} exceeds {bound:.1e}"
        if self.det is not None and not self.has_det(x):
            return False, f"the determinant is not {self.det:+d}"
        return True, None

    @in_full_precision
    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if x.numel() == 0:
            return True, None
        m, v = self.to_matrices(x), self.to_matrices(u)
        normal = torch.linalg.matrix_norm(_hermitian(m.mH @ v))
        size = torch.linalg.matrix_norm(v).clamp_min(1)
        ratio, bound = float((normal / size).max()), self._tolerance(x, atol)
        if not ratio <= bound:
            return False, f"|sym(X^H u)| / max(|u|, 1) = {ratio:.1e} exceeds {bound:.1e}"
        return True, None

    @in_full_precision
    @torch.no_grad()
    def has_det(self, x: Tensor) -> bool:
        """Tell whether every matrix has the required determinant (always, without one)."""
        if self.det is None or x.numel() == 0:
            return True
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # LAPACK has no halves
        return bool((torch.linalg.slogdet(self.to_matrices(x))[0] * self.det > 0).all())

    # Geometry -------------------------------------------------------------

    @in_full_precision
    def projx(self, x: Tensor) -> Tensor:
        """Return the nearest point, the polar factor of each matrix (with ``det``, if given)."""
        return self.from_matrices(polar(self.to_matrices(x), det=self.det), x.shape)

    @in_full_precision
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        r"""Return the orthogonal projection :math:`u - X\,\mathrm{sym}(X^H u)`."""
        m, v = self.to_matrices(x), self.to_matrices(u)
        return self.from_matrices(v - m @ _hermitian(m.mH @ v), x.shape)

    @in_full_precision
    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the Riemannian gradient, the projection of the Euclidean one."""
        return self.proju(x, u)

    @in_full_precision
    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the real inner product of tangent vectors, one number for each point."""
        v = u if v is None else v
        product = (u.conj() * v).real if u.is_complex() else u * v
        return product.sum(dim=tuple(range(-self.point_dims(x), 0)), keepdim=keepdim)

    def _rotation(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return X and Δ with skew(Δ Xᴴ) X = u, so that a left rotation moves along u."""
        m, v = self.to_matrices(x), self.to_matrices(u)
        return m, v if m.shape[-2] == m.shape[-1] else 2 * v - m @ (m.mH @ v)

    def _eye(self, m: Tensor) -> Tensor:
        return torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)

    @in_full_precision
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the Cayley retraction of the tangent vector ``u``, of second order if square."""
        m, delta = self._rotation(x, u)
        return self.from_matrices(retract_low_rank(m, delta, self._eye(m), phi="cayley"), x.shape)

    @in_full_precision
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        r"""Return the geodesic end point, :math:`\exp(uX^H - Xu^H)\,X \exp(-X^H u)`."""
        m, v = self.to_matrices(x), self.to_matrices(u)
        y = retract_low_rank(m, 2 * v, self._eye(m), phi="exp")
        inside = m.mH @ v
        return self.from_matrices(y @ exp_skew(0.5 * (inside.mH - inside)), x.shape)

    @in_full_precision
    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Return ``v`` projected on the tangent space at ``y``."""
        return self.proju(y, v)

    @in_full_precision
    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return ``v`` carried along :meth:`retr`, an isometry: the rotation applied to it."""
        return self.retr_transp(x, u, v)[1]

    @in_full_precision
    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the retracted point and ``v`` carried along, both by the same rotation."""
        m, delta = self._rotation(x, u)
        y, w = self._rotate_both(m, delta, self.to_matrices(v))
        return self.from_matrices(y, x.shape), self.from_matrices(w, x.shape)

    def _rotate_both(self, m: Tensor, delta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if m.shape[-2] == m.shape[-1]:
            rotation = cayley(0.5 * (delta @ m.mH - m @ delta.mH))
            return rotation @ m, rotation @ v
        # Cayley(W) in the Sherman-Morrison-Woodbury form: W = (Δ Xᴴ - X Δᴴ)/2 has rank 2p.
        left = torch.cat([delta, m], dim=-1) * 0.5**0.5
        right = torch.cat([m, -delta], dim=-1) * 0.5**0.5
        small = torch.eye(left.shape[-1], dtype=m.dtype, device=m.device)
        small = small - 0.5 * (right.mH @ left)
        both = torch.cat([m, v], dim=-1)
        both = both + left @ torch.linalg.solve(small, right.mH @ both)
        p = m.shape[-1]
        return retract_low_rank(m, delta, self._eye(m), phi="cayley"), both[..., p:]

    @in_full_precision
    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return ``v`` carried along :meth:`expmap` (by projection at the end point)."""
        return self.proju(self.expmap(x, u), v)

    @in_full_precision
    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the geodesic end point and ``v`` projected there."""
        y = self.expmap(x, u)
        return y, self.proju(y, v)

    # Points ---------------------------------------------------------------

    def _new(
        self, size: tuple[Any, ...], dtype: torch.dtype | None
    ) -> tuple[torch.Size, torch.dtype]:
        shape = torch.Size(size2shape(*size))
        dtype = self._default_dtype() if dtype is None else dtype
        reason = self.why_not(shape, dtype)
        if reason is not None:
            raise ManifoldError(
                f"{self!r} has no point of shape {tuple(shape)}, {dtype}: it {reason}"
            )
        return shape, dtype

    def _default_dtype(self) -> torch.dtype:
        return torch.get_default_dtype()

    @in_full_precision
    def random(
        self,
        *size: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return a point drawn uniformly (Haar), as a :class:`geoopt.ManifoldTensor`.

        Args:
            size: the shape, as numbers or one tuple.
            dtype: defaults to torch's default (the complex one for unitary matrices).
            device: defaults to torch's default.
            generator: source of randomness; the default is torch's global one.

        Raises:
            ManifoldError: the shape or dtype cannot be on this manifold.

        Reference:
            Mezzadri, "How to generate random matrices from the classical
            compact groups" (2007).
        """
        shape, dtype = self._new(size, dtype)
        half = dtype in (torch.float16, torch.bfloat16)
        drawn = torch.float32 if half else dtype
        gauss = torch.randn(shape, dtype=drawn, device=device, generator=generator)
        q, r = torch.linalg.qr(self.to_matrices(gauss))
        phase = torch.diagonal(r, dim1=-2, dim2=-1).sgn()
        q = q * torch.where(phase == 0, torch.ones_like(phase), phase).unsqueeze(-2)
        if self.det is not None and q.numel() > 0:
            flip = torch.linalg.slogdet(q)[0] * self.det
            q = torch.cat([q[..., :1] * flip[..., None, None], q[..., 1:]], dim=-1)
        point = self.from_matrices(q, shape).contiguous().resolve_conj().to(dtype)
        return geoopt.ManifoldTensor(point, manifold=self)  # type: ignore[no-any-return]

    @in_full_precision
    def origin(
        self,
        *size: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """Return the identity (its first columns), with one sign flipped for ``det=-1``.

        Args:
            size: the shape, as numbers or one tuple.
            dtype: defaults to torch's default (the complex one for unitary matrices).
            device: defaults to torch's default.
            seed: not used; geoopt passes it.
        """
        shape, dtype = self._new(size, dtype)
        m = self.to_matrices(torch.zeros(shape, dtype=dtype, device=device)).clone()
        m.diagonal(dim1=-2, dim2=-1).fill_(1)
        if self.det == -1:
            m[..., 0, 0] = -1
        point = self.from_matrices(m, shape).contiguous().resolve_conj()
        return geoopt.ManifoldTensor(point, manifold=self)  # type: ignore[no-any-return]
