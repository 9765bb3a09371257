"""Points kept between steps: what is kept must never outlive what its user changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.optim.batch import START
from tests.support import assert_on_manifold, gaussian, generator, point


def parameters(count, n=6, dtype=torch.float64, manifold=None):
    manifold = manifold or ru.Orthogonal()
    return [ru.tag_(nn.Parameter(point(n, n, dtype=dtype, seed=i)), manifold) for i in range(count)]


def give_gradients(params, step=0):
    for i, p in enumerate(params):
        p.grad = gaussian(*p.shape, dtype=p.dtype, seed=100 * step + i)


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()


def gap(some, others):
    return max(float((a - b).detach().abs().max()) for a, b in zip(some, others, strict=True))


OPTIMIZERS = {
    "T": lambda p: ru.optim.ProjUNNT(p, lr=0.1),
    "T, momentum": lambda p: ru.optim.ProjUNNT(p, lr=0.1, rank=2, momentum=0.9),
    "D": lambda p: ru.optim.ProjUNND(p, lr=0.1),
    "Cayley": lambda p: ru.optim.Cayley(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_points_that_move_together_take_the_steps_they_take_alone(name):
    together, alone = parameters(5), parameters(5)
    train(OPTIMIZERS[name](together), together, 4)
    singles = [OPTIMIZERS[name]([p]) for p in alone]
    for step in range(4):
        give_gradients(alone, step)
        for optimizer in singles:
            optimizer.step()
    assert gap(together, alone) < 1e-12
    for p in together:
        assert_on_manifold(p)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_who_takes_part_may_change_between_steps(name):
    """Gradients that come and go give the steps of optimizers that never saw another pattern."""
    patterns = [(0, 1, 2, 3), (1, 3), (0, 1, 2, 3), (2,), (3, 1), (0, 1, 2, 3)]
    together, alone = parameters(4), parameters(4)
    optimizer = OPTIMIZERS[name](together)
    singles = [OPTIMIZERS[name]([p]) for p in alone]
    for step, chosen in enumerate(patterns):
        for params in (together, alone):
            give_gradients(params, step)
            for i, p in enumerate(params):
                if i not in chosen:
                    p.grad = None
        optimizer.step()
        for i in chosen:
            singles[i].step()
    assert gap(together, alone) < 1e-12


@pytest.fixture(params=[True, False])
def quick_look(request, monkeypatch):
    """With torch's comparison of two tensors' memory, and on a device that does not have it."""

    def missing(*_):
        raise NotImplementedError

    if not request.param:
        monkeypatch.setattr(torch.Tensor, "is_set_to", missing)


@pytest.mark.usefixtures("quick_look")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.clone(),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x])[1],
        lambda x: x.mT,  # the same memory, read along the other side
    ],
)
def test_a_parameter_given_other_memory_moves_there(count, change):
    params, other = parameters(count), parameters(count)
    optimizer, twin = OPTIMIZERS["T"](params), OPTIMIZERS["T"](other)
    train(optimizer, params, 2)
    train(twin, other, 2)
    for first in (2, 4):
        for p, q in zip(params, other, strict=True):
            q.data = change(p.data).clone()
            p.data = change(p.data)
        memory = [p.data_ptr() for p in params]
        train(optimizer, params, 2, first=first)
        train(twin, other, 2, first=first)
        assert gap(params, other) == 0
        assert [p.data_ptr() for p in params] == memory


@pytest.mark.usefixtures("quick_look")
@pytest.mark.parametrize("count", [1, 3])
def test_memory_given_by_data_is_checked(count):
    """Assigning to ``data`` does not count as a write for autograd."""
    params = parameters(count)
    optimizer = OPTIMIZERS["T"](params)
    train(optimizer, params, 2)
    kept = [p.detach().clone() for p in params]
    params[-1].data = 2 * params[-1].data
    with pytest.raises(ru.OffManifoldError, match=rf"\['params'\]\[{count - 1}\]"):
        train(optimizer, params, 1)
    assert gap(params[:-1], kept[:-1]) == 0 if count > 1 else True
    assert torch.equal(params[-1], 2 * kept[-1])


@pytest.mark.parametrize("count", [1, 3])
def test_writes_are_counted_anew_after_a_swap_for_another_view_of_the_memory(count, monkeypatch):
    params = parameters(count)
    optimizer = OPTIMIZERS["T"](params)
    train(optimizer, params, 2)
    for p in params:
        p.grad = None
        view = ru.tag_(nn.Parameter(p.data), p.manifold)
        torch.utils.swap_tensors(p, view)
        del view
    train(optimizer, params, 1, first=2)
    with monkeypatch.context() as patch:
        patch.setattr(type(params[0].manifold), "estimated_error", None)  # not asked once more
        train(optimizer, params, 1, first=3)
    with torch.no_grad():
        params[-1].mul_(2)
    with pytest.raises(ru.OffManifoldError, match=rf"\['params'\]\[{count - 1}\]"):
        train(optimizer, params, 1, first=4)


def test_memory_read_in_another_shape_is_refused():
    for count in (1, 3):
        params = parameters(count)
        optimizer = OPTIMIZERS["T"](params)
        train(optimizer, params, 2)
        for p in params:
            p.grad, p.data = None, p.data.view(6, 3, 2)
        with pytest.raises(ru.ManifoldError, match=r"\['params'\]\[0\].* is tagged Orthogonal"):
            train(optimizer, params, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_memory_read_as_another_dtype_is_checked(count):
    params = parameters(count, dtype=torch.float16)
    optimizer = OPTIMIZERS["T"](params)
    train(optimizer, params, 2)
    for p in params:
        p.grad, p.data = None, p.data.view(torch.bfloat16)
    with pytest.raises(ru.OffManifoldError, match=r"\['params'\]\[0\]"):
        train(optimizer, params, 1)


def test_points_of_another_shape_move_in_new_memory(recwarn):
    params = [ru.tag_(nn.Parameter(point(6, 3, seed=i)), ru.Stiefel()) for i in range(3)]
    optimizer = ru.optim.ProjUNNT(params, lr=0.1, sketch="svd")
    train(optimizer, params, 2)
    for p in params:
        p.grad, p.data = None, p.data[:, :2].clone()
    other = [ru.tag_(nn.Parameter(p.detach().clone()), ru.Stiefel()) for p in params]
    twin = ru.optim.ProjUNNT(other, lr=0.1, sketch="svd")
    train(optimizer, params, 2)
    train(twin, other, 2)
    assert gap(params, other) < 1e-13
    assert not [w for w in recwarn if "resized" in str(w.message)]


def test_points_of_one_kind_that_move_apart_overflow_together():
    params = parameters(3, dtype=torch.float32)
    optimizer = OPTIMIZERS["T"](params)
    train(optimizer, params, 1)
    params[0].grad = None
    optimizer.step()  # from here on the first is a step behind
    give_gradients(params)
    kept = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = 1e39
    with pytest.raises(ru.NonFiniteError) as raised:
        optimizer.step()
    for i in range(3):
        assert f"['params'][{i}]" in str(raised.value)
    assert gap(params, kept) == 0


KERNELS = [
    (ru.Stiefel(flatten=True), (4, 2, 3, 3)),
    (ru.Stiefel(), (3, 7)),
    (ru.Stiefel(), (2, 7, 3)),
    (ru.OrthogonalConv(1), (3, 3, 5)),
    (ru.OrthogonalConv(2), (2, 2, 3, 4, 4)),
    (ru.OrthogonalConv(1), (2, 4, 5)),
    (ru.UnitaryConv(1), (3, 3, 5)),
]


@pytest.mark.parametrize(("manifold", "shape"), KERNELS)
@pytest.mark.parametrize("name", ["T", "D"])
def test_kernels_that_move_together(manifold, shape, name):
    """They take the steps that they take alone, and without a gradient none, bit for bit."""
    dtype = torch.complex128 if isinstance(manifold, ru.UnitaryConv) else torch.float64
    together, alone = (
        [
            ru.tag_(nn.Parameter(x.as_subclass(torch.Tensor)), manifold)
            for seed in range(3)
            for x in [manifold.random(*shape, dtype=dtype, generator=generator(seed))]
        ]
        for _ in range(2)
    )
    optimizer, singles = OPTIMIZERS[name](together), [OPTIMIZERS[name]([p]) for p in alone]
    for step in range(4):
        for params in (together, alone):
            give_gradients(params, step)
            params[1].grad.zero_()
            if len(shape) - manifold.point_dims(params[0]) > 0:
                params[2].grad[1].zero_()
        before = [p.detach().clone() for p in together]
        optimizer.step()
        for single in singles:
            single.step()
        assert gap(together, alone) < 1e-12
        assert torch.equal(together[1], before[1]) and not torch.equal(together[0], before[0])
        if len(shape) - manifold.point_dims(together[0]) > 0:
            for params in (together, alone):
                assert torch.equal(params[2][1], before[2][1])
            assert not torch.equal(together[2][0], before[2][0])


def test_another_precision_is_noticed_and_checked():
    params = parameters(3)
    optimizer = OPTIMIZERS["T"](params)
    train(optimizer, params, 2)
    for p in params:
        p.grad, p.data = None, p.data.float()
    train(optimizer, params, 2)
    for p in params:
        assert p.dtype == torch.float32
        assert_on_manifold(p)
    params[1].grad, params[1].data = None, 2 * params[1].data
    for p in params:
        p.data = p.data.double()
        p.grad = torch.zeros_like(p)
    with pytest.raises(ru.OffManifoldError, match=r"\['params'\]\[1\]"):
        optimizer.step()


def test_tags_that_change_between_steps():
    params = parameters(3)
    optimizer = OPTIMIZERS["T"](params)
    train(optimizer, params, 1)
    ru.untag_(params[1])
    free = params[1].detach().clone()
    train(optimizer, params, 1)
    # Plain SGD, as for every parameter without a tag.
    assert gap([free - 0.1 * params[1].grad], [params[1]]) < 1e-15
    ru.tag_(params[1], ru.Orthogonal())
    with pytest.raises(ru.OffManifoldError):
        train(optimizer, params, 1)
    with torch.no_grad():
        params[1].copy_(point(6, 6))
    train(optimizer, params, 1)
    for p in params:
        assert_on_manifold(p)


def test_optimizers_that_share_a_loaded_state_do_not_write_into_each_other():
    params, other = parameters(3), parameters(3)
    optimizer, twin = OPTIMIZERS["T"](params), OPTIMIZERS["T"](other)
    train(optimizer, params, 2)
    twin.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other, strict=True):
        q.data = p.data.clone()
    before = copy.deepcopy(twin.state_dict()["state"])
    train(optimizer, params, 1, first=2)
    for i, state in twin.state_dict()["state"].items():
        assert torch.equal(state[START], before[i][START])
    train(twin, other, 1, first=2)
    assert gap(params, other) == 0


def test_a_state_with_starts_of_several_ranks_begins_anew():
    params = parameters(3)
    optimizer = OPTIMIZERS["T"](params)
    train(optimizer, params, 2)
    optimizer.state[params[1]][START] = torch.eye(6, dtype=torch.float64)[:2]
    train(optimizer, params, 2)
    for i in (0, 2):
        del optimizer.state[params[i]][START]
        train(optimizer, params, 2)
    assert {tuple(optimizer.state[p][START].shape) for p in params} == {(1, 6)}


@pytest.mark.parametrize("count", [1, 3])
def test_a_state_that_was_cleared_fills_again(count):
    params = parameters(count)
    optimizer = OPTIMIZERS["T"](params)
    train(optimizer, params, 2)
    optimizer.state.clear()
    train(optimizer, params, 1)
    assert all(START in optimizer.state[p] for p in params)


def test_small_points_make_no_view_of_every_parameter_in_later_steps(monkeypatch):
    params = parameters(50)
    optimizer = OPTIMIZERS["T"](params)
    train(optimizer, params, 2)
    give_gradients(params, 5)
    made = []
    detach = torch.Tensor.detach
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: made.append(x) or detach(x))
    optimizer.step()
    assert len(made) < 5
