"""Autocast is off inside, and as it was afterwards."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg.precision import full_precision, in_full_precision, is_full_precision
from tests.support import gaussian


def product(x):
    return x @ x


def test_a_function_gives_what_it_gives_without_autocast():
    x = gaussian(5, 5, dtype=torch.float32)
    expected = product(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(x).dtype is torch.bfloat16  # the control
        assert torch.equal(in_full_precision(product)(x), expected)
        assert product(x).dtype is torch.bfloat16
    assert torch.equal(in_full_precision(product)(x), expected)


def test_an_error_leaves_autocast_as_it_was():
    def failing():
        assert not torch.is_autocast_enabled("cpu")
        raise KeyError

    for is_on in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            with pytest.raises(KeyError):
                in_full_precision(failing)()
            assert torch.is_autocast_enabled("cpu") == is_on


def test_a_block_is_in_full_precision():
    x = gaussian(3, 3, dtype=torch.float32)
    assert is_full_precision(["cpu"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_full_precision(["cpu"]) and is_full_precision([])
        with full_precision(["cpu"]):
            assert is_full_precision(["cpu"]) and product(x).dtype is torch.float32
        assert product(x).dtype is torch.bfloat16
