"""The benchmark suite at tiny sizes: its tables hold numbers, its order is shuffled. No timing."""

import importlib
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench.contenders import Pogo
from bench.suite import page as page_module
from bench.suite.__main__ import main, measure
from bench.suite.matrices import distance, orthonormal, weight_of
from bench.suite.memory import peak_extra
from bench.suite.page import BEGIN, END, PAGE, short, write
from bench.suite.plan import QUICK, SECTIONS, Clock
from bench.suite.plots import draw
from bench.suite.race import Runner, best, race
from bench.suite.recipes import RECIPES
from bench.suite.stored import tables
from bench.suite.summary import ASKS, Ask
from bench.suite.timing import Entry, interleave, polish_period, schedule
from bench.suite.training import Trained
from riemann_unn.demo.models import SequenceModel
from riemann_unn.demo.tasks import Copy
from riemann_unn.nn import OrthogonalRNN

TINY = replace(
    QUICK,
    name="a test",
    minutes=2,
    sizes=(8, 16),
    rounds=2,
    cell_limit=0.05,
    memory_size=16,
    counts=((5, 4),),
    tall=(40, 3),
    complex_size=6,
    conv=(2, 4),
    hidden=(6, 3, 24),
    training_steps=2,
    ranks=(1, 2),
    gradients=3,
    target_size=8,
    target=0.2,
    rates=(1.0,),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        # Importing it compiles its kernels, which takes longer than everything here.
        patch.setattr(Pogo, "needs", "a_package_that_is_not_there")
        values = measure(TINY, out)
    assert torch.equal(torch.get_rng_state(), state)
    return out, values


def rows(text: str) -> dict[str, list[str]]:
    """The cells of the rows of all tables, by their first cell; of equal ones the first."""
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE):
        name, *cells = line.split(" | ")
        found.setdefault(name, cells)
    return found


def test_the_page_has_numbers_and_pictures(written):
    out, values = written
    text = (out / "benchmarks.md").read_text("utf-8")
    head = PAGE.read_text("utf-8").split(BEGIN)[0]
    assert text.startswith(head + BEGIN)
    assert text.split(BEGIN)[1].count("\n## ") == 1 + len(SECTIONS)
    found = rows(text.split(BEGIN)[1])
    assert re.fullmatch(r"[\d.]+", found["ProjUNN-T, rank 1"][0])
    assert re.fullmatch(r"[\d.]+", found["torch SGD"][0])  # no error where nothing is constrained
    for name in ("Cayley, dense, separate", "Cayley, dense, stacked", "Expm, dense", '`"lsi"`'):
        assert re.match(r"[\d.]+", found[name][0]), name
    assert "geoopt SGD, QR" in found and "NotImplementedError" in text  # it refuses complex
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) == 3
    for picture in pictures:
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"
    assert "POGO: a_package_that_is_not_there is not installed." in text
    assert all(value > 0 for value in values.values())
    assert str(Path.home()) not in text and str(PAGE.parents[1]) not in text


def test_pictures_show_the_tables_of_the_page(written, tmp_path):
    out, values = written
    text = (out / "benchmarks.md").read_text("utf-8").split(BEGIN)[1]
    times, errors = [t for t in tables(text) if t.heading == "Time of a step against n"][:2]
    line = times.line("ProjUNN-T, rank 1", "n=")
    assert set(line) == {8, 16}
    for n, milliseconds in line.items():
        seconds = values[f"step/ProjUNN-T, rank 1/{n:g}"]
        assert milliseconds == pytest.approx(1e3 * seconds, rel=6e-3)
    assert 0 < errors.line("ProjUNN-T, rank 1", "n=")[8] < 1e-5 and "torch SGD" not in errors.rows
    shares = next(t for t in tables(text) if t.heading == "What sketches capture")
    captured = shares.line('`"lsi"`', "rank ")[2]
    assert captured == pytest.approx(values["sketch/digits/lsi/2"], abs=6e-5)
    main(["--draw", "--out", str(out)])
    for name in ("bench_steps.png", "bench_error.png", "bench_sketches.png"):
        assert draw(text, tmp_path) and (tmp_path / name).exists()
    assert draw("## Other shapes\n", tmp_path) == []


def test_what_is_asked_for_is_measured_by_these_names(written):
    """A contender under another name would leave its line of the summary empty."""
    _, values = written
    for ask in ASKS:
        for key in (ask.top, ask.bottom):
            name = re.sub(r"/\d+$", "/8", key) if key.startswith("step/") else key
            name = name.replace("small16", "small4")
            if key not in ("", "slope") and "copying" not in key and "POGO" not in key:
                assert name in values or f"{name.removesuffix('/8')}/1" in values, key


def test_order_is_shuffled_and_every_round_holds_everyone():
    counts = dict.fromkeys("abcde", 0)

    def step(name):
        counts[name] += 1

    entries = [Entry(name, lambda name=name: step(name)) for name in counts]
    orders = []
    for _ in range(2):
        order: list[list[str]] = []
        found = interleave(entries, seconds=1.0, rounds=6, seed=3, order=order)
        assert len(order) == 6 and all(sorted(names) == sorted(counts) for names in order)
        assert any(a != b for a, b in pairwise(order))
        orders.append(order)
        assert all(len(timing.rounds) == 6 for timing in found.values())
    assert orders[0] == orders[1]  # the seed alone decides
    assert all(count >= 12 for count in counts.values())


def test_a_contender_that_raises_or_is_slow_leaves_the_others_alone():
    def refuse():
        raise NotImplementedError

    entries = [Entry("a", refuse), Entry("b", lambda: None), Entry("c", lambda: None, most=-1.0)]
    found = interleave(entries, seconds=1e-3, rounds=2, seed=0)
    assert found["a"].failure == "NotImplementedError" and not found["a"].rounds
    assert found["c"].failure.startswith("over") and found["b"].rounds


@pytest.mark.parametrize("step", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("p", [8, 64, 65, 512, 4096])
def test_means_run_over_whole_polish_periods(step, p):
    for seconds in (1e-3, 0.1, 10):
        period = polish_period(p)
        block, rounds = schedule(step, period=period, seconds=seconds, rounds=7)
        assert block * rounds % period == 0 and block * rounds >= period
        assert block * rounds * step <= max(seconds, 8 * 32 * step, period * step)


def test_the_polish_has_the_period_that_the_means_run_over():
    """Steps without a displacement of note change the point at polishes alone."""
    polish = importlib.import_module("riemann_unn.linalg.step.polish")
    for p in (8, 65, 513):
        x = orthonormal(p).mul_(1 + 1e-3)
        moved = []
        for step in range(64):
            before = x.clone()
            polish.polish_(x, step=step)
            if not torch.equal(x, before):
                moved.append(step)
        assert {b - a for a, b in pairwise(moved)} == {polish_period(p)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_matrices_are_orthonormal_and_their_error_is_seen(dtype):
    for shape in ((33, 33), (40, 7), (1100, 1100)):
        x = orthonormal(*shape, dtype=dtype)
        assert distance(x) < 2e-7
        x = 1.01 * x  # off by 0.0201 in every direction
        assert distance(x) == pytest.approx(0.0201, rel=0.05)


def test_memory_is_the_peak_and_not_the_sum():
    x = torch.zeros(1000)

    def step():
        for _ in range(5):
            y = x + 1  # one lives until the next has been made
        del y

    assert 8000 <= peak_extra(step) < 8100  # a few bytes are the scalar 1
    assert peak_extra(lambda: x.add_(0)) < 100


def test_a_race_counts_steps_and_keeps_the_best_rate():
    def runner(rate: float) -> Runner:
        left = [1.0]

        def step(_):
            left[0] -= rate

        return Runner("a", rate, step, lambda: left[0], lambda: None)

    runners = [runner(rate) for rate in (0.0, 0.05, 0.25)]
    race(runners, target=0.01, every=1, most=50, seconds=5, turn=1e-9, seed=0, title="")
    fastest = best(runners)["a"]
    assert fastest.reached and fastest.rate in (0.05, 0.25)
    assert runners[2].steps == 4
    assert not runners[0].reached and runners[0].steps <= 50


def test_the_budget_is_handed_on():
    clock = Clock(TINY, SECTIONS)
    assert sum(clock.estimates().values()) == pytest.approx(120)
    clock.enter("steps")
    first = clock.left
    clock.leave("steps")
    clock.enter("shapes")  # nothing was used, so there is more than at first
    assert first < 120 and clock.left > clock.estimates()["shapes"]


def test_verdicts_and_numbers():
    ask = Ask("", "a", "b", 2.0, 1.0)
    verdicts = [ask.row({"a": a, "b": 1.0})[-1] for a in (0.9, 1.5, 2.5)]
    assert verdicts == ["more than asked", "as asked", "**missed**"]
    least = Ask("", "a", "", 0.9, 0.99, at_least=True)
    assert [least.row({"a": a})[-1] for a in (0.8, 0.95)] == ["**missed**", "as asked"]
    assert ask.row({"a": 1.0})[-2] == "not measured in this run"
    shown = [short(x, 3) for x in (0.01234, 9.999, 12.34, 123.4, 1234.0, 2.2e-7, 0)]
    assert shown == ["0.0123", "10.0", "12.3", "123", "1230", "2e-7", "0"]


def test_writing_keeps_the_hand_written_part(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", "utf-8")
    write(page, ["new"])
    text = page.read_text("utf-8")
    assert text.startswith("before") and text.endswith("after\n")
    assert "new" in text and "old" not in text
    page.write_text("no marks", "utf-8")
    with pytest.raises(SystemExit, match="needs one line"):
        write(page, ["new"])


def test_a_part_or_a_quick_run_leaves_the_documentation_alone(monkeypatch):
    seen = []
    module = importlib.import_module("bench.suite.__main__")
    monkeypatch.setattr(module, "measure", lambda plan, out, only: seen.append((plan, out)))
    for arguments in (["--quick"], ["--only", "steps"], [], ["--minutes", "5"]):
        main(arguments)
    outs = [out for _, out in seen]
    assert outs[2:] == [PAGE.parent] * 2 and PAGE.parent not in outs[:2]
    assert seen[0][0] is QUICK and seen[3][0].minutes == 5
    assert random.Random(0)  # the order never touches the global source
    assert page_module.facts().count("threads on") == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_trains_and_stays_orthogonal(recipe):
    """Also the first step of each moves the recurrence: none is left out by a wrong group."""
    if recipe.missing() or recipe.name.startswith("POGO"):  # whose import takes seconds
        pytest.skip("not installed, or slow to import")
    task = Copy(delay=5, batch_size=4)
    torch.manual_seed(0)
    model = SequenceModel(OrthogonalRNN(task.features, 6), 6, task)
    before = weight_of(model.rnn, "weight_hh_l0").clone()
    optimizers = recipe.build(model, 1e-2)
    trained = Trained(recipe.name, model, optimizers, lambda: before)
    trained.step(task, *next(iter(task.train_batches(torch.Generator().manual_seed(0)))))
    after = weight_of(model.rnn, "weight_hh_l0")
    moved = float((after - before).abs().max())
    assert 1e-6 < moved < 0.1
    held = sum(p.numel() for o in optimizers for g in o.param_groups for p in g["params"])
    assert held == sum(p.numel() for p in model.parameters())
    assert (distance(after) < 2e-6) == (not recipe.name.startswith("unconstrained"))
