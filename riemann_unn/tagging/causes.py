"""Causes of lost tags: what has replaced a tagged parameter, and the remedy."""

from __future__ import annotations

import torch
from torch import nn

from .flattened import FSDP1, is_flattened

__all__ = ["cause_and_remedy", "swapped"]


def cause_and_remedy(owner: nn.Module, now: object, *, was_meta: bool) -> tuple[str, str]:
    """Return a description of what has replaced the parameter, and the remedy.

    Args:
        owner: the module that owned the parameter.
        now: what has replaced it.
        was_meta: whether the parameter was on the meta device when it was tagged.
    """
    kind = type(now).__name__
    is_managed = getattr(owner, "_is_fsdp_managed_module", False)
    is_parameter = isinstance(now, nn.Parameter)
    if is_flattened(now) or (is_managed and not is_parameter):
        return "part of a flat vector", FSDP1
    if hasattr(now, "device_mesh") and hasattr(now, "placements"):
        by = "fully_shard" if is_managed else "parallelize_module (or distribute_tensor)"
        return f"an untagged {kind}", f"call riemann_unn.tag_ again after {by}"
    if is_managed and is_parameter:
        return "gathered by fully_shard for a forward pass", (
            "call reshard() on the sharded model, and riemann_unn.tag_ if it was not yet called "
            "after fully_shard"
        )
    if not is_parameter:
        return f"no parameter any more but a {kind}", (
            "tag after the call that replaced it, such as quantisation or weight_norm, if there "
            "is still a matrix to constrain"
        )
    if isinstance(now, torch.Tensor) and (was_meta or now.is_meta):
        by = ".to('meta')" if now.is_meta else "to_empty (or what else left the meta device)"
        return "an untagged parameter", f"call riemann_unn.tag_ again after {by}"
    if torch.__future__.get_swap_module_params_on_conversion():
        return "untagged", swapped()
    return f"an untagged {kind}", (
        "call riemann_unn.tag_ again after the call that replaced it (an assignment, a quantiser, "
        "torch.utils.swap_tensors)"
    )


def swapped() -> str:
    """Return the remedy after tensors have been swapped, together with their tags."""
    return (
        "call riemann_unn.tag_ again after torch.utils.swap_tensors, which .to(), .double() and "
        "load_state_dict call under torch.__future__.set_swap_module_params_on_conversion(True), "
        "and create the optimizer anew"
    )
