"""The harvest stage: the model reads every context once, and its activations go into the store.

A shard is a pure function of the settings: its contexts go through the model in whole batches, in
order, and its rows are permuted by a generator seeded with (seed, split, shard). So neither kills nor
the number of workers change a byte. Held-out shards come first; training can then be checked while
the rest is being made.

Shape suffixes: C contexts of a shard, B those of a batch, S positions, D d_in.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harvest.activation_store import SPLITS, ActivationStore, Geometry
from harvest.config import HarvestConfig, ModelConfig, SampleConfig
from harvest.contexts import Contexts
from harvest.device import local_device, numerics, resolve_device, resolve_dtype, set_threads
from harvest.disk import check_room
from harvest.files import UserError, is_abandoned, is_out_of_memory, read_json
from harvest.language_model import HookedModel, load_model
from harvest.products import widens
from harvest.progress import Progress
from harvest.shard_buffer import ShardBuffer
from harvest.store_files import LocalFiles
from harvest.store_place import files_of
from harvest.stream import Room, finish, is_done, load_stream
from harvest.workers import Others, Shard, Workers, wait_until


def run(
    model_config: ModelConfig,
    model_commit: str | None,
    sample: SampleConfig,
    config: HarvestConfig,
    sample_directory: Path,
    directory: Path,
    begin: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write this worker's missing shards into the store; worker 0 waits for the rest and has the summary.

    The others return an empty one. Raises UserError for a model or hook that cannot be had, for a NaN or
    infinity in an activation, and on worker 0 when shards of others do not come.
    """
    workers = Workers.from_environment()
    device = local_device(resolve_device(config.runtime.device))
    dtype = resolve_dtype(config.compute_dtype, device)
    set_threads(config.threads, device, hashed="harvest.threads")
    model = load_model(model_config, model_commit, config.hooks, dtype, device, offline=config.runtime.offline)
    model_settings: Any = model.model.config
    products = {"products": "float32, rounded"} if widens(device, dtype) else {}
    begin(numerics(device, dtype, attention=model_settings._attn_implementation, **products))  # SDPA where it has it
    limit = getattr(model_settings.get_text_config(), "max_position_embeddings", None)
    if limit and sample.context_size > limit:
        raise UserError(f"sample.context_size: {sample.context_size}: the model has {limit} positions; lower it")
    contexts = Contexts(sample_directory / "contexts")
    geometry = Geometry(
        hooks=config.hooks,
        d_in=_width(model, config.hooks),
        context_size=sample.context_size,
        shard_contexts=sample.shard_contexts,
        chunk_rows=config.chunk_rows,
        train_shards=contexts.count("train") // sample.shard_contexts,
        holdout_shards=contexts.count("holdout") // sample.shard_contexts,
        stored=config.stored,
    )
    _compile(model, config, dtype, sample.context_size)
    files = files_of(directory, config.runtime)
    if workers.rank:
        missing = f"{files.place()}: worker 0 has not made it"
        wait_until(lambda: files.size("created.json") is not None, config.runtime.wait_seconds, missing)
    begun = read_json(directory / "begun.json")
    attributes = {"seed": sample.seed, "model": begun["inputs"]["model"], "fingerprint": directory.name}
    store = ActivationStore.create(files, geometry, {**attributes, "numerics": begun["numerics"]})
    every = [Shard(split, number) for split in ("holdout", "train") for number in range(geometry.shards(split))]
    if workers.rank == 0:
        _sweep(store, workers.alone(directory))
    stream = load_stream(directory)

    def complete() -> set[Shard]:
        return set(every) if stream and is_done(directory) else _recorded(store)

    others = Others(workers, directory, every, complete)
    done = len(complete())
    if isinstance(files, LocalFiles):
        at_once = stream.capacity_shards + geometry.holdout_shards if stream else len(every)
        check_room(directory, min(len(every) - done, at_once), geometry)
    with Progress(
        "harvest",
        len(every) * geometry.shard_rows,
        "tokens",
        start=done * geometry.shard_rows,
        path=directory / "progress.json",
        quiet=workers.rank > 0,
    ) as progress:

        def advance(tokens: int) -> None:
            progress.advance(tokens + (others.newly_complete() * geometry.shard_rows if workers.rank == 0 else 0))

        room = Room(directory, store, stream, progress.say) if stream else None
        mine = workers.share(every)
        admitted = room.admitted(mine) if room else mine
        write_shards(model, contexts, store, admitted, config.batch_contexts, sample.seed, advance)
        if stream and is_done(directory):
            finish(directory, store)  # shards that were in hand when training ended
        if workers.rank:
            return {}
        others.wait(config.runtime.wait_seconds, lambda count: progress.advance(count * geometry.shard_rows))
    _sweep(store, workers.alone(directory))
    return store_summary(store) | (room.summary() if room else {})


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


def _recorded(store: ActivationStore) -> set[Shard]:
    return {Shard(split, number) for split in SPLITS for number in store.recorded_shards(split)}


def _sweep(store: ActivationStore, alone: bool) -> None:
    store.sweep(lambda partial: is_abandoned(partial, alone))


def write_shards(
    model: HookedModel,
    contexts: Contexts,
    store: ActivationStore,
    shards: Iterable[Shard | None],
    batch_contexts: int,
    seed: int,
    advance: Callable[[int], None],
) -> None:
    """Make and write those of the shards that are missing; `advance` is called with the tokens of every batch.

    Where `shards` gives None, what was made is written before the next is asked for. One shard is copied and written
    while the next is made. No third waits: the forward pass stops for a slow disk, and for a failed write. Raises
    UserError for a NaN or infinity, and when memory is too small.
    """
    g = store.geometry
    with _memory_for("sample.shard_contexts", g.shard_contexts, model.device):
        buffers = [ShardBuffer(g, model.device) for _ in range(2)]
    writing: list[Future[None]] = []
    with ThreadPoolExecutor(1, "store-writer") as writer:
        for shard in shards:
            if shard is None:
                while writing:
                    writing.pop(0).result()
            if shard is None or store.is_recorded(*shard):
                continue
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


@contextmanager
def _memory_for(setting: str, value: int, device: torch.device) -> Iterator[None]:
    """Turn an error of memory into one that names the setting to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(
                f"{setting}: {value}: out of memory on {device}; lower it (it is part of the settings' fingerprint, "
                "as it changes last bits)"
            ) from None
        raise


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
    """Rows of both splits, width, size in gigabytes, and mean norm of the training rows at each hook."""
    geometry = store.geometry
    records = {split: store.records(split) for split in SPLITS}
    summary: dict[str, Any] = {f"{split}_rows": len(records[split]) * geometry.shard_rows for split in SPLITS}
    summary["d_in"] = geometry.d_in
    summary["gigabytes"] = (
        sum(file["bytes"] for split in SPLITS for record in records[split] for file in record["files"].values()) / 1e9
    )
    for hook in geometry.hooks:
        summary[f"mean_norm {hook}"] = float(np.mean([r["norms"][hook]["mean_norm"] for r in records["train"]]))
    return summary
