"""The progress of a run: a bar on a terminal, lines in a file."""

from __future__ import annotations

import sys
from importlib import import_module
from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A bar where standard error is a terminal; else a line for each part that is done.

    Args:
        total: The number of units.
        unit: Their name.
        done: The number of those done already.
        quiet: Show nothing.
    """

    def __init__(self, total: int, *, unit: str, done: int = 0, quiet: bool = False) -> None:
        self._label, self._lines = "", not quiet and not sys.stderr.isatty()
        self._bar: Any = None
        if not quiet and not self._lines:
            self._bar = import_module("tqdm").tqdm(total=total, initial=done, unit=unit)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, part: str) -> None:
        """Begin a part.

        Args:
            part: Its name.
        """
        self._label = part
        if self._bar is not None:
            self._bar.set_description(part)

    def advance(self, text: str = "", *, units: int = 1) -> None:
        """Advance by some units.

        Args:
            text: Shown beside the bar.
            units: How many.
        """
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(units)

    def end(self, text: str) -> None:
        """End the part.

        Args:
            text: The result.
        """
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._lines:
            print(f"{self._label}: {text}", file=sys.stderr, flush=True)
