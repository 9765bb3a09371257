"""Coordinates: all parameters as one real vector, for bases that need inner products of everything.

Tagged parameters are represented by the directions of :mod:`riemann_unn.linalg.curves`, in the
shape of the parameter, since the matrix view of a kernel leaves out frequencies; the others by
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ManifoldTypeError
from ..linalg.curves import Curve, closest_to_descent, projected, riemannian_gradient
from ..linalg.precision import in_full_precision
from ..linalg.step.polish import newton_schulz_
from .tagged import TaggedParam

__all__ = ["Coordinates", "JointCurve", "Point"]


@dataclass(frozen=True)
class Point:
    """A point: the matrices of tagged parameters, by batch, and the values of all parameters."""

    matrices: list[Tensor]
    values: list[Tensor]


class _Batch:
    """Tagged parameters of one batch key, stacked as matrices ``(count, n, p)``, ``p <= n``."""

    def __init__(self, members: list[TaggedParam]) -> None:
        self.members = members
        self._manifold = members[0].manifold
        self._shape = members[0].memory.shape
        self._view = torch.Size()  # of the matrices of all members

    def points(self) -> Tensor:
        """Return the matrices of the members, with errors above rounding corrected."""
        x = self._matrices(torch.stack([m.memory for m in self.members]), is_point=True)
        if any(member.is_inexact for member in self.members):
            x = newton_schulz_(newton_schulz_(x.clone()))
        return x

    def matrices(self, tensors: Tensor) -> Tensor:
        """Return displacements or gradients ``(..., count, *shape)`` as ``(..., count, n, p)``."""
        *batch, _ = tensors.shape[: tensors.ndim - len(self._shape)]
        together = tensors.reshape(-1, *self._shape)
        found = self._matrices(together, is_point=False)
        return found.reshape(*batch, -1, *found.shape[-2:])

    def tensors(self, matrices: Tensor) -> Tensor:
        """Undo :meth:`matrices`."""
        batch = matrices.shape[:-3]
        count = batch.numel() * len(self.members)
        view = matrices.reshape(count, *self._view[1:])
        whole = torch.Size((count, *self._shape))
        if self._manifold.takes_batches:
            found = self._manifold.from_matrices(view, whole)
        else:
            parts = [self._manifold.from_matrices(one, self._shape) for one in view.unbind(0)]
            found = torch.stack(parts)
        return found.reshape(*batch, len(self.members), *self._shape)

    def _matrices(self, tensors: Tensor, *, is_point: bool) -> Tensor:
        manifold = self._manifold
        view = manifold.to_matrices if is_point else manifold.displacement_matrices
        if manifold.takes_batches:
            found = view(tensors)
        else:
            found = torch.stack([view(one) for one in tensors.unbind(0)])
        self._view = torch.Size((len(self.members), *found.shape[1:]))
        return found.reshape(-1, *found.shape[-2:])


class Coordinates:
    """All parameters of an optimizer as one real vector, and how it moves them.

    Args:
        members: the tagged parameters.
        others: those without a tag.
        phi: how square matrices move.

    Raises:
        ManifoldTypeError: one is stored in half precision, or they are on several devices.
    """

    def __init__(
        self, members: list[TaggedParam], others: list[Tensor], *, phi: str = "cayley"
    ) -> None:
        self._phi = phi
        by_key: dict[int, list[TaggedParam]] = {}
        for member in members:
            if member.memory.numel() > 0:  # empty parameters have no coordinates
                by_key.setdefault(member.batch_key, []).append(member)
        self._batches = [_Batch(some) for some in by_key.values()]
        self._tagged = [member.param for batch in self._batches for member in batch.members]
        self._others = others
        self.params = [*self._tagged, *others]
        for p in self.params:
            if p.dtype in (torch.float16, torch.bfloat16):
                raise ManifoldTypeError(
                    f"a parameter of shape {tuple(p.shape)} is stored as {p.dtype}, in which a "
                    "line search cannot tell losses apart; convert the model by .float(), or "
                    "train it by another optimizer of riemann_unn.optim"
                )
        devices = {p.device for p in self.params}
        if len(devices) > 1:
            raise ManifoldTypeError(
                f"the parameters are on several devices, {sorted(map(str, devices))}, and L-BFGS "
                "takes inner products over all of them; move them to one"
            )
        self._memory = [p.detach().as_subclass(Tensor) for p in self.params]
        self.device = next(iter(devices), torch.device("cpu"))
        self.dtype = torch.float32
        for p in self._memory:
            self.dtype = torch.promote_types(self.dtype, p.dtype.to_real())
        sizes = [
            sum(_count_reals(member.memory) for member in batch.members) for batch in self._batches
        ]
        self._parts = [*sizes, sum(map(_count_reals, others))]
        self.size = sum(self._parts)

    # To and from one vector ------------------------------------------------

    def _pieces(self, vectors: Tensor) -> list[Tensor]:
        return list(vectors.split(self._parts, dim=-1))

    def _flat(self, tensors: Tensor) -> Tensor:
        """Return tensors ``(rows, ...)`` as real rows."""
        if tensors.is_complex():
            tensors = torch.view_as_real(tensors.resolve_conj())
        return tensors.reshape(len(tensors), -1).to(self.dtype)

    def _unflat(self, piece: Tensor, batch: _Batch) -> Tensor:
        """Return matrices ``(rows, count, n, p)`` of rows ``(rows, numbers)``."""
        like = batch.members[0].memory
        shape = (len(piece), len(batch.members), *like.shape)
        piece = piece.to(like.dtype.to_real())
        if like.is_complex():
            return batch.matrices(_complex(piece, shape))
        return batch.matrices(piece.reshape(shape))

    def vector(self, tensors: list[Tensor]) -> Tensor:
        """Return one vector of tensors in the order of ``params``."""
        return torch.cat([self._flat(t.unsqueeze(0))[0] for t in tensors])

    def tensors(self, vector: Tensor) -> list[Tensor]:
        """Undo :meth:`vector`."""
        pieces = vector.split([_count_reals(p) for p in self.params])
        return [_shaped(piece, p) for piece, p in zip(pieces, self._memory, strict=True)]

    # Points ----------------------------------------------------------------

    @in_full_precision
    def current_point(self) -> Point:
        """Return a copy of the point at which the parameters are."""
        matrices = [batch.points() for batch in self._batches]
        values = [value.clone() for value in self._memory]
        at = 0
        for batch, x in zip(self._batches, matrices, strict=True):
            count = len(batch.members)
            if any(member.is_inexact for member in batch.members):
                values[at : at + count] = batch.tensors(x).unbind(0)
            at += count
        return Point(matrices, values)

    def write_(self, point: Point) -> None:
        """Move the parameters to a point, in one call."""
        if self._memory:
            torch._foreach_copy_(self._memory, point.values)

    def mark_on_manifold(self) -> None:
        """Record that the tagged parameters are on their manifolds."""
        for batch in self._batches:
            for member in batch.members:
                member.version, member.is_inexact = member.memory._version, False

    def untagged(self, vector: Tensor) -> Tensor:
        """Return the part of a vector that belongs to parameters without a tag."""
        return self._pieces(vector)[-1]

    # Gradients and directions ------------------------------------------------

    def euclidean(self) -> list[Tensor]:
        """Return the gradients of all parameters, zeros where there is none."""
        return [
            torch.zeros_like(memory)
            if p.grad is None
            else (p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad).detach()
            for p, memory in zip(self.params, self._memory, strict=True)
        ]

    @in_full_precision
    def gradient(self, point: Point, grads: list[Tensor]) -> Tensor:
        """Return the gradient along the manifolds, shape ``(size,)``."""
        pieces, at = [], 0
        for batch, x in zip(self._batches, point.matrices, strict=True):
            count = len(batch.members)
            g = batch.matrices(torch.stack([_as_tensor(g) for g in grads[at : at + count]]))
            pieces.append(self._flat(batch.tensors(riemannian_gradient(x, g)).unsqueeze(0))[0])
            at += count
        pieces += [self._flat(_as_tensor(g).unsqueeze(0))[0] for g in grads[at:]]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=self.dtype)

    @in_full_precision
    def project(self, point: Point, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Project vectors on the directions at a point; for square matrices the identity."""
        tall = [x.shape[-1] < x.shape[-2] for x in point.matrices]
        if not vectors or not any(tall):
            return list(vectors)
        rows = torch.stack(list(vectors))
        pieces = self._pieces(rows)
        for i, (batch, x) in enumerate(zip(self._batches, point.matrices, strict=True)):
            if tall[i]:
                pieces[i] = self._flat(batch.tensors(projected(x, self._unflat(pieces[i], batch))))
        return list(torch.cat(pieces, dim=-1).unbind(0))

    @in_full_precision
    def curve(self, point: Point, direction: Tensor) -> JointCurve:
        """Return the curve from a point in a direction."""
        return JointCurve(self, point, direction)

    @in_full_precision
    def closest_to_descent(self, point: Point, grads: list[Tensor]) -> Point | None:
        """Return the minimiser of the loss's linear part; None where it is not unique."""
        if any(p.requires_grad for p in self._others):
            return None
        matrices, values, at = [], [value.clone() for value in point.values], 0
        for batch, x in zip(self._batches, point.matrices, strict=True):
            count = len(batch.members)
            found = torch.stack([_as_tensor(g) for g in grads[at : at + count]])
            if not bool((found.flatten(1) != 0).any(dim=1).all()):
                return None
            y = closest_to_descent(x, batch.matrices(found))
            matrices.append(y)
            values[at : at + count] = batch.tensors(y).unbind(0)
            at += count
        return Point(matrices, values)

    def tangent_norms(self, point: Point, gradient: Tensor) -> dict[Tensor, Tensor]:
        """Return for each tagged parameter the norm of W = ½ (G Xᴴ - X Gᴴ), or of Ω if square."""
        found: dict[Tensor, Tensor] = {}
        rows = self._pieces(gradient.unsqueeze(0))
        for batch, x, piece in zip(self._batches, point.matrices, rows, strict=False):
            d = self._unflat(piece, batch)[0]
            whole = torch.linalg.vector_norm(d, dim=(-2, -1)).square()
            if x.shape[-1] < x.shape[-2]:
                inside = torch.linalg.vector_norm(x.mH @ d, dim=(-2, -1)).square()
                whole = 0.5 * (whole + inside)
            sums = whole.reshape(len(batch.members), -1).sum(dim=1).sqrt()
            found |= dict(zip((member.param for member in batch.members), sums, strict=True))
        return found

    @property
    def radius(self) -> float:
        """The norm of all tagged parameters."""
        norms = torch._foreach_norm([m.memory for batch in self._batches for m in batch.members])
        return float(torch.stack([n.to(self.dtype) for n in norms]).norm())


class JointCurve:
    """The curve from a point in a direction, for all parameters at once."""

    def __init__(self, coordinates: Coordinates, point: Point, direction: Tensor) -> None:
        self._c, self._start = coordinates, point
        pieces = coordinates._pieces(direction.unsqueeze(0))
        self._untagged = pieces[-1][0]
        self._curves: list[tuple[_Batch, Tensor, Curve, Tensor]] = []
        for batch, x, piece in zip(coordinates._batches, point.matrices, pieces, strict=False):
            d = coordinates._unflat(piece, batch)[0]
            moves = (d != 0).flatten(1).any(dim=1)
            self._curves.append((batch, x, Curve(x, d, phi=coordinates._phi), moves))

    @in_full_precision
    def point(self, t: float) -> Point:
        """Return the point at a step; what has no direction stays as it is, bit for bit."""
        matrices, values = [], []
        at = 0
        for batch, x, curve, moves in self._curves:
            count = len(batch.members)
            old = self._start.values[at : at + count]
            at += count
            if not bool(moves.any()):
                matrices.append(x)
                values += old
                continue
            y = curve.point(t)
            if not bool(moves.all()):
                y = torch.where(moves[:, None, None], y, x)
            matrices.append(y)
            new = batch.tensors(y).unbind(0)
            some = moves.reshape(count, -1).any(dim=1).tolist()
            values += [n if moved else o for n, o, moved in zip(new, old, some, strict=True)]
        untagged = self._untagged
        for value in self._start.values[at:]:
            count = _count_reals(value)
            values.append(value + t * _shaped(untagged[:count], value))
            untagged = untagged[count:]
        return Point(matrices, values)

    @in_full_precision
    def velocity(self, t: float) -> Tensor:
        """Return the derivative of the point, as a direction there."""
        c = self._c
        pieces = [
            c._flat(batch.tensors(curve.velocity(t)).unsqueeze(0))[0]
            for batch, _, curve, _ in self._curves
        ]
        return torch.cat([*pieces, self._untagged])


def _count_reals(x: Tensor) -> int:
    return x.numel() * (2 if x.is_complex() else 1)


def _shaped(piece: Tensor, like: Tensor) -> Tensor:
    piece = piece.to(like.dtype.to_real())
    if like.is_complex():
        return _complex(piece, like.shape)
    return piece.reshape(like.shape)


def _complex(pairs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return complex numbers of pairs, wherever in a vector these begin."""
    return torch.complex(*pairs.reshape(*shape, 2).unbind(-1))


def _as_tensor(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)
