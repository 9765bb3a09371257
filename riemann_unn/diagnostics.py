"""Diagnostics: the orthogonality error of a tensor, a parameter or a model."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from .errors import ManifoldError, ManifoldTypeError
from .manifolds import MatrixManifold, Stiefel
from .parallel import as_whole
from .tagging import manifold_of, tagged_parameters

__all__ = ["orthogonality_error"]


@overload
def orthogonality_error(x: Tensor, manifold: MatrixManifold | None = ...) -> Tensor: ...


@overload
def orthogonality_error(x: nn.Module, manifold: None = ...) -> dict[str, Tensor]: ...


def orthogonality_error(
    x: Tensor | nn.Module, manifold: MatrixManifold | None = None
) -> Tensor | dict[str, Tensor]:
    r"""Return how far off its manifold something is, the worst of a batch.

    .. math:: \|X^H X - I\|_F / \sqrt{p}

    computed in float64 on the matrix view of the manifold (for wide matrices
    :math:`X X^H`). A sharded tensor (DTensor) is gathered, so every process has to call this.

    Args:
        x: a tensor, a tagged parameter, or a module with tagged parameters.
        manifold: the manifold of a tensor; by default its tag, and
            :class:`~riemann_unn.Stiefel` for a tensor that has none.

    Returns:
        A float64 tensor of no dimensions; for a module a dict of them by
        parameter name.

    Raises:
        ManifoldError: the tensor cannot be on the manifold, or the module has
            no tagged parameter.
        LostTagError: in the module an untagged tensor is where a tagged parameter was.
        ManifoldTypeError: an argument is of another kind.
    """
    if manifold is not None and not isinstance(manifold, MatrixManifold):
        raise ManifoldTypeError(
            f"{manifold!r} is no manifold of this package; "
            "use an instance such as riemann_unn.Orthogonal()"
        )
    if isinstance(x, nn.Module):
        if manifold is not None:
            raise ManifoldTypeError("a module's parameters have their own manifolds; pass none")
        tagged = tagged_parameters(x)
        if not tagged:
            raise ManifoldError(
                f"{type(x).__name__} has no tagged parameter; tag some with riemann_unn.tag_"
            )
        return {name: orthogonality_error(p) for name, p in tagged}
    if not isinstance(x, Tensor):
        raise ManifoldTypeError(f"a tensor or a module is needed, got a {type(x).__name__}")
    manifold = manifold or manifold_of(x) or Stiefel()
    reason = manifold.why_not(x.shape, x.dtype)
    if reason is not None:
        raise ManifoldError(f"the tensor is no point of {manifold!r}: it {reason}")
    errors = manifold.orthogonality_error(as_whole(x))
    return errors.max() if errors.numel() else errors.new_zeros((), dtype=torch.float64)
