"""The convolutional recurrent network: its formula, its norm, its gradients."""

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.nn import (
    ConvRNN,
)
from tests.support import gaussian


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("nonlinearity", ["modrelu", "phase_sigmoid", "identity", None])
def test_recurrence_is_the_formula(dtype, nonlinearity):
    rnn = ConvRNN(2, 3, (4, 5), nonlinearity, dtype=dtype)
    nn.init.normal_(rnn.bias)
    x, hx = gaussian(6, 4, 2, 4, 5, dtype=dtype), gaussian(4, 3, 4, 5, dtype=dtype, seed=1)
    output, last = rnn(x, hx)
    state = hx
    for t in range(6):
        drive = torch.einsum("oi,nihw->nohw", rnn.weight_ih, x[t])
        z = ru.linalg.conv_apply(rnn.kernel, state) + drive + rnn.bias[:, None, None]
        modulus = z.abs()
        if nonlinearity == "modrelu":
            scale = torch.relu(modulus + rnn.activation.bias[:, None, None]) / modulus
        elif nonlinearity == "phase_sigmoid":
            scale = 1 / (1 + modulus**2).sqrt()
        else:
            scale = 1
        state = z * scale
        torch.testing.assert_close(output[t], state)
    torch.testing.assert_close(last, state)
    rnn.batch_first = True
    torch.testing.assert_close(rnn(x.transpose(0, 1), hx)[0].transpose(0, 1), output)
    one, end = rnn(x[:, 2], hx[2])
    torch.testing.assert_close(one, output[:, 2])
    torch.testing.assert_close(end, last[2])
    torch.testing.assert_close(rnn(x[:, 2])[0], rnn(x[:, 2], torch.zeros_like(hx[2]))[0])


@pytest.mark.parametrize(
    ("dtype", "lattice"), [(torch.float32, (16,)), (torch.complex64, (6, 6))], ids=str
)
def test_a_trained_kernel_keeps_the_norm_over_a_thousand_applications(dtype, lattice):
    rnn = ConvRNN(1, 4, lattice, None, bias=False, dtype=dtype)
    optimizer = ru.optim.ProjUNNT(rnn.parameters(), lr=0.01, base=torch.optim.Adam)
    for step in range(100):
        optimizer.zero_grad()
        output, _ = rnn(gaussian(5, 3, 1, *lattice, seed=step).to(dtype))
        (output[-1].abs() - 1).square().sum().backward()
        optimizer.step()
    state = gaussian(2, 4, *lattice, dtype=dtype)
    states = rnn.evolve(state, steps=1000)
    assert states.shape == (1000, *state.shape)
    ratio = states.flatten(2).norm(dim=2) / state.flatten(1).norm(dim=1)
    assert (ratio - 1).abs().max() <= 1e-4
    # Negative control: a kernel a little off its manifold does not.
    with torch.no_grad():
        rnn.kernel.mul_(1.001)
    grown = rnn.evolve(state, steps=1000)[-1].norm() / state.norm()
    assert grown > 2
    torch.testing.assert_close(rnn.evolve(state[0], steps=3), rnn.evolve(state, steps=3)[:, 0])


def test_gradients_reach_the_first_of_many_inputs():
    rnn = ConvRNN(1, 2, (4, 4), None, bias=False)
    x = gaussian(300, 1, 1, 4, 4).float().requires_grad_()
    rnn(x)[1].square().sum().backward()
    assert 0.01 < float(x.grad[0].norm() / x.grad[-1].norm()) < 100
