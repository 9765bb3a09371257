"""Parameters that several processes share: their placement, and the communication of a step."""

from .exchange import Computation, FromOwner, Group, ToOwner, bytes_sent, together
from .sharded import (
    as_whole,
    is_sharded,
    local_part,
    placed_like,
    scattered,
    sharded_like,
    writes_to,
)

__all__ = [
    "Computation",
    "FromOwner",
    "Group",
    "ToOwner",
    "as_whole",
    "bytes_sent",
    "is_sharded",
    "local_part",
    "placed_like",
    "scattered",
    "sharded_like",
    "together",
    "writes_to",
]
