"""The wheel, not the checkout: what is in it, and that it runs with what it asks for, no more."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import riemann_unn as ru

ROOT = Path(__file__).resolve().parent.parent
# What torch imports where it is there, without asking for it: numpy is asked for by ourselves.
NEVER = ("sklearn", "tqdm", "matplotlib", "pytest", "geotorch")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Both distributions, built from a copy of the sources without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def closure(requirements: list[str]) -> set[str]:
    """The distributions that a plain ``pip install`` with these requirements brings along."""
    found: set[str] = set()
    queue = list(requirements)
    while queue:
        requirement = Requirement(queue.pop())
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        wanted = marker is None or any(
            marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
        )
        if wanted and name not in found:
            found.add(name)
            try:
                queue += metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # of another platform, as CUDA's libraries
                found.remove(name)
    return found


def link_(site: Path, distribution: metadata.Distribution) -> None:
    """Put what a distribution has in its site-packages into another one, by links."""
    here = Path(str(distribution.locate_file("")))
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(here / top)


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory):
    """The Python of an environment with the wheel and what its metadata asks for."""
    wheel, _ = built
    place = tmp_path_factory.mktemp("bare")
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    (site,) = place.glob("lib/python*/site-packages")
    (info,) = site.glob("riemann_unn-*.dist-info")
    asked = metadata.PathDistribution(info).requires or []
    for name in closure([line for line in asked if "extra ==" not in line]):
        link_(site, metadata.distribution(name))
    return python


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-I", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def blocks(page: str) -> str:
    text = (ROOT / page).read_text("utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata_file,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        said = wheel.read(metadata_file).decode()
        licences = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    package = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "riemann_unn").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names == package
    assert "riemann_unn/py.typed" in names
    assert f"Version: {ru.__version__}" in said
    assert licences
    assert "## Install" in said  # README is the page of the index


@pytest.mark.slow
def test_the_sources_hold_what_tests_and_documentation_need(built):
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout of git")
    wanted = {
        name
        for name in tracked.stdout.splitlines()
        if not name.startswith(".") and (ROOT / name).exists()
    }
    assert wanted <= names


@pytest.mark.slow
def test_a_bare_environment_has_only_what_the_wheel_asks_for(bare, tmp_path):
    found = f"[name for name in {NEVER} if importlib.util.find_spec(name)]"
    there = run(bare, "-c", f"import importlib.util; print({found})", cwd=tmp_path)
    assert there.stdout.strip() == "[]"
    modules = "riemann_unn.init, riemann_unn.nn, riemann_unn.optim, riemann_unn.linalg"
    code = f"import riemann_unn, {modules}; print(riemann_unn.__file__)"
    where = run(bare, "-W", "error", "-c", code, cwd=tmp_path)
    assert where.returncode == 0, where.stderr
    assert Path(where.stdout.strip()).is_relative_to(bare.parent.parent)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_pages_run_in_a_bare_environment(bare, tmp_path, page):
    (tmp_path / "page.py").write_text(blocks(page))
    done = run(bare, "-W", "error", "page.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_demo_says_what_it_needs(bare, tmp_path):
    done = run(bare, "-m", "riemann_unn.demo", cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install riemann-unn[demo]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_pythons_named_are_those_asked_for():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', text)
    named = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)
    assert oldest and named and min(map(int, named)) >= int(oldest[1])
