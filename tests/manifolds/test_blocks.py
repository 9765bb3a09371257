"""Blocks: a tensor's matrices are its blocks, and train as they would on their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import riemann_unn as ru
from tests.support import assert_on_manifold, gaussian, generator, rounding

CUTS = [(ru.Orthogonal, 4, (20, 5)), (ru.Stiefel, 3, (9, 7)), (ru.Stiefel, (1, 4), (6, 12))]
CUTS += [(ru.Orthogonal, (2, 3), (8, 12)), (ru.Stiefel, (2, 2), (6, 14))]


def cut(x: Tensor, blocks: int | tuple[int, int]) -> list[Tensor]:
    """The oracle of the view: slices, row of blocks by row of blocks."""
    rows, columns = blocks if isinstance(blocks, tuple) else (blocks, 1)
    return [part for band in x.chunk(rows, 0) for part in band.chunk(columns, 1)]


@pytest.mark.parametrize(("kind", "blocks", "shape"), CUTS)
def test_the_matrices_are_the_slices(kind, blocks, shape):
    x = gaussian(*shape)
    found = kind(blocks=blocks).to_matrices(x).flatten(0, -3)
    for matrix, part in zip(found, cut(x, blocks), strict=True):
        assert torch.equal(matrix, part if part.shape[0] >= part.shape[1] else part.mT)
    errors = kind(blocks=blocks).orthogonality_error(x).flatten()
    wanted = [float(ru.orthogonality_error(part)) for part in cut(x, blocks)]
    assert errors.tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("base", "rank"),
    [
        *((torch.optim.SGD, rank) for rank in (1, 2, None)),
        *((torch.optim.Adam, rank) for rank in (1, 2, None)),
        (torch.optim.LBFGS, None),
    ],
)
@pytest.mark.parametrize(("kind", "blocks", "shape"), CUTS)
def test_training_is_that_of_separate_matrices(kind, blocks, shape, rank, base):
    manifold = kind(blocks=blocks)
    start = manifold.random(*shape, dtype=torch.float64, generator=generator()).as_subclass(Tensor)
    whole = ru.tag_(nn.Parameter(start.clone()), manifold)
    parts = [ru.tag_(nn.Parameter(part.clone()), kind()) for part in cut(start, blocks)]
    one, many = (ru.optim.ProjUNNT(ps, lr=0.1, rank=rank, base=base) for ps in ([whole], parts))
    target = gaussian(*shape, seed=1)

    def loss() -> Tensor:
        one.zero_grad()
        value = ((whole - target) ** 2 / (1 + target**2)).sum()
        value.backward()
        return value

    def loss_of_parts() -> Tensor:
        many.zero_grad()
        pairs = zip(parts, cut(target, blocks), strict=True)
        value = sum(((p - t) ** 2 / (1 + t**2)).sum() for p, t in pairs)
        value.backward()
        return value

    for _ in range(8):
        one.step(loss)
        many.step(loss_of_parts)
    assert_on_manifold(whole)
    assert float((whole.detach() - start).norm()) > 0.1
    for mine, alone in zip(cut(whole.detach(), blocks), parts, strict=True):
        # Adam's division by sizes near zero, and curvatures, enlarge what rounding leaves.
        gap = float((mine - alone.detach()).abs().max())
        assert gap <= rounding(torch.float64, whole.numel(), 1e6)


def test_blocks_are_orthogonal_where_the_whole_is_not():
    whole = ru.Stiefel().random(20, 5, dtype=torch.float64, generator=generator())
    assert_on_manifold(whole.as_subclass(Tensor), ru.Stiefel())  # the negative control
    assert float(ru.orthogonality_error(whole, ru.Orthogonal(blocks=4))) > 0.1


def test_an_lstm_keeps_four_recurrences():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 6, batch_first=True)
    ru.tag_(lstm, {"weight_hh_*": ru.Orthogonal(blocks=4)})
    report = ru.init.warm_start_(lstm)
    assert report["weight_hh_l0"].error_after < 1e-6
    optimizer = ru.optim.ProjUNNT(lstm.parameters(), lr=1e-2, base=torch.optim.Adam)
    monitor = ru.Monitor(optimizer)
    x = gaussian(4, 10, 3, dtype=torch.float32)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        out, _ = lstm(x)
        loss = (out[..., 0] - x[..., 0].tanh()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for gate in lstm.weight_hh_l0.detach().chunk(4):
        assert_on_manifold(gate, ru.Orthogonal())
    (history,) = monitor.history.values()
    assert history[-1]["error"] < 1e-6 and 0 < history[-1]["captured"] <= 1


@pytest.mark.parametrize("method", ["polar", "lie"])
def test_a_warm_start_takes_each_block_to_its_nearest(method):
    w = gaussian(8, 12)
    p = ru.tag_(nn.Parameter(w.clone()), ru.Orthogonal(blocks=(2, 3), det=1))
    ru.init.warm_start_(p, method=method, progress=False)
    for got, part in zip(cut(p.detach(), (2, 3)), cut(w, (2, 3)), strict=True):
        q = ru.tag_(nn.Parameter(part.clone()), ru.Orthogonal(det=1))
        ru.init.warm_start_(q)
        torch.testing.assert_close(got, q.detach(), atol=1e-4, rtol=0)


def test_a_layer_of_blocks_is_matched_to_what_it_computed():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    ru.tag_(model, {"0.weight": ru.Orthogonal(blocks=2)})
    x = gaussian(200, 6, dtype=torch.float32)
    report = ru.init.warm_start_(model, method="procrustes", calibration=x)
    assert report.function_error_after <= report.function_error_before
    assert_on_manifold(model[0].weight)


def test_states_of_blocks_are_not_those_of_other_blocks():
    def trained(blocks: int) -> ru.optim.ProjUNNT:
        manifold = ru.Stiefel(blocks=blocks)
        p = ru.tag_(nn.Parameter(torch.zeros(12, 3)), manifold)
        ru.init.warm_start_(p) if blocks == 1 else p.data.copy_(manifold.origin(12, 3))
        optimizer = ru.optim.ProjUNNT([p], lr=0.1, rank=None, base=torch.optim.Adam)
        p.grad = gaussian(12, 3, dtype=torch.float32)
        optimizer.step()
        return optimizer

    state = trained(4).state_dict()
    trained(4).load_state_dict(state)
    with pytest.raises(ru.errors.StateError, match=r"coordinates of Stiefel\(blocks=4\)"):
        trained(2).load_state_dict(state)


@pytest.mark.parametrize(
    ("manifold", "shape", "words"),
    [
        (ru.Orthogonal(blocks=4), (21, 5), "21 rows, which do not make 4 blocks"),
        (ru.Orthogonal(blocks=(1, 2)), (5, 11), "11 columns, which do not make 2 blocks"),
        (ru.Orthogonal(blocks=4), (20, 6), r"blocks of shape \(5, 6\); square"),
        (ru.Orthogonal(blocks=4), (20,), "square matrices are needed"),
        (ru.Stiefel(flatten=True, blocks=3), (4, 2, 3), "4 rows, which do not make 3 blocks"),
    ],
)
def test_shapes_without_such_blocks_are_refused(manifold, shape, words):
    with pytest.raises(ru.ManifoldError, match=words):
        ru.tag_(nn.Parameter(torch.zeros(shape)), manifold)
