"""A page read back: its tables by heading, so that pictures and README show what stands there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Table", "number", "tables"]


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        heading: The one above it.
        head: Its first line, without the first cell.
        rows: The cells by the first cell of their line.
    """

    heading: str
    head: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]

    def cell(self, row: str, column: str) -> str:
        return self.rows[row][self.head.index(column)]

    def line(self, row: str, prefix: str) -> dict[float, float]:
        """The numbers of a row by those in the head.

        Args:
            row: Its first cell.
            prefix: What stands before the number in the head of a column that counts.
        """
        found = {}
        for column, cell in zip(self.head, self.rows[row], strict=True):
            size, value = number(column.removeprefix(prefix)), number(cell)
            if column.startswith(prefix) and size is not None and value is not None:
                found[size] = value
        return found


def tables(text: str) -> list[Table]:
    """All tables of a page, in its order.

    Args:
        text: Markdown.
    """
    found: list[Table] = []
    heading, block = "", list[str]()
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
            continue
        if len(block) > 1:
            found.append(_table(heading, block))
        block = []
        if line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def number(cell: str) -> float | None:
    """The number that a cell begins with, if it does.

    Args:
        cell: Its text.
    """
    found = re.match(r"-?\d+(\.\d+)?(e-?\d+)?", cell)
    return float(found[0]) if found else None


def _table(heading: str, lines: Iterable[str]) -> Table:
    # A bar inside code, as in a norm, would be escaped.
    cells = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]
    head, _, *rows = cells
    return Table(heading, tuple(head[1:]), {row[0]: tuple(row[1:]) for row in rows})
