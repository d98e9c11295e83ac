"""The harvest stage: the model reads every context once, and its activations go into the store.

A shard is a pure function of the settings: its contexts go through the model in whole batches, in
order, and its rows are permuted by a generator seeded with (seed, split, shard). So neither kills nor
the number of workers change a byte. Held-out shards come first; training can then be checked while
the rest is being made.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.activation_store import SPLITS, ActivationStore, Geometry, ShardRows
from harvest.config import HarvestConfig, ModelConfig, SampleConfig
from harvest.device import numerics, resolve_device, resolve_dtype, set_threads
from harvest.disk import check_room
from harvest.files import UserError, read_json
from harvest.language_model import HookedModel, load_model
from harvest.progress import Progress
from harvest.sampling import Contexts


class Shard(NamedTuple):
    split: str
    number: int


def run(
    model_config: ModelConfig,
    model_commit: str | None,
    sample: SampleConfig,
    config: HarvestConfig,
    sample_directory: Path,
    directory: Path,
    begin: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write `directory/store`, continuing at the first missing shard, and return the summary.

    Raises UserError for a model or hook that cannot be had, and for a NaN or infinity in an activation.
    """
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.compute_dtype, device)
    set_threads(config.threads, device)
    model = load_model(model_config, model_commit, config.hooks, dtype, device, offline=config.runtime.offline)
    model_settings: Any = model.model.config
    begin(numerics(device, dtype, attention=model_settings._attn_implementation))  # SDPA where the model has it
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
    begun = read_json(directory / "begun.json")
    attributes = {"seed": sample.seed, "model": begun["inputs"]["model"], "fingerprint": directory.name}
    store = ActivationStore.create(directory / "store", geometry, {**attributes, "numerics": begun["numerics"]})
    store.sweep()
    every = [Shard(split, s) for split in ("holdout", "train") for s in range(geometry.shards(split))]
    done = {Shard(split, s) for split in SPLITS for s in store.complete_shards(split)}
    check_room(directory, len(every) - len(done), geometry)
    with (
        Progress(
            "harvest",
            len(every) * geometry.shard_rows,
            "tokens",
            start=len(done) * geometry.shard_rows,
            path=directory / "progress.json",
        ) as progress,
        ThreadPoolExecutor(1, "store-writer") as writer,
    ):
        writing: Future[None] | None = None
        for shard in every:
            if shard in done:
                continue
            first = shard.number * sample.shard_contexts
            ids = contexts.read(shard.split, "tokens", first, sample.shard_contexts)
            rows = shard_rows(model, ids, shard, geometry, config.batch_contexts, sample.seed, progress)
            if writing:
                writing.result()  # one shard is written while the next is made; never more wait
            writing = writer.submit(store.write_shard, shard.split, shard.number, rows)
        if writing:
            writing.result()
    return store_summary(store)


def shard_rows(
    model: HookedModel,
    tokens: np.ndarray,
    shard: Shard,
    geometry: Geometry,
    batch_contexts: int,
    seed: int,
    progress: Progress | None = None,
) -> ShardRows:
    """All rows of a shard in their stored order, from its tokens (shard_contexts, context_size).

    Raises UserError for a NaN or infinity, with its context and hook, and when memory is too small.
    """
    parts: dict[str, list[Tensor]] = {hook: [] for hook in geometry.hooks}
    for start in range(0, geometry.shard_contexts, batch_contexts):
        batch = torch.from_numpy(tokens[start : start + batch_contexts].astype(np.int64))
        try:
            activations = model.activations(batch)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise UserError(
                    f"harvest.batch_contexts: {batch_contexts}: out of memory on {model.device}; lower it "
                    "(it is part of the settings' fingerprint, as it changes last bits)"
                ) from None
            raise
        for hook, acts in activations.items():
            finite = torch.isfinite(acts).flatten(1).all(1)
            if not finite.all():
                bad = shard.number * geometry.shard_contexts + start + int(finite.logical_not().nonzero()[0])
                raise UserError(
                    f"harvest.hooks: {hook!r}: NaN or infinity in the activations of {shard.split} context {bad}; "
                    "nothing of this shard was written. Try harvest.compute_dtype=float32, or look at that context"
                )
            parts[hook].append(acts.flatten(0, 1).bfloat16())
        if progress:
            progress.advance(batch.numel())
    return _permuted(parts, tokens, shard, geometry, seed)


def _permuted(
    parts: dict[str, list[Tensor]], tokens: np.ndarray, shard: Shard, geometry: Geometry, seed: int
) -> ShardRows:
    generator = np.random.default_rng([seed, SPLITS.index(shard.split), shard.number])
    order = generator.permutation(geometry.shard_rows)
    acts, norms = {}, {}
    for hook, tensors in parts.items():
        rows = torch.cat(tensors)[torch.from_numpy(order).to(tensors[0].device)]
        norms[hook] = rows.float().norm(dim=1).cpu().numpy()
        acts[hook] = rows.cpu().view(torch.uint16).numpy()
    in_shard, position = np.divmod(order, geometry.context_size)
    context = shard.number * geometry.shard_contexts + in_shard
    return ShardRows(acts, norms, tokens.reshape(-1)[order], context.astype(np.uint32), position.astype(np.uint16))


def _width(model: HookedModel, hooks: tuple[str, ...]) -> int:
    """d_in at the hooks, from a small batch.

    Raises UserError when a hook gives no row for each token, or hooks differ in width: one store has one d_in.
    """
    found = model.activations(torch.zeros(2, 3, dtype=torch.long))
    for hook in hooks:
        if hook not in found or found[hook].shape[:-1] != (2, 3):
            shape = tuple(found[hook].shape) if hook in found else "nothing"
            raise UserError(
                f"harvest.hooks: {hook!r}: gives {shape} for 2 x 3 tokens, not a row for each; hook a layer"
            )
    widths = {hook: acts.shape[-1] for hook, acts in found.items()}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{hook}: {width}" for hook, width in widths.items())
        raise UserError(f"harvest.hooks: hooks of different widths ({listed}); harvest them with settings of their own")
    return widths[hooks[0]]


def store_summary(store: ActivationStore) -> dict[str, Any]:
    geometry = store.geometry
    summary: dict[str, Any] = {f"{split}_rows": geometry.shards(split) * geometry.shard_rows for split in SPLITS}
    records = {split: [store.record(split, s) for s in range(geometry.shards(split))] for split in SPLITS}
    summary["d_in"] = geometry.d_in
    summary["gigabytes"] = (
        sum(file["bytes"] for split in SPLITS for record in records[split] for file in record["files"].values()) / 1e9
    )
    for hook in geometry.hooks:
        summary[f"mean_norm {hook}"] = float(np.mean([r["norms"][hook]["mean_norm"] for r in records["train"]]))
    return summary
