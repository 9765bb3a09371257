"""The required ratios, with those measured in this run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .page import Section, short, table
from .steps import ADAM

__all__ = ["run"]

Values = Mapping[str, float]


@dataclass(frozen=True)
class Ask:
    """A line of the table: a ratio of two values, with a bound and a goal."""

    words: str
    top: str
    bottom: str
    required: float
    hope: float
    at_least: bool = False
    percent: bool = False

    def ratio(self, values: Values) -> float | None:
        if self.top not in values or (self.bottom and self.bottom not in values):
            return None
        return values[self.top] / (values[self.bottom] if self.bottom else 1.0)

    def row(self, values: Values) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        required, hope = (f"{sign} {self._shown(x)}" for x in (self.required, self.hope))
        ratio = self.ratio(values)
        if ratio is None:
            return [self.words, required, hope, "not measured in this run", ""]
        return [self.words, required, hope, self._shown(ratio, 3), self._verdict(ratio)]

    def _shown(self, value: float, digits: int = 2) -> str:
        if self.percent:
            return f"{100 * value:.{digits - 1}g} %"
        return f"{value:g}" if digits == 2 else short(value, digits)

    def _verdict(self, ratio: float) -> str:
        sign = -1 if self.at_least else 1
        if sign * ratio <= sign * self.hope:
            return "more than asked"
        return "as asked" if sign * ratio <= sign * self.required else "**missed**"


def _step(name: str, n: int) -> str:
    return f"step/{name}/{n}"


_T, _T8 = "ProjUNN-T, rank 1", "ProjUNN-T, rank 8"
ASKS = [
    *(
        Ask(f"{_T}, over {ADAM}, n = {n}", _step(_T, n), _step(ADAM, n), required, 2)
        for n, required in ((64, 4), (128, 4), (512, 4.5))
    ),
    Ask(f"{_T}, over {ADAM}, n = 4096", _step(_T, 4096), _step(ADAM, 4096), 1.4, 1.0),
    *(
        Ask(f"{_T8}, over {ADAM}, n = {n}", _step(_T8, n), _step(ADAM, n), required, hope)
        for n, required, hope in ((64, 10, 5), (128, 10, 5), (512, 9, 5), (4096, 3, 2))
    ),
    Ask(
        f"ProjUNN-D, rank 1, over {ADAM}, n = 4096",
        _step("ProjUNN-D, rank 1", 4096),
        _step(ADAM, 4096),
        2.0,
        1.1,
    ),
    Ask(
        f"{_T}, fused Adam base, over {ADAM}, n = 4096",
        _step(f"{_T}, fused Adam base", 4096),
        _step(ADAM, 4096),
        2.8,
        2,
    ),
    Ask(
        f"geoopt SGD, QR, over {_T}, n = 2048",
        _step("geoopt SGD, QR", 2048),
        _step(_T, 2048),
        150,
        250,
        at_least=True,
    ),
    Ask(
        "Cayley, dense, over geoopt SGD, QR, n = 1024",
        _step("Cayley, dense", 1024),
        _step("geoopt SGD, QR", 1024),
        1.0,
        0.5,
    ),
    Ask(f"growth of {_T}, log-log slope, n = 2048 to 8192", "slope", "", 2.1, 2.0),
    Ask(
        f"1024 separate 16 × 16, {_T}, over one stack of them, POGO (`bmm`)",
        f"small16/{_T}, separate",
        "small16/POGO, stacked",
        3,
        1.5,
    ),
    Ask(
        f"1024 separate 16 × 16, {_T}, over one stack of them, {_T}",
        f"small16/{_T}, separate",
        f"small16/{_T}, stacked",
        2.4,
        1.5,
    ),
    Ask(
        f"optimizer's share of a training step, RNN of 512, {_T}",
        f"training/{_T}",
        "",
        0.03,
        0.01,
        percent=True,
    ),
    Ask(
        "tangent energy of the default sketch, rank 1, over the best, gradients on digits",
        "sketch/digits/tangent/1",
        "",
        0.75,
        0.90,
        at_least=True,
    ),
    Ask(
        "tangent energy of the default sketch, rank 8, over the best, gradients on digits",
        "sketch/digits/tangent/8",
        "",
        0.85,
        0.95,
        at_least=True,
    ),
]


def run(values: Values) -> Section:
    known = dict(values)
    ends = [known.get(_step(_T, n)) for n in (2048, 8192)]
    if ends[0] is not None and ends[1] is not None:
        known["slope"] = math.log2(ends[1] / ends[0]) / 2
    words = "Ratios of means of this run; each is of times that were taken in turn."
    head = ["", "asked", "hoped for", "measured", ""]
    rows = [ask.row(known) for ask in ASKS]
    return Section("Asked and measured", [words, "", *table(head, rows)], known)
