"""The low-rank demo runs from the command line, and says what it found."""

import pytest
import torch

from riemann_unn.demo.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_compression_and_training_from_scratch(tmp_path, capsys, monkeypatch):
    for module in ("lowrank", "lowrank_plots"):
        monkeypatch.setattr(f"riemann_unn.demo.{module}.RANKS", (8, 4))
    picture, state = tmp_path / "lowrank.png", torch.get_rng_state()
    options = ["--seeds", "1", "--epochs", "1", "--rank", "3", "--quiet", "--out", str(picture)]
    assert main(["lowrank", *options]) == 0
    torch.set_rng_state(state)
    shown = capsys.readouterr().out
    compressed, trained = shown.split("Both hidden layers")
    rows = {line[:22].strip(): line for line in compressed.splitlines()}
    # Error of the layer's function at both ranks.
    errors = {
        name: [float(part.split(")")[0]) for part in rows[name].split("(")[1:]]
        for name in ("spectral", "linear, calibrated", "function, calibrated")
    }
    pairs = zip(errors["function, calibrated"], errors["spectral"], strict=True)
    assert all(chosen < spectral for chosen, spectral in pairs)
    for start in ("random", "spectral", "function"):
        assert f"{start}, plain" in trained and f"{start}, orthonormal" in trained
    assert picture.read_bytes()[:4] == b"\x89PNG"
