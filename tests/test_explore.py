"""docs/explore.ipynb: its cells run on the tiny model, and what it keeps shows nothing of a machine."""

import json
import re
import sys

import notebook
from conftest import ROOT, TINY

from evaluate.charts import heat

PATH = ROOT / "docs" / "explore.ipynb"


def test_its_cells_run(run_folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    content = json.loads(PATH.read_text(encoding="utf-8"))
    names = notebook.run(content, CONFIG=str(TINY), QUESTION="wait let me check", ANSWER="therefore the sum is even")
    tokens, sae = names["tokens"], names["sae"]
    assert names["f"].shape == (len(tokens), sae.d_sae)
    assert names["x_hat"].shape == names["x"].shape == (len(tokens), sae.d_in)
    printed = "".join(
        line for cell in content["cells"] for out in cell.get("outputs", ()) for line in out.get("text", ())
    )
    assert re.search(r"L0 [\d.]+, explained variance -?[\d.]+, cosine", printed)
    (picture,) = content["cells"][-2]["outputs"]
    svg = "".join(picture["data"]["image/svg+xml"])
    assert svg.count("<rect") == sum(value > 0 for row in names["rows"].values() for value in row) > 0


def test_what_it_keeps():
    text = PATH.read_text(encoding="utf-8")
    content = json.loads(text)
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))  # run from the top
    assert not re.search(r"/(home|root|tmp|work|usr|Users|mnt)/", text)
    assert all(cell["outputs"] for cell in cells[1:])


def test_heat_escapes_and_shades():
    svg = heat("<t>", {"<row>": [0.0, 1.0, 4.0]}, ["<a>", "b", "c"])
    assert "<row>" not in svg
    assert "<a>" not in svg
    assert re.findall(r'fill-opacity="([\d.]+)"', svg) == ["0.25", "1.00"]
