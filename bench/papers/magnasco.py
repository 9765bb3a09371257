"""Magnasco: the memory of a recurrent convolution on a lattice."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.suite.page import figure, short, table
from riemann_unn.demo.convrnn import ImageMemory, Trace, build, norms, read_out
from riemann_unn.demo.images import PictureImages
from riemann_unn.demo.training import CheckpointError, train
from riemann_unn.linalg import conv_adjoint, conv_exp, conv_singular_values, conv_skew

from .experiment import Claim, Experiment, Options, Place, Plan, Report, Result, Run, median

__all__ = ["EXPERIMENTS", "KERNELS", "anti_hermitian", "lattice_of"]

KERNELS = {
    "unitary": "unitary kernel",
    "same": "same first kernel, no constraint",
    "default": "default kernel of 3x3 sites",
    "sigmoid": "conv_exp and the paper's sigmoid, not trained",
}
_WAVES = "norms"
_CHUNK = 25
_PICTURES = 32
_DRIFT = 1e-4
_SPREAD = 0.1

_SETTING = """The paper's network: a lattice with one complex number at each site, turned at every
step by a unitary convolution kernel as large as the lattice, then the sigmoid z / sqrt(1 + |z|²),
which keeps the phase. A picture is its first state. Without training, kernels come from the
convolutional exponential of a random anti-Hermitian kernel A on 3x3 sites, with and without the
sigmoid, and from its first-order approximation, 1 + A. Then networks train for {epochs} epoch to
tell the class {train_steps} steps after the picture, and run on to {steps} steps: Adam at {lr}, the
kernel at 1/32 of it, gradients clipped to norm 1, ProjUNN-T for the unitary kernel; the three
differ in the kernel alone. Ridge regressions from the states of {read} training pictures read class
and pixels of {read} test pictures at some of the steps, with penalties of {class_ridge:g} (chosen
on validation pictures) and 0.001; states of any size are read, since they are scaled first."""
_LEARNED = """What was learned. A nonlinearity that is used a thousand times must have nothing to
wear down the state with: with modReLU, its thresholds trained over 50 steps at a thousandth of the
rate, the unitary network still kept 98 % of the pixels at step 100, but at step 1000 the thresholds
had eaten the state to 6 % of its norm and no pixel could be read. The sigmoid has no parameters,
and its state falls with one over the root of time whatever the kernel learns. A small penalty of
the readout, right for pixels, is wrong for classes with so few pictures (50 against 79 % at step
0). Rounding makes a norm that should be kept drift in proportion to the steps.
The sigmoid took modReLU's place, and the readout's penalty for classes was chosen anew on
validation pictures, after the figures of modReLU above had been seen on the test pictures. The
kernels without a constraint have the rates of the unitary one; no others were tried."""


def runs(plan: Plan) -> list[Run]:
    common = {
        "data": plan.data,
        "steps": plan.pick(200, 1000),
        "read": plan.pick(100, 400, 4000),
        "class_ridge": 1.0,
    }
    minutes = plan.pick(0.1, 0.8, 8.0)
    found = [Run(_WAVES, {**common, "kernel": _WAVES, "seed": 0}, 0.2)]
    found.append(Run(KERNELS["sigmoid"], {**common, "kernel": "sigmoid", "seed": 0}, minutes))
    training = {
        "channels": 1,
        "nonlinearity": "phase_sigmoid",
        "train_steps": plan.pick(10, 50),
        "epochs": 1,
        "batch": 64,
        "lr": 1e-2,
        "rank": 4,
    }
    for seed in range(plan.pick(1, plan.seeds)):
        for kernel in ("unitary", "same", "default"):
            options = {**common, "kernel": kernel, "seed": seed, **training}
            found.append(Run(f"{KERNELS[kernel]}, seed {seed}", options, minutes))
    return found


def train_lattice(options: Options, place: Place) -> Result:
    """Train one network and read out its states over many steps, or measure untrained kernels.

    Args:
        options: Of the run.
        place: Where it works.
    """
    task = PictureImages(options["data"], batch_size=options.get("batch", 64), standardized=True)
    if options["kernel"] == _WAVES:
        return _waves(task, options)
    if options["kernel"] == "sigmoid":
        kernel = conv_exp(anti_hermitian(task.size, seed=options["seed"]))
        return _memory(lattice_of(kernel, "phase_sigmoid"), task, options)
    learner = build(options["kernel"], _namespace(options), task.size)
    epochs = options["epochs"]
    for epoch in range(epochs + 1):
        try:
            train(
                task,
                [learner],
                epochs=epoch,
                seed=options["seed"],
                checkpoint=place.checkpoint,
                settings=options,
                quiet=True,
            )
        except CheckpointError:  # of a run with other options
            place.checkpoint.unlink()
            return train_lattice(options, place)
        place.tell(0.4 * epoch / epochs, f"epoch {epoch}/{epochs}")
    assert isinstance(learner.model, ImageMemory)
    trained = learner.history.test_accuracy[-1]
    return {"trained": trained, **_memory(learner.model, task, options)}


def _namespace(options: Options) -> argparse.Namespace:
    words: dict[str, Any] = {"complex": True, **options}
    return argparse.Namespace(**words)


def anti_hermitian(size: tuple[int, ...], *, seed: int) -> Tensor:
    """A random anti-Hermitian kernel of one channel on 3 by 3 sites, as large as a lattice.

    Args:
        size: Of the lattice.
        seed: Of its values.
    """
    source = torch.Generator().manual_seed(seed)
    kernel = torch.zeros(1, 1, *size, dtype=torch.complex64)
    window = torch.randn(1, 1, 3, 3, dtype=kernel.dtype, generator=source)
    kernel[..., :3, :3] = _SPREAD * window
    skew: Tensor = conv_skew(kernel.roll((-1, -1), (-2, -1)))
    return skew


def lattice_of(kernel: Tensor, nonlinearity: str = "identity") -> ImageMemory:
    """A network of one complex channel with a given kernel, whose first state is the picture.

    Args:
        kernel: Of one channel, as large as the lattice.
        nonlinearity: Of the recurrence.
    """
    height, width = kernel.shape[2:]
    net = ImageMemory(
        1, steps=1, nonlinearity=nonlinearity, size=(height, width), dtype=torch.complex64
    )
    with torch.no_grad():
        net.rnn.kernel.copy_(kernel)
        net.rnn.weight_ih.fill_(1)
    return net


def _memory(net: ImageMemory, task: PictureImages, options: Options) -> Result:
    """The norms of the states, and the readouts."""
    steps = options["steps"]
    marks = sorted({0, steps // 10, steps // 2, steps})
    images, _ = task.test_batch()
    series = norms(net, images[:_PICTURES], steps)
    trace: Trace = read_out(
        net, task, marks, limit=options["read"], class_ridge=options["class_ridge"]
    )
    kernel = net.rnn.kernel.detach()
    values = conv_singular_values(kernel, ndim=2).double()
    bare = norms(lattice_of(kernel), images[:_PICTURES], steps)
    return {
        "pictures": task.title,
        "singular": [float(values.min()), float(values.max())],
        "norm": float(series[-1] / series[0]),
        "drift": _drift(bare),
        "marks": marks,
        "accuracy": list(trace.accuracy.values()),
        "explained": list(trace.explained.values()),
        "seen": _rounded(images[:4, 0]),
        "read": [_rounded(trace.pictures[mark]) for mark in marks],
    }


def _drift(series: Tensor) -> float:
    return float((series / series[0] - 1).abs().max())


def _rounded(pictures: Tensor) -> list[list[list[float]]]:
    values: list[list[list[float]]] = pictures.double().round(decimals=2).tolist()
    return values


def _waves(task: PictureImages, options: Options) -> Result:
    steps = options["steps"]
    images = task.test_batch()[0][:_PICTURES]
    generator = anti_hermitian(task.size, seed=options["seed"])
    kernel = conv_exp(generator)
    first_order = generator.clone()
    first_order[0, 0, 0, 0] += 1
    nets = {
        "conv_exp(A)": lattice_of(kernel),
        "conv_exp(A) and the sigmoid": lattice_of(kernel, "phase_sigmoid"),
        "first order, 1 + A": lattice_of(first_order),
    }
    series = {name: norms(net, images, steps) for name, net in nets.items()}
    ours = nets["conv_exp(A)"]
    first = ours.first(images).detach()
    there = _after(ours, first, steps)
    back = _after(lattice_of(conv_adjoint(kernel)), there, steps)
    return {
        "pictures": task.title,
        "norms": {name: (one / one[0]).tolist() for name, one in series.items()},
        "drift": _drift(series["conv_exp(A)"]),
        "values": [float(x) for x in conv_singular_values(kernel, ndim=2).aminmax()],
        "returned": float((back - first).norm() / first.norm()),
    }


@torch.no_grad()
def _after(net: ImageMemory, state: Tensor, steps: int) -> Tensor:
    for start in range(0, steps, _CHUNK):
        state = net.rnn.evolve(state, steps=min(_CHUNK, steps - start))[-1]
    return state


def report(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    """The section: norms over a thousand steps, and readouts.

    Args:
        plan: What was run.
        results: By run.
        images: Folder for the picture.
    """
    from .magnasco_plots import save_lattice  # matplotlib takes a second to import

    planned = runs(plan)
    lines, claims = [_SETTING.format(**planned[-1].options)], []
    waves = results.get(_WAVES)
    found: dict[str, list[Result]] = {}
    for run in planned:
        if run.name in results and run.name != _WAVES:
            found.setdefault(run.options["kernel"], []).append(results[run.name])
    found = {kernel: found[kernel] for kernel in KERNELS if kernel in found}
    if waves is not None:
        lines += ["", *_norm_table(waves)]
        claims.append(_norm_claim(waves))
    if found:
        lines += ["", *_memory_table(found)]
    if "unitary" in found:
        claims.append(_memory_claim(found))
    if waves is not None and found:
        save_lattice(images / "papers_lattice.png", waves, found, KERNELS)
        lines += figure("papers_lattice.png", "Norms, classes and pictures read from the state")
    return Report([*lines, "", _LEARNED], claims)


def _norm_table(waves: Result) -> list[str]:
    last = len(waves["norms"]["conv_exp(A)"]) - 1
    rows = [
        [name, f"{norm[-1]:.6f}" if 0.01 < norm[-1] < 100 else short(norm[-1])]
        for name, norm in waves["norms"].items()
    ]
    return table(["kernel, not trained", f"norm after {last} steps, 1 at first"], rows)


def _norm_claim(waves: Result) -> Claim:
    last = len(waves["norms"]["conv_exp(A)"]) - 1
    return Claim(
        "The convolutional exponential of an anti-Hermitian kernel keeps the norm",
        "exactly, by construction",
        f"28x28 sites, float32: norm within {short(waves['drift'])} of its first value over {last} "
        f"steps; undone by the adjoint kernel to {short(waves['returned'])}",
        f"within {short(_DRIFT, 1)}",
        waves["drift"] <= _DRIFT,
    )


def _memory_table(found: Mapping[str, Sequence[Result]]) -> list[str]:
    marks = next(iter(found.values()))[0]["marks"]
    head = ["kernel", "test accuracy, trained (%)", *(f"read at step {mark} (%)" for mark in marks)]
    head += [f"pixels recovered at {marks[-1]} (%)", f"norm at {marks[-1]}, 1 at first"]
    head += ["singular values", "norm without nonlinearity, off by"]
    rows = []
    for kernel, own in found.items():
        low, high = min(run["singular"][0] for run in own), max(run["singular"][1] for run in own)
        off, drift = max(1 - low, high - 1), max(run["drift"] for run in own)
        trained = [100 * run["trained"] for run in own if "trained" in run]
        told = [100 * median(run["accuracy"][i] for run in own) for i in range(len(marks))]
        rows.append(
            [
                KERNELS[kernel],
                f"{median(trained):.1f}" if trained else "-",
                *(f"{value:.1f}" for value in told),
                f"{100 * median(run['explained'][-1] for run in own):.1f}",
                short(median(run["norm"] for run in own)),
                f"within {short(off)} of 1" if off < _DRIFT else f"{short(low)} to {short(high)}",
                short(drift) if math.isfinite(drift) else "overflows",
            ]
        )
    return table(head, rows)


def _memory_claim(found: Mapping[str, Sequence[Result]]) -> Claim:
    def told(kernel: str) -> str:
        first, last = (100 * median(run["accuracy"][i] for run in found[kernel]) for i in (0, -1))
        return f"{KERNELS[kernel]} {first:.1f} and {last:.1f} %"

    own = found["unitary"]
    last = own[0]["marks"][-1]
    count = f"median of {len(own)} seeds" if len(own) > 1 else "one seed"
    return Claim(
        f"A picture is remembered for {last} steps without input",
        "in words: powers of a unitary kernel neither explode nor decay",
        f"class read from the state at steps 0 and {last}: "
        f"{'; '.join(told(kernel) for kernel in found)} ({own[0]['pictures']}; {count})",
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment("lattice", "magnasco", "The memory of a lattice", runs, train_lattice, report),
)
