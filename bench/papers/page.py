"""The page docs/papers.md: a table of claims, then a section for each experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.suite.page import facts, table

from .experiment import PAPERS, Experiment, Report

__all__ = ["write"]

TEXT = """# The papers at their scale
What the five papers behind this package claim, rerun on data that anyone can have. Each row says
what the paper reports, what was run here, and what came out; rows that miss what was asked of them
say so, and their section says what was tried."""


_NAMED = 8  # runs that a page names before it counts the rest


def _left(report: Report) -> list[str]:
    """Say which runs of the plan are not on the page."""
    if not report.missing:
        return []
    names, more = report.missing[:_NAMED], len(report.missing) - _NAMED
    words = "; ".join(names) + (f"; and {more} more" if more > 0 else "")
    return [f"*Not run, so not counted below: {words}.*", ""]


def write(page: Path, reports: Sequence[tuple[Experiment, Report]], how: str, hours: str) -> None:
    """Write the page.

    Args:
        page: File.
        reports: The sections in order.
        how: The command.
        hours: How long all of it took, in words.
    """
    lines = [TEXT, "", f"Measured by `{how}`, {hours}, with {facts()}.", "", "## In short", ""]
    rows = []
    for experiment, report in reports:
        for claim in report.claims:
            met = {None: "", True: "met", False: "**missed**"}[claim.met]
            asked = ": ".join(word for word in (claim.asked, met) if word)
            link = f"[{experiment.name}](#{experiment.name})"
            rows.append([link, claim.claim, claim.theirs, claim.ours, asked])
    lines += table(["", "claim", "theirs", "ours", "asked of ours"], rows)
    for experiment, report in reports:
        lines += ["", f"({experiment.name})=", f"## {experiment.title}"]
        lines += [f"{PAPERS[experiment.paper]}. `{experiment.command}`", "", *_left(report)]
        lines += report.lines
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
