"""A context that fails where a number is read from a tensor, and counts what is called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What gives the host a number, a shape that hangs on numbers, or waits for a factorisation.
_READS = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero", "nonzero_static",
    "masked_select", "_unique2", "unique_dim", "unique_consecutive", "_linalg_eigh", "linalg_eig",
    "_linalg_eigvals", "linalg_eigvals", "_linalg_svd", "linalg_qr", "linalg_lstsq", "_linalg_det",
    "_linalg_slogdet", "linalg_matrix_exp", "bincount",
}  # fmt: skip
# Those that go by no operation that is dispatched.
_METHODS = {"tolist", "item", "__bool__", "__float__", "__int__", "__index__"}


class ReadError(AssertionError):
    """A number was read."""


class _Methods(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in _METHODS:
            raise ReadError(function.__name__)
        return function(*args, **(kwargs or {}))


class Unread(TorchDispatchMode):
    """Fails on reads, and counts in ``calls`` what is dispatched, in ``launches`` all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.launches = 0
        self.names: dict[str, int] = {}
        self._methods = _Methods()

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in _READS or (name in ("index", "index_put_") and _has_flags(args[1])):
            raise ReadError(str(function))
        self.calls += 1
        self.launches += not function.is_view
        self.names[name] = self.names.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def _has_flags(indices) -> bool:
    return any(isinstance(index, Tensor) and index.dtype is torch.bool for index in indices)
