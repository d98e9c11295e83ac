"""A rehearsal: the stages up to the report with the settings of a real run, on a narrow random model and made-up text.

Replaced are the model (same layers, vocabulary and hooks, a fraction of the width), the text (rows in the same
schemas), given SAEs, the width of the SAE, and the budgets; `rehearsal` leaves out what needs more than these.
Template, contexts, shards, hooks, exclusions, schedules and evaluation are those of the settings, so what a rented
machine will run is run here first.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harvest.config import Source
from harvest.files import UserError, read_json, write_json
from pipeline.config import PipelineConfig
from pipeline.running import run_stage
from pipeline.stages import find_runs

MARKER = "dry-run.json"
D_IN = 32
NARROW = {"hidden_size": D_IN, "intermediate_size": 2 * D_IN, "num_attention_heads": 2, "num_key_value_heads": 1}
NARROW |= {"head_dim": D_IN // 2}
SAE, FACTOR = "sae", 16  # in the place of a published one, and its width in d_in
STEPS = 8  # training steps at least
HOLDOUT_FRACTION = 0.3  # of made-up text, of which there is little
TEXT = (
    "wait alternatively hmm maybe perhaps let me therefore however but another since so check the sum of two odd "
    "numbers is even suppose that x equals three then we get nine which cannot be right again prove for all n"
)


def dry_run(config: PipelineConfig, folder: Path, name: str, say: Callable[[str], None]) -> list[Path]:
    """Run the stages into `folder` and return the reports.

    An earlier rehearsal in the folder is removed. Raises UserError when the folder is not one, when the
    model's shape cannot be had, and whatever the stages raise.
    """
    if folder.is_symlink() or (folder.exists() and not (folder / MARKER).is_file()):
        raise UserError(f"{folder}: not an earlier dry run (it has no {MARKER}); move it, or choose another --runs")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(folder / MARKER, {"settings": name})
    d_in, origin = _write_model(config, folder / "model")
    rehearsed = rehearsal(config, d_in, folder)
    if config.published:
        _write_sae(folder / SAE, config)
    sample, fraction = rehearsed.sample, rehearsed.sample.holdout_fraction
    need = max(sample.train_tokens / (1 - fraction), sample.holdout_tokens / fraction)  # a word is a token at least
    for source in sample.sources:
        words = int(1.5 * source.share * need) + 20_000
        write_rows(Path(source.path), source, words, config.exclude.token_ids)
    if rehearsed.train and rehearsed.train.start_from:
        _write_start(rehearsed, Path(rehearsed.train.start_from.path))
    say(f"dry-run  {name}: shape of the model from {origin}; width {d_in} -> {D_IN}, everything into {folder}")
    sweep = find_runs(rehearsed, folder / "runs")
    for stage in sweep[0].stages:
        run_stage(sweep, stage, allow_mixed=False, force=False, confirm=lambda _question: False)
    say(f"dry-run  passed: every stage of {name} up to the report runs; its figures, of a random model, mean nothing")
    return [runs.directory("evaluate") / "report.html" for runs in sweep]


def rehearsal(config: PipelineConfig, d_in: int, folder: Path) -> PipelineConfig:
    """The settings with model, text, width and budgets (or the published SAE) replaced, and without compiled layers on
    a CPU.

    `d_in` is the width of the real model.
    """
    from harvest.device import resolve_device

    sample, train = config.sample, config.train
    shards = min(sample.shards("train"), 2)
    if train:
        shards = min(sample.shards("train"), max(2, math.ceil(STEPS * train.batch_size / sample.shard_rows)))
    rows = shards * sample.shard_rows
    settings = config.model_dump(exclude_unset=True)

    def change(section: dict[str, Any], name: str, **values: Any) -> dict[str, Any]:
        section[name] = {**section.get(name, {}), **values}
        return section[name]

    def narrower(width: int) -> int:
        return max(1, width * D_IN // d_in)

    settings["model"] = {"name": str(folder / "model")}
    for source in settings["sample"]["sources"]:
        for name in ("revision", "subset", "split"):  # made-up rows are of none
            source.pop(name, None)
        source["path"] = str(folder / f"{source['name']}.jsonl")
    fraction = max(sample.holdout_fraction, HOLDOUT_FRACTION)
    change(settings, "sample", train_tokens=rows, holdout_tokens=sample.shard_rows, holdout_fraction=fraction)
    on_gpu = resolve_device(config.harvest.runtime.device).type == "cuda"
    harvest = change(settings, "harvest", compile=config.harvest.compile and on_gpu)  # a CPU may lack a compiler
    change(harvest, "runtime", store=None)
    if config.published:
        for name in ("revision", "file", "format", "release", "id"):
            settings["published"].pop(name, None)
        change(settings, "published", path=str(folder / SAE))
    else:
        length = {"training_tokens": min(train.training_tokens, rows)} if train.training_tokens else {"epochs": 1.0}
        trained = change(settings, "train", **length)
        change(trained, "runtime", checkpoint_every=max(1, rows // train.batch_size // 2))
        if train.start_from:
            trained["start_from"] = str(folder / "start")
        for name in ("sae", "sweep"):
            section = getattr(train, name)
            for width in ("d_sae", "k", "prefixes"):  # what counts features
                if value := getattr(section, width, None):
                    several = isinstance(value, tuple)
                    new = [*dict.fromkeys(map(narrower, value))] if several else narrower(value)
                    change(trained, name, **{width: new})
    settings.pop("explain", None)  # asks somebody
    settings.pop("benchmark", None)  # a narrow random model answers nothing
    analyses, evaluate = change(settings, "evaluate", also=[]), config.evaluate
    if evaluate.downstream:
        change(analyses, "downstream", contexts=min(2, evaluate.downstream.contexts), batch_contexts=1)
    if evaluate.reason_score and evaluate.reason_score.contexts:
        contexts = min(evaluate.reason_score.contexts, (shards + 1) * sample.shard_contexts)
        change(analyses, "reason_score", contexts=contexts)
    if evaluate.ablation:
        change(analyses, "ablation", contexts=min(2, evaluate.ablation.contexts), batch_contexts=1)
    if evaluate.diff:
        change(analyses, "diff", model=None)
    if evaluate.steering:
        change(analyses, "steering", max_new_tokens=min(4, evaluate.steering.max_new_tokens))
    return PipelineConfig.model_validate(settings)


def _write_sae(folder: Path, config: PipelineConfig) -> None:
    """Write a random SAE of the narrow model as SAELens would, with the features that the settings name."""
    from train.kinds import sae_class
    from train.saelens import write_saelens_folder

    features, steering = config.evaluate.features, config.evaluate.steering
    named = (*(features.include if features else ()), *(steering.feature_ids if steering else ()))
    sae = sae_class("standard").initial(D_IN, max([FACTOR * D_IN, *(feature + 1 for feature in named)]))
    write_saelens_folder(folder, sae, {"hf_hook_name": config.harvest.hooks[0], "model_name": "model"})


def _write_model(config: PipelineConfig, folder: Path) -> tuple[int, str]:
    """Write the narrow model and its tokenizer; returns the real width and where the shape comes from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    from pipeline.architecture import find_architecture

    shape = find_architecture(config.model, config.harvest.runtime.offline)
    settings = shape.skeleton.config
    text = settings.get_text_config()
    if shape.has_model:
        local = shape.folder is not None
        name, revision = config.model.name, config.model.revision
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=local)
    else:
        assert shape.folder
        special: Any = read_json(shape.folder / "special_tokens.json")
        (end,) = (name for name, token in special.items() if token == text.eos_token_id)
        whole = stand_in_tokenizer(special, text.vocab_size)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token=end)
    tokenizer.save_pretrained(folder)
    d_in = text.hidden_size
    for name, value in NARROW.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, min(value, getattr(text, name)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)
    return d_in, shape.origin


def _write_start(rehearsed: PipelineConfig, folder: Path) -> None:
    """Write untrained SAEs of the hooks' width, for a training that starts from given ones."""
    from harvest.activation_store import slug
    from harvest.language_model import load_skeleton
    from pipeline.settings_check import check_widths
    from train.checkpoint import save_sae
    from train.exclusion import InputStatistics
    from train.kinds import new_sae

    d_in = check_widths(load_skeleton(rehearsed.model, None, offline=True), rehearsed.harvest)
    sae = new_sae(rehearsed.train, d_in or D_IN, 1.0, "cpu")
    about = {"architecture": sae.kind, **sae.settings()}
    for hook in rehearsed.harvest.hooks:
        save_sae(folder / slug(hook), sae, hook, InputStatistics(1.0, 1.0, None), about)


def stand_in_tokenizer(special: dict[str, int], vocabulary: int) -> Any:
    """A byte-level tokenizer without merges, whose special tokens have the ids of the real one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    taken = set(special.values())
    free = (i for i in range(vocabulary) if i not in taken)
    ids = {letter: next(free) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())} | special
    ids |= {f"unused-{i}": i for i in free}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    thoughts = {"<think>", "</think>"}  # added, but not marked special, as in R1's tokenizer
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special if name not in thoughts])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in special if name in thoughts])
    return tokenizer


def write_rows(path: Path, source: Source, words: int, excluded: Sequence[int] = ()) -> None:
    """Made-up rows in a source's schema, with so many words in all; equal on every machine.

    Rows of token ids have the `excluded` ones at their start, where templates put markers. All are of one stratum.
    """
    rng = random.Random(0)
    chosen = {name: value[0] if isinstance(value, tuple) else value for name, value in (source.where or {}).items()}
    stratum = {source.strata: "made up"} if source.strata else {}
    with path.open("w", encoding="utf-8") as file:
        while words > 0:
            length = rng.randint(60, 400)
            words -= length
            row = _row(source.rows, length, rng, excluded) | stratum | chosen
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _row(rows: str, words: int, rng: random.Random, excluded: Sequence[int]) -> dict[str, Any]:
    first, second, third = (" ".join(rng.choices(TEXT.split(), k=max(1, words * share // 10))) for share in (2, 6, 2))
    if rows == "tokens":
        return {"input_ids": [*excluded, *(rng.randrange(100) for _ in range(words))]}
    if rows in ("conversation", "messages"):  # LMSYS-Chat-1M
        turns = [("user", first), ("assistant", second), ("user", third), ("assistant", "so it is")]
        return {"conversation_id": str(words), rows: [{"role": role, "content": text} for role, text in turns]}
    if rows == "conversations":  # OpenThoughts-114k
        parts = {"thought": second, "solution": third}
        answer = "".join(f"<|begin_of_{tag}|>\n\n{text}\n\n<|end_of_{tag}|>\n\n" for tag, text in parts.items())
        turns = [("user", first), ("assistant", answer)]
        return {"system": "think first", rows: [{"from": role, "value": text} for role, text in turns]}
    if rows == "reasoning":  # OpenThoughts-114k, metadata
        return {"problem": first, "deepseek_reasoning": second, "deepseek_solution": third, "domain": "math"}
    return {"text": f"{first} {second} {third}"}
