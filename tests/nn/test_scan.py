"""OrthogonalRNN's scan against its loop: values, gradients, and when it stays with the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from riemann_unn.nn import ModReLU, OrthogonalRNN, recurrent, scan

NONLINEARITIES = ["modrelu", "tanh", "relu", "identity"]
DTYPES = [torch.float32, torch.float64]
LENGTH, BATCH, INPUTS, HIDDEN = 7, 5, 3, 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each layer that was scanned."""
    calls: list[int] = []

    def count(*args: Any) -> Tensor:
        calls.append(1)
        return scan.scan_(*args)

    monkeypatch.setattr(recurrent, "scan_", count)
    return calls


def make(nonlinearity: str = "modrelu", layers: int = 1, **kwargs: Any) -> OrthogonalRNN:
    """With thresholds of both signs, some of which silence their features at times."""
    rnn = OrthogonalRNN(INPUTS, HIDDEN, layers, nonlinearity, **kwargs)
    for module in rnn.activations:
        if isinstance(module, ModReLU):
            nn.init.uniform_(module.bias, -0.4, 0.4)
    return rnn


def by_loop(call: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent, "can_scan", lambda *_: False)
        return call()


def assert_same(got: Any, expected: Any) -> None:
    """Up to rounding, of sums whose terms are as large as the largest number."""
    (these, form), (those, other_form) = tree_flatten(got), tree_flatten(expected)
    assert form == other_form
    for one, other in zip(these, those, strict=True):
        atol = 100 * torch.finfo(other.dtype).eps * float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def value_and_gradients(
    rnn: OrthogonalRNN, inputs: Tensor, hx: Tensor | None, seed: int = 0
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Outputs, and the gradients of a random functional of both of them."""
    torch.manual_seed(seed)  # dropout's
    outputs = list(rnn(inputs, hx))
    leaves = [p for p in (*rnn.parameters(), inputs, hx) if p is not None and p.requires_grad]
    functional = sum((out * torch.randn_like(out)).sum() for out in outputs)
    return outputs, torch.autograd.grad(functional, leaves)


# --- values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize(
    ("shape", "layers", "options"),
    [
        ((LENGTH, BATCH, INPUTS), 1, {}),
        ((LENGTH, BATCH, INPUTS), 3, {"dropout": 0.4}),
        ((BATCH, LENGTH, INPUTS), 2, {"batch_first": True, "bias": False}),
        ((LENGTH, INPUTS), 2, {}),
        ((LENGTH, 1, INPUTS), 1, {}),
        ((1, BATCH, INPUTS), 1, {}),
        ((1, 1, INPUTS), 2, {}),
        ((300, 4, INPUTS), 1, {}),
    ],
)
@pytest.mark.parametrize("with_state", [False, True])
def test_values_and_gradients_are_those_of_the_loop(
    dtype: torch.dtype,
    nonlinearity: str,
    shape: tuple[int, ...],
    layers: int,
    options: dict[str, Any],
    with_state: bool,
    scans: list[int],
) -> None:
    rnn = make(nonlinearity, layers, dtype=dtype, **options)
    inputs = torch.randn(shape, dtype=dtype, requires_grad=True)
    state = (layers, HIDDEN)
    if len(shape) == 3:
        state = (layers, shape[0] if options.get("batch_first") else shape[1], HIDDEN)
    hx = torch.randn(state, dtype=dtype, requires_grad=True) if with_state else None
    got = value_and_gradients(rnn, inputs, hx)
    assert len(scans) == layers
    expected = by_loop(lambda: value_and_gradients(rnn, inputs, hx))
    assert len(scans) == layers
    assert_same(got, expected)


def test_modrelu_at_zero_and_with_silent_features_equals_the_loop() -> None:
    rnn = make(bias=False)
    with torch.no_grad():
        rnn.activations[0].bias.copy_(torch.tensor([-9.0, 0.5, 0.0, -0.1, 9.0, 0.2]))
    inputs = torch.randn(LENGTH, BATCH, INPUTS)
    inputs[:3] = 0  # so that z = 0 exactly, from a first state of zeros
    inputs.requires_grad_()
    outputs, gradients = value_and_gradients(rnn, inputs, None)
    assert not outputs[0][:3].any() and not outputs[0][..., 0].any()
    assert_same((outputs, gradients), by_loop(lambda: value_and_gradients(rnn, inputs, None)))


def test_inputs_of_any_strides(scans: list[int]) -> None:
    rnn = make()
    wide = torch.randn(INPUTS, 2 * BATCH, LENGTH, requires_grad=True)
    inputs = wide[:, ::2].permute(2, 1, 0)
    hx = torch.randn(HIDDEN, BATCH, 1).permute(2, 1, 0)

    def call() -> Any:
        out, _ = rnn(inputs, hx)
        return out, torch.autograd.grad(out[-1].sum(), [wide, *rnn.parameters()])

    got = call()
    assert scans
    assert_same(got, by_loop(call))


def test_packed_sequences_of_one_length_are_scanned_and_others_looped(scans: list[int]) -> None:
    rnn = make()
    equal = pack_sequence([torch.randn(4, INPUTS) for _ in range(3)])
    assert_same(rnn(equal)[0].data, by_loop(lambda: rnn(equal)[0].data))
    assert len(scans) == 1
    rnn(pack_sequence([torch.randn(4, INPUTS), torch.randn(3, INPUTS)]))
    assert len(scans) == 1


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_gradients_by_finite_differences(nonlinearity: str, scans: list[int]) -> None:
    rnn = make(nonlinearity, dtype=torch.float64)
    inputs = torch.randn(4, 2, INPUTS, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(1, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in rnn.named_parameters()]

    def call(inputs: Tensor, hx: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(rnn, values, (inputs, hx))

    leaves = (inputs, hx, *(p.detach().clone().requires_grad_() for p in rnn.parameters()))
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    assert scans


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_second_and_third_derivatives_are_those_of_the_loop(nonlinearity: str) -> None:
    rnn = make(nonlinearity, 2, dtype=torch.float64)
    inputs = torch.randn(LENGTH, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    leaves = [inputs, rnn.weight_hh_l0, rnn.weight_hh_l1]

    def call() -> list[Any]:
        value = rnn(inputs)[0].pow(4).sum()
        found = []
        for _ in range(3):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            found.append([g.detach() for g in gradients])
            value = sum(g.square().sum() for g in gradients)
        return found

    assert_same(call(), by_loop(call))


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "activations.0.bias", "all"])
def test_only_gradients_that_are_asked_for(frozen: str) -> None:
    rnn = make()
    for name, parameter in rnn.named_parameters():
        parameter.requires_grad_(frozen not in (name, "all"))
    inputs = torch.randn(LENGTH, BATCH, INPUTS)
    hx = torch.randn(1, BATCH, HIDDEN, requires_grad=True)
    got = value_and_gradients(rnn, inputs, hx)
    assert_same(got, by_loop(lambda: value_and_gradients(rnn, inputs, hx)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_numbers_are_the_same(context: Any, scans: list[int]) -> None:
    rnn = make()
    inputs = torch.randn(LENGTH, BATCH, INPUTS)
    expected = rnn(inputs)[0]
    with context():
        output = rnn(inputs)[0]
    assert len(scans) == 2 and output.grad_fn is None
    assert torch.equal(output, expected)


def test_the_same_numbers_every_time() -> None:
    rnn = make()
    inputs = torch.randn(LENGTH, BATCH, INPUTS, requires_grad=True)
    first, second = (value_and_gradients(rnn, inputs, None) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_graph_may_be_kept_and_what_it_needs_may_not_be_overwritten() -> None:
    rnn = make()
    inputs = torch.randn(LENGTH, BATCH, INPUTS)
    output, last = rnn(inputs)
    loss = output.square().sum()
    first, second = (torch.autograd.grad(loss, rnn.weight_hh_l0, retain_graph=True) for _ in "ab")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with torch.no_grad():
        last.zero_()  # a copy
    loss.backward(retain_graph=True)
    output.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = rnn(inputs)[0].sum()
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_the_output_is_kept_for_the_backward_pass() -> None:
    rnn = make(dtype=torch.float64)
    inputs = torch.randn(50, BATCH, INPUTS, dtype=torch.float64)

    def kept() -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = rnn(inputs)[0]
        return sum(storages.values()) / held.untyped_storage().nbytes()

    assert kept() < 2  # with the input and the weights
    assert by_loop(kept) > 3


# --- what stays with the loop, or goes through it ----------------------------------------------


def test_modules_that_were_changed_are_called(scans: list[int]) -> None:
    inputs = torch.randn(LENGTH, BATCH, INPUTS)

    def expect(rnn: OrthogonalRNN, count: int) -> None:
        scans.clear()
        assert_same(rnn(inputs), by_loop(lambda: rnn(inputs)))
        assert len(scans) == count

    for hook in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        scans.clear()
        rnn, seen = make(), []
        handle = getattr(rnn.activations[0], f"register_{hook}")(lambda *_: seen.append(1))  # noqa: B023
        rnn(inputs)[0].sum().backward()
        assert len(seen) == LENGTH and not scans
        handle.remove()
        expect(rnn, 1)
    rnn = make()
    rnn.activations[0] = nn.Tanh()
    expect(rnn, 1)
    for other in (nn.Softsign(), ModReLU(1)):
        rnn.activations[0] = other
        expect(rnn, 0)
    rnn.activations[0] = ModReLU(HIDDEN, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="same dtype"):  # in the loop's second step
        rnn(inputs)
    rnn = make()
    rnn.activations[0].forward = lambda z: z + 1
    expect(rnn, 0)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        expect(make(), 0)
    finally:
        handle.remove()
    parametrize.register_parametrization(rnn := make(), "weight_hh_l0", nn.Hardtanh())
    expect(rnn, 1)
    rnn(inputs)[0].sum().backward()
    assert rnn.parametrizations.weight_hh_l0.original.grad is not None
    parametrize.register_parametrization(rnn.activations[0], "bias", nn.Hardtanh())
    expect(rnn, 0)


def test_geoopt_parameters_are_scanned_and_complex_layers_looped(scans: list[int]) -> None:
    rnn = make()
    rnn.weight_hh_l0 = geoopt.ManifoldParameter(rnn.weight_hh_l0.data, geoopt.Stiefel())
    rnn(torch.randn(LENGTH, BATCH, INPUTS))[0].sum().backward()
    assert len(scans) == 1 and rnn.weight_hh_l0.grad is not None
    OrthogonalRNN(INPUTS, HIDDEN, dtype=torch.complex64)(torch.randn(LENGTH, BATCH, INPUTS))
    assert len(scans) == 1


def _pass_on(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    __torch_dispatch__ = _pass_on


class _Function(TorchFunctionMode):
    __torch_function__ = _pass_on


class _Named(Tensor):
    pass


def test_modes_and_subclasses_see_the_loop(scans: list[int]) -> None:
    rnn, inputs = make(), torch.randn(LENGTH, BATCH, INPUTS)
    for mode in (_Dispatch(), _Function(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            rnn(inputs)
        assert not scans
    assert isinstance(rnn(inputs.as_subclass(_Named))[0], _Named)
    assert not scans
    with torch.device("cpu"):
        rnn(inputs)
    assert len(scans) == 1


@pytest.mark.parametrize("nonlinearity", ["modrelu", "tanh"])
def test_transforms_of_functions(nonlinearity: str, scans: list[int]) -> None:
    rnn = make(nonlinearity, dtype=torch.float64)
    many = torch.randn(2, LENGTH, BATCH, INPUTS, dtype=torch.float64)
    tangent = torch.randn_like(many[0])

    def call(x: Tensor) -> Tensor:
        return rnn(x)[0]

    looped = by_loop(lambda: torch.stack([call(x) for x in many]))
    assert_same(torch.vmap(call)(many), looped)
    assert_same(
        torch.func.grad(lambda x: call(x).square().sum())(many[0]),
        by_loop(lambda: torch.func.grad(lambda x: call(x).square().sum())(many[0])),
    )
    _, pushed = torch.func.jvp(call, (many[0],), (tangent,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(many[0], tangent)
        assert_same(forward_ad.unpack_dual(call(dual)).tangent, pushed)
    plain = {name: p.detach() for name, p in rnn.named_parameters()}

    def call_with(x: Tensor, values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(rnn, values, (x,))[0]

    assert_same(make_fx(call_with)(many[0], plain)(many[0], plain), looped[0])
    assert not scans


def test_the_backward_pass_may_be_transformed(scans: list[int]) -> None:
    rnn = make("tanh", dtype=torch.float64)
    inputs = torch.randn(3, 2, INPUTS, dtype=torch.float64, requires_grad=True)
    modrelu = make(dtype=torch.float64)
    for net in (rnn, modrelu):
        leaves = [inputs, *net.parameters()]
        output = net(inputs)[0]
        many = torch.randn(4, *output.shape, dtype=torch.float64)
        batched = torch.autograd.grad(
            output, leaves, many, retain_graph=True, is_grads_batched=True
        )
        for i, grad in enumerate(many):
            one = torch.autograd.grad(output, leaves, grad, retain_graph=True)
            assert_same(tuple(g[i] for g in batched), one)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(many[0], many[1])
            pushed = torch.autograd.grad(output, leaves, dual, retain_graph=True)
            tangents = [forward_ad.unpack_dual(g).tangent for g in pushed]
        assert_same(tangents, [g[1] for g in batched])  # linear in the gradient
    assert len(scans) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_offloading(reentrant: bool, scans: list[int]) -> None:
    rnn = make("tanh", 2)
    inputs = torch.randn(LENGTH, BATCH, INPUTS, requires_grad=True)

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output.square().sum(), list(rnn.parameters()))

    expected = by_loop(lambda: gradients(rnn(inputs)[0]))
    if reentrant:
        checkpoint(rnn, inputs, use_reentrant=True)[0].square().sum().backward()
        got = tuple(p.grad for p in rnn.parameters())
    else:
        got = gradients(checkpoint(rnn, inputs, use_reentrant=False)[0])
        with torch.autograd.graph.save_on_cpu():
            assert_same(gradients(rnn(inputs)[0]), expected)
    assert scans
    assert_same(got, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compile_export_and_trace_read_the_loop(scans: list[int]) -> None:
    rnn = make()
    inputs = torch.randn(LENGTH, BATCH, INPUTS)
    expected = rnn(inputs)
    scans.clear()

    def call() -> Any:
        compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
        output = compiled(inputs)
        return output, torch.autograd.grad(output[0].square().sum(), list(rnn.parameters()))

    output, gradients = call()
    assert_same(output, expected)
    assert_same(
        gradients,
        by_loop(lambda: torch.autograd.grad(rnn(inputs)[0].square().sum(), list(rnn.parameters()))),
    )
    for strict in (False, True):
        program = torch.export.export(rnn, (inputs,), strict=strict)
        assert_same(program.module()(inputs), expected)
        names = [str(node.target) for node in program.graph.nodes]
        assert sum("addmm" in name for name in names) == LENGTH
    assert_same(torch.jit.trace(rnn, (inputs,), check_trace=False)(inputs), expected)
    assert not scans
