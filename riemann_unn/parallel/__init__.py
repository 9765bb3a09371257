"""Parameters that several processes share: where their parts lie, and what is sent for a step."""

from .exchange import Computation, FromOwner, Group, ToOwner, bytes_sent, together
from .places import Place, as_whole, is_sharded, local_part, place_of

__all__ = [
    "Computation",
    "FromOwner",
    "Group",
    "Place",
    "ToOwner",
    "as_whole",
    "bytes_sent",
    "is_sharded",
    "local_part",
    "place_of",
    "together",
]
