"""Processes of tests: a function in several of them, on gloo, one thread each."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_PRELOADED = [
    "riemann_unn",
    "torch._dynamo",  # which an optimizer imports
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint.state_dict",
    "tests.support",
]


def start(function: Callable[..., Any], args: tuple[Any, ...], processes: int) -> None:
    """Call a function of (rank, *args) in processes that are forked off one that has torch.

    Importing torch takes seconds of a processor; that one, which runs nothing, does so once.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    mp.start_processes(function, args=args, nprocs=processes, start_method="forkserver")


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


def _results(world: int, folder: Path) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def in_processes(world: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what a function of (rank, world, *args) returns in each of some processes."""
    folder.mkdir(parents=True, exist_ok=True)
    start(_work, (world, str(folder), function, args), world)
    return _results(world, folder)


def once_in_processes(
    factory: pytest.TempPathFactory, world: int, function: Callable[..., Any], *args: Any
) -> list[Any]:
    """Return what :func:`in_processes` does, computed once for all workers that run the tests."""
    name = f"{function.__module__.rsplit('.', 1)[-1]}-{function.__name__}-{world}"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return in_processes(world, factory.mktemp(name), function, *args)
    folder = factory.getbasetemp().parent / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers that come later wait
        if not (folder / "done").exists():
            (folder / "meet").unlink(missing_ok=True)
            in_processes(world, folder, function, *args)
            (folder / "done").touch()
    return _results(world, folder)


@contextmanager
def world_of_one(folder: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
