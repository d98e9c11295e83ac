"""The rules of the house that no linter has, held against every file; `make check` runs them too.

Lengths and repeats are counted in the packages, the benchmarks and (lengths alone) the tests. Docstrings are those
of the four packages: of public classes, functions and methods, nested ones left out. Links are those of the Markdown
files.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "evaluate", "train", "harvest")
FILE_LINES, FUNCTION_LINES, REPEATED_LINES = 400, 80, 10
SHAPED_NAME = re.compile(r"[a-z]\w*_([A-Z]{1,4})\d?$")  # acts_BD
SHAPE = re.compile(r"\([^()]*(,|\b\d)[^()]*\)|\b0-d\b|[Ss]hape")  # (rows, d_in), (N,), 0-d, "shapes as in `SAE`"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> dict[Path, str]:
    """Python files below folders of the clone, and their text."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert paths
    return {path.relative_to(ROOT): path.read_text() for path in paths}


def too_long(files: dict[Path, str]) -> list[str]:
    """Files and functions of too many lines; a function begins at its decorators."""
    found = []
    for path, text in files.items():
        lines = len(text.splitlines())
        if lines > FILE_LINES:
            found.append(f"{path}: {lines} lines; {FILE_LINES} at most")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                lines = (node.end_lineno or first) - first + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{path}:{first}: {node.name} has {lines} lines; {FUNCTION_LINES} at most")
    return found


def code_lines(text: str) -> list[tuple[int, str]]:
    """Number and content of the lines that hold code: no imports, docstrings, signatures, comments, lone brackets."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, Function):
            left_out.update(range(node.lineno, node.body[0].lineno))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = ((number, re.sub(r"\s+#.*", "", line.strip())) for number, line in enumerate(text.splitlines(), 1))
    return [(n, line) for n, line in lines if n not in left_out and re.search(r"\w", line) and line[0] != "#"]


def repeated(files: dict[Path, str]) -> list[str]:
    """Places where more than REPEATED_LINES lines of code stand that stand elsewhere too."""
    windows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, text in files.items():
        lines = code_lines(text)
        for first in range(len(lines) - REPEATED_LINES):
            window = lines[first : first + REPEATED_LINES + 1]
            windows[tuple(line for _, line in window)].append(f"{path}:{window[0][0]}")
    return [f"{' and '.join(places)}: the same code" for places in windows.values() if len(places) > 1]


@cache
def classes() -> dict[str, ast.ClassDef]:
    """Classes of the packages by name: a method's docstring may stand in the class that it fulfils."""
    trees = map(ast.parse, sources(*PACKAGES).values())
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def inherited(owner: ast.ClassDef | None, name: str) -> str:
    """Docstring of a method in the first base that has one, with the base's own."""
    for base in owner.bases if owner else ():
        above = classes().get(base.id) if isinstance(base, ast.Name) else None
        for node in above.body if above else ():
            if isinstance(node, Function) and node.name == name and ast.get_docstring(node):
                return f"{ast.get_docstring(node)} {ast.get_docstring(above) if above else ''}"
    return ""


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """What a function does itself: not its nested functions."""
    todo = list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            todo += ast.iter_child_nodes(node)


def raises(function: Function) -> bool:
    """Whether it makes an error of its own (`raise Error(...)`); what it calls may raise more."""
    return any(isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) for node in own_nodes(function))


def is_command(function: Function) -> bool:
    """A command of the command line: its docstring is the help that a user reads."""
    return any(re.search(r"\bcommand\(", ast.unparse(decorator)) for decorator in function.decorator_list)


def shapeless(function: Function, doc: str) -> list[str]:
    """Arrays and tensors that come or go, and whose shape neither their name nor the docstring tells."""
    if SHAPE.search(doc):
        return []
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    typed = [(a.arg, a.annotation) for a in arguments if not SHAPED_NAME.search(a.arg)] + [("result", function.returns)]
    return [name for name, type_ in typed if type_ and re.search(r"\b(Tensor|ndarray)\b", ast.unparse(type_))]


def undocumented(text: str) -> list[str]:
    """What a docstring of a file lacks: itself, the errors, the shapes."""
    found = []

    def look(body: list[ast.stmt], owner: ast.ClassDef | None) -> None:
        for node in body:
            if not isinstance(node, Function | ast.ClassDef) or (node.name.startswith("_") and node.name != "__init__"):
                continue
            name = f"line {node.lineno}: {f'{owner.name}.' if owner else ''}{node.name}"
            doc = ast.get_docstring(node) or inherited(owner, node.name)
            if not doc and node.name != "__init__":
                found.append(f"{name}: has no docstring")
            elif isinstance(node, ast.ClassDef):
                look(node.body, node)
            else:
                whole = f"{doc} {(owner and ast.get_docstring(owner)) or ''}"
                if raises(node) and not is_command(node) and not re.search(r"\b[Rr]aises?\b", whole):
                    found.append(f"{name}: raises, and its docstring does not say so")
                if names := shapeless(node, whole):
                    found.append(f"{name}: of which shape are: {', '.join(names)}?")

    tree = ast.parse(text)
    look(tree.body, None)
    return found + unexplained(tree)


def unexplained(tree: ast.Module) -> list[str]:
    """Letters in names as acts_BD that the module's legend does not have."""
    named = {
        node.id if isinstance(node, ast.Name) else node.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.arg)
    }
    legend = (ast.get_docstring(tree) or "").partition("Shape suffixes:")[2]
    used = {letter: name for name in sorted(named) if (shape := SHAPED_NAME.search(name)) for letter in shape[1]}
    return [
        f"{name}: 'Shape suffixes:' atop the module lacks {letter}"
        for letter, name in used.items()
        if not re.search(rf"\b{letter}\b", legend)
    ]


def dead_links(folder: Path) -> list[str]:
    """Links of the Markdown files, to files that are not there or to headings that no file has."""
    found = []
    for path in (*folder.glob("*.md"), *folder.glob("docs/*.md"), *folder.glob("benchmarks/*.md")):
        for name, _, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(#?)([^)\s]*)\)", path.read_text()):
            target = (path.parent / name).resolve() if name else path
            if not target.exists() or (heading and heading not in headings(target)):
                found.append(f"{path.relative_to(folder)}: {name}#{heading}")
    return found


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives a Markdown file's headings."""
    lines = (line.lstrip("# ") for line in path.read_text().splitlines() if re.match("#+ ", line))
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_links():
    assert dead_links(ROOT) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/b.md").write_text("# `make it` (here, 2026)\n")
    good = "[a](docs/b.md#make-it-here-2026), [b](docs), [c](#one) and [d](https://x.org/#y)"
    (tmp_path / "a.md").write_text(f"# One\n{good}, [e](docs/c.md), [f](docs/b.md#make)\n")
    assert dead_links(tmp_path) == ["a.md: docs/c.md#", "a.md: docs/b.md#make"]


def test_lengths():
    assert too_long(sources(*PACKAGES, "benchmarks", "tests")) == []


def test_repeats():
    assert repeated(sources(*PACKAGES, "benchmarks")) == []


def test_docstrings():
    files = sources(*PACKAGES)
    assert [f"{path}: {line}" for path, text in files.items() for line in undocumented(text)] == []


LINES = "\n".join(f"a{i} = call_{i}(b, c)  # {{}}" for i in range(11))


@pytest.mark.parametrize(
    ("texts", "count"),
    [
        (["x = 1\n" * 401], 1),
        (["def f():\n" + "    x = 1\n" * 80], 1),
        (["def f():\n" + "    x = 1\n" * 79], 0),
        (["@cache\ndef f():\n" + "    x = 1\n" * 79], 1),
    ],
)
def test_what_is_too_long_is_found(texts, count):
    assert len(too_long({Path(f"{i}.py"): text for i, text in enumerate(texts)})) == count


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        (LINES, LINES.replace("# ", "#  other"), 1),
        (LINES, "if x:\n" + "\n\n".join(f"    {line}" for line in LINES.splitlines()), 1),
        (LINES, LINES.replace("call_5", "other"), 0),
        (LINES.replace("=", "=="), "from x import (\n" + "    name,\n" * 12 + ")", 0),
        ('"""\n' + LINES + '\n"""', '"""\n' + LINES + '\n"""', 0),
    ],
)
def test_what_is_repeated_is_found(one, other, count):
    assert len(repeated({Path("one.py"): one, Path("other.py"): other})) == count


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("class C:\n    x: int", "C: has no docstring"),
        ("def f(): pass", "f: has no docstring"),
        ("def _f(): pass", None),
        ("class C:\n    'x'\n    def f(self): pass", "C.f: has no docstring"),
        ("class C(Files):\n    'x'\n    def size(self): pass", None),
        ("def f():\n    'x'\n    if y: raise UserError('y')", "raises"),
        ("def f():\n    'x. Raises UserError for y.'\n    raise UserError('y')", None),
        ("def f():\n    'x'\n    try: g()\n    except E: raise", None),
        ("def f(acts: Tensor):\n    'x'", "shape are: acts?"),
        ("'Shape suffixes: B rows, D d_in.'\ndef f(acts_BD: Tensor) -> int:\n    'x'", None),
        ("'Shape suffixes: B rows.'\nacts_BD = 1", "lacks D"),
        ("def f() -> list[np.ndarray]:\n    'x'", "shape are: result?"),
        ("def f() -> np.ndarray:\n    'float32 (rows,).'", None),
    ],
)
def test_what_a_docstring_lacks_is_found(text, lacks):
    found = undocumented(text)
    assert len(found) == (lacks is not None)
    assert all(lacks in line for line in found)
