"""Runs in separate processes, one thread each, with a common progress bar and a line for each."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .experiment import Experiment, Options, Place, Result, Run
from .store import Store

__all__ = ["Job", "cores", "do"]

Job = tuple[Experiment, Run]
_TELL_EVERY = 0.5  # seconds
_told: Any = None  # in a worker: the queue for its progress


def cores() -> int:
    """How many this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def do(jobs: Sequence[Job], store: Store, *, workers: int, quiet: bool = False) -> list[str]:
    """Do the jobs, the longest first, store each result, and return what failed, in words.

    Args:
        jobs: What is to be done.
        store: Takes the results, and holds checkpoints.
        workers: Processes.
        quiet: Show no bar.
    """
    failed: list[str] = []
    if not jobs:
        return failed
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    jobs = sorted(jobs, key=lambda job: -job[1].minutes)
    names = {f"{e.name}: {run.name}": (e, run) for e, run in jobs}
    total = sum(run.minutes for _, run in jobs)
    done: dict[str, float] = dict.fromkeys(names, 0.0)
    words: dict[str, str] = {}
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(told,))
    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=total, disable=quiet, bar_format=form) as bar:
        pending: dict[Future[Result], str] = {}
        for name, (experiment, run) in names.items():
            checkpoint = store.checkpoint(experiment, run)
            future = pool.submit(_work, name, experiment.train, run.options, checkpoint)
            pending[future] = name
        try:
            while pending:
                finished, _ = wait(pending, timeout=_TELL_EVERY, return_when=FIRST_COMPLETED)
                _listen(told, done, words)
                for future in finished:
                    name = pending.pop(future)
                    words.pop(name, None)
                    done[name] = 1.0
                    error = future.exception()
                    if error is None:
                        store.put(*names[name], future.result())
                    else:
                        failed.append(f"{name}: {error}")
                        tqdm.write(f"failed: {failed[-1]}")
                bar.n = sum(names[name][1].minutes * share for name, share in done.items())
                bar.set_postfix_str("  ".join(f"[{n}{w and ', ' + w}]" for n, w in words.items()))
        except KeyboardInterrupt:
            for process in (pool._processes or {}).values():
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return failed


def _listen(told: Any, done: dict[str, float], words: dict[str, str]) -> None:
    while True:
        try:
            name, share, text = told.get_nowait()
        except queue.Empty:
            return
        done[name], words[name] = share, text


def _begin(told: Any) -> None:
    global _told
    _told = told
    torch.set_num_threads(1)
    # Gradients that vanish over a thousand steps become denormal numbers, which are slow.
    torch.set_flush_denormal(True)


def _work(name: str, train: Any, options: Options, checkpoint: Path) -> Result:
    last = 0.0

    def tell(share: float, text: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= _TELL_EVERY:
            last = time.monotonic()
            _told.put((name, share, text))

    _told.put((name, 0.0, ""))
    began = time.perf_counter()
    try:
        result: Result = train(options, Place(checkpoint, tell))
    except Exception as error:  # an exception of a class that cannot be sent would end the pool
        traceback.print_exc()
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    result.setdefault("seconds", time.perf_counter() - began)
    return result
