"""Experiment: a 1-Lipschitz network and its certified accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..nn import certified_radius
from .cli import Number, Parser, add_common_options, add_validation, positive, positive_float
from .conv_models import adam, lipschitz_bound, lipschitz_net, projunn, singular_values
from .experiment import aligned, one_thread
from .images import DigitImages
from .models import Learner
from .training import train_by_options

__all__ = [
    "EPSILONS",
    "Results",
    "Robustness",
    "add_arguments",
    "attack",
    "robustness",
    "run",
    "table",
]

EPSILONS = (0.1, 0.25, 0.5, 0.75, 1.0)
_PLAIN_LR = 3e-3
_WIDTH = Number("an even whole number of at least 2", int, 2, 2**20, multiple_of=2)


@dataclass(frozen=True)
class Robustness:
    """The robustness of a network against perturbations of its input.

    Attributes:
        lipschitz: The Lipschitz bound of its certificates.
        radii: Certified radius of every held-out image, 0 where the answer is wrong.
        attacked: At each of :data:`EPSILONS` whether an image withstood the attack.
    """

    lipschitz: float
    radii: Tensor
    attacked: dict[float, Tensor]

    def certified(self, epsilon: float) -> float:
        """Share of images that no perturbation of this norm can make wrong.

        Args:
            epsilon: The norm.
        """
        return (self.radii > epsilon).double().mean().item()

    def withstood(self, epsilon: float) -> float:
        """Share of images that the attack did not make wrong.

        Args:
            epsilon: One of :data:`EPSILONS`.
        """
        return self.attacked[epsilon].double().mean().item()

    @property
    def violations(self) -> int:
        """Images certified at an epsilon where the attack nevertheless succeeded."""
        return sum(int(((self.radii > e) & ~held).sum()) for e, held in self.attacked.items())


@dataclass(frozen=True)
class Results:
    """The results of a run.

    Attributes:
        task: What was trained on.
        learners: The orthogonal network and the ordinary one.
        held: Their robustness.
        before: Singular values of their convolutions before training.
        after: And after it.
    """

    task: DigitImages
    learners: Sequence[Learner]
    held: Sequence[Robustness]
    before: Sequence[Sequence[Tensor]]
    after: Sequence[Sequence[Tensor]]


def add_arguments(parser: Parser, task: str) -> None:
    """Add the options of this experiment.

    Args:
        parser: Takes them.
        task: Its name.
    """
    add_common_options(parser, epochs=15)
    add_validation(parser)
    add = parser.add_argument
    add("--width", type=_WIDTH, default=8, help="channels of the first layer (default: 8)")
    add("--rank", type=positive, default=8, help="rank of the updates (default: 8)")
    add(
        "--lr", type=positive_float, default=1e-2, help="rate of the orthogonal net (default: 0.01)"
    )
    add("--margin", type=positive_float, default=0.7, help="lead that is asked for (default: 0.7)")
    add("--temperature", type=positive_float, default=0.1, help="of the loss (default: 0.1)")
    add("--attack-steps", type=positive, default=30, help="gradient steps of PGD (default: 30)")


def run(args: argparse.Namespace) -> Results:
    """Train both networks, certify and attack them.

    Args:
        args: As parsed with the options of :func:`add_arguments`.
    """
    task = DigitImages(validation=args.validation, margin=args.margin, temperature=args.temperature)
    torch.manual_seed(args.seed)
    model = lipschitz_net(args.width)
    orthogonal = projunn("orthogonal", model, lr=args.lr, rank=args.rank, epochs=args.epochs)
    torch.manual_seed(args.seed)
    model = lipschitz_net(args.width, plain=True)
    plain = adam("ordinary", model, lr=_PLAIN_LR, epochs=args.epochs)
    learners = (orthogonal, plain)
    print(f"Certified robustness on {task.title}: pixels 0 to 1, perturbations in the 2-norm")
    images, classes = task.test_batch()
    before = [singular_values(learner.model, images) for learner in learners]
    with one_thread():
        train_by_options(task, learners, args)
        held = [robustness(x.model, images, classes, steps=args.attack_steps) for x in learners]
    after = [singular_values(learner.model, images) for learner in learners]
    return Results(task, learners, held, before, after)


def robustness(model: nn.Module, images: Tensor, classes: Tensor, *, steps: int) -> Robustness:
    """Certify a network on held-out images, then attack it on the same.

    Args:
        model: The network.
        images: ``(N, 1, 8, 8)``.
        classes: The right classes.
        steps: Gradient steps of each attack.
    """
    model.eval()
    bound = lipschitz_bound(model, images)
    with torch.no_grad():
        logits = model(images).double()
    radii = certified_radius(logits, classes, lipschitz=bound)
    attacked = {
        e: model(attack(model, images, classes, epsilon=e, steps=steps)).argmax(-1) == classes
        for e in EPSILONS
    }
    return Robustness(bound, radii, attacked)


def attack(
    model: nn.Module, images: Tensor, classes: Tensor, *, epsilon: float, steps: int
) -> Tensor:
    """Projected gradient ascent on the margin, within a ball of the 2-norm around each image.

    Of all points on its way the one with the smallest margin is returned. Pixels may leave their
    range, which only helps the attack.

    Args:
        model: The network.
        images: ``(N, 1, 8, 8)``.
        classes: The right classes.
        epsilon: Radius of the ball.
        steps: Gradient steps, each of length 2.5 epsilon / steps.

    Reference:
        Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018).
    """
    rate = 2.5 * epsilon / steps
    delta = torch.zeros_like(images)
    worst, best = torch.full((len(images),), torch.inf), images
    for step in range(steps + 1):
        point = (images + delta).requires_grad_()
        margins = _margins(model(point), classes)
        better = margins.detach() < worst
        worst = torch.where(better, margins.detach(), worst)
        best = torch.where(better.reshape(-1, 1, 1, 1), point.detach(), best)
        if step == steps:
            break
        (slope,) = torch.autograd.grad(margins.sum(), point)
        delta = delta - rate * functional.normalize(slope.flatten(1)).reshape(slope.shape)
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)
        delta = delta * (epsilon / length).clamp_max(1)
    return best


def _margins(logits: Tensor, classes: Tensor) -> Tensor:
    right = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    return right - logits.scatter(1, classes.unsqueeze(1), -torch.inf).amax(1)


def table(results: Results) -> str:
    """The final numbers.

    Args:
        results: Of the run.
    """
    head = ["", "parameters", "accuracy", "Lipschitz bound", "seconds", "orthogonality error"]
    first = [[*head, "certified, yet fooled"]]
    second = [["accuracy at epsilon", "", *(f"{e:g}" for e in EPSILONS)]]
    for learner, one in zip(results.learners, results.held, strict=True):
        history = learner.history
        errors = history.orthogonality
        first.append(
            [
                learner.name,
                f"{learner.parameters:,}",
                f"{history.test_accuracy[-1]:.1%}",
                f"{one.lipschitz:.7g}",
                f"{sum(history.seconds):.1f}",
                f"{max(errors):.1e}" if errors else "-",
                str(one.violations),
            ]
        )
        second.append([learner.name, "certified", *(f"{one.certified(e):.1%}" for e in EPSILONS)])
        second.append(["", "under attack", *(f"{one.withstood(e):.1%}" for e in EPSILONS)])
    return f"{aligned(first)}\n\n{aligned(second)}"
