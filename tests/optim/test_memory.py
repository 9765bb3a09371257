"""Parameters that overlap, or leave the dtype of their state, are refused; nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import riemann_unn as ru
from riemann_unn.optim.overlap import refuse_overlaps
from tests.support import assert_on_manifold, gaussian, point

BASES = [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})]


def on(x: Tensor) -> nn.Parameter:
    """A tagged parameter in the memory of x."""
    return ru.tag_(nn.Parameter(x), ru.Stiefel())


def block() -> Tensor:
    """An (8, 8) buffer of which every aligned (4, 4) block is orthogonal."""
    return torch.cat([torch.cat([point(4, 4, seed=2 * i + j) for j in (0, 1)], 1) for i in (0, 1)])


def shifted() -> tuple[Tensor, Tensor]:
    """Two orthogonal matrices whose memory overlaps in two of three rows."""
    buffer = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    return buffer[:3], buffer[1:4]


def ready(params, base=torch.optim.SGD, options=None, steps=2):
    optimizer = ru.optim.ProjUNNT(params, lr=0.1, base=base, **(options or {}))
    for step in range(steps):
        give_gradients(optimizer, step)
        optimizer.step()
    return optimizer


def give_gradients(optimizer: torch.optim.Optimizer, step: int = 0) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        p.grad = gaussian(*p.shape, dtype=p.dtype, seed=10 * step + i)


@contextmanager
def unchanged(params, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    params = list(params)
    values = [(p.detach().clone(), p.grad, copy.deepcopy(p.grad)) for p in params]
    state = copy.deepcopy(optimizer.state_dict()) if optimizer is not None else None
    yield
    for p, (value, grad, grad_value) in zip(params, values, strict=True):
        assert p.grad is grad and torch.equal(p, value)
        assert grad is None or torch.equal(grad, grad_value)
    if optimizer is not None:
        now = optimizer.state_dict()
        assert now["param_groups"] == state["param_groups"]
        torch.testing.assert_close(now["state"], state["state"], rtol=0, atol=0)


SELF = {
    "expanded batch": lambda: point(4, 4).expand(3, 4, 4),
    "expanded rows": lambda: torch.tensor([[1.0, 0.0]]).T.expand(2, 3),
    "sliding rows": lambda: torch.as_strided(torch.eye(3).flatten(), (2, 3), (2, 1)),
    "entries met across": lambda: torch.as_strided(torch.ones(20), (3, 4), (3, 2)),
}


@pytest.mark.parametrize("name", SELF)
def test_parameters_that_overlap_themselves(name):
    x = SELF[name]()
    p = ru.tag_(nn.Parameter(x), ru.Stiefel())
    assert p.stride() == x.stride()
    free = nn.Parameter(torch.ones(2))
    match = r"'w' is expanded or overlaps itself.*p.data = p.data.clone\(\)"
    with unchanged([p, free]), pytest.raises(ru.ManifoldError, match=match):
        ru.optim.ProjUNNT([("w", p), ("free", free)], lr=0.1, off_manifold="project")
    other = on(point(4, 4))
    optimizer = ready([("other", other)])
    with unchanged([p, other], optimizer), pytest.raises(ru.ManifoldError, match=match):
        optimizer.add_param_group({"params": [("w", p)]})
    assert len(optimizer.param_groups) == 1
    p.data = p.data.clone()  # the remedy
    optimizer = ru.optim.ProjUNNT([p], lr=0.1, off_manifold="project")
    give_gradients(optimizer)
    optimizer.step()


FINE = {
    "contiguous": lambda: point(4, 4),
    "transposed": lambda: point(4, 4).mT,
    "a slice of columns": lambda: block()[:, :4],
    "every other entry": lambda: (
        point(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    ),
    "one row": lambda: point(4, 1).T.expand(1, 4),
    "batch of one": lambda: point(4, 4).expand(1, 4, 4),
    "permuted batch": lambda: point(3, 4, 4).permute(1, 0, 2).contiguous().permute(1, 0, 2),
    "comb": lambda: torch.as_strided(torch.arange(12.0), (2, 3), (3, 2)),  # 0 2 4, 3 5 7
}


@pytest.mark.parametrize("name", FINE)
def test_strides_that_do_not_overlap(name):
    refuse_overlaps([("w", FINE[name]())])


def pairs() -> dict[str, tuple[bool, Tensor, Tensor]]:
    b, (low, high), flat = block(), shifted(), torch.cat([point(4, 4).flatten()] * 2)
    complex_ = point(4, 4, dtype=torch.complex128)
    return {
        "the same memory": (True, b[:4, :4], b[:4, :4]),
        "transposes": (True, b[:4, :4], b[:4, :4].mT),
        "shifted rows": (True, low, high),
        "rows and columns": (True, b[:4, :4], b[:, :4]),
        "one corner": (True, b[:5, :5], b[4:, 4:]),
        "real part": (True, complex_, torch.view_as_real(complex_)[..., 0]),
        "blocks beside": (False, b[:4, :4], b[:4, 4:]),
        "blocks below": (False, b[:4, :4], b[4:, :4]),
        "blocks across": (False, b[:4, 4:], b[4:, :4]),
        "halves by columns": (False, b[:, :4], b[:, 4:]),
        "every other row": (False, b[::2], b[1::2]),
        "every other column": (False, b[:, ::2], b[:, 1::2]),
        "parts of a flat buffer": (False, flat[:16].view(4, 4), flat[16:].view(4, 4)),
        "real and imaginary": (False, *torch.view_as_real(complex_).unbind(-1)),
    }


@pytest.mark.parametrize("name", pairs())
def test_pairs_of_views(name):
    shares, one, two = pairs()[name]
    third = point(4, 4)
    named = [("third", third), ("one", one), ("two", two)]
    for order in (named, named[::-1]):
        if shares:
            with pytest.raises(ru.ManifoldError, match=r"(one|two) shares memory with"):
                refuse_overlaps(order)
        else:
            refuse_overlaps(order)


def test_random_views_against_addresses_written_out():
    source = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=source))

    buffer, addresses = torch.zeros(64), torch.arange(64)
    counts = [0, 0]
    for _ in range(300):
        views, touched = [], []
        for _ in range(3):
            layout = (1 + draw(3), 1 + draw(3)), (draw(7), draw(7)), draw(20)
            views.append(torch.as_strided(buffer, *layout))
            touched.append(torch.as_strided(addresses, *layout).flatten().tolist())
        meets = any(len(set(some)) < len(some) for some in touched[:2]) or any(
            set(touched[i]) & set(touched[j]) for i, j in ((0, 1), (0, 2), (1, 2))
        )
        counts[meets] += 1
        try:
            refuse_overlaps(zip("ab", views[:2], strict=True), [nn.Parameter(views[2])])
        except ru.ManifoldError:
            assert meets
        else:
            assert not meets
    assert min(counts) > 20


def test_two_parameters_on_overlapping_views():
    low, high = shifted()
    p, q = on(low), on(high)
    match = r"'p' shares memory with 'q'.*p.data = p.data.clone\(\), or use one parameter object"
    with unchanged([p, q]), pytest.raises(ru.ManifoldError, match=match):
        ru.optim.ProjUNNT([("p", p), ("q", q)], lr=0.1)
    optimizer = ready([("p", p)])
    with torch.no_grad():
        q.copy_(torch.eye(3))
        p.data = torch.eye(3, dtype=torch.float64)
    optimizer.add_param_group({"params": [("q", q)]})
    for step in range(3):
        give_gradients(optimizer, step)
        optimizer.step()
    for x in (p, q):
        assert_on_manifold(x)


@pytest.mark.parametrize(("base", "options"), BASES)
def test_memory_that_comes_to_be_shared_between_steps(base, options):
    p, q = on(point(4, 4)), on(point(4, 4, seed=1))
    optimizer = ready([("p", p), ("q", q)], base, options)
    give_gradients(optimizer)
    own = q.data
    for data, match in ((p.data, "'p' shares memory with 'q'"), (p.data.mT, "shares memory")):
        q.data = data
        with unchanged([p, q], optimizer):
            for _ in range(2):
                with pytest.raises(ru.ManifoldError, match=match):
                    optimizer.step()
    q.data = own[:1].expand(4, 4)
    with unchanged([p, q], optimizer), pytest.raises(ru.ManifoldError, match="'q' is expanded"):
        optimizer.step()
    q.data = own
    optimizer.step()
    for x in (p, q):
        assert_on_manifold(x)


def test_a_trained_untagged_parameter_may_not_share_either():
    p = on(point(4, 4))
    tied = nn.Parameter(p.data)
    with pytest.raises(ru.ManifoldError, match=r"'p' shares memory with an untagged parameter"):
        ru.optim.ProjUNNT([("p", p), ("tied", tied)], lr=0.1)
    tied.requires_grad_(False)  # so it moves nothing
    ru.optim.ProjUNNT([("p", p), ("tied", tied)], lr=0.1)
    one = nn.Parameter(torch.ones(4))  # as torch has it, two untagged ones may
    ru.optim.ProjUNNT([p, one, nn.Parameter(one.data)], lr=0.1)


def test_one_object_in_two_modules_is_fine():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    ru.tag_(model, {"0.weight": ru.Orthogonal()})
    ru.init.warm_start_(model)
    ready(model.parameters())
    assert_on_manifold(model[1].weight)


def test_many_views_of_one_buffer_train_as_if_alone():
    buffer = block()
    views = [buffer[:4, :4], buffer[:4, 4:], buffer[4:, :4], buffer[4:, 4:]]
    alone = [on(view.clone()) for view in views]
    together = [on(view) for view in views]
    ready(together, torch.optim.Adam, steps=4)
    ready(alone, torch.optim.Adam, steps=4)
    for p, q in zip(together, alone, strict=True):
        assert_on_manifold(p)
        assert float((p - q).detach().norm()) < 1e-12


# Dtypes ----------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)
    ru.tag_(net, {"0.weight": ru.Orthogonal()})
    ru.init.warm_start_(net)
    return net


CONVERSIONS = {
    "half": (torch.float32, lambda m: m.half()),
    "bfloat16": (torch.float32, lambda m: m.bfloat16()),
    "double": (torch.float32, lambda m: m.double()),
    "float": (torch.float64, lambda m: m.float()),
    "from half": (torch.bfloat16, lambda m: m.float()),
    "between halves": (torch.bfloat16, lambda m: m.half()),
    "data": (torch.float32, lambda m: setattr(m[0].weight, "data", m[0].weight.data.double())),
}


@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_after_the_state_exists(name, base, options):
    dtype, convert = CONVERSIONS[name]
    for retag in (False, True):
        net = model(dtype)
        optimizer = ready(net.named_parameters(), base, options)
        optimizer.zero_grad()
        convert(net)
        if retag:
            ru.tag_(net, {"0.weight": ru.Orthogonal()})
        give_gradients(optimizer)
        is_plain = base is torch.optim.SGD and not options
        if is_plain and name in ("double", "float", "between halves", "data"):
            # No state but a start for sketches: the point is checked as any that was written to.
            ru.init.warm_start_(net)
            optimizer.step()
            continue
        now = net[0].weight.dtype
        match = rf"'0.weight' was {dtype} when .* is {now} now; create the optimizer after model.ha"
        with unchanged(net.parameters(), optimizer):
            for _ in range(2):
                with pytest.raises(ru.ManifoldError, match=match):
                    optimizer.step()
        ru.init.warm_start_(net)
        optimizer = ready(net.named_parameters(), base, options)
        limit = 1e-2 if now in (torch.float16, torch.bfloat16) else 1e-6
        assert float(ru.orthogonality_error(net[0].weight)) < limit


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_before_any_state(name):
    dtype, convert = CONVERSIONS[name]
    net = model(dtype)
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.1, base=torch.optim.Adam)
    convert(net)
    ru.init.warm_start_(net)
    give_gradients(optimizer)
    optimizer.step()


def test_a_state_of_another_dtype_can_be_loaded_after_the_conversion():
    net = model()
    optimizer = ready(net.named_parameters(), torch.optim.Adam)
    state = copy.deepcopy(optimizer.state_dict())
    net.double()
    ru.init.warm_start_(net)
    optimizer = ru.optim.ProjUNNT(net.named_parameters(), lr=0.1, base=torch.optim.Adam)
    optimizer.load_state_dict(state)
    give_gradients(optimizer)
    optimizer.step()
    assert_on_manifold(net[0].weight)
