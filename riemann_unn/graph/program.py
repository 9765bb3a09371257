"""A model as ATen operations, by torch.export, with opaque submodules.

A submodule that cannot be read, because its control flow depends on data or because it has hooks,
is one operation of the graph, of which only the shapes of the results are known.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from ..errors import GraphError
from ..interruption import afterwards
from .isolation import drop_references, preserved, silenced
from .modes import ModeReads
from .opaque_modules import OpaqueModules, tensors_in

__all__ = [
    "Called",
    "Forward",
    "Program",
    "Source",
    "module_of",
    "named_tensors",
    "operation",
    "read",
    "unwrapped",
]

Forward = Callable[..., Any]
Kind = Literal["parameter", "buffer", "constant", "input"]


@dataclass(frozen=True)
class Source:
    """The origin of a placeholder of the graph.

    Attributes:
        kind: a parameter or a buffer of the model, a constant of its forward, or an input.
        name: its name in the model, or in the signature of the forward.
        value: the tensor, or the input as it was given.
    """

    kind: Kind
    name: str
    value: Any


@dataclass(frozen=True)
class Program:
    """The operations of a model in its current mode.

    Attributes:
        graph: calls of ATen operations; nested graphs are inlined.
        sources: the origin of each placeholder.
        opaque: by path, why a submodule is one operation.
        classes: by path, the class of each submodule.
        tensors: by path, the parameters and buffers of each submodule itself.
        depends_on_mode: whether the graph may differ in the other mode, apart from the mode
            argument of normalisations and dropout.
    """

    graph: fx.Graph
    sources: Mapping[str, Source]
    opaque: Mapping[str, str] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    depends_on_mode: bool = True


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside compiled, DataParallel and DistributedDataParallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def module_of(node: fx.Node) -> str:
    """Return the path of the innermost module whose forward called a node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed([entry[0] for entry in stack.values()]), "")
    return _own_path(path)


def operation(node: fx.Node) -> str:
    """Return the name of the operation that a node calls, as in ``torch.ops.aten``."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    return str(schema.name).rpartition("::")[2]


def read(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    forward: Forward | None = None,
    opaque: Mapping[str, str] | None = None,
) -> Program:
    """Read the operations of a model in its current mode, for inputs of these shapes.

    Args:
        model: the model, not changed except for buffers that its forward writes.
        args: positional arguments of its forward.
        kwargs: keyword arguments.
        forward: a function that calls the model on these arguments.
        opaque: by path, submodules to treat as one operation, with the reason.

    Raises:
        GraphError: the model's own forward cannot be read; the message names the line.
    """
    reasons = dict(opaque or {})
    with ExitStack() as stack:
        stack.enter_context(silenced())
        stack.enter_context(preserved(model))
        called = Called(model, forward)
        blocks = OpaqueModules(model, partial(called, *args, **kwargs))
        is_tracked = True
        while True:
            notes = ModeReads()
            try:
                with preserved(model):
                    blocks.replace_(reasons)
                    _record_failures_(model, reasons)
                    if is_tracked:
                        notes.track_(model)
                    exported = _export(called, args, kwargs)
                place = _symbolic(exported.graph)
            except GraphError:
                raise
            except _UnreadableError as error:
                if is_tracked and not isinstance(error.__cause__, GraphError):
                    is_tracked = False  # tracking may be the cause
                    continue
                assert isinstance(error.__cause__, Exception)
                if not error.path or error.path in reasons:
                    raise _unreadable(model, error.__cause__) from error.__cause__
                reasons[error.path] = _first_line(error.__cause__)
                continue
            except Exception as error:
                if is_tracked:
                    is_tracked = False
                    continue
                raise _unreadable(model, error) from error
            if place is None:
                break
            if not place or place in reasons:
                raise GraphError(
                    f"a shape in {type(model).__name__} depends on the values of tensors; move "
                    "that part into a submodule, which then counts as one closed operation"
                )
            reasons[place] = "a shape in it depends on the values of tensors"
    graph = fx.Graph()
    _inlined(exported.graph_module, graph, {})
    graph.eliminate_dead_code(_is_impure)
    modules = dict(model.named_modules())
    tensors = {
        path: [x for x in (*m._parameters.values(), *m._buffers.values()) if x is not None]
        for path, m in modules.items()
    }
    classes = {path: type(m).__name__ for path, m in modules.items()}
    for node in exported.graph.nodes:
        for value in tree_leaves(node.meta.get("val")):
            drop_references(getattr(value, "fake_mode", None))
    # A copy may have another name, such as input_1 for input, at the same position.
    places = zip(*(_placeholders(g) for g in (exported.graph, graph)), strict=True)
    known = _sources(exported, model, forward, args, kwargs)
    sources = {copied: known[name] for name, copied in places}
    depends = notes.was_read or not is_tracked or bool(reasons)
    return Program(graph, sources, reasons, classes, tensors, depends)


def _placeholders(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op == "placeholder"]


def _is_impure(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


class Called(nn.Module):
    """A model as called by a function, with a flat list of tensors as its result.

    Args:
        model: the model, whose parameters get ``model.`` before their names.
        forward: a function that calls it; by default itself.
    """

    def __init__(self, model: nn.Module, forward: Forward | None = None) -> None:
        super().__init__()
        self.model = model
        self._call = forward
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        if self._call is None:
            return tensors_in(self.model(*args, **kwargs))
        return tensors_in(self._call(self.model, *args, **kwargs))


def _own_path(path: str) -> str:
    """Convert a path inside :class:`Called` to one in the model."""
    return path.partition(".")[2]


def _export(called: Called, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with (
        _without_stack_traces(),
        torch.enable_grad(),  # without it attention may take a fused path
    ):
        return torch.export.export(called, args, dict(kwargs), strict=False)


def _without_stack_traces() -> ExitStack:
    """Keep torch from recording a stack trace for each operation."""
    config: Any = getattr(fx, "config", None)
    name = "do_not_emit_stack_traces"
    if not hasattr(config, name):
        return ExitStack()
    undo = afterwards(partial(setattr, config, name, getattr(config, name)))
    setattr(config, name, True)
    return undo


class _UnreadableError(Exception):
    """An exception of a forward, with the path of the innermost module that raised it.

    A class of its own, since exporters write a graph into exceptions that they know.
    """

    partial_fx_graph = property()

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def _record_failures_(model: nn.Module, opaque: Mapping[str, str]) -> None:
    """Make every module record its path if it is the innermost one that fails."""
    for path, module in model.named_modules():
        if path not in opaque:
            vars(module)["forward"] = partial(_recording_failure, module.forward, path)


def _recording_failure(forward: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return forward(*args, **kwargs)
    except (_UnreadableError, GraphError):
        raise
    except Exception as error:
        raise _UnreadableError(path) from error


def _symbolic(graph: fx.Graph) -> str | None:
    """Return the path of the module of the first node with an unknown shape, or None."""
    for node in graph.nodes:
        for value in tree_leaves(node.meta.get("val")):
            unknown = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
            if isinstance(value, Tensor):
                unknown = any(isinstance(n, torch.SymInt) for n in value.shape)
            if unknown:
                return module_of(node)
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(". ")


def _unreadable(model: nn.Module, error: Exception) -> GraphError:
    """Return the error, with the line of the model's forward at which it was raised."""
    code = getattr(type(model).forward, "__code__", None)
    steps = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in steps if frame.f_code is code]
    place = ""
    if code is not None and lines:
        text = linecache.getline(code.co_filename, lines[-1]).strip()
        place = f" at line {lines[-1]}" + (f" '{text}'" if text else "")
    return GraphError(
        f"torch.export cannot read {type(model).__name__}.forward{place}: "
        f"{type(error).__name__}: {_first_line(error)}. Pass example inputs that the model runs "
        "on; pass a submodule such as the backbone; or move a part whose control flow depends on "
        "data into a submodule, which then counts as one closed operation"
    )


def _inlined(module: fx.GraphModule, target: fx.Graph, given: dict[fx.Node, Any]) -> Any:
    """Copy a graph with nested graphs inlined; return its outputs.

    Args:
        module: the graph with its nested ones.
        target: where to.
        given: the nodes in place of placeholders; missing ones are copied.
    """
    done: dict[fx.Node, Any] = dict(given)

    def mapped(value: Any) -> Any:
        return fx.node.map_arg(value, done.__getitem__)

    for node in module.graph.nodes:
        if node in done:
            continue
        if node.op == "output":
            if not given:
                target.output(mapped(node.args[0]))
            return mapped(node.args[0])
        if node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), nn.Module):
            done[node] = getattr(module, str(node.target))
            continue
        if node.target is operator.getitem and isinstance(mapped(node.args[0]), (list, tuple)):
            done[node] = mapped(node.args[0])[node.args[1]]
            continue
        nested = _nested(node, done)
        if nested is None:
            done[node] = copied = target.node_copy(node, lambda n: _no_module(done[n]))
            kept = {key: node.meta[key] for key in _KEPT if key in node.meta}
            copied.meta = {**kept, "val": tree_map(_without_values, node.meta.get("val"))}
            continue
        body, arguments = nested
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        done[node] = _inlined(body, target, dict(zip(inner, mapped(arguments), strict=True)))
    return None


# Metadata of nodes without fake tensors, which keep weak references to parameters.
_KEPT = ("nn_module_stack", "torch_fn")


def _without_values(x: Any) -> Any:
    """Return a tensor of the shape, dtype and device of a fake one, in the memory of one entry."""
    if not isinstance(x, Tensor):
        return x
    return torch.ones((), dtype=x.dtype, device=x.device).expand(tuple(x.shape))


def _no_module(x: Any) -> Any:
    return None if isinstance(x, nn.Module) else x


def _nested(node: fx.Node, done: Mapping[fx.Node, Any]) -> tuple[fx.GraphModule, Any] | None:
    """Return the nested graph that a node calls, such as under ``no_grad``, and its arguments."""
    if getattr(node.target, "__name__", "") not in (
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
    ):
        return None
    for i, argument in enumerate(node.args):
        body = done.get(argument) if isinstance(argument, fx.Node) else None
        if isinstance(body, fx.GraphModule):
            return body, tuple(node.args[i + 1 :])
    return None


def _sources(
    exported: Any,
    model: nn.Module,
    forward: Forward | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Source]:
    found: dict[str, Source] = {}
    names = _positional(model, len(args)) if forward is None else ["batch"] * len(args)
    inputs = _named_inputs(names, args, kwargs)
    tensors = named_tensors(model)
    for spec in exported.graph_signature.input_specs:
        name = _own_path(spec.target) if spec.target else ""
        if spec.kind is InputKind.PARAMETER:
            found[spec.arg.name] = Source("parameter", name, tensors[name])
        elif spec.kind is InputKind.BUFFER:
            found[spec.arg.name] = Source("buffer", name, tensors[name])
        elif spec.kind is InputKind.USER_INPUT:
            found[spec.arg.name] = Source("input", *next(inputs))
        else:
            value = exported.constants[spec.target]
            found[spec.arg.name] = Source("constant", str(spec.target), value)
    return found


def _named_inputs(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield each leaf of the arguments with its name, in the order of the placeholders."""
    for name, value in (*zip(names, args, strict=True), *kwargs.items()):
        for path, leaf in tree_flatten_with_path(value)[0]:
            yield name + keystr(path), leaf


def _positional(model: nn.Module, count: int) -> list[str]:
    names = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
    return (names + [f"input {i}" for i in range(len(names), count)])[:count]
