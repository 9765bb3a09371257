"""The initializers on common models: what works, how exactly, and how fast.

    make zoo

or, in an environment with torchvision, timm and transformers, ``python bench/zoo.py``; options:
``--only PATTERN`` (a regular expression of ``source/name``; prints and writes nothing),
``--readings`` (also try other ways to read models), ``--out FILE``. No weights are downloaded.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
from zoo_low_rank import MODELS, Thin, thin
from zoo_measure import Row, measure
from zoo_models import catalogue
from zoo_page import PAGE, lines, text_of, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN")
    parser.add_argument("--readings", action="store_true")
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also what was measured")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="write the page from such a file")
    options = parser.parse_args()
    if options.rows:
        kept = json.loads(options.rows.read_text("utf-8"))
        thinned = [Thin(**r) for r in kept["low_rank"]]
        write(options.out, lines([Row(**r) for r in kept["rows"]], thinned))
        return
    torch.set_num_threads(1)
    rows: list[Row] = []
    thinned: list[Thin] = []
    for entry in catalogue():
        path = f"{entry.source}/{entry.name}"
        if options.only and not re.search(options.only, path):
            continue
        if path in MODELS:
            thinned.append(thin(entry))
            print(thinned[-1], flush=True)
        try:
            row = measure(entry, readings=options.readings)
        except Exception as error:  # a row, not the end of the run
            if options.only:
                traceback.print_exc()
            row = Row(entry.source, entry.name, f"{type(error).__name__}: {error}"[:300])
        rows.append(row)
        print(text_of(row), flush=True)
        if options.json:
            kept = {"rows": list(map(asdict, rows)), "low_rank": list(map(asdict, thinned))}
            options.json.write_text(json.dumps(kept, indent=1), "utf-8")
    found = lines(rows, thinned)
    print("\n" + "\n".join(found))
    if not options.only:
        write(options.out, found)
    sys.exit(any(r.fails for r in rows))


if __name__ == "__main__":
    main()
