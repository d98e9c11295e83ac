"""A pytest plugin: a failure is printed when it happens, so that a run out of time has told what it found."""

from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Called by pytest after each part of a test."""
    if report.failed:
        print(f"\nfailed: {report.nodeid} ({report.when})\n{report.longreprtext[-2500:]}", flush=True)
