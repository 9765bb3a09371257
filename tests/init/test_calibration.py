"""Calibration data: one grammar and one rule for labels, in every initializer that takes it."""

import copy
from collections import UserDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import riemann_unn as ru
from riemann_unn.init.calibration import Batch, batches_of, cannot_run, examples, split
from tests.init.warm_start.nets import assert_same_state, seeded, state_of
from tests.support import gaussian

X = gaussian(20, 6)
Y = torch.arange(20) % 3


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def body(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x if return_features else self.body(x)


class Two(One):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.body(a - 2 * b)


class Optional(One):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.body(x if mask is None else x * mask)


class Labelled(One):
    def forward(self, x=None, labels=None, *, scale=1.0):
        out = self.body(x) * scale
        return {"logits": out, "loss": None if labels is None else F.cross_entropy(out, labels)}


class Many(One):
    def forward(self, *parts, **options):
        return self.body(sum(parts) + sum(options.values()))


class Whole(One):
    def forward(self, batch):
        return self.body(batch["x"])


def net(kind: type[One] = One) -> One:
    return ru.tag_(seeded(kind), {"first.weight": ru.Orthogonal()})


def loader(*tensors: Tensor, size: int = 5) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size=size)


Named = namedtuple("Named", "x y")
INPUTS = {
    "tensor": (One, X),
    "tuple": (One, (X,)),
    "dict": (One, {"x": X}),
    "mapping": (One, UserDict(x=X)),
    "list of tensors": (One, list(X.split(5))),
    "generator": (One, (x for x in X.split(5))),
    "list of dicts": (One, [{"x": x} for x in X.split(5)]),
    "loader of (x,)": (One, loader(X)),
    "loader of (x, y)": (One, loader(X, Y)),
    "list of (x, y)": (One, list(zip(X.split(5), Y.split(5), strict=True))),
    "list of named tuples": (One, [Named(X, Y)]),
    "(x, y)": (One, (X, Y)),
    "dict with labels": (One, {"x": X, "labels": Y}),
    "dict with a target": (One, [{"x": X, "target": Y}]),
    "two inputs": (Two, (3 * X, X)),
    "two inputs and labels": (Two, (3 * X, X, Y)),
    "loader of two inputs": (Two, loader(3 * X, X)),
    "loader of two inputs and labels": (Two, loader(3 * X, X, Y)),
    "two inputs by name": (Two, {"b": X, "a": 3 * X}),
    "optional input by name": (Optional, {"x": X, "mask": torch.ones(6).double()}),
    "optional input left out": (Optional, [(X,)]),
    "labels by place": (Labelled, loader(X, Y)),
    "labels by name": (Labelled, {"x": X, "labels": Y}),
    "any inputs": (Many, (0.25 * X, 0.75 * X)),
    "any keywords": (Many, {"u": 0.25 * X, "v": 0.75 * X}),
    "a dict for the model": (Whole, ({"x": X},)),
    "compiled": (lambda: torch.compile(One(), backend="eager"), (X, Y)),
    "wrapped": (lambda: nn.DataParallel(One()), loader(X, Y)),
}


@pytest.mark.parametrize(("kind", "calibration"), INPUTS.values(), ids=INPUTS)
def test_every_form_of_data_gives_the_model_its_inputs(kind, calibration):
    model = seeded(kind)
    outputs = []
    for batch in batches_of(calibration, model):
        out = batch(model)
        outputs.append(out["logits"] if isinstance(out, dict) else out)
    assert torch.allclose(torch.cat(outputs), seeded(One)(X))


PASSES = {
    "warm_start_": lambda m, **kw: ru.init.warm_start_(m, method="procrustes", **kw),
    "low_rank_": lambda m, **kw: ru.init.low_rank_(
        m, rank=2, layers="second", activation="relu", **kw
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_both_passes_take_the_same_data(name):
    want = None
    named = ({"x": x, "label": 0} for x in X.split(5))
    forms = [loader(X), loader(X, Y), list(X.split(5)), named]
    for calibration in forms:
        m = net()
        PASSES[name](m, calibration=calibration)
        got = m(X)
        want = got if want is None else want
        assert torch.allclose(got, want)
    m, by_forward = net(), [{"image": x, "y": None} for x in X.split(5)]
    PASSES[name](m, calibration=by_forward, forward=lambda model, batch: model(batch["image"]))
    assert torch.allclose(m(X), want)


@pytest.mark.parametrize("name", PASSES)
def test_forward_is_given_batches_as_they_are(name):
    seen = []

    def forward(model, batch):
        seen.append(batch)
        batch.clear() if isinstance(batch, dict) else None
        return model(X)

    calibration = ["text", {"odd": 1}, (1, 2), [3]]
    PASSES[name](net(), calibration=calibration, forward=forward)
    assert "text" in seen and (1, 2) in seen and [3] in seen
    assert calibration[1] == {"odd": 1}  # a copy was given


BAD = {
    "number": (One, 3, TypeError, "calibration is a int; give a tensor.*forward="),
    "text": (One, "text", TypeError, "calibration is a str"),
    "array": (One, X.numpy(), TypeError, "batch 0 is a ndarray; give a tensor"),
    "list of numbers": (One, [X, 3], TypeError, "batch 1 is a int"),
    "empty list": (One, [], ValueError, "calibration is empty"),
    "spent generator": (One, iter(()), ValueError, "a generator is read once"),
    "no example": (One, [X, X[:0]], ValueError, "batch 1 is empty"),
    "empty tuple": (One, (), ValueError, "batch 0 is empty"),
    "labels alone": (One, {"labels": Y}, ValueError, "batch 0 is empty"),
    "NaN": (One, [X, X / 0], ValueError, r"batch 1 holds NaN or infinity \(torch.float64 of shape"),
    "sparse NaN": (One, (X / 0).to_sparse(), ValueError, "holds NaN or infinity"),
    "meta": (One, X.to("meta"), ValueError, "on the meta device, where tensors have no values"),
    "unknown name": (One, {"x": X, "mask": X}, ValueError, "has 'mask', and the .* takes 'x'"),
    "dict for the model": (Whole, {"x": X}, ValueError, r"is given it in a tuple, \(batch,\)"),
    "optional or labels": (
        Optional,
        loader(X, Y),
        ValueError,
        r"entry 1 of calibration batch 0 may be labels, or the optional input 'mask'.*"
        r"give a dict, \{'x': ..., 'mask': ...\}.*forward=lambda",
    ),
    "integers": (One, X.long(), ValueError, r"torch.int64 and the model torch.float64: .*\.double"),
    "wrong precision": (One, X.float(), ValueError, r"torch.float32 .* as \.double\(\)"),
    "shape": (One, X[:, :4], ValueError, r"batch 0: RuntimeError.*shape \(20, 4\).* not changed"),
    "a loader's batch": (One, [X, Y], ValueError, "a tuple is one batch, a list is several"),
    "too few": (Two, (X,), ValueError, "batch 0: TypeError: .*missing 1 required.*'b'"),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(("kind", "calibration", "error", "match"), BAD.values(), ids=BAD)
def test_bad_data_is_named_and_the_model_stays(name, kind, calibration, error, match):
    m = net(kind)
    before = state_of(m)
    with pytest.raises(error, match=match):
        PASSES[name](m, calibration=calibration)
    assert_same_state(m, before)
    assert all(child.training for child in m.modules())


@pytest.mark.parametrize("name", PASSES)
def test_bad_forward(name):
    m = net()
    before = state_of(m)
    with pytest.raises(ValueError, match=r"batches, which are missing"):
        ru.init.warm_start_(m, forward=lambda model, batch: model(batch))
    with pytest.raises(TypeError, match=r"forward= is a function .*got 3"):
        PASSES[name](m, calibration=X, forward=3)
    with pytest.raises(ValueError, match=r"KeyError: 'y'. .* run by forward="):
        PASSES[name](m, calibration=[{"x": X}], forward=lambda model, batch: model(batch["y"]))
    with pytest.raises(ValueError, match=r"holds? NaN|NaN or infinity"):  # seen where it arrives
        PASSES[name](m, calibration=[X / 0], forward=lambda model, batch: model(batch))
    assert_same_state(m, before)
    with pytest.raises(ValueError, match="returns no floating point tensor"):
        ru.init.warm_start_(m, calibration=[X], forward=lambda model, batch: None)


def test_remedies_name_device_and_layout():
    model = net()
    batch = Batch((X.to("meta"),), {}, number=2)
    message = str(cannot_run(RuntimeError("no"), batch, model))
    assert "batch 2" in message and "on meta and the model on cpu: move one" in message
    assert ".to('cpu')" in message
    sparse = str(cannot_run(RuntimeError("no"), Batch((X.to_sparse(),), {}), model))
    assert "torch.sparse_coo" in sparse and ".to_dense()" in sparse
    dense = str(cannot_run(RuntimeError("no"), Batch((X,), {}), model))  # a control
    assert "move one" not in dense and "to_dense" not in dense and ".double()" not in dense
    indices = RuntimeError("Expected tensor for argument #1 'indices' to have scalar types: Long")
    assert ".long()" in str(cannot_run(indices, Batch((X,), {}), model))


def test_integers_are_right_for_an_embedding():
    m = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    ru.tag_(m, {"1.weight": ru.Orthogonal()})
    ru.init.warm_start_(copy.deepcopy(m), calibration=loader(torch.randint(6, (20, 4)), Y))
    with pytest.raises(ValueError, match=r"an embedding takes integers: \.long\(\)"):
        ru.init.low_rank_(m, rank=1, layers="3", calibration=torch.rand(20, 4))


def test_examples_are_counted_where_tensors_share_them():
    def count(*args, forward=None, **kwargs):
        return examples(Batch(args, kwargs, forward))

    assert count(X) == count(X, Y) == count(x=X, y=Y, n=3, none=None) == 20
    assert count((X, Y), forward=print) == count({"x": X}, forward=print) == 20
    assert count(X, torch.tensor(2.0)) == 20
    assert count(X, X[:5]) is None  # of different lengths
    assert count([X[0], X[1]]) is None  # a list of images, whose first dimension is another
    assert count({"text": ["a"] * 20, "y": Y}, forward=print) is None
    assert count(X.to_sparse()) is None and count("text", forward=print) is None


def test_one_in_five_is_held_out():
    one = split([Batch((X,), {"mask": Y, "k": 2})])
    rest = torch.arange(20) % 5 == 4
    assert torch.equal(one.held_out[0].args[0], X[rest]) and one.held_out[0].kwargs["k"] == 2
    assert torch.equal(one.fit[0].kwargs["mask"], Y[~rest])
    several = [Batch((x,), {}) for x in X]
    assert split(several).held_out == several[4::5] and len(split(several).fit) == 16
    assert split(several[:3]).held_out == several[2:3]  # at least one of several
    for whole in ([Batch((X[:4],), {})], [Batch((X, X[:3]), {})]):
        assert split(whole) == (whole, [])
    passed = split([Batch((Named(X, Y),), {}, print)])
    assert passed.held_out == []  # a class of its own is not taken apart


class Graph(nn.Module):
    """Its first dimension is that of nodes, which see one another."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x, adjacency):
        return self.last(F.relu(self.first(adjacency @ x)))


def test_what_cannot_be_held_out_is_fitted_to_whole():
    m = seeded(Graph)
    adjacency = (gaussian(20, 20) > 1).double()
    report = ru.init.low_rank_(m, rank=2, layers="first", calibration=(X, adjacency))
    assert report["first"].held_out is None
    tuples = ru.init.low_rank_(seeded(Two), rank=1, calibration=(X, X))  # a control
    assert all(layer.held_out is not None for layer in tuples.values())
