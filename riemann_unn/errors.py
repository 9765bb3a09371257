"""The errors this package raises: each says what, why and the remedy."""

__all__ = [
    "GraphError",
    "LineSearchError",
    "LostTagError",
    "ManifoldError",
    "ManifoldTypeError",
    "NonFiniteError",
    "OffManifoldError",
    "StateError",
]


class ManifoldError(ValueError):
    """A parameter, a manifold and an operation on them do not fit together."""


class ManifoldTypeError(ManifoldError, TypeError):
    """An argument is of a kind that cannot be constrained or composed at all."""


class OffManifoldError(ManifoldError):
    """A parameter's values do not satisfy the constraint it is tagged with."""


class LostTagError(ManifoldError):
    """A tagged parameter has lost its tag other than by ``untag_``."""


class NonFiniteError(ManifoldError):
    """A gradient, the displacement made from it or a learning rate holds NaN or infinity."""


class LineSearchError(ManifoldError):
    """No step lowers the loss, because the closure gives another loss at the same point."""


class StateError(ManifoldError):
    """A saved state is not one of the optimizer that is to load it."""


class GraphError(ValueError):
    """A model cannot be traced, or a node of its graph cannot be followed."""
