"""The table that the initializers' reports print, and their plain values."""

import json

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.init.table import change, plain, table

from .support import gaussian


def test_a_table_is_aligned_and_ruled():
    lines = table([("name", "n"), ("a", "10"), ("longer", "3")], right=[1])
    assert lines == ["name     n", "-" * 10, "a       10", "longer   3"]
    assert table([("name", "n"), ("a", "10")]) == ["name  n", "--------", "a     10"]
    with pytest.raises(ValueError, match="zip"):  # a row that lacks a cell
        table([("name", "n"), ("a",)])


def test_a_change_is_two_numbers_or_a_dash():
    assert change((0.5, 0.25), ".2f") == "0.50 -> 0.25"
    assert change(None, ".2f") == change((0.5, None), ".2f") == "-"


def reports():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    yield ru.init.path_condition_(net)
    yield ru.init.low_rank_(net, rank=2, layers="0")
    yield ru.init.warm_start_(ru.tag_(net, {"2.weight": ru.Orthogonal()}))


def test_every_report_prints_a_table_and_has_plain_values():
    for report in reports():
        rules = [line for line in str(report).splitlines() if line and not line.strip("-")]
        assert len(rules) == 1
        values = report.as_dict()
        assert json.loads(json.dumps(values)).keys() == values.keys()


def test_plain_values_leave_private_ones_out_and_copy_tensors():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    report = ru.init.path_condition_(net, gaussian(3, 4))
    values = report.as_dict()
    assert "_original" not in values and values["objective_after"] == report.objective_after
    assert values["scales"]["0.bias"] == report.scales["0.bias"].tolist()
    assert plain({"a": (1, torch.ones(2))}) == {"a": [1, [1.0, 1.0]]}
