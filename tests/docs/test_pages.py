"""The code in the documentation runs as it stands there, and links within it lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import riemann_unn as ru
from tests.support import every

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```python" in page.read_text("utf-8")
]
WITHOUT_TAGS = ("docs/rescaling.md",)


# With no process group torch's checkpoints save in one process, as is meant, and warn that they do.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the files that examples write
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL):
        exec(code, names)
    modules = [m for m in names.values() if isinstance(m, torch.nn.Module)]
    assert modules
    tagged = [m for m in modules if any(ru.manifold_of(p) for p in m.parameters())]
    assert tagged or page in WITHOUT_TAGS
    for module in tagged:
        for name, error in ru.orthogonality_error(module).items():
            assert error < 1e-6, name


TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def dead_links(page: Path) -> list[str]:
    """Files that a page links to, shows or includes, and that are not there."""
    text = re.sub(r"^```(?!{).*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r"\{literalinclude\} (\S+)", text)
    links += [f"{name}.md" for name in re.findall(r"\{doc\}`(?:[^`<]*<)?([\w/]+)>?`", text)]
    local = [link.partition("#")[0] for link in links if "://" not in link]
    return [link for link in local if link and not (page.parent / link).exists()]


@every("page", TEXTS)
def test_links_within_the_documentation_lead_somewhere(page):
    assert not dead_links(page)


def test_a_dead_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[here](page.md#x) [gone](gone.md) {doc}`lost` {doc}`text <other>`")
    assert dead_links(page) == ["gone.md", "lost.md", "other.md"]


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    listed = re.findall(r"^[\w/]+$", index, re.MULTILINE)
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert set(listed) == pages


def test_the_picture_of_the_architecture_is_that_of_the_code():
    drawing = runpy.run_path(str(ROOT / "docs" / "architecture.py"))
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text("utf-8")
    assert picture == drawing["svg"](drawing["reduced"](drawing["imports"]()))
