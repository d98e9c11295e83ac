"""The sample stage: documents of each source -> contexts of `context_size` tokens, shuffled.

Documents are taken in a random order, joined, and cut; a context has one source. Held-out documents
fill contexts of their own. Contexts are then shuffled across sources, so that whatever reads the
first part of them reads the same mixture. Tokens wait in scratch files between the two passes:
memory stays flat, disk is twice the result for a while, and an interrupted run goes on from there.

Tokenizing is nearly all of the work (94% of the CPU time, measured with SmolLM2's tokenizer). `tokenizers`
does it on all cores, without Python's lock, while the next documents are read and the last ones packed;
neither the number of cores nor an interruption changes a token.

    contexts/zarr.json                       attributes: names of the sources, context_size, seed
    contexts/<split>/tokens    u4 (contexts, context_size)     split = train | holdout
    contexts/<split>/document  u4 (contexts, context_size)     row of the source's data set
    contexts/<split>/source    u1 (contexts,)                  index into the sources
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from harvest.config import ModelConfig, SampleConfig, Source
from harvest.contexts import SPLITS, write_checksums
from harvest.conversations import COLUMNS, check_columns, document_key, is_held_out, turns
from harvest.disk import check_room_for_contexts
from harvest.documents import DocumentTokenizer, load_document_tokenizer
from harvest.files import UserError, read_json, write_json
from harvest.progress import Progress
from harvest.sources import open_source
from harvest.templates import Segment

DOCUMENTS_AT_ONCE = 512
SAVE_SECONDS = 30.0  # between records of how far it is


class Packed(NamedTuple):
    """Contexts of one source and split, still in scratch files, and what it took to fill them."""

    tokens: np.memmap
    documents: np.memmap


def run(
    model: ModelConfig,
    model_commit: str | None,
    config: SampleConfig,
    source_commits: list[str | None],
    directory: Path,
    begin: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write `directory/contexts` and return the summary.

    Raises UserError for data that cannot be had, lacks columns, or is too little for the budget.
    """
    begin({name: version(name) for name in ("tokenizers", "datasets")})
    for split in SPLITS:
        asked = config.train_tokens if split == "train" else config.holdout_tokens
        used = config.shards(split) * config.shard_rows
        if used != asked:
            shards = f"{config.shards(split)} whole shards of {config.shard_rows:,}"
            print(f"sample.{split}_tokens: {asked:,} is no whole number of shards; {used:,} are used ({shards})")
    tokenizer = load_document_tokenizer(model, model_commit, config)
    for line in tokenizer.notes():
        print(f"sample: {line}")
    scratch = directory / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    check_room_for_contexts(directory, sum(config.shards(split) * config.shard_rows for split in SPLITS))
    contexts = {split: contexts_by_source(config, split) for split in SPLITS}
    packed: list[dict[str, Packed]] = []
    summary: dict[str, Any] = {"shards": {split: config.shards(split) for split in SPLITS}, "bos": tokenizer.bos}
    total = sum(sum(counts) for counts in contexts.values()) * config.context_size
    states = [Packing.at(scratch / f"{i}.json") for i in range(len(config.sources))]
    done = sum(sum(state.filled.values()) for state in states)
    with Progress("sample", total, "tokens", start=done, path=directory / "progress.json") as progress:
        for i, (source, commit) in enumerate(zip(config.sources, source_commits, strict=True)):
            wanted = {split: contexts[split][i] for split in SPLITS}
            files, used_documents = _pack(i, source, commit, config, tokenizer, wanted, states[i], scratch, progress)
            packed.append(files)
            summary[source.name] = used_documents | {f"{s}_contexts": wanted[s] for s in SPLITS}
    for line in tokenizer.counted():
        print(f"sample: {line}")
    _write(config, tokenizer.bos, packed, directory / "contexts")
    write_checksums(directory / "contexts")
    shutil.rmtree(scratch)
    return summary


def contexts_by_source(config: SampleConfig, split: str) -> list[int]:
    """Contexts that each source gives to a split: its share, remainders to the largest fractions."""
    total = config.shards(split) * config.shard_contexts
    exact = [source.share * total for source in config.sources]
    counts = [int(e + 1e-9) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _pack(
    index: int,
    source: Source,
    commit: str | None,
    config: SampleConfig,
    tokenizer: DocumentTokenizer,
    wanted: dict[str, int],
    state: "Packing",
    scratch: Path,
    progress: Progress,
) -> tuple[dict[str, Packed], dict[str, int]]:
    size, record = config.context_size, scratch / f"{index}.json"
    packed = {
        split: Packed(*(_scratch(scratch / f"{index}-{split}-{name}", count * size) for name in Packed._fields))
        for split, count in wanted.items()
        if count
    }
    filled, used = state.filled, state.used
    saved, end = time.monotonic(), state.start

    def save(start: int) -> None:
        for array in (array for files in packed.values() for array in files):
            array.flush()
        write_json(record, state._replace(start=start, unusable=unusable)._asdict())

    room = {split: count * size for split, count in wanted.items()}
    unusable = state.unusable
    for end, documents, without in _tokenized(index, source, commit, config, tokenizer, room, filled, state.start):
        unusable += without
        for split, row, tokens in documents:
            start = filled[split]
            tokens = tokens[: room[split] - start]
            if len(tokens):
                packed[split].tokens[start : start + len(tokens)] = tokens
                packed[split].documents[start : start + len(tokens)] = row
                filled[split] += len(tokens)
                used[split] += 1
                progress.advance(len(tokens), f"{source.name} ({split})")
        if time.monotonic() - saved > SAVE_SECONDS:
            save(end)
            saved = time.monotonic()
    for split in SPLITS:
        if filled[split] < room[split]:
            fraction = "raise" if split == "holdout" else "lower"
            share = f" or the share of {source.name}" if len(config.sources) > 1 else ""
            columns = f"{', '.join(COLUMNS[source.rows])} (`rows: {source.rows}`)"
            empty = f". {unusable:,} of {end:,} rows hold nothing usable in {columns}" if unusable else ""
            raise UserError(
                f"sample.{split}_tokens: source {source.name!r} has {filled[split]:,} tokens for the {split} split "
                f"and its share is {room[split]:,}; lower sample.{split}_tokens{share}, "
                f"{fraction} sample.holdout_fraction ({config.holdout_fraction:g}), or add text{empty}"
            )
    save(end)
    return packed, {f"{split}_documents": used[split] for split in SPLITS}


class Packing(NamedTuple):
    """How far a source is packed, as `scratch/<source>.json` has it."""

    start: int  # documents, in their random order, that are wholly in the scratch files or were left out
    filled: dict[str, int]  # tokens by split
    used: dict[str, int]  # documents by split
    unusable: int = 0  # rows that hold no document

    @classmethod
    def at(cls, path: Path) -> "Packing":
        """What was recorded in a file; the start where there is none."""
        return cls(**read_json(path)) if path.exists() else cls(0, dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0))


def _scratch(path: Path, size: int) -> np.memmap:
    """A file of so many uint32 as an array; allocated now, as a full disk would kill a sparse one with SIGBUS."""
    with path.open("ab") as file:
        before = file.tell()
        try:
            os.posix_fallocate(file.fileno(), 0, 4 * size)
        except OSError as error:
            file.truncate(before)  # some file systems keep what they could give
            error.filename = str(path)
            raise
    return np.memmap(path, np.uint32, "r+", shape=(size,))


class Document(NamedTuple):
    """Tokens of one row of a source's data set, uint32."""

    split: str
    row: int  # of the source's data set
    tokens: np.ndarray


class Batch(NamedTuple):
    """What some rows of a data set gave."""

    end: int  # documents, in their random order, up to here
    documents: list[Document]
    without: int  # rows that hold no document


def _tokenized(
    index: int,
    source: Source,
    commit: str | None,
    config: SampleConfig,
    tokenizer: DocumentTokenizer,
    room: dict[str, int],
    filled: dict[str, int],
    start: int,
) -> Iterator[Batch]:
    """Batches of documents in random order, from `start` on, for splits that are not full.

    One batch is tokenized while the one before is packed.
    """
    data = open_source(source, commit, config.runtime.offline)
    check_columns(source.rows, data.column_names, source.name)
    order = np.random.default_rng([config.seed, index]).permutation(len(data))

    def chosen(first: int) -> tuple[list[tuple[str, int, list[Segment]]], int]:
        numbers = order[first : first + DOCUMENTS_AT_ONCE]
        out, unusable = [], 0
        for number, row in zip(numbers.tolist(), _rows(data, numbers, source), strict=True):
            document = turns(source.rows, row)
            if document is None:
                unusable += 1
                continue
            split = SPLITS[is_held_out(document_key(document), config.seed, config.holdout_fraction)]
            if filled[split] < room[split]:
                out.append((split, number, tokenizer.compose(document)))
        return out, unusable

    def encoded(end: int, documents: list[tuple[str, int, list[Segment]]], without: int) -> Batch:
        ids = tokenizer.encode([segments for _, _, segments in documents])
        rows = [Document(split, row, tokens) for (split, row, _), tokens in zip(documents, ids, strict=True)]
        return Batch(end, rows, without)

    with ThreadPoolExecutor(1, "tokenizer") as thread:
        ahead: Future[Batch] | None = None
        for first in range(start, len(order), DOCUMENTS_AT_ONCE):
            if all(filled[split] >= room[split] for split in SPLITS):
                return
            task = thread.submit(encoded, min(first + DOCUMENTS_AT_ONCE, len(order)), *chosen(first))
            if ahead:
                yield ahead.result()
            ahead = task
        if ahead:
            yield ahead.result()


def _rows(data: Any, numbers: np.ndarray, source: Source) -> list[dict[str, Any]]:
    try:
        columns = data[numbers]
    except UnicodeDecodeError as error:
        if len(numbers) > 1:  # which one
            return [row for number in numbers for row in _rows(data, numbers[numbers == number], source)]
        raise UserError(
            f"sample.sources ({source.name}).path: {source.path!r}: row {numbers[0]}: not UTF-8 text ({error.reason}); "
            "mend it or leave it out"
        ) from None
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _write(config: SampleConfig, bos: str, packed: list[dict[str, Packed]], path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    root = zarr.create_group(
        str(path),
        attributes={
            "schema": 1,
            "sources": [source.name for source in config.sources],
            "context_size": config.context_size,
            "seed": config.seed,
            "bos": bos,
        },
    )
    size, step = config.context_size, config.shard_contexts
    for number, split in enumerate(SPLITS):
        group = root.create_group(split)
        origin = [
            (i, k) for i, files in enumerate(packed) if split in files for k in range(len(files[split].tokens) // size)
        ]
        order = np.random.default_rng([config.seed, len(config.sources) + number]).permutation(len(origin))
        names = {"tokens": "uint32", "document": "uint32", "source": "uint8"}
        arrays = {
            name: group.create_array(
                name,
                shape=(len(origin), size) if name != "source" else (len(origin),),
                chunks=(step, size) if name != "source" else (step,),
                dtype=dtype,
                compressors=[Crc32cCodec()],
                config={"write_empty_chunks": True},
            )
            for name, dtype in names.items()
        }
        for start in range(0, len(order), step):
            chosen = [origin[k] for k in order[start : start + step]]
            rows = slice(start, start + step)
            for name, field in (("tokens", "tokens"), ("document", "documents")):
                parts = [getattr(packed[i][split], field)[k * size : (k + 1) * size] for i, k in chosen]
                arrays[name][rows] = np.stack(parts)
            arrays["source"][rows] = np.array([i for i, _ in chosen], np.uint8)
