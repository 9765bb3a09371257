"""Pure kernels: tensors in, tensors out; nothing here knows of parameters or optimizers."""

from .conv import (
    ConvDecay,
    ConvTruncation,
    conv_adjoint,
    conv_apply,
    conv_cayley,
    conv_compose,
    conv_decay,
    conv_exp,
    conv_from_spectrum,
    conv_identity,
    conv_log,
    conv_matrix,
    conv_polar,
    conv_singular_values,
    conv_skew,
    conv_spectrum,
    conv_truncate,
)
from .hermitian import hermitian_function
from .maps import Phi, cayley, exp_skew, polar, skew, unitary_core
from .polish import newton_schulz_, polish_
from .sketch import SketchMethod, orthonormal_rows, sketch
from .update import retract_low_rank, retract_low_rank_

__all__ = [
    "ConvDecay",
    "ConvTruncation",
    "Phi",
    "SketchMethod",
    "cayley",
    "conv_adjoint",
    "conv_apply",
    "conv_cayley",
    "conv_compose",
    "conv_decay",
    "conv_exp",
    "conv_from_spectrum",
    "conv_identity",
    "conv_log",
    "conv_matrix",
    "conv_polar",
    "conv_singular_values",
    "conv_skew",
    "conv_spectrum",
    "conv_truncate",
    "exp_skew",
    "hermitian_function",
    "newton_schulz_",
    "orthonormal_rows",
    "polar",
    "polish_",
    "retract_low_rank",
    "retract_low_rank_",
    "sketch",
    "skew",
    "unitary_core",
]
