"""The demos: ``python -m riemann_unn.demo TASK``.

The tasks digits, copy, adding and sequences train an orthogonal RNN beside an LSTM and are run
here; each of the others is a module of its name with ``add_arguments`` and ``run``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from riemann_unn import Monitor

from .cli import aligned, one_thread, positive, positive_float
from .data import HELP
from .models import Learner, lstm_learner, orthogonal_learner
from .sequences import Sequences
from .tasks import ORDERS, TASKS, Adding, Copy, Digits, Pictures, Task
from .training import CheckpointError, Settings, train

EXPERIMENTS = {
    "conv": "a ResNet-9 of orthogonal convolutions beside one of ordinary ones",
    "convrnn": "a pattern kept for 500 steps on a lattice",
    "lipschitz": "certified robustness of an all-orthogonal network",
    "warmstart": "orthogonal nets from trained weights beside ones from random weights",
    "rescale": "ReLU networks trained with and without path conditioning",
    "lowrank": "low rank that keeps the function of a layer",
}
_NEEDED = {"sklearn": "scikit-learn", "tqdm": "tqdm", "matplotlib": "matplotlib"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status.

    Args:
        argv: Command line arguments; those of the process if left out.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in EXPERIMENTS:
        return _experiment(argv[0], argv[1:])
    parser = _parser()
    options = parser.parse_args(argv)
    _check_installed(parser)
    for folder in (options.out, options.checkpoint):
        if folder is not None and not folder.absolute().parent.is_dir():
            parser.error(f"there is no folder {folder.absolute().parent} to write {folder.name} to")
    if options.out is not None and options.out.suffix.lower() != ".png":
        parser.error(f"--out {options.out} is not a .png file")
    try:
        task = _task(options)
        print(f"{task.title[0].upper()}{task.title[1:]}")  # reads the data, and may find it damaged
    except ValueError as error:
        parser.error(str(error))
    hidden = task.hidden if options.hidden is None else options.hidden
    lr = task.lr if options.lr is None else options.lr
    if options.rank > hidden:
        parser.error(f"--rank {options.rank} is more than --hidden {hidden}, the full rank")
    orthogonal = orthogonal_learner(
        task, hidden=hidden, rank=options.rank, lr=lr, complex=options.complex, seed=options.seed
    )
    lstm = lstm_learner(task, parameters=orthogonal.parameters, seed=options.seed)
    settings: Settings = {
        "task": repr(task),
        "hidden": hidden,
        "rank": options.rank,
        "lr": lr,
        "complex": options.complex,
        "seed": options.seed,
    }
    monitor = Monitor(orthogonal.optimizer, every=task.batches_per_epoch)
    try:
        with one_thread():
            train(
                task,
                (orthogonal, lstm),
                epochs=options.epochs,
                seed=options.seed,
                checkpoint=options.checkpoint,
                settings=settings,
                quiet=options.quiet,
            )
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    from .plots import save_figure  # matplotlib takes a second to import

    out = options.out or Path(f"riemann_unn_demo_{task.name}.png")
    recurrence = orthogonal.model.get_parameter("rnn.weight_hh_l0")
    save_figure(out, task, (orthogonal, lstm), recurrence)
    print(f"\n{table(task, (orthogonal, lstm))}\n{watched(monitor)}\npicture: {out}")
    return 0


def _experiment(name: str, argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m riemann_unn.demo {name}", description=f"{EXPERIMENTS[name]}."
    )
    module = import_module(f"{__package__}.{name}")
    module.add_arguments(parser)
    options = parser.parse_args(argv)
    _check_installed(parser)
    module.run(options)
    return 0


def _check_installed(parser: argparse.ArgumentParser) -> None:
    missing = [name for module, name in _NEEDED.items() if find_spec(module) is None]
    if missing:
        parser.error(f"the demo needs {', '.join(missing)}: pip install riemann-unn[demo]")


def table(task: Task, learners: Sequence[Learner]) -> str:
    """The final numbers as aligned plain text, and what a model without memory reaches.

    Args:
        task: The task.
        learners: The trained learners.
    """
    epochs = len(learners[0].history.test_accuracy)
    marks = [10, epochs] if epochs > 10 else [epochs]
    rows = [
        ["", "parameters"]
        + [f"{task.score}, epoch {mark}" for mark in marks]
        + ["loss", "seconds", "orthogonality error"]
    ]
    for learner in learners:
        history = learner.history
        error = f"{max(history.orthogonality):.1e}" if history.orthogonality else "-"
        rows.append(
            [learner.name, f"{learner.parameters:,}"]
            + [f"{history.test_accuracy[mark - 1]:.1%}" for mark in marks]
            + [f"{history.test_loss[-1]:.4f}", f"{sum(history.seconds):.1f}", error]
        )
    return f"{aligned(rows)}\n\n{_below_baseline(task, learners)}"


def watched(monitor: Monitor) -> str:
    """What the steps of the recurrence followed, in a line, from a monitor's history.

    Args:
        monitor: Of the orthogonal RNN's optimizer.
    """
    lines = []
    for entries in monitor.history.values():
        shares = [entry["captured"] for entry in entries if "captured" in entry]
        followed = f", of which a step followed {sum(shares) / len(shares):.0%}" if shares else ""
        lines.append(
            f"recurrence: Riemannian gradient {entries[0]['gradient']:.1e} at first, "
            f"{entries[-1]['gradient']:.1e} in the last epoch{followed}; largest angle of a step "
            f"{max(entry['angle'] for entry in entries):.1e}\n"
        )
    return "".join(lines)


def _below_baseline(task: Task, learners: Sequence[Learner]) -> str:
    parts = []
    for learner in learners:
        losses = learner.history.test_loss
        above = [epoch for epoch, loss in enumerate(losses, 1) if loss >= task.baseline]
        first = (above[-1] if above else 0) + 1
        reached = (
            f"from iteration {first * task.batches_per_epoch}"
            if first <= len(losses)
            else "not yet"
        )
        parts.append(f"{learner.name} {reached}")
    return f"held-out loss below {task.baseline:.4f}, the best without memory: {', '.join(parts)}"


def _task(options: argparse.Namespace) -> Task:
    """The task the options describe; options that do not concern it are an error."""
    if options.task != Digits.name and (options.order or options.validation):
        raise ValueError("--order, --permuted and --validation concern digits only")
    if options.task not in (Copy.name, Adding.name) and options.length is not None:
        raise ValueError("--length concerns copy and adding: other sequences have their own")
    if options.task == Sequences.name:
        if options.data is None:
            raise ValueError("sequences needs --data FILE.csv")
        return Sequences(Path(options.data))
    if options.task == Digits.name:
        order = options.order or "pixels"
        more = {"order": order, "validation": options.validation, "seed": options.seed}
        return Digits(**more) if options.data is None else Pictures(options.data, **more)
    if options.data is not None:
        raise ValueError(f"--data concerns digits and sequences: {options.task} makes its own data")
    if options.task == Copy.name:
        return Copy() if options.length is None else Copy(delay=options.length)
    if options.length == 1:
        raise ValueError("--length of adding must be at least 2: a number is marked in either half")
    return Adding() if options.length is None else Adding(length=options.length)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m riemann_unn.demo",
        description="Train an RNN with an orthogonal recurrence by ProjUNN-T beside an LSTM of at "
        "least as many parameters, on the same batches; print a table and draw a picture.",
        epilog="Other demos, with options of their own (name them first, then --help): "
        + "; ".join(f"{name}, {what}" for name, what in EXPERIMENTS.items()),
    )
    add = parser.add_argument
    add(
        "task",
        nargs="?",
        choices=[*(task.name for task in TASKS), Sequences.name],
        default=TASKS[0].name,
        help="digits read pixel by pixel, copying memory, the adding problem, or sequences of your "
        "own from a CSV file (default: digits)",
    )
    add("--rank", type=positive, default=1, help="rank of the recurrence's updates (default: 1)")
    add("--hidden", type=positive, help="size of the state (default: by task)")
    add("--epochs", type=positive, default=20, help="number of epochs (default: 20)")
    add("--lr", type=positive_float, help="learning rate of the orthogonal RNN (default: by task)")
    add("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    add("--complex", action="store_true", help="complex states and a unitary recurrence")
    add("--data", metavar="SOURCE", help=f"digits: {HELP}; sequences: a CSV file")
    add(
        "--order",
        choices=list(ORDERS),
        help="digits: " + ", ".join(f"{word} ({what})" for word, what in ORDERS.items()),
    )
    add("--permuted", action="store_const", const="permuted", dest="order", help="--order permuted")
    add(
        "--validation",
        action="store_true",
        help="digits: hold out training images, not the test images, as for choosing defaults",
    )
    add(
        "--length",
        type=positive,
        help="copy: the delay; adding: the sequence length (default: by task)",
    )
    add("--out", type=Path, help="the picture (default: riemann_unn_demo_TASK.png here)")
    add("--checkpoint", type=Path, help="save every epoch to this file, and resume from it")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
