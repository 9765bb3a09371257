"""The programs of docs/examples run as they stand, in two processes that torchrun starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
    ),
]


def torchrun(name: str, *arguments: str, processes: int = 2) -> list[tuple[float, float]]:
    """Run an example; return the losses and errors that it prints."""
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
    found = re.findall(r"^step \d+: loss ([\d.]+), error ([\d.e-]+)$", ended.stdout, re.MULTILINE)
    assert len(found) == 6, ended.stdout
    return [(float(loss), float(error)) for loss, error in found]


def test_fsdp2_learns_and_goes_on_with_another_number_of_processes(tmp_path):
    first = torchrun("fsdp2.py", str(tmp_path / "saved"))
    assert first[-1][0] < 0.4 * first[0][0]
    second = torchrun("fsdp2.py", str(tmp_path / "saved"), processes=1)
    assert second[0][0] < 0.4 * first[0][0] and second[-1][0] < first[-1][0]
    assert all(error < 5e-7 for _, error in (*first, *second))


def test_ddp_learns():
    found = torchrun("ddp.py")
    assert found[-1][0] < 0.6 * found[0][0]
    assert all(error < 5e-7 for _, error in found)
