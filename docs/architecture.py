"""Draw docs/images/architecture.svg: the packages and who imports whom.

    python docs/architecture.py

The arrows are those of the code: a package imports what its arrow points at. What follows from
other arrows is left out.
"""

import ast
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "riemann_unn"
W, H = 150, 46
# Column and row of each box, in units; foundations below.
PLACES = {
    "linalg": (1.5, 4),
    "retractions": (0, 3),
    "manifolds": (1.5, 3),
    "graph": (3.7, 3),
    "parallel": (1, 2),
    "tagging": (2, 2),
    "nn": (3, 2),
    "optim": (0.5, 1),
    "diagnostics": (2, 1),
    "init": (3.3, 1),
    "demo": (2, 0),
}
# Modules drawn with another, or left out because everything uses them.
WITH = {"monitor": "diagnostics", "data_parallel": "diagnostics"}


def imports() -> set[tuple[str, str]]:
    """Return who imports whom, among the boxes."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        user = WITH.get(parts[0], parts[0])
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import) and node.names[0].name == "riemann_unn":
                names = ["optim", "init", "diagnostics"]  # all that is public
            elif not isinstance(node, ast.ImportFrom):
                continue
            elif node.level:
                base = parts[: len(parts) - node.level]
                path = [*base, *(node.module or "").split(".")]
                names = [path[0]] if path[0] else [alias.name for alias in node.names]
            elif (node.module or "").startswith("riemann_unn"):
                names = (node.module or "").split(".")[1:2] or [a.name for a in node.names]
            else:
                continue
            for name in names:
                used = WITH.get(name, name)
                if user in PLACES and used in PLACES and used != user:
                    found.add((user, used))
    return found


def reduced(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Leave out arrows that follow from others."""

    def reaches(start: str, end: str, without: tuple[str, str]) -> bool:
        todo, seen = [start], set()
        while todo:
            here = todo.pop()
            for user, used in edges - {without}:
                if user == here and used not in seen:
                    seen.add(used)
                    todo.append(used)
        return end in seen

    return {edge for edge in edges if not reaches(*edge, edge)}


def centre(name: str) -> tuple[float, float]:
    column, row = PLACES[name]
    return 20 + W / 2 + column * (W + 30), 20 + H / 2 + row * (H + 44)


def svg(edges: set[tuple[str, str]]) -> str:
    width, height = 40 + 4 * (W + 30) + W, 40 + 5 * H + 4 * 44
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="15">',
        '<defs><marker id="a" markerWidth="9" markerHeight="9" refX="8" refY="4.5" orient="auto">'
        '<path d="M0,0 L9,4.5 L0,9 z" fill="#567"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for user, used in sorted(edges):
        (x0, y0), (x1, y1) = centre(user), centre(used)
        if y0 == y1:
            side = W / 2 if x1 > x0 else -W / 2
            x0, x1 = x0 + side, x1 - side
        else:
            y0, y1 = y0 + H / 2, y1 - H / 2
        lines.append(
            f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="#567" '
            'stroke-width="1.5" marker-end="url(#a)"/>'
        )
    for name in PLACES:
        x, y = centre(name)
        text = "diagnostics, monitor" if name == "diagnostics" else name
        lines.append(
            f'<rect x="{x - W / 2:g}" y="{y - H / 2:g}" width="{W}" height="{H}" rx="8" '
            'fill="#eef3fa" stroke="#456"/>'
            f'<text x="{x:g}" y="{y + 5:g}" text-anchor="middle" fill="#123">{text}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (DOCS / "images" / "architecture.svg").write_text(svg(reduced(imports())), "utf-8")
