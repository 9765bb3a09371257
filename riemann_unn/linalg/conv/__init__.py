"""Kernel algebra on the torus, in one, two, three or more dimensions, one channel or many."""

from .algebra import (
    conv_adjoint,
    conv_apply,
    conv_compose,
    conv_identity,
    conv_matrix,
    conv_singular_values,
)
from .locality import ConvDecay, ConvTruncation, conv_decay, conv_truncate
from .maps import conv_cayley, conv_exp, conv_log, conv_polar, conv_skew
from .spectrum import conv_from_spectrum, conv_spectrum

__all__ = [
    "ConvDecay",
    "ConvTruncation",
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
]
