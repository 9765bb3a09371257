"""Three tests of long memory, each an object that makes its own batches.

A batch is ``(inputs, targets)`` with the steps first: inputs are ``(L, N, features)``. A task says
which states its answer is read from (the last one, or every one), how a loss and an accuracy follow
from the answers, and what loss a model without memory can reach.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .data import Images, images

__all__ = ["ORDERS", "TASKS", "Adding", "Batch", "Copy", "Digits", "Pictures", "Task"]

Batch = tuple[Tensor, Tensor]

ORDERS = {
    "pixels": "pixel by pixel, row after row",
    "permuted": "pixel by pixel, in a fixed random order",
    "rows": "row by row",
}
"""The orders in which pictures are read, in words."""

_TEST_SEED = 20_220_316  # held-out synthetic sequences are the same whatever the run's seed


class Task(ABC):
    """A task: its data, model settings, loss and accuracy.

    Attributes:
        name: Word on the command line.
        every_step: Whether there is an answer at every step, or only after the last.
        hidden: Default size of the recurrent state.
        head_width: Width of the head's hidden layer; 0 for a linear head.
        nonlinearity: Nonlinearity of the orthogonal RNN; a complex one always has modReLU.
        init: Its initial recurrence.
        base: Its base optimizer.
        lr: Default learning rate of the orthogonal RNN.
        lr_decay: Factor on it after every epoch.
        weight_decay: Weight decay of its unconstrained parameters.
        score: What ``accuracy`` measures, in words.
    """

    name: ClassVar[str]
    every_step: ClassVar[bool] = False
    hidden: ClassVar[int]
    head_width: ClassVar[int] = 0
    nonlinearity: ClassVar[str] = "modrelu"
    init: ClassVar[str] = "henaff"
    base: ClassVar[type[torch.optim.Optimizer]] = torch.optim.RMSprop
    lr: ClassVar[float]
    lr_decay: ClassVar[float] = 1.0
    weight_decay: ClassVar[float] = 0.0
    score: ClassVar[str]

    @property
    @abstractmethod
    def features(self) -> int:
        """Size of one input step."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Size of the answer."""

    @property
    @abstractmethod
    def title(self) -> str:
        """One line for a table or a figure."""

    @property
    @abstractmethod
    def baseline(self) -> float:
        """Loss of the best model without memory."""

    @property
    @abstractmethod
    def batches_per_epoch(self) -> int:
        """How many batches ``train_batches`` yields."""

    @property
    def contents(self) -> Mapping[str, str]:
        """Digests of the files that it reads, by name, for the settings of a checkpoint."""
        return {}

    @abstractmethod
    def train_batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch of training batches, drawn from ``generator`` alone.

        Args:
            generator: Source of order and data.
        """

    @abstractmethod
    def test_batch(self) -> Batch:
        """The held-out data."""

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of ``answers`` ``(..., outputs)`` against classes ``(...)``.

        Args:
            answers: The model's logits.
            targets: The right classes.
        """
        return functional.cross_entropy(answers.flatten(0, -2), targets.flatten())

    def accuracy(self, answers: Tensor, targets: Tensor) -> float:
        """Share of right answers.

        Args:
            answers: The model's logits.
            targets: The right classes.
        """
        return (answers.argmax(-1) == targets).double().mean().item()


@dataclass(frozen=True)
class Pictures(Task):
    """Pictures of ten classes, read pixel by pixel or row by row and then classified.

    Pixels are shifted and scaled so that those of the training pictures have mean 0 and variance 1,
    and in every epoch four in ten training pictures, drawn anew, are moved by one pixel up, down,
    left or right.

    With ``validation`` a fifth of the training pictures is held out in place of the test pictures,
    as for choosing settings.

    Args:
        source: Where the pictures come from, in words of :mod:`riemann_unn.demo.data`.
        order: ``"pixels"``, one after the other, row after row; ``"permuted"``, the pixels in one
            fixed random order, which takes locality away; or ``"rows"``, a whole row at each step.
        validation: Hold out training pictures in place of the test pictures.
        seed: Seed of the pixel order.
        batch_size: Pictures per training batch.

    Raises:
        ValueError: If there is no such order.
    """

    name: ClassVar[str] = "digits"
    hidden: ClassVar[int] = 170
    head_width: ClassVar[int] = 64
    lr: ClassVar[float] = 2e-3
    lr_decay: ClassVar[float] = 0.9
    weight_decay: ClassVar[float] = 1e-3
    score: ClassVar[str] = "accuracy"

    source: str = "auto"
    order: str = "pixels"
    validation: bool = False
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")

    @property
    def title(self) -> str:
        held = "validation" if self.validation else "test"
        count = len(self.split[3])
        return f"{self._words}, {ORDERS[self.order]} ({count:,} {held} images)"

    @property
    def _words(self) -> str:
        return self._found.name

    @cached_property
    def _found(self) -> Images:
        return images(self.source, validation=self.validation)

    @property
    def features(self) -> int:
        return self._found.size[1] if self.order == "rows" else 1

    @property
    def outputs(self) -> int:
        return self._found.classes

    @property
    def baseline(self) -> float:
        return math.log(self.outputs)

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(len(self.split[1]) / self.batch_size)

    @cached_property
    def split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images and classes, held-out ones; images ``(N, height, width)``, scaled."""
        found = self._found
        pixels = found.train.double().numpy()
        mean, deviation = float(pixels.mean()), float(pixels.std())
        train, test = ((part - mean) / deviation for part in (found.train, found.test))
        return train, found.train_classes, test, found.test_classes

    def _sequences(self, images: Tensor) -> Tensor:
        if self.order == "rows":
            return images.transpose(0, 1)
        pixels = images.flatten(1).t().unsqueeze(-1)
        if self.order == "pixels":
            return pixels
        return pixels[
            torch.randperm(len(pixels), generator=torch.Generator().manual_seed(self.seed))
        ]

    def train_batches(self, generator: torch.Generator) -> Iterator[Batch]:
        images, classes = self.split[:2]
        for rows in torch.randperm(len(classes), generator=generator).split(self.batch_size):
            yield self._sequences(_shifted(images[rows], generator)), classes[rows]

    def test_batch(self) -> Batch:
        return self._sequences(self.split[2]), self.split[3]


@dataclass(frozen=True)
class Digits(Pictures):
    """Handwritten digits read one pixel at a time: 64 steps, then one of ten classes.

    The 1,797 8x8 images that ship with scikit-learn, split once and for all, stratified by class,
    into 1,437 to train and 360 to test, or with ``validation`` into 1,149 and 288 of the former:
    the demo's hyperparameters, these among them, were chosen that way.
    """

    hidden: ClassVar[int] = 128

    source: str = "digits"
    batch_size: int = 32

    @property
    def _words(self) -> str:
        return "handwritten digits"


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move a tenth of the images by one pixel in each of the four directions."""
    background = images.min().item()
    padded = functional.pad(images, (1, 1, 1, 1), value=background)
    draw = torch.rand(len(images), generator=generator)
    moved = images.clone()
    height, width = images.shape[1:]
    for tenth, (down, right) in enumerate(((0, 1), (1, 0), (1, 2), (2, 1))):
        rows = (draw * 10).floor() == tenth
        moved[rows] = padded[rows, down : down + height, right : right + width]
    return moved


@dataclass(frozen=True)
class Copy(Task):
    """Copying memory: ten symbols out of eight, a long blank, a marker, then the ten symbols again.

    The input is 10 symbols (classes 1 to 8), ``delay - 1`` blanks (class 0), the marker (class 9)
    and 10 blanks, one-hot; the target is blank until the marker has passed, then the 10 symbols.
    Without memory the best is to guess each of the ten: ``10 log 8 / (delay + 20)`` averaged over
    the steps.

    Args:
        delay: Steps between the last symbol and the first answer.
        batch_size: Sequences per batch.
        batches: Batches per epoch, all of fresh sequences.

    Reference:
        Arjovsky, Shah, Bengio, "Unitary Evolution Recurrent Neural Networks", ICML 2016, copying
        memory.
    """

    name: ClassVar[str] = "copy"
    features: ClassVar[int] = 10
    outputs: ClassVar[int] = 9
    every_step: ClassVar[bool] = True
    hidden: ClassVar[int] = 190
    lr: ClassVar[float] = 7e-4
    score: ClassVar[str] = "recall"

    delay: int = 200
    batch_size: int = 128
    batches: int = 20

    @property
    def title(self) -> str:
        return f"copying memory: recall ten symbols after {self.delay} steps"

    @property
    def baseline(self) -> float:
        return 10 * math.log(8) / (self.delay + 20)

    @property
    def batches_per_epoch(self) -> int:
        return self.batches

    def _batch(self, generator: torch.Generator) -> Batch:
        symbols = torch.randint(1, 9, (10, self.batch_size), generator=generator)
        classes = torch.zeros(self.delay + 20, self.batch_size, dtype=torch.long)
        classes[:10] = symbols
        classes[self.delay + 9] = 9
        targets = torch.zeros_like(classes)
        targets[-10:] = symbols
        return functional.one_hot(classes, self.features).float(), targets

    def train_batches(self, generator: torch.Generator) -> Iterator[Batch]:
        for _ in range(self.batches):
            yield self._batch(generator)

    def test_batch(self) -> Batch:
        return self._batch(torch.Generator().manual_seed(_TEST_SEED))

    def accuracy(self, answers: Tensor, targets: Tensor) -> float:
        return super().accuracy(answers[-10:], targets[-10:])


@dataclass(frozen=True)
class Adding(Task):
    """Adding problem: the sum of the two marked numbers in a long sequence.

    Each step carries a number from U(0, 1) and a mark, which is 1 at one step of either half and 0
    elsewhere. Without memory the best is to answer 1: the variance of the sum of two uniforms, 1/6.
    Selecting marked numbers needs a threshold on the input, so the orthogonal RNN has ReLU here:
        modReLU's threshold would change the stored numbers at every step.

    Args:
        length: Number of steps.
        batch_size: Sequences per batch.
        batches: Batches per epoch, all of fresh sequences.

    Reference:
        Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 1997, experiment 4.
    """

    name: ClassVar[str] = "adding"
    features: ClassVar[int] = 2
    outputs: ClassVar[int] = 1
    hidden: ClassVar[int] = 128
    nonlinearity: ClassVar[str] = "relu"
    init: ClassVar[str] = "cayley"
    base: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam
    lr: ClassVar[float] = 3e-3
    score: ClassVar[str] = "right to 0.1"

    length: int = 100
    batch_size: int = 64
    batches: int = 50
    test_size: int = field(default=512, repr=False)

    @property
    def title(self) -> str:
        return f"adding problem: sum of two marked numbers out of {self.length}"

    @property
    def baseline(self) -> float:
        return 1 / 6

    @property
    def batches_per_epoch(self) -> int:
        return self.batches

    def _batch(self, size: int, generator: torch.Generator) -> Batch:
        numbers = torch.rand(self.length, size, generator=generator)
        half = self.length // 2
        first = torch.randint(0, half, (size,), generator=generator)
        second = torch.randint(half, self.length, (size,), generator=generator)
        rows = torch.arange(size)
        marks = torch.zeros_like(numbers)
        marks[first, rows] = marks[second, rows] = 1
        return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(0)

    def train_batches(self, generator: torch.Generator) -> Iterator[Batch]:
        for _ in range(self.batches):
            yield self._batch(self.batch_size, generator)

    def test_batch(self) -> Batch:
        return self._batch(self.test_size, torch.Generator().manual_seed(_TEST_SEED))

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(answers.squeeze(-1), targets)

    def accuracy(self, answers: Tensor, targets: Tensor) -> float:
        return ((answers.squeeze(-1) - targets).abs() < 0.1).double().mean().item()


TASKS: tuple[type[Task], ...] = (Digits, Copy, Adding)
"""Every task, the default first."""
