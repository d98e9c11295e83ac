"""The local files that a stage reads, from before it loads them to its end: what is read is what was hashed."""

from pathlib import Path
from typing import Any

from harvest.files import UserError, file_stamp
from harvest.hub import HUB
from harvest.sources import files_within, ingest_files
from pipeline.config import PipelineConfig
from pipeline.content import SLOW_BYTES
from pipeline.fingerprint import Inputs, Memory, identify


class Watch:
    """Made before a stage loads anything; `check` before it writes its first byte, `check_unchanged` after its last."""

    def __init__(self, config: PipelineConfig, inputs: Inputs, root: Path, stage: str) -> None:
        self.config, self.inputs, self.root, self.stage = config, inputs, root, stage
        self._checked = False
        self._stamps = _Stamps()
        self._before = self._identify(self._stamps)

    def check(self) -> None:
        """Read the files again, and hold their content against the fingerprint; a second time, look at them only.

        Given activations of terabytes are not read again where nothing about them has changed since they were. Raises
        UserError for content that is no longer what this command began with.
        """
        if not self._checked:
            found = self._identify(self._memory())
            for name, value in found._asdict().items():
                if value and not _is_same(value, getattr(self.inputs, name)):
                    raise self._changed()
        self._checked = True
        self._compare()

    def check_unchanged(self) -> None:
        """The same once the stage has ended, but for a model that it had loaded whole before it wrote anything.

        Raises UserError as `check` does.
        """
        if self.stage != "harvest" or self.config.ingest:
            self._compare()

    def _compare(self) -> None:
        if self._identify(_Stamps()) != self._before:
            raise self._changed()

    def _identify(self, memory: Memory) -> Inputs:
        return identify(self.config, memory, (self.stage,))

    def _memory(self) -> Memory:
        if self.stage == "harvest" and self.config.ingest:
            paths = [
                file for paths in ingest_files(self.config.ingest) for path in paths for file in files_within(path)
            ]
            if sum(path.stat().st_size for path in paths) > SLOW_BYTES:
                return Memory(self.root / ".inputs.json")
        return _Again()

    def _changed(self) -> UserError:
        newest = max(self._stamps.seen, key=lambda path: path.stat().st_ctime_ns if path.exists() else 0, default=None)
        return UserError(
            f"{self.stage}: files that it reads have changed since this command looked at them (the newest is "
            f"{newest}), so the result would not be theirs and does not count. Once they are as they should be, run "
            "the same command again"
        )


class _Again(Memory):
    """Reads everything, and asks no hub: what comes from there is known by commit."""

    def __init__(self) -> None:
        super().__init__(None)

    def commit(self, kind: str, name: str, revision: str | None, setting: str) -> str:  # noqa: ARG002
        return HUB


class _Stamps(_Again):
    """Stamps of files in place of their content."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Path] = []

    def file_hash(self, path: Path) -> str:
        self.seen.append(path)
        return repr(file_stamp(path))


def _is_same(found: Any, known: Any) -> bool:
    if isinstance(found, tuple):
        return len(found) == len(known) and all(map(_is_same, found, known))
    return found == known or (found.startswith(HUB) and str(known).startswith(HUB))
