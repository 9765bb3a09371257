"""Optimizers on convolution kernels: unitary at every frequency, real where they should be."""

import copy
import warnings

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.linalg import conv_apply, conv_matrix, conv_singular_values
from tests.support import COMPLEX, REAL, dense_step, every_second, gaussian, generator

OPTIMIZERS = {
    "projunn-t": (ru.optim.ProjUNNT, {"rank": 1}),
    "projunn-d": (ru.optim.ProjUNND, {"rank": 2}),
    "cayley": (ru.optim.Cayley, {}),
    "expm": (ru.optim.Expm, {}),
}
PHI = {"projunn-t": "exp", "projunn-d": "polar", "cayley": "cayley", "expm": "exp"}
SQUARE = (3, 3, 4, 4)
all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def kernel(*shape, dtype=torch.float64, seed=0):
    ndim = len(shape) - 2
    manifold = ru.UnitaryConv(ndim) if dtype.is_complex else ru.OrthogonalConv(ndim)
    x = manifold.random(*shape, dtype=dtype, generator=generator(seed))
    return ru.tag_(nn.Parameter(x.as_subclass(torch.Tensor)), manifold)


def whole_operator_error(k):
    """Largest distance from 1 of a singular value of the dense operator."""
    return float((torch.linalg.svdvals(conv_matrix(k.detach())) - 1).abs().max())


@pytest.mark.parametrize(
    ("shape", "dtype", "name"),
    every_second([SQUARE, (4, 2, 6), (2, 4, 3, 5)], REAL + COMPLEX, OPTIMIZERS),
    ids=str,
)
def test_a_thousand_steps_stay_unitary_and_learn(shape, dtype, name):
    cls, options = OPTIMIZERS[name]
    k, target = kernel(*shape, dtype=dtype), kernel(*shape, dtype=dtype, seed=1).detach()
    optimizer = cls([k], lr=0.02, base=torch.optim.SGD, momentum=0.5, **options)
    x = gaussian(4, *shape[1:], dtype=dtype, seed=2)
    answer = conv_apply(target, x)
    losses = []
    for _ in range(1000 if dtype in REAL and shape == SQUARE else 200):
        optimizer.zero_grad()
        loss = (conv_apply(k, x) - answer).abs().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    limit = 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-5
    assert whole_operator_error(k) <= limit
    assert k.dtype == dtype
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shape", [(3, 3, 4), (4, 2, 2, 3), (2, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@all_optimizers
def test_one_whole_step_is_the_dense_step_of_the_operator(shape, dtype, name):
    cls, options = OPTIMIZERS[name]
    k = kernel(*shape, dtype=dtype)
    before, k.grad = k.detach().clone(), gaussian(*shape, dtype=dtype, seed=3)
    options = options if "rank" not in options else {"rank": max(shape[:2])}
    cls([k], lr=0.1, **options).step()
    delta = conv_matrix(-0.1 * k.grad)
    expected = dense_step(conv_matrix(before), delta, PHI[name])
    torch.testing.assert_close(conv_matrix(k.detach()), expected, atol=1e-12, rtol=0)


@all_optimizers
@pytest.mark.parametrize("lr", [1e-6, 1e3, 1e9])
def test_tiny_and_huge_steps_are_exact(name, lr):
    cls, options = OPTIMIZERS[name]
    k = kernel(4, 4, 4, 6)
    optimizer = cls([k], lr=lr, **options)
    for step in range(5):
        k.grad = gaussian(4, 4, 4, 6, seed=step)
        optimizer.step()
    assert whole_operator_error(k) <= 1e-12


@pytest.mark.parametrize("sketch", ["tangent", "lsi", "column", "svd"])
@pytest.mark.parametrize("gradient", ["zero at most frequencies", "rank one", "zero"])
def test_degenerate_gradients(sketch, gradient):
    k = kernel(4, 4, 4, 4)
    before = k.detach().clone()
    optimizer = ru.optim.ProjUNNT([k], lr=0.1, rank=2, sketch=sketch)
    for step in range(8):
        if gradient == "zero":
            k.grad = torch.zeros_like(k)
        elif gradient == "rank one":
            k.grad = gaussian(4, 1, 4, 4, seed=step) * gaussian(4, seed=9)[None, :, None, None]
        else:
            k.grad = torch.ones(4, 4, 4, 4, dtype=torch.float64) * (1 + step)
        optimizer.step()
    assert torch.equal(k, before) == (gradient == "zero")
    assert whole_operator_error(k) <= 1e-12


def test_negative_control_sketching_half_a_spectrum_breaks_the_kernel():
    """What the one-of-each-pair view prevents: random numbers that differ at f and -f."""
    k = kernel(3, 3, 4, 4).detach()
    spectrum = torch.fft.rfft2(k).flatten(2).movedim(-1, 0)
    drawn = ru.Unitary().random(*spectrum.shape, dtype=spectrum.dtype, generator=generator(5))
    moved = (drawn.as_subclass(torch.Tensor) @ spectrum).movedim(0, -1).unflatten(-1, (4, 3))
    wrong = torch.fft.irfft2(moved, s=(4, 4))
    assert (conv_singular_values(wrong) - 1).abs().max() > 1e-2


def test_step_is_bit_equal_after_saving_and_loading(tmp_path):
    def run(k, optimizer, steps):
        for step in steps:
            k.grad = gaussian(*k.shape, dtype=k.dtype, seed=step)
            optimizer.step()

    def make():
        k = kernel(4, 4, 4, 4, dtype=torch.float32)
        return k, ru.optim.ProjUNNT([k], lr=0.01, rank=2, base=torch.optim.Adam)

    straight, optimizer = make()
    run(straight, optimizer, range(20))
    half, optimizer = make()
    run(half, optimizer, range(10))
    torch.save({"k": half.detach(), "o": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, optimizer = make()
    resumed.data.copy_(saved["k"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of complex numbers cast to real ones
        optimizer.load_state_dict(saved["o"])
    run(resumed, optimizer, range(10, 20))
    assert torch.equal(resumed, straight)


def test_kernels_beside_matrices_of_the_same_size_keep_apart():
    k, w = kernel(4, 4, 4, dtype=torch.float32), nn.Parameter(torch.eye(4))
    ru.tag_(w, ru.Orthogonal())
    alone = copy.deepcopy(w)
    both = ru.optim.ProjUNNT([k, w], lr=0.1)
    one = ru.optim.ProjUNNT([alone], lr=0.1)
    for step in range(3):
        k.grad = gaussian(4, 4, 4, seed=step).float()
        w.grad = gaussian(4, 4, seed=step).float()
        alone.grad = w.grad.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            both.step()
        one.step()
    assert torch.equal(w, alone)


def test_bfloat16_kernels_move_as_a_master_copy():
    k = nn.Parameter(kernel(4, 4, 4, 4, dtype=torch.float32).detach().bfloat16())
    ru.tag_(k, ru.OrthogonalConv(2))
    optimizer = ru.optim.ProjUNNT([k], lr=1e-3)
    for step in range(20):
        k.grad = gaussian(4, 4, 4, 4, seed=step).bfloat16()
        optimizer.step()
    assert float(ru.orthogonality_error(optimizer.state[k]["master"], ru.OrthogonalConv(2))) < 5e-7
    assert torch.equal(k, optimizer.state[k]["master"].bfloat16())


def test_off_manifold_kernels_are_refused_or_projected():
    k = nn.Parameter(0.1 * gaussian(4, 4, 4, 4).float())
    ru.tag_(k, ru.OrthogonalConv(2))
    with pytest.raises(ru.OffManifoldError, match=r"off OrthogonalConv\(2\); call"):
        ru.optim.ProjUNNT([("conv.weight", k)], lr=0.1)
    ru.init.warm_start_(k)
    ru.optim.ProjUNNT([k], lr=0.1)
    assert float(ru.orthogonality_error(k)) < 5e-7


@all_optimizers
def test_frequencies_that_cannot_move_do_not_drift(name):
    """One real number at its own mirror frequency is +1 or -1: only rounding moves it."""
    cls, options = OPTIMIZERS[name]
    k = kernel(1, 1, 8, 8, dtype=torch.float32)
    optimizer = cls([k], lr=0.03, **(options | {"rank": 1} if "rank" in options else options))
    for i in range(900):
        k.grad = gaussian(1, 1, 8, 8, dtype=torch.float32, seed=i)
        optimizer.step()
    assert float(k.manifold.orthogonality_error(k.detach()).max()) <= 5e-7


@pytest.mark.parametrize("shape", [(6, 6, 4, 5), (7, 5, 6), (4, 8, 3, 4), (2, 6, 6, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_low_rank_steps_turn_the_matrix_at_each_frequency(shape, dtype, rank, count):
    """Beside the exponential of the generator that ``last_step`` tells; some steps polish."""
    ndim = 1 if shape in ((7, 5, 6), (2, 6, 6, 5)) else 2
    manifold = ru.UnitaryConv(ndim) if dtype.is_complex else ru.OrthogonalConv(ndim)
    drawn = (
        manifold.random(*shape, dtype=dtype, generator=generator(seed)) for seed in range(count)
    )
    kernels = [ru.tag_(nn.Parameter(x.as_subclass(torch.Tensor)), manifold) for x in drawn]
    optimizer = ru.optim.ProjUNNT(kernels, lr=0.2, rank=rank)
    for step in range(6):
        before = [manifold.to_matrices(k.detach()).flatten(0, -3) for k in kernels]
        for i, k in enumerate(kernels):
            k.grad = gaussian(*shape, dtype=dtype, seed=10 * step + i)
        optimizer.step()
        for k, x in zip(kernels, before, strict=True):
            told = optimizer.last_step()[k]
            v, d = told["directions"], -0.2 * told["coordinates"]
            inner = v.mH @ d
            generator_ = d @ v.mH - v @ d.mH - 0.5 * v @ (inner - inner.mH) @ v.mH
            turn = torch.linalg.matrix_exp(generator_)
            square = x.shape[-1] == x.shape[-2]
            expected = x @ turn if square else (x.mH @ turn).mH
            after = manifold.to_matrices(k.detach()).flatten(0, -3)
            torch.testing.assert_close(after, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("p", [8, 72])
def test_single_precision_kernels_stay_where_they_were_transformed_in_double(p):
    """After long steps and their polishes the error is that of rounding, as of matrices."""
    k = kernel(p, p, 4, 6, dtype=torch.float32)
    optimizer = ru.optim.ProjUNNT([k], lr=0.3, rank=1)
    for step in range(320):
        k.grad = gaussian(p, p, 4, 6, dtype=torch.float32, seed=step)
        optimizer.step()
    assert float(k.manifold.orthogonality_error(k.detach()).max()) <= 5e-7
