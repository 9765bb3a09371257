"""Cells of `bench.distributed`: communication, and the difference from one process."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import riemann_unn as ru
from riemann_unn.parallel import bytes_sent
from tests.parallel.processes import in_processes

STEPS = 40
RANKS: tuple[int | None, ...] = (1, 4, 16, None)
BASES: dict[str, tuple[float, dict[str, Any]]] = {
    "SGD": (0.5, {}),
    "momentum 0.9": (0.1, {"momentum": 0.9}),
    "Adam": (0.01, {"base": torch.optim.Adam}),
}
SHAPES = {"square": (1.0, 1.0), "tall": (1.0, 0.5), "wide": (0.5, 1.0)}
_GIVEN = ("tensors", "input_tensors", "input_tensor", "input", "inputs", "self")


class Collectives(TorchDispatchMode):
    """Counts the bytes that this process sends by collectives of any kind, below all wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_sent = func.namespace in ("c10d", "_c10d_functional")
        if is_sent and not any(word in func.__name__ for word in ("wait", "wrap")):
            for value, declared in zip(args, func._schema.arguments, strict=False):
                if declared.name in _GIVEN:
                    self.calls.append(size_of(value))
        return func(*args, **(kwargs or {}))


def size_of(x: Any) -> int:
    """Return the bytes of a tensor, or of all in a list."""
    if isinstance(x, Tensor):
        return x.numel() * x.element_size()
    return sum(size_of(y) for y in x)


@dataclass(frozen=True)
class Case:
    """One matrix, trained for some steps on several processes."""

    n: int
    shape: str
    dim: int | None  # that is sharded; None for a replica on each process
    rank: int | None
    base: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.n <= 256 else torch.float32

    @property
    def sizes(self) -> tuple[int, int]:
        rows, columns = SHAPES[self.shape]
        return int(self.n * rows), int(self.n * columns)

    @property
    def matrix_bytes(self) -> int:
        rows, columns = self.sizes
        return rows * columns * torch.finfo(self.dtype).bits // 8


@dataclass
class Found:
    """The communication of each step of a case, and the result of training."""

    sent: list[int] = field(default_factory=list)
    collectives: list[int] = field(default_factory=list)
    difference: float = 0.0
    error: float = 0.0
    are_alike: bool = True

    def mean_sent(self) -> float:
        return sum(self.sent) / len(self.sent)

    def mean_collectives(self) -> float:
        return sum(self.collectives) / len(self.collectives)


def cases(sizes: tuple[int, ...], world: int) -> Iterator[Case]:
    """Return all cases, but of the large matrices whole steps of the square ones on two alone."""
    for n in sizes:
        for shape, dim, rank, base in product(SHAPES, (0, 1, None), RANKS, BASES):
            is_long = n > 512 and rank is None and (shape != "square" or world > 2)
            if not is_long and (dim is not None or shape == "square"):
                yield Case(n, shape, dim, rank, base)


def make(p: nn.Parameter, case: Case, **options: Any) -> Any:
    name = "Cayley" if case.rank is None else "ProjUNNT"
    lr, base = BASES[case.base]
    cls: Callable[..., Any] = getattr(ru.optim, name)
    return cls([p], lr=lr, rank=case.rank, **base, **options)


def alone(case: Case, start: Tensor, target: Tensor, steps: int) -> Tensor:
    """Return the result of one process."""
    one = nn.Parameter(start.clone())
    ru.tag_(one, ru.Stiefel())
    optimizer = make(one, case)
    for _ in range(steps):
        one.grad = one.detach() - target
        optimizer.step()
    return one.detach().as_subclass(Tensor)


def train(case: Case, steps: int, known: dict[Case, Tensor]) -> Found:
    """Train towards a random matrix, on all processes and on the first alone, and compare.

    Replicas have a target each, so that a gradient is a process's own and their mean is followed.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    manifold, generator = ru.Stiefel(), torch.Generator().manual_seed(1)
    start, *targets = (
        manifold.random(*case.sizes, dtype=torch.float64, generator=generator)
        .as_subclass(Tensor)
        .to(case.dtype)
        for _ in range(1 + (world if case.dim is None else 1))
    )
    options: dict[str, Any] = {}
    if case.dim is None:
        shared, mine, options = start.clone(), targets[rank], {"process_group": dist.group.WORLD}
    else:
        mesh, placements = init_device_mesh("cpu", (world,)), [Shard(case.dim)]
        shared = distribute_tensor(start.clone(), mesh, placements)
        mine = distribute_tensor(targets[0], mesh, placements)
    many = nn.Parameter(shared)
    ru.tag_(many, manifold)
    optimizer, found = make(many, case, **options), Found()
    for _ in range(steps):
        many.grad = many.detach() - mine
        before = bytes_sent()
        with Collectives() as counted:
            optimizer.step()
        if sum(counted.calls) != bytes_sent() - before:
            raise RuntimeError(f"{case}: {counted.calls} are not all that the step has counted")
        found.sent.append(sum(counted.calls))
        found.collectives.append(len(counted.calls))
    whole = many.detach() if case.dim is None else many.detach().full_tensor()
    whole = whole.as_subclass(Tensor)
    if rank == 0:
        same = replace(case, dim=None if case.dim is None else 0)  # however it is sharded
        if same not in known:
            known[same] = alone(case, start, sum(targets) / len(targets), steps)
        found.difference = float((whole - known[same]).norm() / (known[same] - start).norm())
    found.error = float(ru.orthogonality_error(whole, manifold))
    copies = [torch.empty_like(whole) for _ in range(world)]
    dist.all_gather(copies, whole)
    found.are_alike = all(torch.equal(copy, whole) for copy in copies)
    return found


def ddp_bytes(n: int, *, is_excluded: bool) -> int:
    """Return what DistributedDataParallel gives to its collectives in a backward pass.

    Of a matrix of n × n and a layer after it of n + 1 numbers.
    """
    model = nn.Sequential(nn.Linear(n, n, bias=False), nn.Linear(n, 1))
    nn.init.orthogonal_(model[0].weight)
    ru.tag_(model, {"0.weight": ru.Orthogonal()})
    if is_excluded:
        ru.exclude_from_ddp_(model)
    ddp, sent = DistributedDataParallel(model), []

    def count(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        sent.append(size_of(buffer))
        work = dist.all_reduce(buffer, async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / dist.get_world_size())

    ddp.register_comm_hook(None, count)
    ddp(torch.randn(2, n)).sum().backward()
    return sum(sent)


def _run(rank: int, world: int, todo: list[Case], steps: int) -> dict[Any, Any]:
    warnings.filterwarnings("ignore")
    found: dict[Any, Any] = {}
    known: dict[Case, Tensor] = {}
    for case in tqdm(todo, desc=f"{world} processes", disable=rank > 0):
        found[case] = train(case, steps, known)
    for n in sorted({case.n for case in todo}):
        found["ddp", n] = [ddp_bytes(n, is_excluded=is_excluded) for is_excluded in (False, True)]
    return found


def measure(sizes: tuple[int, ...], worlds: tuple[int, ...]) -> dict[int, dict[Any, Any]]:
    """Return the results by the number of processes, of the process that sends most."""
    results = {}
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            ends = in_processes(world, Path(folder), _run, list(cases(sizes, world)), STEPS)
        results[world] = {key: _worst([end[key] for end in ends]) for key in ends[0]}
    return results


def _worst(found: list[Any]) -> Any:
    first = found[0]
    if isinstance(first, Found):
        most = max(found, key=Found.mean_sent)
        first.sent, first.collectives = most.sent, most.collectives
        first.are_alike = all(one.are_alike for one in found)
        first.error = max(one.error for one in found)
    return first
