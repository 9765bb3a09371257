"""Pictures as images, for convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .tasks import Batch, Pictures

__all__ = ["DigitImages", "PictureImages"]


@dataclass(frozen=True)
class PictureImages(Pictures):
    """The pictures of :class:`Pictures`, as images ``(N, 1, height, width)``.

    Pixels run from 0, the background, to 1, or with ``standardized`` as in :class:`Pictures`, with
    mean 0 and variance 1. The loss is cross-entropy after ``margin`` was taken
    off the right logit, with logits over ``temperature``: it pushes the right logit to lead by the
    margin, which a 1-Lipschitz network only reaches by an equal distance of the inputs.

    Args:
        standardized: Give pixels mean 0 and variance 1.
        margin: Desired lead of the right logit.
        temperature: Logits are divided by it.
    """

    score: ClassVar[str] = "accuracy"

    standardized: bool = False
    margin: float = 0.0
    temperature: float = 1.0

    @property
    def title(self) -> str:
        held = "validation" if self.validation else "test"
        size = "x".join(str(n) for n in self.size)
        return f"{self._words}, {size} ({len(self.split[3]):,} {held} images)"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self._found.size

    @cached_property
    def _range(self) -> tuple[float, float]:
        """The values of a black and a white pixel in :class:`Pictures`."""
        inputs, _ = super().test_batch()
        return inputs.min().item(), inputs.max().item()

    def _images(self, sequences: Tensor) -> Tensor:
        images = sequences.squeeze(-1).t().reshape(-1, 1, *self.size)
        if self.standardized:
            return images
        black, white = self._range
        return (images - black) / (white - black)

    def train_batches(self, generator: torch.Generator) -> Iterator[Batch]:
        for inputs, classes in super().train_batches(generator):
            yield self._images(inputs), classes

    def test_batch(self) -> Batch:
        inputs, classes = super().test_batch()
        return self._images(inputs), classes

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        shifted = answers - self.margin * functional.one_hot(targets, self.outputs)
        return functional.cross_entropy(shifted / self.temperature, targets)


@dataclass(frozen=True)
class DigitImages(PictureImages):
    """The 1,797 digits of 8x8 pixels that ship with scikit-learn, as images."""

    source: str = "digits"
    batch_size: int = 32

    @property
    def _words(self) -> str:
        return "handwritten digits"
