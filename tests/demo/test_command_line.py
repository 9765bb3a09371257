"""The demo's command line: where the task may stand, what help shows, what is wrong with a line."""

from __future__ import annotations

import ast
import graphlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import riemann_unn.demo
from riemann_unn.demo import __main__ as demo
from riemann_unn.demo.progress import Progress
from riemann_unn.errors import NonFiniteError

TASKS = list(demo.TASKS)
DEMO = Path(riemann_unn.demo.__file__).parent


def ends(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, output and errors of a command line that runs nothing."""
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    shown = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, shown.out, shown.err


BAD: list[tuple[str, str]] = [
    # tasks
    ("foo", "there is no task 'foo'"),
    ("mnist", "there is no task 'mnist'"),
    ("digit", "(did you mean digits?)"),
    ("--seed 1 cnov", "(did you mean conv?)"),
    ("conv lipschitz", "one task at a time, got conv and lipschitz"),
    ("conv 5", "there is no task '5'"),
    # options
    ("--epohcs 3", "there is no option --epohcs (did you mean --epochs?)"),
    ("conv --sed 1", "there is no option --sed (did you mean --seed?)"),
    ("--epoch 3", "there is no option --epoch (did you mean --epochs?)"),
    ("-e 3", "there is no option -e"),
    ("conv --length 3", "--length is no option of conv, but of copy and adding"),
    ("copy --permuted", "--permuted is no option of copy, but of digits"),
    ("copy --data digits", "--data is no option of copy, but of digits and sequences"),
    ("--length 9", "--length is no option of digits"),
    ("conv --quiet=3", "--quiet takes no value, got '3'"),
    # values
    ("--epochs", "--epochs needs a value: a whole number of at least 1"),
    ("--epochs --seed 1", "--epochs needs a value: a whole number of at least 1"),
    ("--epochs x", "--epochs: wanted a whole number of at least 1, got 'x'"),
    ("conv --epochs 0", "--epochs: wanted a whole number of at least 1, got '0'"),
    ("--rank 1.5", "--rank: wanted a whole number of at least 1, got '1.5'"),
    ("--seed -1", "--seed: wanted a whole number from 0 to 4294967295, got '-1'"),
    ("--seed 99999999999 copy", "--seed: wanted a whole number from 0 to 4294967295"),
    ("--lr nan", "--lr: wanted a positive number of at most 1e6, got 'nan'"),
    ("--lr -inf", "--lr: wanted a positive number of at most 1e6, got '-inf'"),
    ("--lr 0", "--lr: wanted a positive number of at most 1e6, got '0'"),
    ("conv --lr 1e400", "--lr: wanted a positive number of at most 1e6, got '1e400'"),
    ("--order columns", "--order: wanted one of pixels, permuted, rows, got 'columns'"),
    ("--order permutd", "(did you mean permuted?)"),
    ("convrnn --nonlinearity relu", "wanted one of modrelu, phase_sigmoid, identity"),
    ("lipschitz --width 3", "--width: wanted an even whole number of at least 2, got '3'"),
    ("lowrank --rank 60", "--rank: wanted a whole number from 1 to 51"),
    ("rescale --spread 0", "--spread: wanted a positive number of at most 10"),
    ("rescale --seeds 0", "--seeds: wanted a whole number of at least 1, got '0'"),
    # files
    ("--out /no/such/folder/x.png", "--out: there is no folder /no/such/folder"),
    ("conv --out picture.gif", "--out: wanted a .png file, got 'picture.gif'"),
    ("copy --checkpoint /no/such/folder/x.pt", "--checkpoint: there is no folder /no/such/folder"),
    ("conv --checkpoint /", "--checkpoint: wanted a file, got the folder '/'"),
    ("--checkpoint x.png --out x.png", "--checkpoint and --out are the same file"),
    # what only a task can tell
    ("--hidden 9 --rank 10", "--rank 10 is more than --hidden 9"),
    ("adding --length 1", "at least 2, got 1"),
    ("sequences", "sequences needs --data FILE.csv"),
    ("sequences --data none.csv", "none.csv cannot be read as CSV"),
    ("--data /no/such/folder", "there is no folder /no/such/folder. Fashion-MNIST comes"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_what_is_wrong_with_a_command_line_is_said(line, message, capsys):
    code, _, said = ends(line.split(), capsys)
    assert code == 2
    assert message in " ".join(said.split())
    first, *_, last = said.splitlines()
    assert first.startswith("error: ") and "Traceback" not in said
    assert last.startswith("`python -m riemann_unn.demo") and last.endswith("lists the options")


def test_an_unknown_task_is_answered_with_all_of_them(capsys):
    said = ends(["foo"], capsys)[2]
    assert all(f"  {name} " in said and about in said for name, about in demo.TASKS.items())


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--seed", "1", "--help"]])
def test_help_lists_all_tasks_with_a_line_each(arguments, capsys):
    code, shown, said = ends(arguments, capsys)
    assert code == 0 and not said
    lines = [line.split(maxsplit=1) for line in shown.splitlines() if line.startswith("  ")]
    assert [words for words in lines if words[0] in demo.TASKS] == [
        list(row) for row in demo.TASKS.items()
    ]
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize("task", TASKS)
def test_every_task_explains_its_options(task, capsys):
    code, shown, _ = ends(["--help", task], capsys)
    assert code == 0 and f"python -m riemann_unn.demo {task}" in shown
    for option in ("--epochs", "--seed", "--out", "--checkpoint", "--quiet"):
        assert option in shown
    assert demo.TASKS[task][1:] in " ".join(shown.split())


@pytest.mark.parametrize(
    "line", ["conv --seed 1 --quiet", "--seed 1 conv --quiet", "--quiet --seed=1 conv"]
)
def test_options_may_stand_on_either_side_of_the_task(line):
    options = demo.parse(line.split())
    assert (options.task, options.seed, options.quiet) == ("conv", 1, True)


def test_a_value_may_be_the_name_of_a_task():
    options = demo.parse(["--data", "digits", "--out", "copy.png"])
    assert (options.task, options.data, options.out) == ("digits", "digits", Path("copy.png"))


def test_options_have_or_lack_a_value_in_all_tasks_alike():
    """What stands before the task is read before it is known which options it has."""
    with_value: dict[str, set[bool]] = {}
    for task in TASKS:
        parser = demo.Parser(task, demo.TASKS[task])
        demo.experiment_of(task).add_arguments(parser, task)
        for name, option in parser.options.items():
            with_value.setdefault(name, set()).add(option.nargs == 0)
    assert len(with_value) > 15 and all(len(kinds) == 1 for kinds in with_value.values())


def test_missing_packages_are_named_with_the_remedy(monkeypatch, capsys):
    def without(name: str) -> object:
        return None if name in ("sklearn", "tqdm") else find_spec(name)

    monkeypatch.setattr(demo, "find_spec", without)
    message = " ".join(ends([], capsys)[2].split())
    assert "needs scikit-learn, tqdm: pip install riemann-unn[demo]" in message


def test_the_command_line_loads_without_the_demo_packages(monkeypatch):
    for name in ("sklearn", "tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    # The import below binds another module to this name, which later tests must not find there.
    monkeypatch.setattr("riemann_unn.demo", sys.modules["riemann_unn.demo"])
    for name in [name for name in sys.modules if name.startswith("riemann_unn.demo")]:
        monkeypatch.delitem(sys.modules, name)
    from riemann_unn.demo.__main__ import parse

    assert parse(["conv"]).task == "conv"


# --- what is printed, and when -------------------------------------------------------------------


SMALL = ["adding", "--length", "4", "--hidden", "4", "--epochs", "2"]


def test_the_table_is_printed_before_the_picture_is_drawn(tmp_path, monkeypatch, capsys):
    def full(path: Path, results: object) -> None:
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr("riemann_unn.demo.memory_plots.draw", full)
    assert demo.main([*SMALL, "--quiet", "--out", str(tmp_path / "x.png")]) == 1
    shown = capsys.readouterr()
    assert "orthogonality error" in shown.out and "picture" not in shown.out
    assert shown.err.startswith("error: ") and "x.png" in shown.err


def test_training_that_breaks_off_is_told_without_a_traceback(monkeypatch, capsys):
    def diverge(*_: object, **__: object) -> None:
        raise NonFiniteError("the gradient holds NaN")

    monkeypatch.setattr("riemann_unn.demo.memory.train", diverge)
    assert demo.main(SMALL) == 1
    said = capsys.readouterr().err
    assert "training broke off: the gradient holds NaN" in said and "lower --lr" in said


def test_progress_is_a_line_an_epoch_where_there_is_no_terminal(tmp_path, capsys):
    assert demo.main([*SMALL, "--out", str(tmp_path / "x.png")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("LSTM: loss" in line and "off by" in line for line in lines)
    assert demo.main([*SMALL, "--quiet", "--out", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(4, unit="batch", done=1) as progress:
        progress.begin("epoch 1/1")
        progress.advance("loss 1")
        progress.end("loss 2")
    shown = capsys.readouterr().err
    assert "epoch 1/1" in shown and "2/4" in shown and "loss 2" in shown and "\r" in shown


# --- who imports whom ----------------------------------------------------------------------------


def imports(source: str) -> set[str]:
    """The modules of the demo that a source imports, at any depth of the code."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {node.module.split(".")[0] for node in nodes if node.level == 1 and node.module}


def test_imports_make_no_circle_and_only_main_draws():
    graph = {file.stem: imports(file.read_text(encoding="utf-8")) for file in DEMO.glob("*.py")}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)
    for module, used in graph.items():
        if not module.endswith("plots"):
            assert not any(name.endswith("plots") for name in used), module
    assert imports("def f():\n    from .conv_plots import draw") == {"conv_plots"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
