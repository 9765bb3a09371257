"""A page with parts between marks, found and replaced."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Page"]


@dataclass(frozen=True)
class Page:
    """A page whose parts stand between marks that name them.

    ``<!-- name -->`` and ``<!-- /name -->`` stand around a part; the first mark of a table also
    says which command makes it, as in ``<!-- name: python -m ... -->``.

    Args:
        text: The page.
        title: What the page is called in an error.
    """

    text: str
    title: str = "README.md"

    def _find(self, name: str) -> re.Match[str]:
        mark = re.escape(name)
        pattern = rf"<!-- {mark}(?:: [^>]*)? -->(?P<part>.*?)<!-- /{mark} -->"
        found = re.search(pattern, self.text, re.DOTALL)
        if found is None:
            raise SystemExit(
                f"error: {self.title} has no <!-- {name} --> with its <!-- /{name} -->"
            )
        return found

    def cell(self, name: str) -> str:
        return self._find(name)["part"].strip("\n")

    def with_cell(self, name: str, words: str) -> Page:
        found = self._find(name)
        part = found["part"]
        around = "\n" * (len(part) - len(part.lstrip("\n")))  # a table has lines of its own
        text = self.text[: found.start("part")] + around + words + around
        return Page(text + self.text[found.end("part") :], self.title)
