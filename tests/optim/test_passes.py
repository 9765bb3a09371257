"""How much memory a step touches: a guard of its cost that does not depend on the machine."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import riemann_unn as ru
from tests.support import generator

N = 528  # larger than what is stacked, and than what is read more often for a better sketch

# Where a tensor's memory is, not what is in it.
LOOKS = {torch.ops.aten.is_set_to.default}


class Passes(TorchDispatchMode):
    """Counts the numbers that operations read and write in tensors of at least N² / 2 entries."""

    def __init__(self):
        super().__init__()
        self.touched = 0
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        memory = {t.data_ptr() for t in self._large((args, kwargs))}
        if function.is_view or "detach" in str(function) or function in LOOKS:
            return result
        self.touched += sum(_numbers(t) for t in self._large((args, kwargs)))
        for t in self._large(result):
            self.touched += _numbers(t)
            self.made += t.data_ptr() not in memory
        return result

    @staticmethod
    def _large(tree):
        return [
            t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and 2 * _numbers(t) >= N * N
        ]


def _numbers(t):
    """How many numbers a tensor has in memory, where expanded dimensions have one."""
    return math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride != 0)


def passes(cls, *, shape=(N, N), steps=3, **options):
    """Passes over the parameter of the last of some steps, none of which polishes, and how many
    tensors of its size that step made."""
    manifold = ru.Stiefel()
    x = manifold.random(*shape, dtype=torch.float32, generator=generator())
    p = ru.tag_(nn.Parameter(x.as_subclass(torch.Tensor)), manifold)
    optimizer = cls([p], lr=1e-2, **options)
    for step in range(steps):
        p.grad = torch.randn(shape, generator=generator(step)) / N
        counter = Passes()
        with counter:
            optimizer.step()
    return counter.touched / p.numel(), counter.made


@pytest.mark.parametrize("cls", [ru.optim.ProjUNNT, ru.optim.ProjUNND])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("strips", [False, True])
def test_a_low_rank_step_of_plain_sgd(cls, rank, strips, monkeypatch):
    """Two reads of the gradient, three of the point, and the update's read and write."""
    monkeypatch.setattr("riemann_unn.linalg.step.products._LONG", 0 if strips else N + 1)
    touched, made = passes(cls, rank=rank)
    assert touched <= 7 and made == 0


def test_large_points_of_one_kind_are_not_copied_to_move_together():
    x = ru.Stiefel().random(N, N, dtype=torch.float32, generator=generator())
    params = [
        ru.tag_(nn.Parameter(x.as_subclass(torch.Tensor).clone()), ru.Stiefel()) for _ in "ab"
    ]
    optimizer = ru.optim.ProjUNNT(params, lr=1e-2)
    for step in range(3):
        for p in params:
            p.grad = torch.randn(N, N, generator=generator(step)) / N
        counter = Passes()
        with counter:
            optimizer.step()
    assert counter.touched <= 2 * 7 * N * N and counter.made == 0


def test_the_sketch_of_a_point_that_stays_in_cache_is_applied_twice_more(monkeypatch):
    monkeypatch.setattr("riemann_unn.linalg.step.tangent.CACHED", N * N)
    touched, made = passes(ru.optim.ProjUNNT)
    assert touched == 15 and made == 0


def test_other_bases_write_the_displacement_and_read_it():
    plain, _ = passes(ru.optim.ProjUNNT)
    momentum, made = passes(ru.optim.ProjUNNT, momentum=0.9)
    # Clearing and writing the Riemannian gradient, each counted as a read too, the updates of
    # buffer and displacement, two reads of it.
    assert momentum <= plain + 2 + 2 + 8 + 2 and made == 0


@pytest.mark.parametrize(("cls", "limit"), [(ru.optim.Cayley, 56), (ru.optim.Expm, 42)])
def test_whole_steps(cls, limit):
    assert passes(cls)[0] <= limit


def test_a_step_that_checks_its_gradient_on_its_own_is_noticed(monkeypatch):
    ours = passes(ru.optim.ProjUNNT, rank=4)[0]
    monkeypatch.setattr("riemann_unn.optim.local_step.LocalStep._shows_nonfinite", lambda *_: False)
    assert passes(ru.optim.ProjUNNT, rank=4)[0] > ours


class Calls(TorchDispatchMode):
    """Counts operations, views among them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def calls_of_a_step(rank):
    """The mean over a polish period at n = 64."""
    p = ru.tag_(nn.Parameter(torch.eye(64)), ru.Orthogonal())
    optimizer = ru.optim.ProjUNNT([p], lr=1e-2, rank=rank)
    p.grad = torch.randn(64, 64, generator=generator()) / 64
    for _ in range(8):
        optimizer.step()
    with Calls() as calls:
        for _ in range(4):
            optimizer.step()
    return calls.count / 4


@pytest.mark.parametrize(("rank", "limit"), [(1, 30), (8, 62)])
def test_the_calls_of_a_step_of_a_small_matrix(rank, limit, monkeypatch):
    assert calls_of_a_step(rank) <= limit
    monkeypatch.setattr("riemann_unn.linalg.step.tangent._FORMED", 0)
    assert calls_of_a_step(rank) > limit  # negative control: without the Ω that is formed
