"""Tables of the documentation that show what a demo or a small command gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench import bench_low_rank
from riemann_unn.demo import lowrank, rescale, warmstart

from .demos import percent, result

__all__ = ["TABLES", "Part"]


@dataclass(frozen=True)
class Part:
    """A part of a page.

    Attributes:
        page: Its file in ``docs/``.
        words: What makes it.
    """

    page: str
    words: Callable[[], str]


def warm_starts() -> str:
    run: warmstart.Results = result("warmstart", "--seeds", "5")
    nets = {
        "deep net (six 64×64 layers)": warmstart.NETS[0],
        "residual net (flattened kernels)": warmstart.NETS[1],
    }
    rows = []
    for title, net in nets.items():
        same = [trial for trial in run.trials if trial.net.title == net.title]
        for i, name in enumerate(warmstart.STARTS):
            starts = [trial.starts[i] for trial in same]
            rows.append(
                [
                    f"{title}, random" if name == "random" else f'`"{name}"`',
                    _epochs(start.epochs_to_target for start in starts),
                    percent(median(start.accuracy[0] for start in starts)),
                    f"{median(start.function_error for start in starts):.2f}",
                ]
            )
    head = ["", "epochs to 93 %", "accuracy before training", "function error, held out"]
    return _table(head, rows)


def conditioned() -> str:
    run: rescale.Results = result("rescale")
    rows = []
    for (model, start, optimizer), *groups in run.cases:
        starts = {"default": "PyTorch's initialisation"}
        rows.append([f"{model}, {starts.get(start, start)}, {optimizer}"])
        for group in groups:
            last = median(run.accuracy[-1] for run in group)
            epochs = (len(group[0].accuracy) - 1) / run.per_epoch
            never = f"never ({100 * last:.0f} % after {epochs:g} epochs)"
            rows[-1].append(_epochs((run.epochs for run in group), never, digits=1))
    return _table(["", "as initialised", "path-conditioned"], rows)


def conditioning_change() -> str:
    run: rescale.Results = result("rescale")
    return f"{max(one.change for one in run.runs):.1e}".replace("e-0", "e-")


_METHODS = {
    "spectral": "truncated SVD",
    "function, Gaussian": '`"function"`, Gaussian',
    "linear, calibrated": '`"linear"`, calibrated',
    "function, calibrated": '`"function"`, calibrated',
}


def compressed() -> str:
    run: lowrank.Results = result("lowrank", "--seeds", "5")
    rows = []
    for rank in lowrank.RANKS:
        row = [str(rank)]
        for name in _METHODS:
            accuracy, error = (median(x[name, rank]) for x in (run.accuracy, run.error))
            row.append(f"{percent(accuracy)} ({error:.4f})")
        pairs = (run.error[name, rank] for name in ("function, calibrated", "spectral"))
        row.append(f"{max(ours / theirs for ours, theirs in zip(*pairs, strict=True)):.2f}")
        rows.append(row)
    return _table(["rank", *_METHODS.values(), "its error over the SVD's, worst seed"], rows)


def dense() -> str:
    run: lowrank.Results = result("lowrank", "--seeds", "5")
    return percent(median(run.dense))


def from_scratch() -> str:
    run: lowrank.Results = result("lowrank", "--seeds", "5")
    starts = {"random": "random factors", "spectral": "truncated SVD", "function": '`"function"`'}
    rows = []
    for start in lowrank.STARTS:
        row = [starts[start]]
        for factors in ("plain", "orthonormal"):
            epochs = list(zip(*run.trained[factors, start], strict=True))
            shown = ", ".join(percent(median(epochs[i])) for i in (0, 2, -1))
            low, high = (100 * pick(epochs[-1]) for pick in (min, max))
            row.append(f"{shown} ({low:.1f} to {high:.1f})")
        rows.append(row)
    return _table(["start", "plain factors, Adam", "orthonormal factors, ProjUNN-T on Adam"], rows)


def gaussian() -> str:
    rows = []
    for (m, n, rank), errors, gains in bench_low_rank.gaussian():
        shares = ", ".join(percent(gain) for gain in gains)
        rows.append([f"{m}×{n}, {rank}", *(f"{error:.4f}" for error in errors), shares])
    head = ["shape, rank", "truncated SVD", "closed-form lengths", "default"]
    return _table([*head, "L-BFGS, converged", "share: lengths, default"], rows)


TABLES: Mapping[str, Part] = {
    "warmstart-table": Part("warm_start.md", warm_starts),
    "rescale-table": Part("rescaling.md", conditioned),
    "rescale-change": Part("rescaling.md", conditioning_change),
    "lowrank-table": Part("low_rank.md", compressed),
    "lowrank-dense": Part("low_rank.md", dense),
    "lowrank-training": Part("low_rank.md", from_scratch),
    "lowrank-gaussian": Part("low_rank.md", gaussian),
}
"""What stands between the marks of each name, and on which page."""


def _epochs(found: Iterable[float], never: str = "never", digits: int = 0) -> str:
    middle = median(found)
    if math.isinf(middle):
        return never
    return f"{middle:.{digits}f}" if digits else f"{middle:g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
