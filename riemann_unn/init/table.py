"""What the initializers' reports have in common: a table of text, and plain values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["change", "plain", "table"]

_GAP = "  "


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Return the lines of a table, with a rule under its header.

    Args:
        rows: cells, the header's first; every row has as many.
        right: which columns are aligned to the right; the others are to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        _GAP.join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * (sum(widths) + len(_GAP) * (len(widths) - 1)))
    return lines


def change(pair: Sequence[float | None] | None, form: str) -> str:
    """Return two numbers, before and after, as text; a dash where one is missing.

    Args:
        pair: the numbers.
        form: how one is written, such as ``".2g"``.
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
