"""Parameter groups: tagged parameters, and all others."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..tagging import tagged_parameters

__all__ = ["param_groups"]

_TAGGED = "tagged_"


def param_groups(
    model: nn.Module, *, lr: float, tagged_lr: float | None = None, **per_kind: Any
) -> list[dict[str, Any]]:
    """A model's parameters as groups for an optimizer: those with a tag first, then the others.

    The learning rate of a tagged weight sets an angle of rotation, that of another weight a
    distance, so their best values seldom agree: for a recurrence of many steps about 1/32 of
    the rest's.

    Args:
        model: Has the parameters; one that is shared between modules counts once.
        lr: Learning rate of the parameters without a tag.
        tagged_lr: Learning rate of those with one; ``lr`` if left out.
        **per_kind: More options of the groups. One whose name begins with ``tagged_`` goes to the
            tagged parameters alone and wins there; any other goes to both.

    Returns:
        At most two groups; one without parameters is left out.

    Raises:
        LostTagError: If a parameter of the model has lost its tag.
        TypeError: If an option is ``params`` or ``tagged_params``, which the groups hold already.
    """
    special = {name.removeprefix(_TAGGED): v for name, v in per_kind.items() if _is_tagged(name)}
    common = {name: v for name, v in per_kind.items() if not _is_tagged(name)}
    if "params" in special | common:
        raise TypeError("param_groups takes the parameters from the model, not from params=")
    tagged = list({id(p): p for _, p in tagged_parameters(model)}.values())
    known = {id(p) for p in tagged}
    groups = [
        {"params": tagged, **common, "lr": lr if tagged_lr is None else tagged_lr, **special},
        {"params": [p for p in model.parameters() if id(p) not in known], **common, "lr": lr},
    ]
    return [group for group in groups if group["params"]]


def _is_tagged(name: str) -> bool:
    return name.startswith(_TAGGED)
