"""Mutation testing: small faults are planted in the four packages; the tests that touch the line must notice.

    make mutants                                                   # 200 mutants, seed 1
    .venv/bin/python benchmarks/mutants.py --count 40 --seed 7 --files 'train/*.py'
    .venv/bin/python benchmarks/mutants.py --files 'train/*.py' --tests tests/test_step.py tests/test_train.py

A first run of the tests under coverage records which test, or which shared fixture, executes which line (.mutants/,
made again when a source changes). Each mutant is written into a copy of the tree and its tests run, quickest first
until one fails, in a fork of a process that has imported all that is not ours: torch and transformers are paid for
once. A line executed only at import has the tests of the lines that use its name. A test over its time limit has
failed, if it is so a second time: the machine may have been busy. One that fails without a mutant counts for nothing.
A mutant that no test touches survives, and so does one whose tests pass for --budget seconds. Prints the survivors and
writes .mutants/result.json; the exit status is 0 if at least --least of the mutants are killed.
"""

import argparse
import ast
import contextlib
import difflib
import fnmatch
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from mutations import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".mutants"
PACKAGES = ("pipeline", "evaluate", "train", "harvest")
COVERAGE = "[run]\nparallel = true\ncontext = ${{MUTANTS_CONTEXT-}}\npatch = _exit, fork\ndata_file = {}\nsource = {}\n"
WORKERS = min(os.cpu_count() or 1, 8)
OWN = ("MUTANTS_", "COVERAGE_", "PYTEST_")  # variables that are not the tests'
PATIENCE = 30  # seconds for a test, beside five times what it takes
NOT_COPIED = (".git", ".venv", ".mutants", "assets", "runs", "__pycache__")


class Recorder:
    """Pytest's hooks of the run under coverage: a context for each test, and for each fixture that tests share."""

    def __init__(self, coverage: Any):
        self.coverage, self.context, self.inside = coverage, "", 0.0
        self.seconds: dict[str, float] = defaultdict(float)
        self.fixtures: dict[str, list[str]] = {}
        self.failed: set[str] = set()

    def measured(self, context: str) -> Iterator[None]:
        before, began, inside = self.context, time.monotonic(), self.inside
        self.switch(context)
        yield
        self.switch(before)
        taken = time.monotonic() - began
        self.seconds[context] += taken - (self.inside - inside)
        self.inside = inside + taken

    def switch(self, context: str) -> None:
        self.context = os.environ["MUTANTS_CONTEXT"] = context
        self.coverage.switch_context(context)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.fixtures[item.nodeid] = item.fixturenames
        yield from self.measured(item.nodeid)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            yield
        else:
            yield from self.measured(f"{fixturedef.baseid} {fixturedef.argname}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:  # a skipped one would be skipped with a mutant
            self.failed.add(report.nodeid)

    def users(self, context: str) -> list[str]:
        """The passed tests of a context: the test itself, or all that use a shared fixture."""
        base, _, name = context.partition(" ")
        uses = {test for test, names in self.fixtures.items() if name in names and test.startswith(base)}
        return sorted(({context} if context in self.fixtures else uses) - self.failed)


def record(tree: Path, tests: list[str]) -> dict[str, Any]:
    """Run a tree's tests under coverage: contexts of each line, their tests, seconds of tests, modules to import."""
    import coverage

    before = dict(os.environ)
    settings = tree / "coverage.ini"
    settings.write_text(COVERAGE.format(tree / "coverage.data", ",".join(str(tree / p) for p in PACKAGES)))
    os.environ["COVERAGE_PROCESS_START"] = str(settings)  # for the processes that tests start
    measured = coverage.Coverage(config_file=str(settings))
    recorder = Recorder(measured)
    measured.start()
    if pytest.main([f"--basetemp={tree}/tmp", *tests], plugins=[recorder]) > pytest.ExitCode.TESTS_FAILED:
        raise ValueError(f"{tests}: pytest could not run them")
    measured.stop()
    measured.save()
    measured.combine()
    data = measured.get_data()
    contexts = sorted({*data.measured_contexts(), *recorder.seconds} - {""})
    number = {context: place for place, context in enumerate(contexts)}
    users = [recorder.users(context) for context in contexts]
    seconds: dict[str, float] = defaultdict(float)
    for context, used in zip(contexts, users, strict=True):
        for test in used:
            seconds[test] += recorder.seconds[context]
    found = {str(Path(file).relative_to(tree)): data.contexts_by_lineno(file) for file in data.measured_files()}
    return {
        "users": users,
        "shared": [number[context] for context in contexts if context not in recorder.fixtures],
        "seconds": seconds,
        "lines": {
            file: {n: [number[c] for c in at if c] for n, at in places.items()} for file, places in found.items()
        },
        "environment": {n: v for n, v in os.environ.items() if before.get(n) != v and not n.startswith(OWN)},
        "modules": [n for n, m in sys.modules.items() if str(tree) not in str(getattr(m, "__file__", None) or tree)],
    }


class Chosen:
    """Pytest's hooks of the run with a mutant: some tests, quickest first, each within its time."""

    def __init__(self, seconds: dict[str, float], said: Path):
        self.seconds, self.said, self.failed = seconds, said, list[str]()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        order = {test: place for place, test in enumerate(self.seconds)}
        items[:] = sorted((i for i in items if i.nodeid in order), key=lambda item: order[item.nodeid])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        signal.alarm(int(PATIENCE + 5 * self.seconds[item.nodeid]))  # its default action ends the process
        self.said.write_text(item.nodeid)
        yield

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def forked(tree: Path, work: Callable[[], int]) -> int:
    """Do some work within a tree in a process and a group of its own; its id. What it prints is in tree/log."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        os.chdir(tree)
        sys.path[:0] = [str(tree)]
        log = os.open(tree / "log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_tests(tree: Path, seconds: dict[str, float], *options: str) -> int:
    """Run tests of a tree; the last one begun, or without `-x` those that failed, are named in tree/said."""
    signal.alarm(PATIENCE * 2)  # to import and to collect
    chosen = Chosen(seconds, tree / "said")
    files = dict.fromkeys(test.partition("::")[0] for test in seconds)
    status = int(pytest.main([f"--basetemp={tree}/tmp", *options, *files], plugins=[chosen]))
    if not options:
        (tree / "said").write_text("\n".join(chosen.failed))
    return status


def make_map(tree: Path, key: str, tests: list[str]) -> dict[str, Any]:
    """The map of the sources with this key, from the cache or made now."""
    path = CACHE / f"map-{key}.json"
    if not path.exists():
        print("running the tests under coverage ...", file=sys.stderr)
        began = time.monotonic()

        def work() -> int:
            path.with_suffix(".part").write_text(json.dumps(record(tree, tests)))
            return 0

        if os.waitpid(forked(tree, work), 0)[1]:
            sys.exit(f"the tests could not be run under coverage:\n{(tree / 'log').read_text()[-3000:]}")
        path.with_suffix(".part").rename(path)
        print(f"... {time.monotonic() - began:.0f} s", file=sys.stderr)
    return json.loads(path.read_text())


def tests_of(mutant: Mutant, found: dict[str, Any], uses: dict[str, set[tuple[str, str]]]) -> dict[str, float]:
    """The tests that touch a mutant with the seconds of each, quick files first, last those of shared fixtures."""
    places = {(mutant.file, str(line)) for line in mutant.lines}.union(*(uses[name] for name in mutant.names))
    contexts = {context for file, line in places for context in found["lines"].get(file, {}).get(line, ())}
    seconds, shared, out = found["seconds"], {*found["shared"]}, {}
    for part in (contexts - shared, contexts & shared):
        by_file = defaultdict(list)
        for test in {test for context in part for test in found["users"][context]} - out.keys():
            by_file[test.partition("::")[0]].append((seconds[test], test))
        for tests in sorted(by_file.values(), key=lambda tests: sum(taken for taken, _ in tests) / len(tests)):
            out |= {test: taken for taken, test in sorted(tests)}
    return out


def within(tests: dict[str, float], budget: float) -> dict[str, float]:
    """The first of the tests that together take so many seconds."""
    ends = itertools.accumulate(tests.values())
    return {test: taken for (test, taken), end in zip(tests.items(), ends, strict=True) if end <= budget}


def named_lines(sources: dict[str, bytes]) -> dict[str, set[tuple[str, str]]]:
    """Places, as file and line, at which each name is used."""
    uses = defaultdict(set)
    for file, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
            if isinstance(node, ast.Name | ast.Attribute | ast.keyword) and name:
                uses[name].add((file, str(node.lineno)))
    return uses


def run(trees: list[Path], sources: dict[str, bytes], todo: list[tuple[Mutant, dict[str, float]]]) -> list[dict]:
    """The outcome of each mutant with its tests; as many run at a time as there are trees."""
    free, running, out, late = list(trees), {}, [], set[Mutant]()
    stamp = itertools.count(10**9)  # a time that the file never had makes Python compile it anew

    def write(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        os.utime(path, (now := next(stamp), now))

    def begin(mutant: Mutant, tests: dict[str, float]) -> None:
        source = sources[mutant.file]
        mutated = source[: mutant.start] + mutant.text.encode() + source[mutant.end :]
        lines = [*difflib.unified_diff(source.decode().splitlines(), mutated.decode().splitlines(), n=0)][2:]
        result = {
            "place": f"{mutant.file}:{len(source[: mutant.start + 1].splitlines())}",
            "diff": [line for line in lines if not line.startswith("@@")],
            "tests": len(tests),
            "killed_by": None,
            "seconds": 0.0,
        }
        out.append(result)
        if tests:
            tree = free.pop()
            write(tree / mutant.file, mutated)
            (tree / "said").write_text("importing")
            pid = forked(tree, lambda: run_tests(tree, tests, "-x"))
            running[pid] = (tree, mutant, tests, result, time.monotonic())

    def end() -> None:
        pid, status = os.wait()
        tree, mutant, tests, result, began = running.pop(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what a test has started and left
        write(tree / mutant.file, sources[mutant.file])
        free.append(tree)
        code = os.waitstatus_to_exitcode(status)
        is_late = code == -signal.SIGALRM
        if is_late and mutant not in late:
            late.add(mutant)
            out.remove(result)
            todo.append((mutant, tests))
            return
        result["seconds"] = round(time.monotonic() - began, 1)
        if code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            result["killed_by"] = ("time limit of " if is_late else "") + (tree / "said").read_text()
        print(len(out), result["place"], result["seconds"], "s:", result["killed_by"] or "SURVIVED", file=sys.stderr)

    try:
        while todo or running:
            if todo and free:
                begin(*todo.pop(0))
            else:
                end()
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)
    return out


def copy_of_the_tree(folder: Path) -> Path:
    """The clone without its results; environment and assets are links."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for name in (".venv", "assets"):
        (folder / name).symlink_to((ROOT / name).resolve())
    return folder


def main() -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", nargs="*", default=["*"], help="only in files that match, as 'train/*.py'")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="only these tests, as tests/test_step.py")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds of tests of a mutant")
    parser.add_argument("--least", type=float, default=0.9, help="killed share from which the exit status is 0")
    arguments = parser.parse_args()

    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    sources = {str(path.relative_to(ROOT)): path.read_bytes() for path in paths}
    everything = sorted([*paths, *(p for p in (ROOT / "tests").rglob("*") if p.is_file() and p.suffix != ".pyc")])
    inputs = [arguments.tests, *((str(path), path.read_bytes()) for path in everything)]
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]
    chosen = [f for f in sources if any(fnmatch.fnmatch(f, pattern) for pattern in arguments.files)]
    every = [mutant for file in chosen for mutant in mutants(file, sources[file])]
    sample = random.Random(arguments.seed).sample(every, min(arguments.count, len(every)))
    os.environ["OMP_NUM_THREADS"] = "1"
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        trees = [copy_of_the_tree(Path(folder) / str(n)) for n in range(WORKERS)]
        found = make_map(trees[0], key, arguments.tests)
        os.environ |= found["environment"]  # libraries read it when they are imported
        for name in found["modules"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        uses = named_lines(sources)
        todo = [(mutant, within(tests_of(mutant, found, uses), arguments.budget)) for mutant in sample]
        results = run(trees, sources, todo)
        killers = {r["killed_by"] for r in results} & {*found["seconds"]}
        os.waitpid(forked(trees[0], lambda: run_tests(trees[0], {test: found["seconds"][test] for test in killers})), 0)
        unsound = (trees[0] / "said").read_text().splitlines()
    survivors = [r for r in results if not r["killed_by"] or r["killed_by"] in unsound]
    for r in survivors:
        doubt = f"; {r['killed_by']} fails without it, too" if r["killed_by"] else ""
        print(f"\n{r['place']} survives {r['tests']} tests{doubt}", *r["diff"], sep="\n")
    share = 1 - len(survivors) / max(1, len(results))
    print(f"\n{len(results) - len(survivors)} of {len(results)} mutants killed ({share:.1%}); {len(every)} possible")
    result = {"date": str(date.today()), **vars(arguments), "killed": share, "mutants": results, "unsound": unsound}
    (CACHE / "result.json").write_text(json.dumps(result, indent=1))
    return int(share < arguments.least)


if __name__ == "__main__":
    sys.exit(main())
