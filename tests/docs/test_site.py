"""The documentation builds without a warning, and all of it can be read offline."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("sphinx", "furo", "myst_parser", "sphinx-mathjax-offline")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: the extra docs"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(out / "doctrees"), str(ROOT / "docs"), str(out / "html")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return out / "html"


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        loaded = re.findall(r"<(?:script|img)[^>]+src=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]+rel=\"stylesheet\"[^>]+href=\"([^\"]+)\"", text)
        for source in loaded:
            assert "//" not in source, (page.name, source)
            assert (page.parent / source.partition("?")[0]).exists(), (page.name, source)


def test_pages_with_formulas_load_what_draws_them(site):
    page = (site / "concepts.html").read_text("utf-8")
    assert "math notranslate" in page and "_static/tex-svg.js" in page


def test_the_search_knows_the_words_that_people_look_for(site):
    index = (site / "searchindex.js").read_text("utf-8")
    for word in ("gpu", "lightn", "muon", "checkpoint", "geoopt"):
        assert f'"{word}":' in index or f"{word}:" in index, word
