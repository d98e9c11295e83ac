"""The sample stage: documents of each source -> contexts of `context_size` tokens, shuffled.

Documents are taken in a random order, joined, and cut; a context has one source, and one stratum of it. Held-out
documents fill contexts of their own. Contexts are then shuffled across sources, so that whatever reads the first part
of them reads the same mixture. Tokens wait in scratch files between the two passes: memory stays flat, disk is twice
the result for a while, and an interrupted run goes on from there. Tokenizing is 94% of the CPU time; it runs on all
cores while the next documents are read and the last ones packed.

    contexts/zarr.json                       attributes: names of the sources, context_size, seed, bos, strata
    contexts/<split>/tokens    u4 (contexts, context_size)     split = train | holdout
    contexts/<split>/document  u4 (contexts, context_size)     row of the source's data set
    contexts/<split>/source    u1 (contexts,)                  index into the sources
    contexts/<split>/stratum   u2 (contexts,)                  index into the strata, where a source has some
"""

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from harvest.config import ModelConfig, SampleConfig
from harvest.contexts import NO_STRATUM, SPLITS, write_checksums
from harvest.disk import check_room_for_contexts
from harvest.documents import DocumentTokenizer
from harvest.packing import PackedSource
from harvest.progress import Progress
from harvest.sources import unpacked_bytes
from harvest.tokenizer import embedding_rows, load_whole_tokenizer


def run(
    model: ModelConfig,
    model_commit: str | None,
    config: SampleConfig,
    identities: tuple[str, ...],
    directory: Path,
    begin: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write `directory/contexts` and return the summary. `identities` are what the fingerprint holds of the sources.

    Raises UserError for data that cannot be had, lacks columns, is too little for the budget, mostly unusable, or not
    what the fingerprint names.
    """
    begin({name: version(name) for name in ("tokenizers", "datasets")})
    _say_what_is_used(config)
    where = (model, model_commit, config.runtime.offline)
    tokenizer = DocumentTokenizer(load_whole_tokenizer(*where), config, embedding_rows(*where))
    for line in tokenizer.notes():
        print(f"sample: {line}")
    scratch = directory / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    tokens = sum(config.shards(split) * config.shard_rows for split in SPLITS)
    check_room_for_contexts(directory, tokens, unpacked_bytes(config.sources))
    contexts = {split: contexts_by_source(config, split) for split in SPLITS}
    # All are opened before the first is packed: a column that is missing in the last is not found after hours.
    sources = [
        PackedSource(i, config, tokenizer, identity, {split: contexts[split][i] for split in SPLITS}, scratch)
        for i, identity in enumerate(identities)
    ]
    lanes = [lane for source in sources for lane in source.lanes]
    total, done = sum(lane.room for lane in lanes), sum(lane.filled for lane in lanes)
    with Progress("sample", total, "tokens", start=done, path=directory / "progress.json") as progress:
        for source in sources:
            source.pack(progress)
    _write(config, tokenizer, sources, directory / "contexts")
    write_checksums(directory / "contexts")
    shutil.rmtree(scratch)
    for line in tokenizer.counted():
        print(f"sample: {line}")
    for source in sources:
        source.say()
    shards = {split: config.shards(split) for split in SPLITS}
    return {"shards": shards, "bos": tokenizer.bos} | {source.name: source.summary() for source in sources}


def _say_what_is_used(config: SampleConfig) -> None:
    for split in SPLITS:
        asked = config.train_tokens if split == "train" else config.holdout_tokens
        used = config.shards(split) * config.shard_rows
        if used != asked:
            shards = f"{config.shards(split)} whole shards of {config.shard_rows:,}"
            print(f"sample.{split}_tokens: {asked:,} is no whole number of shards; {used:,} are used ({shards})")
    given = [source.name for source in config.sources if source.rows == "tokens"]
    settings = [name for name in ("template", "bos") if getattr(config, name, None) not in (None, "auto")]
    if given and settings:
        are = "are" if len(settings) > 1 else "is"
        names = ", ".join(f"sample.{name}" for name in settings)
        print(f"{names}: {are} not applied to {', '.join(given)}: token ids (`rows: tokens`) are taken as they are")


def contexts_by_source(config: SampleConfig, split: str) -> list[int]:
    """Contexts that each source gives to a split: its share, remainders to the largest fractions."""
    total = config.shards(split) * config.shard_contexts
    exact = [source.share * total for source in config.sources]
    counts = [int(e + 1e-9) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _write(config: SampleConfig, tokenizer: DocumentTokenizer, sources: list[PackedSource], path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    strata = [{"source": source.name, "value": value} for source in sources for value in source.strata]
    first_strata = np.cumsum([0, *(len(source.strata) for source in sources)])
    size, step = config.context_size, config.shard_contexts
    attributes: dict[str, Any] = {
        "schema": 1,
        "sources": [source.name for source in sources],
        "context_size": size,
        "seed": config.seed,
        "bos": tokenizer.bos,
    }
    root = zarr.create_group(str(path), attributes=attributes | ({"strata": strata} if strata else {}))
    names = {"tokens": "uint32", "document": "uint32", "source": "uint8"} | ({"stratum": "uint16"} if strata else {})
    for number, split in enumerate(SPLITS):
        group = root.create_group(split)
        origin = [(i, k) for i, source in enumerate(sources) for k in range(source.contexts[split])]
        order = np.random.default_rng([config.seed, len(sources) + number]).permutation(len(origin))
        arrays = {
            name: group.create_array(
                name,
                shape=(len(origin), size)[: 1 + (dtype == "uint32")],
                chunks=(step, size)[: 1 + (dtype == "uint32")],
                dtype=dtype,
                compressors=[Crc32cCodec()],
                config={"write_empty_chunks": True},
            )
            for name, dtype in names.items()
        }
        for start in range(0, len(order), step):
            chosen = [origin[k] for k in order[start : start + step]]
            tokens, documents = zip(*(sources[i].context(split, k) for i, k in chosen), strict=True)
            found = [sources[i].stratum(split, k) for i, k in chosen]
            values = {
                "tokens": tokens,
                "document": documents,
                "source": [i for i, _ in chosen],
                "stratum": [
                    NO_STRATUM if own is None else first_strata[i] + own
                    for (i, _), own in zip(chosen, found, strict=True)
                ],
            }
            for name, array in arrays.items():
                array[start : start + step] = np.array(values[name], array.dtype)
