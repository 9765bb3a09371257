"""Low rank: replacing dense layers by low-rank ones of nearly the same function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn

from ...graph.program import unwrapped
from ...interruption import afterwards, no_grad, random_states, undoing
from ...linalg.precision import in_full_precision
from ..calibration import Batch, Forward, Split, batches_of
from ..calibration import split as hold_out
from ..progress import progress_bar
from ..snapshot import ModelSnapshot
from .activations import ActivationLike, activations, program_or_reason
from .drawing import Draw, drawn
from .effect import Effect
from .followers import Follower
from .plan import (
    Budget,
    Candidates,
    Curve,
    RankSpec,
    allocate,
    as_rank,
    by_pattern,
    candidates,
    rank_grid,
)
from .problem import Method, Problem
from .report import LowRank, LowRankReport
from .rows import Rows, gather

__all__ = ["low_rank_"]


def low_rank_(
    model: nn.Module,
    *,
    rank: RankSpec,
    layers: str | Iterable[str] = "*",
    method: Method = "function",
    activation: ActivationLike | Mapping[str, ActivationLike] | None = None,
    calibration: Any = None,
    forward: Forward | None = None,
    inputs: Any = None,
    draw: Draw | None = None,
    split: str = "channel",
    orthonormal: bool = False,
    refine: int | None = None,
    only_if_smaller: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> LowRankReport:
    r"""Replace linear and convolution layers by low-rank ones, in place, keeping their function.

    .. math:: \min_{A, B} \; E\,\|\varphi(Wx + \beta) - \varphi(ABx + \gamma)\|^2

    with the activation φ that follows the layer. Without ``calibration`` the inputs are
    :math:`x \sim N(0, I)` and γ = β; with it they are those that the layer sees, and γ is fitted
    too where the layer has a bias. Calibrated layers are replaced in the order in which they run,
    each fitted to give the original model's outputs from its current inputs, at one pass over the
    calibration inputs for each layer. A batch normalisation between layer and activation is
    included as the affine map of evaluation mode. Layers where the factors would save nothing, or
    that cannot be split, are not replaced; the report lists them with the reason. Layers are
    ``nn.Linear``, convolutions of one to three dimensions, transposed or not, and ``Conv1D`` of
    transformers; the activation that follows is found in the model's graph, by ``torch.export``. If
    anything fails the model is as it was. Build the optimizer afterwards: the factors are new
    parameters.

    Methods: ``"function"``, the objective above: row lengths in closed form for (leaky) ReLU on
    Gaussian inputs, by quadrature for other activations, from whitened factors on calibration
    inputs, then refined by L-BFGS. ``"linear"``: the same without φ, the factors that change
    the outputs least on the calibration inputs. ``"spectral"``: the truncated singular value
    decomposition, the baseline.

    Args:
        model: the model that holds the layers.
        rank: the rank: an int, or a fraction of the full rank; a dict of these by name pattern,
            which replaces only the layers it matches; or a :class:`~riemann_unn.init.Budget`
            that is spread over the layers.
        layers: glob pattern, or several, over names of modules.
        method: ``"function"``, ``"linear"`` or ``"spectral"``.
        activation: φ, a name or an elementwise function, for all layers or by name pattern;
            None (and layers without a pattern): found in the model's graph.
            A layer that no elementwise activation follows has φ(x) = x.
        calibration: inputs of the model: a tensor, a tuple of positional or a dict of keyword
            inputs, or a list or ``DataLoader`` of these; labels are left out
            (``docs/calibration.md``). One batch in five (at least one of several; of a single
            one, examples) is held out for the report. At most 4,096 rows of each layer are kept.
        forward: how to run the model on a batch of any other kind, ``(model, batch) -> output``.
        inputs: example inputs, as ``calibration``, of which only the shapes matter, to find the
            activations; by default ``calibration``, or else an input inferred from the first layer.
        draw: draw each weight anew before it is split, for training from scratch (biases, and
            layers that are not replaced, keep their values): a name of ``torch.nn.init`` such as
            ``"kaiming_normal"``, ``"default"`` for torch's own, or a function that fills a weight
            in place. None splits the current weights.
        split: of convolutions: ``"channel"`` or ``"spatial"``, see
            :class:`~riemann_unn.nn.LowRankConv2d`.
        orthonormal: orthonormal factors, tagged, and singular values beside them.
        refine: most iterations of L-BFGS; 0 for none. None: as far as it is worth its time. On
            Gaussian inputs 12 at most, about a quarter of the time of the decomposition, for
            (leaky) ReLU without biases, and none for others; on calibration inputs 100 at most,
            as long as the error falls on a fifth of them used for validation.
        only_if_smaller: do not replace layers where the factors save no parameter.
        seed: of ``draw``. The global random state does not change.
        progress: show a progress bar after a second, if tqdm is installed.

    Returns:
        The report: a mapping from the names of the replaced layers to
        :class:`~riemann_unn.init.LowRank`, which prints as a table and draws
        error against rank.

    Raises:
        ManifoldError: a matched layer is tagged.
        TypeError: an argument is of the wrong kind.
        ValueError: a rank, pattern, name or calibration does not fit; the activation cannot be
            found by tracing; a weight is not finite.

    Reference:
        Vodrahalli et al., "Nonlinear initialization methods for low-rank neural networks" (2022),
        section 3 for the objective.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, got a {type(model).__name__}")
    if method not in get_args(Method):
        raise ValueError(f"{method=} must be one of {', '.join(map(repr, get_args(Method)))}")
    if method == "linear" and calibration is None:
        raise ValueError("method='linear' needs calibration= inputs, whose covariance it uses")
    if split not in ("channel", "spatial"):
        raise ValueError(f"{split=} must be 'channel' or 'spatial'")
    if refine is not None and refine < 0:
        raise ValueError(f"{refine=} must not be negative")
    if forward is not None and calibration is None:
        raise ValueError("forward= runs the model on calibration= batches, which are missing")
    model = unwrapped(model)
    found = candidates(model, layers, split=split)
    if isinstance(rank, Mapping):
        rank = by_pattern(rank, found, "rank")
        found = Candidates({n: found.layers[n] for n in rank}, found.names, found.skipped)
    record = ModelSnapshot(model)
    dense = [layer.weight.detach() for layer in found.layers.values()]
    weights = [] if draw is None else record.keep(dense)

    @in_full_precision
    @no_grad
    def work() -> LowRankReport:
        # Drawing, a DataLoader and the model may all use random numbers.
        with afterwards(random_states(model)):
            batches = None
            if calibration is not None:
                batches = batches_of(calibration, model, forward=forward)
            program = program_or_reason(model, batches, inputs, forward)
            follows = activations(program, found, activation, method)
            job = _Job(
                model,
                found,
                method,
                rank,
                orthonormal,
                refine,
                only_if_smaller,
                batches,
                follows,
                progress,
            )
            if draw is None:
                return job.run()
            torch.manual_seed(seed)
            for name, layer in found.layers.items():
                layer.set_weight_(drawn(layer, draw, follows[name]))
            report = job.run()
            # Dense layers that stay, or that are used elsewhere, keep their weights.
            torch._foreach_copy_(dense, weights)
            return report

    return undoing(work, record.restore)


@dataclass
class _Job:
    """The work of one call: choose ranks, then replace layer by layer."""

    model: nn.Module
    found: Candidates
    method: Method
    rank: RankSpec
    orthonormal: bool
    refine: int | None
    only_if_smaller: bool
    batches: list[Batch] | None
    follows: dict[str, Follower]
    progress: bool
    skipped: dict[str, str] = field(default_factory=dict)
    data: Split | None = None

    def run(self) -> LowRankReport:
        layers = self.found.layers
        for name, layer in layers.items():
            if not bool(torch.isfinite(layer.weight).all()):
                raise ValueError(
                    f"the weight of {name!r} holds NaN or infinity; initialise it again. "
                    "No layer was changed"
                )
        self.skipped = dict(self.found.skipped)
        problems = self._problems()
        for name in layers.keys() - problems.keys():
            self.skipped[name] = "the calibration inputs do not reach it"
        ranks, curves = self._ranks(problems)
        done: dict[str, LowRank] = {}
        bar = progress_bar(len(ranks), "low rank", "layer", show=self.progress, delay=1.0)
        try:
            for name, r in ranks.items():
                if done and self.data is not None:
                    # Later layers compensate for the errors of earlier ones.
                    rows = gather(self.model, {name: layers[name]}, self.data)
                    problems[name].update_inputs(rows[name])
                done[name] = self._replace(name, problems[name], r, curves.get(name))
                bar.update()
        finally:
            bar.close()
        order = [name for name in layers if name in done]
        return LowRankReport(self.method, {name: done[name] for name in order}, self.skipped)

    def _problems(self) -> dict[str, Problem]:
        """The layers' problems in the order in which they run, as far as that is known."""
        layers = self.found.layers
        if self.batches is None:
            return {name: self._problem(name, None) for name in layers}
        rows = self._rows()
        return {name: self._problem(name, seen) for name, seen in rows.items()}

    def _rows(self) -> dict[str, Rows]:
        """Return the inputs of the layers, some of them held out."""
        assert self.batches is not None
        self.data = hold_out(self.batches)
        try:
            return gather(self.model, self.found.layers, self.data)
        except ValueError:
            if len(self.batches) > 1 or not self.data.held_out:
                raise
            # The first dimension is not that of examples (e.g. a graph's nodes): none is held out.
            self.data = Split(self.batches, [])
            return gather(self.model, self.found.layers, self.data)

    def _problem(self, name: str, rows: Rows | None) -> Problem:
        layer, follower = self.found.layers[name], self.follows[name]
        matrix = layer.matrix()
        exact = matrix if matrix.dtype == torch.float64 else matrix.float()
        scale = offset = None
        if follower.norm is not None and follower.norm.scale is not None:
            scale, offset = follower.norm.scale, follower.norm.offset
        return Problem(
            exact.clone(),
            None if layer.bias is None else layer.bias.detach().to(exact),
            follower.activation,
            None if scale is None else scale.to(exact),
            None if offset is None else offset.to(exact),
            kernel=layer.kernel,
            rows=rows,
        )

    def _useful(self, p: Problem) -> int:
        """Return the largest rank that saves a parameter, separate singular values included."""
        m, n = p.matrix.shape
        return (m * n - 1) // (m + n + int(self.orthonormal))

    def _ranks(self, problems: dict[str, Problem]) -> tuple[dict[str, int], dict[str, Curve]]:
        """Return the rank of each layer to replace, and the curves of a budget."""
        curves: dict[str, Curve] = {}
        ranks: dict[str, int] = {}
        shapes = {name: (p.matrix.shape[0], p.matrix.shape[1]) for name, p in problems.items()}
        useful = {name: self._useful(p) for name, p in problems.items()}
        spread_ranks: dict[str, int | None] = {}
        if isinstance(self.rank, Budget):
            for name, p in problems.items():
                if useful[name] > 0:
                    curves[name] = p.curve(self.method, rank_grid(useful[name], 24))
            weights = None
            if self.data is not None and self.rank.parameters is not None:
                run = Effect(self.model, self.found, self.data)
                weights = {
                    name: run.of(name, problems[name], self.method, curve)
                    for name, curve in curves.items()
                }
            kept = int(self.orthonormal)
            spread_ranks = allocate(self.rank, curves, shapes, kept=kept, weights=weights)
        for name, (m, n) in shapes.items():
            if isinstance(self.rank, Budget):
                r = spread_ranks.get(name)
                if r is None and name in curves:
                    self.skipped[name] = "the budget leaves it dense"
                    continue
                r = r or 1
            else:
                value = self.rank[name] if isinstance(self.rank, Mapping) else self.rank
                r = as_rank(value, min(m, n), name)
            if r <= useful[name] or not self.only_if_smaller:
                ranks[name] = min(r, m, n)
            else:
                self.skipped[name] = f"rank {r} of its {m}x{n} matrix would save no parameter"
        return ranks, curves

    def _replace(self, name: str, p: Problem, rank: int, curve: Curve | None) -> LowRank:
        if curve is None:
            curve = p.curve(self.method, sorted({*rank_grid(self._useful(p), 8), rank}))
        factors, spectral = p.solve(self.method, rank, self.refine), p.spectral(rank)
        layer = self.found.layers[name].empty(rank, orthonormal=self.orthonormal)
        layer.set_factors_(*p.without_norm(factors))
        self.found.put_(self.model, name, layer)
        m, n = p.matrix.shape
        before, after = p.held_out_error(spectral), p.held_out_error(factors)
        return LowRank(
            shape=(m, n),
            rank=rank,
            activation=p.activation.name,
            parameters=(m * n, layer.weight_parameters()),
            macs=(m * n, layer.macs()),
            gaussian=(p.gaussian_error(spectral), p.gaussian_error(factors)),
            held_out=None if before is None or after is None else (before, after),
            curve=curve,
            notes=_notes(self.follows[name], p),
        )


def _notes(follower: Follower, p: Problem) -> tuple[str, ...]:
    notes = [] if follower.note is None else [f"taken as linear: {follower.note}"]
    norm = follower.norm
    if norm is not None and norm.scale is None:
        notes.append("its batch normalisation has no running statistics and was left out")
    elif norm is not None:
        notes.append("its batch normalisation took part as in evaluation mode")
    unseen = p.unseen_directions()
    if unseen:
        notes.append(
            f"degenerate covariance: the calibration inputs do not reach {unseen} of its "
            f"{min(p.w.shape)} directions, so it was regularised"
        )
    return tuple(notes)
