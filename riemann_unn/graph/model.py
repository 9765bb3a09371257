"""The view of a model: its layers, their spaces, and how its weights scale with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .inferred_input import inferred_input
from .isolation import preserved, without_weak_references
from .program import Forward, Program, named_tensors, read, unwrapped
from .rules import RULES
from .spaces import ONE, Spaces, compact
from .walk import UNUSED, Layer, Role, Walk

__all__ = ["ModelGraph", "Scaling", "trace"]


@dataclass(frozen=True)
class Scaling:
    r"""How one weight changes when the activations of space i are multiplied by :math:`s_i`.

    .. math:: w' = w \cdot s_{\text{feeds}} / s_{\text{reads}}

    entry by entry.

    Attributes:
        name: canonical name of the parameter or buffer.
        feeds: int64, broadcasts with the weight: the space each entry feeds.
        reads: the space each entry reads, likewise; None for biases, norms and embeddings.
    """

    name: str
    feeds: Tensor
    reads: Tensor | None

    def factor(self, scales: Tensor) -> Tensor:
        """Return the factor of the weight; it broadcasts with the weight.

        Args:
            scales: ``(spaces,)``, positive, and one for closed spaces.
        """
        fed = scales[self.feeds.to(scales.device)]
        return fed if self.reads is None else fed / scales[self.reads.to(scales.device)]

    def matrices(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sum over entries that feed and read the same spaces.

        Args:
            values: one for each entry of the weight, of its shape.

        Returns:
            Sums ``(batch, rows, columns)``, the space each row feeds ``(batch, rows)``, and the
            space each column reads ``(batch, columns)``; None and one column where nothing is read.
        """
        if values.ndim == 0:
            values = values.reshape(1)
        feeds = _padded(self.feeds, values.ndim)
        reads = None if self.reads is None else _padded(self.reads, values.ndim)
        rows = [d for d in range(values.ndim) if feeds.shape[d] > 1]
        columns = [d for d in range(values.ndim) if reads is not None and reads.shape[d] > 1]
        both = [d for d in rows if d in columns]
        rows, columns = ([d for d in part if d not in both] for part in (rows, columns))
        rest = [d for d in range(values.ndim) if d not in (*both, *rows, *columns)]
        if rest:
            values = values.sum(rest, keepdim=True)

        def arranged(x: Tensor, dims: Sequence[Sequence[int]]) -> Tensor:
            wanted = [d for part in dims for d in part]
            sizes = [[values.shape[d] for d in part] for part in dims]
            x = x.expand([n if d in wanted else 1 for d, n in enumerate(values.shape)])
            x = x.permute(*wanted, *(d for d in range(x.ndim) if d not in wanted))
            return x.reshape([_product(part) for part in sizes])

        summed = arranged(values, (both, rows, columns))
        fed = arranged(feeds, (both, rows))
        return summed, fed, None if reads is None else arranged(reads, (both, columns))


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for n in sizes:
        result *= n
    return result


def _padded(x: Tensor, ndim: int) -> Tensor:
    return x.reshape((1,) * (ndim - x.ndim) + tuple(x.shape))


@dataclass(frozen=True)
class ModelGraph:
    """The view of a model that :func:`trace` gives.

    Attributes:
        layers: the uses of weights in the order in which they run. Those that run only in the
            other of training and evaluation mode come last.
        scalings: how each weight that touches a space scales, by canonical name.
        reasons: for each space why it is closed, or None where it is free.
        tensors: the weights named there.
        weights: by placeholder of the program, the canonical name of its weight.
        program: what the model computes in the mode it is in.
        blocks: by path, why a submodule is opaque.
        rules: by node, the name of the rule of its operation.
        opaque_results: by node, the result of an operation that is not homogeneous, without values.
        args: the positional arguments of the forward that it was read with.
        kwargs: the keyword arguments.
        is_inferred: whether these were inferred from the first layer.
    """

    layers: tuple[Layer, ...]
    scalings: Mapping[str, Scaling]
    reasons: tuple[str | None, ...]
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, str]
    program: Program
    blocks: Mapping[str, str]
    rules: Mapping[str, str]
    opaque_results: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_inferred: bool

    @property
    def free(self) -> Tensor:
        """Bool ``(spaces,)``: which may be scaled."""
        return torch.tensor([reason is None for reason in self.reasons], dtype=torch.bool)

    def closed(self, spaces: Tensor) -> str | None:
        """Why some of these spaces are closed, or None if all of them are free."""
        found = (self.reasons[i] for i in spaces.unique().tolist())
        return next((reason for reason in found if reason is not None), None)

    @torch.no_grad()
    def scale_(self, tensors: Mapping[str, Tensor], scales: Tensor) -> None:
        """Scale weights in place without changing the model's function.

        Args:
            tensors: at least those named in ``scalings``, by canonical name.
            scales: float64 ``(spaces,)``, positive, and one for closed spaces.
        """
        for name, scaling in self.scalings.items():
            p = tensors[name]
            own = scales.to(p.device)
            factors = [own[scaling.feeds.to(p.device)]]
            if scaling.reads is not None:
                factors.append(own[scaling.reads.to(p.device)].reciprocal())
            factors = [f for f in factors if bool((f != 1).any())]
            if factors:
                for piece, *parts in _pieces(p, factors):
                    scaled: Tensor = piece
                    for factor in parts:
                        scaled = scaled * factor  # in double precision, whatever the parameter's
                    piece.copy_(scaled)


def _pieces(p: Tensor, factors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield parts of a tensor and factors, along the first dimension, that fit in cache."""
    if p.numel() <= _IN_CACHE or p.ndim < 2:
        yield (p, *factors)
        return
    rows = max(_IN_CACHE // (p.numel() // p.shape[0]), 1)
    given = [p, *(_padded(f, p.ndim) for f in factors)]
    split = [x.split(rows) if x.shape[0] > 1 else None for x in given]
    for i in range(-(-p.shape[0] // rows)):
        yield tuple(x if s is None else s[i] for x, s in zip(given, split, strict=True))


_IN_CACHE = 2**17


def trace(
    model: nn.Module,
    *example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    forward: Forward | None = None,
    closed: Mapping[str, str] | None = None,
    per: Literal["channel", "tensor"] = "channel",
    buffers: bool = False,
) -> ModelGraph:
    r"""Find which activations of a model can be scaled without changing its function.

    The scales :math:`s > 0` of the free spaces leave every output as it is when each weight
    becomes :math:`w \cdot s_{\text{feeds}} / s_{\text{reads}}`, in training and in evaluation mode.
    Between two layers the channels have one space each; sums join them, concatenation, reshapes and
    permutations move them, and operations that are not positively homogeneous close them. The model
    is read by ``torch.export`` and not changed: mode, buffers, attributes and the global random
    state stay as they are. Submodules that cannot be read, because their control flow depends on
    data, and those with forward hooks and recurrent layers, are opaque.

    Args:
        model: the model; compiled and data-parallel wrappers are removed.
        example_inputs: arguments of its forward, of which only shapes and dtypes matter. Without
            them an input is inferred from the first layer.
        kwargs: keyword arguments of its forward.
        forward: a function that calls the model on these arguments; by default the model itself.
        closed: weights that must not be scaled, by name, each with the reason to report.
        per: one space for each channel of a layer's output, or one for all of them.
        buffers: whether weights that are buffers may be scaled too.

    Returns:
        The layers, the spaces and the scalings.

    Raises:
        GraphError: the model cannot be read; the message names the place.
        TypeError: ``model`` is no module, or its parameters have no values yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, got a {type(model).__name__}")
    model = unwrapped(model)
    _check_values(model)
    named = named_tensors(model)
    canonical: dict[Any, str] = {}
    for name, p in named.items():
        canonical.setdefault(_memory(p), name)
    reasons = {canonical[_memory(named[n])]: why for n, why in (closed or {}).items()}

    def names(p: Tensor) -> str | None:
        return canonical.get(_memory(p))

    is_inferred = not example_inputs and not kwargs
    with without_weak_references(model):
        given = (inferred_input(model),) if is_inferred else example_inputs
    spaces = Spaces(per_channel=per == "channel")
    blocks = _whole_blocks(model)
    walks: list[Walk] = []
    with without_weak_references(model), preserved(model):
        for program in _programs(model, given, kwargs or {}, forward, blocks):
            walks.append(Walk(RULES, program, names, spaces, buffers))
            walks[-1].run()
            blocks.update(program.opaque)
            for path, why in program.opaque.items():
                for p in named_tensors(model.get_submodule(path)).values():
                    walks[-1].closed.setdefault(names(p) or "", f"'{path}' is closed: {why}")
    merged = walks[0]
    for part in walks[1:]:
        for name, roles in part.roles.items():
            merged.roles.setdefault(name, []).extend(roles)
        for name, why in part.closed.items():
            merged.closed.setdefault(name, why)
    merged.share(reasons)
    return _result(walks, named, blocks, given, kwargs or {}, is_inferred)


def _programs(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    forward: Forward | None,
    blocks: Mapping[str, str],
) -> list[Program]:
    """Read the model in its mode and, where that makes a difference, in the other one."""
    first = read(model, args, kwargs, forward=forward, opaque=blocks)
    found = [first]
    if not first.depends_on_mode:
        return found
    for mode in {True, False} - {m.training for m in model.modules()} or {True, False}:
        for module in model.modules():
            module.training = mode
        other = read(model, args, kwargs, forward=forward, opaque=blocks)
        if str(other.graph) != str(first.graph):
            found.append(other)
    return found


def _check_values(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{type(model).__name__} is a ScriptModule, whose code cannot be read; pass the "
            "module that it was made of"
        )
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise TypeError(f"'{name}' has no shape yet; run the model once, then trace it")
        if p.device.type == "meta":
            raise TypeError(
                f"'{name}' is on the meta device and has no values; materialise the model with "
                "to_empty and load its weights first"
            )


def _whole_blocks(model: nn.Module) -> dict[str, str]:
    """Return the submodules that are opaque from the start, with the reason."""
    found = {}
    for path, module in model.named_modules():
        if path and (module._forward_hooks or module._forward_pre_hooks):
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if not all(type(h).__module__.startswith("torch.nn.utils") for h in hooks):
                found[path] = "it has forward hooks, which may do anything"
        elif path and (isinstance(module, nn.RNNBase) or getattr(module, "is_recurrent", False)):
            found[path] = "it is recurrent"
    return found


def _memory(p: Tensor) -> Any:
    """Return the identity of a parameter's memory, the same for all of its names."""
    if p.numel() == 0:
        return id(p)
    return p.device, p.data_ptr(), tuple(p.shape), p.stride()


def _result(
    walks: Sequence[Walk],
    named: Mapping[str, Tensor],
    blocks: Mapping[str, str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    is_inferred: bool,
) -> ModelGraph:
    """Number the spaces of weights, and express the result in these numbers."""
    spaces = walks[0].spaces
    number: dict[int, int] = {}

    def numbered(ids: Tensor) -> Tensor:
        short = compact(ids)
        distinct, place = short.where(short != UNUSED, ONE).unique(return_inverse=True)
        found = [number.setdefault(spaces.find(i), len(number)) for i in distinct.tolist()]
        return torch.tensor(found, dtype=torch.int64)[place].reshape(short.shape)

    def scaling(name: str, role: Role) -> Scaling:
        reads = compact(role.reads)
        constant = bool(((reads == ONE) | (reads == UNUSED)).all())
        return Scaling(name, numbered(role.feeds), None if constant else numbered(role.reads))

    def renumbered(use: Layer) -> Layer:
        into = None if use.inputs is None else numbered(use.inputs).expand(use.inputs.shape)
        return replace(use, inputs=into, outputs=numbered(use.outputs).expand(use.outputs.shape))

    uses = list(walks[0].layers)
    seen = {(use.module, use.weight) for use in uses}
    for walk in walks[1:]:
        uses += [use for use in walk.layers if (use.module, use.weight) not in seen]
    layers = tuple(map(renumbered, uses))
    scalings = {name: scaling(name, roles[0]) for name, roles in walks[0].roles.items()}
    return ModelGraph(
        layers,
        scalings,
        tuple(spaces.reason(root) for root in number),
        {name: named[name] for name in scalings},
        walks[0].weights,
        walks[0].program,
        dict(blocks),
        walks[0].rules,
        walks[0].opaque_results,
        args,
        kwargs,
        is_inferred,
    )
