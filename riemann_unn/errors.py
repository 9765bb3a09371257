"""The errors this package raises: each says what, why and the remedy."""

__all__ = ["GraphError", "ManifoldError", "ManifoldTypeError", "NonFiniteError", "OffManifoldError"]


class ManifoldError(ValueError):
    """A parameter, a manifold and what was asked of them do not fit together."""


class ManifoldTypeError(ManifoldError, TypeError):
    """An argument is of a kind that cannot be constrained or composed at all."""


class OffManifoldError(ManifoldError):
    """A parameter's values do not satisfy the constraint it is tagged with."""


class NonFiniteError(ManifoldError):
    """A gradient, the displacement made from it or a learning rate holds NaN or infinity."""


class GraphError(ValueError):
    """A model cannot be traced, or a node of its graph cannot be followed."""
