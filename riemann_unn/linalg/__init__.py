"""Pure kernels: tensors in, tensors out; nothing here knows of parameters or optimizers."""

from .activation_kernel import ACTIVATIONS, Activation, activation_kernel, gauss_hermite
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
from .low_rank import (
    Factors,
    balanced,
    fit_rows,
    fold_kernel,
    function_error,
    spectral_factors,
    unfold_kernel,
)
from .low_rank_data import calibrated_factors, whitened_factors
from .low_rank_function import function_factors
from .maps import Phi, cayley, exp_skew, polar, rotate_by, skew, unitary_core
from .polish import newton_schulz_, polish_
from .procrustes import procrustes, ridge_by_gcv
from .sketch import SketchMethod, orthonormal_rows, sketch
from .update import retract_low_rank, retract_low_rank_

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ConvDecay",
    "ConvTruncation",
    "Factors",
    "Phi",
    "SketchMethod",
    "activation_kernel",
    "balanced",
    "calibrated_factors",
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
    "fit_rows",
    "fold_kernel",
    "function_error",
    "function_factors",
    "gauss_hermite",
    "hermitian_function",
    "newton_schulz_",
    "orthonormal_rows",
    "polar",
    "polish_",
    "procrustes",
    "retract_low_rank",
    "retract_low_rank_",
    "ridge_by_gcv",
    "rotate_by",
    "sketch",
    "skew",
    "spectral_factors",
    "unfold_kernel",
    "unitary_core",
    "whitened_factors",
]
