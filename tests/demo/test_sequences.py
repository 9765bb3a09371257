"""Sequences from CSV files: both forms, what is wrong with a file, and the task made of them."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from riemann_unn.demo import __main__ as cli
from riemann_unn.demo.data import DataError
from riemann_unn.demo.sequences import Sequences, read_sequences

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "own_sequences.py"


def test_a_line_can_be_a_step(tmp_path):
    file = tmp_path / "steps.csv"
    file.write_text("x,sequence,label,y\n1,a,up,2\n3,b,down,4\n5,a,up,6\n\n")
    sequences, labels = read_sequences(file)
    assert labels == ["up", "down"]
    assert [s.tolist() for s in sequences] == [[[1, 2], [5, 6]], [[3, 4]]]


def test_a_line_can_be_a_sequence(tmp_path):
    file = tmp_path / "whole.csv"
    file.write_bytes(b"\xef\xbb\xbflabel,1,2,3\r\nup,1,2,3\r\ndown,4,5,6e-1\r\n")
    sequences, labels = read_sequences(file)
    assert labels == ["up", "down"]
    torch.testing.assert_close(sequences[1], torch.tensor([[4], [5], [0.6]]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs a head line with a column 'label'"),
        ("a,b\n1,2\n", "its first line is 'a,b'"),
        ("label,1\n", "nothing below it"),
        ("label,sequence\nx,1\n", "no column besides 'label' and 'sequence'"),
        ("label,1,2\nx,1,2\ny,3\n", "line 3: 2 values for 3 columns"),
        ("label,1\nx,one\n", "line 2: 'one' is no finite number"),
        ("label,1\nx,nan\n", "line 2: 'nan' is no finite number"),
        ("label,sequence,1\nx,a,1\ny,a,2\n", "line 3: sequence a has label 'y' here and 'x' above"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        read_sequences(file)
    assert str(file) in str(caught.value)


def of_two_labels(file: Path, count: int = 10) -> Path:
    """Sequences of one to three steps and two features."""
    lines = ["sequence,label,x,y"]
    for i in range(2 * count):
        label = "up" if i % 2 else "down"
        lines += [f"{i},{label},{i + step},{-step}" for step in range(1 + i % 3)]
    file.write_text("\n".join(lines))
    return file


def test_the_task_pads_in_front_and_holds_out_a_fifth_of_each_label(tmp_path):
    task = Sequences(of_two_labels(tmp_path / "two.csv"))
    inputs, classes, held, held_classes = task.split
    assert inputs.shape == (3, 16, 2) and held.shape == (3, 4, 2)
    assert (task.features, task.outputs) == (2, 2)
    assert task.baseline == pytest.approx(math.log(2))
    assert classes.bincount().tolist() == [8, 8] and held_classes.bincount().tolist() == [2, 2]
    steps = inputs[inputs.abs().sum(-1) > 0]
    assert steps.mean(0).abs().max() < 1e-6
    torch.testing.assert_close(steps.std(0), torch.ones(2))
    shorter = (inputs[0] == 0).all(-1)
    assert 0 < shorter.sum() < 16 and (inputs[-1] != 0).any(-1).all()
    batches = list(task.train_batches(torch.Generator().manual_seed(0)))
    assert sum(len(targets) for _, targets in batches) == 16
    assert task.batches_per_epoch == len(batches)


def test_too_few_sequences_are_counted(tmp_path):
    with pytest.raises(DataError, match="it has 4 of 'down', 4 of 'up'"):
        _ = Sequences(of_two_labels(tmp_path / "few.csv", 4)).split


def test_the_demo_reads_the_file(tmp_path, capsys):
    file = of_two_labels(tmp_path / "two.csv")
    options = ["--epochs", "1", "--hidden", "4", "--quiet", "--out", str(tmp_path / "x.png")]
    assert cli.main(["sequences", "--data", str(file), *options]) == 0
    assert "16 sequences of 3 steps, 2 labels" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_learns_its_tones(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert int(last.split()[2].rstrip("%")) >= 70
    sequences, labels = read_sequences(tmp_path / "tones.csv")  # the same file suits the demo
    assert len(sequences) == len(labels) == 402
