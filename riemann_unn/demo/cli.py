"""The command line: one grammar for all tasks, and types whose errors say what is wanted."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "PROGRAM",
    "Choice",
    "Number",
    "Parser",
    "add_common_options",
    "add_validation",
    "fail",
    "overview",
    "positive",
    "positive_float",
    "read",
]

PROGRAM = "python -m riemann_unn.demo"
_EXAMPLES = """examples:
  {0}
  {0} copy --rank 4
  {0} conv --seed 1 --checkpoint conv.pt
  {0} conv --help"""


def fail(message: str, task: str = "") -> NoReturn:
    """Print an error of the command line and how to list its options, and exit.

    Args:
        message: What is wrong.
        task: Whose options to point at.
    """
    where = f"{PROGRAM} {task} --help" if task else f"{PROGRAM} --help"
    print(f"error: {message}\n`{where}` lists the options", file=sys.stderr)
    raise SystemExit(2)


@dataclass(frozen=True)
class Number:
    """The type of an option that is a number.

    Args:
        wanted: In words.
        kind: ``int`` or ``float``.
        least: The smallest.
        most: The largest; must be finite.
        above: The smallest is not itself allowed.
        multiple_of: What it is a multiple of.
    """

    wanted: str
    kind: type[int] | type[float]
    least: float
    most: float
    above: bool = False
    multiple_of: int | None = None

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            value = float("nan")
        inside = self.least <= value <= self.most and not (self.above and value == self.least)
        if not inside or (self.multiple_of is not None and value % self.multiple_of):
            raise argparse.ArgumentTypeError(f"wanted {self.wanted}, got {text!r}")
        return value


positive = Number("a whole number of at least 1", int, 1, 2**62)
positive_float = Number("a positive number of at most 1e6", float, 0, 1e6, above=True)
_seed = Number("a whole number from 0 to 4294967295", int, 0, 2**32 - 1)


@dataclass(frozen=True)
class Choice:
    """The type of an option that is one of some words.

    Args:
        words: The words.
    """

    words: tuple[str, ...]

    @property
    def wanted(self) -> str:
        """In words."""
        return f"one of {', '.join(self.words)}"

    def __call__(self, text: str) -> str:
        if text not in self.words:
            raise argparse.ArgumentTypeError(
                f"wanted {self.wanted}, got {text!r}{_nearest(text, self.words)}"
            )
        return text


@dataclass(frozen=True)
class _File:
    """The type of an option that is a file to be written."""

    wanted: str
    suffix: str = ""

    def __call__(self, text: str) -> Path:
        path = Path(text)
        folder = path.absolute().parent
        if self.suffix and path.suffix.lower() != self.suffix:
            raise argparse.ArgumentTypeError(f"wanted {self.wanted}, got {text!r}")
        if not folder.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {folder} to write {path.name} to")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"wanted {self.wanted}, got the folder {text!r}")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise argparse.ArgumentTypeError(f"{path} may not be written")
        return path


class Parser(argparse.ArgumentParser):
    """The options of a task.

    Args:
        task: Its name.
        about: What it is, in a line.
        more: Below the options.
    """

    def __init__(self, task: str, about: str, more: str = "") -> None:
        self.task = task
        self.options: dict[str, argparse.Action] = {}
        super().__init__(
            prog=f"{PROGRAM} {task}",
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=more,
            allow_abbrev=False,
        )
        self.set_defaults(task=task)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an option, as in argparse, and record its names.

        Args:
            names: Its names.
            options: As in argparse.
        """
        if isinstance(options.get("type"), Number):
            options.setdefault("metavar", "N" if options["type"].kind is int else "X")
        action = super().add_argument(*names, **options)
        self.options.update(dict.fromkeys(action.option_strings, action))
        return action

    def error(self, message: str) -> NoReturn:
        """Print the error and exit.

        Args:
            message: From argparse.
        """
        fail(message.removeprefix("argument "), self.task)


def add_common_options(parser: Parser, *, epochs: int) -> None:
    """Add the options that every task has.

    Args:
        parser: Takes them.
        epochs: How many by default.
    """
    add, picture = parser.add_argument, f"riemann_unn_demo_{parser.task}.png"
    add("--epochs", type=positive, default=epochs, help=f"number of epochs (default: {epochs})")
    add("--seed", type=_seed, default=0, help="seed of weights and batches (default: 0)")
    add(
        "--out",
        type=_File("a .png file", ".png"),
        default=picture,
        metavar="FILE",
        help=f"the picture (default: {picture} here)",
    )
    add(
        "--checkpoint",
        type=_File("a file"),
        metavar="FILE",
        help="save what is done to this file as it is done, and go on from it",
    )
    add("--quiet", action="store_true", help="do not show how far it is")


def add_validation(parser: Parser) -> None:
    """Add ``--validation``.

    Args:
        parser: Takes it.
    """
    parser.add_argument(
        "--validation",
        action="store_true",
        help="hold out training images, not the test images, as for choosing defaults",
    )


def overview(tasks: Mapping[str, str]) -> str:
    """The list of tasks that ``--help`` shows.

    Args:
        tasks: Names and descriptions of the tasks; the default first.
    """
    default = next(iter(tasks))
    return "\n".join(
        [
            f"usage: {PROGRAM} [TASK] [options]",
            "",
            "Each task trains, prints a table and draws a picture.",
            "",
            f"tasks (default: {default}):",
            *_listed(tasks),
            "",
            f"`{PROGRAM} TASK --help` lists the options of a task. All of them have",
            "--epochs, --seed, --out FILE.png, --checkpoint FILE and --quiet. Options may come",
            "before the task or after it.",
            "",
            _EXAMPLES.format(PROGRAM),
        ]
    )


def _listed(tasks: Mapping[str, str]) -> list[str]:
    width = max(map(len, tasks))
    return [f"  {name.ljust(width)}  {about}" for name, about in tasks.items()]


def read(
    argv: Sequence[str], parsers: Mapping[str, Parser], tasks: Mapping[str, str]
) -> argparse.Namespace:
    """Read a command line, with the task before, between or behind the options.

    Args:
        argv: The arguments.
        parsers: Of every task.
        tasks: Their descriptions; the default first.

    Raises:
        SystemExit: With status 2 if something is wrong with it, or 0 after ``--help``.
    """
    known = {name: option for p in parsers.values() for name, option in p.options.items()}
    words, given = _split(argv, known)
    for word in words:
        if word not in parsers:
            fail(
                f"there is no task {word!r}{_nearest(word, parsers)}. The tasks are\n"
                + "\n".join(_listed(tasks))
            )
    if len(words) > 1:
        fail(f"one task at a time, got {' and '.join(words)}")
    asked_for_help = any(name in ("-h", "--help") for name, _ in given)
    if asked_for_help and not words:
        print(overview(tasks))
        raise SystemExit(0)
    parser = parsers[words[0] if words else next(iter(tasks))]
    for name, _ in given:
        if name not in parser.options:
            owners = [task for task, other in parsers.items() if name in other.options]
            fail(f"{name} is no option of {parser.task}, but of {_and(owners)}", parser.task)
    options = parser.parse_args([name if v is None else f"{name}={v}" for name, v in given])
    if options.checkpoint is not None and options.checkpoint.absolute() == options.out.absolute():
        fail("--checkpoint and --out are the same file", parser.task)
    return options


def _split(
    argv: Sequence[str], known: Mapping[str, argparse.Action]
) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Split into positional words, and options with their values, ``None`` for those without."""
    words: list[str] = []
    given: list[tuple[str, str | None]] = []
    rest = list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("-") or _is_number(name):
            words.append(name + equals + value)
            continue
        if name not in known:
            fail(f"there is no option {name}{_nearest(name, known)}")
        if known[name].nargs == 0:
            if equals:
                fail(f"{name} takes no value, got {value!r}")
            given.append((name, None))
            continue
        if not equals:
            if not rest or rest[0].partition("=")[0] in known:
                fail(f"{name} needs a value: {_wanted(known[name])}")
            value = rest.pop(0)
        given.append((name, value))
    return words, given


def _wanted(option: argparse.Action) -> str:
    wanted: str = getattr(option.type, "wanted", None) or option.help or str(option.metavar)
    return wanted


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _nearest(word: str, words: Iterable[str]) -> str:
    found = get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def _and(words: Collection[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
