"""Small faults that the source of a file can be given: its mutants."""

import ast
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

SWAPS = {
    "Lt": ("LtE", "Gt"), "LtE": ("Lt", "GtE"), "Gt": ("GtE", "Lt"), "GtE": ("Gt", "LtE"),
    "Eq": ("NotEq",), "NotEq": ("Eq",), "Is": ("IsNot",), "IsNot": ("Is",), "In": ("NotIn",), "NotIn": ("In",),
    "And": ("Or",), "Or": ("And",), "Add": ("Sub",), "Sub": ("Add",), "Mult": ("Div",), "Div": ("Mult",),
    "FloorDiv": ("Mult",),
}  # fmt: skip
NOT_CODE = {"annotation", "returns", "decorator_list"}
# What no test can see: an assertion that holds, when something happens, and what lanes beside a tensor load.
UNSEEN = {"strict", "flush", "non_blocking", "cancel_futures", "other"}
TEXT = (ast.JoinedStr, ast.Raise)  # a message; a `raise` can be dropped, and what it says is not mutated


class Mutant(NamedTuple):
    file: str
    lines: range  # of the statement, without the block below it
    names: tuple[str, ...]  # what a statement defines that is executed at import; () within a function
    start: int  # bytes of the file that are replaced
    end: int
    text: str


def replacements(node: ast.AST) -> Iterator[str]:
    """Source of each fault that can take the place of a node."""

    def changed(**fields: Any) -> str:
        new = copy.copy(node)
        vars(new).update(fields)
        return ast.unparse(new)

    def swapped(op: ast.AST) -> list[ast.AST]:
        return [getattr(ast, name)() for name in SWAPS.get(type(op).__name__, ())]

    match node:
        case ast.Compare(ops=[op]):
            yield from (f"({changed(ops=[new])})" for new in swapped(op))
        case ast.BinOp(left=ast.JoinedStr() | ast.Constant(value=str())) | ast.BinOp(right=ast.JoinedStr()):
            return
        case ast.BinOp(op=op) | ast.BoolOp(op=op):
            yield from (f"({changed(op=new)})" for new in swapped(op))
        case ast.UnaryOp(op=ast.Not()):
            yield f"({ast.unparse(node.operand)})"
        case ast.Constant(value=bool()):
            yield str(not node.value)
        case ast.Constant(value=int() | float()):
            yield repr(node.value + 1)
        case ast.Call(func=ast.Name(id="min" | "max" as name)):
            yield changed(func=ast.Name({"min": "max", "max": "min"}[name]))
        case ast.Call(args=[first, second], keywords=[]) if node.col_offset % 4 == 0:  # a fourth of them or so
            yield changed(args=[second, first])
        case ast.Return(value=ast.expr()) if ast.unparse(node) != "return None":
            yield "return None"
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield "pass"
        case ast.Break():
            yield "continue"
        case ast.Continue():
            yield "break"


def mutants(file: str, source: bytes) -> Iterator[Mutant]:
    """Every mutant of a file, in its order.

    There are none in docstrings, annotations, decorators, messages and what no test can see.
    """
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def visit(node: Any, lines: range, names: tuple[str, ...]) -> Iterator[Mutant]:
        if isinstance(node, ast.keyword) and node.arg in UNSEEN:
            return
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            lines = range(node.lineno, body[0].lineno if body else node.end_lineno + 1)
        if names and isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = tuple(n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        elif names and isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = (node.name,)
        for text in replacements(node):
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            yield Mutant(file, lines, names, start, end, text)
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and field not in NOT_CODE and not isinstance(node, TEXT):
                    called = isinstance(node, ast.FunctionDef) and field == "body"
                    yield from visit(child, lines, () if called else names)

    yield from visit(ast.parse(source), range(0), ("",))
