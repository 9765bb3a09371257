"""The interface of a task of the demo, and what all tasks share."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from ..init.table import Table
from .cli import Parser

__all__ = ["Experiment", "Picture", "UsageError", "aligned", "one_thread"]


class UsageError(ValueError):
    """Options that do not fit together; raised before anything has run."""


class Experiment(Protocol):
    """A module of the demo, which trains and measures but does not draw.

    ``run`` returns a dataclass, which ``table`` formats and the module's :class:`Picture` draws.
    """

    def add_arguments(self, parser: Parser, task: str) -> None:
        """Add the options of a task.

        Args:
            parser: Takes them.
            task: Which, where the module has several.
        """

    def run(self, options: Namespace) -> Any:
        """Train and measure.

        Args:
            options: As parsed; ``task`` and those of ``add_arguments``.
        """

    def table(self, results: Any) -> str:
        """The numbers as plain text.

        Args:
            results: From ``run``.
        """


class Picture(Protocol):
    """The module of the same name with the suffix ``_plots``."""

    def draw(self, path: Path, results: Any) -> None:
        """Write the picture.

        Args:
            path: PNG file.
            results: From ``run``.
        """


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: small tensors do not profit from more.

    On a busy machine waiting for another thread can take a hundred times longer.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _no_denormals():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_denormals() -> Iterator[None]:
    # The gradients of an LSTM vanish over hundreds of steps into denormal numbers, which are many
    # times slower: 2.5 s instead of 0.4 s for 784 steps. The previous setting cannot be queried;
    # torch's default is restored.
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table, the first row its head, the first column to the left.

    Args:
        rows: All of the same length.
    """
    return str(Table(rows, right=range(1, len(rows[0]))))
