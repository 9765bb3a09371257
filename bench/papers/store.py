"""Results as files, one for each run, so that a run that was done is not done again."""

from __future__ import annotations

import json
import os
import re
import zlib
from pathlib import Path

from .experiment import Experiment, Options, Result, Run

__all__ = ["Store"]


class Store:
    """A folder of results.

    Args:
        folder: Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoint(self, experiment: Experiment, run: Run) -> Path:
        """File of a run's state, another one for other options."""
        code = zlib.crc32(json.dumps(run.options, sort_keys=True).encode())
        return self.path(experiment, run, f".{code:08x}.pt")

    def path(self, experiment: Experiment, run: Run, suffix: str = ".json") -> Path:
        """File of a run's result, or one beside it with another suffix."""
        word = re.sub(r"[^a-z0-9.]+", "-", run.name.lower()).strip("-")
        path = self.folder / experiment.name / f"{word}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def find(self, experiment: Experiment, run: Run) -> Result | None:
        """The stored result of a run with exactly these options, with its ``seconds``."""
        path = self.path(experiment, run)
        if not path.exists():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["options"] != _plain(run.options):
            return None
        result: Result = stored["result"]
        return result

    def put(self, experiment: Experiment, run: Run, result: Result) -> None:
        """Store a result atomically, and remove its checkpoint."""
        path = self.path(experiment, run)
        part = path.with_suffix(".part")
        stored = {"run": run.name, "options": run.options, "result": result}
        part.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
        self.checkpoint(experiment, run).unlink(missing_ok=True)


def _plain(options: Options) -> Options:
    """As they come back from a file: tuples become lists."""
    plain: Options = json.loads(json.dumps(options))
    return plain
