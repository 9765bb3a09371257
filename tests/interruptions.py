"""One KeyboardInterrupt in a call, at any line of some files, as Ctrl-C at that line raises it."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import riemann_unn

PACKAGE = str(Path(riemann_unn.__file__).parent)


class Interruption(KeyboardInterrupt):
    """Ours, so that no other is taken for it."""


def _traced(call: Callable[[], object], at: int, where: str) -> int:
    """Run a call, raise at a line event in files under ``where``; return how many came."""
    count = 0

    def on_line(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            if count - 1 == at:
                raise Interruption
        return on_line

    def on_call(frame, event, _):
        name = frame.f_code.co_filename
        # What a compiler does when something it knew is freed comes at any time, and once.
        return on_line if name.startswith(where) and "_dynamo" not in name else None

    before = sys.gettrace()
    gc.disable()
    sys.settrace(on_call)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def _thread_state() -> dict[str, bool]:
    """What contexts of torch set for all that runs after them in a thread."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "torch function": torch._C._is_torch_function_enabled(),
    }


def lines(call: Callable[[], object], *, where: str = PACKAGE) -> int:
    """Run a call evaluating; return how many lines of some files it passes."""
    return _traced(call, -1, where)


def interrupt(call: Callable[[], object], at: int, *, where: str = PACKAGE) -> bool:
    """Run a call and interrupt it at one line; return whether it came that far."""
    before = _thread_state()
    try:
        _traced(call, at, where)
    except Interruption:
        return True
    finally:
        after = _thread_state()
        torch._C._set_grad_enabled(before["grad"])  # no test after this one is to suffer
        assert after == before, f"line {at} leaves {after} of {before}"
    return False


def sample(total: int, count: int, seed: int = 0) -> list[int]:
    """Some lines of a call, without repetition; all if there are no more."""
    return sorted(random.Random(seed).sample(range(total), min(count, total)))
