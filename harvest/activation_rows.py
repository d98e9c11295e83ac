"""Rows of one or several hooks in batches, each with the token that it belongs to: from a store or a forward pass.

A store's rows are shuffled within their shard, which holds whole contexts. They come as they are stored, or in reading
order: context after context. Two iterators over the same contexts (two hooks of two harvests, two models) are read as
one by `together`. Memory: one shard of the hooks' rows.

Shape suffixes: B rows of a batch, S positions of a context, D d_in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.activation_store import ActivationStore
from harvest.contexts import NO_STRATUM, Contexts
from harvest.files import UserError
from harvest.hooked_model import HookedModel

# Which rows are kept, bool (B,), of those that a function gives as "token_id", "position" and "norm", each (B,).
Rule = Callable[[Callable[[str], np.ndarray]], np.ndarray]


class RowBatch(NamedTuple):
    """Rows and where each comes from."""

    split: str
    acts: dict[str, Tensor]  # hook -> bfloat16 (B, d_in), as a store holds them
    token: np.ndarray  # uint32 (B,), as all that follow
    context: np.ndarray  # int64: number within the split
    position: np.ndarray  # int64: within the context
    source: np.ndarray  # uint8: index into the sample's sources; 0 without text
    stratum: np.ndarray  # uint16: index into its strata, or NO_STRATUM
    kept: np.ndarray  # bool: kept by the rule of every hook

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.token)

    def at(self, chosen: slice | np.ndarray) -> "RowBatch":
        """Some of the rows; an array holds indices, (rows,), or is a mask, (B,)."""
        rows = chosen if isinstance(chosen, slice) else torch.from_numpy(chosen)
        acts = {hook: acts_BD[rows] for hook, acts_BD in self.acts.items()}
        return RowBatch(self.split, acts, *(values[chosen] for values in self[2:]))


def stored_rows(
    store: ActivationStore,
    split: str,
    rules: Mapping[str, Rule],
    batch_rows: int,
    *,
    contexts: Contexts | None = None,
    shards: Sequence[int] | None = None,
    reading_order: bool = False,
) -> Iterator[RowBatch]:
    """Rows of a split at the hooks of `rules`, on the CPU; the last batch may be short.

    With `contexts`, the text that they were made from, each shard is compared with it. Raises UserError where they do
    not fit, and as the store does.
    """
    rest: RowBatch | None = None
    for shard in range(store.geometry.shards(split)) if shards is None else shards:
        rows = _shard(store, split, rules, shard, contexts, reading_order)
        rest = _joined(rest, rows) if rest is not None and rest.size else rows
        while rest.size >= batch_rows:
            yield rest.at(slice(batch_rows))
            rest = rest.at(slice(batch_rows, None))
    if rest is not None and rest.size:
        yield rest


def model_rows(
    model: HookedModel,
    contexts: Contexts,
    split: str,
    rules: Mapping[str, Rule],
    numbers: np.ndarray,
    batch_contexts: int,
) -> Iterator[RowBatch]:
    """Rows of these contexts, ascending (contexts,), as the model gives them now, in reading order, on its device."""
    for start in range(0, len(numbers), batch_contexts):
        here = numbers[start : start + batch_contexts]
        first, inside = int(here[0]), here - here[0]
        tokens_BS = contexts.read(split, "tokens", first, int(inside[-1]) + 1)[inside]
        found = model.activations(torch.from_numpy(tokens_BS.astype(np.int64)))
        acts = {hook: found[hook].bfloat16().flatten(0, 1) for hook in rules}
        kept = np.all([kept_in_text(rule, tokens_BS, acts[hook]) for hook, rule in rules.items()], 0)
        context, position = (np.repeat(here, tokens_BS.shape[1]), np.tile(np.arange(tokens_BS.shape[1]), len(here)))
        source, stratum = (values[context - first] for values in _groups(contexts, split, first, int(inside[-1]) + 1))
        yield RowBatch(split, acts, tokens_BS.reshape(-1), context, position, source, stratum, kept)


def kept_in_text(rule: Rule, tokens_BS: np.ndarray, acts_BD: Tensor) -> np.ndarray:
    """Bool (B x S,): the tokens of whole contexts whose rows are kept; `acts_BD` are theirs, bfloat16 (B x S, d_in)."""
    position = np.tile(np.arange(tokens_BS.shape[1]), len(tokens_BS))
    norm = acts_BD.float().norm(dim=1).cpu().numpy()
    return rule({"token_id": tokens_BS.reshape(-1), "position": position, "norm": norm}.__getitem__)


def together(first: Iterable[RowBatch], second: Iterable[RowBatch]) -> Iterator[tuple[RowBatch, RowBatch]]:
    """Batches of two harvests of one sample, side by side: a row counts where both keep it.

    Raises UserError where they are not of the same tokens.
    """
    for a, b in zip(first, second, strict=True):
        if not all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("token", "context", "position")):
            raise UserError(f"{a.split}: the rows of the two harvests are not of the same tokens in the same order")
        kept = a.kept & b.kept
        yield a._replace(kept=kept), b._replace(kept=kept)


def _shard(
    store: ActivationStore,
    split: str,
    rules: Mapping[str, Rule],
    shard: int,
    contexts: Contexts | None,
    reading_order: bool,
) -> RowBatch:
    g = store.geometry
    chunks = range(shard * g.chunks_per_shard, (shard + 1) * g.chunks_per_shard)
    where = {name: store.read_provenance(split, name, shard) for name in ("token_id", "context", "position")}
    context, position = (where[name].astype(np.int64) for name in ("context", "position"))
    first = shard * g.shard_contexts
    source, stratum = np.zeros(g.shard_rows, np.uint8), np.full(g.shard_rows, NO_STRATUM, np.uint16)
    if contexts:
        _check(store, split, shard, where["token_id"], (context - first) * g.context_size + position, contexts)
        source, stratum = (values[context - first] for values in _groups(contexts, split, first, g.shard_contexts))
    acts, kept = {}, np.ones(g.shard_rows, bool)
    for hook, rule in rules.items():
        rows = np.empty((g.shard_rows, g.d_in), np.uint16)
        store.read_chunks(split, hook, chunks, rows)
        acts[hook] = torch.from_numpy(rows).view(torch.bfloat16)
        kept &= rule({**where, "norm": store.read_norms(split, hook, shard)}.__getitem__)
    batch = RowBatch(split, acts, where["token_id"], context, position, source, stratum, kept)
    return batch.at(np.lexsort((position, context))) if reading_order else batch


def _check(
    store: ActivationStore, split: str, shard: int, token: np.ndarray, place: np.ndarray, contexts: Contexts
) -> None:
    g = store.geometry
    is_whole = np.array_equal(np.sort(place), np.arange(g.shard_rows))
    tokens = contexts.read(split, "tokens", shard * g.shard_contexts, g.shard_contexts).reshape(-1)
    if not is_whole or (tokens[place] != token).any():
        raise UserError(f"{store.path}: its {split} shard {shard} was not made from {contexts.path}")


def _groups(contexts: Contexts, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and stratum of each context."""
    return contexts.read(split, "source", first, count), contexts.strata_of(split, first, count)


def _joined(a: RowBatch, b: RowBatch) -> RowBatch:
    acts = {hook: torch.cat([a.acts[hook], b.acts[hook]]) for hook in a.acts}
    return RowBatch(a.split, acts, *(np.concatenate(pair) for pair in zip(a[2:], b[2:], strict=True)))
