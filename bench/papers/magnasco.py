"""Magnasco: the memory of a recurrent convolution on a lattice."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.suite.page import figure, short, table
from riemann_unn.demo.convrnn import build, norms, read_out
from riemann_unn.demo.images import PictureImages
from riemann_unn.demo.training import CheckpointError, train
from riemann_unn.linalg import conv_adjoint, conv_exp, conv_singular_values, conv_skew
from riemann_unn.nn import ConvRNN, PhaseSigmoid

from .experiment import Claim, Experiment, Options, Place, Plan, Report, Result, Run, median

__all__ = ["EXPERIMENTS", "KERNELS"]

KERNELS = {
    "unitary": "unitary kernel",
    "same": "same first kernel, no constraint",
    "default": "default kernel of 3x3 sites",
}
_WAVES = "no training"
_CHUNK = 25
_DRIFT = 1e-4

_SETTING = """The paper's network: a lattice with one complex number at each site, turned at every
step by a unitary convolution kernel as large as the lattice, then a nonlinearity that keeps the
phase. Pictures are its first state. Without training, kernels come from the convolutional
exponential of a random anti-Hermitian kernel on 3x3 sites, with and without the paper's sigmoid,
z / sqrt(1 + |z|^2), and from its first-order approximation. Then networks with modReLU train for
{epochs} epoch to tell the class {train_steps} steps after the picture, and run on to {steps}: Adam
at {lr}, the kernel at 1/32 of it, gradients clipped to norm 1, ProjUNN-T for the unitary kernel. A
ridge regression from the states of {read} training pictures reads class and pixels of {read} test
pictures at some of the steps. The three networks differ in the kernel alone."""
_LEARNED = ""


def runs(plan: Plan) -> list[Run]:
    steps = plan.pick(200, 1000)
    common = {"data": plan.data, "steps": steps}
    found = [Run(_WAVES, {**common, "kernel": _WAVES, "pictures": 32}, 0.2)]
    for seed in range(plan.pick(1, plan.seeds)):
        for kernel in KERNELS:
            options = {
                **common,
                "kernel": kernel,
                "seed": seed,
                "channels": 1,
                "train_steps": plan.pick(10, 50),
                "epochs": 1,
                "batch": 64,
                "lr": 1e-2,
                "rank": 4,
                "read": plan.pick(200, 600, 4000),
            }
            minutes = plan.pick(0.2, 1.2, 8.0)
            found.append(Run(f"{KERNELS[kernel]}, seed {seed}", options, minutes))
    return found


def train_lattice(options: Options, place: Place) -> Result:
    """Train one network and let it run on, or look at kernels that were not trained.

    Args:
        options: Of the run.
        place: Where it works.
    """
    task = PictureImages(options["data"], batch_size=options.get("batch", 64), standardized=True)
    if options["kernel"] == _WAVES:
        return _waves(task, options["steps"], options["pictures"])
    return _memory(task, options, place)


def _memory(task: PictureImages, options: Options, place: Place) -> Result:
    words = {"complex": True, "nonlinearity": "modrelu", **options}
    learner = build(options["kernel"], argparse.Namespace(**words), task.size)
    steps, epochs = options["steps"], options["epochs"]
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
            return _memory(task, options, place)
        place.tell(0.5 * epoch / epochs, f"epoch {epoch}/{epochs}")
    marks = sorted({0, steps // 10, steps // 2, steps})
    model, history = learner.model, learner.history
    images, _ = task.test_batch()
    series = norms(model, images[:32], steps)
    trace = read_out(model, task, marks, limit=options["read"])
    kernel = model.get_parameter("rnn.kernel").detach()
    values = conv_singular_values(kernel, ndim=2).double()
    bare = _series(kernel, images[:32], steps)
    return {
        "pictures": task.title,
        "parameters": learner.parameters,
        "trained": history.test_accuracy[-1],
        "off": float((values - 1).abs().max()),
        "singular": [float(values.min()), float(values.max())],
        "norm": (series / series[0]).tolist(),
        "bare": float((bare / bare[0] - 1).abs().max()),
        "accuracy": list(trace.accuracy.values()),
        "explained": list(trace.explained.values()),
        "marks": marks,
        "seen": _rounded(images[:4, 0]),
        "read": [_rounded(trace.pictures[mark]) for mark in marks],
    }


def _rounded(pictures: Tensor) -> list[list[list[float]]]:
    values: list[list[list[float]]] = pictures.double().round(decimals=2).tolist()
    return values


def skew_generator(size: tuple[int, ...], *, seed: int, dtype: torch.dtype) -> Tensor:
    """A random skew-Hermitian kernel of one channel on 3 by 3 sites, as large as a lattice.

    Args:
        size: Of the lattice.
        seed: Of its values.
        dtype: Of its values.
    """
    source = torch.Generator().manual_seed(seed)
    kernel = torch.zeros(1, 1, *size, dtype=dtype)
    kernel[..., :3, :3] = torch.randn(1, 1, 3, 3, dtype=dtype, generator=source)
    skew: Tensor = conv_skew(kernel.roll((-1, -1), (-2, -1)))
    return skew


def lattice_of(kernel: Tensor, activation: nn.Module | None = None) -> ConvRNN:
    """A recurrent network with a given kernel, no bias, and some activation or none.

    Args:
        kernel: As large as the lattice.
        activation: Applied at every step.
    """
    net = ConvRNN(1, len(kernel), kernel.shape[2:], None, bias=False, dtype=kernel.dtype)
    with torch.no_grad():
        net.kernel.copy_(kernel)
    if activation is not None:
        net.activation = activation
    return net


def _series(
    kernel: Tensor, images: Tensor, steps: int, activation: nn.Module | None = None
) -> Tensor:
    """Mean norm of the state at steps 0 to ``steps``, pictures being the first state."""
    return _run(lattice_of(kernel, activation), _first(kernel, images), steps)[0]


def _first(kernel: Tensor, images: Tensor) -> Tensor:
    return images.to(kernel.dtype).expand(-1, len(kernel), -1, -1)


@torch.no_grad()
def _run(net: ConvRNN, state: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    found = [_norm(state).unsqueeze(0)]
    for start in range(0, steps, _CHUNK):
        states = net.evolve(state, steps=min(_CHUNK, steps - start))
        found.append(torch.stack([_norm(one) for one in states]))
        state = states[-1]
    return torch.cat(found), state


def _norm(state: Tensor) -> Tensor:
    return torch.linalg.vector_norm(state.flatten(1).cdouble(), dim=1).mean()


def _waves(task: PictureImages, steps: int, count: int) -> Result:
    images = task.test_batch()[0][:count]
    generator = skew_generator(task.size, seed=0, dtype=torch.complex64)
    kernel = conv_exp(generator)
    straight, last = _run(lattice_of(kernel), _first(kernel, images), steps)
    _, back = _run(lattice_of(conv_adjoint(kernel)), last, steps)
    first = _first(kernel, images)
    euler = generator.clone()
    euler[0, 0, 0, 0] += 1
    series = {
        "conv_exp": straight,
        "conv_exp and the sigmoid": _series(kernel, images, steps, PhaseSigmoid()),
        "first order, 1 + A": _series(euler, images, steps),
    }
    return {
        "pictures": task.title,
        "norms": {name: (norm / norm[0]).tolist() for name, norm in series.items()},
        "drift": float((straight / straight[0] - 1).abs().max()),
        "values": [float(x) for x in conv_singular_values(kernel, ndim=2).aminmax()],
        "returned": float((back - first).norm() / first.norm()),
    }


def report(plan: Plan, results: Mapping[str, Result], images: Path) -> Report:
    """The section: norms over a thousand steps, and what is left of a picture.

    Args:
        plan: What was run.
        results: By run.
        images: Folder for the picture.
    """
    from .magnasco_plots import save_lattice  # matplotlib takes a second to import

    lines, claims = [_SETTING.format(**runs(plan)[-1].options)], []
    waves = results.get(_WAVES)
    found = {
        kernel: [
            results[run.name]
            for run in runs(plan)
            if run.options["kernel"] == kernel and run.name in results
        ]
        for kernel in KERNELS
    }
    found = {kernel: own for kernel, own in found.items() if own}
    if waves is not None:
        lines += ["", *_wave_lines(waves)]
        claims += _wave_claims(waves)
    if found:
        lines += ["", *_memory_table(found)]
    if "unitary" in found:
        claims.append(_memory_claim(found))
    if waves is not None and found:
        save_lattice(images / "papers_lattice.png", waves, found, KERNELS)
        lines += figure("papers_lattice.png", "Norms, accuracy, and pictures read after steps")
    return Report([*lines, "", _LEARNED], claims)


def _steps(result: Result) -> int:
    last: int = len(result["norms"]["conv_exp"]) - 1
    return last


def _wave_lines(waves: Result) -> list[str]:
    rows = [
        [name, short(norm[-1], 4), short(max(abs(value - 1) for value in norm))]
        for name, norm in waves["norms"].items()
    ]
    last = _steps(waves)
    return table(["untrained", f"norm after {last} steps, 1 at first", "farthest from 1"], rows)


def _wave_claims(waves: Result) -> list[Claim]:
    last = _steps(waves)
    setting = f"{waves['pictures']}, one complex number at each site, float32"
    return [
        Claim(
            "The convolutional exponential of an anti-Hermitian kernel keeps the norm",
            "exactly, by construction",
            f"norm within {short(waves['drift'])} of its first value over {last} steps; undone by "
            f"the adjoint kernel to {short(waves['returned'])} ({setting})",
            f"within {short(_DRIFT, 1)}",
            waves["drift"] <= _DRIFT,
        ),
    ]


def _memory_table(found: Mapping[str, Sequence[Result]]) -> list[str]:
    marks = next(iter(found.values()))[0]["marks"]
    head = ["trained", *(f"class read at step {mark} (%)" for mark in marks)]
    head += ["pixels recovered at the last (%)", "norm at the last, 1 at first"]
    head += ["singular values", "norm without thresholds drifts by"]
    rows = []
    for kernel, own in found.items():
        told = [100 * median(run["accuracy"][i] for run in own) for i in range(len(marks))]
        low, high = min(run["singular"][0] for run in own), max(run["singular"][1] for run in own)
        off = max(run["off"] for run in own)
        near = f"within {short(off)} of 1"
        rows.append(
            [
                KERNELS[kernel],
                *(f"{value:.1f}" for value in told),
                f"{100 * median(run['explained'][-1] for run in own):.1f}",
                short(median(run["norm"][-1] for run in own)),
                near if kernel == "unitary" else f"{short(low)} to {short(high)}",
                short(max(run["bare"] for run in own)),
            ]
        )
    return table(head, rows)


def _memory_claim(found: Mapping[str, Sequence[Result]]) -> Claim:
    def told(kernel: str, i: int) -> str:
        return f"{100 * median(run['accuracy'][i] for run in found[kernel]):.1f}"

    one = found["unitary"][0]
    last = one["marks"][-1]
    others = ", ".join(
        f"{KERNELS[kernel]} {told(kernel, 0)} and {told(kernel, -1)} %"
        for kernel in found
        if kernel != "unitary"
    )
    runs_ = f"median of {len(found['unitary'])} seeds" if len(found["unitary"]) > 1 else "one seed"
    return Claim(
        f"A picture is remembered for {last} steps without input",
        "in words: powers of the kernel neither explode nor decay",
        f"class read from the state at step 0 and {last}: {told('unitary', 0)} and "
        f"{told('unitary', -1)} % ({one['pictures']}; {runs_}); {others}",
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "lattice",
        "magnasco",
        "The memory of a lattice",
        runs,
        train_lattice,
        report,
    ),
)
