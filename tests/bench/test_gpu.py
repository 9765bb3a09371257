"""The benchmark of accelerators: it skips elsewhere, and its tables hold numbers. No timing."""

import re
import shutil

import pytest
import torch

from bench import gpu

TINY = gpu.Plan(
    sizes=(8,),
    ranks=(1, 2, 8),
    separate=(3, 4),
    channels=(4,),
    lattice=3,
    drift=((6, 1),),
    drift_steps=20,
    half=(8,),
    seconds=0.001,
    compiled_up_to=0,
)


def test_it_skips_where_there_is_no_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == gpu.main(["--quick"]) == 0
    assert "skipped: there is no CUDA device" in capsys.readouterr().out


def test_its_page_on_the_host(tmp_path, capsys):
    page = tmp_path / "gpu.md"
    shutil.copy(gpu.PAGE, page)
    assert gpu.main([], device="cpu", plan=TINY, page=page) == 0
    text = page.read_text("utf-8")
    head, generated = text.split(gpu.BEGIN)
    assert head == gpu.PAGE.read_text("utf-8").split(gpu.BEGIN)[0]
    assert "Measured on cpu" in generated and generated.count("###") == 5
    for name in ("8: rank 1", "8: rank 2", "ours, separate", "4 channels of 3×3: rank 1"):
        line = next(line for line in generated.splitlines() if line.startswith(f"| {name} |"))
        assert re.search(r"\| [\d.e+-]+ \([\d.e+-]+\) \|", line), line
        assert "no graphs here" in line
    assert "8: rank 8" not in generated  # which leaves nothing out
    drift = next(line for line in generated.splitlines() if line.startswith("| n=6"))
    assert all(float(cell) < 1e-6 for cell in drift.split("|")[2:4])
    gpu.main(["--quick"], device="cpu", plan=TINY, page=tmp_path / "none.md")
    assert not (tmp_path / "none.md").exists()


def test_what_fails_takes_one_cell_alone(capsys):
    def fails():
        raise RuntimeError("it does")

    device = torch.device("cpu")
    assert gpu.timed(fails, "eager", device, 0.0) == "RuntimeError"
    assert "it does" in capsys.readouterr().err
    assert gpu.cell(2.0, 4.0) == "2 (0.5)" and gpu.cell(2.0, "none") == "2"


def test_a_page_without_its_marks_is_refused(tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text("nothing", "utf-8")
    with pytest.raises(SystemExit, match=r"gpu\.md needs one line"):
        gpu.write(page, ["words"])
