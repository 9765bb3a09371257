"""The demo's data, its command line, its checkpoints, and that the main job learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from riemann_unn.demo import __main__ as cli
from riemann_unn.demo.models import Learner, lstm_learner, orthogonal_learner
from riemann_unn.demo.tasks import TASKS, Adding, Copy, Digits, Pictures, Task
from riemann_unn.demo.training import CheckpointError, train


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- data --------------------------------------------------------------------------------------


def test_copy_data_is_as_described() -> None:
    task = Copy(delay=30, batch_size=16, batches=2)
    batches = list(task.train_batches(generator()))
    assert len(batches) == task.batches_per_epoch == 2
    inputs, targets = batches[0]
    assert inputs.shape == (50, 16, 10) and targets.shape == (50, 16)
    assert (inputs.sum(-1) == 1).all()
    classes = inputs.argmax(-1)
    assert (classes[:10] >= 1).all() and (classes[:10] <= 8).all()
    assert (classes[39] == 9).all() and (classes == 9).sum() == 16
    assert not classes[10:39].any() and not classes[40:].any()
    assert torch.equal(targets[-10:], classes[:10]) and not targets[:-10].any()
    assert not torch.equal(batches[0][0], batches[1][0])


def test_copy_baseline_is_the_loss_of_guessing_the_symbols() -> None:
    task = Copy(delay=200)
    assert task.baseline == pytest.approx(0.0945, abs=1e-4)
    _, targets = task.test_batch()
    logits = torch.full((*targets.shape, 9), -1e4)
    logits[:-10, :, 0] = 0
    logits[-10:, :, 1:] = 0
    assert task.loss(logits, targets).item() == pytest.approx(task.baseline, rel=1e-5)
    right = torch.nn.functional.one_hot(targets, 9).float()
    assert task.accuracy(right, targets) == 1
    blank = torch.zeros(9)
    blank[0] = 1
    assert task.accuracy(blank.expand(right.shape), targets) == 0


def test_adding_data_and_baseline() -> None:
    task = Adding(length=20, test_size=20_000)
    inputs, targets = task.test_batch()
    numbers, marks = inputs.unbind(-1)
    assert (marks[:10].sum(0) == 1).all() and (marks[10:].sum(0) == 1).all()
    torch.testing.assert_close((numbers * marks).sum(0), targets)
    ones = torch.ones(20_000, 1)
    assert task.loss(ones, targets).item() == pytest.approx(task.baseline, rel=0.05)
    assert task.accuracy(ones, targets) == pytest.approx(0.19, abs=0.01)  # 1 - 0.9^2
    assert task.accuracy(targets.unsqueeze(-1), targets) == 1


def test_digits_split_is_stratified_disjoint_and_scaled() -> None:
    task = Digits()
    train_images, train_classes, test_images, test_classes = task.split
    assert train_images.shape == (1437, 8, 8) and test_images.shape == (360, 8, 8)
    assert train_images.mean().abs() < 1e-5 and abs(train_images.std() - 1) < 1e-3
    assert (test_classes.bincount(minlength=10) - 36).abs().max() <= 2
    assert task.baseline == pytest.approx(math.log(10))
    # Nearest neighbours know held-out digits well, if the images and classes belong together.
    distances = torch.cdist(test_images.flatten(1), train_images.flatten(1))
    assert distances.min() > 0
    assert (train_classes[distances.argmin(1)] == test_classes).double().mean() > 0.95


def test_digits_are_read_row_after_row() -> None:
    task = Digits()
    inputs, classes = task.test_batch()
    assert inputs.shape == (64, 360, 1) and classes.shape == (360,)
    assert torch.equal(inputs[:, 7, 0].view(8, 8), task.split[2][7])


def test_digits_epoch_is_every_image_once_and_some_are_shifted() -> None:
    task = Digits()
    batches = list(task.train_batches(generator(1)))
    assert len(batches) == task.batches_per_epoch
    classes = torch.cat([classes for _, classes in batches])
    order = torch.randperm(1437, generator=generator(1))  # the first draw of the epoch
    assert torch.equal(classes, task.split[1][order])
    images = torch.cat([inputs for inputs, _ in batches], 1)[..., 0].T.view(-1, 8, 8)
    originals = task.split[0][order]
    background = originals.min()
    counts = []
    for axis, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
        shifted = originals.roll(step, axis)
        shifted.select(axis, 0 if step == 1 else 7).fill_(background)
        counts.append((images == shifted).flatten(1).all(1).sum().item())
    counts.append((images == originals).flatten(1).all(1).sum().item())
    assert sum(counts) == 1437
    assert all(100 < count < 190 for count in counts[:4])


def test_digits_validation_leaves_the_test_images_alone() -> None:
    train_images, _, held, _ = Digits(validation=True).split
    assert train_images.shape == (1149, 8, 8) and held.shape == (288, 8, 8)
    tested = Digits().split[2].flatten(1)
    for images in (held.flatten(1), train_images.flatten(1)):
        # Either split has its own scale: compare pixels as they were, from 0 to 16.
        a, b = ((x - x.min()) / (x.max() - x.min()) for x in (images, tested))
        assert torch.cdist(a, b).min() > 1e-3


def test_permuted_digits_are_the_same_pixels_in_another_order() -> None:
    plain, permuted = Digits().test_batch()[0], Digits(order="permuted").test_batch()[0]
    assert not torch.equal(plain, permuted)
    assert torch.equal(plain.sort(0).values, permuted.sort(0).values)
    assert torch.equal(permuted, Digits(order="permuted").test_batch()[0])
    assert not torch.equal(permuted, Digits(order="permuted", seed=1).test_batch()[0])


def test_pictures_are_read_by_pixels_or_by_rows() -> None:
    pixels = Pictures("digits", validation=True)
    rows = Pictures("digits", "rows", validation=True)
    (inputs, classes), (lines, same) = pixels.test_batch(), rows.test_batch()
    assert (pixels.features, rows.features, rows.outputs) == (1, 8, 10)
    assert inputs.shape == (64, 288, 1) and lines.shape == (8, 288, 8)
    assert torch.equal(lines.transpose(0, 1).flatten(1).T, inputs[..., 0])
    assert torch.equal(classes, same)
    batch, _ = next(rows.train_batches(generator()))
    assert batch.shape == (8, rows.batch_size, 8)
    with pytest.raises(ValueError, match="order must be one of pixels, permuted, rows"):
        Pictures("digits", "columns")


@pytest.mark.parametrize("task", [kind() for kind in TASKS], ids=lambda task: task.name)
def test_the_lstm_has_at_least_as_many_parameters_but_hardly_more(task: Task) -> None:
    for complex in (False, True):
        ours = orthogonal_learner(task, hidden=32, rank=1, lr=1e-3, complex=complex)
        theirs = lstm_learner(task, parameters=ours.parameters)
        assert ours.parameters <= theirs.parameters <= 1.15 * ours.parameters


# --- command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["digits", "--complex", "--rank", "2"],
        ["digits", "--permuted", "--validation"],
        ["digits", "--data", "digits", "--order", "rows"],
        ["copy", "--length", "10"],
        ["adding", "--length", "10"],
    ],
    ids=" ".join,
)
def test_every_task_draws_a_picture_and_prints_a_table(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    threads = torch.get_num_threads()
    assert cli.main([*arguments, "--epochs", "1", "--hidden", "8", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    assert out.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    rows = [
        line for line in printed.out.splitlines() if "RNN  " in line or line.startswith("LSTM  ")
    ]
    assert len(rows) == 2 and len(rows[0]) == len(rows[1])
    assert ("unitary RNN" if "--complex" in arguments else "orthogonal RNN") in rows[0]
    assert float(rows[0].split()[-1]) <= 5e-7 and rows[1].split()[-1] == "-"
    assert "parameters" in printed.out and "best without memory" in printed.out
    assert "off by" in printed.err  # the progress bar


def test_the_default_is_digits_into_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--epochs", "1", "--hidden", "4", "--quiet"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["riemann_unn_demo_digits.png"]


# --- checkpoints -------------------------------------------------------------------------------


def learners(task: Task, *, complex: bool = False) -> tuple[Learner, Learner]:
    ours = orthogonal_learner(task, hidden=8, rank=1, lr=1e-3, complex=complex)
    return ours, lstm_learner(task, parameters=ours.parameters)


def numbers(pair: tuple[Learner, Learner]) -> list[object]:
    """Everything a run ends with, but the time it took."""
    result: list[object] = []
    for learner in pair:
        history = learner.history
        result += [history.train_loss, history.test_loss, history.test_accuracy]
        result += [history.orthogonality]
        result += [p.detach().resolve_conj().tolist() for p in learner.model.parameters()]
    return result


@pytest.mark.parametrize(
    "make",
    [
        lambda: (Adding(length=10, batches=5), False),
        lambda: (Copy(delay=5, batches=5, batch_size=8), True),
        lambda: (Digits(), False),
    ],
    ids=["adding", "copy-complex", "digits"],
)
def test_an_interrupted_run_ends_bit_equal(
    make: Callable[[], tuple[Task, bool]], tmp_path: Path
) -> None:
    task, complex = make()
    file = tmp_path / "run.pt"
    whole = learners(task, complex=complex)
    train(task, whole, epochs=3, seed=5, quiet=True)

    class Interrupted(type(task)):  # type: ignore[misc]
        """Stops in the middle of the second epoch."""

        def loss(self, *args: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls > 2 * task.batches_per_epoch + 2 + 3:
                raise KeyboardInterrupt
            return super().loss(*args)

    calls = 0
    broken = Interrupted(**task.__dict__) if not isinstance(task, Digits) else Interrupted()
    with pytest.raises(KeyboardInterrupt):
        train(
            broken, learners(task, complex=complex), epochs=3, seed=5, checkpoint=file, quiet=True
        )
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    torch.manual_seed(99)
    torch.rand(7)
    resumed = learners(task, complex=complex)
    train(task, resumed, epochs=3, seed=5, checkpoint=file, quiet=True)
    assert len(resumed[0].history.test_loss) == 3
    assert numbers(resumed) == numbers(whole)


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.pt"
    common = ["adding", "--length", "10", "--hidden", "4", "--epochs", "1", "--quiet"]
    common += ["--checkpoint", str(file), "--out", str(tmp_path / "x.png")]
    assert cli.main(common) == 0
    before = file.read_bytes()
    assert cli.main([*common, "--rank", "2"]) == 1
    assert "rank: 1 there, 2 now" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert cli.main(common) == 0  # nothing left to do: table and picture again
    file.write_bytes(b"nonsense")
    assert cli.main(common) == 1
    assert "is not a checkpoint of this demo" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        task = Adding(length=10)
        train(task, learners(task), epochs=1, checkpoint=file, quiet=True)


# --- the main job ------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_are_learnt_and_the_recurrence_stays_orthogonal() -> None:
    task = Digits()
    ours = orthogonal_learner(task, hidden=task.hidden, rank=1, lr=task.lr)
    theirs = lstm_learner(task, parameters=ours.parameters)
    train(task, (ours, theirs), epochs=4, quiet=True)
    assert ours.history.test_accuracy[-1] >= 0.88
    assert ours.history.test_accuracy[-1] >= theirs.history.test_accuracy[-1] + 0.1
    assert max(ours.history.orthogonality) <= 5e-7
