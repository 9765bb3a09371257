"""The table that the initializers' reports print, and their plain values."""

import json
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import riemann_unn as ru
from riemann_unn.init.table import Table, change, plain
from tests.support import gaussian


def test_a_table_is_aligned_and_ruled():
    lines = str(Table([("name", "n"), ("a", "10"), ("longer", "3")], right=[1])).splitlines()
    assert lines == ["name     n", "-" * 10, "a       10", "longer   3"]
    short = str(Table([("name", "n"), ("a", "10")]))
    assert short.splitlines() == ["name  n", "--------", "a     10"]
    with pytest.raises(ValueError, match="zip"):  # a row that lacks a cell
        str(Table([("name", "n"), ("a",)]))


class Cells(HTMLParser):
    """What a browser would show of a table: its cells, and that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.lines: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open:
            self.lines.append(data)


def test_names_are_escaped_in_html():
    rows = [("name", "n"), ("<b>&", "1"), ('a "quoted" one', "2")]
    html = Table(rows, right=[1]).html()
    assert "<b>" not in html and Cells(html).rows == [list(row) for row in rows]
    assert html.count("text-align: right") == 3


def test_every_report_shows_in_a_notebook_what_it_prints():
    for report in reports():
        shown, printed = Cells(report._repr_html_()), str(report)
        assert len(shown.rows) > 1 and len({len(row) for row in shown.rows}) == 1
        for row in shown.rows:
            assert any(all(cell in line for cell in row) for line in printed.splitlines())
        lines = [line for line in printed.splitlines() if line in shown.lines]
        assert lines == shown.lines


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
