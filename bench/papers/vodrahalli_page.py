"""The results of the low-rank experiments, as sections and one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.suite.page import figure, short, table
from riemann_unn.demo.style import BLUE, GREEN, GREY, VERMILION, finish, new_figure

from .experiment import Claim, Plan, Report, Result, median
from .low_rank import COMPRESSIONS, DECAYS, FURTHER, STARTS

__all__ = ["paired", "report_compression", "report_training"]

_LEVEL = 0.05
_FUNCTION = ("function", "function, calibrated")
_WORDS = {
    "random": "random factors",
    "spectral": "spectral",
    "function": "function-aware, Gaussian inputs (the paper's)",
    "function, Gaussian": "function-aware, Gaussian inputs (the paper's)",
    "function, calibrated": "function-aware, calibrated on pictures",
}
_STYLE = {
    "random": (GREY, ":", "v"),
    "spectral": (VERMILION, "--", "s"),
    "function": (GREEN, "-.", "^"),
    "function, Gaussian": (GREEN, "-.", "^"),
    "function, calibrated": (BLUE, "-", "o"),
}


def paired(better: Sequence[float], other: Sequence[float]) -> float:
    """P-value of Student's paired test, two-sided; 1 if nothing differs or seeds are too few."""
    differences = [a - b for a, b in zip(better, other, strict=True)]
    if len(differences) < 2 or max(differences) == min(differences):
        return 1.0
    return float(import_module("scipy.stats").ttest_rel(better, other).pvalue)


def _ratios(plan: Plan) -> Sequence[float]:
    ratios: Sequence[float] = plan.pick((1 / 16, 1 / 4), (1 / 32, 1 / 16, 1 / 8, 1 / 4))
    return ratios


def _by_seed(results: Mapping[str, Result], starts: Sequence[str]) -> dict[int, dict[str, Result]]:
    """Results by seed and start, of seeds that have them all."""
    found: dict[int, dict[str, Result]] = {}
    for name, result in results.items():
        start, seed = name.rsplit(", seed ", 1)
        found.setdefault(int(seed), {})[start] = result
    return {seed: found[seed] for seed in sorted(found) if set(starts) <= set(found[seed])}


def _against(values: Sequence[float], base: Sequence[float]) -> str:
    """The mean difference in points, and its p-value."""
    mean = sum(a - b for a, b in zip(values, base, strict=True)) / len(values)
    return f"{100 * mean:+.1f}, p = {short(paired(values, base))}"


def _wins(values: Sequence[float], base: Sequence[float]) -> bool:
    return sum(values) > sum(base) and paired(values, base) < _LEVEL


def report_training(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    """Tables by kind of decay, significance, and the claim at the lowest two ratios."""
    every = _by_seed(results, list(STARTS))
    seeds = {seed: found for seed, found in every.items() if seed not in FURTHER}
    further = {seed: found for seed, found in every.items() if seed in FURTHER}
    if not seeds:
        return Report()
    judged = further or seeds
    ratios = _ratios(plan)
    heads = [f"1/{round(1 / r)}" for r in ratios]
    width, epochs = plan.pick(64, 256, 1024), plan.pick(2, 10, 30)
    lines = [
        f"Both hidden layers of an MLP of width {width} on {plan.data} have low rank from the "
        f"start and are trained for {epochs} epochs (Adam, learning rate 4e-3, chosen with "
        "validation among 1e-3, 4e-3 and 8e-3, cosine schedule, batches of 64). They "
        "begin as random factors of He's variance, or as a He-initialised net that "
        '`ru.init.low_rank_` splits: `method="spectral"`; `method="function"`; or the latter with '
        "`calibration=` a thousand training pictures, without labels. Weight decay is absent, "
        "decoupled on the factors (0.1), or on the product AB (its squared norm times 5e-4 in "
        "the loss). Test accuracy at the end, mean of "
        f"{len(seeds)} seeds, and points above spectral with the p-value of a paired test.",
        "",
        "The paper trains ResNet and EfficientNet models on ImageNet; by its theory the gap to "
        "spectral initialisation grows as the rank falls.",
    ]
    for kind in next(iter(seeds.values()))["random"]["final"]:
        rows = []
        base = _finals(seeds, "spectral", kind)
        for start in STARTS:
            row = [_WORDS[start]]
            for i, values in enumerate(_finals(seeds, start, kind)):
                cell = f"{100 * sum(values) / len(values):.1f} %"
                row.append(
                    cell + ("" if start == "spectral" else f" ({_against(values, base[i])})")
                )
            rows.append(row)
        words = {
            "none": "no decay",
            "factors": "decay of the factors",
            "product": "decay of the product",
        }
        lines += ["", *table([f"rank ratio, {words[kind]}", *heads], rows)]
    lines += ["", _early(seeds, heads)]
    if further:
        lines += ["", *_further(further, heads)]
    lines += ["", _verdict(seeds, heads)]
    _draw_training(plan, images, seeds)
    lines += figure("papers_low_rank_training.png", "points above spectral by rank ratio")
    claim = Claim(
        "function-aware low rank, trained from scratch, ends above spectral",
        "a gap that grows as the rank falls, ImageNet (in words)",
        _claimed(judged, heads),
        "p < 0.05 at the lowest two ratios",
        all(_wins(*_pair(judged, "function, calibrated", "none", i)) for i in range(2)),
    )
    paper = Claim(
        "the same on Gaussian inputs, without looking at data",
        "as above",
        _claimed(judged, heads, "function"),
        "p < 0.05 at the lowest two ratios",
        all(_wins(*_pair(judged, "function", "none", i)) for i in range(2)),
    )
    return Report(lines, [claim, paper])


def _finals(
    seeds: Mapping[int, Mapping[str, Result]], start: str, kind: str, when: str = "final"
) -> list[list[float]]:
    """By ratio, a list over seeds."""
    rows = [found[start][when][kind] for found in seeds.values()]
    return [list(values) for values in zip(*rows, strict=True)]


def _pair(
    seeds: Mapping[int, Mapping[str, Result]], start: str, kind: str, i: int
) -> tuple[list[float], list[float]]:
    return _finals(seeds, start, kind)[i], _finals(seeds, "spectral", kind)[i]


def _claimed(
    seeds: Mapping[int, Mapping[str, Result]], heads: Sequence[str], start: str = _FUNCTION[1]
) -> str:
    cells = [f"{heads[i]}: {_against(*_pair(seeds, start, 'none', i))}" for i in range(2)]
    return f"{_WORDS[start]}; points above spectral, {len(seeds)} seeds, at " + "; ".join(cells)


def _further(seeds: Mapping[int, Mapping[str, Result]], heads: Sequence[str]) -> list[str]:
    base = _finals(seeds, "spectral", "none")
    rows = []
    for start in STARTS:
        row = [_WORDS[start]]
        for i, values in enumerate(_finals(seeds, start, "none")):
            cell = f"{100 * sum(values) / len(values):.1f} %"
            row.append(cell if start == "spectral" else f"{cell} ({_against(values, base[i])})")
        rows.append(row)
    return [
        f"These seeds were too few for half a point. {len(seeds)} further ones, their number fixed "
        "before they were run, decide the claim; no decay:",
        "",
        *table(["rank ratio", *heads[:2]], rows),
    ]


def _early(seeds: Mapping[int, Mapping[str, Result]], heads: Sequence[str]) -> str:
    base = _finals(seeds, "spectral", "none", "early")
    cells = []
    for start in _FUNCTION:
        values = _finals(seeds, start, "none", "early")
        each = "; ".join(
            f"{heads[i]} {_against(values[i], base[i])}" for i in range(min(2, len(heads)))
        )
        cells.append(f"{_WORDS[start]}: {each}")
    return "After the first epoch, points above spectral: " + ". ".join(cells) + "."


def _verdict(seeds: Mapping[int, Mapping[str, Result]], heads: Sequence[str]) -> str:
    said = []
    kinds = [k for k in DECAYS if k in next(iter(seeds.values()))["random"]["final"]]
    for start in _FUNCTION:
        won = [
            f"{heads[i]} ({'no decay' if kind == 'none' else kind})"
            for kind in kinds
            for i in range(len(heads))
            if _wins(*_pair(seeds, start, kind, i))
        ]
        of = len(kinds) * len(heads)
        listed = ", ".join(won) or "none"
        said.append(
            f"{_WORDS[start]} is above spectral with p < 0.05 in {len(won)} of {of} ({listed})"
        )
    return (
        "What was learned, of the first seeds, p-values not corrected for the number of "
        "comparisons: " + "; ".join(said) + ". From scratch, too, it is the inputs that "
        "count: pictures lie near few directions, and a layer that is split with "
        "`calibration=` keeps its function on those."
    )


def report_compression(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    """The table of accuracies without fine-tuning, and the claim at the lowest two ratios."""
    if not results:
        return Report()
    found = list(results.values())
    ratios = _ratios(plan)
    heads = [f"1/{round(1 / r)}" for r in ratios]
    by = {
        name: [[r["accuracy"][name][i] for r in found] for i in range(len(ratios))]
        for name in COMPRESSIONS
    }
    rows = []
    for name, columns in by.items():
        row = [_WORDS[name]]
        for i, values in enumerate(columns):
            error = median(r["error"][name][i] for r in found)
            cell = f"{100 * sum(values) / len(values):.1f} % ({error:.3f}"
            if name != "spectral":
                cell += f"; {_against(values, by['spectral'][i])}"
            row.append(cell + ")")
        rows.append(row)
    dense = 100 * sum(r["dense"] for r in found) / len(found)
    lines = [
        f"The same MLP, dense, trained for {plan.pick(2, 10, 30)} epochs at 1e-3 on {plan.data} "
        f"({dense:.1f} %), then both hidden layers made low-rank and nothing trained any more; "
        f"calibrated on a thousand training pictures. Test accuracy, mean of {len(found)} seeds; "
        "in brackets the relative error of the logits, points above spectral and p-value.",
        "",
        *table(["rank ratio", *heads], rows),
        "",
        "What was learned: without calibration the Gaussian objective changes the error of the "
        f"logits by {_error_change(found):+.0%} at {heads[0]}, and accuracy by no more than the "
        f"table says; with it, {heads[0]} of the rank keeps {_kept(by, dense, 0):.0%} of the "
        f"accuracy where spectral keeps {_kept(by, dense, 0, 'spectral'):.0%}.",
    ]
    _draw(plan, images, by, dense)
    lines += figure("papers_vodrahalli.png", "accuracy by rank ratio of compressed nets")
    best = by["function, calibrated"]
    each = "; ".join(
        f"{heads[i]}: {100 * sum(best[i]) / len(best[i]):.1f} % "
        f"({_against(best[i], by['spectral'][i])})"
        for i in range(2)
    )
    claim = Claim(
        "function-aware compression of a trained net keeps more than spectral",
        "no figure quoted",
        f"calibrated, points above spectral at {each}",
        "p < 0.05 at the lowest two ratios",
        all(_wins(best[i], by["spectral"][i]) for i in range(2)),
    )
    return Report(lines, [claim])


def _error_change(found: Sequence[Result]) -> float:
    """Relative change of the logits' error at the lowest ratio, Gaussian over spectral."""
    gaussian, spectral = (
        median(r["error"][name][0] for r in found) for name in ("function, Gaussian", "spectral")
    )
    return gaussian / spectral - 1


def _kept(
    by: Mapping[str, Sequence[Sequence[float]]],
    dense: float,
    i: int,
    name: str = "function, calibrated",
) -> float:
    values = by[name][i]
    return 100 * sum(values) / len(values) / dense


def _spread(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    mean = sum(values) / len(values)
    square = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return math.sqrt(square / len(values))


def _draw(
    plan: Plan, images: Path, by: Mapping[str, Sequence[Sequence[float]]], dense: float
) -> None:
    picture = new_figure(
        "Two layers made low-rank, no training afterwards: look at the inputs", width=8, height=4.8
    )
    axes: Any = picture.subplots()
    ratios = _ratios(plan)
    for name, columns in by.items():
        _line(axes, name, ratios, columns)
    axes.axhline(dense, color=GREY, lw=1)
    axes.text(ratios[0], dense + 0.8, f"dense, {dense:.1f} %", va="bottom", fontsize=9)
    _ranks(axes, ratios)
    finish(axes, "mean and standard error over seeds", "rank, of the full one", "test accuracy, %")
    axes.set_ylim(None, 101)
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    picture.savefig(images / "papers_vodrahalli.png")


def _draw_training(plan: Plan, images: Path, seeds: Mapping[int, Mapping[str, Result]]) -> None:
    picture = new_figure("Low rank from scratch: what the start is worth", width=11, height=4.6)
    panels: Any = picture.subplots(1, 2)
    ratios = _ratios(plan)
    for axes, when, words in zip(
        panels, ("early", "final"), ("after the first epoch", "at the end"), strict=True
    ):
        base = _finals(seeds, "spectral", "none", when)
        for start in STARTS:
            if start == "spectral":
                continue
            values = _finals(seeds, start, "none", when)
            gains = [
                [a - b for a, b in zip(v, w, strict=True)]
                for v, w in zip(values, base, strict=True)
            ]
            _line(axes, start, ratios, gains)
        axes.axhline(0, color=VERMILION, lw=1.5, ls="--", label="spectral")
        _ranks(axes, ratios)
        finish(axes, words, "rank, of the full one", "")
    panels[0].set_ylabel("test accuracy above spectral, points")
    panels[1].legend(loc="best", fontsize=9, frameon=False)
    picture.savefig(images / "papers_low_rank_training.png")


def _line(
    axes: Any, name: str, ratios: Sequence[float], columns: Sequence[Sequence[float]]
) -> None:
    colour, line, mark = _STYLE[name]
    middle = [100 * sum(values) / len(values) for values in columns]
    bars = [100 * _spread(values) for values in columns]
    axes.errorbar(
        ratios,
        middle,
        bars,
        color=colour,
        ls=line,
        marker=mark,
        lw=2,
        capsize=3,
        label=_WORDS[name],
    )


def _ranks(axes: Any, ratios: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"1/{round(1 / r)}" for r in ratios])
    axes.minorticks_off()
