"""The sketch of all gradients: who takes the step, who is left out, and that nothing has moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import riemann_unn as ru
from tests.support import gaussian, parameter

SHAPES = [(4, 4), (4, 4), (3, 6)]


def made(**options):
    params = [parameter(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    optimizer = ru.optim.ProjUNNT(params, lr=0.1, **options)
    for i, p in enumerate(params):
        p.grad = gaussian(*p.shape, dtype=torch.float32, seed=i)
    return params, optimizer


def members(found):
    return {id(m.param) for batch in found for m in batch.members}


def ids(*params):
    return set(map(id, params))


@pytest.mark.parametrize("sketch", ["tangent", "lsi"])  # which shows what is not finite, or not
def test_what_is_not_finite_is_left_out_or_refused(sketch):
    params, optimizer = made(nonfinite="skip", sketch=sketch)
    before = [p.detach().clone() for p in params]
    batches, left_out = optimizer._own.sketch_()
    assert members(batches) == ids(*params) and left_out == []
    params[0].grad[1, 1] = torch.nan
    batches, left_out = optimizer._own.sketch_()
    assert members(batches) == ids(*params[1:]) and [m.param for m in left_out] == params[:1]
    params[2].grad.fill_(torch.inf)
    batches, left_out = optimizer._own.sketch_()
    assert members(batches) == ids(params[1]) and len(left_out) == 2
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    params, optimizer = made(sketch=sketch)
    params[2].grad[0, 0] = -torch.inf
    with pytest.raises(ru.NonFiniteError, match="2"):
        optimizer._own.sketch_()


def test_what_was_written_is_checked_or_mended_before_it_is_sketched():
    for way in ("raise", "project"):
        params, optimizer = made(off_manifold=way)
        with torch.no_grad():
            params[1].mul_(1.5)
        if way == "raise":
            with pytest.raises(ru.OffManifoldError):
                optimizer._own.sketch_()
            assert float(ru.orthogonality_error(params[1])) > 1
        else:
            optimizer._own.sketch_()
            assert float(ru.orthogonality_error(params[1])) < 5e-7


def test_without_a_gradient_there_is_no_step_and_plain_sgd_sees_nothing():
    params, optimizer = made()
    params[0].grad = None
    batches, _ = optimizer._own.sketch_()
    assert members(batches) == ids(*params[1:])
    assert optimizer._own.shown(batches) == []
    params, optimizer = made(momentum=0.9)
    batches, _ = optimizer._own.sketch_()
    assert optimizer._own.shown(batches) == batches


def test_a_base_steps_once_and_only_where_devices_allow_it():
    params, optimizer = made(momentum=0.9, capturable=True)
    free = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [free]})
    params[0].grad[0, 0] = torch.nan
    free.grad = torch.ones(2)
    batches, left_out = optimizer._own.sketch_()
    taken = []

    def step():
        taken.append(1)
        with torch.no_grad():
            free.sub_(free.grad)

    optimizer._own.step_base_(step, batches)
    assert taken == [1] and left_out == [] and torch.equal(free, torch.ones(2))
    with pytest.raises(ru.NonFiniteError):
        optimizer._own.synchronize()
