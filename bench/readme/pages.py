"""What README says of measurements that have a page: read from that page's own tables.

The page is written by the command that README names beside the cell; so README says what the
command gave when it was last run, and nobody types a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from bench.suite.stored import Table, number, tables

__all__ = ["DOCS", "PAGES"]

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def _table(page: str, heading: str, place: int = 0) -> Table:
    found = [table for table in tables(_text(page)) if table.heading == heading]
    if len(found) <= place:
        raise SystemExit(f"error: docs/{page} has no table {place + 1} under {heading!r}")
    return found[place]


def _found(page: str, pattern: str) -> re.Match[str]:
    found = re.search(pattern, _text(page), re.MULTILINE)
    if found is None:
        raise SystemExit(f"error: docs/{page} does not say {pattern!r}")
    return found


# How fast: docs/benchmarks.md ----------------------------------------------------------------

_STEPS, _SEPARATE = "Time of a step against n", "1024 matrices of 16 × 16"


def _ratio(one: str, other: str, *, heading: str = _STEPS, column: str) -> str:
    table = _table("benchmarks.md", heading)
    over, under = (number(table.cell(name, column)) for name in (one, other))
    if over is None or under is None:
        raise SystemExit(f"error: docs/benchmarks.md has no {column} of {one} and {other}")
    return f"{over / under:.3g}"


def _asked(words: str) -> str:
    """What the page's own summary says was measured."""
    found = _table("benchmarks.md", "Asked and measured").cell(words, "measured")
    if number(found) is None:
        raise SystemExit(f"error: docs/benchmarks.md says of {words}: {found}")
    return found


def step_4096() -> str:
    adam = "torch Adam, fused"
    t1, t8, d1 = (
        _asked(f"{name}, over {adam}, n = 4096")
        for name in ("ProjUNN-T, rank 1", "ProjUNN-T, rank 8", "ProjUNN-D, rank 1")
    )
    d8 = _ratio("ProjUNN-D, rank 8", adam, column="n=4096")
    grown = _asked("growth of ProjUNN-T, rank 1, log-log slope, n = 2048 to 8192")
    return (
        f"ProjUNN-T rank 1: {t1}, rank 8: {t8}; ProjUNN-D rank 1: {d1}, rank 8: {d8}; from n=2048 "
        f"to 8192 the time of rank 1 grows as n^{grown}"
    )


def separate() -> str:
    ours = "ProjUNN-T, rank 1"
    fused = "torch Adam, fused, separate"
    over = _ratio(f"{ours}, separate", fused, heading=_SEPARATE, column="mean ms")
    return f"{over}, {_asked(f'1024 separate 16 × 16, {ours}, over one stack of them, {ours}')}"


def share() -> str:
    return _table("benchmarks.md", "Whole training steps").cell("ProjUNN-T, rank 1", "share")


def bench_command() -> str:
    return _found("benchmarks.md", r"^Measured by (`.*?`(?: \(only .*?\))?) in ")[1]


# Does it reach the optimum, without a learning rate, how exact, several processes -------------


def optima() -> str:
    count, near, nearer = _found(
        "optimality.md", r"^Of (\d+) cells of our optimizers (\d+) reach 1e-6 and (\d+) 1e-10\."
    ).groups()
    return f"{'all' if near == count else f'{near} of {count}'} reach it; {nearer} also 1e-10"


def optima_count() -> str:
    return _found("optimality.md", r"^Of (\d+) cells of our optimizers")[1]


def searches() -> str:
    table = _table("lbfgs.md", "Measured")
    shown = (
        "Brockett, 11 weights",
        "noisy Procrustes n=20",
        "joint diagonalisation 12, K=8",
        "top 50 of 1000×1000",
    )
    ours, theirs = (
        "; ".join(table.cell(name, column) for column in shown)
        for name in ("`LBFGS`", "pymanopt conjugate gradient")
    )
    return f"{ours}. pymanopt's conjugate gradient {theirs}"


def exactness() -> str:
    row = _table("exactness.md", "How exact is it?").rows["**silent failures**"]
    counts = [int(cell) for cell in row]
    ours, theirs = counts[:4], counts[4:]
    mine = "none" if not any(ours) else f"{min(ours)} to {max(ours)}"
    return (
        f"{mine} for our four optimizers; {min(theirs)} to {max(theirs)} for geoopt, POGO and "
        "torch's parametrizations"
    )


def exactness_cases() -> str:
    return str(len(_table("exactness.md", "How exact is it?").rows) - 1)


def collectives() -> str:
    pattern = r"^\| %s \| rank 4 \|.*\| ([\d.]+ / [\d.]+) \|$"
    rows = _found("distributed.md", pattern % r"square 1024×1024, `Shard\(0\)`")[1]
    replicas = _found("distributed.md", pattern % "1024")[1]
    return (
        f"rows sharded, as FSDP2 does: {rows}; replicas, beside DDP's all-reduce: {replicas}; on 2 "
        "and 4 processes"
    )


# The papers at their scale: docs/papers.md -----------------------------------------------------


def _paper(heading: str, row: str) -> dict[str, str]:
    """A row of the first table under a heading that has it, by its columns."""
    for table in tables(_text("papers.md")):
        if table.heading == heading and row in table.rows:
            return dict(zip(table.head, table.rows[row], strict=True))
    raise SystemExit(f"error: docs/papers.md has no {row!r} under {heading!r}")


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"median of {count} seeds"


def copying() -> str:
    row = _paper("projUNN: copying memory over 1,000 steps", "orthogonal, modReLU")
    below, recalled = (
        next(cell for column, cell in row.items() if re.fullmatch(pattern, column))
        for pattern in (r"below .* from iteration", "95% recalled from iteration")
    )
    return f"{below}, {recalled} ({_seeds(int(row['seeds']))})"


def adding() -> str:
    # T, name, parameters, iterations, squared error, by seed, ...
    pattern = r"^\| %d \| %s \|[^|]*\|[^|]*\| ([^|]*) \| ([^|]*) \|"
    ours, lstm = "orthogonal, gated inputs", "LSTM"
    found = [
        _found("papers.md", pattern % (steps, name))
        for steps, name in ((200, ours), (750, ours), (200, lstm))
    ]
    short, long, theirs = (f"{float(match[1]):g}" for match in found)
    seeds = _seeds(len(found[0][2].split(",")))
    return f"{short}, {long} ({seeds}); LSTM of equal size over 200 steps {theirs}"


def pixels() -> str:
    heading = "projUNN: pictures pixel by pixel, in a random order"
    ours, theirs = (_paper(heading, name) for name in ("orthogonal", "LSTM"))
    accuracy = [row["test accuracy"].replace("%", " %") for row in (ours, theirs)]
    seeds = _seeds(len(ours["by seed"].split(",")))
    return f"{accuracy[0]} ({seeds}); LSTM of equal size {accuracy[1]}"


def resnet() -> str:
    heading, column = "ResNet-9 with orthogonal convolutions", "test accuracy, median (%)"
    names = ("orthogonal, BatchNorm", "ordinary, BatchNorm", "orthogonal", "ordinary")
    ours, theirs, plain, other = (_paper(heading, name)[column] for name in names)
    return (
        f"orthogonal convolutions {ours} %, ordinary ones {theirs} %; without BatchNorm {plain} "
        f"and {other} %"
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "optima-count": optima_count,
    "optima": optima,
    "searches": searches,
    "papers-copying": copying,
    "papers-adding": adding,
    "papers-pixels": pixels,
    "papers-resnet": resnet,
    "step-4096": step_4096,
    "step-geoopt": partial(_asked, "geoopt SGD, QR, over ProjUNN-T, rank 1, n = 2048"),
    "step-separate": separate,
    "step-cayley": partial(_asked, "Cayley, dense, over geoopt SGD, QR, n = 1024"),
    "step-share": share,
    "bench-command": bench_command,
    "collectives": collectives,
    "exactness-cases": exactness_cases,
    "exactness": exactness,
}
"""What stands between the marks of each name in README."""
