"""What the demo's experiments share on the command line: types of options, and a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = [
    "add_output_options",
    "add_run_options",
    "aligned",
    "one_thread",
    "positive",
    "positive_float",
]


def positive(text: str) -> int:
    """An integer of at least 1.

    Args:
        text: As it was typed.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0.

    Args:
        text: As it was typed.
    """
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _picture(text: str) -> Path:
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute().parent}")
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{path} is not a .png file")
    return path


def add_output_options(parser: argparse.ArgumentParser, *, name: str, epochs: int) -> None:
    """Add the options that every experiment has.

    Args:
        parser: Takes them.
        name: Of the experiment, for the name of its picture.
        epochs: How many by default.
    """
    picture = Path(f"riemann_unn_demo_{name}.png")
    add = parser.add_argument
    add("--epochs", type=positive, default=epochs, help=f"number of epochs (default: {epochs})")
    add("--out", type=_picture, default=picture, help=f"the picture (default: {picture} here)")
    add("--quiet", action="store_true", help="no progress bar")


def add_run_options(parser: argparse.ArgumentParser, *, name: str, epochs: int) -> None:
    """Add the options of experiments that train once, on images.

    Args:
        parser: Takes them.
        name: Of the experiment, for the name of its picture.
        epochs: How many by default.
    """
    add_output_options(parser, name=name, epochs=epochs)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    add(
        "--validation",
        action="store_true",
        help="hold out training images, not the test images, as for choosing defaults",
    )


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
    """Round numbers below the smallest normal one to zero, where the processor can.

    The gradients of an LSTM vanish over hundreds of steps into such numbers, on which a processor
    computes many times more slowly: 2.5 s in the place of 0.4 s for 784 steps. There is no way to
    ask for the setting before; afterwards it is torch's default.
    """
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
