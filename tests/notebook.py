"""Runs a notebook's code cells in order, without Jupyter.

`.venv/bin/python tests/notebook.py docs/explore.ipynb`, in the clone, writes their outputs into it.
"""

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    """The names that the cells leave; their outputs go into the notebook.

    Parameters replace what the cell tagged `parameters` sets.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(body, []), f"cell {count}", "exec"), names)
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), names) if last else None
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= parameters
        cell["execution_count"], cell["outputs"] = count, _outputs(printed.getvalue(), value, count)
    return names


def _outputs(printed: str, value: Any, count: int) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    if printed:
        out.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    if value is not None:
        forms = {"text/html": "_repr_html_", "image/svg+xml": "_repr_svg_"}
        data = {kind: getattr(value, method)() for kind, method in forms.items() if hasattr(value, method)}
        data = {kind: text.splitlines(keepends=True) for kind, text in data.items()} or {"text/plain": [repr(value)]}
        out.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return out


def write(path: Path, notebook: dict[str, Any]) -> None:
    """As Jupyter writes it."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    file = Path(sys.argv[1])
    sys.path.insert(0, str(Path.cwd()))
    content = json.loads(file.read_text(encoding="utf-8"))
    run(content)
    write(file, content)
