"""Half precision: a float32 master moves, and the stored weight is its rounding, bit for bit."""

from __future__ import annotations

import io

import pytest
import torch

import riemann_unn as ru
from tests.support import error, gaussian, parameter

HALVES = [torch.bfloat16, torch.float16]
CLASSES = {
    "T": ru.optim.ProjUNNT,
    "D": ru.optim.ProjUNND,
    "cayley": ru.optim.Cayley,
    "expm": ru.optim.Expm,
}


def half(dtype, seed=0):
    return ru.tag_(
        torch.nn.Parameter(parameter(24, 24, seed=seed).detach().to(dtype)), ru.Stiefel()
    )


def run(p, optimizer, steps):
    for step in steps:
        p.grad = gaussian(*p.shape, dtype=torch.float32, seed=step).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_the_stored_weight_is_the_rounded_master(dtype, name, base):
    p = half(dtype)
    optimizer = CLASSES[name]([p], lr=1e-3, base=base)
    for step in range(50):
        run(p, optimizer, [step])
        master = optimizer.state[p]["master"]
        assert master.dtype == torch.float32 and p.dtype == dtype
        assert torch.equal(p, master.to(dtype))
        assert error(master, ru.Stiefel()) <= 5e-7
    for value in optimizer.state[p].values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.dtype == torch.float32
    assert p.grad.dtype == dtype


@pytest.mark.slow
def test_masters_do_not_drift():
    p = half(torch.bfloat16)
    optimizer = ru.optim.ProjUNNT([p], lr=1e-3)
    run(p, optimizer, range(10_000))
    assert error(optimizer.state[p]["master"], ru.Stiefel()) <= 5e-7
    assert torch.equal(p, optimizer.state[p]["master"].to(torch.bfloat16))


def test_small_steps_add_up_in_the_master():
    p = half(torch.bfloat16)
    start = p.detach().clone()
    optimizer = ru.optim.ProjUNNT([p], lr=1e-5)
    g = gaussian(24, 24, dtype=torch.float32)
    for _ in range(2000):  # each far below bfloat16's resolution
        p.grad = (g / torch.linalg.matrix_norm(g)).to(p.dtype)
        optimizer.step()
    assert (p - start).abs().max() > 1e-3


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_resume_keeps_the_masters_bits(base):
    p = half(torch.bfloat16)
    optimizer = ru.optim.ProjUNNT([p], lr=1e-3, base=base)
    run(p, optimizer, range(10))
    file = io.BytesIO()
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, file)
    run(p, optimizer, range(10, 20))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    q = ru.tag_(torch.nn.Parameter(saved["p"]), ru.Stiefel())
    resumed = ru.optim.ProjUNNT([q], lr=1e-3, base=base)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.state[q]["master"].dtype == torch.float32
    run(q, resumed, range(10, 20))
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["master"], resumed.state[q]["master"])


def test_new_values_replace_the_master():
    p = half(torch.bfloat16)
    optimizer = ru.optim.ProjUNNT([p], lr=1e-3)
    run(p, optimizer, range(3))
    with torch.no_grad():
        p.copy_(half(torch.bfloat16, seed=5))
    other = p.detach().clone()
    p.grad = 1e-6 * torch.ones_like(p)
    optimizer.step()
    assert (optimizer.state[p]["master"] - other.float()).abs().max() < 2e-2
    with torch.no_grad():
        p.mul_(2)
    with pytest.raises(ru.OffManifoldError):
        optimizer.step()


@pytest.mark.parametrize("shape", [(24, 24), (24, 9), (9, 24)])
@pytest.mark.parametrize("rank", [1, None])
def test_states_are_in_the_order_of_memory_of_their_parameter(shape, rank):
    """As torch's checkpoints need it to send them to other processes."""
    p = torch.nn.Parameter(parameter(*shape).detach().bfloat16())
    ru.tag_(p, ru.Stiefel())
    optimizer = ru.optim.ProjUNNT([p], lr=1e-2, rank=rank, base=torch.optim.Adam)
    run(p, optimizer, range(2))
    kept = [x for x in optimizer.state[p].values() if getattr(x, "shape", None) == p.shape]
    assert len(kept) == 3 and all(x.stride() == p.stride() for x in kept)


def test_zero_gradients_leave_the_stored_bits():
    p = half(torch.bfloat16)
    before = p.detach().clone()
    optimizer = ru.optim.ProjUNNT([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p, before)


def test_warm_start_and_random_points_in_half_precision():
    for dtype in HALVES:
        p = ru.tag_(torch.nn.Parameter(gaussian(8, 8).to(dtype)), ru.Orthogonal())
        ru.init.warm_start_(p)
        assert p.dtype == dtype and error(p) < 2e-2
        assert error(ru.Orthogonal().random(8, 8, dtype=dtype)) < 2e-2
