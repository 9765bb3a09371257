"""What a step sends: counted below all wrappers, number for number, and bucketed over matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import riemann_unn as ru
from bench.distributed import BEGIN, END, Report, bound, rounds, write
from bench.distributed_cells import Case, Collectives, Found, ddp_bytes, size_of, train
from riemann_unn.parallel import bytes_sent
from tests.parallel.processes import once_in_processes

STEPS = 3
ASKED = [Case(1024, "square", dim, 4, base) for dim in (0, 1, None) for base in ("SGD", "Adam")]
BROAD = Case(1024, "square", 1, 16, "SGD")
# Up to 256 rows a step applies Ω three times, and numbers are of double precision.
SMALL = [
    Case(96, shape, dim, 2, base)
    for shape in ("square", "tall", "wide")
    for dim in (0, 1)
    for base in ("SGD", "momentum 0.9")
]
WHOLE = [Case(96, "square", dim, None, "Adam") for dim in (0, 1, None)]
COUNT = 10


def bucketed(count: int, dim: int) -> tuple[int, list[list[int]]]:
    """Step so many matrices in one optimizer; return the bytes and what each collective had."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    manifold, params = ru.Stiefel(), []
    for i in range(count):
        shape = ((96, 96), (96, 48), (48, 96))[i % 3]
        x = manifold.random(*shape, dtype=torch.float64).as_subclass(Tensor)
        dist.broadcast(x, 0)
        p = nn.Parameter(distribute_tensor(x, mesh, [Shard(dim)]))
        ru.tag_(p, manifold)
        params.append(p)
    optimizer = ru.optim.ProjUNNT(params, lr=0.1, rank=2, momentum=0.9)
    before, calls = bytes_sent(), []
    for step in range(STEPS):
        for p in params:
            p.grad = torch.sin(p.detach() + step)
        with Collectives() as counted:
            optimizer.step()
        calls.append(counted.calls)
    return bytes_sent() - before, calls


def work(rank: int, world: int) -> dict[Any, Any]:
    known: dict[Case, Tensor] = {}
    found: dict[Any, Any] = {
        case: train(case, STEPS, known) for case in [*ASKED, BROAD, *SMALL, *WHOLE]
    }
    for dim in (0, 1):
        found["bucketed", dim] = {n: bucketed(n, dim) for n in (1, 3, COUNT)}
    for n in (96, 1024):
        found["ddp", n] = [ddp_bytes(n, is_excluded=is_excluded) for is_excluded in (False, True)]
    x = distribute_tensor(torch.zeros(8, 8), init_device_mesh("cpu", (world,)), [Shard(0)])
    with Collectives() as counted:
        x.full_tensor()
        dist.all_reduce(torch.zeros(5))
    found["control"] = counted.calls
    return found


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return once_in_processes(tmp_path_factory, 2, work)


def applications(case: Case, step: int) -> int:
    rows, columns = case.sizes
    return (1 if rows * columns > 512**2 else 3) + (step == 0)


def expected(case: Case, step: int, *, less: int = 0) -> tuple[int, int]:
    """Return the bytes and the collectives of a step of rank k, from the formulas.

    Args:
        case: of which matrix.
        step: the first has no directions to start from.
        less: applications of Ω to leave out.
    """
    assert case.rank is not None
    applies, based = applications(case, step) - less, case.base != "SGD"
    p, n = sorted(case.sizes)
    kp, kn, is_wide = case.rank * p, case.rank * n, p < n
    due = 2 if p > 512 else 4 if p > 64 else 16  # columns that the polish takes in a step
    count = 4  # who has a gradient, and three questions more
    is_tall = case.sizes[0] > case.sizes[1]
    if case.dim is None:
        count, calls = count + (applies + based) * kn, applies + based
    elif case.dim == (1 if is_tall else 0):  # rows of the wide matrix
        count += applies * kn + (2 if is_wide else 1) * due * n
        count += based * (3 if is_wide else 1) * kn
        calls = max(applies, 2 if is_wide else 1) + based * (2 if is_wide else 1)
    else:
        count += applies * (2 * kp + kn) + kp + due * p
        count += based * (kn + (2 * kp if is_wide else 0))
        calls = 2 * applies + 1 + based * (3 if is_wide else 1)
    return count * torch.finfo(case.dtype).bits // 8, calls


@pytest.mark.parametrize("case", [*ASKED, BROAD, *SMALL], ids=str)
def test_a_step_sends_what_the_formulas_say(ends, case):
    for end in ends:
        found: Found = end[case]
        for step, (sent, calls) in enumerate(zip(found.sent, found.collectives, strict=True)):
            assert (sent, calls) == expected(case, step)
            assert sent != expected(case, step, less=1)[0]  # the formulas know an application
            if case.shape == "square":
                assert rounds(case, calls) == applications(case, step) + (case.base != "SGD")
                assert sent <= bound(case, calls)
                # At most two for each round, and one for the move where columns are cut.
                assert calls <= 2 * rounds(case, calls) + (case.dim == 1)
        assert found.are_alike


def test_the_bound_with_an_application_less_fails(ends):
    per_apply, found = 2, ends[0][BROAD]  # collectives
    for sent, calls in zip(found.sent, found.collectives, strict=True):
        assert bound(BROAD, calls - per_apply) < sent <= bound(BROAD, calls)


def test_rank_four_sends_sixty_times_less_than_the_matrix(ends):
    for case in ASKED:
        # Where columns are cut, X v and G v are sums too: 4 k n numbers and not k n.
        least = 60 if case.dim != 1 else 45
        assert all(end[case].sent[-1] * least < case.matrix_bytes for end in ends)
    assert any(end[case].sent[-1] * 60 > case.matrix_bytes for end in ends for case in ASKED)


def test_ten_matrices_need_the_collectives_of_three_kinds(ends):
    for end in ends:
        for dim in (0, 1):
            found = end["bucketed", dim]
            sent, calls = found[COUNT]
            assert [len(step) for step in calls] == [len(step) for step in found[3][1]]
            each = [
                sum(expected(Case(96, shape, dim, 2, "momentum 0.9"), step)[0] for step in range(3))
                for shape in ("square", "tall", "wide")
            ]
            assert sent == sum(map(sum, calls)) == sum(each[i % 3] for i in range(COUNT))
            assert found[1][0] == each[0]
    # Square matrices alone, of the same number of collectives however many: no more than a kind.
    assert len(ends[0]["bucketed", 0][1][1][0]) == expected(SMALL[1], 0)[1]


def test_whole_steps_go_to_an_owner_and_are_not_gathered_by_all(ends):
    for case in WHOLE[:2]:
        matrix = case.matrix_bytes
        # Each gives its half of X, G and what the base wrote; the owner the gradient and X to all.
        few = 4 * 96 * 8 + 100  # columns of the polish, and single numbers
        mine, other = (end[case].sent[-1] for end in ends)
        assert 0 < mine - 3.5 * matrix < few and 0 < other - 1.5 * matrix < few
    (replicas,) = WHOLE[2:]
    assert ends[0][replicas].sent[-1] == replicas.matrix_bytes + 4 * 8
    assert ends[0][replicas].collectives[-1] == 1


def test_replicas_send_k_n_numbers_where_ddp_sends_the_matrix(ends):
    for end in ends:
        for n in (96, 1024):
            plain, excluded = end["ddp", n]
            assert plain - excluded == 4 * n * n and excluded == 4 * (n + 1)
        sent = end[Case(1024, "square", None, 4, "SGD")].sent[-1]
        assert sent == 4 * (4 * 1024 + 4) and 250 * sent < 4 * 1024**2


def test_the_counter_sees_a_gathered_matrix(ends):
    assert all(end["control"] == [4 * 8 * 8 // 2, 4 * 5] for end in ends)
    assert size_of([torch.zeros(3), [torch.zeros(2)]]) == 20


def test_the_page_is_written_from_what_was_found(ends, tmp_path):
    found = {key: value for key, value in ends[0].items() if isinstance(key, Case)}
    found |= {key: ends[0][key] for key in (("ddp", 96), ("ddp", 1024))}
    lines = Report({2: found}).lines()
    rows = [line for line in lines if line.startswith("| square 1024×1024, `Shard(0)`")]
    assert len(rows) == 1 and "KiB in 1" in rows[0]
    assert any(line.startswith("| InfiniBand, 400 Gb/s, 5 µs | 512 |") for line in lines)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", "utf-8")
    write(page, lines)
    text = page.read_text("utf-8")
    assert text.startswith("before") and text.endswith("after\n") and "\nold\n" not in text
    page.write_text("no marks", "utf-8")
    with pytest.raises(SystemExit, match="needs one line"):
        write(page, lines)
