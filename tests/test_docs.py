"""The code in the documentation runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

import riemann_unn as ru

ROOT = Path(__file__).resolve().parent.parent
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
