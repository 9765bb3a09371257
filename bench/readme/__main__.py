"""The numbers of README and of the tables beside it: ``python -m bench.readme`` makes them anew.

Every part that a demo, a small command or a page of measurements gives stands between marks that
name it, in README or on a page of ``docs/``. This runs the demos, reads the pages, and puts what
they give between the marks; ``--check`` says what differs and writes nothing. The picture at the
top of README is drawn from the run that fills the row of the digits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
from matplotlib.image import imread

from riemann_unn.demo import memory_plots

from .demos import CELLS, result
from .page import Page
from .pages import DOCS, PAGES
from .tables import TABLES

__all__ = ["differing", "main"]

ROOT = DOCS.parent
README = ROOT / "README.md"
PICTURE = DOCS / "images" / "digits.png"
_VISIBLE = 0.02  # of the range of a colour; a fraction of the pixels may differ by more
_FEW = 1e-3


def differing(one: Path, other: Path) -> float:
    """Share of pixels in which two pictures differ visibly; all if they differ in size."""
    a, b = imread(one)[..., :3], imread(other)[..., :3]
    if a.shape != b.shape:
        return 1.0
    return float((numpy.abs(a - b).max(-1) > _VISIBLE).mean())


def parts() -> dict[str, tuple[Path, Callable[[], str]]]:
    """Each part's page and what makes its words, by its name."""
    found = {name: (README, words) for name, words in {**PAGES, **CELLS}.items()}
    return found | {name: (DOCS / part.page, part.words) for name, part in TABLES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the parts of README and of the pages, or say what differs.

    Args:
        arguments: Of the command line.
    """
    known = parts()
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", choices=known, default=list(known), metavar="NAME")
    which.add_argument(
        "--pages", action="store_true", help="only what pages of docs/ say; nothing is run"
    )
    which.add_argument("--list", action="store_true", help="the names of all parts, and no more")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if any differs"
    )
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(f"{name:20}{page.name}" for name, (page, _) in known.items()))
        return 0
    changed = 0
    for name in PAGES if args.pages else args.only:
        print(f"--- {name}", file=sys.stderr)
        file, make = known[name]
        words = make()
        page = Page(file.read_text(encoding="utf-8"), file.name)  # it may have been edited
        if page.cell(name) != words:
            changed += 1
            print(f"{name}:\n  {file.name} {page.cell(name)}\n  now    {words}", flush=True)
            if not args.check:
                file.write_text(page.with_cell(name, words).text, encoding="utf-8")
        if name == "digits":
            changed += _redrawn(args.check)
    print(f"{changed} parts {'differ' if args.check else 'rewritten'}")
    return 1 if args.check and changed else 0


def _redrawn(check: bool) -> int:
    """Draw README's picture; 1 if it differs from the one that is there."""
    with TemporaryDirectory() as folder:
        drawn = Path(folder) / PICTURE.name
        memory_plots.draw(drawn, result("digits"))
        share = differing(drawn, PICTURE) if PICTURE.exists() else 1.0
        if share <= _FEW:
            return 0
        print(f"{PICTURE.relative_to(ROOT)}: {share:.1%} of its pixels differ")
        if not check:
            PICTURE.write_bytes(drawn.read_bytes())
    return 1


if __name__ == "__main__":
    sys.exit(main())
