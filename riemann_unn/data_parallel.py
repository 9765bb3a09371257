"""Data-parallel training: tagged parameters whose gradients need not be averaged."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from .errors import ManifoldError, ManifoldTypeError
from .parallel import Group, is_sharded
from .tagging import manifold_of

__all__ = ["exclude_from_ddp_"]


def exclude_from_ddp_(module: nn.Module, process_group: Group | None = None) -> list[str]:
    r"""Keep DistributedDataParallel from averaging the gradients of tagged parameters.

    Call it once on every process, before the model is wrapped, and give the optimizer the
    ``process_group``: its steps average the sketches of the gradients instead,

    .. math:: z = \frac1W \sum_w \tfrac12 (X^H G_w v - G_w^H X v),

    k n numbers for each application in the place of the n² of G. As DistributedDataParallel would,
    it sends the values of the first process to all, so that the replicas begin alike.

    Args:
        module: with tagged parameters; the one to be wrapped.
        process_group: whose processes have a replica each; the default is that of all.

    Returns:
        The names of the parameters that are left out.

    Raises:
        ManifoldError: no parameter is tagged, or no process group is initialised.
        ManifoldTypeError: ``module`` is none, or wrapped already, or a tagged parameter is sharded.
    """
    if not isinstance(module, nn.Module):
        raise ManifoldTypeError(f"a torch.nn.Module is needed, got a {type(module).__name__}")
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise ManifoldTypeError(
            "the module is wrapped in DistributedDataParallel already; call exclude_from_ddp_ on "
            "the model before wrapping it"
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise ManifoldError(
            "no process group is initialised; call torch.distributed.init_process_group before"
        )
    named = module.named_parameters(remove_duplicate=False)
    tagged = {name: p for name, p in named if manifold_of(p) is not None}
    if not tagged:
        raise ManifoldError(
            f"{type(module).__name__} has no tagged parameter; tag some with riemann_unn.tag_"
        )
    for name, p in tagged.items():
        if is_sharded(p):
            raise ManifoldTypeError(
                f"{name!r} is sharded, so that it is no replica; DistributedDataParallel is not "
                "for it, and its optimizer needs no process_group"
            )
    ignored = {*getattr(module, "_ddp_params_and_buffers_to_ignore", ()), *tagged}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        module, sorted(ignored)
    )
    first = dist.get_global_rank(process_group, 0) if process_group is not None else 0
    with torch.no_grad():
        for p in tagged.values():
            dist.broadcast(p, first, group=process_group)
    return sorted(tagged)
