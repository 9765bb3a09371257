"""What a task of the demo is, and what all of them share."""

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
    """Options that do not go together; said before anything has run."""


class Experiment(Protocol):
    """A module of the demo: it trains and measures, and draws nothing.

    ``run`` returns a dataclass of its own, which ``table`` puts into words and the module's
    :class:`Picture` draws.
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
            results: What ``run`` returned.
        """


class Picture(Protocol):
    """The module of the same name with ``_plots`` behind it."""

    def draw(self, path: Path, results: Any) -> None:
        """Write the picture.

        Args:
            path: PNG file.
            results: What ``run`` returned.
        """


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: tensors this small gain nothing from a second one.

    Waiting for one on a busy machine costs a hundredfold.
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
    # The gradients of an LSTM vanish over hundreds of steps into numbers below the smallest normal
    # one, on which a processor computes many times more slowly: 2.5 s in the place of 0.4 s for 784
    # steps. There is no way to ask for the setting before; afterwards it is torch's default.
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
