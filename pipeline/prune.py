"""What lies in the folder of runs, who uses it, and deleting what nobody needs.

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
from typing import Any, NamedTuple

from harvest.files import LOCK, UserError, is_locked, read_json
from harvest.progress import duration, size_text
from harvest.stage_directory import BEGUN, FINGERPRINT, MANIFEST, Run, upstreams
from pipeline.fingerprint import EVERY_STAGE, STAGES
from pipeline.running import TRASH
from pipeline.tables import table
from train.start_files import LEVELS


class Found(NamedTuple):
    """A run directory as it is now."""

    stage: str
    path: Path
    bytes: int  # on the disk, links counted as links
    since: float  # Unix time at which it was finished, or begun
    state: str  # complete, running or interrupted
    upstreams: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.stage} {self.path.name}"

    def uses(self, run: "Found") -> bool:
        """Whether it depends on another one."""
        return run.path in self.upstreams


def find(root: Path) -> list[Found]:
    """All run directories that bear our marker; links and other names are passed over."""
    found = []
    for path in _folders(*(root / stage for stage in EVERY_STAGE)):
        markers = [path / name for name in (MANIFEST, BEGUN) if (path / name).is_file()]
        if FINGERPRINT.fullmatch(path.name) and markers:
            begun: dict[str, Any] = {}
            with suppress(UserError):
                begun = read_json(markers[0])
            before = tuple(run.path for run in upstreams(begun, root)) + _started_from(begun, root)
            state = "running" if _running(path) else "complete" if Run(path).is_complete else "interrupted"
            found.append(Found(path.parent.name, path, _size(path), markers[0].stat().st_mtime, state, before))
    return found


def start_run(path: str, root: Path) -> Path | None:
    """The training run below `root` whose SAE a path leads to (train.start_from); None where it leads elsewhere."""
    here = Path(path).resolve()
    for above in (here, *here.parents)[:LEVELS]:
        if above.parent == (root / "train").resolve() and FINGERPRINT.fullmatch(above.name):
            return root / "train" / above.name
    return None


def _started_from(begun: dict[str, Any], root: Path) -> tuple[Path, ...]:
    start = begun.get("settings", {}).get("start_from")
    run = start_run(start["path"], root) if start else None
    return (run,) if run else ()


def leftovers(root: Path) -> list[Path]:
    """What an interrupted prune or `--force` had set aside to delete."""
    every = _folders(*(root / stage for stage in EVERY_STAGE))
    aside = [path for path in every if FINGERPRINT.fullmatch(path.name.removeprefix(TRASH))]
    inside = _folders(*(path for path in aside if not path.name.startswith(TRASH) and not _running(path)))
    return [path for path in aside + inside if path.name.startswith(TRASH)]


def choose(found: Sequence[Found], directories: Collection[Path], used: Collection[Path]) -> list[Found]:
    """The runs to delete: those named, or else all that neither `used` (those of the settings) nor a
    running one needs.

    Raises UserError when a named one is no run directory, is running, or is used by what stays.
    """
    if not directories:
        kept = [run for run in found if run.path in used or run.state == "running"]
        while needed := [run for run in found if run not in kept and any(user.uses(run) for user in kept)]:
            kept += needed
        on_kept = [run for run in found if run.stage not in STAGES and any(run.uses(other) for other in kept)]
        kept += on_kept  # paid for, in calls or in hours
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
        if users := [str(user) for user in found if user.uses(run) and user not in chosen]:
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
    rows = [("", "run", "size", "age", "state", "used by")]
    for run in found:
        users = [*(str(user) for user in found if user.uses(run)), *(["these settings"] if run.path in used else [])]
        action, age = "delete" if run in chosen else "keep", _age(time.time() - run.since)
        rows.append((action, str(run.path), size_text(run.bytes), age, run.state, ", ".join(users) or "-"))
    for line in table(rows, right=(2, 3)):
        say(line)
    if not chosen and not rest:
        say("nothing to delete")
        return
    counted = [f"{n} {noun}{'s' * (n > 1)}" for n, noun in ((len(chosen), "run"), (len(rest), "leftover")) if n]
    total = sum(run.bytes for run in chosen) + sum(map(_size, rest))
    what = f"{' and '.join(counted)} ({size_text(total)})"
    if not confirm(f"Delete {what}?"):
        say(f"nothing was deleted; --yes deletes {what}")
        return
    if choose(find(root), directories, used) != chosen:
        raise UserError(f"{root}: a run began or ended meanwhile; nothing was deleted, run it again")
    for path in rest:
        shutil.rmtree(path)
    for run in sorted(chosen, key=lambda run: -EVERY_STAGE.index(run.stage)):
        store = Run(run.path).store_url
        _delete(run.path)
        say(f"deleted  {run.path}")
        if store:
            say(f"left      {store}: its store; delete it with the tools of your bucket")


def _delete(path: Path) -> None:
    if path.is_symlink() or _running(path):
        raise UserError(f"{path}: a process has begun to work in it, or it is a link now; left alone")
    aside = path.with_name(f"{TRASH}{path.name}")
    path.rename(aside)
    shutil.rmtree(aside)


def _size(path: Path) -> int:
    """Bytes that a folder takes on the disk; files that vanish meanwhile do not count."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def _folders(*parents: Path) -> list[Path]:
    """Real folders in real folders, sorted."""
    inner = [
        path for parent in parents if parent.is_dir() and not parent.is_symlink() for path in sorted(parent.iterdir())
    ]
    return [path for path in inner if path.is_dir() and not path.is_symlink()]


def _running(path: Path) -> bool:
    return any(is_locked(path, lock.name.removeprefix(LOCK)) for lock in path.glob(f"{LOCK}*"))


def _age(seconds: float) -> str:
    return f"{seconds / 86400:.0f}d" if seconds >= 2 * 86400 else duration(seconds)
