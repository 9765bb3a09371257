"""Imports inside the package point one way, and no file grows past a readable length."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "riemann_unn"
MAX_LINES = 450

# part of the package -> the other parts it may import
ALLOWED = {
    "errors": set(),
    "interruption": set(),
    "scalars": set(),
    "linalg": set(),
    "retractions": {"errors", "linalg", "scalars"},
    "manifolds": {"errors", "linalg", "retractions", "scalars"},
    "parallel": {"errors", "linalg", "manifolds"},
    "tagging": {"errors", "linalg", "retractions", "manifolds"},
    "data_parallel": {"errors", "manifolds", "parallel", "tagging"},
    "diagnostics": {"errors", "linalg", "manifolds", "parallel", "tagging"},
    "monitor": {"errors", "linalg", "manifolds", "parallel", "tagging"},
    "optim": {
        *("errors", "interruption", "linalg", "retractions", "manifolds", "parallel", "tagging"),
        "scalars",
    },
    "graph": {"errors", "interruption"},
    # init.low_rank_ builds the layers of nn; nn never imports init.
    "init": {
        *("errors", "interruption", "linalg", "manifolds", "parallel", "tagging"),
        *("diagnostics", "graph", "nn", "scalars"),
    },
    "nn": {"errors", "linalg", "manifolds", "scalars", "tagging"},
}
ALLOWED["__init__"] = set(ALLOWED)
ALLOWED["demo"] = set(ALLOWED)

RUNTIME = {"torch", "geoopt", "numpy"}
EXTERNAL = {
    "errors": {"torch"},
    "linalg": {"torch"},
    "monitor": RUNTIME | {"matplotlib"},  # for its plot, imported when asked for
    "init": RUNTIME | {"matplotlib", "tqdm"},  # for a report's plot and a progress bar, likewise
    "demo": RUNTIME | {"sklearn", "matplotlib", "tqdm"},
}


def imported_modules(tree: ast.AST, package: list[str]):
    """Every module the source names in an import, absolute, at any depth of the code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base == ["riemann_unn"]:  # `from . import x`: x is a part, or a public name
                for alias in node.names:
                    yield f"riemann_unn.{alias.name if alias.name in ALLOWED else '__init__'}"
            else:
                yield ".".join(base)


def violations(source: str, path: str) -> list[str]:
    """What in ``source``, stored at ``path`` inside the package, breaks the import direction."""
    parts = Path(path).with_suffix("").parts
    part = parts[0]
    found = []
    for name in imported_modules(ast.parse(source), ["riemann_unn", *parts[:-1]]):
        top, *rest = name.split(".")
        if top == "riemann_unn":
            target = rest[0] if rest else "__init__"
            if target != part and target not in ALLOWED.get(part, set()):
                found.append(f"{path}: {part} may not import {name}")
        elif top not in EXTERNAL.get(part, RUNTIME) | sys.stdlib_module_names:
            found.append(f"{path}: {part} may not depend on {top}")
    return found


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_import_direction():
    files = sources(PACKAGE)
    assert files
    found = []
    for file in files:
        path = file.relative_to(PACKAGE)
        part = path.with_suffix("").parts[0]
        if part not in ALLOWED:
            found.append(f"{path}: unknown part, add it to ALLOWED in {Path(__file__).name}")
        found += violations(file.read_text(encoding="utf-8"), path.as_posix())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("linalg/maps.py", "import geoopt"),
        ("linalg/maps.py", "from riemann_unn.manifolds import Stiefel"),
        ("linalg/maps.py", "from ..errors import RankError"),
        ("linalg/maps.py", "def f():\n    from .. import tagging"),
        ("manifolds.py", "import riemann_unn"),
        ("manifolds.py", "from . import Stiefel"),
        ("manifolds.py", "import riemann_unn.tagging as t"),
        ("retractions.py", "from .manifolds import Stiefel"),
        ("optim.py", "from .nn.recurrent import OrthogonalRNN"),
        ("init/warm_start.py", "from ..optim import ProjUNNT"),
        ("nn/recurrent.py", "from .. import init"),
        ("tagging.py", "from .demo.tasks import digits"),
        ("errors.py", "from . import linalg"),
        ("optim.py", "import scipy.linalg"),
    ],
)
def test_violation_is_reported(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "linalg/sketch.py",
            "import math\nimport torch\nfrom .maps import polar\nfrom . import maps",
        ),
        ("linalg/__init__.py", "from .maps import polar"),
        (
            "optim.py",
            "import torch, geoopt\nfrom . import linalg\nfrom .tagging import manifold_of",
        ),
        ("nn/recurrent.py", "from riemann_unn.manifolds import Orthogonal"),
        (
            "demo/__main__.py",
            "import riemann_unn as ru\nfrom tqdm import tqdm\nfrom . import tasks",
        ),
        ("__init__.py", "from . import optim\nfrom .manifolds import Stiefel"),
    ],
)
def test_allowed_import_passes(path, source):
    assert violations(source, path) == []


def test_files_stay_short():
    files = [f for d in ("riemann_unn", "tests", "bench", "docs") for f in sources(ROOT / d)]
    lengths = {
        f.relative_to(ROOT).as_posix(): len(f.read_text("utf-8").splitlines()) for f in files
    }
    too_long = {name: n for name, n in lengths.items() if n > MAX_LINES}
    assert not too_long


def test_the_package_is_imported_where_warnings_are_errors():
    code = "import riemann_unn, torch; riemann_unn.Orthogonal().random(3, 3)"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
