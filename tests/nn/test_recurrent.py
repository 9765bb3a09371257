"""OrthogonalRNN against nn.RNN and a naive loop."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import riemann_unn as ru
from riemann_unn.nn import ModReLU, OrthogonalRNN

REAL_AND_COMPLEX = [torch.float64, torch.complex128]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def naive(rnn: OrthogonalRNN, sequence: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
    """One example, one layer and one step at a time, as matrix-vector products."""
    outputs, finals = [], []
    for row in range(sequence.shape[1]):
        steps = [step.to(hx.dtype) for step in sequence[:, row]]
        last = []
        for layer in range(rnn.num_layers):
            w_ih = rnn.get_parameter(f"weight_ih_l{layer}")
            w_hh = rnn.get_parameter(f"weight_hh_l{layer}")
            b = rnn.get_parameter(f"bias_ih_l{layer}") if rnn.bias else torch.zeros(())
            h = hx[layer, row]
            for t, x in enumerate(steps):
                z = w_ih @ x + b + w_hh @ h
                if rnn.nonlinearity == "modrelu":
                    threshold = rnn.get_parameter(f"activations.{layer}.bias")
                    h = z / z.abs() * torch.clamp(z.abs() + threshold, min=0)
                else:
                    h = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda v: v}[
                        rnn.nonlinearity
                    ](z)
                steps[t] = h
            last.append(h)
        outputs.append(torch.stack(steps))
        finals.append(torch.stack(last))
    return torch.stack(outputs, 1), torch.stack(finals, 1)


# --- OrthogonalRNN: call signature and shapes --------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("with_state", [False, True])
def test_shapes_and_values_equal_those_of_nn_rnn(
    batch_first: bool, batched: bool, layers: int, with_state: bool
) -> None:
    theirs = nn.RNN(4, 6, layers, "tanh", batch_first=batch_first, dtype=torch.float64)
    ours = OrthogonalRNN(4, 6, layers, "tanh", batch_first=batch_first, dtype=torch.float64)
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    for layer in range(layers):
        state[f"bias_ih_l{layer}"] += state.pop(f"bias_hh_l{layer}")
    ours.load_state_dict(state)  # strict: the parameter names are nn.RNN's
    shape = ((5, 3, 4) if batch_first else (3, 5, 4)) if batched else (3, 4)
    x = torch.randn(shape, dtype=torch.float64)
    hx = torch.randn((layers, 5, 6) if batched else (layers, 6), dtype=torch.float64)
    args = (x, hx) if with_state else (x,)
    for a, b in zip(ours(*args), theirs(*args), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_equal_nn_rnn(
    enforce_sorted: bool, batch_first: bool, with_state: bool
) -> None:
    theirs = nn.RNN(4, 6, 2, "relu", batch_first=batch_first, dtype=torch.float64)
    ours = OrthogonalRNN(4, 6, 2, "relu", batch_first=batch_first, dtype=torch.float64)
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    for layer in range(2):
        state[f"bias_ih_l{layer}"] += state.pop(f"bias_hh_l{layer}")
    ours.load_state_dict(state)
    lengths = [7, 5, 5, 2, 1] if enforce_sorted else [2, 7, 1, 5, 5]
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted)
    args = (packed, torch.randn(2, 5, 6, dtype=torch.float64)) if with_state else (packed,)
    output, last = ours(*args)
    expected, expected_last = theirs(*args)
    assert isinstance(output, PackedSequence)
    torch.testing.assert_close(last, expected_last)
    for a, b in zip(
        pad_packed_sequence(output, batch_first),
        pad_packed_sequence(expected, batch_first),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_packed_complex_equals_each_sequence_alone() -> None:
    rnn = OrthogonalRNN(3, 5, 2, dtype=torch.complex128)
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in (2, 6, 4)]
    _, last = rnn(pack_sequence(sequences, enforce_sorted=False))
    for i, sequence in enumerate(sequences):
        torch.testing.assert_close(last[:, i], rnn(sequence)[1])


@pytest.mark.parametrize(
    ("dtype", "nonlinearity"),
    [(torch.float64, name) for name in ("modrelu", "tanh", "relu", "identity")]
    + [(torch.complex128, name) for name in ("modrelu", "identity")],
)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_the_naive_loop(
    dtype: torch.dtype, nonlinearity: str, bias: bool
) -> None:
    rnn = OrthogonalRNN(3, 5, 2, nonlinearity, bias, dtype=dtype, init="haar")
    x, hx = torch.randn(6, 4, 3, dtype=dtype), torch.randn(2, 4, 5, dtype=dtype)
    parameters = list(rnn.parameters())
    results = []
    for outputs in (rnn(x, hx), naive(rnn, x, hx)):
        loss = sum((out.abs() ** 2).sum() for out in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, parameters)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_complex_with_zero_imaginary_part_equals_real() -> None:
    real = OrthogonalRNN(3, 6, 2, dtype=torch.float64)
    unitary = OrthogonalRNN(3, 6, 2, dtype=torch.complex128)
    unitary.load_state_dict(real.state_dict())
    x = torch.randn(9, 4, 3, dtype=torch.float64)
    for a, b in zip(unitary(x), real(x), strict=True):
        torch.testing.assert_close(a, b.to(torch.complex128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, *REAL_AND_COMPLEX])
def test_real_input_is_cast_to_a_complex_layer_and_norm_is_kept(dtype: torch.dtype) -> None:
    rnn = OrthogonalRNN(3, 20, nonlinearity=None, bias=False, dtype=dtype, init="haar")
    hx = torch.randn(1, 4, 20, dtype=dtype)
    zeros = torch.zeros(1000, 4, 3, dtype=torch.float32 if dtype.is_complex else dtype)
    output, last = rnn(zeros, hx)
    assert output.dtype == dtype
    norms = torch.linalg.vector_norm(output, dim=-1) / torch.linalg.vector_norm(hx, dim=-1)
    tolerance = 1000 * torch.finfo(dtype).eps
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=tolerance)
    torch.testing.assert_close(last[0], output[-1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_dropout_acts_between_layers_while_training_only(dtype: torch.dtype) -> None:
    rnn = OrthogonalRNN(3, 8, 2, dropout=0.5, dtype=dtype)
    x = torch.randn(5, 2, 3)
    assert not torch.equal(rnn(x)[0], rnn(x)[0])
    rnn.eval()
    torch.testing.assert_close(rnn(x)[0], rnn(x)[0], rtol=0, atol=0)
    with pytest.warns(UserWarning, match="has no effect with num_layers=1"):
        OrthogonalRNN(3, 8, dropout=0.5)


# --- OrthogonalRNN: initial recurrences and tags -----------------------------------------------


def test_recurrences_are_tagged_and_the_tags_survive() -> None:
    for dtype, kind in ((torch.float32, ru.Orthogonal), (torch.complex64, ru.Unitary)):
        rnn = OrthogonalRNN(2, 4, 2, dtype=dtype)
        for model in (rnn, copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
            names = [name for name, _ in ru.tagged_parameters(model)]
            assert names == ["weight_hh_l0", "weight_hh_l1"]
            assert isinstance(ru.manifold_of(model.weight_hh_l1), kind)


def test_reset_parameters_draws_from_the_global_generator_in_place() -> None:
    rnn = OrthogonalRNN(2, 6)
    before = {name: (id(p), p.detach().clone()) for name, p in rnn.named_parameters()}
    torch.manual_seed(1)
    rnn.reset_parameters()
    first = {name: p.detach().clone() for name, p in rnn.named_parameters()}
    torch.manual_seed(1)
    rnn.reset_parameters()
    for name, p in rnn.named_parameters():
        assert id(p) == before[name][0]
        assert torch.equal(p, first[name]) and not torch.equal(p, before[name][1])
    assert ru.manifold_of(rnn.weight_hh_l0) is not None


def test_an_optimizer_keeps_the_recurrence_orthogonal() -> None:
    rnn = OrthogonalRNN(3, 16)
    optimizer = ru.optim.ProjUNNT(rnn.parameters(), lr=1e-2, base=torch.optim.RMSprop)
    start = rnn.weight_hh_l0.detach().clone()
    x = torch.randn(10, 8, 3)
    for _ in range(20):
        optimizer.zero_grad()
        rnn(x)[0].square().sum().backward()
        optimizer.step()
    assert not torch.equal(start, rnn.weight_hh_l0)
    assert ru.orthogonality_error(rnn.weight_hh_l0) <= 5e-7


def test_built_on_meta_and_made_real_later() -> None:
    rnn = OrthogonalRNN(3, 8, device="meta")
    rnn = rnn.to_empty(device="cpu")
    rnn.reset_parameters()
    assert ru.orthogonality_error(rnn.weight_hh_l0) <= 1e-6


# --- OrthogonalRNN: bad arguments --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_size": 0}, "input_size must be at least 1"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"nonlinearity": "gelu"}, "unknown nonlinearity 'gelu'.*modrelu"),
        ({"nonlinearity": "tanh", "dtype": torch.complex64}, "'tanh'.*use 'modrelu'"),
        ({"nonlinearity": "relu", "dtype": torch.complex64}, "'relu'.*use 'modrelu'"),
        ({"dropout": 1.5}, r"dropout is a probability, in \[0, 1\], got 1.5"),
        ({"init": "xavier"}, "unknown init 'xavier'.*henaff"),
        ({"dtype": torch.int64}, "floating or complex dtype"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrthogonalRNN(**{"input_size": 3, "hidden_size": 4, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "hx", "message"),
    [
        (torch.zeros(3), None, "2 .unbatched. or 3 dimensions"),
        (torch.zeros(5, 2, 4), None, "3 features in its last dimension, got 4"),
        (torch.zeros(0, 2, 3), None, "no steps"),
        (torch.zeros(5, 2, 3), torch.zeros(1, 3, 6), r"hx must have shape \(1, 2, 6\)"),
        (torch.zeros(5, 3), torch.zeros(1, 1, 6), r"hx must have shape \(1, 6\)"),
        (torch.zeros(5, 2, 3, dtype=torch.complex64), None, "input is torch.complex64"),
        (torch.zeros(5, 3), torch.zeros(1, 6, dtype=torch.complex64), "hx is torch.complex64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Tensor, hx: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrthogonalRNN(3, 6)(x, hx)


def test_repr_shows_what_is_not_the_default() -> None:
    assert repr(ModReLU(4)) == "ModReLU(4)"
    assert OrthogonalRNN(3, 6).extra_repr() == "3, 6"
    shown = OrthogonalRNN(3, 6, 2, None, batch_first=True, dtype=torch.complex64).extra_repr()
    assert shown == (
        "3, 6, num_layers=2, nonlinearity='identity', batch_first=True, dtype=torch.complex64"
    )
