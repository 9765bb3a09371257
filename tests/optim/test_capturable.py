"""capturable=True: steps that read nothing, and what they tell of later."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import riemann_unn as ru
from tests.support import assert_on_manifold, gaussian
from tests.unread import ReadError, Unread

KINDS = {
    "orthogonal": (ru.Orthogonal(), (12, 12), torch.float32),
    "double": (ru.Orthogonal(), (8, 8), torch.float64),
    "unitary": (ru.Unitary(), (9, 9), torch.complex64),
    "tall": (ru.Stiefel(), (20, 6), torch.float32),
    "wide": (ru.Stiefel(), (5, 14), torch.float64),
    "kernel": (ru.OrthogonalConv(), (4, 4, 5, 5), torch.float32),
    "batched": (ru.Orthogonal(), (3, 8, 8), torch.float32),
}
BASES = {"sgd": (SGD, {}), "momentum": (SGD, {"momentum": 0.9}), "adam": (Adam, {"fused": True})}
CLASSES = [ru.optim.ProjUNNT, ru.optim.ProjUNND, ru.optim.Cayley]


def made(kind="orthogonal", count=1, free=False, cls=ru.optim.ProjUNNT, base=SGD, **options):
    """Named parameters on a manifold, maybe one without a tag, and their optimizer."""
    manifold, shape, dtype = KINDS[kind]
    named = {}
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        x = manifold.random(*shape, dtype=dtype, generator=generator).detach()
        x = x.as_subclass(torch.Tensor).clone()
        named[f"p{i}"] = ru.tag_(nn.Parameter(x), manifold)
    if free:
        named["free"] = nn.Parameter(gaussian(3, 2, dtype=dtype))
    options = {"lr": 0.05, "rank": 1, "capturable": True, **options}
    if base is Adam and dtype.is_complex:
        options.pop("fused", None)
    return named, cls(named.items(), base=base, **options)


def set_grads(named, seed=50):
    for i, p in enumerate(named.values()):
        value = p.detach()
        p.grad = gaussian(*p.shape, dtype=p.dtype, seed=seed + i) + 0.1 * value


def train(named, optimizer, steps, seed=50):
    for _ in range(steps):
        set_grads(named, seed)
        optimizer.step()


def frozen(named, optimizer):
    values = {name: p.detach().clone() for name, p in named.items()}
    return values, copy.deepcopy(optimizer.state_dict()["state"])


def differences(named, optimizer, before):
    """Names of all that is not bit for bit as before."""
    values, state = frozen(named, optimizer)
    found = [name for name, value in values.items() if not torch.equal(value, before[0][name])]
    for key, entries in state.items():
        for name, value in entries.items():
            old = before[1][key].get(name)
            if old is None or not torch.equal(torch.as_tensor(value), torch.as_tensor(old)):
                found.append(f"{name} of {key}")
    return found


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_in_a_step(kind, rank, base):
    base, options = BASES[base]
    for cls, count in zip((*CLASSES, CLASSES[0]), (1, 3, 3, 3), strict=True):
        named, optimizer = made(kind, count, free=True, cls=cls, rank=rank, base=base, **options)
        for _ in range(6):
            set_grads(named)
            if base is Adam and KINDS[kind][2].is_complex:
                optimizer.step()  # which has no fused form for them, and reads its count
                continue
            with Unread():
                optimizer.step()
        optimizer.synchronize()


def test_ordinary_steps_are_seen_to_read():
    for kind in ("orthogonal", "unitary", "kernel"):
        named, optimizer = made(kind, capturable=False)
        set_grads(named)
        with pytest.raises(ReadError), Unread():
            optimizer.step()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_ordinary_path(kind, rank, base):
    base, options = BASES[base]
    double = KINDS[kind][2] is torch.float64
    for cls in CLASSES:
        ends = []
        for capturable in (True, False):
            named, optimizer = made(
                kind, 2, free=True, cls=cls, rank=rank, base=base, capturable=capturable,
                lr=0.01, **options,
            )  # fmt: skip
            train(named, optimizer, 8)
            ends.append([p.detach() for p in named.values()])
        for some, other in zip(*ends, strict=True):
            assert (some - other).abs().max() <= (1e-9 if double else 1e-4)
        assert torch.equal(ends[0][-1], ends[1][-1])  # the one without a tag


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_stay_exact(kind, rank, steps):
    manifold = KINDS[kind][0]
    for base, options in BASES.values():
        named, optimizer = made(kind, 2, rank=rank, base=base, **options)
        train(named, optimizer, steps)
        optimizer.synchronize()
        for p in named.values():
            assert_on_manifold(p, manifold)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_known_optimum_is_reached(cls, rank):
    u, _, vh = torch.linalg.svd(gaussian(12, 12))
    target = u @ vh  # of det 1 or -1, as the start
    x = torch.linalg.qr(target + 0.5 * gaussian(12, 12, seed=1) / 12**0.5)[0]
    x = x * (x * target).sum(dim=0).sign()
    x[:, 0] *= torch.linalg.det(x) * torch.linalg.det(target)
    p = ru.tag_(nn.Parameter(x), ru.Orthogonal())
    optimizer = cls([p], lr=0.5, rank=rank, capturable=True)
    for _ in range(600 // rank):
        p.grad = -target  # the maximum of <X, target> is at the target
        optimizer.step()
    assert (p - target).abs().max() <= 1e-7


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("kind", ["orthogonal", "unitary", "tall", "kernel", "batched"])
@pytest.mark.parametrize(("bad", "count"), [(float("nan"), 1), (float("inf"), 2)])
def test_what_is_not_finite_changes_no_bit_and_is_raised_later(kind, rank, base, bad, count):
    base, options = BASES[base]
    named, optimizer = made(kind, count, free=True, rank=rank, base=base, **options)
    train(named, optimizer, 3)
    last = f"p{count - 1}"
    for by_next in (False, True):
        before = frozen(named, optimizer)
        set_grads(named)
        named[last].grad.view(-1)[5] = bad
        with nullcontext() if base is Adam and kind == "unitary" else Unread():
            optimizer.step()
        assert differences(named, optimizer, before) == []
        set_grads(named)
        with pytest.raises(ru.NonFiniteError, match=f"'{last}' held NaN") as caught:
            optimizer.step() if by_next else optimizer.synchronize()
        assert count == 1 or "'p0'" not in str(caught.value)
        assert differences(named, optimizer, before) == []
        optimizer.step()
        optimizer.synchronize()
        assert {last, "free"} <= set(differences(named, optimizer, before))
    assert_on_manifold(named[last], KINDS[kind][0])


OTHERS = {
    "nadam": (torch.optim.NAdam, {}),
    "rprop": (torch.optim.Rprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("base", [*BASES, *OTHERS])
def test_a_first_step_that_is_not_taken_is_as_if_it_had_not_been(base, rank):
    base, options = (BASES | OTHERS)[base]
    named, optimizer = made(free=True, base=base, rank=rank, **options)
    twins, twin = made(free=True, base=base, rank=rank, **options)
    set_grads(named)
    named["p0"].grad[0, 0] = float("nan")
    optimizer.step()
    with pytest.raises(ru.NonFiniteError):
        optimizer.synchronize()
    train(named, optimizer, 3)
    train(twins, twin, 3)
    assert optimizer.state[named["p0"]]["retraction_step"] == 3
    assert torch.equal(named["free"], twins["free"])
    assert_on_manifold(named["p0"])
    if rank is None:  # a first sketch applies the gradient once more
        assert torch.equal(named["p0"], twins["p0"])


def test_what_is_on_its_way_is_told_though_the_members_of_a_step_change():
    named, optimizer = made(count=2)
    train(named, optimizer, 2)
    set_grads(named)
    named["p1"].grad[0, 0] = float("nan")
    optimizer.step()
    for found in optimizer._own._batches.masked:
        found._arrived.zero_()  # as if it had not arrived
    set_grads(named)
    named["p1"].grad = None
    optimizer.step()  # by another batch
    with pytest.raises(ru.NonFiniteError, match="'p1' held NaN"):
        optimizer.synchronize()
    optimizer.synchronize()
    train(named, optimizer, 2)


@pytest.mark.parametrize("base", BASES)
def test_skipping_leaves_out_the_parameter_alone(base):
    base, options = BASES[base]
    named, optimizer = made(count=3, free=True, base=base, nonfinite="skip", **options)
    train(named, optimizer, 2)
    before = frozen(named, optimizer)
    set_grads(named)
    named["p1"].grad[0, 0] = float("inf")
    optimizer.step()
    optimizer.synchronize()
    changed = differences(named, optimizer, before)
    assert {"p0", "p2", "free"} <= set(changed)
    assert "p1" not in changed and not any(name.endswith("of 1") for name in changed)
    train(named, optimizer, 1)
    assert_on_manifold(named["p1"])


@pytest.mark.parametrize("kind", ["orthogonal", "tall", "kernel", "batched"])
def test_a_parameter_pushed_off_its_manifold_is_found(kind):
    named, optimizer = made(kind, 2, rank=1)
    train(named, optimizer, 3)
    good = named["p1"].detach().clone()
    # As a captured graph writes: no count of versions tells of it.
    named["p1"].data.mul_(1.1)
    before = frozen(named, optimizer)
    for _ in range(20):  # the rows that are looked at come round
        set_grads(named)
        try:
            optimizer.step()
        except ru.OffManifoldError as error:
            assert "'p1' was off its manifold" in str(error)
            break
    else:
        pytest.fail("nothing was found")
    assert "p1" not in differences(named, optimizer, before)
    named["p1"].data.copy_(good)
    train(named, optimizer, 3)
    optimizer.synchronize()


def test_an_ordinary_write_is_seen_as_ever():
    named, optimizer = made(count=2)
    train(named, optimizer, 2)
    with torch.no_grad():
        named["p0"].mul_(1.1)
    set_grads(named)
    with pytest.raises(ru.OffManifoldError, match="'p0'"):
        optimizer.step()
        optimizer.synchronize()


@pytest.mark.parametrize("rank", [1, 3, None])
def test_a_move_that_overflows_is_not_made(rank):
    named, optimizer = made(count=2, rank=rank, lr=1e30)
    before = [p.detach().clone() for p in named.values()]
    set_grads(named)
    named["p0"].grad.mul_(1e20)
    named["p1"].grad.mul_(1e-30)
    optimizer.step()
    assert torch.equal(named["p0"], before[0])
    with pytest.raises(ru.NonFiniteError, match="p0"):
        optimizer.synchronize()
    named, optimizer = made(count=2, rank=rank, base=SGD, momentum=0.9, lr=1e30)
    set_grads(named)
    named["p0"].grad.mul_(1e20)
    named["p1"].grad.mul_(1e-30)
    optimizer.step()
    assert torch.equal(named["p0"], before[0]) and not torch.equal(named["p1"], before[1])
    with pytest.raises(ru.NonFiniteError, match="step of 'p0' overflowed"):
        optimizer.synchronize()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("kind", ["orthogonal", "unitary", "tall", "kernel"])
def test_training_goes_on_from_a_state(kind, rank, base):
    base, options = BASES[base]
    options = {"rank": rank, "base": base, **options}
    named, optimizer = made(kind, 2, free=True, **options)
    train(named, optimizer, 5)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["state"][0]["retraction_step"].dtype is torch.int64
    values = {name: p.detach().clone() for name, p in named.items()}
    train(named, optimizer, 5)
    for way in ("load", "pickle", "deepcopy"):
        twins, twin = made(kind, 2, free=True, **options)
        with torch.no_grad():
            for name, p in twins.items():
                p.copy_(values[name])
        twin.load_state_dict(copy.deepcopy(state))
        if way == "pickle":
            twins, twin = pickle.loads(pickle.dumps((twins, twin)))
        elif way == "deepcopy":
            twins, twin = copy.deepcopy((twins, twin))
        train(twins, twin, 5)
        assert twin.state_dict()["state"][0]["retraction_step"].dtype is torch.int64
        for name, p in named.items():
            assert torch.equal(p, twins[name]), (way, name)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["orthogonal", "unitary", "kernel"])
def test_states_go_from_capturable_to_not_and_back(kind, base):
    base, options = BASES[base]
    ends = []
    for order in ((True, False, True), (False, True, False), (False, False, False)):
        state, values = None, None
        for capturable in order:
            named, optimizer = made(kind, 2, base=base, capturable=capturable, **options)
            if state is not None:
                with torch.no_grad():
                    for p, value in zip(named.values(), values, strict=True):
                        p.copy_(value)
                optimizer.load_state_dict(state)
                count = optimizer.state[named["p0"]]["retraction_step"]
                assert int(count) in (4, 8)
            train(named, optimizer, 4)
            count = optimizer.state[named["p0"]]["retraction_step"]
            assert isinstance(count, torch.Tensor) == capturable
            assert not capturable or count.dtype is torch.int64
            state = copy.deepcopy(optimizer.state_dict())
            values = [p.detach().clone() for p in named.values()]
        assert int(state["state"][0]["retraction_step"]) == 12
        ends.append(values)
    for some in ends[:2]:
        for x, y in zip(some, ends[2], strict=True):
            assert (x - y).abs().max() <= 2e-4


def test_half_precision_keeps_masters():
    p = ru.tag_(nn.Parameter(made()[0]["p0"].detach().bfloat16()), ru.Orthogonal())
    for rank in (1, None):
        optimizer = ru.optim.ProjUNNT([p], lr=0.05, rank=rank, capturable=True, momentum=0.9)
        for _ in range(30):
            p.grad = gaussian(12, 12, dtype=torch.float32, seed=1).bfloat16()
            optimizer.step()
        optimizer.synchronize()
        master = optimizer.state[p]["master"]
        assert master.dtype is torch.float32
        assert_on_manifold(master)
        assert torch.equal(master.bfloat16(), p)
        before = p.detach().clone(), master.clone()
        p.grad[0, 0] = float("nan")
        optimizer.step()
        assert torch.equal(p, before[0]) and torch.equal(optimizer.state[p]["master"], before[1])
        with pytest.raises(ru.NonFiniteError):
            optimizer.synchronize()


def test_half_precision_reads_nothing():
    p = ru.tag_(nn.Parameter(made()[0]["p0"].detach().bfloat16()), ru.Orthogonal())
    optimizer = ru.optim.ProjUNNT([p], lr=0.05, capturable=True)
    for step in range(6):
        p.grad = gaussian(12, 12, dtype=torch.float32, seed=1).bfloat16()
        if step < 3:
            optimizer.step()
        else:
            with Unread():
                optimizer.step()


def test_groups_have_their_own_options():
    some, _ = made(count=2)
    groups = [
        {"params": [some["p0"]], "rank": 3, "lr": 0.02},
        {"params": [some["p1"]], "rank": None, "max_angle": 0.1},
    ]
    optimizer = ru.optim.ProjUNNT(groups, lr=0.05, capturable=True)
    for _ in range(5):
        set_grads(some)
        with Unread():
            optimizer.step()
    optimizer.param_groups[0]["rank"] = 2
    train(some, optimizer, 5)
    optimizer.synchronize()
    for p in some.values():
        assert_on_manifold(p)
    before = some["p1"].detach().clone()
    some["p1"].grad.mul_(1e4)
    optimizer.step()
    assert torch.linalg.matrix_norm(some["p1"] - before, 2) <= 0.1 + 1e-5


def test_a_rate_on_the_device_is_followed():
    ends = []
    for lr in (torch.tensor(0.05), 0.05):
        named, optimizer = made(lr=lr)
        set_grads(named)
        with Unread():
            optimizer.step()
        ends.append(named["p0"].detach())
    assert (ends[0] - ends[1]).abs().max() <= 1e-7


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ru.ManifoldError, match="capturable=True with phi="):
        ru.optim.ManifoldOptimizer(
            made()[0].values(), lr=0.1, phi=lambda t: 2 * torch.atan(t / 2), capturable=True
        )
    for sketch in ("lsi", "svd", "column"):
        with pytest.raises(ru.ManifoldError, match=f"sketch='{sketch}'.*waits for the device"):
            made(sketch=sketch)


@pytest.mark.parametrize(
    ("kind", "count", "rank", "most"),
    [
        ("adam", 1, 1, 114),
        ("orthogonal", 1, 1, 81),
        ("orthogonal", 3, 1, 102),
        ("orthogonal", 1, 3, 138),
        ("orthogonal", 1, None, 71),
        ("tall", 1, 1, 81),
        ("unitary", 1, 1, 110),
        ("kernel", 1, 1, 143),
    ],
)
def test_a_step_is_so_few_launches(kind, count, rank, most):
    options = {"base": Adam, "fused": True} if kind == "adam" else {}
    named, optimizer = made("orthogonal" if options else kind, count, rank=rank, **options)
    train(named, optimizer, 3)
    set_grads(named)
    with Unread() as seen:
        optimizer.step()
    assert 10 < seen.launches <= most, sorted(seen.names.items())
