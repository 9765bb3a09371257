"""The optimizer protocol, as users of torch.optim know it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import riemann_unn as ru
from tests.support import assert_on_manifold, gaussian, parameter

BASES = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adam, {}),
    (torch.optim.RMSprop, {"momentum": 0.5}),
]


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).to(dtype)
    for layer in (net[0], net[2]):
        nn.init.orthogonal_(layer.weight)
    return ru.tag_(net, {"[02].weight": ru.Orthogonal()})


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    dtype = next(net.parameters()).dtype
    return net(gaussian(16, 8, dtype=dtype, seed=step)).square().mean()


def run(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def assert_equal(one: nn.Module, two: nn.Module) -> None:
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def through_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("sketch", ["tangent", "lsi", "column"])
def test_resume_is_bit_equal(base, options, sketch):
    def build(net: nn.Module) -> torch.optim.Optimizer:
        return ru.optim.ProjUNNT(
            net.parameters(), lr=0.05, rank=2, base=base, sketch=sketch, seed=3, **options
        )

    straight = model()
    optimizer = build(straight)
    run(straight, optimizer, range(10))
    weights, state = through_file(straight.state_dict()), through_file(optimizer.state_dict())
    run(straight, optimizer, range(10, 20))

    torch.manual_seed(12345)
    torch.randn(100)
    resumed = model()
    resumed.load_state_dict(weights)
    optimizer = build(resumed)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    run(resumed, optimizer, range(10, 20))
    assert_equal(straight, resumed)

    # Negative control: without the optimizer's state the runs part.
    other = model()
    other.load_state_dict(weights)
    run(other, build(other), range(10, 20))
    assert not torch.equal(other[0].weight, straight[0].weight)


def test_weights_may_be_loaded_after_the_optimizer_is_made():
    straight = model()
    optimizer = ru.optim.ProjUNNT(straight.parameters(), lr=0.05, momentum=0.9)
    run(straight, optimizer, range(10))
    weights, state = through_file(straight.state_dict()), through_file(optimizer.state_dict())
    run(straight, optimizer, range(10, 20))
    resumed = model()
    optimizer = ru.optim.ProjUNNT(resumed.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(state)
    resumed.load_state_dict(weights)
    run(resumed, optimizer, range(10, 20))
    assert_equal(straight, resumed)


def test_the_state_of_the_plain_base_can_be_loaded():
    net = model()
    plain = torch.optim.Adam(net.parameters(), lr=0.01)
    run(net, plain, range(3))
    ru.init.warm_start_(net)
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.05, base=torch.optim.Adam, rank=2)
    with pytest.warns(UserWarning, match=r"a state of Adam alone.* '0.weight', '2.weight' is in"):
        optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["rank"] == 2
    assert optimizer.state[net[0].weight]["step"] == 3
    run(net, optimizer, range(3, 6))
    for weight in (net[0].weight, net[2].weight):
        assert_on_manifold(weight)


def test_groups_and_state_hold_plain_values():
    net = model()
    optimizer = ru.optim.ProjUNND(net.parameters(), lr=0.1, base=torch.optim.Adam)
    run(net, optimizer, range(2))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for value in group.values():
            assert isinstance(value, (bool, int, float, str, tuple, list, type(None)))
    for entries in state["state"].values():
        for value in entries.values():
            assert isinstance(value, (int, float, torch.Tensor))
    assert set(state) == {"state", "param_groups"}


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_copies_of_model_and_optimizer_go_on_alike(copier, base, options):
    net = model()
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.05, rank=2, base=base, **options)
    run(net, optimizer, range(5))
    net2, optimizer2 = copier((net, optimizer))
    assert optimizer2.param_groups[0]["params"][0] is net2[0].weight
    assert optimizer2.param_groups is optimizer2.base.param_groups
    run(net, optimizer, range(5, 10))
    run(net2, optimizer2, range(5, 10))
    assert_equal(net, net2)
    assert_on_manifold(net2[0].weight)


def schedulers():
    lambda_ = lambda epoch: 0.9**epoch  # noqa: E731
    return {
        "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda_),
        "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda_),
        "step": lambda o: lr_scheduler.StepLR(o, 3),
        "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
        "constant": lambda o: lr_scheduler.ConstantLR(o),
        "linear": lambda o: lr_scheduler.LinearLR(o),
        "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 10),
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
        "warm-restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
        "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
        "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        "chained": lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
        ),
        "sequential": lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
        ),
    }


@pytest.mark.parametrize("name", schedulers())
def test_schedulers_give_the_rates_they_give_the_base(name):
    def rates(optimizer: torch.optim.Optimizer, net: nn.Module) -> list[float]:
        scheduler = schedulers()[name](optimizer)
        seen = []
        for step in range(10):
            run(net, optimizer, range(step, step + 1))
            scheduler.step()
            seen.append(float(optimizer.param_groups[0]["lr"]))
        return seen

    net, plain = model(), model()
    ours = ru.optim.ProjUNNT(net.parameters(), lr=0.05, momentum=0.9)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    assert rates(ours, net) == rates(theirs, plain)
    assert_on_manifold(net[0].weight)


def test_reduce_on_plateau():
    net = model()
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.05)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    for step in range(6):
        run(net, optimizer, range(step, step + 1))
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.05


def test_the_rate_decides_the_length_of_the_step():
    lengths = []
    for lr in (0.01, 0.02, torch.tensor(0.02)):
        p = parameter(8, 8, dtype=torch.float64)
        start = p.detach().clone()
        p.grad = 0.01 * gaussian(8, 8)
        ru.optim.ProjUNNT([p], lr=lr).step()
        lengths.append(float((p.detach() - start).norm()))
    assert lengths[1] / lengths[0] == pytest.approx(2.0, rel=1e-3)
    assert lengths[2] == pytest.approx(lengths[1], rel=1e-6)


def test_closures_are_evaluated_once_on_the_manifold_with_gradients():
    for base in (torch.optim.SGD, torch.optim.Adam):
        net = model()
        optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.05, base=base)
        calls = []

        def closure(net=net, optimizer=optimizer, calls=calls):
            optimizer.zero_grad()
            assert torch.is_grad_enabled()
            assert_on_manifold(net[0].weight)
            loss = loss_of(net, 0)
            loss.backward()
            calls.append(float(loss.detach()))
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
        assert losses == calls and losses[-1] < losses[0]


def test_groups_have_their_own_options():
    net = model()
    optimizer = ru.optim.ProjUNNT(
        [
            {"params": [net[0].weight], "lr": 0.0},
            {"params": [net[2].weight], "rank": 3, "sketch": "svd"},
            {"params": [net[3].weight], "momentum": 0.9},
        ],
        lr=0.05,
    )
    before = net[0].weight.detach().clone()
    run(net, optimizer, range(5))
    assert torch.equal(net[0].weight, before)
    assert "momentum_buffer" in optimizer.state[net[3].weight]
    assert [group["rank"] for group in optimizer.param_groups] == [1, 3, 1]
    optimizer.param_groups[0]["lr"] = 0.1
    run(net, optimizer, range(5, 10))
    assert not torch.equal(net[0].weight, before)


def test_named_parameters_and_added_groups():
    net = model()
    optimizer = ru.optim.ProjUNND(net[0].named_parameters(), lr=0.05)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    optimizer.add_param_group({"params": list(net[2].named_parameters()), "lr": 0.01, "rank": 2})
    assert len(optimizer.param_groups) == len(optimizer.base.param_groups) == 2
    before = net[2].weight.detach().clone()
    run(net, optimizer, range(3))
    assert not torch.equal(net[2].weight, before)
    assert_on_manifold(net[2].weight)
    state = through_file(optimizer.state_dict())
    assert state["param_groups"][1]["param_names"] == ["weight", "bias"]


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    net = model()
    optimizer = ru.optim.ProjUNNT([net[0].weight], lr=0.05)
    with torch.no_grad():
        net[2].weight.mul_(1.1)
    with pytest.raises(ru.OffManifoldError):
        optimizer.add_param_group({"params": [net[2].weight]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [net[0].weight]})
    with pytest.raises(ru.ManifoldError, match="rank=0"):
        optimizer.add_param_group({"params": [net[3].weight], "rank": 0})
    assert len(optimizer.param_groups) == 1


def test_hooks_run_once_and_see_the_outer_optimizer():
    net = model()
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.05, base=torch.optim.Adam)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("post", o)))
    optimizer.register_state_dict_post_hook(lambda o, d: d.update(extra=1))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append(("load", o)))
    handle = register_optimizer_step_pre_hook(lambda o, *_: seen.append(("global", o)))
    try:
        run(net, optimizer, range(1))
    finally:
        handle.remove()
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert [kind for kind, _ in seen] == ["global", "pre", "post", "load"]
    assert all(o is optimizer for _, o in seen)


def test_a_profile_is_entered_only_where_somebody_asks_for_it():
    """Tags have a hook of their own before every optimizer's step, which is no reason."""
    net = model()
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.05)

    run(net, optimizer, range(1))

    def entered():
        counter = Names()
        with counter:
            optimizer.step()
        return any("record_function" in name for name in counter.names)

    assert not entered()
    optimizer.register_step_post_hook(lambda *_: None)
    assert entered()


class Names(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_zero_grad_and_missing_gradients():
    net = model()
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.05, base=torch.optim.Adam)
    loss_of(net, 0).backward()
    net[0].weight.grad = None
    before = net[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert net[0].weight not in optimizer.state
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    optimizer.step()  # no gradients at all
    loss_of(net, 1).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in net.parameters())


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_grad_scaler(base):
    net = model()
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.05, base=base)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = net[0].weight.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(net, step)
        scaler.scale(loss).backward()
        if step == 2:
            net[0].weight.grad.fill_(float("inf"))
            kept = net[0].weight.detach().clone()
        scaler.step(optimizer)
        if step == 2:
            assert torch.equal(net[0].weight, kept)
        scaler.update()
    assert scaler.get_scale() == 128.0
    assert not torch.equal(net[0].weight, before)
    assert_on_manifold(net[0].weight)


def test_autocast_does_not_reach_inside_a_step():
    ends = []
    for enabled in (False, True):
        p = parameter(40, 40)
        optimizer = ru.optim.ProjUNNT([p], lr=0.1, rank=2)
        for step in range(5):
            p.grad = gaussian(40, 40, dtype=torch.float32, seed=step)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("sketch", ["tangent", "lsi", "column", "svd"])
def test_gradients_generator_and_storage_are_left_alone(base, sketch):
    net = model().train()
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.05, base=base, sketch=sketch)
    loss_of(net, 0).backward()
    grads = [p.grad for p in net.parameters()]
    values = [g.clone() for g in grads]
    pointers = [(p.data_ptr(), p.stride()) for p in net.parameters()]
    rng = torch.get_rng_state()
    optimizer.step()
    for p, g, v in zip(net.parameters(), grads, values, strict=True):
        assert p.grad is g and torch.equal(g, v)
    assert pointers == [(p.data_ptr(), p.stride()) for p in net.parameters()]
    assert torch.equal(torch.get_rng_state(), rng)
    assert net.training


def test_transposed_strides_and_channels_last_are_kept():
    p = nn.Parameter(parameter(9, 9).detach().clone().mT.contiguous().mT)
    ru.tag_(p, ru.Orthogonal())
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    ru.tag_(conv.weight, ru.Stiefel(flatten=True))
    ru.init.warm_start_(conv)
    strides = [q.stride() for q in (p, conv.weight)]
    optimizer = ru.optim.ProjUNND([p, conv.weight], lr=0.1, base=torch.optim.Adam)
    for step in range(10):
        p.grad = gaussian(9, 9, dtype=torch.float32, seed=step)
        conv.weight.grad = torch.randn_like(conv.weight)
        optimizer.step()
    assert strides == [q.stride() for q in (p, conv.weight)]
    assert_on_manifold(p)
    assert_on_manifold(conv.weight)


def test_stale_graphs_are_noticed_as_with_torch():
    p = parameter(6, 6)
    optimizer = ru.optim.ProjUNNT([p], lr=0.1)
    loss = (p @ p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_equal_seeds_give_equal_runs_and_other_seeds_do_not():
    ends = []
    for seed in (0, 0, 1):
        net = model()
        run(net, ru.optim.ProjUNNT(net.parameters(), lr=0.05, seed=seed), range(5))
        ends.append(net[0].weight.detach().clone())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("mode", ["averaged", "compiled"])
def test_models_that_are_averaged_or_compiled(mode):
    net = model()
    optimizer = ru.optim.ProjUNNT(net.parameters(), lr=0.05)
    if mode == "averaged":
        average = torch.optim.swa_utils.AveragedModel(net)
        run(net, optimizer, range(5))
        average.update_parameters(net)
        assert ru.manifold_of(average.module[0].weight) == ru.Orthogonal()
    else:
        run(torch.compile(net, backend="eager"), optimizer, range(5))
    assert_on_manifold(net[0].weight)
