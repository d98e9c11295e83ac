"""What follows from the settings and the shape of the model alone: how large everything is that they make."""

import math
from typing import Any, NamedTuple

from harvest.activation_store import Geometry
from harvest.disk import shard_bytes
from harvest.language_model import find_hooks
from pipeline.architecture import Architecture
from pipeline.config import PipelineConfig
from train.kinds import sae_class
from train.training import total_steps


class Sizes(NamedTuple):
    """Bytes, unless said otherwise. Beside a published SAE nothing is trained, and what training makes is 0."""

    geometry: Geometry
    layers: int  # decoder layers up to the last hook
    flop_per_token: float  # of those layers
    parameters: int  # of those layers and the embedding
    context: int  # of one context in a forward pass, at 4 bytes an element
    d_sae: int  # of the widest SAE
    steps: int
    saes: int  # in a sweep
    contexts: int  # the packed tokens; twice as much while sampling
    shard: int
    sae: int  # weights of one SAE
    checkpoint: int
    kept_checkpoints: int

    @property
    def holdout(self) -> int:
        """Bytes of the held-out split."""
        return self.shard * self.geometry.holdout_shards

    @property
    def store(self) -> int:
        """Bytes of both splits."""
        return self.shard * self.geometry.train_shards + self.holdout

    @property
    def rows(self) -> int:
        """Training rows, not bytes."""
        return self.geometry.train_shards * self.geometry.shard_rows

    def trained(self, saes: int) -> int:
        """Checkpoints, one more than are kept for a moment, and the last and the best SAE, of every hook."""
        return len(self.geometry.hooks) * saes * ((self.kept_checkpoints + 1) * self.checkpoint + 2 * self.sae)


def sizes(config: PipelineConfig, shape: Architecture) -> Sizes:
    """Sizes for these settings.

    Raises UserError when the model does not have a hook.
    """
    sample, train, hooks = config.sample, config.train, config.harvest.hooks
    d_in = shape.skeleton.config.get_text_config().hidden_size
    layers = max(point.layers for point in find_hooks(shape.skeleton, hooks).values())
    model: Any = shape.skeleton.model
    run = list(model.get_submodule(shape.skeleton.layer_list))[:layers]
    matrices = [p for layer in run for p in layer.parameters() if p.dim() == 2]
    widest = max(max(p.shape) for p in matrices)
    # Causal attention reads half of the context on average, twice (scores, values), 2 FLOP each.
    attention = 2 * sample.context_size * d_in * layers
    geometry = Geometry(
        hooks=hooks,
        d_in=d_in,
        context_size=sample.context_size,
        shard_contexts=sample.shard_contexts,
        chunk_rows=config.harvest.chunk_rows,
        train_shards=sample.shards("train") if train else 0,
        holdout_shards=sample.shards("holdout"),
        stored=config.harvest.stored,
    )
    saes = train.expanded() if train else []
    d_sae = max((single.sae.width(d_in) for single in saes), default=0)
    shapes = [sae_class(single.sae.kind).shapes(d_in, d_sae) for single in saes]
    sae = max((sum(map(math.prod, of_kind.values())) for of_kind in shapes), default=0)
    return Sizes(
        geometry,
        layers,
        2 * sum(p.numel() for p in matrices) + attention,
        sum(p.numel() for layer in run for p in layer.parameters()) + model.get_input_embeddings().weight.numel(),
        sample.context_size * (6 * d_in + 3 * widest) * 4,
        d_sae,
        total_steps(train, geometry.train_shards * geometry.shard_rows) if train else 0,
        len(saes),
        8 * (sample.shards("train") + sample.shards("holdout")) * sample.shard_rows,
        shard_bytes(geometry),
        4 * sae,
        12 * sae + 8 * d_sae,
        train.runtime.keep_last if train else 0,
    )
