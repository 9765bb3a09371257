"""Pure kernels: tensors in, tensors out; nothing here knows of parameters or optimizers."""

from .maps import Phi, cayley, exp_skew, polar, skew, unitary_core
from .polish import newton_schulz_, polish_
from .sketch import SketchMethod, orthonormal_rows, sketch
from .update import retract_low_rank, retract_low_rank_

__all__ = [
    "Phi",
    "SketchMethod",
    "cayley",
    "exp_skew",
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
