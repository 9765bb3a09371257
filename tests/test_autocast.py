"""What this package computes with weights is the same, bit for bit, under the user's autocast."""

from __future__ import annotations

import copy
import pickle
from types import FunctionType

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import riemann_unn as ru
from riemann_unn import linalg
from riemann_unn.linalg import maps
from tests.support import gaussian, generator, low_rank, parameter, point

F32 = torch.float32


def rand(*shape, seed=0):
    return gaussian(*shape, dtype=F32, seed=seed)


def orthonormal(*shape, seed=0):
    return point(*shape, dtype=F32, seed=seed)


def numbers(found):
    """All that a result tells: its tensors, also those inside of records, and its numbers."""
    if hasattr(found, "__dataclass_fields__"):
        found = [getattr(found, name) for name in found.__dataclass_fields__]
    return [
        leaf for leaf in tree_leaves(found) if isinstance(leaf, (torch.Tensor, int, float, bool))
    ]


def assert_same_under_autocast(call):
    """Call twice, on fresh arguments, once under autocast."""
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(numbers(call()))
            assert torch.is_autocast_enabled("cpu") == enabled
    assert found[0] and len(found[0]) == len(found[1])
    for plain, cast in zip(*found, strict=True):
        if isinstance(plain, torch.Tensor):
            assert plain.dtype is cast.dtype and torch.equal(plain, cast)
        else:
            assert plain == cast


SKEW, KERNEL = maps.skew(rand(9, 9)), rand(3, 3, 5, seed=3)
TURN = torch.linalg.qr(rand(9, 2, seed=1))[0]
W, INPUTS = low_rank(8, 7, 3).float() + 0.1 * rand(8, 7), rand(60, 7, seed=5)
X, TURNED, TARGETS, GRAM = orthonormal(9, 9), SKEW @ TURN, INPUTS @ W.mT, W.mT @ W
X_TURN = X @ TURN


def _gram(u):
    return u @ GRAM[:6, :6]


CALLS = {
    "activation_kernel": lambda f: f(rand(5, 4), rand(5, 4, seed=1)),
    "balanced": lambda f: f(rand(8, 3), rand(3, 7)),
    "calibrated_factors": lambda f: f(
        linalg.spectral_factors(W, rank=2), inputs=INPUTS, targets=torch.relu(TARGETS)
    ),
    "cayley": lambda f: f(SKEW),
    "check_phi": lambda f: (f("exp"), 0),
    "conv_adjoint": lambda f: f(KERNEL),
    "conv_apply": lambda f: f(KERNEL, rand(2, 3, 5)),
    "conv_cayley": lambda f: f(linalg.conv_skew(KERNEL)),
    "conv_compose": lambda f: f(KERNEL, KERNEL),
    "conv_decay": lambda f: f(KERNEL),
    "conv_exp": lambda f: f(linalg.conv_skew(KERNEL)),
    "conv_from_spectrum": lambda f: f(linalg.conv_spectrum(KERNEL), size=(5,), real=True),
    "conv_identity": lambda f: f(3, 3, (5,)),
    "conv_log": lambda f: f(linalg.conv_exp(0.1 * linalg.conv_skew(KERNEL))),
    "conv_matrix": lambda f: f(KERNEL),
    "conv_polar": lambda f: f(KERNEL),
    "conv_singular_values": lambda f: f(KERNEL),
    "conv_skew": lambda f: f(KERNEL),
    "conv_spectrum": lambda f: f(KERNEL),
    "conv_truncate": lambda f: f(linalg.conv_polar(KERNEL), radius=1),
    "core_minus_identity": lambda f: f(SKEW, "polar"),
    "exp_skew": lambda f: f(SKEW),
    "fit_rows": lambda f: f(rand(8, 3), rand(8, 3, seed=1), linalg.ACTIVATIONS["relu"]),
    "fold_kernel": lambda f: f(rand(8, 12), shape=torch.Size((8, 3, 2, 2)), split="channel"),
    "function_error": lambda f: f(W, 0.9 * W),
    "function_factors": lambda f: f(W, rank=2),
    "gauss_hermite": lambda f: f(8, W),
    "hadamard": lambda f: f(12),
    "hermitian_function": lambda f: f(GRAM, torch.cos, lambda w: -torch.sin(w)),
    "nearest_hadamard_orders": lambda f: f(7),
    "newton_schulz_": lambda f: f(1.01 * orthonormal(9, 4)),
    "next_directions": lambda f: f(TURN, TURNED),
    "polar": lambda f: f(rand(9, 4)),
    "polish_": lambda f: f(1.01 * orthonormal(80, 70), step=15),
    "procrustes": lambda f: f(rand(6, 6), _gram, project=linalg.polar),
    "retract_low_rank": lambda f: f(orthonormal(9, 9), rand(9, 2), rand(9, 2), phi="exp"),
    "retract_low_rank_": lambda f: f(orthonormal(9, 9), rand(9, 2), rand(9, 2), phi="exp"),
    "ridge_by_gcv": lambda f: f(INPUTS, TARGETS),
    "rotate_by": lambda f: f(orthonormal(9, 9), SKEW.clone(), phi="exp"),
    "rotate_low_rank_": lambda f: (f(x := X.clone(), TURN, TURNED, X_TURN, phi="exp"), x),
    "rotate_whole_": lambda f: f(orthonormal(9, 9), SKEW.clone(), phi="exp"),
    "sketch": lambda f: f(rand(9, 9), rank=2, generator=generator()),
    "skew": lambda f: f(rand(9, 9)),
    "spectral_factors": lambda f: f(W, rank=2),
    "tangent_coordinates": lambda f: f(X, rand(9, 9), TURN, X_TURN),
    "tangent_directions": lambda f: f(orthonormal(9, 9), rand(9, 9), rank=2, generator=generator()),
    "tangent_energies": lambda f: f(orthonormal(9, 9), rand(9, 9)),
    "tangent_gradient": lambda f: f(orthonormal(4, 9), TURN, rand(9, 2), rand(4, 2)),
    "tangent_times": lambda f: f(orthonormal(9, 9), rand(9, 9), TURN),
    "unfold_kernel": lambda f: f(rand(8, 3, 2, 2), split="spatial"),
    "unitary_core": lambda f: f(SKEW, phi="polar"),
    "whitened_factors": lambda f: f(W, rank=2, inputs=INPUTS),
}


def test_all_of_linalg_is_here():
    public = {n for n in linalg.__all__ if isinstance(getattr(linalg, n), FunctionType)}
    assert public == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_linalg(name):
    assert_same_under_autocast(lambda: CALLS[name](getattr(linalg, name)))


def test_kernels_without_protection_are_told():
    """The control: what is not protected does differ."""
    with pytest.raises(AssertionError):
        assert_same_under_autocast(lambda: maps.polar(rand(9, 4)))


def test_functions_of_linalg_can_be_pickled():
    assert pickle.loads(pickle.dumps(linalg.polar)) is linalg.polar


@pytest.mark.parametrize(
    ("manifold", "shape"),
    [
        (ru.Stiefel(), (9, 4)),
        (ru.Orthogonal(det=-1), (8, 8)),
        (ru.Stiefel(), (4, 600)),
        (ru.OrthogonalConv(ndim=1), (3, 3, 5)),
    ],
)
def test_manifolds(manifold, shape):
    x = manifold.random(*shape, dtype=F32, generator=generator()).as_subclass(torch.Tensor)
    u, v = (manifold.proju(x, rand(*shape, seed=i)) for i in (1, 2))
    off = x + 1e-3 * u
    for call in (
        lambda: manifold.random(*shape, dtype=F32, generator=generator()),
        lambda: manifold.origin(*shape, dtype=F32),
        lambda: manifold.projx(x + 0.1 * rand(*shape)),
        lambda: manifold.proju(x, rand(*shape)),
        lambda: manifold.egrad2rgrad(x, rand(*shape)),
        lambda: manifold.inner(x, u, v),
        lambda: manifold.retr(x, u),
        lambda: manifold.expmap(x, u),
        lambda: manifold.transp(x, off, v),
        lambda: manifold.retr_transp(x, u, v),
        lambda: manifold.transp_follow_retr(x, u, v),
        lambda: manifold.expmap_transp(x, u, v),
        lambda: manifold.transp_follow_expmap(x, u, v),
        lambda: manifold.orthogonality_error(off),
        lambda: manifold.estimated_error(off),
        lambda: manifold.has_det(x),
        lambda: manifold.check_point_on_manifold(x),
        lambda: manifold.check_vector_on_tangent(x, u),
        lambda: ru.orthogonality_error(off, manifold),
    ):
        assert_same_under_autocast(call)


def test_large_points_are_admitted():
    """The check of large points is made of products, which autocast would round to eight bits."""
    p = parameter(520, 520)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ru.optim.ProjUNNT([p], lr=0.1)


def test_monitor():
    def told():
        p = parameter(9, 9)
        optimizer = ru.optim.ProjUNNT([("p", p)], lr=0.1, rank=2)
        monitor = ru.Monitor(optimizer)
        for step in range(2):
            p.grad = rand(9, 9, seed=step)
            optimizer.step()
        return monitor.history

    assert_same_under_autocast(told)


NET = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
DATA = rand(40, 6, seed=1)


def trained():
    net = copy.deepcopy(NET)
    for i, p in enumerate(net.parameters()):
        p.data = 0.5 * rand(*p.shape, seed=i)
    return net


def tagged():
    net = trained()
    return ru.tag_(net, {"0.weight": ru.Stiefel(), "2.weight": ru.Orthogonal()})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"calibration": DATA},
        {"method": "procrustes", "calibration": DATA},
        {"method": "lie", "max_steps": 20, "tolerance": 1e-2, "progress": False},
    ],
)
def test_warm_start(options):
    def call():
        net = tagged()
        report = ru.init.warm_start_(net, **options)
        told = [(r.distance, r.gain, r.function_error_after) for r in report.values()]
        return list(net.parameters()), told

    assert_same_under_autocast(call)


@pytest.mark.parametrize("method", ["logdet", "enorm"])
def test_path_condition(method):
    def call():
        net = trained()
        report = ru.init.path_condition_(net, DATA, method=method)
        return list(net.parameters()), report.objective_after, report.change

    assert_same_under_autocast(call)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"calibration": DATA},
        {"method": "spectral", "orthonormal": True},
        {"method": "linear", "calibration": DATA},
        {"draw": "kaiming_normal"},
    ],
)
def test_low_rank(options):
    def call():
        net = trained()
        report = ru.init.low_rank_(net, rank=2, **options)
        told = [(r.gaussian, r.held_out) for r in report.values()]
        dense = [m.to_dense().weight for m in net if isinstance(m, ru.nn.LowRankLinear)]
        return list(net.parameters()), told, dense

    assert_same_under_autocast(call)
