"""Processes of tests: a function in several of them, on gloo, one thread each."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _work(rank: int, world: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    try:
        torch.save(function(rank, world, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    except Exception:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def in_processes(world: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what a function of (rank, world, *args) returns in each of some processes."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_work, args=(world, str(folder), function, args), nprocs=world, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
