"""Flattened weights: FSDP1 puts many weights into one vector, which cannot be constrained."""

from __future__ import annotations

from torch import Tensor

from ..errors import ManifoldTypeError

__all__ = ["FSDP1", "is_flat", "is_flattened", "refuse_flattened"]

FSDP1 = (
    "FullyShardedDataParallel (FSDP1) flattens weights into one vector, of which no matrix can be "
    "constrained; use torch.distributed.fsdp.fully_shard (FSDP2) instead and call "
    "riemann_unn.tag_ after it"
)


def is_flat(p: object) -> bool:
    """Tell whether a parameter is FSDP1's vector of many weights."""
    return bool(getattr(p, "_is_flat_param", False))


def is_flattened(p: object) -> bool:
    """Tell whether a tensor is a weight that FSDP1 has put into such a vector."""
    return bool(getattr(p, "_fsdp_flattened", False))


def refuse_flattened(name: str, p: Tensor) -> None:
    """Refuse a parameter that is, or is in, a vector of FSDP1.

    Raises:
        ManifoldTypeError: naming it and FSDP2.
    """
    if is_flat(p) or is_flattened(p):
        raise ManifoldTypeError(f"{name} cannot be kept on a manifold: {FSDP1}")
