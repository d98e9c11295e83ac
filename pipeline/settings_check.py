"""What settings say compared with what is there: files, cores, the model and its tokenizer, before anything runs.

What cannot work, or would leave out nothing, is an error; what has no effect is a warning.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harvest.config import HarvestConfig
from harvest.files import UserError
from harvest.hub import resolved_commit
from pipeline.config import PipelineConfig
from pipeline.fingerprint import Inputs
from pipeline.stages import Runs, started

TOKENS = (2, 3)  # that shapes are asked for
FIRST_CONTEXTS = 4096  # that are looked through for tokens to leave out
NEEDS = {  # settings that have no effect unless another one is set
    "harvest.runtime.allow_http": "harvest.runtime.store",
    "evaluate.steering.top_p": "evaluate.steering.temperature",
    "evaluate.steering.seed": "evaluate.steering.temperature",
    "evaluate.diff.contexts": "evaluate.diff.model",
    "evaluate.diff.batch_contexts": "evaluate.diff.model",
    "evaluate.features.random_share": "evaluate.reason_score",
    "benchmark.top_p": "benchmark.temperature",
}
REPLACED = {  # settings that have no effect when another one is set
    "evaluate.steering.features": "evaluate.steering.feature_ids",
    "evaluate.steering.built_in_prompts": "evaluate.steering.prompts",
    "benchmark.best_features": "benchmark.features",
}
_checked: set[tuple[str, ...]] = set()  # fingerprints of the sweeps that this process has checked


def check_before(stage: str, sweep: Sequence[Runs]) -> None:
    """Check the settings of a sweep once, before the first stage runs.

    Raises UserError for settings that one of the stages would refuse hours later.
    """
    first, config = sweep[0], sweep[0].config
    key = (*(runs.config.model_dump_json() for runs in sweep), *(runs.fingerprints["evaluate"] for runs in sweep))
    if key not in _checked:
        if not config.ingest:
            _check_text(config)
        for warning in _warnings(config):
            _warn(warning)
        if not config.ingest:
            _check_model(sweep, stage)
        _checked.add(key)
    if stage == "harvest" and not config.ingest:
        from harvest.stream import is_streamed

        limit = config.harvest.runtime.disk_limit
        if limit is not None and not is_streamed(first.directory("harvest")):
            _warn(f"harvest.runtime.disk_limit: {limit}: only `make stream` keeps it")
        _warn_of_absent_tokens(config, first.directory("sample") / "contexts")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _check_text(config: PipelineConfig) -> None:
    """Raise UserError for settings of text that need no look at the model."""
    from harvest.sampling import contexts_by_source

    diff, out = config.evaluate.diff, "a local path has none, and enters by its content; take it out"
    local = {"model": (config.model.name, config.model.revision)}
    if diff and diff.model:
        local["evaluate.diff.model"] = (diff.model.name, diff.model.revision)
    if config.train and (start := config.train.start_from):
        local["train.start_from"] = (start.path, start.revision)
    saes = {f"evaluate.also.{i}": also for i, also in enumerate(config.evaluate.also)}
    saes |= {"published": config.published} if config.published else {}
    local |= {setting: (sae.path, sae.revision) for setting, sae in saes.items() if sae.path}
    for setting, (path, revision) in local.items():
        if revision is not None and Path(path).exists():
            raise UserError(f"{setting}.revision: {revision!r}: {out}")
    sample, positions = config.sample, config.exclude.positions
    if len(positions) == sample.context_size:
        raise UserError(f"{config.exclude.setting}.positions: {list(positions)}: leaves no row of a context")
    for split in ("train", "holdout") if sample.train_tokens else ("holdout",):
        for i, count in enumerate(contexts_by_source(sample, split)):
            if not count:
                raise UserError(
                    f"sample.sources.{i}.share: {sample.sources[i].share:g}: gives {sample.sources[i].name} none of "
                    f"the {sample.shards(split) * sample.shard_contexts} contexts of the {split} split; raise it or "
                    f"sample.{split}_tokens, or leave the source out"
                )


def _warnings(config: PipelineConfig) -> Iterator[str]:
    """Settings that were given and have no effect, one sentence each."""
    if config.published:
        yield from _warnings_beside(config)
    elif not config.ingest:
        steps = config.train.batches(config.sample.shards("train") * config.sample.shard_rows)
        for name in ("lr_decay_fraction", "l1_warmup_fraction"):
            fraction = getattr(config.train, name)
            if fraction and not round(steps * fraction):
                yield f"train.{name}: {fraction:g}: of {steps:,} steps is less than one, so it has no effect"
    if config.train and "sparse_below" in config.train.model_fields_set and config.train.kernel != "auto":
        yield f"train.sparse_below: without effect, as train.kernel is {config.train.kernel}"
    for name, other in (NEEDS | REPLACED).items():
        section, value = _at(config, name.rpartition(".")[0]), _at(config, other)
        given = section is not None and name.rpartition(".")[2] in section.model_fields_set
        if given and bool(value) == (name in REPLACED):
            yield f"{name}: without effect, as {other} is {'set' if value else '0' if value == 0 else 'not set'}"


def _warnings_beside(config: PipelineConfig) -> Iterator[str]:
    """The same of text that nothing reads, as no SAE is trained."""
    score, sample = config.evaluate.reason_score, config.sample
    if sample and sample.train_tokens:
        wanted = ((score and score.contexts) or 0) - sample.shards("holdout") * sample.shard_contexts
        tokens = max(0, wanted) * sample.context_size
        if tokens < sample.shards("train") * sample.shard_rows:
            yield (
                f"sample.train_tokens: {sample.train_tokens:,}: a published SAE is not trained, and evaluation reads "
                f"{tokens:,} of them; lower it"
            )


def _at(config: PipelineConfig, name: str) -> Any:
    """The value of a setting, None where a section above it is left out."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _check_model(sweep: Sequence[Runs], stage: str) -> None:
    """Check hooks, lengths, token ids and features of a sweep against the model, without its weights.

    Raises UserError, also where the model cannot be had but for training, which may run where it is not.
    """
    from evaluate.operations import check_features
    from evaluate.prompts import position_limit
    from harvest.device import check_threads, resolve_device
    from harvest.language_model import load_skeleton
    from harvest.tokenizer import load_whole_tokenizer
    from train.kinds import sae_class

    config, inputs = sweep[0].config, sweep[0].inputs
    harvest, evaluate = config.harvest, config.evaluate
    if stage in ("sample", "harvest"):
        check_threads("harvest.threads", harvest.threads, resolve_device(harvest.runtime.device))
    offline = config.sample.runtime.offline or harvest.runtime.offline
    try:
        skeleton = load_skeleton(config.model, resolved_commit(inputs.model), offline)
        tokenizer = load_whole_tokenizer(config.model, resolved_commit(inputs.tokenizer), offline)
    except UserError:
        if stage == "train":
            return
        raise
    d_in = check_widths(skeleton, harvest)
    if config.train and config.train.start_from and stage in ("sample", "harvest"):  # training looks itself
        from train.start import check_start

        check_start(started(config.train, inputs), harvest.hooks, d_in)
    limit = position_limit(skeleton.config)
    if limit and config.sample.context_size > limit:
        raise UserError(f"sample.context_size: {config.sample.context_size}: the model has {limit} positions; lower it")
    _check_token_ids(config, max(tokenizer.get_vocab().values()))
    if not tokenizer.eos_token and any(source.rows == "text" for source in config.sample.sources):
        _warn(
            "sample.sources: `rows: text` and a tokenizer without an end token: documents follow each other "
            "with nothing between them"
        )
    if evaluate.steering:
        _check_prompts(config, tokenizer, limit)
    if config.published:
        widths = [_check_published(config, inputs, d_in)]
    else:
        saes = [runs.config.train.sae for runs in sweep]
        widths = [sae.width(d_in) if d_in else sae.d_sae for sae in saes]
        for sae, d_sae in zip(saes, widths, strict=True):
            if d_sae:  # a row of width 1 is enough for a kind to refuse what does not fit d_sae
                sae_class(sae.kind).initial(1, d_sae, **sae.hyperparameters())
    for d_sae in filter(None, widths):
        for setting in ("evaluate.features.include", "evaluate.steering.feature_ids", "benchmark.features"):
            check_features(_at(config, setting) or (), d_sae, setting)


def _check_published(config: PipelineConfig, inputs: Inputs, d_in: int | None) -> int | None:
    """Compare what an SAE of others says of itself with model and hook; its d_sae, None of one that says nothing.

    Raises UserError for another hook or width.
    """
    from train.published import check_width, matching_hook, named_hook, other_model, read_config

    published = config.published
    assert published
    found = read_config("published", published, resolved_commit(inputs.published), published.runtime.offline)
    named = named_hook("published", published.hook, found) if found else published.hook or ""
    matching_hook("published", named, config.harvest.hooks, "harvest.hooks")
    if found is None:
        return None
    if d_in:
        check_width(found.path, found.d_in, d_in, config.model.name)
    if other := other_model(found, config.model.name):
        _warn(f"published: {published.label} says that it is of {other!r}, and model.name is {config.model.name!r}")
    return found.d_sae


def check_widths(skeleton: Any, harvest: HarvestConfig) -> int | None:
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
        if len(shape) != 3 or shape[:2] != TOKENS:
            gives = f"{shape or 'nothing'} for 2 x 3 tokens"
            raise UserError(f"harvest.hooks: {hook!r}: gives {gives}, not a row for each; hook a layer")
    widths = {hook: shape[-1] for hook, shape in shapes.items()}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{hook}: {width}" for hook, width in widths.items())
        raise UserError(f"harvest.hooks: hooks of different widths ({listed}); harvest them with settings of their own")
    return widths[harvest.hooks[0]]


def _shapes(model: Any, modules: dict[str, str]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of what modules give for 2 x 3 tokens, empty where they do not run; None without weights to run it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from harvest.hooked_model import first_tensor

    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(modules, ())

    def note(hook: str, output: Any) -> None:
        shapes[hook] = tuple(getattr(first_tensor(output), "shape", ()))

    handles = [
        model.get_submodule(module).register_forward_hook(lambda _m, _inputs, output, hook=hook: note(hook, output))
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
    for setting in (f"{config.exclude.setting}.token_ids", "evaluate.reason_score.ignored_token_ids"):
        if beyond := [token for token in _at(config, setting) or () if token > largest]:
            raise UserError(
                f"{setting}: {beyond[0]}: never occurs, as the tokenizer's ids end at {largest}, so it leaves out "
                "nothing; name the ids that you mean"
            )


def _check_prompts(config: PipelineConfig, tokenizer: Any, limit: int | None) -> None:
    from evaluate.prompts import check_lengths, prompt_ids, thinking_tags
    from evaluate.steering import built_in_prompts

    steering = config.evaluate.steering
    assert steering
    prompts = steering.prompts or built_in_prompts()[: steering.built_in_prompts]
    try:
        ids = prompt_ids(tokenizer, prompts, None)
        check_lengths(ids, steering.max_new_tokens, limit)
    except UserError as error:
        raise UserError(f"evaluate.steering.max_new_tokens: {steering.max_new_tokens}: {error}") from None
    if steering.where == "thinking":
        try:
            thinking_tags(tokenizer, ids)
        except UserError as error:
            raise UserError(f"evaluate.steering.{error}") from None


def _warn_of_absent_tokens(config: PipelineConfig, folder: Path) -> None:
    """Say which tokens that training leaves out are nowhere in the first contexts of the sample."""
    from harvest.contexts import Contexts

    if excluded := config.exclude.token_ids:
        contexts, split = Contexts(folder), "holdout" if config.published else "train"
        count = min(contexts.count(split), FIRST_CONTEXTS)
        tokens = contexts.read(split, "tokens", 0, count)
        for token in excluded:
            if not (tokens == token).any():
                _warn(
                    f"{config.exclude.setting}.token_ids: {token}: is not among the {tokens.size:,} tokens of the "
                    f"first {count:,} contexts, so it may leave out nothing"
                )
