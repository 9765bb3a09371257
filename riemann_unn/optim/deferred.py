"""Deferred errors: faults recorded on a device by steps that do not read from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import ManifoldError, NonFiniteError, OffManifoldError
from .masked import NONFINITE, OFF, OVERFLOW, Faults, MaskedBatch
from .tagged import TaggedParam

__all__ = ["check_capturing", "faulty_members", "mask_on_device", "raise_faults"]


def raise_faults(batches: Iterable[Faults]) -> None:
    """Raise the faults that devices have recorded since the last call; waits for the devices.

    Raises:
        NonFiniteError: a gradient held NaN or infinity, or a step overflowed.
        OffManifoldError: a parameter was off its manifold.
    """
    batches = list(batches)
    found: dict[int, list[str]] = {}
    for batch in batches:
        for member, code in zip(batch.members, batch.bits.tolist(), strict=True):
            for bit in (NONFINITE, OFF, OVERFLOW):
                if code & bit:
                    found.setdefault(bit, []).append(member.name)
    for batch in batches:
        batch.forget()
    if NONFINITE in found:
        raise NonFiniteError(
            f"the gradient of {', '.join(found[NONFINITE])} held NaN or infinity in an earlier "
            'step, which changed nothing; clip or rescale the loss, or pass nonfinite="skip"'
        )
    if OFF in found:
        raise OffManifoldError(
            f"{', '.join(found[OFF])} was off its manifold in an earlier step, which changed "
            "nothing; call riemann_unn.init.warm_start_"
        )
    if OVERFLOW in found:
        raise NonFiniteError(
            f"an earlier step of {', '.join(found[OVERFLOW])} overflowed to NaN or infinity "
            "although the gradient was finite, and did not move it; lower the learning rate"
        )


def faulty_members(batches: Sequence[MaskedBatch]) -> list[tuple[TaggedParam, int]]:
    """Return the members that have faults, with their bits; one read per device if there are none.

    Raises:
        NonFiniteError: an earlier step overflowed.
    """
    by_device: dict[torch.device, list[MaskedBatch]] = {}
    for batch in batches:
        by_device.setdefault(batch.device, []).append(batch)
    wrong: list[tuple[TaggedParam, int]] = []
    for some in by_device.values():
        flags = [flag for batch in some for flag in (batch.wrong.any(), batch.found.bits.any())]
        recorded = torch.stack(flags).tolist()
        if any(recorded[1::2]):
            raise_faults(batch.found for batch in some)
        for batch, is_wrong in zip(some, recorded[::2], strict=True):
            codes = batch.wrong.tolist() if is_wrong else ()
            wrong += [
                (member, code) for member, code in zip(batch.members, codes, strict=False) if code
            ]
    return wrong


def mask_on_device(
    batches: Iterable[MaskedBatch], *, nonfinite: Literal["raise", "skip"]
) -> dict[torch.device, Tensor]:
    """Mask a step on a device if any member has a fault, or with ``"skip"`` those members alone.

    Returns:
        A flag for each device: whether parameters without a tag take their step there.
    """
    if nonfinite == "skip":
        taken: dict[torch.device, Tensor] = {}
        for batch in batches:
            batch.mask(batch.wrong == 0, recorded=OFF)
            if batch.device not in taken:
                taken[batch.device] = torch.ones((), dtype=torch.bool, device=batch.device)
        return taken
    fine: dict[torch.device, list[Tensor]] = {}
    for batch in batches:
        flags = batch.wrong == 0
        fine.setdefault(batch.device, []).append(flags[0] if len(flags) == 1 else flags.all())
    unmasked = {
        device: flags[0] if len(flags) == 1 else torch.stack(flags).all()
        for device, flags in fine.items()
    }
    for batch in batches:
        batch.mask(unmasked[batch.device])
    return unmasked


def check_capturing(batches: Iterable[MaskedBatch], *, capturable: bool) -> None:
    """Refuse to be captured in a graph of a CUDA stream by a step that reads from the device.

    Raises:
        ManifoldError: the step is being captured.
    """
    if capturable or not any(batch.device.type == "cuda" for batch in batches):
        return
    if torch.cuda.is_current_stream_capturing():
        raise ManifoldError(
            "a step is captured in a CUDA graph, where nothing can be read from the device; pass "
            "capturable=True to the optimizer"
        )
