"""Tags: which parameters are on which manifold, and the detection of lost tags."""

from .attribute import manifold_of
from .computed import REMEDY, computed_tensors, original_of_weight, weight_of_original
from .flattened import refuse_flattened
from .lost_tags import KnownTags
from .tags import (
    _keep_on_assign as _keep_on_assign,  # the name under which modules of 0.2.0 have pickled it
)
from .tags import remember_tags_, tag_, tagged_parameters, untag_

__all__ = [
    "REMEDY",
    "KnownTags",
    "computed_tensors",
    "manifold_of",
    "original_of_weight",
    "refuse_flattened",
    "remember_tags_",
    "tag_",
    "tagged_parameters",
    "untag_",
    "weight_of_original",
]
