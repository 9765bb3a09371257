"""Ten faults of one line each, and the tests that catch them: ``python -m tests.mutants``.

Each is put into a copy of the package, where the tests that are named have to fail; on the copy as
it is they have to pass. A mutant that survives is a line that no test holds to anything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        fault: in words.
        file: in which, below riemann_unn.
        old: text that is there once.
        new: what takes its place.
        tests: pytest's names of those that catch it, below tests.
    """

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(
        "a conjugate is dropped",
        "manifolds/matrix.py",
        "m = matrices if n >= p else matrices.mH",
        "m = matrices if n >= p else matrices.mT",
        ("manifolds/test_geometry.py::test_view_is_an_isometry_and_its_inverse_is_exact",),
    ),
    Mutant(
        "a sign",
        "manifolds/base.py",
        "small = small - 0.5 * (right.mH @ left)",
        "small = small + 0.5 * (right.mH @ left)",
        ("manifolds/test_geometry.py::test_transport_is_isometric_tangent_and_reversible",),
    ),
    Mutant(
        "square kernels count as wide",
        "manifolds/conv.py",
        "matrices = matrices if rows >= columns else matrices.mH",
        "matrices = matrices if rows > columns else matrices.mH",
        ("manifolds/test_conv.py",),
    ),
    Mutant(
        "the sign of a threshold",
        "nn/activations.py",
        "return safe.sgn() * torch.relu(safe.abs() + self.bias)",
        "return safe.sgn() * torch.relu(safe.abs() - self.bias)",
        ("nn/test_activations.py::test_modrelu_keeps_the_phase_and_shifts_the_modulus",),
    ),
    Mutant(
        "states one step late",
        "nn/scan.py",
        "later.t(), states[: len(later)]",
        "later.t(), states[len(states) - len(later) :]",
        ("nn/test_scan.py::test_values_and_gradients_are_those_of_the_loop",),
    ),
    Mutant(
        "a rotation that is none",
        "nn/recurrence_init.py",
        "matrix[even, even + 1] = -angles.sin()",
        "matrix[even, even + 1] = angles.sin()",
        ("nn/test_recurrence_init.py::test_initial_recurrences_are_orthogonal",),
    ),
    Mutant(
        "zeros join what they are added to",
        "graph/spaces.py",
        "wanted = (i != ZERO) & (j != ZERO) & (i != j)",
        "wanted = (i != ZERO) & (i != j)",
        ("graph/test_spaces.py::test_zeros_are_in_every_space_at_once",),
    ),
    Mutant(
        "a factor that is not squared",
        "graph/lifting.py",
        'scaled = alpha**2 * (a if kind == "rsub" else b)',
        'scaled = alpha * (a if kind == "rsub" else b)',
        ("graph/test_lifting.py::test_sums_and_products_are_those_of_squares",),
    ),
    Mutant(
        "an exception is forgotten",
        "init/hadamard.py",
        "signs[:, :, 0] *= signs.prod(-1) * (-det if n == 2 else det)",
        "signs[:, :, 0] *= signs.prod(-1) * det",
        ("init/test_hadamard.py",),
    ),
    Mutant(
        "the first entry may be a label",
        "init/calibration.py",
        "sure = max(1, sum(p.default is p.empty for p in places))",
        "sure = sum(p.default is p.empty for p in places)",
        ("init/test_calibration.py::test_every_form_of_data_gives_the_model_its_inputs",),
    ),
]


def copied(folder: Path) -> None:
    """Copy what the tests need, so that they import the copy and nothing else."""
    for name in ("riemann_unn", "tests", "bench"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)


def passes(folder: Path, tests: tuple[str, ...]) -> bool:
    """Run tests of a copy; fail where they do not run at all."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"pytest did not run {tests}:\n{ended.stdout[-2000:]}{ended.stderr}")
    return ended.returncode == 0


def main() -> int:
    """Try all mutants; return how many survive."""
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        every_test = tuple(sorted({test for mutant in MUTANTS for test in mutant.tests}))
        if not passes(folder, every_test):
            print("the tests fail without a mutant", file=sys.stderr)
            return len(MUTANTS)
        for mutant in MUTANTS:
            file = folder / "riemann_unn" / mutant.file
            before = file.read_text()
            file.write_text(before.replace(mutant.old, mutant.new))
            survives = passes(folder, mutant.tests)
            file.write_text(before)
            survivors += survives
            print(f"{'SURVIVED' if survives else 'caught  '} {mutant.file}: {mutant.fault}")
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} caught")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
