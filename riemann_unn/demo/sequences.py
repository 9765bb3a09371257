"""Labelled sequences from a CSV file, as a task for the recurrent nets.

The file has a head line and one of two forms:

- one line a step: columns ``sequence`` (which one it belongs to) and ``label``, and every other
  column is a feature; the steps of a sequence are in the order of their lines.
- one line a sequence: a column ``label``, and every other column is one step of the only feature.

Sequences may differ in length: shorter ones begin with steps of zeros.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from .data import DataError, stratified
from .tasks import Batch, Task

__all__ = ["Sequences", "read_sequences"]

_HELD_OUT = 0.2


def read_sequences(path: Path) -> tuple[list[Tensor], list[str]]:
    """Read a CSV file in either form.

    Args:
        path: The file.

    Returns:
        Sequences ``(steps, features)`` in float32, and their labels.

    Raises:
        DataError: If the file is not there or has another form; names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            head = [word.strip() for word in next(rows, [])]
            lines = [(rows.line_num, row) for row in rows if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    if "label" not in head:
        raise DataError(
            f"{path} needs a head line with a column 'label', and a column 'sequence' if every "
            f"line is one step; its first line is {','.join(head)!r}"
        )
    if not lines:
        raise DataError(f"{path} has a head line and nothing below it")
    features = [i for i, word in enumerate(head) if word not in ("label", "sequence")]
    if not features:
        raise DataError(f"{path} has no column besides {' and '.join(map(repr, head))}")
    label = head.index("label")
    found: dict[str, list[list[float]]] = {}
    labels: dict[str, str] = {}
    for number, row in lines:
        if len(row) != len(head):
            raise DataError(f"{path}, line {number}: {len(row)} values for {len(head)} columns")
        key = row[head.index("sequence")] if "sequence" in head else str(number)
        if labels.setdefault(key, row[label]) != row[label]:
            raise DataError(
                f"{path}, line {number}: sequence {key} has label {row[label]!r} here and "
                f"{labels[key]!r} above"
            )
        found.setdefault(key, []).append([_number(row[i], path, number) for i in features])
    sequences = [torch.tensor(steps) for steps in found.values()]
    if "sequence" not in head:
        sequences = [steps.t() for steps in sequences]
    return sequences, list(labels.values())


def _number(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}, line {line}: {text!r} is no finite number")
    return value


@dataclass(frozen=True)
class Sequences(Task):
    """Sequences of a file, read step by step, and classified at the end.

    A fifth of every label's sequences is held out, the same ones in every run. Features are shifted
    and scaled so that those of the training steps have mean 0 and variance 1.

    Args:
        path: CSV file; see the module.
        batch_size: Sequences per training batch.
    """

    name: ClassVar[str] = "sequences"
    hidden: ClassVar[int] = 128
    head_width: ClassVar[int] = 64
    lr: ClassVar[float] = 2e-3
    lr_decay: ClassVar[float] = 0.9
    weight_decay: ClassVar[float] = 1e-3
    score: ClassVar[str] = "accuracy"

    path: Path
    batch_size: int = 32

    @property
    def features(self) -> int:
        return self.split[0].shape[-1]

    @property
    def outputs(self) -> int:
        return int(self.split[1].max()) + 1

    @property
    def title(self) -> str:
        length, count = self.split[0].shape[:2]
        return f"{self.path.stem}: {count} sequences of {length} steps, {self.outputs} labels"

    @property
    def baseline(self) -> float:
        shares = self.split[1].bincount() / len(self.split[1])
        return float(-(shares * shares.log()).sum())

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(len(self.split[1]) / self.batch_size)

    @cached_property
    def contents(self) -> dict[str, str]:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {f"contents of {self.path.name}": f"sha256 {digest[:16]}"}

    @cached_property
    def split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training sequences ``(L, N, features)`` and labels, held-out ones and theirs."""
        sequences, labels = read_sequences(self.path)
        words = sorted(set(labels))
        rare = [word for word in words if labels.count(word) < 5]
        if len(words) < 2 or rare:
            raise DataError(
                f"{self.path} needs two labels or more and five sequences of each; it has "
                + ", ".join(f"{labels.count(word)} of {word!r}" for word in words)
            )
        classes = torch.tensor([words.index(word) for word in labels])
        rows = torch.arange(len(labels))
        kept, kept_y, held, held_y = stratified(rows, classes, share=_HELD_OUT)
        steps = torch.cat([sequences[row] for row in kept.tolist()])
        mean, scale = steps.mean(0), steps.std(0).clamp_min(torch.finfo(steps.dtype).tiny)
        length = max(map(len, sequences))

        def padded(rows: Tensor) -> Tensor:
            batch = torch.zeros(length, len(rows), steps.shape[1])
            for column, row in enumerate(rows.tolist()):
                batch[length - len(sequences[row]) :, column] = (sequences[row] - mean) / scale
            return batch

        return padded(kept), kept_y, padded(held), held_y

    def train_batches(self, generator: torch.Generator) -> Iterator[Batch]:
        inputs, labels = self.split[:2]
        for rows in torch.randperm(len(labels), generator=generator).split(self.batch_size):
            yield inputs[:, rows], labels[rows]

    def test_batch(self) -> Batch:
        return self.split[2], self.split[3]
