"""Every task of the demo goes on from its checkpoint to the numbers of an unbroken run."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from riemann_unn.demo import __main__ as demo
from riemann_unn.demo import checkpoint, lowrank, rescale, training, warmstart
from riemann_unn.demo.checkpoint import CheckpointError, Parts
from riemann_unn.demo.tasks import Pictures
from tests.demo.nets import small_nets

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

COMMANDS = {
    "digits": "--hidden 4 --epochs 3",
    "copy": "--hidden 4 --epochs 2 --length 3",
    "adding": "--hidden 4 --epochs 2 --length 4 --rank 2",
    "sequences": "--hidden 4 --epochs 2 --data two.csv",
    "conv": "--width 2 --epochs 2",
    "convrnn": "--channels 1 --steps 20 --train-steps 3 --epochs 2",
    "lipschitz": "--width 2 --attack-steps 2 --epochs 2",
    "warmstart": "--epochs 1",
    "rescale": "--epochs 1 --seeds 1 --seed 3",
    "lowrank": "--epochs 1 --seeds 2 --rank 2",
}


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Epochs of three batches, few and small nets, no clock, in a folder of its own."""
    batches = Pictures.train_batches
    monkeypatch.setattr(Pictures, "train_batches", lambda self, g: islice(batches(self, g), 3))
    monkeypatch.setattr(Pictures, "batches_per_epoch", 3)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(rescale, "_MODELS", {"MLP": rescale.mlp})
    monkeypatch.setattr(lowrank, "RANKS", (8,))
    monkeypatch.setattr("riemann_unn.demo.lowrank_plots.RANKS", (8,))
    monkeypatch.setattr(warmstart, "NETS", small_nets())
    monkeypatch.chdir(tmp_path)
    rows = [f"{'ud'[i % 2]},{i},{-i}" for i in range(24)]
    Path("two.csv").write_text("\n".join(["label,1,2", *rows]), encoding="utf-8")
    with torch.random.fork_rng():
        yield


@pytest.fixture
def saves(monkeypatch):
    """A list that grows by each save; a number put into it is the save that Ctrl-C comes after."""
    count: list[str] = []
    stop_at: list[int] = []

    def wrapped(path: Path, *arguments: object) -> None:
        checkpoint_save(path, *arguments)
        count.append(path.name)
        if len(count) in stop_at:
            raise KeyboardInterrupt

    checkpoint_save: Callable[..., None] = checkpoint.save
    for module in (checkpoint, training):
        monkeypatch.setattr(module, "save", wrapped)
    return count, stop_at


SLOW = ("conv", "lipschitz", "warmstart", "lowrank")


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=[pytest.mark.slow] * (task in SLOW)) for task in COMMANDS],
)
def test_an_interrupted_task_ends_with_the_same_table(task, short, saves, capsys):
    count, stop_at = saves
    command = [task, *COMMANDS[task].split(), "--quiet"]
    kept = [*command, "--checkpoint", "run.pt"]
    assert demo.main(command) == 0
    whole = capsys.readouterr().out
    stop_at.append(1)
    assert demo.main(kept) == 130
    shown = capsys.readouterr()
    assert f"  python -m riemann_unn.demo {' '.join(kept)}" in shown.err
    assert "Traceback" not in shown.err and "picture" not in shown.out
    before = len(count)
    torch.manual_seed(99)
    assert demo.main(kept) == 0
    assert capsys.readouterr().out == whole and len(whole.splitlines()) > 4
    parts = {"digits": 3, "rescale": 8}.get(task, 2)
    assert len(count) - before == parts - 1  # the first was not done again
    assert not list(Path().glob("*.part"))
    assert demo.main(kept) == 0  # nothing is left to do
    assert capsys.readouterr().out == whole and len(count) - before == parts - 1


def test_the_numbers_come_from_the_checkpoint(short, capsys):
    """The control of the test above: another number in the file is another one in the table."""
    command = ["rescale", *COMMANDS["rescale"].split(), "--quiet", "--checkpoint", "run.pt"]
    assert demo.main(command) == 0
    whole = capsys.readouterr().out
    state = torch.load("run.pt", weights_only=True)
    next(iter(state["parts"].values()))["accuracy"][-1] = 0.123
    torch.save(state, "run.pt")
    assert demo.main(command) == 0
    assert capsys.readouterr().out != whole


@pytest.mark.parametrize("task", COMMANDS)
def test_a_checkpoint_of_other_settings_is_refused(task, short, saves, capsys):
    _, stop_at = saves
    stop_at.append(1)
    command = [task, *COMMANDS[task].split(), "--quiet", "--checkpoint", "run.pt"]
    assert demo.main(command) == 130
    before = Path("run.pt").read_bytes()
    capsys.readouterr()
    assert demo.main([*command, "--seed", "7"]) == 1
    said = capsys.readouterr().err
    assert "was made with other settings" in said and "7 now" in said
    other = "adding" if task != "adding" else "conv"
    more = ["--length", "4", "--hidden", "4"] if other == "adding" else ["--width", "2"]
    assert demo.main([other, *more, "--quiet", "--checkpoint", "run.pt"]) == 1
    assert "task: " in capsys.readouterr().err
    assert Path("run.pt").read_bytes() == before


def test_a_changed_file_is_refused(short, saves, capsys):
    """The same name with other numbers; the same file written again goes on."""
    _, stop_at = saves
    stop_at.append(1)
    command = ["sequences", *COMMANDS["sequences"].split(), "--quiet", "--checkpoint", "run.pt"]
    assert demo.main(command) == 130
    text, before = Path("two.csv").read_bytes(), Path("run.pt").read_bytes()
    Path("two.csv").write_bytes(text.replace(b"3,-3", b"3,-4"))
    capsys.readouterr()
    assert demo.main(command) == 1
    said = capsys.readouterr().err
    assert re.search(
        r"other settings \(contents of two.csv: sha256 \w+ there, sha256 \w+ now\)", said
    )
    assert Path("run.pt").read_bytes() == before
    Path("two.csv").write_bytes(text)
    assert demo.main(command) == 0


def test_more_epochs_go_on_where_the_rates_allow_it(short, capsys):
    """Those of digits fall by a factor an epoch; those of conv along a cosine over all epochs."""
    digits = ["digits", "--hidden", "4", "--quiet", "--checkpoint", "digits.pt"]
    assert demo.main([*digits, "--epochs", "1"]) == 0
    assert demo.main([*digits, "--epochs", "2"]) == 0
    conv = ["conv", "--width", "2", "--quiet", "--checkpoint", "conv.pt"]
    assert demo.main([*conv, "--epochs", "1"]) == 0
    assert demo.main([*conv, "--epochs", "2"]) == 1
    assert "epochs: 1 there, 2 now" in capsys.readouterr().err


def test_ctrl_c_without_a_checkpoint_says_what_would_have_kept_it(short, monkeypatch, capsys):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("riemann_unn.demo.memory.train", stop)
    assert demo.main(["digits", "--hidden", "4", "--quiet"]) == 130
    assert "with --checkpoint FILE" in capsys.readouterr().err
    assert demo.main(["digits", "--hidden", "4", "--quiet", "--checkpoint", "run.pt"]) == 130
    assert "before there was anything to keep in run.pt" in capsys.readouterr().err


def test_parts_are_refused_where_the_file_is_of_something_else(tmp_path):
    file = tmp_path / "x.pt"
    checkpoint.save(file, {"task": "a"}, {"epoch": 1})
    with pytest.raises(CheckpointError, match="checkpoint of something else"):
        Parts(file, {"task": "a"})
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is not a checkpoint of this demo"):
        Parts(file, {"task": "a"})


@pytest.mark.slow
def test_a_signal_ends_the_process_with_130(tmp_path):
    file = tmp_path / "run.pt"
    command = [sys.executable, "-m", "riemann_unn.demo", "adding", "--length", "5", "--hidden", "4"]
    command += ["--epochs", "100000", "--checkpoint", str(file), "--out", str(tmp_path / "x.png")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Jobs in the background of a shell ignore it, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        limit = time.monotonic() + 120
        while not file.exists() and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in said and f"--checkpoint {file}" in said.splitlines()[-1]
