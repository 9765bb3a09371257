"""Random unitary kernels on a window of three sites in each dimension, without transforms."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from ..factor import DOUBLE
from ..step.polish import newton_schulz_

__all__ = ["local_kernel_"]


def _haar(rows: int, columns: int, like: Tensor) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(rows, columns, dtype=like.dtype, device=like.device))
    phase = torch.diagonal(r).sgn()
    haar = newton_schulz_(q * torch.where(phase == 0, torch.ones_like(phase), phase))
    return haar


def local_kernel_(kernel: Tensor) -> Tensor:
    r"""Fill a kernel with a random (semi-)unitary one that is zero but for a window around site 0.

    .. math:: \hat K(f) = Q \prod_d \bigl(P_d + (I - P_d)\, w_d\bigr)
        \bigl(P_d' + (I - P_d')\, w_d\bigr) w_d^{-1}, \qquad w_d = e^{-2\pi i f_d / N_d}

    with a Haar matrix Q of the channels and projectors on half of them whose ranges are Haar
    subspaces, all independent; a product of unitary factors of two sites each, on a window of
    three in each dimension. Where channels out and in differ it is made for the larger number and
    the first channels of the smaller number are kept. Drawn from torch's global generator. In the
    mean a quarter, a half and a quarter of the mass lie at the three sites.

    Args:
        kernel: shape ``(out, in, *size)``, real or complex.

    Reference:
        Li et al., "Preventing gradient attenuation in Lipschitz constrained convolutional
        networks" (2019), for kernels of projectors; Xiao et al. (2018), algorithm 2.
    """
    out_channels, in_channels = kernel.shape[:2]
    rows, columns = max(out_channels, in_channels), min(out_channels, in_channels)
    single = torch.promote_types(kernel.dtype, torch.float32)
    dtype = DOUBLE.get(single, single)
    taps = torch.eye(rows, columns, dtype=dtype, device=kernel.device)
    for _ in kernel.shape[2:]:
        taps = taps.unsqueeze(-1)
        for rank in (rows // 2, rows - rows // 2):
            v = _haar(rows, rank, taps)
            stay = (v @ (v.mH @ taps.flatten(1))).view_as(taps)
            taps = functional.pad(stay, (0, 1)) + functional.pad(taps - stay, (1, 0))
    taps = (_haar(rows, rows, taps) @ taps.flatten(1)).view_as(taps)
    if out_channels < in_channels:  # the adjoint: mirrored around the origin
        taps = taps.transpose(0, 1).conj().flip(tuple(range(2, taps.ndim)))
    taps = taps.to(kernel.dtype)
    kernel.zero_()
    whole, window = (x.movedim((0, 1), (-2, -1)) for x in (kernel, taps))
    for site in product(range(3), repeat=kernel.ndim - 2):
        # On a torus of one or two sites, some sites of the window coincide.
        place = tuple((i - 1) % n for i, n in zip(site, kernel.shape[2:], strict=True))
        whole[place] += window[site]
    return kernel
