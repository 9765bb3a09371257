"""The results of path conditioning, as sections and one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.suite.page import figure, short, table
from riemann_unn.demo.style import BLUE, GREEN, VERMILION, finish, new_figure

from .conditioning import NETS
from .experiment import Claim, Plan, Report, Result, median
from .two_moons import METHODS, rates, widths

__all__ = ["Cell", "report_conditioning", "report_moons"]

_ASKED = 0.5
_STYLE = {
    "plain": (VERMILION, "--", "s", "as initialised"),
    "conditioned": (BLUE, "-", "o", "path-conditioned, ours"),
    "authors": (GREEN, "-.", "^", "the authors' code"),
}


@dataclass(frozen=True)
class Cell:
    """One net at one learning rate.

    Attributes:
        net: Its key.
        rate: The learning rate.
        epochs: By method, epochs to the goal over the seeds; infinite if never.
        test: By method, test accuracies then.
    """

    net: str
    rate: float
    epochs: Mapping[str, Sequence[float]]
    test: Mapping[str, Sequence[float]]

    def middle(self, method: str) -> float:
        """The median of the epochs."""
        return median(self.epochs[method])

    @property
    def ratio(self) -> float:
        """Epochs with conditioning over epochs without; not a number where neither arrives."""
        plain, conditioned = self.middle("plain"), self.middle("conditioned")
        if not math.isfinite(plain):
            return 0.0 if math.isfinite(conditioned) else math.nan
        return conditioned / plain

    @property
    def is_worse(self) -> bool:
        """Whether conditioning costs more epochs than the spread over seeds explains."""
        plain, conditioned = self.middle("plain"), self.middle("conditioned")
        if not (math.isfinite(plain) and math.isfinite(conditioned)):
            return math.isfinite(plain)
        noise = max(_range(self.epochs[m]) for m in ("plain", "conditioned"))
        return conditioned - plain > noise


def _range(values: Sequence[float]) -> float:
    return max(values) - min(values)


def cells_of(results: Mapping[str, Result], optimizer: str = "SGD") -> list[Cell]:
    """All nets at all rates that have both methods.

    Args:
        results: By name of the run.
        optimizer: Whose runs.
    """
    runs: dict[str, dict[str, list[Result]]] = {}
    for name, result in results.items():
        net, kind, method, _ = name.split(", ")
        if kind == optimizer:
            runs.setdefault(net, {}).setdefault(method, []).append(result)
    found = []
    for net in NETS:
        methods = runs.get(net, {})
        if not {"plain", "conditioned"} <= set(methods):
            continue
        for rate in methods["plain"][0]["rates"]:
            epochs: dict[str, list[float]] = {}
            test: dict[str, list[float]] = {}
            for method, each in methods.items():
                for r in each:
                    if rate in r["rates"]:
                        i = r["rates"].index(rate)
                        value = r["epochs"][i]
                        epochs.setdefault(method, []).append(math.inf if value is None else value)
                        test.setdefault(method, []).append(r["test"][i])
            found.append(Cell(net, rate, epochs, test))
    return found


def _slowest(cells: Sequence[Cell], net: str) -> Cell | None:
    """The learning rate at which plain training needs the most epochs, and arrives."""
    own = [c for c in cells if c.net == net and math.isfinite(c.middle("plain"))]
    return max(own, key=lambda c: c.middle("plain")) if own else None


def report_conditioning(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    """The tables, what is met and what is missed, and the picture."""
    cells = cells_of(results)
    if not cells:
        return Report()
    goal, cap = plan.pick("90", "99"), plan.pick(10, 150, 1000)
    count = max(len(c.epochs["plain"]) for c in cells)
    lines = [
        f"MLPs with hidden layers of {plan.pick(64, 500)} and a small conv net (three "
        f"convolutions of stride 2) on {plan.data}, pixels standardised, SGD with batches of 128 "
        f"and a constant learning rate, as in the authors' scripts (there CIFAR-10, MLPs of "
        "3 to 8 hidden layers of 500 with BatchNorm and PyTorch's initialisation at 1e-3; Kaiming "
        f"normal on two moons). Epochs until {goal} % of the training pictures are right, {cap} at "
        f"most; median of {count} seeds, with the range over seeds, which is the noise.",
        "",
        *_rates_table(cells),
    ]
    worse = [c for c in cells if c.is_worse]
    slow = [s for net in NETS if (s := _slowest(cells, net)) is not None]
    lines += ["", *_function(results), "", *_others(results), "", *_learned(worse)]
    _draw(cells, cap, images / "papers_lebeurrier.png")
    lines += figure("papers_lebeurrier.png", "epochs by learning rate, with and without")
    asked = "at most half the epochs where plain training needs the most"
    claims = []
    for kind, own in _families(slow).items():
        each = "; ".join(
            f"{_depth(c)}{_shown(c.middle('plain'))} → {_shown(c.middle('conditioned'))} epochs "
            f"at {c.rate:g} (×{c.ratio:.2f})"
            for c in own
        )
        claims.append(
            Claim(
                f"path conditioning saves epochs: {kind}",
                "faster training (in words, CIFAR-10)",
                f"{each}; {_count(own)}",
                asked,
                all(c.ratio <= _ASKED for c in own),
            )
        )
    places = ", ".join(f"{c.net} at {c.rate:g}" for c in worse) or "nowhere"
    claims.append(
        Claim(
            "path conditioning does no harm",
            "no figure quoted",
            f"worse by more than the range over seeds in {len(worse)} of {len(cells)} cells "
            f"({places})",
            "nowhere worse by more than noise",
            not worse,
        )
    )
    return Report(lines, claims)


def _families(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for c in cells:
        net = NETS[c.net]
        kind = net.title.split(", ", 1)
        words = kind[0] if net.kind == "conv" else "MLPs"
        words += ", BatchNorm" if net.norm else ""
        words += ", Kaiming normal" if net.init == "kaiming" else ", PyTorch's initialisation"
        found.setdefault(words, []).append(c)
    return found


def _depth(c: Cell) -> str:
    return f"{NETS[c.net].depth} hidden layers " if NETS[c.net].kind == "mlp" else ""


def _count(cells: Sequence[Cell]) -> str:
    count = min(len(c.epochs[m]) for c in cells for m in ("plain", "conditioned"))
    return f"median of {count} seeds" if count > 1 else "one seed"


def _shown(epochs: float) -> str:
    return f"{epochs:g}" if math.isfinite(epochs) else "never"


def _with_range(values: Sequence[float]) -> str:
    if min(values) == max(values):
        return _shown(values[0])
    return f"{_shown(median(values))} ({_shown(min(values))} to {_shown(max(values))})"


def _rates_table(cells: Sequence[Cell]) -> list[str]:
    authors = any("authors" in c.epochs for c in cells)
    head = ["net", "learning rate", "plain", "conditioned", "ratio"]
    head += ["the authors' code"] * authors + ["test accuracy, plain", "conditioned"]
    rows = []
    for c in cells:
        row = [NETS[c.net].title, f"{c.rate:g}"]
        row += [_with_range(c.epochs[m]) for m in ("plain", "conditioned")]
        mark = " **worse**" if c.is_worse else ""
        row.append((f"{c.ratio:.2f}" if math.isfinite(c.ratio) else "") + mark)
        if authors:
            row.append(_with_range(c.epochs["authors"]) if "authors" in c.epochs else "")
        ends = [median(c.test[m]) for m in ("plain", "conditioned")]
        row += [f"{100 * end:.1f} %" if end > 0 else "diverged" for end in ends]
        rows.append(row)
    return table(head, rows)


def _function(results: Mapping[str, Result]) -> list[str]:
    """How far each method changes the function, and how long it takes."""
    words = []
    for method, who in (("conditioned", "ours"), ("authors", "the authors' code")):
        own = {n: r for n, r in results.items() if f", {method}," in n}
        if not own:
            continue
        plain = [r["change"] for n, r in own.items() if "-norm" not in n]
        norm = [r["change"] for n, r in own.items() if "-norm" in n]
        seconds = median(r["rescaling"] for r in own.values())
        said = f"{who} changes the outputs by at most {short(max(plain, default=math.nan))}"
        if norm:
            said += f", with BatchNorm in training mode by {short(max(norm))}"
        words.append(f"{said}, and takes {seconds:.1f} s (median)")
    return [f"Function: {'; '.join(words)}."] if words else []


def _others(results: Mapping[str, Result]) -> list[str]:
    """Rescaling again every epoch, and other optimizers."""
    rows = []
    for optimizer in ("SGD", "momentum", "Adam"):
        own: dict[str, list[float]] = {}
        rate = math.nan
        for name, r in results.items():
            net, kind, method, _ = name.split(", ")
            if net == "mlp3" and kind == optimizer and method != "authors":
                rate = min(r["rates"])
                value = r["epochs"][r["rates"].index(rate)]
                own.setdefault(method, []).append(math.inf if value is None else value)
        if "again" in own:
            cells = [_with_range(own[m]) if m in own else "" for m in ("plain", "conditioned")]
            rows.append([optimizer, f"{rate:g}", *cells, _with_range(own["again"])])
    if not rows:
        return []
    return [
        "Rescaled again after every epoch, the optimizer's state carried over (what scales as a "
        "gradient is divided by `report.scales[name]`, Adam's second moment by its square), MLP "
        "with 3 hidden layers:",
        "",
        *table(["optimizer", "learning rate", "plain", "once", "every epoch"], rows),
    ]


def _learned(worse: Sequence[Cell]) -> list[str]:
    said = (
        "What was learned: conditioning gives each layer a share of the gradient's energy that "
        "goes with its number of parameters, so that the readout becomes large and slow, and "
        "hidden layers small and fast. Where that helps it helps as a larger learning rate of the "
        "hidden layers would, most in shallow nets, whose few layers share what the readout gives "
        "up, and most at small learning rates; the largest rate that trains can become smaller, "
        "which is where it does harm. Once is enough: training hardly moves the scales. With "
        "BatchNorm the rescaled numbers are the affine parts and the weights behind them, and "
        "those weights do not change the function by their size, but train faster when they are "
        "small: it pays in deep nets at small learning rates and costs epochs in shallow ones. "
        "Statistics of real data before rescaling, squares of the data in place of ones, and "
        "`enorm` were tried on some of these nets with one seed, on validation pictures: "
        "all were slower or the same."
    )
    if not worse:
        return [said]
    places = "; ".join(
        f"{NETS[c.net].title} at {c.rate:g}: {_shown(c.middle('plain'))} → "
        f"{_shown(c.middle('conditioned'))}"
        for c in worse
    )
    return [said, "", f"Worse by more than the range over seeds: {places}."]


def _draw(cells: Sequence[Cell], cap: int, path: Path) -> None:
    wanted = [
        n for n in ("mlp3", "mlp8", "mlp3-norm", "mlp8-norm") if any(c.net == n for c in cells)
    ]
    picture = new_figure(
        "Path conditioning: epochs by learning rate",
        width=3.4 * max(len(wanted), 2),
        height=4.4,
    )
    panels: Any = picture.subplots(1, len(wanted), sharey=True, squeeze=False)[0]
    for axes, net in zip(panels, wanted, strict=True):
        own = [c for c in cells if c.net == net]
        for method, (colour, line, mark, words) in _STYLE.items():
            points = [(c.rate, c.middle(method)) for c in own if method in c.epochs]
            x, y = [p[0] for p in points], [min(p[1], 1.3 * cap) for p in points]
            if points:
                axes.plot(x, y, color=colour, ls=line, marker=mark, lw=2, label=words)
        axes.axhline(cap, color="#BBBBBB", lw=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(1, 1.7 * cap)
        depth, norm = NETS[net].depth, NETS[net].norm
        finish(
            axes, f"{depth} hidden layers" + (", BatchNorm" if norm else ""), "learning rate", ""
        )
        axes.text(min(c.rate for c in own), 1.08 * cap, "not reached", fontsize=8, color="#767676")
    panels[0].set_ylabel("epochs until the training pictures are fitted")
    panels[0].legend(loc="lower left", fontsize=9, frameon=False)
    picture.savefig(path)


def report_moons(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    """Steps by width at each learning rate."""
    runs: dict[str, list[Result]] = {}
    for name, result in results.items():
        runs.setdefault(name.split(", ")[0], []).append(result)
    methods = [m for m in METHODS if m in runs]
    if not {"plain", "conditioned"} <= set(methods):
        return Report()
    lines = [
        "700 points of scikit-learn's `make_moons` with noise 0.1, MLPs of five hidden layers, "
        "Kaiming normal, gradient descent on all points at once: steps until 99 % of them are "
        f"right, {plan.pick(200, 3000, 10000)} at most; median of {len(runs['plain'])} seeds. The "
        "paper's scripts take widths 2 to 32 and learning rates from 1e-4 to 1.",
    ]
    ratios = []
    for i, rate in enumerate(rates(plan)):
        rows = []
        for j, width in enumerate(widths(plan)):
            row = [str(width)]
            values = {}
            for method in methods:
                steps = [r["steps"][i][j] for r in runs[method]]
                found = [math.inf if s is None else float(s) for s in steps]
                values[method] = median(found)
                row.append(_with_range(found))
            if math.isfinite(values["plain"]):
                ratios.append((values["conditioned"] / max(values["plain"], 1), rate, width))
            rows.append(row)
        words = {m: _STYLE[m][3] for m in methods}
        lines += ["", *table([f"width, learning rate {rate:g}", *words.values()], rows)]
    fewer = sum(r < 1 for r, _, _ in ratios)
    middle = median(r for r, _, _ in ratios)
    lines += [
        "",
        f"Conditioning needs fewer steps in {fewer} of {len(ratios)} cells where plain descent "
        f"arrives, {middle:.2f} times as many in the median.",
    ]
    claim = Claim(
        "path conditioning fits two moons in fewer steps",
        "no figure quoted",
        f"median ratio of steps {middle:.2f}, fewer in {fewer} of {len(ratios)} cells",
    )
    return Report(lines, [claim])
