"""Training for neural networks whose weights stay orthogonal or unitary, exactly."""

import warnings

with warnings.catch_warnings():  # geoopt compiles by torch.jit.script, of which new torch warns
    warnings.simplefilter("ignore", DeprecationWarning)
    import geoopt as _geoopt  # noqa: F401

from . import errors, init, linalg, nn, optim
from .data_parallel import exclude_from_ddp_
from .diagnostics import orthogonality_error
from .errors import (
    LostTagError,
    ManifoldError,
    ManifoldTypeError,
    NonFiniteError,
    OffManifoldError,
)
from .manifolds import Orthogonal, OrthogonalConv, Stiefel, Unitary, UnitaryConv
from .monitor import Monitor
from .optim import param_groups
from .tagging import manifold_of, tag_, tagged_parameters, untag_

__version__ = "0.2.0"

__all__ = [
    "LostTagError",
    "ManifoldError",
    "ManifoldTypeError",
    "Monitor",
    "NonFiniteError",
    "OffManifoldError",
    "Orthogonal",
    "OrthogonalConv",
    "Stiefel",
    "Unitary",
    "UnitaryConv",
    "errors",
    "exclude_from_ddp_",
    "init",
    "linalg",
    "manifold_of",
    "nn",
    "optim",
    "orthogonality_error",
    "param_groups",
    "tag_",
    "tagged_parameters",
    "untag_",
]
