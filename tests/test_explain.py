"""`pipeline explain` against an endpoint on loopback."""

import shutil

import numpy as np
import pytest
from conftest import current_copy, only, pipeline
from oracle_server import MODEL, serving
from oracles import oracle
from planted import COUNT, EVALUATED, HOOK, plant

from harvest.files import read_json


@pytest.fixture(scope="session")
def planted(finished, tmp_path_factory):
    """A folder with an evaluated SAE of planted features; read only."""
    folder = tmp_path_factory.mktemp("planted") / "run"
    shutil.copytree(finished, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        plant(folder)
        ran = pipeline("evaluate", *EVALUATED)
        assert ran.status == 0, ran.out
    return folder


@pytest.fixture
def folder(planted, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    return current_copy(planted, tmp_path / "copy", monkeypatch)


def explain(server, *arguments: str):
    return pipeline("explain", "--base-url", server.url, "--model", MODEL, *EVALUATED, "explain.tokens=8", *arguments)


def found(folder) -> dict:
    return read_json(only(folder, f"runs/explain/*/explanations-{HOOK}.json"))


def test_an_oracle_is_believed_and_another_s_explanation_is_not(folder):
    with serving(oracle) as server:
        ran = explain(server)
        assert ran.status == 0, ran.out
        assert set(server.answered.values()) == {1}
    entries = found(folder)["features"]
    assert [each["feature"] for each in entries] == list(range(COUNT))
    for each in entries:
        assert each["detection"]["value"] >= 0.9
        assert each["fuzzing"]["value"] >= 0.9
        assert each["problems"] == {}
    for name in ("control", "control_fuzzing"):
        assert np.mean([each[name]["value"] for each in entries]) == pytest.approx(0.5, abs=0.1)
