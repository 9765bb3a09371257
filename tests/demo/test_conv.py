"""The demos of convolutions run from the command line, and say what they found."""

import pytest
import torch

from riemann_unn.demo.__main__ import main
from riemann_unn.demo.conv_models import ResNet9, lipschitz_net
from riemann_unn.demo.lipschitz import Robustness, attack, robustness
from riemann_unn.demo.plots import spread

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


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("plain", [False, True], ids=["orthogonal", "ordinary"])
def test_the_resnet_takes_images_of_any_size_that_can_be_halved_twice(plain, norm):
    for size in (8, 12):
        net = ResNet9(2, size=size, plain=plain, norm=norm)
        assert net(torch.randn(3, 1, size, size)).shape == (3, 10)
        assert net.head.in_features == 32


def test_a_pattern_is_kept_on_a_lattice(tmp_path, capsys):
    picture = tmp_path / "convrnn.png"
    sizes = ["--epochs", "1", "--channels", "2", "--steps", "40", "--train-steps", "4"]
    assert main(["convrnn", *sizes, "--quiet", "--out", str(picture)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("orthogonal")]
    assert "1 to 1" in rows[0] and rows[1].split()[2] == "100.0%"  # its pixels, all of them
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_certificates_hold_against_an_attack(tmp_path, capsys):
    picture = tmp_path / "lipschitz.png"
    sizes = ["--epochs", "1", "--width", "4", "--attack-steps", "3"]
    assert main(["lipschitz", *sizes, "--quiet", "--out", str(picture)]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("orthogonal"))
    assert float(row.split()[3]) == pytest.approx(1, abs=1e-5) and row.split()[-1] == "0"
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("plain", [False, True], ids=["orthogonal", "ordinary"])
def test_only_orthogonal_layers_never_stretch_distances(plain):
    torch.manual_seed(0)
    model = lipschitz_net(4, plain=plain).eval()
    images, classes = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    nearby = attack(model, images, classes, epsilon=0.5, steps=5)
    pairs = ((images, nearby), (images, torch.rand(20, 1, 8, 8)))
    with torch.no_grad():
        stretch = max(
            float(((model(a) - model(b)).norm(dim=1) / (a - b).flatten(1).norm(dim=1)).max())
            for a, b in pairs
        )
    assert (stretch <= 1 + 1e-5) == (not plain)


def test_a_certificate_from_too_small_a_bound_is_found_out():
    torch.manual_seed(0)
    model = lipschitz_net(4, plain=True).eval()
    images = torch.rand(50, 1, 8, 8)
    classes = model(images).argmax(1)  # right everywhere, with small margins
    held = robustness(model, images, classes, steps=5)
    assert held.violations == 0
    assert Robustness(1.0, held.radii * held.lipschitz * 10, held.attacked).violations > 0


def test_labels_of_near_values_are_spread_in_order():
    heights = spread([98.9, 98.3, 50.0], gap=6)
    assert heights[0] - heights[1] == pytest.approx(6) and heights[1] - heights[2] >= 6
    assert spread([10.0, 90.0], gap=6) == [10, 90] and spread([], gap=6) == []
