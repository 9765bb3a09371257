"""Where numbers may be read."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg.value_branches import WithoutReading, may_branch_on


def test_numbers_are_read_on_the_host_and_not_where_that_is_ruled_out():
    x = torch.zeros(2)
    assert may_branch_on(x) and not may_branch_on(x.to("meta"))
    with WithoutReading():
        with WithoutReading():
            assert not may_branch_on(x)
        assert not may_branch_on(x)  # the outer one still holds
    assert may_branch_on(x)


def test_an_error_ends_it():
    with pytest.raises(KeyError), WithoutReading():
        raise KeyError
    assert may_branch_on(torch.zeros(2))
