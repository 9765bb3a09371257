"""The results of the deep unitary networks, as a section and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.suite.page import figure, table
from riemann_unn.demo.style import BLUE, GREEN, GREY, INK, VERMILION, finish, new_figure

from .deep_unitary import STARTS
from .experiment import Claim, Plan, Report, Result, median

__all__ = ["epochs_to", "report"]

_SHARE = 0.95
_ASKED = 1 / 3
_RANDOM = ("random", "random, faster")
_WARM = tuple(start for start in STARTS if start not in _RANDOM)
_WORDS = {
    "random": "random unitary weights",
    "random, faster": "random unitary weights",
    "polar": 'nearest, `"polar"`',
    "lie": '`"lie"`, the paper\'s',
    "procrustes": '`"procrustes"`, calibrated',
}
_STYLE = {
    "random": (GREY, "-"),
    "random, faster": (INK, ":"),
    "polar": (VERMILION, "-"),
    "lie": (GREEN, "--"),
    "procrustes": (BLUE, "-"),
}


def epochs_to(result: Result, end: str | None = None) -> dict[str, float]:
    """Epochs until 95 % of the final accuracy of random weights, by start; infinite if never.

    Args:
        result: Of a run.
        end: Which random start's; by default the higher one's.
    """
    curves: Mapping[str, Sequence[float]] = result["accuracy"]
    goal = _SHARE * max(curves[start][-1] for start in ([end] if end else _RANDOM))
    found = {}
    for start, curve in curves.items():
        reached = (i for i, accuracy in enumerate(curve) if accuracy >= goal)
        found[start] = next(reached, math.inf) / 4
    return found


def _ratio(result: Result, start: str) -> float:
    """Its epochs over those of the quicker random start, to the same accuracy."""
    epochs = epochs_to(result)
    return epochs[start] / max(min(epochs[r] for r in _RANDOM), 0.25)


def report(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    """Tables by depth, the picture, and the claim at the largest depth."""
    runs: dict[int, list[Result]] = {}
    for name, result in results.items():
        runs.setdefault(int(name.split()[0]), []).append(result)
    if not runs:
        return Report()
    side = plan.pick(4, 7, 8)
    lines = [
        f"The {side}×{side} lowest frequencies of each picture ({plan.data}), standardised, go "
        f"through layers of {side**2} complex units with modReLU, and a linear layer reads the "
        "moduli. A net is trained without constraint (Adam, learning rate 1e-3, cosine schedule, "
        "weights that begin unitary), its weights are moved onto the unitary group by "
        "`ru.init.warm_start_`, and it is trained on with `ProjUNNT` (rank 4, Adam, cosine "
        "schedule). Learning rates were chosen with validation: of 1e-3 and 3e-4 for warm starts; "
        "for random weights 1e-3 and 3e-3 are both shown. Epochs are counted in quarters, until "
        "the test accuracy is 95 % of the higher one of those that the two random starts end with.",
        "",
        "The paper states that unitary networks that begin from projected trained weights "
        "reach accuracies much faster; its networks are convolutional ones.",
    ]
    claims = []
    for depth, found in sorted(runs.items()):
        lines += ["", f"**{depth} complex layers**, {_seeds(found)}; {_freely(found)}:", ""]
        lines += _table(found)
        if depth == max(runs):
            claims.append(_claim(depth, found))
    lines += ["", _each(max(runs), runs[max(runs)])]
    lines += ["", *_learned(runs[max(runs)])]
    _draw(runs, images / "papers_chang.png")
    lines += figure("papers_chang.png", "accuracy by epochs from random and from warm starts")
    return Report(lines, claims)


def _seeds(found: Sequence[Result]) -> str:
    return f"median of {len(found)} seeds" if len(found) > 1 else "one seed"


def _freely(found: Sequence[Result]) -> str:
    accuracy, off = (median(r[key] for r in found) for key in ("free", "off"))
    return f"trained freely {accuracy:.1%}, singular values then within a factor of {off:.2f}"


def _table(found: Sequence[Result]) -> list[str]:
    head = ["start", "learning rate", "accuracy before", "epochs to 95 %", "of random's"]
    head += ["accuracy after", "change of the logits", "seconds to convert"]
    rows = []
    for start in found[0]["accuracy"]:
        curves = [r["accuracy"][start] for r in found]
        warm = start in _WARM
        rows.append(
            [
                _WORDS[start],
                f"{STARTS[start][1]:g}",
                f"{median(c[0] for c in curves):.1%}",
                _epochs(median(epochs_to(r)[start] for r in found)),
                _epochs(median(_ratio(r, start) for r in found)) if warm else "",
                f"{median(c[-1] for c in curves):.1%}",
                f"{median(r['error'][start] for r in found):.2f}",
                f"{median(r['converting'][start] for r in found):.1f}" if warm else "",
            ]
        )
    return table(head, rows)


def _epochs(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never"


def _claim(depth: int, found: Sequence[Result]) -> Claim:
    ratios = {start: median(_ratio(r, start) for r in found) for start in _WARM}
    best = min(ratios, key=lambda start: ratios[start])
    random = " and ".join(
        f"{_epochs(median(epochs_to(r)[s] for r in found))} (lr {STARTS[s][1]:g})" for s in _RANDOM
    )
    each = ", ".join(f"`{start}` {_epochs(ratio)}" for start, ratio in ratios.items())
    took = _epochs(median(epochs_to(r)[best] for r in found))
    return Claim(
        f"{depth} complex layers learn faster from trained weights than from random ones",
        "much faster, convolutional networks (in words)",
        f"`{best}` {took} epochs, random {random}; ratios to the quicker {each} "
        f"({_seeds(found)}, learning rates chosen for each start)",
        "epochs to 95 % of the final accuracy at most a third of random",
        ratios[best] <= _ASKED,
    )


def _each(depth: int, found: Sequence[Result]) -> str:
    """The same against each random start's own end."""
    said = []
    for random in _RANDOM:
        epochs = [epochs_to(r, random) for r in found]
        warm = ", ".join(f"`{s}` {_epochs(median(e[s] for e in epochs))}" for s in _WARM)
        own = _epochs(median(e[random] for e in epochs))
        said.append(f"of the start at {STARTS[random][1]:g}, {own} epochs itself, {warm}")
    return f"{depth} layers, to 95 % of each random start's own end: {'; '.join(said)}."


def _learned(found: Sequence[Result]) -> list[str]:
    drop = median(r["accuracy"]["procrustes"][1] - r["accuracy"]["procrustes"][0] for r in found)
    nearest = median(r["accuracy"]["polar"][0] for r in found)
    matched = median(r["accuracy"]["procrustes"][0] for r in found)
    return [
        "What was learned: calibrate (before any training the matched net is right in "
        f"{matched:.0%} of cases, the nearest weights in {nearest:.0%}: gains have nowhere to go "
        "across modReLU), and train a calibrated start at a third of the learning rate that "
        "random weights want: at 1e-3 the first quarter of an epoch destroyed much of what "
        "it had kept (from 82 % to 76 % on validation pictures), at 3e-4 its accuracy moves by "
        f"{100 * drop:+.1f} points. Free training needs a schedule: without one it ended at 84 % "
        "(36 units, 12 epochs), with one at 94 % (49 units, 15 epochs). Nearest weights, which "
        "have to be learned again, want the learning rate of random ones. What starts first does "
        f"not end first: the calibrated start ends at {_end(found, 'procrustes')}, the nearest "
        f"weights at {_end(found, 'polar')}, random ones at {_end(found, 'random, faster')}."
    ]


def _end(found: Sequence[Result], start: str) -> str:
    return f"{median(r['accuracy'][start][-1] for r in found):.1%}"


def _draw(runs: Mapping[int, Sequence[Result]], path: Path) -> None:
    picture = new_figure(
        "Deep unitary networks: trained weights, moved onto the group, give a head start",
        width=11,
        height=4.8,
    )
    axes: Any = picture.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for place, (depth, found) in zip(axes, sorted(runs.items()), strict=True):
        for start in found[0]["accuracy"]:
            curves = [r["accuracy"][start] for r in found]
            colour, line = _STYLE[start]
            middle = [100 * median(values) for values in zip(*curves, strict=True)]
            words = _WORDS[start].replace("`", "").replace('"', "")
            label = f"{words}, lr {STARTS[start][1]:g}"
            x = [i / 4 for i in range(len(middle))]
            place.plot(x, middle, color=colour, ls=line, lw=2, label=label)
        goal = median(100 * _SHARE * max(r["accuracy"][s][-1] for s in _RANDOM) for r in found)
        place.axhline(goal, color=GREY, lw=0.9, ls=(0, (1, 2)))
        end = (len(middle) - 1) / 4
        place.text(end, goal - 1, "95 % of random's end", ha="right", va="top", fontsize=8)
        finish(place, f"{depth} complex layers", "epochs", "")
        place.set_ylim(40 if goal > 60 else 0, 97)
    axes[0].set_ylabel("test accuracy, %")
    axes[-1].legend(loc="lower right", fontsize=9, frameon=False)
    picture.savefig(path)
