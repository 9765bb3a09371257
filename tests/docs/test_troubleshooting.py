"""docs/troubleshooting.md explains every error and warning that the package can give."""

from __future__ import annotations

import ast
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch

import riemann_unn as ru

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
# In a table of the page the first cell is a message, with … for what varies.
ROWS = re.findall(r"^\| (?:\*\*warning\*\* )?`(.+?)` \|", PAGE, re.MULTILINE)
BUILT_IN = ("ValueError", "TypeError", "RuntimeError", "FloatingPointError")
# The command line of the demo explains itself.
FILES = [f for f in (ROOT / "riemann_unn").rglob("*.py") if "demo" not in f.parts]


def template(node: ast.expr) -> str | None:
    """Return a message with … for what is filled in, or None for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
        return re.sub("…+", "…", "".join(map(str, parts)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{template(node.left) or '…'}{template(node.right) or '…'}"
    return None


def messages(tree: ast.AST) -> Iterator[str]:
    """Find texts that become an exception or a warning, and why a parameter fits no manifold."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in (*BUILT_IN, *ru.errors.__all__, "_UnreadableError", "warn"):
                text = template(node.args[0])
                if text is not None:
                    yield text
        elif isinstance(node, ast.FunctionDef) and node.name == "why_not":
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    text = template(inner.value)
                    if text is not None:
                        yield text


def fits(row: str, message: str) -> bool:
    if not all(part in message for part in row.split("…")):  # much faster, and mostly enough
        return False
    return re.search(".*".join(map(re.escape, row.split("…"))), message, re.DOTALL) is not None


def trees() -> list[ast.AST]:
    return [ast.parse(file.read_text("utf-8")) for file in FILES]


def found() -> set[str]:
    """Every message of the package, but those that are put together from other texts."""
    return {m for tree in trees() for m in messages(tree) if re.search(r"[a-z]{3}", m)}


def test_every_message_is_on_the_page():
    missing = sorted(m for m in found() if not any(fits(row, m) for row in ROWS))
    assert not missing, "\n".join(["not in docs/troubleshooting.md:", *missing])


def test_every_row_is_of_a_message():
    assert len(found()) > 150
    nodes = (node for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.expr))
    texts = {text for node in nodes if (text := template(node)) is not None}
    stale = [row for row in ROWS if not any(fits(row, m) for m in texts)]
    assert not stale, "\n".join(["no such message any more:", *stale])


def test_a_message_that_is_not_there_is_noticed():
    tree = ast.parse('raise ManifoldError(f"{name} is too green; paint it")')
    (message,) = messages(tree)
    assert message == "… is too green; paint it"
    assert not any(fits(row, message) for row in ROWS)


def test_every_exception_is_on_the_page():
    assert all(f"~riemann_unn.errors.{name}`" in PAGE for name in ru.errors.__all__)


def torch_says() -> Iterator[tuple[str, Exception]]:
    """What torch raises for a tagged layer, by the name of what was done with it."""
    for done in ("Parameter", "weight_norm", "load"):
        layer = ru.tag_(torch.nn.Linear(4, 4), {"weight": ru.Orthogonal()})
        try:
            if done == "Parameter":
                torch.nn.Parameter(layer.weight)
            elif done == "weight_norm":
                torch.nn.utils.parametrizations.weight_norm(layer)
            else:
                torch.save(layer, file := io.BytesIO())
                file.seek(0)
                torch.load(file, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            yield done, error


def test_what_torch_says_of_tagged_layers_is_on_the_page():
    rows = re.findall(r"^\| torch: `(.+?)` \|", PAGE, re.MULTILINE)
    raised = dict(torch_says())
    assert set(raised) == {"Parameter", "weight_norm", "load"}  # else it works now: drop its row
    for done, error in raised.items():
        assert any(str(error).startswith(row) for row in rows), done


def test_the_remedies_for_what_torch_says_work():
    layer = ru.tag_(torch.nn.Linear(4, 4), {"weight": ru.Orthogonal()})
    plain = torch.nn.Parameter(layer.weight.detach())
    assert ru.manifold_of(plain) is None
    assert plain.data_ptr() == layer.weight.data_ptr()
    torch.save(layer.state_dict(), file := io.BytesIO())
    file.seek(0)
    layer.load_state_dict(torch.load(file, weights_only=True))
    assert ru.manifold_of(layer.weight) == ru.Orthogonal()
    ru.untag_(layer.weight)
    torch.nn.utils.parametrizations.weight_norm(layer)
    assert layer(torch.ones(2, 4)).shape == (2, 4)
