"""Where numbers may be read."""

from __future__ import annotations

import pytest
import torch

from riemann_unn.linalg.host import WithoutReading, on_host


def test_numbers_are_read_on_the_host_and_not_where_that_is_ruled_out():
    x = torch.zeros(2)
    assert on_host(x) and not on_host(x.to("meta"))
    with WithoutReading():
        with WithoutReading():
            assert not on_host(x)
        assert not on_host(x)  # the outer one still holds
    assert on_host(x)


def test_an_error_ends_it():
    with pytest.raises(KeyError), WithoutReading():
        raise KeyError
    assert on_host(torch.zeros(2))
