"""Warm start: the nearest point for every tag, all or nothing, and nothing else touched."""

import math

import pytest
import torch
from torch import Tensor, nn

import riemann_unn as ru
from tests.support import DTYPES, assert_on_manifold, double, gaussian, generator, rounding

SHAPES = {
    "square": (6, 6),
    "tall": (9, 4),
    "wide": (4, 9),
    "batched": (3, 5, 5),
    "batched-wide": (2, 3, 5),
    "one": (1, 1),
    "column": (5, 1),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def weight(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, manifold: object = None
) -> nn.Parameter:
    p = nn.Parameter(gaussian(*shape, dtype=dtype, seed=seed))
    return ru.tag_(p, manifold or ru.Stiefel())  # type: ignore[arg-type]


def distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(double(a.detach()) - double(b.detach())))


@every_dtype
@every_shape
def test_no_point_is_nearer(shape, dtype):
    p = weight(shape, dtype)
    w = p.detach().clone()
    report = ru.init.warm_start_(p)["parameter"]
    assert_on_manifold(p)
    moved, eps = distance(p, w), rounding(dtype, w.numel())
    assert report.distance == pytest.approx(moved / float(double(w).norm()), rel=1e-4)
    m, start = ru.Stiefel(), p.detach().as_subclass(Tensor)
    sizes = torch.logspace(-5, 0, 60, dtype=dtype.to_real()).reshape(-1, *[1] * len(shape))
    near = m.projx(start + sizes * gaussian(60, *shape, dtype=dtype, seed=1))
    far = m.random(60, *shape, dtype=dtype, generator=generator()).as_subclass(Tensor)
    away = [distance(r, start) for r in (*near, *far)]
    assert max(away) > 0.5 and (start.numel() == 1 or min(away) < 1e-3)
    assert min(distance(r, w) for r in (*near, *far)) >= moved - eps


@every_dtype
@every_shape
def test_against_scipy(shape, dtype):
    polar = pytest.importorskip("scipy.linalg").polar
    p = weight(shape, dtype, seed=3)
    w = double(p.detach()).reshape(-1, *shape[-2:])
    want = torch.stack([torch.from_numpy(polar(a.numpy())[0]) for a in w]).reshape(shape)
    ru.init.warm_start_(p)
    assert distance(p, want) <= rounding(dtype, p.numel(), 100)


@every_dtype
@every_shape
def test_distance_is_the_least_there_is(shape, dtype):
    p = weight(shape, dtype, seed=5)
    w = double(p.detach())
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    want = float((w - u @ vh).norm() / w.norm())
    got = ru.init.warm_start_(p)["parameter"].distance
    assert got == pytest.approx(want, rel=1e-6 if torch.finfo(dtype).eps > 1e-10 else 1e-13)


KERNELS = {
    "square": ((3, 3, 4, 5), torch.float32),
    "tall": ((4, 2, 6), torch.float64),
    "wide": ((2, 3, 5, 4), torch.float32),
    "batched": ((2, 3, 3, 5), torch.float64),
    "complex": ((3, 2, 4, 4), torch.complex64),
    "volume": ((2, 2, 2, 3, 4), torch.float64),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_nearest_at_every_frequency(name):
    shape, dtype = KERNELS[name]
    ndim = 1 if name == "batched" else len(shape) - 2
    kind = ru.UnitaryConv if dtype.is_complex else ru.OrthogonalConv
    p = weight(shape, dtype, manifold=kind(ndim))
    w = double(p.detach().clone())
    report = ru.init.warm_start_(p)["parameter"]
    assert_on_manifold(p)
    lattice = tuple(range(-ndim, 0))

    def spectrum(x: Tensor) -> Tensor:
        """All frequencies, conjugate ones too, as a batch of matrices."""
        f = torch.fft.fftn(x, dim=lattice)
        return f.movedim((-ndim - 2, -ndim - 1), (-2, -1))

    u, s, vh = torch.linalg.svd(spectrum(w), full_matrices=False)
    want = u @ vh
    off = spectrum(double(p.detach())) - want
    assert float(off.norm() / want.norm()) <= rounding(dtype, w.numel())
    assert report.distance == pytest.approx(float((s - 1).norm() / s.norm()), rel=1e-6)
    assert report.gain == pytest.approx(float(s.pow(3).sum() / s.pow(2).sum()), rel=1e-6)
    assert report.condition == pytest.approx(float((s[..., 0] / s[..., -1]).max()), rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (9, 2, 2), (40, 2, 3, 3)])
def test_flattened_kernels_are_the_nearest_matrices(shape):
    p = weight(shape, torch.float32, manifold=ru.Stiefel(flatten=True))
    w = double(p.detach()).flatten(1)
    report = ru.init.warm_start_(p)["parameter"]
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    assert distance(p.flatten(1), u @ vh) <= rounding(torch.float32, w.numel())
    assert report.distance == pytest.approx(float((s - 1).norm() / s.norm()), rel=1e-6)


@every_dtype
@every_shape
def test_a_second_time_moves_by_rounding_only(shape, dtype):
    p = weight(shape, dtype)
    ru.init.warm_start_(p)
    once = p.detach().clone()
    report = ru.init.warm_start_(p)["parameter"]
    bound = rounding(dtype, p.numel())
    assert distance(p, once) <= bound * once.numel() ** 0.5
    assert report.distance <= bound and report.error_before <= bound
    assert report.error_after <= bound


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("det", [1, -1])
@pytest.mark.parametrize("shape", [(5, 5), (4, 3, 3)])
def test_determinant_is_respected_at_the_least_cost(shape, det, sign):
    w = gaussian(*shape)
    w[..., 0, :] *= (sign * torch.linalg.det(w).sign())[..., None]
    p, free = (ru.tag_(nn.Parameter(w.clone()), ru.Orthogonal(det=d)) for d in (det, None))
    ru.init.warm_start_(p)
    assert_on_manifold(p, ru.Orthogonal(det=det))
    assert torch.allclose(torch.linalg.det(p.detach()), torch.tensor(det).double())
    s = torch.linalg.svdvals(w)
    s[..., -1] *= sign * det
    assert distance(p, w) == pytest.approx(float((s - 1).norm()), rel=1e-10)  # Kabsch's optimum
    ru.init.warm_start_(free)
    assert (distance(free, w) < distance(p, w) - 1e-6) == (sign != det)


def several() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = nn.Sequential(
            nn.RNN(3, 5), nn.Conv2d(3, 5, 2), nn.Linear(4, 7), nn.Linear(6, 6), nn.Linear(4, 4)
        )
    m[4].weight = nn.Parameter(gaussian(4, 4, dtype=torch.complex64))
    return ru.tag_(
        m,
        {
            "0.weight_hh_l0": ru.Orthogonal(),
            "1.weight": ru.Stiefel(flatten=True),
            "2.weight": ru.Stiefel(),
            "4.weight": ru.Unitary(),
        },
    )


NAMES = ["0.weight_hh_l0", "1.weight", "2.weight", "4.weight"]


def test_module_with_several_tags():
    m = several()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    objects = dict(m.named_parameters())
    report = ru.init.warm_start_(m)
    assert list(report) == NAMES
    for name, p in m.named_parameters():
        assert p is objects[name] and p.requires_grad
        if name not in NAMES:
            assert torch.equal(p, before[name])
            continue
        w, r, manifold = before[name], report[name], ru.manifold_of(p)
        assert_on_manifold(p.detach(), manifold)
        assert r.distance == pytest.approx(distance(p, w) / float(w.norm()), rel=1e-5)
        assert r.error_before == float(ru.orthogonality_error(w, manifold)) > 1e-2
        assert r.error_after == float(ru.orthogonality_error(p)) < 1e-6
    assert m[0]._flat_weights[1] is m[0].weight_hh_l0
    kernel, w = m[1].weight.detach().reshape(5, -1), before["1.weight"].reshape(5, -1)
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    assert distance(kernel, u @ vh) <= rounding(torch.float32, 60)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_changes_when_one_parameter_is_not_finite(name, bad):
    m = several()
    with torch.no_grad():
        dict(m.named_parameters())[name].view(-1)[-1] = bad
    before = {k: v.clone() for k, v in m.state_dict().items()}
    with pytest.raises(ru.OffManifoldError, match="NaN or infinity") as raised:
        ru.init.warm_start_(m)
    assert repr(name) in str(raised.value)
    for k, v in m.state_dict().items():
        assert torch.allclose(v, before[k], rtol=0, atol=0, equal_nan=True)


def test_gradients_modes_and_randomness_are_untouched():
    m = several()
    m[0].weight_hh_l0.grad = torch.ones(5, 5)
    m[1].weight.requires_grad_(False)
    m[2].eval()
    grad, state = m[0].weight_hh_l0.grad, torch.get_rng_state()
    ru.init.warm_start_(m)
    assert m[0].weight_hh_l0.grad is grad and torch.equal(grad, torch.ones(5, 5))
    assert m[2].weight.grad is None and not m[1].weight.requires_grad
    assert m[0].training and not m[2].training and torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.is_leaf for p in m.parameters())


@every_dtype
@pytest.mark.parametrize("shape", [(5, 5), (6, 3), (3, 6)])
@pytest.mark.parametrize("rank", [0, 1])
def test_weights_of_deficient_rank_still_land_on_the_manifold(shape, dtype, rank):
    p = weight(shape, dtype)
    with torch.no_grad():
        p.copy_(rank * p[:, :1] @ p[:1, :])
    with pytest.warns(UserWarning, match="'parameter' is rank-deficient"):
        report = ru.init.warm_start_(p)
    assert_on_manifold(p)
    assert report["parameter"].condition == math.inf


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@every_dtype
def test_scale_of_the_weights_does_not_matter(dtype, scale):
    p, q = weight((6, 4), dtype), weight((6, 4), dtype)
    with torch.no_grad():
        q.mul_(scale)
    ru.init.warm_start_(p)
    ru.init.warm_start_(q)
    assert distance(p, q) <= rounding(dtype, 24, 100)


@pytest.mark.parametrize("target", [nn.Linear(3, 3), nn.Parameter(torch.eye(3)), torch.eye(3)])
def test_untagged_targets_are_refused(target):
    with pytest.raises(ru.ManifoldError, match=r"nothing is tagged.*tag_"):
        ru.init.warm_start_(target)
