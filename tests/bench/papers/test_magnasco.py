"""The experiment of the lattice: norms that are kept or fall as they should, and what is read."""

from __future__ import annotations

import pytest
import torch

from bench.papers.experiment import Place, Plan
from bench.papers.magnasco import EXPERIMENTS, KERNELS, runs, train_lattice
from riemann_unn.demo.convrnn import _ridge

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def run_of(kernel, **more):
    (run,) = (r for r in runs(Plan("quick", data="digits")) if r.options["kernel"] == kernel)
    return run.name, {**run.options, **more}


def place(tmp_path, tell=lambda share, text: None):
    return Place(tmp_path / "run.pt", tell)


def test_the_exponential_keeps_the_norm_and_the_sigmoid_lets_it_fall_slowly(tmp_path):
    _, options = run_of("norms", steps=400)
    found = train_lattice(options, place(tmp_path))
    assert found["drift"] < 1e-4 and found["returned"] < 1e-3
    norms = found["norms"]["conv_exp(A) and the sigmoid"]
    assert len(norms) == 401
    assert norms[100] / norms[400] == pytest.approx(2, abs=0.2)  # as one over the root of time
    assert found["norms"]["first order, 1 + A"][400] > 100


def test_a_unitary_kernel_remembers_and_the_section_is_made_of_what_is_there(tmp_path):
    few = {"steps": 100, "read": 150, "train_steps": 3, "batch": 500}
    results = {}
    for kernel in ("norms", "unitary", "default"):
        name, options = run_of(kernel, **few)
        results[name] = train_lattice(options, place(tmp_path))
        (tmp_path / "run.pt").unlink(missing_ok=True)
    unitary, default = (results[f"{KERNELS[k]}, seed 0"] for k in ("unitary", "default"))
    assert unitary["marks"] == [0, 10, 50, 100]
    assert max(abs(value - 1) for value in unitary["singular"]) < 1e-5
    assert unitary["explained"][-1] > 0.7 > 0.5 > default["explained"][-1]
    plan = Plan("quick", data="digits")
    found = EXPERIMENTS[0].report(plan, results, tmp_path)
    assert [claim.met for claim in found.claims] == [True, None]
    assert (tmp_path / "papers_lattice.png").read_bytes()[:4] == b"\x89PNG"
    for name in results:
        rest = {other: result for other, result in results.items() if other != name}
        part = EXPERIMENTS[0].report(plan, rest, tmp_path)
        assert len(part.claims) == (2 if name.startswith("default") else 1)
    assert EXPERIMENTS[0].report(plan, {}, tmp_path).claims == []


def test_an_interrupted_training_ends_like_any_other(tmp_path):
    def stop(share, text):
        if text == "epoch 1/2":
            raise InterruptedError

    _, options = run_of("unitary", steps=10, read=50, train_steps=2, batch=500, epochs=2)
    whole = train_lattice(options, place(tmp_path))
    (tmp_path / "run.pt").unlink()
    with pytest.raises(InterruptedError):
        train_lattice(options, place(tmp_path, stop))
    assert train_lattice(options, place(tmp_path)) == whole


def test_a_readout_of_more_features_than_pictures_solves_the_same_problem():
    torch.manual_seed(0)
    x, wanted = torch.randn(40, 20).double(), torch.randn(15, 3).double()
    rows = x - x[:15].mean(0)
    rows = rows / rows[:15].square().mean().sqrt()
    mean = wanted.mean(0)
    penalty = 1e-3 * 15 * torch.eye(20).double()
    gram = rows[:15].mT @ rows[:15] + penalty
    weights = torch.linalg.solve(gram, rows[:15].mT @ (wanted - mean))
    torch.testing.assert_close(_ridge(x, 15, wanted), rows[15:] @ weights + mean)
