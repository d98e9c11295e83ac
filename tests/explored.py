"""What tests of the explorer ask: shelves of a finished run, and texts that are hard to read."""

from pathlib import Path

from conftest import TINY

from pipeline.config import load
from pipeline.explore.catalog import Shelf, find_entries, open_shelves
from pipeline.explore.reading import Reader
from pipeline.stages import Runs, find_runs

MARKUP = "<｜User｜>So <think>\nlet me</think> check<|im_end|>\n<|im_start|>assistant<｜end▁of▁sentence｜>"
TEXTS = (
    "Wait",
    "a",
    "The sum of two even numbers is even.",
    "Wait, let me check: 17 × 23 = 391, therefore the answer is 391.",
    "👍",
    "family: 👩‍👩‍👧‍👦, flag: 🇵🇹, skin: 👋🏽, and 🧠🧠🧠",
    MARKUP,
    "<|im_end|>",
    "def f(x):\n\treturn {i: x[i] ** 2 for i in range(len(x)) if x[i] != 0}  # squares\n",
    '{"a": [1, 2.5e-3, null], "b": "\\u00e9"}',
    "<script>alert('&amp;')</script>",
    "∫₀^∞ e^{-x²} dx = √π/2, \\frac{a}{b} \\in \\mathbb{R}",
    "これは文です。你好，世界。한국어",
    "مرحبا بالعالم \u202eabc\u202c שלום",
    "e\u0301a\u0308 zalgo: h\u0335\u0322e\u0337y",
    "   \n\n\t  spaces   and\r\nline ends \n",
    "nul \x00 and bell \x07",
    "x" * 300,
    " ".join(f"{n}" for n in range(120)),
    "so let me check the sum of two numbers " * 120,
)


def shelves_of(folder: Path, settings: tuple[str, ...] = (), config: Path = TINY) -> list[Shelf]:
    """The SAEs of the finished runs in a folder that is the current one."""
    return list(open_shelves(find_entries(runs_of(folder, settings, config))).values())


def runs_of(folder: Path, settings: tuple[str, ...] = (), config: Path = TINY) -> list[Runs]:
    """The runs of settings in a folder that is the current one."""
    assert Path.cwd() == folder
    return find_runs(load(config, list(settings)), Path("runs"))


def reader_of(shelf: Shelf) -> Reader:
    """The model of a shelf."""
    return Reader.load([shelf.entry])
