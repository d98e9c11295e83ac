"""The local files that a stage reads, from before it loads them to its end: what is read is what was hashed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from harvest.files import UserError, file_stamp
from harvest.hub import HUB
from pipeline.config import PipelineConfig
from pipeline.fingerprint import Inputs, Memory, identify


class Watch:
    """Made before a stage loads anything; `check` before it writes its first byte, `check_unchanged` after its last."""

    def __init__(self, config: PipelineConfig, inputs: Inputs, root: Path, stage: str) -> None:
        self.config, self.inputs, self.root, self.stage = config, inputs, root, stage
        self._seen: set[Path] = set()
        self._checked, self._before = False, self._stamps()

    def check(self) -> None:
        """Read the files again, and hold their content against the fingerprint; a second time, look at them only.

        Given activations, which may be terabytes, are read again only if their stamps have changed, and the sample's
        sources not at all: they are hashed as they are read. Raises UserError for content that is no longer what this
        command began with.
        """
        if not self._checked:
            config, given = self.config, self.config.ingest and self.stage == "harvest"
            if self.stage == "sample":
                config = config.model_copy(update={"sample": config.sample.model_copy(update={"sources": ()})})
            found = identify(config, _Local(self.root / ".inputs.json" if given else None), (self.stage,))
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
        if self._stamps() != self._before:
            raise self._changed()

    def _stamps(self) -> Inputs:
        """Stamps of the files in place of their content."""

        def stamp(path: Path) -> str:
            self._seen.add(path)
            return repr(file_stamp(path))

        return identify(self.config, _Local(None, stamp), (self.stage,))

    def _changed(self) -> UserError:
        newest = max(self._seen, key=lambda path: path.stat().st_ctime_ns if path.exists() else 0, default=None)
        return UserError(
            f"{self.stage}: files that it reads have changed since this command looked at them (the newest is "
            f"{newest}), so the result would not be theirs and does not count. Once they are as they should be, run "
            "the same command again"
        )


class _Local(Memory):
    """Of local files alone, hashed or looked at otherwise: what comes from the hub is known by its commit."""

    def __init__(self, path: Path | None, look: Callable[[Path], str] | None = None) -> None:
        super().__init__(path)
        self._look = look or super().file_hash

    def commit(self, kind: str, name: str, revision: str | None, setting: str) -> str:  # noqa: ARG002
        return HUB

    def file_hash(self, path: Path) -> str:
        return self._look(path)


def _is_same(found: Any, known: Any) -> bool:
    if isinstance(found, tuple):
        return len(found) == len(known) and all(map(_is_same, found, known))
    return found == known or (found.startswith(HUB) and str(known).startswith(HUB))
