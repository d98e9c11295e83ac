"""One source of text -> its contexts in scratch files: rows in a random order, read, tokenized, and put in place.

What becomes of a row is decided where its tokens are put in place, in the order of the rows, and recorded with the
place: an interruption changes neither a token nor a count. Documents of a lane (a split, and a stratum of the source)
are laid end to end and cut into contexts. A row of token ids that fills whole contexts keeps them to itself, so that
text which was packed elsewhere stays as it was packed.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harvest.config import SampleConfig
from harvest.contexts import SPLITS
from harvest.conversations import COLUMNS, Note, Reading, is_held_out, read_row
from harvest.documents import DocumentTokenizer
from harvest.files import UserError, read_json, write_json
from harvest.hub import resolved_commit
from harvest.opened_file import ChangedError
from harvest.progress import Progress
from harvest.row_counts import RowCounts
from harvest.rows import Row
from harvest.sources import Choice, open_source
from harvest.templates import Refused, Segment

DOCUMENTS_AT_ONCE = 512
SAVE_SECONDS = 30.0  # between records of how far it is
MOST_NAMES = 5  # of files, in one message


class Packed(NamedTuple):
    """Contexts of one source and split in scratch files, uint32 (contexts * width,) each."""

    tokens: np.memmap
    documents: np.memmap


class Lane:
    """The contexts of a split and a stratum, `width` tokens each, in the order in which they fill.

    `base` is the place of the first in the split's scratch files; `begun` is what a record holds of a lane.
    """

    def __init__(self, split: str, base: int, contexts: int, width: int, begun: list[int] | None = None) -> None:
        self.split, self.base, self.width, self.room = split, base, width, contexts * width
        # Tokens of contexts that are begun, and where the next token of a document goes: past the end of a whole
        # context, that is at a multiple of the width, a new one is begun.
        self.taken, self.at = begun or (0, 0)

    @property
    def filled(self) -> int:
        """Tokens that are in place."""
        return self.taken - (-self.at % self.width)

    @property
    def is_full(self) -> bool:
        """Whether there is no room left."""
        return self.filled == self.room

    def place(self, count: int, *, whole: bool) -> list[slice]:
        """Where so many tokens of a document go; fewer, once the lane is full. `whole` ones begin a context."""
        free = self.room - self.taken
        if whole and count % self.width == 0 and free:
            start, self.taken = self.taken, self.taken + min(count, free)
            return [slice(self.base + start, self.base + self.taken)]
        begun = min(count, -self.at % self.width)
        places = [slice(self.base + self.at, self.base + self.at + begun)] if begun else []
        self.at += begun
        if rest := min(count - begun, free):
            self.at = self.taken + rest
            places.append(slice(self.base + self.taken, self.base + self.at))
            self.taken += -(-rest // self.width) * self.width
        return places


class Candidate(NamedTuple):
    """A row on its way into a lane, or out."""

    row: int  # of the source's data set
    note: Note | None = None  # why it cannot be used
    lane: Lane | None = None  # None for a row that cannot be read, or that `where` filters out (without a note)
    reading: Reading = Reading([])
    segments: list[Segment] | None = None  # of what has to be tokenized; None where the lane was full before
    tokens: np.ndarray | None = None  # uint32 (tokens,)


class PackedSource:
    """A source while it is packed, and its contexts afterwards.

    Raises UserError, as `open_source` does, when it cannot be read, when it is not the content of `identity`, and when
    its strata cannot have equal parts of `contexts`, its contexts by split.
    """

    def __init__(
        self,
        index: int,
        config: SampleConfig,
        tokenizer: DocumentTokenizer,
        identity: str,
        contexts: dict[str, int],
        scratch: Path,
    ) -> None:
        self.source, self.contexts = config.sources[index], contexts
        self.name, self.setting = self.source.name, f"sample.sources.{index} ({self.source.name})"
        self._index, self._config, self._tokenizer = index, config, tokenizer
        self._record = scratch / f"{index}.json"
        self._opened = open_source(self.source, resolved_commit(identity), config.runtime.offline, scratch)
        if self._opened.content not in (None, identity):
            raise ChangedError(
                f"{self.setting}.path: {self.source.path!r}: changed after its content was hashed for the fingerprint; "
                "the same command again takes what is there now"
            )
        self._choice = Choice(self.source, self._opened.rows, self.setting)
        self.strata = self._choice.strata
        self._check_strata()
        # Where each context begins with BOS, the rest of it is the documents'; token ids are taken as they are.
        self._bos = tokenizer.bos == "context" and self.source.rows != "tokens"
        self._width = config.context_size - self._bos
        begun: dict[str, Any] = {"start": 0, "counts": {}, "lanes": {}}
        if self._record.exists():
            begun = read_json(self._record)
        self._start, self.counts = begun["start"], RowCounts(**begun["counts"])
        self._lanes = {split: self._new_lanes(split, begun["lanes"].get(split)) for split in contexts}
        self._files = {
            split: Packed(
                *(_scratch_file(scratch / f"{index}-{split}-{n}", count * self._width) for n in Packed._fields)
            )
            for split, count in contexts.items()
            if count
        }

    def _new_lanes(self, split: str, begun: list[list[int]] | None) -> list[Lane]:
        """One lane, or equal parts of the split's contexts for each stratum, the first ones one more."""
        strata, base, found = len(self.strata) or 1, 0, []
        for number in range(strata):
            contexts = self.contexts[split] // strata + (number < self.contexts[split] % strata)
            found.append(Lane(split, base, contexts, self._width, begun[number] if begun else None))
            base += found[-1].room
        return found

    @property
    def lanes(self) -> list[Lane]:
        """Those of both splits."""
        return [lane for split in SPLITS for lane in self._lanes[split]]

    def context(self, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and documents of a context, uint32 (context_size,) each, in the order in which they filled."""
        place = slice(number * self._width, (number + 1) * self._width)
        tokens, documents = (array[place] for array in self._files[split])
        if self._bos:
            bos = np.array([self._tokenizer.bos_id], np.uint32)
            return np.concatenate([bos, tokens]), np.concatenate([documents[:1], documents])
        return tokens, documents

    def stratum(self, split: str, number: int) -> int | None:
        """The stratum of a context; None where the source has none."""
        bases = [lane.base for lane in self._lanes[split]]
        return int(np.searchsorted(bases, number * self._width, "right")) - 1 if self.strata else None

    def pack(self, progress: Progress) -> None:
        """Fill the lanes.

        Raises UserError when a row is damaged, when most of them cannot be used, when there is too little text, or when
        a file changes meanwhile.
        """
        saved, end = time.monotonic(), self._start
        for end, candidates in self._tokenized():
            for candidate in candidates:
                if all(lane.is_full for lane in self.lanes):
                    break
                self._put(candidate, progress)
            self._check_dropped(all_read=False)
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save(end)
                saved = time.monotonic()
        self._check_dropped(all_read=True)
        self._check_filled()
        self._save(end)

    def summary(self) -> dict[str, Any]:
        """What the manifest holds of the source."""
        documents = {f"{split}_documents": self.counts.used[split] for split in SPLITS}
        contexts = {f"{split}_contexts": self.contexts[split] for split in SPLITS}
        return documents | contexts | self.counts.summary(len(self._opened.rows))

    def say(self) -> None:
        """Print what was not used as it is, and what lies beside the files and was not read."""
        if self._opened.passed_over:
            root = Path(self.source.path).expanduser()
            names = [str(p.relative_to(root)) if p.is_relative_to(root) else p.name for p in self._opened.passed_over]
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            print(f"{self.setting}: passed over: {', '.join(names[:MOST_NAMES])}{more}")
        for line in self.counts.lines(self._opened.rows.place):
            print(f"{self.setting}: {line}")

    def _tokenized(self) -> Iterator[tuple[int, list[Candidate]]]:
        """Candidates in random order, from the start on, and the number of rows up to them.

        One batch is tokenized while the one before is packed.
        """
        order = np.random.default_rng([self._config.seed, self._index]).permutation(len(self._opened.rows))
        with ThreadPoolExecutor(1, "tokenizer") as thread:
            ahead: Future[tuple[int, list[Candidate]]] | None = None
            for first in range(self._start, len(order), DOCUMENTS_AT_ONCE):
                if all(lane.is_full for lane in self.lanes):
                    return
                numbers = order[first : first + DOCUMENTS_AT_ONCE].tolist()
                task = thread.submit(self._encoded, first + len(numbers), self._candidates(numbers))
                if ahead:
                    yield ahead.result()
                ahead = task
            if ahead:
                yield ahead.result()

    def _candidates(self, numbers: list[int]) -> list[Candidate]:
        rows = self._opened.rows.take(numbers, self._opened.columns)
        return [self._candidate(number, row) for number, row in zip(numbers, rows, strict=True)]

    def _candidate(self, number: int, row: Row) -> Candidate:
        if not isinstance(row, dict):
            return Candidate(number, Note(row.reason, damaged=True))
        if not self._choice.takes(row):
            return Candidate(number)
        reading = read_row(self.source.rows, row)
        stratum = self._choice.stratum(row)
        if reading.dropped or stratum is None:
            return Candidate(number, reading.dropped or Note(f"no value in {self.source.strata}"))
        split = SPLITS[is_held_out(reading.key, self._config.seed, self._config.holdout_fraction)]
        found = Candidate(number, None, self._lanes[split][stratum], reading, tokens=reading.ids)
        if self._lanes[split][stratum].is_full or reading.ids is not None:
            return found
        try:
            return found._replace(segments=self._tokenizer.compose(reading.turns))
        except Refused as error:
            return found._replace(note=Note(str(error)))

    def _encoded(self, end: int, candidates: list[Candidate]) -> tuple[int, list[Candidate]]:
        tokens = iter(self._tokenizer.encode([c.segments for c in candidates if c.segments is not None]))
        return end, [c if c.segments is None else c._replace(tokens=next(tokens)) for c in candidates]

    def _put(self, candidate: Candidate, progress: Progress) -> None:
        """Count a row, and put its tokens in place where they are needed."""
        row, note, lane, reading, _, tokens = candidate
        if lane is None and note is None:
            self.counts.filtered += 1
        elif lane and lane.is_full:
            self.counts.not_needed += 1
        elif note and note.damaged and self.source.drop == "few":
            raise UserError(
                f"{self.setting}.path: {self._opened.rows.place(row)}: {note.reason}; mend it, or leave such rows out "
                f"with sample.sources.{self._index}.drop: any"
            )
        elif note or lane is None or tokens is None or not len(tokens):
            self.counts.drop(note or Note("no token"), row)
        else:
            if reading.ids is not None and (largest := int(tokens.max())) >= self._tokenizer.known_ids:
                raise UserError(
                    f"{self.setting}.rows: {self._opened.rows.place(row)}: the token id {largest:,} is beyond the "
                    f"vocabulary of model.name, which ends at {self._tokenizer.known_ids - 1:,}; the set is another "
                    "tokenizer's"
                )
            files, start = self._files[lane.split], 0
            for place in lane.place(len(tokens), whole=reading.ids is not None):
                count = place.stop - place.start
                files.tokens[place] = tokens[start : start + count]
                files.documents[place] = row
                start += count
            self.counts.use(lane.split, row, reading)
            progress.advance(start, f"{self.name} ({lane.split})")

    def _check_strata(self) -> None:
        for split, count in self.contexts.items():
            if self.strata and count < len(self.strata):
                raise UserError(
                    f"sample.{split}_tokens: source {self.name!r} gets {count:,} contexts of the {split} split, and "
                    f"its {len(self.strata):,} strata ({self.source.strata}) need one each; raise sample.{split}_tokens"
                )

    def _check_dropped(self, *, all_read: bool) -> None:
        counts = self.counts
        if self.source.drop == "few" and counts.stops(all_read=all_read):
            raise UserError(
                f"{self.setting}.rows: {self.source.rows!r}: {counts.dropped_rows:,} of {counts.read:,} rows hold "
                f"nothing usable in {', '.join(COLUMNS[self.source.rows])}: {counts.why(self._opened.rows.place)}; "
                f"choose the schema that fits, or go on without them with sample.sources.{self._index}.drop: any"
            )

    def _check_filled(self) -> None:
        """Raise UserError for a split, or a stratum of it, that has too little text."""
        if self.counts.filtered == len(self._opened.rows):
            raise self._choice.none_taken()
        lane = next((lane for lane in self.lanes if not lane.is_full), None)
        if lane is None:
            return
        split, fraction = lane.split, "raise" if lane.split == "holdout" else "lower"
        value = f", {self.source.strata} = {self.strata[self._lanes[split].index(lane)]!r}," if self.strata else ""
        share = f" or the share of {self.name}" if len(self._config.sources) > 1 else ""
        lost = "".join(f". {line}" for line in self.counts.lines(self._opened.rows.place))
        lost += f". {self.counts.filtered:,} rows are not those of `where`" if self.counts.filtered else ""
        raise UserError(
            f"sample.{split}_tokens: source {self.name!r}{value} has {lane.filled:,} tokens for the {split} "
            f"split and its share is {lane.room:,}; lower sample.{split}_tokens{share}, {fraction} "
            f"sample.holdout_fraction ({self._config.holdout_fraction:g}), or add text{lost}"
        )

    def _save(self, end: int) -> None:
        """Record how far it is, once it is known that what was read is what was hashed."""
        for file in self._opened.rows.files:
            file.check()
        for array in (array for files in self._files.values() for array in files):
            array.flush()
        states = {split: [[lane.taken, lane.at] for lane in own] for split, own in self._lanes.items()}
        write_json(self._record, {"start": end, "lanes": states, "counts": asdict(self.counts)})


def _scratch_file(path: Path, size: int) -> np.memmap:
    """A file of so many uint32 as an array (size,). Allocated now: a full disk would kill a sparse one with SIGBUS."""
    with path.open("ab") as file:
        before = file.tell()
        try:
            os.posix_fallocate(file.fileno(), 0, 4 * size)
        except OSError as error:
            file.truncate(before)  # some file systems keep what they could give
            error.filename = str(path)
            raise
    return np.memmap(path, np.uint32, "r+", shape=(size,))
