"""The demos of convolutions run from the command line, and say what they found."""

import pytest
import torch

from riemann_unn.demo.__main__ import EXPERIMENTS, main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_orthogonal_resnet_beside_an_ordinary_one(tmp_path, capsys):
    picture, state = tmp_path / "conv.png", torch.get_rng_state()
    options = ["--epochs", "1", "--width", "4", "--quiet", "--out", str(picture)]
    assert main(["conv", *options]) == 0
    torch.set_rng_state(state)
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line for line in shown.splitlines() if line}
    assert rows["orthogonal"].count("1 ± ") == 2  # singular values before and after training
    assert " to " in rows["ordinary"] and rows["orthogonal"].rstrip().endswith("real")
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_demo_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--epochs" in shown and EXPERIMENTS[name].split()[0] in shown
    with pytest.raises(SystemExit) as stop:
        main([name, "--out", "no/such/folder/x.png"])
    assert stop.value.code == 2
