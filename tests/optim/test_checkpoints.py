"""torch's distributed checkpoints on one process: a run that is resumed goes on bit for bit."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

import riemann_unn as ru
from riemann_unn.errors import StateError
from tests.optim.test_bases import BASES
from tests.support import assert_on_manifold, gaussian

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package"),
    # With no process group torch saves in one process, as is meant, and warns that it does.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

Pair = tuple[nn.Module, Optimizer]
Build = Callable[[], Pair]
Resume = Callable[[Pair, Build, Path], Pair]


class Net(nn.Module):
    """A square weight and a tall one, and one without a tag."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.square = nn.Linear(12, 12, bias=False, dtype=dtype)
        self.tall = nn.Linear(6, 20, bias=False, dtype=dtype)
        self.head = nn.Linear(12, 5, bias=False, dtype=dtype)


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    model = Net(dtype)
    ru.tag_(model, {"square.weight": ru.Orthogonal(), "tall.weight": ru.Stiefel()})
    ru.init.warm_start_(model)
    return model


def run(pair: Pair, steps: range) -> None:
    model, optimizer = pair
    for step in steps:
        for i, p in enumerate(model.parameters()):
            if p.requires_grad and not getattr(p, "unused", False):
                p.grad = gaussian(*p.shape, dtype=p.dtype, seed=100 * step + i)
        optimizer.step()
        optimizer.zero_grad()


def through_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loadable(options: dict[str, bool]) -> StateDictOptions:
    """The options to load by: torch fails on a flat state that is full, its own optimizers' too."""
    full = options.get("full_state_dict") and not options.get("flatten_optimizer_state_dict")
    return StateDictOptions(**{**options, "full_state_dict": bool(full)})


def in_memory(**options: bool) -> Resume:
    """Get the states of model and optimizer apart, send them through a file, and set them."""

    def resume(pair: Pair, build: Build, folder: Path) -> Pair:
        given = StateDictOptions(**options)
        weights = through_file(get_model_state_dict(pair[0], options=given))
        state = through_file(get_optimizer_state_dict(*pair, options=given))
        new = build()
        set_model_state_dict(new[0], weights, options=loadable(options))
        set_optimizer_state_dict(*new, state, options=loadable(options))
        return new

    return resume


def on_disk(**options: bool) -> Resume:
    """Save to a folder, and load into the states of a new model and optimizer."""

    def resume(pair: Pair, build: Build, folder: Path) -> Pair:
        weights, state = get_state_dict(*pair, options=StateDictOptions(**options))
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        return load(build(), folder, loadable(options))

    return resume


def load(pair: Pair, folder: Path, options: StateDictOptions, **kwargs: object) -> Pair:
    weights, state = get_state_dict(*pair, options=options)
    whole = {"model": weights, "optimizer": state}
    dcp.load(whole, checkpoint_id=folder, **kwargs)
    set_state_dict(
        *pair,
        model_state_dict=whole["model"],
        optim_state_dict=whole["optimizer"],
        options=options,
    )
    return pair


def assert_equal(one: Pair, two: Pair) -> None:
    """Weights, and what the optimizers keep of them."""
    for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True):
        assert torch.equal(p, q)
        kept, other = one[1].state.get(p, {}), two[1].state.get(q, {})
        assert kept.keys() == other.keys()
        for name, value in kept.items():
            assert type(value) is type(other[name])
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
            else:
                assert value == other[name], name


def assert_resumes(build: Build, resume: Resume, folder: Path) -> None:
    straight = build()
    run(straight, range(5))
    resumed = resume(copy.deepcopy(straight), build, folder)
    assert_equal(straight, resumed)
    for pair in (straight, resumed):
        run(pair, range(5, 10))
    assert_equal(straight, resumed)
    for p in resumed[0].parameters():
        if ru.manifold_of(p) is not None and p.dtype is torch.float32:
            assert_on_manifold(p)


def builder(
    base: type[Optimizer] = torch.optim.SGD, dtype: torch.dtype = torch.float32, **options: object
) -> Build:
    def build() -> Pair:
        model = net(dtype)
        return model, ru.optim.ProjUNNT(model.parameters(), lr=1e-2, base=base, **options)

    return build


WAYS = {
    "disk": on_disk(),
    "disk-flat": on_disk(flatten_optimizer_state_dict=True),
    "memory-full": in_memory(full_state_dict=True, cpu_offload=True),
    "memory-flat-partial": in_memory(flatten_optimizer_state_dict=True, strict=False),
}


@pytest.mark.parametrize("all_ways", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_base_resumes_bit_equal(name, dtype, all_ways, tmp_path):
    base, options = BASES[name]
    ranks, turn = (1, 4, None), list(BASES).index(name)
    for i, way in enumerate(WAYS):
        # All ways of a base, by ranks in turn; all of both in the long tests.
        for rank in ranks if all_ways else (ranks[(i + turn) % 3],):
            folder = tmp_path / f"{way}-{rank}"
            assert_resumes(builder(base, dtype, rank=rank, **options), WAYS[way], folder)


SOME = {"sgd": (torch.optim.SGD, {}), "adam": (torch.optim.Adam, {})}
FLAGS = ("flatten_optimizer_state_dict", "full_state_dict", "cpu_offload", "strict")


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_every_option_resumes(base: str, folder: Path, *, is_long: bool) -> None:
    kind, options = SOME[base]
    for flags in itertools.product((False, True), repeat=len(FLAGS)):
        chosen = dict(zip(FLAGS, flags, strict=True))
        ways = in_memory(**chosen), on_disk(**chosen)
        # By turns: any three options meet in memory, and any three on disk.
        for way in ways if is_long else (ways[sum(flags) % 2],):
            here = folder / f"{way.__qualname__}-{flags}"
            assert_resumes(builder(kind, torch.bfloat16, rank=None, **options), way, here)


@pytest.mark.parametrize("is_long", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("base", SOME)
def test_every_option_resumes_bit_equal(base, is_long, tmp_path):
    assert_every_option_resumes(base, tmp_path, is_long=is_long)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("is_long", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("base", SOME)
def test_every_option_resumes_in_a_world_of_one(base, is_long, tmp_path, world_of_one):
    assert_every_option_resumes(base, tmp_path, is_long=is_long)


@pytest.mark.parametrize("name", ["nadam", "asgd"])
def test_numbers_keep_their_own_precision(name, tmp_path):
    """torch would load them in that of their parameter."""
    for way in WAYS:
        build = builder(BASES[name][0], torch.float64)
        assert_resumes(build, WAYS[way], tmp_path / way)


@pytest.mark.parametrize(
    ("base", "sketch", "way"),
    [  # every two of them together
        ("sgd", "tangent", "disk"),
        ("adam", "tangent", "disk-flat"),
        ("sgd", "lsi", "disk-flat"),
        ("adam", "lsi", "disk"),
        ("sgd", "column", "disk"),
        ("adam", "column", "disk-flat"),
        ("sgd", "svd", "disk-flat"),
        ("adam", "svd", "disk"),
    ],
)
def test_every_sketch_and_complex_matrices(base, sketch, way, tmp_path):
    def build() -> Pair:
        torch.manual_seed(0)
        model = nn.Module()
        model.conv = nn.Parameter(torch.randn(6, 6, 3, 3))  # real, of complex matrices
        model.unitary = nn.Parameter(torch.randn(2, 8, 8, dtype=torch.complex64))
        ru.tag_(model, {"conv": ru.OrthogonalConv(), "unitary": ru.Unitary()})
        ru.init.warm_start_(model)
        kind, options = SOME[base]
        return model, ru.optim.ProjUNND(
            model.parameters(), lr=1e-2, base=kind, rank=2, sketch=sketch, **options
        )

    assert_resumes(build, WAYS[way], tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_groups_with_options_names_a_tensor_as_rate_and_frozen_parameters(way, tmp_path):
    def build() -> Pair:
        model = net()
        model.more = nn.Linear(12, 12, bias=False)
        model.more.weight.requires_grad_(False)
        groups = [
            {"params": [("square", model.square.weight)], "rank": 3, "max_angle": 0.01},
            {"params": [("tall", model.tall.weight), ("head", model.head.weight)]},
            {"params": [("more", model.more.weight)], "sketch": "svd", "rank": None},
        ]
        lr = torch.tensor(1e-2)
        return model, ru.optim.ProjUNNT(groups, lr=lr, base=torch.optim.Adam, foreach=False)

    assert_resumes(build, WAYS[way], tmp_path)
    for group in build()[1].param_groups:
        assert group["rank"] is None or type(group["rank"]) is int


@pytest.mark.parametrize("way", WAYS)
def test_a_scheduler_goes_on(way, tmp_path):
    def build() -> tuple[Pair, OneCycleLR]:
        pair = builder(momentum=0.9)()
        return pair, OneCycleLR(pair[1], max_lr=0.1, total_steps=20)

    def train(pair: Pair, scheduler: OneCycleLR, steps: range) -> None:
        for step in steps:
            run(pair, range(step, step + 1))
            scheduler.step()

    straight, scheduler = build()
    train(straight, scheduler, range(5))
    kept = through_file(scheduler.state_dict())
    new: list[OneCycleLR] = []

    def build_again() -> Pair:
        pair, again = build()
        new.append(again)
        return pair

    resumed = WAYS[way](straight, build_again, tmp_path)
    new[0].load_state_dict(kept)
    train(straight, scheduler, range(5, 10))
    train(resumed, new[0], range(5, 10))
    assert_equal(straight, resumed)
    assert straight[1].param_groups[0]["lr"] == resumed[1].param_groups[0]["lr"]


# What torch asks of an optimizer ----------------------------------------------------


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, None])
def test_the_step_that_finds_what_is_kept_finds_all_and_changes_nothing(name, dtype, rank):
    base, options = BASES[name]
    model, optimizer = pair = builder(base, dtype, rank=rank, **options)()
    before = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(*pair)
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == 1e-2
    found = {p: set(kept) for p, kept in optimizer.state.items()}
    run(pair, range(3))
    assert found == {p: set(kept) for p, kept in optimizer.state.items()}
    for name in ("square", "tall"):
        kept = set(optimizer.state[getattr(model, name).weight])
        assert {"retraction_step", "coordinates"} <= kept
        assert ("sketch_directions" in kept) == (rank == 1)
        assert ("master" in kept) == (dtype == torch.bfloat16)


def test_negative_control_every_entry_is_needed():
    for dtype, rank in ((torch.bfloat16, 1), (torch.float32, 1)):
        build = builder(torch.optim.Adam, dtype, rank=rank)
        straight = build()
        run(straight, range(5))
        state = through_file(get_optimizer_state_dict(*straight))
        weights = through_file(straight[0].state_dict())
        run(straight, range(5, 10))
        for entry in ("retraction_step", "sketch_directions", "master", "exp_avg"):
            less = copy.deepcopy(state)
            kept = less["state"]["square.weight"]
            if entry not in kept:
                continue
            kept[entry] = 0 if entry == "retraction_step" else torch.zeros_like(kept[entry])
            resumed = build()
            resumed[0].load_state_dict(weights)
            set_optimizer_state_dict(*resumed, less)
            run(resumed, range(5, 10))
            assert not torch.equal(straight[0].square.weight, resumed[0].square.weight), entry


# States with gaps, and of others ----------------------------------------------------


@pytest.mark.parametrize("base", SOME)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_parameter_that_had_no_gradient_begins_when_it_has_one(base, flat, strict, tmp_path):
    kind, options = SOME[base]
    straight = builder(kind, rank=2, **options)()
    straight[0].tall.weight.unused = True
    run(straight, range(5))
    resume = in_memory(flatten_optimizer_state_dict=flat, strict=strict)
    resumed = resume(straight, builder(kind, rank=2, **options), tmp_path)
    del straight[0].tall.weight.unused
    before = resumed[0].tall.weight.detach().clone()
    for pair in (straight, resumed):
        run(pair, range(5, 10))
    assert_equal(straight, resumed)
    assert not torch.equal(before, resumed[0].tall.weight)


@pytest.mark.parametrize("base", SOME)
def test_a_state_of_some_parameters_is_loaded_where_that_is_asked_for(base):
    kind, options = SOME[base]
    straight = builder(kind, rank=2, **options)()
    run(straight, range(5))
    state = get_optimizer_state_dict(*straight)
    del state["state"]["tall.weight"]
    model, optimizer = builder(kind, rank=2, **options)()
    with pytest.raises(RuntimeError, match=r"Missing optimizer state for parameter 'tall\.weight'"):
        set_optimizer_state_dict(model, optimizer, copy.deepcopy(state))
    partial = StateDictOptions(strict=False)
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(state), options=partial)
    assert model.tall.weight not in optimizer.state
    assert optimizer.state[model.square.weight]["retraction_step"] == 5
    run((model, optimizer), range(5, 7))


@pytest.mark.parametrize("flat", [False, True])
def test_another_rank_or_base_is_refused_here_too(flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    straight = builder(torch.optim.Adam, rank=2)()
    run(straight, range(3))
    for build, message in (
        (builder(torch.optim.Adam, rank=4), "rank=2, and this optimizer has rank=4"),
        (builder(torch.optim.AdamW, rank=2), "base=Adam, and this optimizer has base=AdamW"),
    ):
        state = copy.deepcopy(get_optimizer_state_dict(*straight, options=options))
        with pytest.raises(StateError, match=message):
            set_optimizer_state_dict(*build(), state, options=options)


def test_a_folder_of_0_2_0_is_read_where_a_partial_load_is_asked_for(tmp_path):
    build = builder(torch.optim.Adam, rank=2)
    straight = build()
    run(straight, range(5))
    weights, state = copy.deepcopy(get_state_dict(*straight))
    del state["param_groups"][0]["base_class"]
    for kept in state["state"].values():
        kept.pop("coordinates", None)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    resumed = load(build(), tmp_path, StateDictOptions(), planner=planner)
    for pair in (straight, resumed):
        run(pair, range(5, 10))
    assert_equal(straight, resumed)
