"""Progress bars, if tqdm is installed."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["progress_bar"]


class _Silent:
    """A replacement for tqdm where it is not installed or not shown."""

    def update(self) -> None: ...

    def set_postfix_str(self, s: str, refresh: bool = True) -> None: ...

    def close(self) -> None: ...


def progress_bar(total: int, what: str, unit: str, *, show: bool, delay: float = 0.0) -> Any:
    """Return a bar on the standard error stream, to be closed; one that does nothing if not shown.

    Args:
        total: the number of steps.
        what: the label.
        unit: the name of a step.
        show: whether to show it.
        delay: seconds after which it appears.
    """
    if not show:
        return _Silent()
    try:
        from tqdm import tqdm
    except ImportError:
        return _Silent()
    return tqdm(total=total, desc=what, unit=unit, leave=True, file=sys.stderr, delay=delay)
