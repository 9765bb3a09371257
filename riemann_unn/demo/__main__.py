"""The demos: ``python -m riemann_unn.demo TASK``.

A task is a module with ``add_arguments``, ``run`` and ``table`` and one with ``draw``
(:mod:`riemann_unn.demo.experiment`); this one reads the command line and calls them in turn.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import cast

from ..errors import NonFiniteError
from .checkpoint import CheckpointError
from .cli import PROGRAM, Parser, fail, read
from .data import DataError
from .experiment import Experiment, Picture, UsageError

TASKS = {
    "digits": "an orthogonal RNN and an LSTM read handwritten digits pixel by pixel",
    "copy": "both recall ten symbols after 200 steps",
    "adding": "both add up two marked numbers out of a hundred",
    "sequences": "both learn to label sequences of your own, from a CSV file",
    "conv": "a ResNet-9 of orthogonal convolutions beside one of ordinary ones",
    "convrnn": "a pattern kept for 500 steps on a lattice",
    "lipschitz": "certified robustness of an all-orthogonal network",
    "warmstart": "orthogonal nets from trained weights beside ones from random weights",
    "rescale": "ReLU networks trained with and without path conditioning",
    "lowrank": "low rank that keeps the function of a layer",
}
"""What each task is, the default first."""

_MODULES = dict.fromkeys(("digits", "copy", "adding", "sequences"), "memory")
_NEEDED = {"sklearn": "scikit-learn", "tqdm": "tqdm", "matplotlib": "matplotlib"}


def experiment_of(task: str) -> Experiment:
    """The module of a task.

    Args:
        task: One of :data:`TASKS`.
    """
    return cast(Experiment, import_module(f"{__package__}.{_MODULES.get(task, task)}"))


def parse(argv: Sequence[str]) -> Namespace:
    """Read a command line of any task.

    Args:
        argv: The arguments.

    Raises:
        SystemExit: With status 2 if something is wrong with it, or 0 after ``--help``.
    """
    parsers = {}
    for task, about in TASKS.items():
        parsers[task] = Parser(task, about)
        experiment_of(task).add_arguments(parsers[task], task)
    return read(argv, parsers, TASKS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a task and return the exit status.

    Args:
        argv: Command line arguments; those of the process if left out.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    missing = [name for module, name in _NEEDED.items() if find_spec(module) is None]
    if missing:
        fail(f"the demo needs {', '.join(missing)}: pip install riemann-unn[demo]", options.task)
    experiment = experiment_of(options.task)
    try:
        results = experiment.run(options)
        print(f"\n{experiment.table(results)}\n", flush=True)
        # Imported late, for matplotlib takes a second.
        picture = import_module(f"{__package__}.{_MODULES.get(options.task, options.task)}_plots")
        cast(Picture, picture).draw(options.out, results)
    except (UsageError, DataError) as error:
        fail(str(error), options.task)
    except KeyboardInterrupt:
        print(f"\n{_interrupted(options, argv)}", file=sys.stderr)
        return 130
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except NonFiniteError as error:
        print(f"error: training broke off: {error}\na lower --lr may help", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"picture: {options.out}")
    return 0


def _interrupted(options: Namespace, argv: Sequence[str]) -> str:
    if options.checkpoint is None:
        return (
            "interrupted, and nothing is kept: with --checkpoint FILE the same command would go on "
            "where it stopped"
        )
    if not options.checkpoint.exists():
        return f"interrupted before there was anything to keep in {options.checkpoint}"
    return f"interrupted; this goes on from there:\n  {PROGRAM} {shlex.join(argv)}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the task began
        sys.exit(130)
