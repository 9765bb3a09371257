"""The programs of docs/examples run as they stand, in two processes, and by torchrun."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parallel.processes import start

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
    ),
]


LINE = re.compile(r"^step \d+: loss ([\d.]+), error ([\d.e-]+)$", re.MULTILINE)
Run = list[tuple[float, float]]


def work(rank: int, folder: str, port: int, world: int, name: str, arguments: tuple[str]) -> None:
    """One process as torchrun makes it, but for importing torch once more."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in places.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    sys.argv = [name, *arguments]
    with Path(folder, f"{rank}.txt").open("w") as file, redirect_stdout(file):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def forked(folder: Path, name: str, *arguments: str, processes: int = 2) -> str:
    """Run an example in processes that have torch; return what the first one prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start(work, (str(folder), port, processes, name, arguments), processes)
    return (folder / "0.txt").read_text()


def torchrun(folder: Path, name: str, *arguments: str, processes: int = 2) -> str:
    """Run an example by the command that it begins with."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(EXAMPLES / name), *arguments]
    ended = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture(params=[forked, pytest.param(torchrun, marks=pytest.mark.long)])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Run]:
    """Runs an example, and returns the losses and errors that it prints."""

    def call(name: str, *arguments: str, **options: int) -> Run:
        said = request.param(tmp_path, name, *arguments, **options)
        found = LINE.findall(said)
        assert len(found) == 6, said
        return [(float(loss), float(error)) for loss, error in found]

    return call


def test_fsdp2_learns_and_goes_on_with_another_number_of_processes(run, tmp_path):
    first = run("fsdp2.py", str(tmp_path / "saved"))
    assert first[-1][0] < 0.4 * first[0][0]
    second = run("fsdp2.py", str(tmp_path / "saved"), processes=1)
    assert second[0][0] < 0.4 * first[0][0] and second[-1][0] < first[-1][0]
    assert all(error < 5e-7 for _, error in (*first, *second))


def test_ddp_learns(run):
    found = run("ddp.py")
    assert found[-1][0] < 0.6 * found[0][0]
    assert all(error < 5e-7 for _, error in found)
