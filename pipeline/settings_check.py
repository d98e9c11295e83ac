"""What settings say against what is there: local files, cores, the model and its tokenizer, before anything runs.

What cannot work, or would leave out nothing, is an error; what has no effect is a warning.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harvest.config import HarvestConfig
from harvest.files import UserError
from harvest.hub import resolved_commit
from pipeline.config import IngestedConfig, PipelineConfig
from pipeline.fingerprint import Inputs

AnyConfig = PipelineConfig | IngestedConfig
TOKENS = (2, 3)  # that shapes are asked for
FIRST_CONTEXTS = 4096  # that are looked through for tokens to leave out


_checked: set[tuple[tuple[str, str], ...]] = set()  # settings that this process has checked, and their fingerprints


def check_before(
    stage: str, sweep: Sequence[AnyConfig], fingerprints: Sequence[str], inputs: Inputs, here: Callable[[str], Path]
) -> None:
    """Check the settings of a sweep once, before the first stage runs; `here` gives the directory of a stage.

    Raises UserError for settings that one of the stages would refuse hours later.
    """
    configs = [config for config in sweep if isinstance(config, PipelineConfig)]
    key = tuple(zip((config.model_dump_json() for config in sweep), fingerprints, strict=True))
    if key not in _checked:
        check_settings(sweep[0])
        if configs:
            check_model(configs, resolved_commit(inputs.model), resolved_commit(inputs.tokenizer), stage)
        _checked.add(key)
    if configs and stage == "harvest":
        from harvest.contexts import Contexts
        from harvest.stream import is_streamed

        limit = configs[0].harvest.runtime.disk_limit
        if limit is not None and not is_streamed(here("harvest")):
            print(f"warning: harvest.runtime.disk_limit: {limit}: only `make stream` keeps it", file=sys.stderr)
        warn_of_absent_tokens(configs[0], Contexts(here("sample") / "contexts"))


def check_settings(config: AnyConfig) -> None:
    """Check what needs no model, and print warnings.

    Raises UserError.
    """
    if isinstance(config, PipelineConfig):
        from harvest.sampling import contexts_by_source

        _check_local(config)
        positions = config.train.exclude.positions
        if len(positions) == config.sample.context_size:
            raise UserError(f"train.exclude.positions: {list(positions)}: leaves no row of a context to train on")
        for split in ("train", "holdout"):
            for i, count in enumerate(contexts_by_source(config.sample, split)):
                if not count:
                    source = config.sample.sources[i]
                    raise UserError(
                        f"sample.sources.{i}.share: {source.share:g}: gives {source.name} none of the "
                        f"{config.sample.shards(split) * config.sample.shard_contexts} contexts of the {split} split; "
                        f"raise it or sample.{split}_tokens, or leave the source out"
                    )
    for warning in warnings(config):
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _check_local(config: PipelineConfig) -> None:
    """Raise UserError for a revision beside a local model or SAE, which it cannot change."""
    diff, out = config.evaluate.diff, "a local path has none, and enters by its content; take it out"
    models = {"model": config.model} | ({"evaluate.diff.model": diff.model} if diff and diff.model else {})
    for setting, model in models.items():
        if model.revision is not None and Path(model.name).is_dir():
            raise UserError(f"{setting}.revision: {model.revision!r}: {out}")
    for i, published in enumerate(config.evaluate.also):
        if published.revision is not None and Path(published.path).exists():
            raise UserError(f"evaluate.also.{i}.revision: {published.revision!r}: {out}")


def warnings(config: AnyConfig) -> Iterator[str]:
    """Settings that were given and have no effect, one sentence each."""
    train, evaluate = config.train, config.evaluate
    if "sparse_below" in train.model_fields_set and train.kernel != "auto":
        yield f"train.sparse_below: without effect, as train.kernel is {train.kernel}"
    if isinstance(config, PipelineConfig):
        steps = train.batches(config.sample.shards("train") * config.sample.shard_rows)
        for name in ("lr_decay_fraction", "l1_warmup_fraction"):
            fraction = getattr(train, name)
            if fraction and not round(steps * fraction):
                yield f"train.{name}: {fraction:g}: of {steps:,} steps is less than one, so it has no effect"
        runtime = config.harvest.runtime
        if runtime.allow_http and runtime.store is None:
            yield "harvest.runtime.allow_http: without effect, as harvest.runtime.store is not set"
    steering, diff = evaluate.steering, evaluate.diff
    if steering:
        by = "evaluate.steering"
        unused = {
            f"{by}.feature_ids is set": ("features",) if steering.feature_ids else (),
            f"{by}.prompts is set": ("built_in_prompts",) if steering.prompts else (),
            f"{by}.temperature is 0": () if steering.temperature else ("top_p", "seed"),
        }
        for reason, names in unused.items():
            for name in names:
                if name in steering.model_fields_set:
                    yield f"{by}.{name}: without effect, as {reason}"
    if diff and diff.model is None:
        for name in ("contexts", "batch_contexts"):
            if name in diff.model_fields_set:
                yield f"evaluate.diff.{name}: without effect, as evaluate.diff.model is not set"
    if evaluate.features and "random_share" in evaluate.features.model_fields_set and not evaluate.reason_score:
        yield "evaluate.features.random_share: without effect, as evaluate.reason_score is null and all are drawn"


def check_model(
    configs: Sequence[PipelineConfig], model_commit: str | None, tokenizer_commit: str | None, stage: str
) -> None:
    """Check hooks, lengths, token ids and features of a sweep's settings against the model, without its weights.

    Raises UserError, also where the model cannot be had but for training, which may run where it is not.
    """
    from evaluate.steering import check_features
    from harvest.device import check_threads, resolve_device
    from harvest.language_model import load_skeleton
    from harvest.tokenizer import load_whole_tokenizer

    config = configs[0]
    harvest, evaluate = config.harvest, config.evaluate
    if stage in ("sample", "harvest"):
        check_threads("harvest.threads", harvest.threads, resolve_device(harvest.runtime.device))
    offline = config.sample.runtime.offline or harvest.runtime.offline
    try:
        skeleton = load_skeleton(config.model, model_commit, offline)
        tokenizer = load_whole_tokenizer(config.model, tokenizer_commit, offline)
    except UserError:
        if stage == "train":
            return
        raise
    d_in = _check_widths(skeleton, harvest)
    limit = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if limit and config.sample.context_size > limit:
        raise UserError(f"sample.context_size: {config.sample.context_size}: the model has {limit} positions; lower it")
    _check_token_ids(config, max(tokenizer.get_vocab().values()))
    if not tokenizer.eos_token and any(source.rows == "text" for source in config.sample.sources):
        print(
            "warning: sample.sources: `rows: text` and a tokenizer without an end token: documents follow each other "
            "with nothing between them",
            file=sys.stderr,
        )
    if evaluate.steering and limit:
        _check_prompts(config, tokenizer, limit)
    for single in configs:
        d_sae = single.train.sae.width(d_in) if d_in else single.train.sae.d_sae
        if d_sae and evaluate.features:
            check_features(evaluate.features.include, d_sae, "evaluate.features.include")
        if d_sae and evaluate.steering:
            check_features(evaluate.steering.feature_ids, d_sae, "evaluate.steering.feature_ids")


def _check_widths(skeleton: Any, harvest: HarvestConfig) -> int | None:
    """The width of all hooks; None where the model's shapes depend on its weights.

    Raises UserError for hooks that give no row for each token, that the harvest does not load, or of unlike width.
    """
    from harvest.language_model import find_hooks, saelens_hook

    points = find_hooks(skeleton, harvest.hooks)
    prefix = skeleton.model.base_model_prefix
    for hook, point in points.items():
        if hasattr(skeleton.model, prefix) and not point.module.startswith(f"{prefix}."):
            raise UserError(
                f"harvest.hooks: {hook!r}: is not within {prefix!r}, which is all that the harvest runs; hook a layer, "
                f"as {skeleton.layer_list}.0"
            )
    shapes = _shapes(skeleton.model, {hook: point.module for hook, point in points.items()})
    if shapes is None:
        at_layers = all(saelens_hook(point.module) for point in points.values())
        return skeleton.config.get_text_config().hidden_size if at_layers else None
    for hook, shape in shapes.items():
        if shape is None or len(shape) != 3 or shape[:2] != TOKENS:
            gives = "nothing" if shape is None else shape
            raise UserError(
                f"harvest.hooks: {hook!r}: gives {gives} for 2 x 3 tokens, not a row for each; hook a layer"
            )
    widths = {hook: shape[-1] for hook, shape in shapes.items() if shape}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{hook}: {width}" for hook, width in widths.items())
        raise UserError(f"harvest.hooks: hooks of different widths ({listed}); harvest them with settings of their own")
    return widths[harvest.hooks[0]]


def _shapes(model: Any, modules: dict[str, str]) -> dict[str, tuple[int, ...] | None] | None:
    """Shapes of what modules give for 2 x 3 tokens, None where they do not run; None without weights to run it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from harvest.hooked_model import first_tensor

    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(modules)

    def note(hook: str, output: Any) -> None:
        first = first_tensor(output)
        shapes[hook] = tuple(first.shape) if isinstance(first, torch.Tensor) else ()

    handles = [
        model.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, output, hook=hook: note(hook, output)
        )
        for hook, module in modules.items()
    ]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled = True  # it logs what it raises
    try:
        with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
            model.bfloat16().eval()(torch.zeros(TOKENS, dtype=torch.long, device="meta"), use_cache=False)
    except Exception:  # architectures that look at values, which tensors without memory do not have
        return None
    finally:
        log.disabled = False
        for handle in handles:
            handle.remove()
    return shapes


def _check_token_ids(config: PipelineConfig, largest: int) -> None:
    score = config.evaluate.reason_score
    ids = {"train.exclude.token_ids": config.train.exclude.token_ids}
    ids |= {"evaluate.reason_score.ignored_token_ids": score.ignored_token_ids} if score else {}
    for setting, tokens in ids.items():
        beyond = [token for token in tokens if token > largest]
        if beyond:
            raise UserError(
                f"{setting}: {beyond[0]}: never occurs, as the tokenizer's ids end at {largest}, so it leaves out "
                "nothing; name the ids that you mean"
            )


def _check_prompts(config: PipelineConfig, tokenizer: Any, limit: int) -> None:
    from evaluate.generation import check_lengths, prompt_ids
    from evaluate.steering import built_in_prompts

    steering = config.evaluate.steering
    if steering is None:
        return
    prompts = steering.prompts or built_in_prompts()[: steering.built_in_prompts]
    ids = prompt_ids(tokenizer, prompts, None)
    try:
        check_lengths(ids, steering.max_new_tokens, limit)
    except UserError as error:
        raise UserError(f"evaluate.steering.max_new_tokens: {steering.max_new_tokens}: {error}") from None


def warn_of_absent_tokens(config: PipelineConfig, contexts: Any) -> None:
    """Say which tokens that training leaves out are nowhere in the first contexts of the sample."""
    import numpy as np

    count = min(contexts.count("train"), FIRST_CONTEXTS)
    tokens = contexts.read("train", "tokens", 0, count) if config.train.exclude.token_ids else np.zeros(0, np.uint32)
    for token in config.train.exclude.token_ids:
        if not (tokens == token).any():
            print(
                f"warning: train.exclude.token_ids: {token}: is not among the {tokens.size:,} tokens of the first "
                f"{count:,} contexts, so it may leave out nothing",
                file=sys.stderr,
                flush=True,
            )
