"""README's numbers of the demos, and its picture: ``python -m bench.readme`` makes them anew.

Every cell of README's table that a demo prints stands between marks that name it. This runs the
demos and puts what they give between the marks; ``--check`` says what differs and writes nothing.
The picture at the top is drawn from the run that fills the row of the digits.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from matplotlib.image import imread

from riemann_unn.demo import conv, convrnn, lipschitz, lowrank, memory, memory_plots, warmstart
from riemann_unn.demo.__main__ import experiment_of, parse

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "images" / "digits.png"
_SEEDS = (0, 1, 2)
_VISIBLE = 0.02  # of the range of a colour; a fraction of the pixels may differ by more
_FEW = 1e-3


@cache
def result(*arguments: str) -> Any:
    """What a demo returns; each is run once.

    Args:
        arguments: Of its command line.
    """
    options = parse([*arguments, "--quiet"])
    with redirect_stdout(sys.stderr):  # it says what it runs on
        return experiment_of(options.task).run(options)


def digits() -> str:
    run: memory.Results = result("digits")
    parts = [
        f"{name} {_percent(learner.history.test_accuracy[9])}, "
        f"{_percent(learner.history.test_accuracy[-1])}"
        for name, learner in (
            ("orthogonal RNN", run.orthogonal),
            ("LSTM of more parameters", run.lstm),
        )
    ]
    return "; ".join(parts)


def digits_seeds() -> str:
    runs: list[memory.Results] = [
        result("digits"),
        *(result("digits", "--seed", str(seed), "--epochs", "10") for seed in range(1, 8)),
    ]
    parts = []
    for i, name in enumerate(("orthogonal RNN", "LSTM")):
        found = [run.learners[i].history.test_accuracy[9] for run in runs]
        parts.append(f"{name} {100 * min(found):.1f} to {_percent(max(found))}")
    return ", ".join(parts)


def copy() -> str:
    run: memory.Results = result("copy")
    ours, theirs = (memory.below_baseline(run.task, learner) for learner in run.learners)
    last = len(run.orthogonal.history.train_loss)
    return (
        f"below {run.task.baseline:.4f}, the best without memory, {_from(ours)}; "
        f"{run.orthogonal.history.test_loss[-1]:.4f} at iteration {last}; LSTM {_from(theirs)}"
    )


def error() -> str:
    runs: tuple[memory.Results, ...] = (result("digits"), result("copy"))
    return f"{_short(max(max(run.orthogonal.history.orthogonality) for run in runs))} (float32)"


def resnet() -> str:
    runs: list[conv.Results] = [result("conv", "--seed", str(seed)) for seed in _SEEDS]
    ours, theirs = (_percents([_last(run.learners[i]) for run in runs]) for i in (0, 1))
    off = max(
        (state.values - 1).abs().max().item()
        for run in runs
        for state in [*run.before[0], *run.after[0]]
    )
    return (
        f"orthogonal convolutions {ours}, singular values within {off:.0e} of 1; "
        f"ordinary ones {theirs}"
    ).replace("e-0", "e-")


def lattice() -> str:
    runs: list[convrnn.Results] = [result("convrnn", "--seed", str(seed)) for seed in _SEEDS]
    told = [[trace.accuracy[max(trace.accuracy)] for trace in run.traces] for run in runs]
    ours, same, default = zip(*told, strict=True)
    return (
        f"orthogonal kernel {_percents(ours)}; without its constraint {_percents(same)}; "
        f"default kernel {', '.join(f'{100 * value:.0f}' for value in default)} %"
    )


def certified() -> str:
    runs: list[lipschitz.Results] = [result("lipschitz", "--seed", str(seed)) for seed in _SEEDS]
    ours, theirs = ([run.held[i].certified(0.25) for run in runs] for i in (0, 1))
    return (
        f"{_percents(ours)} of test images at accuracy "
        f"{_percents([_last(run.learners[0]) for run in runs])}; "
        f"{_percents(theirs) if any(theirs) else 'none'} of an ordinary net"
    )


def starts() -> str:
    run: warmstart.Results = result("warmstart", "--seeds", "5")
    deep = [trial for trial in run.trials if trial.net is warmstart.NETS[0]]
    found = {name: [trial.starts[i] for trial in deep] for i, name in enumerate(warmstart.STARTS)}
    epochs = {name: f"{median(x.epochs_to_target for x in own):g}" for name, own in found.items()}
    before = median(start.accuracy[0] for start in found["procrustes"])
    return (
        f"from random weights {epochs['random']}, from the nearest to trained ones "
        f"{epochs['polar']}, matched on data {epochs['procrustes']} ({_percent(before)} before "
        "any training)"
    )


def conditioned() -> str:
    epochs = {
        (*name, i): f"{median(run.epochs for run in group):.1f}"
        for name, *groups in result("rescale").cases
        for i, group in enumerate(groups)
    }

    def both(start: str, i: int) -> str:
        return " and ".join(epochs[model, start, "Adam", i] for model in ("MLP", "CNN"))

    return (
        f"{both('badly scaled', 0)}; path-conditioned {both('badly scaled', 1)} (from PyTorch's "
        f"own initialisation {both('default', 0)}; conditioned {both('default', 1)})"
    )


def compressed() -> str:
    run: lowrank.Results = result("lowrank", "--seeds", "5")
    ours, theirs = (median(run.accuracy[name, 4]) for name in ("function, calibrated", "spectral"))
    return f"{_percent(ours)} calibrated; truncated SVD {_percent(theirs)}"


CELLS: Mapping[str, Callable[[], str]] = {
    "digits": digits,
    "digits-seeds": digits_seeds,
    "copy": copy,
    "error": error,
    "conv": resnet,
    "convrnn": lattice,
    "lipschitz": certified,
    "warmstart": starts,
    "rescale": conditioned,
    "lowrank": compressed,
}
"""What stands between the marks of each name."""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _percents(shares: Sequence[float]) -> str:
    return f"{', '.join(f'{100 * share:.1f}' for share in shares)} %"


def _last(learner: Any) -> float:
    accuracy: float = learner.history.test_accuracy[-1]
    return accuracy


def _from(iteration: int | None) -> str:
    return "never below" if iteration is None else f"from iteration {iteration}"


def _short(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


@dataclass(frozen=True)
class Page:
    """A page with cells between marks.

    Args:
        text: The page.
    """

    text: str

    def _find(self, name: str) -> re.Match[str]:
        mark = re.escape(name)
        found = re.search(rf"(?<=<!-- {mark} -->).*?(?=<!-- /{mark} -->)", self.text)
        if found is None:
            raise SystemExit(f"error: README.md has no <!-- {name} --> with its <!-- /{name} -->")
        return found

    def cell(self, name: str) -> str:
        return self._find(name)[0]

    def with_cell(self, name: str, words: str) -> Page:
        found = self._find(name)
        return Page(self.text[: found.start()] + words + self.text[found.end() :])


def differing(one: Path, other: Path) -> float:
    """Share of pixels in which two pictures differ visibly; all if they differ in size."""
    a, b = imread(one)[..., :3], imread(other)[..., :3]
    if a.shape != b.shape:
        return 1.0
    return float((numpy.abs(a - b).max(-1) > _VISIBLE).mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite README's cells and the picture, or say what differs.

    Args:
        arguments: Of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), metavar="NAME")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if any differs"
    )
    args = parser.parse_args(arguments)
    changed = 0
    for name in args.only:
        print(f"--- {name}", file=sys.stderr)
        words = CELLS[name]()
        page = Page(README.read_text(encoding="utf-8"))  # it may have been edited meanwhile
        if page.cell(name) != words:
            changed += 1
            print(f"{name}:\n  README {page.cell(name)}\n  now    {words}", flush=True)
            if not args.check:
                README.write_text(page.with_cell(name, words).text, encoding="utf-8")
        if name == "digits":
            with TemporaryDirectory() as folder:
                drawn = Path(folder) / PICTURE.name
                memory_plots.draw(drawn, result("digits"))
                share = differing(drawn, PICTURE) if PICTURE.exists() else 1.0
                if share > _FEW:
                    changed += 1
                    print(f"{PICTURE.relative_to(ROOT)}: {share:.1%} of its pixels differ")
                    if not args.check:
                        PICTURE.write_bytes(drawn.read_bytes())
    print(f"{changed} of README's parts {'differ' if args.check else 'rewritten'}")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
