"""The faults that benchmarks/mutants.py plants: each is Python, and none is where it would mean nothing."""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from mutations import mutants


def mutated(source: str) -> list[str]:
    data = source.encode()
    out = [(data[: m.start] + m.text.encode() + data[m.end :]).decode() for m in mutants("file.py", data)]
    for text in out:
        compile(text, "file.py", "exec")
    return out


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", ["(a <= b)", "(a > b)"]),
        ("é = a is b", ["é = (a is not b)"]),
        ("a + b * -1", ["(a - b * -1)", "a + (b / -1)", "a + b * -2"]),
        ("a and not (b or c)", ["(a or not (b or c))", "a and (b or c)", "a and not ((b and c))"]),
        ("x = min(True, y)", ["x = max(True, y)", "x = min(False, y)"]),
        ("f(a, b)", ["pass", "f(b, a)"]),
        ("x = zip(a, b + 1, strict=True)", ["x = zip(a, (b - 1), strict=True)", "x = zip(a, b + 2, strict=True)"]),
        ("while a:\n    break", ["while a:\n    continue"]),
        ("def f(a: int = 0) -> 1:\n    return a", ["def f(a: int = 1) -> 1:\n    return a", None]),
        ("if a:\n    raise Error(f'{b + 1}', 2)", ["if a:\n    pass"]),
        ("@cache(1)\ndef f():\n    'of 2'\n    x: Literal[3] = f'{4}' + b", []),
    ],
)
def test_the_faults_of_a_source(source, expected):
    expected = [text or source.replace("return a", "return None") for text in expected]
    assert mutated(source) == expected


def test_where_a_fault_is():
    """Lines of its statement without the block; names of what is executed at import."""
    source = "LIMIT = (\n    1\n)\n\n\ndef f(a=2):\n    while (a\n        < 3):\n        g(\n            4)\n"
    found = [(list(m.lines), m.names, m.text) for m in mutants("file.py", source.encode())]
    assert found == [
        ([1, 2, 3], ("LIMIT",), "2"),
        ([6], ("f",), "3"),
        ([7, 8], (), "(a <= 3)"),
        ([7, 8], (), "(a > 3)"),
        ([7, 8], (), "4"),
        ([9, 10], (), "pass"),
        ([9, 10], (), "5"),
    ]
