"""What became of the rows of a source: used, dropped and why, filtered, not needed, not reached; all rows in sum."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from harvest.contexts import SPLITS
from harvest.conversations import Note

WARN_SHARE, STOP_SHARE = 0.01, 0.5  # of the rows that were read
SURE = 4  # standard deviations by which a part of the rows has to exceed STOP_SHARE
ENOUGH_ROWS = 500  # to judge the others by
MOST_REASONS = 5  # in one message


@dataclass
class Kept:
    """Rows of which the same is to be said."""

    rows: int
    row: int  # the first of them, an example
    found: str = ""  # what that one has


@dataclass
class RowCounts:
    """Rows of one source, in the order in which they were looked at."""

    used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # by split
    filtered: int = 0  # by `where`
    not_needed: int = 0  # usable, but the split or the stratum was full
    dropped: dict[str, Kept] = field(default_factory=dict)  # by reason
    cut: dict[str, Kept] = field(default_factory=dict)  # used, but for the turns from an unusable one on; by reason
    malformed: Kept | None = None  # used, with thinking tags that do not pair

    @classmethod
    def of(cls, record: dict[str, Any]) -> "RowCounts":
        """From what `asdict` gave."""
        reasons = {name: {r: Kept(**kept) for r, kept in record[name].items()} for name in ("dropped", "cut")}
        malformed = record["malformed"] and Kept(**record["malformed"])
        return cls(**{**record, **reasons, "malformed": malformed})

    def drop(self, note: Note, row: int) -> None:
        """Count a row that cannot be used."""
        _count(self.dropped, note, row)

    def use(self, split: str, row: int, cut: Note | None, malformed: bool) -> None:
        """Count a row that gave tokens."""
        self.used[split] += 1
        if cut:
            _count(self.cut, cut, row)
        if malformed:
            self.malformed = self.malformed or Kept(0, row)
            self.malformed.rows += 1

    @property
    def dropped_rows(self) -> int:
        """Rows dropped for any reason."""
        return sum(kept.rows for kept in self.dropped.values())

    @property
    def read(self) -> int:
        """Rows that were read as documents; those that are filtered are not meant to be."""
        return sum(self.used.values()) + self.not_needed + self.dropped_rows

    @property
    def looked_at(self) -> int:
        """All rows but those that are not reached."""
        return self.read + self.filtered

    def warns(self) -> bool:
        """Whether so many rows were dropped that it has to be said aloud."""
        return self.dropped_rows > WARN_SHARE * self.read

    def stops(self, *, all_read: bool) -> bool:
        """Whether more rows are dropped than used; of a part of them, in random order, when that is beyond doubt."""
        beyond = self.dropped_rows - STOP_SHARE * self.read
        if all_read:
            return beyond > 0
        return self.read >= ENOUGH_ROWS and beyond > SURE * math.sqrt(self.read * STOP_SHARE * (1 - STOP_SHARE))

    def told(self, reasons: dict[str, Kept], place: Callable[[int], str]) -> str:
        """Reasons for people, the most frequent first, each with an example; `place` says where a row stands."""
        ordered = sorted(reasons.items(), key=lambda item: -item[1].rows)
        parts = [
            f"{kept.rows:,} {reason} (as {place(kept.row)}{f': {kept.found!r}' if kept.found else ''})"
            for reason, kept in ordered[:MOST_REASONS]
        ]
        rest = sum(kept.rows for _, kept in ordered[MOST_REASONS:])
        return ", ".join(parts) + (f", {rest:,} for other reasons" if rest else "")

    def lines(self, place: Callable[[int], str]) -> list[str]:
        """What is to be said of rows that were not used, or not as they stand."""
        out = []
        if self.dropped:
            warning = "warning: " if self.warns() else ""
            told = self.told(self.dropped, place)
            out.append(f"{warning}{self.dropped_rows:,} of {self.read:,} rows read were dropped: {told}")
        if self.cut:
            rows = sum(kept.rows for kept in self.cut.values())
            out.append(f"{rows:,} conversations were cut before an unusable turn: {self.told(self.cut, place)}")
        if self.malformed:
            kept = {"with thinking tags that do not pair": self.malformed}
            out.append(f"answers kept as text: {self.told(kept, place)}")
        return out

    def summary(self, rows: int) -> dict[str, Any]:
        """What the manifest holds of the `rows` rows of a source."""
        return {
            "rows": rows,
            "rows_used": sum(self.used.values()),
            "rows_dropped": self.dropped_rows,
            "rows_filtered": self.filtered,
            "rows_not_needed": self.not_needed,
            "rows_not_reached": rows - self.looked_at,
            "rows_cut": sum(kept.rows for kept in self.cut.values()),
            "rows_malformed": self.malformed.rows if self.malformed else 0,
            "dropped": {reason: asdict(kept) for reason, kept in self.dropped.items()},
            "cut": {reason: asdict(kept) for reason, kept in self.cut.items()},
        }


def _count(reasons: dict[str, Kept], note: Note, row: int) -> None:
    kept = reasons.setdefault(note.reason, Kept(0, row, note.found))
    kept.rows += 1
