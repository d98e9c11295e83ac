"""The harvest stage: the model reads every context once, and its activations go into the store.

A shard is a pure function of the settings: its contexts go through the model in whole batches, in
order, and its rows are permuted by a generator seeded with (seed, split, shard). So neither kills nor
the number of workers change a byte.

Shape suffixes: C contexts of a shard, B those of a batch, S positions, D d_in.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harvest.activation_store import ActivationStore
from harvest.config import HarvestConfig, ModelConfig, SampleConfig
from harvest.contexts import Contexts
from harvest.device import local_device, numerics, resolve_device, resolve_dtype, set_threads
from harvest.disk import check_room
from harvest.files import UserError, enough_memory
from harvest.language_model import HookedModel, load_model
from harvest.products import widens
from harvest.progress import Progress
from harvest.shard_buffer import ShardBuffer
from harvest.stage_directory import Run
from harvest.store_files import LocalFiles, files_of
from harvest.store_layout import SPLITS, Geometry
from harvest.stream import STREAM
from harvest.workers import Shard, Workers, missing_text


class Harvest:
    """A model, the contexts that it reads and the store that it fills, as one worker sees them."""

    def __init__(
        self,
        model_config: ModelConfig,
        model_commit: str | None,
        sample: SampleConfig,
        config: HarvestConfig,
        sample_directory: Path,
        directory: Path,
        begin: Callable[[dict[str, Any]], None],
        splits: Sequence[str] = SPLITS,
    ) -> None:
        """`begin` is called with the numerics before the first byte is written; `splits` are all that the store has.

        Raises UserError for a model or hook that cannot be had.
        """
        self.directory, self.workers = directory, Workers.from_environment()
        self._batch_contexts, self._seed = config.batch_contexts, sample.seed
        device = local_device(resolve_device(config.runtime.device))
        dtype = resolve_dtype(config.compute_dtype, device)
        self._threads = set_threads(config.threads, device, hashed="harvest.threads")
        self.model = load_model(model_config, model_commit, config.hooks, dtype, device, offline=config.runtime.offline)
        settings: Any = self.model.model.config
        products = {"products": "float32, rounded"} if widens(device, dtype) else {}
        begin(numerics(device, dtype, attention=settings._attn_implementation, **products))  # SDPA where it has it
        self._contexts = Contexts(sample_directory / "contexts")
        shards = {s: self._contexts.count(s) // sample.shard_contexts if s in splits else 0 for s in SPLITS}
        geometry = Geometry(
            hooks=config.hooks,
            d_in=_width(self.model, config.hooks),
            context_size=sample.context_size,
            shard_contexts=sample.shard_contexts,
            chunk_rows=config.chunk_rows,
            train_shards=shards["train"],
            holdout_shards=shards["holdout"],
            stored=config.stored,
        )
        _compile(self.model, config, dtype, sample.context_size)
        begun = Run(directory).begun
        attributes = {"seed": sample.seed, "model": begun["inputs"]["model"], "fingerprint": directory.name}
        files = files_of(directory, config.runtime)
        self.store = ActivationStore.create(files, geometry, {**attributes, "numerics": begun["numerics"]})
        self.every = [Shard(split, n) for split in ("holdout", "train") for n in range(geometry.shards(split))]
        files.sweep(alone=False)

    def run(self) -> dict[str, Any] | None:
        """Write this worker's missing shards; the summary of the store once all workers' are there, else None.

        Raises UserError as `write_shards` does, and when the disk has no room.
        """
        (self.directory / STREAM).unlink(missing_ok=True)  # from here on the store is to be whole
        missing, share, rows = self.missing(), self.workers.share(self.every), self.store.geometry.shard_rows
        mine = [shard for shard in share if shard in missing]
        self.check_room(len(missing))
        path, quiet = self.directory / "progress.json", self.workers.rank > 0
        start, total = (len(share) - len(mine)) * rows, len(share) * rows
        with Progress("harvest", total, "tokens", start=start, path=path, quiet=quiet) as progress:
            self._make(mine, progress.advance)
        # Damaged and consumed shards have a record; only the last worker reads them all.
        if unrecorded := self._without(self.store.recorded_shards):
            print(missing_text(unrecorded, len(self.every), "at least "), flush=True)
            return None
        if missing := self.missing():
            print(missing_text(missing, len(self.every)), flush=True)
            return None
        self.store.files.sweep(alone=True)
        return store_summary(self.store)

    def make_share(
        self, shards: Sequence[Shard], advance: Callable[[int], None] | None, interrupted: Callable[[], bool]
    ) -> None:
        """Write this worker's part of shards, with a progress of its own where there is no `advance`.

        Begins no further shard once it is interrupted. Raises UserError as `write_shards` does.
        """
        mine = self.workers.share(shards)
        admitted = (shard for shard in mine if not interrupted())
        if advance:
            self._make(admitted, advance)
            return
        rows = len(mine) * self.store.geometry.shard_rows
        with Progress("harvest", rows, "tokens", quiet=self.workers.rank > 0) as progress:
            self._make(admitted, progress.advance)

    def _make(self, shards: Iterable[Shard], advance: Callable[[int], None]) -> None:
        threads = torch.get_num_threads()  # training sets its own
        torch.set_num_threads(self._threads)
        try:
            write_shards(self.model, self._contexts, self.store, shards, self._batch_contexts, self._seed, advance)
        finally:
            torch.set_num_threads(threads)

    def missing(self) -> list[Shard]:
        """The shards that are not in the store, held-out ones first."""
        return self._without(self.store.complete_shards)

    def _without(self, shards_of: Callable[[str], set[int]]) -> list[Shard]:
        there = {split: shards_of(split) for split in SPLITS}
        return [shard for shard in self.every if shard.number not in there[shard.split]]

    def check_room(self, shards: int) -> None:
        """Raise UserError when so many shards do not fit on the disk of a local store."""
        if isinstance(self.store.files, LocalFiles):
            check_room(self.directory, shards, self.store.geometry)


def _compile(model: HookedModel, config: HarvestConfig, dtype: torch.dtype, context_size: int) -> None:
    if config.compile:
        if widens(model.device, dtype):
            raise UserError(
                "harvest.compile: true: not with harvest.compute_dtype=bfloat16 on a CPU without bfloat16 "
                "instructions; set it to false, or compute_dtype to auto"
            )
        print("harvest: compiling the decoder layers", flush=True)
        with _memory_for("harvest.batch_contexts", config.batch_contexts, model.device):
            model.compile_layers(torch.zeros(config.batch_contexts, context_size, dtype=torch.long))


def write_shards(
    model: HookedModel,
    contexts: Contexts,
    store: ActivationStore,
    shards: Iterable[Shard],
    batch_contexts: int,
    seed: int,
    advance: Callable[[int], None],
) -> None:
    """Make and write shards; `advance` is called with the tokens of every batch.

    One shard is copied and written while the next is made. At most two are in memory: the forward pass stops for a
    slow disk, and for a failed write. Raises UserError for a NaN or infinity, and when memory is too small.
    """
    g = store.geometry
    with _memory_for("sample.shard_contexts", g.shard_contexts, model.device):
        buffers = [ShardBuffer(g, model.device) for _ in range(2)]
    writing: list[Future[None]] = []
    with ThreadPoolExecutor(1, "store-writer") as writer:
        for shard in shards:
            if len(writing) == len(buffers):
                writing.pop(0).result()
            buffer = buffers[0]
            buffers.reverse()
            tokens_CS = contexts.read(shard.split, "tokens", shard.number * g.shard_contexts, g.shard_contexts)
            on_device_CS = buffer.start(shard, tokens_CS, seed)
            for first in range(0, g.shard_contexts, batch_contexts):
                batch_BS = on_device_CS[first : first + batch_contexts]
                with _memory_for("harvest.batch_contexts", batch_contexts, model.device):
                    for hook, acts_BSD in model.activations(batch_BS).items():
                        buffer.put(first, hook, acts_BSD)
                for written in writing:
                    if written.done():
                        written.result()
                advance(batch_BS.numel())
            buffer.copy_to_host()
            writing.append(writer.submit(_write, store, shard, buffer))
        for written in writing:
            written.result()


def _write(store: ActivationStore, shard: Shard, buffer: ShardBuffer) -> None:
    store.write_shard(*shard, buffer.rows())


def _memory_for(setting: str, value: int, device: torch.device) -> AbstractContextManager[None]:
    """Turn an error of memory into one that names the setting to lower."""
    return enough_memory(
        f"{setting}: {value}: out of memory on {device}; lower it (it is part of the settings' fingerprint, as it "
        "changes last bits)"
    )


def _width(model: HookedModel, hooks: tuple[str, ...]) -> int:
    """d_in at the hooks, from a small batch.

    Raises UserError when a hook gives no row for each token, or hooks differ in width: one store has one d_in.
    """
    found = model.activations(torch.zeros(2, 3, dtype=torch.long))
    for hook in hooks:
        if found[hook].shape[:-1] != (2, 3):  # a layer of Gemma 3n or DeepSeek-V4 gives several streams
            raise UserError(
                f"harvest.hooks: {hook!r}: gives {tuple(found[hook].shape)} for 2 x 3 tokens, not a row for each; "
                "hook a layer, or a module in one, that does"
            )
    widths = {hook: acts.shape[-1] for hook, acts in found.items()}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{hook}: {width}" for hook, width in widths.items())
        raise UserError(f"harvest.hooks: hooks of different widths ({listed}); harvest them with settings of their own")
    return widths[hooks[0]]


def store_summary(store: ActivationStore) -> dict[str, Any]:
    """Rows of both splits, width, size in gigabytes, and mean norm at each hook, of the training rows if there are."""
    geometry = store.geometry
    records = {split: store.records(split) for split in SPLITS}
    summary: dict[str, Any] = {f"{split}_rows": len(records[split]) * geometry.shard_rows for split in SPLITS}
    summary["d_in"] = geometry.d_in
    summary["gigabytes"] = (
        sum(file["bytes"] for split in SPLITS for record in records[split] for file in record["files"].values()) / 1e9
    )
    for hook in geometry.hooks:
        summary[f"mean_norm {hook}"] = float(
            np.mean([r["norms"][hook]["mean_norm"] for r in records["train"] or records["holdout"]])
        )
    return summary
