"""The rescaling demo: its table, its picture, and the claim that it is there for."""

import pytest
import torch

from riemann_unn.demo import rescale
from riemann_unn.demo.__main__ import main
from tests.support import generator


def test_it_prints_a_table_and_draws_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rescale, "_MODELS", {"MLP": rescale.mlp})
    out, threads = tmp_path / "out.png", torch.get_num_threads()
    assert main(["rescale", "--epochs", "1", "--seeds", "1", "--out", str(out), "--quiet"]) == 0
    assert torch.get_num_threads() == threads and out.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 10 and lines[2].startswith("MLP, default, SGD")
    assert len({len(line) for line in lines[:6]}) == 1
    assert "by at most" in lines[7] and float(lines[7].split()[-2].rstrip(",")) <= 1e-6


@pytest.mark.parametrize("make", [rescale.mlp, rescale.cnn])
def test_bad_scales_leave_the_function(make):
    model, x = make(), torch.randn(3, 8, 8, generator=generator())
    weight, before = next(model.parameters()).detach().clone(), model(x).detach()
    rescale.badly_scale_(model, spread=1.5, seed=0, example=x)
    assert (model(x).detach() - before).norm() <= 1e-4 * before.norm()
    assert (next(model.parameters()) - weight).norm() > weight.norm()


def test_badly_scaled_networks_learn_when_conditioned():
    runs = [
        rescale.Run("MLP", "badly scaled", kind, conditioned, seed=0)
        for kind in ("SGD", "Adam")
        for conditioned in (False, True)
    ]
    data = rescale.Digits().split
    for one in runs:
        rescale._train(one, 3, 1.5, data, lambda: None)
    for without, conditioned in (runs[:2], runs[2:]):
        assert conditioned.epochs <= 2 and conditioned.epochs <= without.epochs / 2
