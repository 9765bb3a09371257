"""Steps of sharded parameters are those of one process, wherever the parts lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import riemann_unn as ru
from tests.parallel.processes import once_in_processes

F32, F64, C128 = torch.float32, torch.float64, torch.complex128
ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()


class Moving(torch.optim.SGD):
    """A class of a user's own, which says that it is elementwise."""

    is_elementwise = True


def point(manifold: Any, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = {F32: F64}.get(dtype, dtype)
    drawn = manifold.random(*shape, dtype=wide, generator=generator)
    return drawn.as_subclass(Tensor).to(dtype)


def compare(
    manifold: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mesh_shape: tuple[int, ...],
    placements: list[Any],
    steps: int = 6,
    optimizer: str = "ProjUNNT",
    lr: float = 0.1,
    **options: Any,
) -> dict[str, Any]:
    """Train on one process and on all; return how far they part and how far off they are."""
    mesh = init_device_mesh("cpu", mesh_shape)
    start, target = point(manifold, shape, dtype, 1), point(manifold, shape, dtype, 2)
    one = nn.Parameter(start.clone())
    many = nn.Parameter(distribute_tensor(start.clone(), mesh, placements))
    sharded_target = distribute_tensor(target, mesh, placements)
    ru.tag_(one, manifold)
    ru.tag_(many, manifold)
    make: Callable[..., Any] = getattr(ru.optim, optimizer)
    alone, together = make([one], lr=lr, **options), make([many], lr=lr, **options)
    for _ in range(steps):
        one.grad = one.detach() - target
        many.grad = many.detach() - sharded_target
        alone.step()
        together.step()
    whole = many.detach().full_tensor()
    given = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
    dist.all_gather(given, whole.contiguous())
    told = together.last_step()[many]
    moved = (one.detach() - start).norm()
    return {
        "parted": float((whole - one.detach()).norm() / moved),
        "moved": float(moved),
        "error": float(ru.orthogonality_error(many)),
        "alike": all(torch.equal(x, whole) for x in given),
        "angle": float(told.get("angle", 0.0)),
        "angle_alone": float(alone.last_step()[one].get("angle", 0.0)),
    }


def case(*arguments: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return arguments, options


S, O, U = ru.Stiefel(), ru.Orthogonal(), ru.Unitary()
ADAM, MUON = torch.optim.Adam, torch.optim.Muon
# Each is for two processes, in a mesh (2,) or (1, 2).
TWO = {
    "rows": case(O, (70, 70), F64, (2,), [ROWS]),
    "columns": case(O, (70, 70), F64, (2,), [COLUMNS], rank=3, base=ADAM),
    "replicated": case(O, (70, 70), F64, (2,), [WHOLE], rank=3, base=ADAM),
    "replicated whole": case(O, (70, 70), F64, (2,), [WHOLE], optimizer="Expm"),
    "uneven": case(O, (71, 71), F64, (2,), [ROWS], rank=2, base=ADAM),
    "one row, none at the other": case(S, (1, 9), F64, (2,), [ROWS]),
    "tall rows": case(S, (90, 71), F64, (2,), [ROWS], rank=2, base=ADAM, optimizer="ProjUNND"),
    "tall columns": case(S, (90, 71), F64, (2,), [COLUMNS], rank=2, momentum=0.9),
    "wide rows": case(S, (71, 90), F64, (2,), [ROWS], rank=2, momentum=0.9),
    "wide columns": case(S, (71, 90), F64, (2,), [COLUMNS], rank=2, base=ADAM, optimizer="Cayley"),
    "unitary": case(U, (33, 33), C128, (2,), [ROWS], rank=2, base=ADAM),
    "complex tall": case(S, (40, 33), C128, (2,), [COLUMNS], rank=2),
    "whole": case(O, (70, 70), F64, (2,), [ROWS], optimizer="Expm", base=ADAM),
    "whole thin": case(S, (70, 20), F64, (2,), [ROWS], optimizer="Cayley", momentum=0.9),
    "whole complex": case(U, (30, 30), C128, (2,), [COLUMNS], optimizer="Expm"),
    "svd": case(O, (30, 30), F64, (2,), [ROWS], rank=2, sketch="svd"),
    "lsi": case(O, (30, 30), F64, (2,), [ROWS], rank=2, sketch="lsi", base=ADAM),
    "stack over matrices": case(O, (5, 70, 70), F64, (2,), [ROWS], rank=2, base=ADAM),
    "stack over rows": case(S, (3, 60, 70), F64, (2,), [COLUMNS], rank=2, momentum=0.9),
    "stack whole": case(S, (3, 30, 20), F64, (2,), [ROWS], optimizer="Expm", base=ADAM),
    "flatten": case(ru.Stiefel(flatten=True), (70, 16, 3, 3), F64, (2,), [ROWS], rank=2),
    "flatten columns": case(
        ru.Stiefel(flatten=True), (70, 16, 3, 3), F64, (2,), [COLUMNS], rank=2, base=ADAM
    ),
    "convolution": case(ru.OrthogonalConv(2), (12, 12, 4, 4), F64, (2,), [ROWS], rank=2),
    "convolution, momentum": case(
        ru.OrthogonalConv(1), (12, 9, 6), F64, (2,), [COLUMNS], rank=2, momentum=0.9
    ),
    "unitary convolution": case(ru.UnitaryConv(1), (12, 12, 5), C128, (2,), [ROWS], base=ADAM),
    "blocks by rows": case(ru.Orthogonal(blocks=4), (120, 30), F64, (2,), [ROWS], base=ADAM),
    "blocks by columns": case(ru.Orthogonal(blocks=3), (90, 30), F64, (2,), [COLUMNS], rank=2),
    "blocks of columns": case(ru.Stiefel(blocks=(1, 2)), (60, 50), F64, (2,), [COLUMNS], rank=2),
    "blocks both ways": case(
        ru.Stiefel(blocks=(2, 3)), (40, 90), F64, (2,), [ROWS], rank=2, momentum=0.9
    ),
    "stack of blocks": case(ru.Orthogonal(blocks=3), (4, 60, 20), F64, (2,), [ROWS], rank=2),
    "blocks of columns, Muon": case(
        ru.Stiefel(blocks=(1, 2)), (60, 50), F64, (2,), [ROWS], rank=2, base=MUON
    ),
    "blocks of rows, whole": case(
        ru.Stiefel(blocks=2), (60, 20), F64, (2,), [ROWS], optimizer="Expm", base=ADAM
    ),
    "blocks of a flattened kernel": case(
        ru.Stiefel(flatten=True, blocks=2), (60, 16, 3, 3), F64, (2,), [ROWS], rank=2
    ),
    "Rprop": case(O, (70, 70), F64, (2,), [ROWS], rank=2, base=torch.optim.Rprop),
    "own class": case(O, (70, 70), F64, (2,), [ROWS], rank=2, base=Moving, momentum=0.5),
    "Muon": case(O, (70, 70), F64, (2,), [ROWS], rank=2, base=MUON),
    "Muon whole": case(S, (70, 40), F64, (2,), [COLUMNS], optimizer="Expm", base=MUON),
    "max_angle": case(O, (70, 70), F64, (2,), [ROWS], rank=2, max_angle=0.01),
    "own φ": case(O, (70, 70), F64, (2,), [ROWS], optimizer="ManifoldOptimizer", phi=torch.sin),
    "mesh of two dimensions": case(O, (70, 70), F64, (1, 2), [WHOLE, ROWS], rank=2, base=ADAM),
    "single": case(O, (600, 600), F32, (2,), [ROWS], rank=4, momentum=0.9),
}  # fmt: skip
OWNED = {
    "one row, none at the other",
    "whole thin",
    "blocks of rows, whole",
    "svd",
    "lsi",
    "stack whole",
    "Muon whole",
}
FOUR = {
    "rows": case(O, (70, 70), F64, (4,), [ROWS], rank=2, base=ADAM),
    "columns": case(O, (70, 70), F64, (4,), [COLUMNS], rank=2),
    "hybrid": case(O, (70, 70), F64, (2, 2), [WHOLE, ROWS], rank=2, base=ADAM),
    "hybrid columns": case(S, (70, 90), F64, (2, 2), [COLUMNS, WHOLE], rank=2, momentum=0.9),
    "hybrid whole": case(O, (70, 70), F64, (2, 2), [WHOLE, ROWS], optimizer="Expm", base=ADAM),
    "rows and columns": case(O, (70, 70), F64, (2, 2), [ROWS, COLUMNS], rank=2, base=ADAM),
    "rows and columns, wide": case(S, (60, 71), F64, (2, 2), [COLUMNS, ROWS], rank=2),
    "rows of rows": case(O, (71, 71), F64, (2, 2), [ROWS, ROWS], rank=2, base=ADAM),
    "blocks replicated": case(ru.Orthogonal(blocks=2), (80, 40), F64, (4,), [WHOLE], rank=2),
    "blocks and columns": case(
        ru.Orthogonal(blocks=2), (80, 40), F64, (2, 2), [ROWS, COLUMNS], rank=2, base=ADAM
    ),
    "three rows of four": case(S, (3, 20), F64, (4,), [ROWS], momentum=0.9),
    "stack over matrices and rows": case(O, (3, 40, 40), F64, (2, 2), [ROWS, COLUMNS], rank=2),
    "Muon": case(O, (70, 70), F64, (2, 2), [WHOLE, ROWS], rank=2, base=MUON),
}


def run_all(rank: int, world: int, names: list[str]) -> dict[str, dict[str, Any]]:
    cases = TWO if world == 2 else FOUR
    found = {}
    for name in names:
        try:
            found[name] = compare(*cases[name][0], **cases[name][1])
        except Exception as error:
            raise RuntimeError(f"in the case {name!r}") from error
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[Any]]:
    ends = {}
    for world, cases in ((2, TWO), (4, FOUR)):
        ranks = once_in_processes(tmp_path_factory, world, run_all, list(cases))
        ends |= {(world, name): [end[name] for end in ranks] for name in cases}
    return ends


@pytest.mark.parametrize(
    ("world", "name"), [*((2, name) for name in TWO), *((4, name) for name in FOUR)]
)
def test_steps_are_those_of_one_process(found, world, name):
    cases = TWO if world == 2 else FOUR
    is_single = cases[name][0][2] is F32
    for end in found[world, name]:
        assert end["moved"] > 0.03
        assert end["parted"] <= (1e-5 if is_single else 1e-11), end
        assert end["error"] <= (5e-7 if is_single else 1e-14), end
        assert end["alike"]
        # What goes to an owner is told of by nobody.
        alone = 0.0 if name in OWNED else end["angle_alone"]
        assert end["angle"] == pytest.approx(alone, rel=1e-4, abs=1e-12)
