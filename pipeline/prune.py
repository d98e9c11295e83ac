"""What stands in the folder of runs, who uses it, and deleting what nobody needs.

Only `<runs>/<stage>/<12 hex>` with our marker in it is ever deleted, never through a link, never while a
process works in it, and never while a run that stays uses it. A directory is renamed before it is
emptied, so an interruption leaves no half of a run under its name; the next prune removes the rest.
"""

import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from harvest.files import UserError, is_locked, read_json
from harvest.progress import duration, size_text
from pipeline.fingerprint import STAGES
from pipeline.manifest import BEGUN, FINGERPRINT, MANIFEST, is_complete, remote_store
from pipeline.stages import TRASH

LOCK = ".lock-"


class Found(NamedTuple):
    """A run directory as it stands now."""

    stage: str
    path: Path
    bytes: int  # on the disk, links counted as links
    since: float  # Unix time at which it was finished, or begun
    state: str  # complete, running or interrupted
    upstream: str | None  # fingerprint of the stage before
    users: tuple[str, ...]  # "train 0123456789ab": runs of the next stage

    @property
    def name(self) -> str:
        """As people call it: "train 0123456789ab"."""
        return f"{self.stage} {self.path.name}"


def find(root: Path) -> list[Found]:
    """All run directories that bear our marker; links and other names are passed over."""
    found = []
    for stage in STAGES:
        for path in _folders(root / stage):
            marker = next((path / n for n in (MANIFEST, BEGUN) if _is_file(path / n)), None)
            if not FINGERPRINT.fullmatch(path.name) or marker is None:
                continue
            try:
                begun = read_json(marker)
            except UserError:
                begun = {}
            upstream = begun.get("upstream")
            found.append(
                Found(
                    stage,
                    path,
                    size(path),
                    marker.stat().st_mtime,
                    "running" if _running(path) else "complete" if is_complete(path) else "interrupted",
                    Path(upstream).name if isinstance(upstream, str) else None,
                    (),
                )
            )
    return [run._replace(users=tuple(user.name for user in found if _uses(user, run))) for run in found]


def leftovers(root: Path) -> list[Path]:
    """What an interrupted prune or `--force` had set aside to delete."""
    out = []
    for stage in STAGES:
        for path in _folders(root / stage):
            if FINGERPRINT.fullmatch(path.name.removeprefix(TRASH)) and path.name.startswith(TRASH):
                out.append(path)
            elif FINGERPRINT.fullmatch(path.name) and not _running(path):
                out += [inner for inner in _folders(path) if inner.name.startswith(TRASH)]
    return out


def choose(found: Sequence[Found], directories: Collection[Path], used: Collection[Path]) -> list[Found]:
    """The runs to delete: those named, or else all that neither `used` (those of the settings) nor a
    running one needs.

    Raises UserError when a named one is no run directory, is running, or is used by what stays.
    """
    if not directories:
        kept = [run for run in found if run.path in used or run.state == "running"]
        for run in reversed(found):  # later stages first: what a kept run stands on is kept
            if run not in kept and any(_uses(user, run) for user in kept):
                kept.append(run)
        return [run for run in found if run not in kept]
    by_path = {run.path.resolve(): run for run in found}
    chosen = []
    for directory in directories:
        run = None if directory.is_symlink() else by_path.get(directory.resolve())
        if run is None:
            raise UserError(f"{directory}: no run directory (<runs>/<stage>/<12 hex digits> with {BEGUN}); left alone")
        if run.state == "running":
            raise UserError(f"{directory}: a process is working in it; stop it first")
        if run.path in used:
            raise UserError(f"{directory}: used by the settings that --config names; left alone")
        chosen.append(run)
    for run in chosen:
        users = [user.name for user in found if _uses(user, run) and user not in chosen]
        if users:
            raise UserError(f"{run.path}: used by {', '.join(users)}; name them as well, or keep it")
    return chosen


def prune(
    root: Path,
    directories: Collection[Path],
    used: Collection[Path],
    confirm: Callable[[str], bool],
    say: Callable[[str], None],
) -> None:
    """List the runs and delete what `choose` gives, after asking.

    Raises UserError as `choose` does.
    """
    found, rest = find(root), leftovers(root)
    chosen = choose(found, directories, used)
    for line in table(found, chosen, used):
        say(line)
    total = sum(run.bytes for run in chosen) + sum(size(path) for path in rest)
    if not chosen and not rest:
        say("nothing to delete")
        return
    counted = [_count(len(chosen), "run"), _count(len(rest), "leftover")]
    what = f"{' and '.join(text for text in counted if text)} ({size_text(total)})"
    if not confirm(f"Delete {what}?"):
        say(f"nothing was deleted; --yes deletes {what}")
        return
    if choose(find(root), directories, used) != chosen:
        raise UserError(f"{root}: a run began or ended meanwhile; nothing was deleted, run it again")
    for path in rest:
        shutil.rmtree(path)
    for run in sorted(chosen, key=lambda run: -STAGES.index(run.stage)):
        store = remote_store(run.path)
        delete(run)
        say(f"deleted  {run.path}")
        if store:
            say(f"left      {store}: its store; delete it with the tools of your bucket")


def delete(run: Found) -> None:
    """Delete one run directory.

    Raises UserError when a process has begun to work in it.
    """
    if run.path.is_symlink() or _running(run.path):
        raise UserError(f"{run.path}: a process has begun to work in it, or it is a link now; left alone")
    aside = run.path.with_name(f"{TRASH}{run.path.name}")
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    run.path.rename(aside)
    shutil.rmtree(aside)


def table(found: Sequence[Found], chosen: Collection[Found], used: Collection[Path]) -> list[str]:
    """One line a run: what would happen to it, size, age, state, and who uses it."""
    rows = [("", "run", "size", "age", "state", "used by")]
    for run in found:
        users = [*run.users, *(["these settings"] if run.path in used else [])]
        action = "delete" if run in chosen else "keep"
        figures = (size_text(run.bytes), _age(time.time() - run.since), run.state)
        rows.append((action, str(run.path), *figures, ", ".join(users) or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    right = {2, 3}
    return [
        "  ".join(
            [
                *(
                    f"{c:>{w}}" if i in right else f"{c:{w}}"
                    for i, (c, w) in enumerate(zip(row[:5], widths, strict=True))
                ),
                row[5],
            ]
        )
        for row in rows
    ]


def size(path: Path) -> int:
    """Bytes that a folder takes on the disk; files that vanish meanwhile do not count."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def _folders(path: Path) -> list[Path]:
    """Real folders in a real folder, sorted."""
    if path.is_symlink() or not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink())


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _running(path: Path) -> bool:
    return any(is_locked(path, lock.name.removeprefix(LOCK)) for lock in path.glob(f"{LOCK}*") if _is_file(lock))


def _uses(user: Found, run: Found) -> bool:
    index = STAGES.index(user.stage)
    return index > 0 and STAGES[index - 1] == run.stage and user.upstream == run.path.name


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}" if number else ""


def _age(seconds: float) -> str:
    return f"{seconds / 86400:.0f}d" if seconds >= 2 * 86400 else duration(seconds)
