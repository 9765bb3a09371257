"""The digits as images, for the demos of convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .tasks import Batch, Digits

__all__ = ["DigitImages"]


@dataclass(frozen=True)
class DigitImages(Digits):
    """The images of :class:`Digits`, shifts included, whole: inputs are ``(N, 1, 8, 8)``.

    Pixels run from 0, the background, to 1, or with ``standardized`` as in :class:`Digits`, with
    mean 0 and variance 1. The loss is cross-entropy after ``margin`` was taken
    off the right logit, with logits over ``temperature``: it presses on until the right logit leads
    by the margin, which a network that cannot stretch distances only reaches by real distance.

    Args:
        standardized: Give pixels mean 0 and variance 1.
        margin: Lead that the right logit is asked for.
        temperature: Logits are divided by it.
    """

    score: ClassVar[str] = "accuracy"

    standardized: bool = False
    margin: float = 0.0
    temperature: float = 1.0

    @property
    def title(self) -> str:
        held = "validation" if self.validation else "test"
        return f"handwritten digits, 8x8 ({len(self.test_batch()[1])} {held} images)"

    @cached_property
    def _range(self) -> tuple[float, float]:
        """What a black and a white pixel are in the scale of :class:`Digits`."""
        inputs, _ = super().test_batch()
        return inputs.min().item(), inputs.max().item()

    def _images(self, sequences: Tensor) -> Tensor:
        images = sequences.squeeze(-1).t().reshape(-1, 1, 8, 8)
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
        asked = answers - self.margin * functional.one_hot(targets, self.outputs)
        return functional.cross_entropy(asked / self.temperature, targets)
