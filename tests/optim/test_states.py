"""States that are loaded: those of another optimizer are refused, by a word on what differs."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.errors import StateError
from tests.support import gaussian, parameter

CLASSES = (ru.optim.ProjUNNT, ru.optim.ProjUNND, ru.optim.Cayley, ru.optim.Expm)


def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, dtype=torch.float32, seed=100 * step + i).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def free(*shape: int) -> nn.Parameter:
    return nn.Parameter(gaussian(*shape, dtype=torch.float32))


def saved(params: list[nn.Parameter], cls: type = ru.optim.ProjUNNT, **options: object) -> dict:
    optimizer = cls(params, lr=0.05, **options)
    run(params, optimizer, range(3))
    return copy.deepcopy(optimizer.state_dict())


def same(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def assert_refused(optimizer: torch.optim.Optimizer, state: dict, message: str) -> None:
    """The error says what differs, and leaves the optimizer and the caller's state alone."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    run(params, optimizer, range(2))
    before, groups = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups
    values, given = [p.detach().clone() for p in params], copy.deepcopy(state)
    with pytest.raises(StateError, match=message) as caught:
        optimizer.load_state_dict(state)
    assert "Nothing was loaded" in str(caught.value)
    assert optimizer.param_groups is groups and optimizer.base.param_groups is groups
    assert same(optimizer.state_dict(), before) and same(state, given)
    assert all(map(torch.equal, params, values))
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    run(params, optimizer, range(2, 3))


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


@pytest.mark.parametrize(
    ("before", "now"),
    [(SGD, ADAM), (ADAM, SGD), (ADAM, ADAMW), (ADAM, torch.optim.Adamax), (SGD, torch.optim.ASGD)],
)
def test_another_base_is_refused(before, now):
    p = parameter(8, 8)
    state = saved([p], base=before)
    message = rf"\[0\] was saved with base={before.__name__}, and .* base={now.__name__}; build"
    assert_refused(ru.optim.ProjUNNT([p], lr=0.1, base=now), state, message)


def test_a_state_of_another_base_alone_is_refused_by_its_options():
    p, w = parameter(8, 8), free(8, 8)
    plain = ADAM([w])
    run([w], plain, range(2))
    assert_refused(
        ru.optim.ProjUNNT([p], lr=0.1, momentum=0.9),
        plain.state_dict(),
        r"param_groups\[0\] of the state lacks dampening, momentum, options of SGD",
    )


def test_options_that_an_older_torch_did_not_have_are_no_other_base():
    p = parameter(8, 8)
    state = saved([p], base=ADAM)
    for key in ("base_class", "maximize", "fused", "capturable", "foreach", "differentiable"):
        del state["param_groups"][0][key]
    optimizer = ru.optim.ProjUNNT([p], lr=0.1, base=ADAM)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["base_class"] == "Adam"


@pytest.mark.parametrize(("before", "now"), [(1, 2), (3, None), (None, 1)])
def test_another_rank_is_refused(before, now):
    p, q = parameter(12, 12), parameter(20, 6)
    state = saved([p, q], rank=before)
    message = rf"\[0\] was saved with rank={before}, and .* rank={now}; build it with rank={before}"
    assert_refused(ru.optim.ProjUNNT([p, q], lr=0.1, rank=now), state, message)


def test_a_rank_that_a_group_changed_is_the_rank_of_its_state():
    p = parameter(12, 12)
    optimizer = ru.optim.ProjUNNT([p], lr=0.1, rank=1)
    run([p], optimizer, range(2))
    optimizer.param_groups[0]["rank"] = 3
    run([p], optimizer, range(2, 4))
    state = copy.deepcopy(optimizer.state_dict())
    assert_refused(ru.optim.ProjUNNT([p], lr=0.1, rank=1), state, "rank=3")
    again = ru.optim.ProjUNNT([p], lr=0.1, rank=3)
    again.load_state_dict(state)
    assert again.state[p]["sketch_directions"].shape == (3, 12)


def test_the_rank_of_a_group_without_a_tag_does_not_matter():
    p, w = parameter(8, 8), free(3, 3)
    optimizer = ru.optim.ProjUNNT([{"params": [p]}, {"params": [w], "rank": 2}], lr=0.1)
    run([p, w], optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    ru.optim.ProjUNNT([{"params": [p]}, {"params": [w]}], lr=0.1).load_state_dict(state)


@pytest.mark.parametrize(
    ("base", "options"),
    [(SGD, {}), (SGD, {"momentum": 0.9}), (ADAM, {}), (torch.optim.Adafactor, {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_shape_is_refused(base, options, dtype):
    def tagged(*shape: int) -> nn.Parameter:
        return ru.tag_(nn.Parameter(parameter(*shape).detach().to(dtype)), ru.Stiefel())

    state = saved([tagged(20, 6)], base=base, **options)
    optimizer = ru.optim.ProjUNNT([("w", tagged(12, 5))], lr=0.1, base=base, **options)
    assert_refused(optimizer, state, r"'w' has shape \(12, 5\), and '\w+' of its state \(.*\): it")


def test_another_shape_of_a_parameter_without_a_tag_is_refused():
    p = parameter(8, 8)
    state = saved([p, free(3, 4)], base=ADAM)
    optimizer = ru.optim.ProjUNNT([p, free(4, 3)], lr=0.1, base=ADAM)
    message = (
        r"param_groups\[0\]\['params'\]\[1\] has shape \(4, 3\), and 'exp_avg' of its state \(3, 4"
    )
    assert_refused(optimizer, state, message)


@pytest.mark.parametrize("base", [SGD, ADAM])
@pytest.mark.parametrize("rank", [1, None])
def test_other_coordinates_are_refused(base, rank):
    options = {"momentum": 0.9} if base is SGD else {}
    flat = ru.tag_(free(4, 4, 3, 3), ru.Stiefel(flatten=True))
    conv = ru.tag_(free(4, 4, 3, 3), ru.OrthogonalConv())
    batched = ru.tag_(free(4, 4, 3, 3), ru.Stiefel())
    for p in (flat, conv, batched):
        ru.init.warm_start_(p)
    state = saved([conv], base=base, rank=rank, **options)
    for p in (flat, batched):
        optimizer = ru.optim.ProjUNNT([("w", p)], lr=0.1, base=base, rank=rank, **options)
        message = (
            rf"'w' is tagged {re.escape(repr(p.manifold))}, .* of OrthogonalConv\(2\); tag it so"
        )
        assert_refused(optimizer, state, message)
        if rank == 1:  # 0.2.0 noted no more than the start of the sketch
            del state["state"][0]["coordinates"]
            assert_refused(optimizer, state, "'sketch_directions' of its state")
            state = saved([conv], base=base, rank=rank, **options)


def test_a_state_from_before_the_tag_or_after_it_is_refused():
    p, w = parameter(8, 8), free(8, 8)
    optimizer = ru.optim.ProjUNNT([p, w], lr=0.1, base=ADAM)
    run([p, w], optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    swapped = ru.optim.ProjUNNT([w, p], lr=0.1, base=ADAM)
    assert_refused(swapped, state, r"\[0\] has no tag, and its state was saved when it had one")
    del state["state"][0]
    assert_refused(swapped, state, r"is tagged Stiefel\(\), and its state was saved when it had no")
    del state["state"][1]
    swapped.load_state_dict(state)  # the remedy: both begin anew
    assert swapped.state_dict()["state"] == {0: {}, 1: {}}


@pytest.mark.parametrize("base", [SGD, ADAM])
def test_the_four_optimizers_and_the_manifolds_of_one_view_share_their_states(base):
    for before in CLASSES:
        p = parameter(8, 8)
        state = saved([p], before, rank=2, base=base)
        for now in CLASSES:
            for manifold in (ru.Stiefel(), ru.Orthogonal(), ru.Orthogonal(det=None)):
                q = ru.tag_(nn.Parameter(p.detach().clone()), manifold)
                optimizer = now([q], lr=0.05, rank=2, base=base)
                optimizer.load_state_dict(state)
                assert optimizer.state[q]["retraction_step"] == 3
                run([q], optimizer, range(3, 5))


def test_states_of_0_2_0_know_less_and_are_taken():
    p, w = parameter(8, 8), free(3, 3)
    optimizer = ru.optim.ProjUNNT([p, w], lr=0.05)
    run([p, w], optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["base_class"], state["state"][0]["coordinates"], state["state"][1]
    run([p, w], optimizer, range(3, 6))
    end = p.detach().clone()
    q = parameter(8, 8)
    other = ru.optim.ProjUNNT([q, w], lr=0.05)
    run([q, w], other, range(3))
    other.load_state_dict(state)
    assert bytes(other.state[q]["coordinates"].tolist()) == b"Stiefel()"
    run([q, w], other, range(3, 6))
    assert torch.equal(q, end)


def test_momentum_of_the_base_alone_warns_where_the_caller_stands():
    p, w = parameter(8, 8), free(3, 3)
    plain = ADAM([p, w])
    run([p, w], plain, range(2))
    ru.init.warm_start_(p)
    state = plain.state_dict()
    optimizer = ru.optim.ProjUNNT([p, w], lr=0.1, base=ADAM)
    with pytest.warns(UserWarning, match="is in Euclidean coordinates") as caught:
        optimizer.load_state_dict(state)
    assert caught[0].filename == __file__
    optimizer = ru.optim.ProjUNNT([p, w], lr=0.1, base=ADAM)
    optimizer.load_state_dict({**state, "state": {1: state["state"][1]}})  # the remedy: no warning
    assert optimizer.state[w]["step"] == 2 and p not in optimizer.state


def test_every_trained_parameter_has_an_entry():
    p, w, frozen = parameter(8, 8), free(3, 3), free(2, 2).requires_grad_(False)
    optimizer = ru.optim.ProjUNNT([p, w, frozen], lr=0.1)
    assert optimizer.state_dict()["state"] == {0: {}, 1: {}}
    assert not optimizer.state  # nothing is put there by looking
    run([p, w], optimizer, range(1))
    assert set(optimizer.state_dict()["state"][0]) == {
        "retraction_step", "sketch_directions", "coordinates"
    }  # fmt: skip
    assert w not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_edit_the_state_before_it_is_checked_and_see_what_was_loaded(dtype):
    """A hook that reorders a state, as torch's documentation has it for parameters by name."""
    p, w = parameter(8, 8).detach().to(dtype), free(3, 3)
    p = ru.tag_(nn.Parameter(p), ru.Stiefel())
    state = saved([p, w], base=ADAM)
    optimizer = ru.optim.ProjUNNT([w, p], lr=0.1, base=ADAM)
    seen = []

    def reorder(_: object, given: dict) -> dict:
        return {**given, "state": {0: given["state"][1], 1: given["state"][0]}}

    optimizer.register_load_state_dict_pre_hook(reorder)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(dict(o.state[p])))
    optimizer.load_state_dict(state)
    assert seen[0]["exp_avg"].dtype == torch.float32
    assert torch.equal(seen[0]["exp_avg"], state["state"][0]["exp_avg"])
    assert torch.equal(optimizer.state[w]["exp_avg"], state["state"][1]["exp_avg"])


def test_what_is_loaded_is_not_shared():
    p = parameter(8, 8)
    optimizer = ru.optim.ProjUNNT([p], lr=0.1, rank=2)
    run([p], optimizer, range(2))
    other = ru.optim.ProjUNNT([p], lr=0.1, rank=2)
    other.load_state_dict(optimizer.state_dict())
    one, two = (o.state[p]["sketch_directions"] for o in (optimizer, other))
    assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rank", [1, None])
def test_adagrad_which_has_a_state_from_the_start(fused, rank):
    p = ru.tag_(nn.Parameter(parameter(12, 12).detach().bfloat16()), ru.Stiefel())
    q, w = parameter(12, 12), free(3, 3)
    before = [x.detach().clone() for x in (p, q, w)]
    q.grad = grad = torch.ones_like(q)
    options = {"base": torch.optim.Adagrad, "fused": fused, "rank": rank}
    optimizer = ru.optim.ProjUNNT([p, q], lr=0.1, **options)
    for x in (p, q):
        assert optimizer.state[x]["retraction_step"] == 0
        assert ("sketch_directions" in optimizer.state[x]) == (rank == 1)
    assert optimizer.state[p]["sum"].dtype == optimizer.state[p]["master"].dtype == torch.float32
    assert all(map(torch.equal, (p, q, w), before)) and p.grad is None and q.grad is grad
    other = copy.deepcopy(optimizer)  # begins from nothing, as one without the entries does
    others = other.param_groups[0]["params"]
    for x in others:
        other.state[x].pop("sketch_directions", None)
    run(others, other, range(3))
    run([p, q], optimizer, range(3))
    assert all(map(torch.equal, (p, q), others))
    assert not torch.equal(p, before[0]) and not torch.equal(q, before[1])
    again = copy.deepcopy(optimizer)  # which looks at its parameters anew
    again._admit_new()
    assert again.state_dict()["state"][0]["retraction_step"] == 3
