"""Tables of the initializers' reports, as text and HTML, and plain values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from html import escape
from itertools import groupby
from typing import Any

from torch import Tensor

__all__ = ["Report", "Table", "change", "plain"]

_GAP = "  "


@dataclass(frozen=True)
class Table:
    """Cells with a header.

    Args:
        rows: cells, the header's first; every row has as many.
        right: the columns that are aligned to the right; others to the left.
    """

    rows: Sequence[Sequence[str]]
    right: Collection[int] = ()

    def __str__(self) -> str:
        """Return lines of text, with a rule under the header."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [
            _GAP.join(
                cell.rjust(width) if i in self.right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in self.rows
        ]
        lines.insert(1, "-" * (sum(widths) + len(_GAP) * (len(widths) - 1)))
        return "\n".join(lines)

    def html(self) -> str:
        """Return the same as an HTML table."""
        head, *body = (self._row(row, "td" if i else "th") for i, row in enumerate(self.rows))
        return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"

    def _row(self, row: Sequence[str], tag: str) -> str:
        sides = ("right" if i in self.right else "left" for i in range(len(row)))
        cells = (
            f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
            for side, cell in zip(sides, row, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"


class Report:
    """A report of lines and tables, shown as HTML in a notebook."""

    def _parts(self) -> list[str | Table]:
        """Return lines, empty ones to keep others apart, and tables."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(map(str, self._parts()))

    def _repr_html_(self) -> str:
        found = []
        for is_line, parts in groupby(self._parts(), lambda part: isinstance(part, str)):
            if is_line:
                lines = "<br>".join(escape(str(line)) for line in parts if line)
                found += [f"<p>{lines}</p>"] if lines else []
            else:
                found += [part.html() for part in parts if isinstance(part, Table)]
        return "\n".join(found)


def change(pair: Sequence[float | None] | None, form: str) -> str:
    """Return two numbers, before and after, as text; a dash where one is missing.

    Args:
        pair: the numbers.
        form: their format, such as ``".2g"``.
    """
    if pair is None or any(value is None for value in pair):
        return "-"
    return " -> ".join(format(value, form) for value in pair)


def plain(value: Any) -> Any:
    """Return a report or a part of it as nested dicts, lists and numbers, for a log or JSON.

    Attributes whose names begin with an underscore are left out; tensors become lists.
    """
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        public = [f.name for f in fields(value) if not f.name.startswith("_")]
        return {name: plain(getattr(value, name)) for name in public}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    return value
