"""Pure kernels: functions of tensors, without parameters or optimizers.

The exported functions give the same results under autocast as without. Kernels for the inside of
a step, where autocast is off already, and for the forward of layers, which autocast is for, are
imported from their modules.
"""

from types import FunctionType

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
from .hadamard import hadamard, hadamard_factors, nearest_hadamard_orders
from .hermitian import hermitian_function
from .low_rank.activation_kernel import ACTIVATIONS, Activation, activation_kernel, gauss_hermite
from .low_rank.data import calibrated_factors, whitened_factors
from .low_rank.factors import (
    Factors,
    balanced,
    fit_rows,
    fold_kernel,
    function_error,
    spectral_factors,
    unfold_kernel,
)
from .low_rank.function import function_factors
from .maps import cayley, exp_skew, polar, rotate_by, skew, unitary_core
from .precision import in_full_precision
from .procrustes import procrustes, ridge_by_gcv
from .step.core import Angle, Phi, check_phi, core_minus_identity
from .step.energies import tangent_energies
from .step.polish import newton_schulz_, polish_
from .step.sketch import SketchMethod, sketch
from .step.tangent import (
    TangentMethod,
    next_directions,
    tangent_coordinates,
    tangent_directions,
    tangent_gradient,
    tangent_times,
)
from .step.update import retract_low_rank, retract_low_rank_, rotate_low_rank_, rotate_whole_

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Angle",
    "ConvDecay",
    "ConvTruncation",
    "Factors",
    "Phi",
    "SketchMethod",
    "TangentMethod",
    "activation_kernel",
    "balanced",
    "calibrated_factors",
    "cayley",
    "check_phi",
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
    "core_minus_identity",
    "exp_skew",
    "fit_rows",
    "fold_kernel",
    "function_error",
    "function_factors",
    "gauss_hermite",
    "hadamard",
    "hadamard_factors",
    "hermitian_function",
    "nearest_hadamard_orders",
    "newton_schulz_",
    "next_directions",
    "polar",
    "polish_",
    "procrustes",
    "retract_low_rank",
    "retract_low_rank_",
    "ridge_by_gcv",
    "rotate_by",
    "rotate_low_rank_",
    "rotate_whole_",
    "sketch",
    "skew",
    "spectral_factors",
    "tangent_coordinates",
    "tangent_directions",
    "tangent_energies",
    "tangent_gradient",
    "tangent_times",
    "unfold_kernel",
    "unitary_core",
    "whitened_factors",
]

for _name in __all__:
    _function = globals()[_name]
    if isinstance(_function, FunctionType):
        globals()[_name] = in_full_precision(_function)
        globals()[_name].__module__ = __name__  # for pickle
