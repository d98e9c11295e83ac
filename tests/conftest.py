"""A complete run of configs/tiny.yaml, made once, and one on real text; tests that change one copy it."""

import multiprocessing
import os
import shutil
import signal
import sys
from functools import cache
from importlib.metadata import version
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer.testing
from httpx._transports import default
from jinja2 import Environment
from packaging.version import Version
from typer.testing import CliRunner

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the hub, whose library reads this when it is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, as transformers does

import real
import tiny

from harvest.files import read_json, write_sealed

MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # files on a disk take a tenth of the tests' time
os.fsync = lambda _file: None  # tests kill processes, never the machine; a tenth of their time would go here

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
# Of `python -m pipeline` in another folder, with packages that lie beside Python's own.
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# Tables of tests that say what each of its models and templates does.
KNOWN_TRANSFORMERS = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.23"), reason="written for the transformers of constraints.txt"
)
# oneDNN 3.10, of torch 2.11, rounds equal rows of a float32 product otherwise, by their place, on CPUs with AVX2 alone.
KNOWN_TORCH = pytest.mark.skipif(
    Version(version("torch")) < Version("2.13"), reason="its products on a CPU may round a row by its place"
)
TWO_HOOKS = "harvest.hooks=[model.layers.1,model.layers.0]"


class Ran(NamedTuple):
    status: int
    out: str


CPU = ("train.runtime.device=cpu", "evaluate.runtime.device=cpu")  # for settings files that choose none


def pipeline(*arguments: str, config: Path = TINY) -> Ran:
    """`python -m pipeline` in this process and the current folder."""
    from pipeline.cli import app

    command, *rest = arguments
    result = CliRunner().invoke(app, [command, "--config", str(config), *rest])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.output)


def start(*arguments: str, cwd: Path) -> ForkProcess:
    """The same in a process of its own: a fork of this one, which has imported everything."""

    def run() -> None:
        os.chdir(cwd)
        sys.exit(pipeline(*arguments).status)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard():
    """A shell has what it starts in the background ignore Ctrl-C, and processes inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def widths_found_once():
    """The widths of a model's hooks are found by running it on fake tensors: once for each model, not each command."""
    from pipeline import settings_check

    find, known = settings_check._shapes, {}

    def found(model, modules):
        key = (model.config.to_json_string(), *modules.items())
        if key not in known:
            known[key] = find(model, modules)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings_check, "_shapes", found)
        yield


@pytest.fixture(autouse=True)
def settings_are_new(monkeypatch):
    """A process checks settings once; those of an earlier test are not this one's."""
    monkeypatch.setattr("pipeline.settings_check._checked", set())


@pytest.fixture(scope="session", autouse=True)
def commands_read_once():
    """Typer makes the tree of commands from their functions at each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", cache(typer.testing._get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def certificates_read_once():
    """httpx reads those of all authorities for each request of a test, though none is encrypted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default, "create_ssl_context", cache(default.create_ssl_context))
        yield


@pytest.fixture(scope="session", autouse=True)
def templates_compiled_once():
    """A command makes its pages in a process of its own; here hundreds of them are made in one."""
    compile_source, known = Environment.compile, {}

    def compiled(self, source, *place, **options):
        key = (source, *place, *options.items(), self.autoescape, *sorted(self.filters))
        if key not in known:
            known[key] = compile_source(self, source, *place, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", compiled)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A folder with tiny assets and a complete run; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make_assets(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        ran = pipeline("run")
        assert ran.status == 0, ran.out
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def two_hooks(finished, tmp_path_factory) -> Path:
    """A folder with two hooks harvested, and an SAE of each at two learning rates from one reading; read only."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(finished / "assets", folder / "assets")
    shutil.copytree(finished / "runs" / "sample", folder / "runs" / "sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in ("harvest", "train"):
            ran = pipeline(stage, TWO_HOOKS, "train.sweep.lr=[1e-3,3e-3]")
            assert ran.status == 0, ran.out
    return folder


@pytest.fixture(scope="session")
def real_run(tmp_path_factory) -> Path:
    """A folder with a trained SAE of real activations of SmolLM2 (tests/real.py); read only."""
    folder = tmp_path_factory.mktemp("real")
    real.make_assets(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for stage in ("sample", "harvest", "train"):
            ran = pipeline(stage, *real.SETTINGS, config=real.CONFIG)
            assert ran.status == 0, ran.out
    finally:
        os.chdir(before)
    return folder


def current_copy(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a folder, its links as they are, as the current one."""
    shutil.copytree(source, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run_folder(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the finished run, as the current folder."""
    return current_copy(finished, tmp_path / "copy", monkeypatch)


@pytest.fixture
def real_folder(real_run, tmp_path, monkeypatch) -> Path:
    """A copy of the run on real text, as the current folder."""
    return current_copy(real_run, tmp_path / "real", monkeypatch)


@pytest.fixture
def fresh_folder(finished, tmp_path, monkeypatch) -> Path:
    """Tiny assets and no runs, as the current folder."""
    folder = tmp_path / "fresh"
    shutil.copytree(finished / "assets", folder / "assets")
    monkeypatch.chdir(folder)
    return folder


def only(folder: Path, pattern: str) -> Path:
    """The one path that matches."""
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    """Bytes of all files below a folder by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob(pattern)) if p.is_file()}


def unlisted(directory: Path) -> None:
    """Take the list of files out of a run's manifest: what they hold is then held against nothing but themselves."""
    manifest = read_json(directory / "manifest.json")
    del manifest["files"]
    write_sealed(directory / "manifest.json", manifest)
