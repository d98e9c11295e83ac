"""What became of the rows of a source: used, dropped and why, filtered, not needed, not reached; all rows in sum."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harvest.contexts import SPLITS
from harvest.conversations import Note, Reading

WARN_SHARE, STOP_SHARE = 0.01, 0.5  # of the rows that were read
SURE = 4  # standard deviations by which a part of the rows has to exceed STOP_SHARE
ENOUGH_ROWS = 500  # to judge the others by
MOST_REASONS = 5  # in one message
# Reason -> the number of `rows`, the first `row` and what was `found` in it.
Reasons = dict[str, dict[str, Any]]


@dataclass
class RowCounts:
    """Rows of one source, in the order in which they were looked at."""

    used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # by split
    filtered: int = 0  # by `where`
    not_needed: int = 0  # usable, but the split or the stratum was full
    dropped: Reasons = field(default_factory=dict)
    cut: Reasons = field(default_factory=dict)  # used, but for the turns from an unusable one on
    malformed: Reasons = field(default_factory=dict)  # used, with thinking tags that do not pair

    def drop(self, note: Note, row: int) -> None:
        """Count a row that cannot be used."""
        _count(self.dropped, note, row)

    def use(self, split: str, row: int, reading: Reading) -> None:
        """Count a row that gave tokens."""
        self.used[split] += 1
        if reading.cut:
            _count(self.cut, reading.cut, row)
        if reading.malformed:
            _count(self.malformed, Note("with thinking tags that do not pair"), row)

    @property
    def dropped_rows(self) -> int:
        """Rows dropped for any reason."""
        return _rows(self.dropped)

    @property
    def read(self) -> int:
        """Rows that were read as documents; those that are filtered are not meant to be."""
        return sum(self.used.values()) + self.not_needed + self.dropped_rows

    def stops(self, *, all_read: bool) -> bool:
        """Whether more rows are dropped than used; of a part of them, in random order, when that is beyond doubt."""
        surely = 0 if all_read else SURE * math.sqrt(self.read * STOP_SHARE * (1 - STOP_SHARE))
        return self.dropped_rows - STOP_SHARE * self.read > surely and (all_read or self.read >= ENOUGH_ROWS)

    def why(self, place: Callable[[int], str], reasons: Reasons | None = None) -> str:
        """Why rows were dropped, or other reasons, the most frequent first, each with an example at its `place`."""
        reasons = self.dropped if reasons is None else reasons
        ordered = sorted(reasons.items(), key=lambda item: -item[1]["rows"])
        parts = [
            f"{of['rows']:,} {reason} (as {place(of['row'])}{': ' + repr(of['found']) if of['found'] else ''})"
            for reason, of in ordered[:MOST_REASONS]
        ]
        rest = _rows(dict(ordered[MOST_REASONS:]))
        return ", ".join(parts) + (f", {rest:,} for other reasons" if rest else "")

    def lines(self, place: Callable[[int], str]) -> list[str]:
        """What is to be said of rows that were not used, or not as they are."""
        out = []
        if self.dropped:
            warning = "warning: " if self.dropped_rows > WARN_SHARE * self.read else ""
            out.append(f"{warning}{self.dropped_rows:,} of {self.read:,} rows read were dropped: {self.why(place)}")
        if self.cut:
            cut = self.why(place, self.cut)
            out.append(f"{_rows(self.cut):,} conversations were cut before an unusable turn: {cut}")
        if self.malformed:
            out.append(f"answers kept as text: {self.why(place, self.malformed)}")
        return out

    def summary(self, rows: int) -> dict[str, Any]:
        """What the manifest holds of the `rows` rows of a source."""
        return {
            "rows": rows,
            "rows_used": sum(self.used.values()),
            "rows_dropped": self.dropped_rows,
            "rows_filtered": self.filtered,
            "rows_not_needed": self.not_needed,
            "rows_not_reached": rows - self.read - self.filtered,
            "rows_cut": _rows(self.cut),
            "rows_malformed": _rows(self.malformed),
            "dropped": self.dropped,
            "cut": self.cut,
        }


def _count(reasons: Reasons, note: Note, row: int) -> None:
    reasons.setdefault(note.reason, {"rows": 0, "row": row, "found": note.found})["rows"] += 1


def _rows(reasons: Reasons) -> int:
    return sum(of["rows"] for of in reasons.values())
