"""A rehearsal: every stage with the settings of a real run, on a narrow random model and made-up text.

Replaced are only the model (same layers, vocabulary and hooks, a fraction of the width), the text (rows in the
same schemas), the width of the SAE and the budgets. Template, contexts, shards, hooks, exclusions, schedules
and evaluation are those of the settings, so what a rented machine will run is run here first.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harvest.config import SampleConfig, Source
from harvest.files import UserError, read_json, write_json
from pipeline.config import PipelineConfig
from pipeline.fingerprint import STAGES
from pipeline.running import run_stage
from pipeline.stages import Runs, find_runs

MARKER = "dry-run.json"
D_IN = 32
NARROW = {
    "hidden_size": D_IN,
    "intermediate_size": 2 * D_IN,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": D_IN // 2,
}
STEPS = 8  # training steps at least
HOLDOUT_FRACTION = 0.3  # of made-up text, of which there is little
TEXT = (
    "wait alternatively hmm maybe perhaps let me therefore however but another since so check the sum of two odd "
    "numbers is even suppose that x equals three then we get nine which cannot be right again prove for all n"
)


def dry_run(config: PipelineConfig, folder: Path, name: str, say: Callable[[str], None]) -> list[Path]:
    """Run every stage into `folder` and return the reports.

    An earlier rehearsal in the folder is removed. Raises UserError when the folder is not one, when the
    model's shape cannot be had, when an excluded token never occurs, and whatever the stages raise.
    """
    _clear(folder)
    write_json(folder / MARKER, {"settings": name})
    d_in, origin = _write_model(config, folder / "model")
    rehearsed = rehearsal(config, d_in, folder)
    for source in rehearsed.sample.sources:
        words = words_needed(rehearsed.sample, source)
        write_rows(Path(source.path), source, words, config.train.exclude.token_ids)
    say(f"dry-run  {name}: shape of the model from {origin}; width {d_in} -> {D_IN}, everything into {folder}")
    sweep = find_runs(rehearsed, folder / "runs")
    for stage in STAGES:
        run_stage(sweep, stage, allow_mixed=False, force=False, confirm=lambda _question: False)
    for line in _excluded(sweep[0]):
        say(f"dry-run  {line}")
    say(f"dry-run  passed: every stage of {name} runs; its figures, of a random model, mean nothing")
    return [runs.directory("evaluate") / "report.html" for runs in sweep]


def rehearsal(config: PipelineConfig, d_in: int, folder: Path) -> PipelineConfig:
    """The settings with model, text, width and budgets replaced, and without compiled layers on a CPU.

    `d_in` is the width of the real model.
    """
    sample, train, downstream = config.sample, config.train, config.evaluate.downstream
    shards = min(sample.shards("train"), max(2, math.ceil(STEPS * train.batch_size / sample.shard_rows)))
    rows = shards * sample.shard_rows

    def narrower(width: int) -> int:
        return max(1, width * D_IN // d_in)

    sae = train.sae.model_copy(update={"d_sae": train.sae.d_sae and narrower(train.sae.d_sae)})
    sweep = train.sweep and train.sweep.model_copy(
        update={"d_sae": tuple(dict.fromkeys(narrower(width) for width in train.sweep.d_sae))}
    )
    length = {"training_tokens": min(train.training_tokens, rows)} if train.training_tokens else {"epochs": 1.0}
    runtime = train.runtime.model_copy(update={"checkpoint_every": max(1, rows // train.batch_size // 2)})
    if downstream:
        downstream = downstream.model_copy(update={"contexts": min(2, downstream.contexts), "batch_contexts": 1})
    score, diff, steering = config.evaluate.reason_score, config.evaluate.diff, config.evaluate.steering
    if score and score.contexts:
        score = score.model_copy(update={"contexts": min(score.contexts, (shards + 1) * sample.shard_contexts)})
    evaluate = {
        "downstream": downstream,
        "reason_score": score,
        "diff": diff and diff.model_copy(update={"model": None}),
        "steering": steering and steering.model_copy(update={"max_new_tokens": min(4, steering.max_new_tokens)}),
        "also": (),
    }
    sources = tuple(_made_up(source, folder) for source in sample.sources)
    budget = {
        "sources": sources,
        "train_tokens": rows,
        "holdout_tokens": sample.shard_rows,
        "holdout_fraction": max(sample.holdout_fraction, HOLDOUT_FRACTION),
    }
    from harvest.device import resolve_device

    at_home = config.harvest.runtime.model_copy(update={"store": None})
    compiled = config.harvest.compile and resolve_device(at_home.device).type == "cuda"  # a CPU may lack a compiler
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": str(folder / "model"), "revision": None}),
            "sample": sample.model_copy(update=budget),
            "harvest": config.harvest.model_copy(update={"runtime": at_home, "compile": compiled}),
            "train": train.model_copy(update={"sae": sae, "sweep": sweep, "runtime": runtime, **length}),
            "evaluate": config.evaluate.model_copy(update=evaluate),
        }
    )


def _made_up(source: Source, folder: Path) -> Source:
    """A source that reads made-up rows, which are of no split."""
    set_by_user = source.model_dump(exclude={"revision", "subset", "split"}, exclude_unset=True)
    return Source.model_validate(set_by_user | {"path": str(folder / f"{source.name}.jsonl")})


def _clear(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not (folder / MARKER).is_file()):
        raise UserError(f"{folder}: not an earlier dry run (it has no {MARKER}); move it, or choose another --runs")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_model(config: PipelineConfig, folder: Path) -> tuple[int, str]:
    """Write the narrow model and its tokenizer; returns the real width and where the shape comes from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    from pipeline.architecture import find_architecture

    shape = find_architecture(config.model, config.harvest.runtime.offline)
    if shape.has_model:
        tokenizer = AutoTokenizer.from_pretrained(
            config.model.name, revision=config.model.revision, local_files_only=shape.folder is not None
        )
    else:
        assert shape.folder
        special: Any = read_json(shape.folder / "special_tokens.json")
        vocabulary = shape.skeleton.config.get_text_config().vocab_size
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=stand_in_tokenizer(special, vocabulary))
    tokenizer.save_pretrained(folder)
    settings = shape.skeleton.config
    text = settings.get_text_config()
    d_in = text.hidden_size
    for name, value in NARROW.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, min(value, getattr(text, name)))
    if getattr(text, "num_key_value_heads", None) and text.num_attention_heads % text.num_key_value_heads:
        text.num_key_value_heads = text.num_attention_heads
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)
    return d_in, shape.origin


def stand_in_tokenizer(special: dict[str, int], vocabulary: int) -> Any:
    """A byte-level tokenizer without merges, whose special tokens have the ids of the real one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    taken = set(special.values())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    free = (i for i in range(vocabulary) if i not in taken)
    ids = {letter: next(free) for letter in alphabet} | special
    ids |= {f"unused-{i}": i for i in free}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    thoughts = {"<think>", "</think>"}  # added, but not marked special, as in R1's tokenizer
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special if name not in thoughts])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in special if name in thoughts])
    return tokenizer


def words_needed(sample: SampleConfig, source: Source) -> int:
    """Words that surely fill a source's share of both splits: a word is a token at least."""
    fraction = sample.holdout_fraction
    need = max(sample.train_tokens / (1 - fraction), sample.holdout_tokens / fraction)
    return int(1.5 * source.share * need) + 20_000


def write_rows(path: Path, source: Source, words: int, excluded: Sequence[int] = ()) -> None:
    """Made-up rows in a source's schema, with so many words in all; equal on every machine.

    Rows of token ids have the `excluded` ones at their start, where templates put markers.
    """
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while words > 0:
            length = rng.randint(60, 400)
            words -= length
            row = _row(source.rows, length, rng, excluded) | _chosen(source)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _chosen(source: Source) -> dict[str, Any]:
    """What `where` and `strata` look for in a row; all rows are of one stratum."""
    wanted = {name: value[0] if isinstance(value, tuple) else value for name, value in (source.where or {}).items()}
    return ({source.strata: "made up"} if source.strata else {}) | wanted


def _row(rows: str, words: int, rng: random.Random, excluded: Sequence[int]) -> dict[str, Any]:
    parts = (" ".join(rng.choices(TEXT.split(), k=max(1, words * share // 10))) for share in (2, 6, 2))
    first, second, third = parts
    if rows == "tokens":
        return {"input_ids": [*excluded, *(rng.randrange(100) for _ in range(words))]}
    if rows in ("conversation", "messages"):  # LMSYS-Chat-1M
        turns = [("user", first), ("assistant", second), ("user", third), ("assistant", "so it is")]
        conversation = [{"role": role, "content": text} for role, text in turns]
        return {"conversation_id": str(words), "model": "none", rows: conversation, "turn": 2}
    if rows == "conversations":  # OpenThoughts-114k
        thought = f"<|begin_of_thought|>\n\n{second}\n\n<|end_of_thought|>\n\n"
        answer = f"{thought}<|begin_of_solution|>\n\n{third}\n\n<|end_of_solution|>"
        turns = [{"from": "user", "value": first}, {"from": "assistant", "value": answer}]
        return {"system": "think first", "conversations": turns}
    if rows == "reasoning":  # OpenThoughts-114k, metadata
        answer = {"deepseek_reasoning": second, "deepseek_solution": third}
        return {"problem": first, **answer, "domain": "math", "source": "none"}
    return {"text": f"{first} {second} {third}"}


def _excluded(runs: Runs) -> Iterator[str]:
    """What `train.exclude.token_ids` takes out of the sampled text.

    Raises UserError for a token that never occurs: it excludes nothing, so it is not the one that was meant.
    """
    import numpy as np
    from tokenizers import Tokenizer

    from harvest.contexts import Contexts

    tokenizer = Tokenizer.from_file(str(Path(runs.config.model.name) / "tokenizer.json"))
    contexts = Contexts(runs.directory("sample") / "contexts")
    tokens = contexts.read("train", "tokens", 0, contexts.count("train"))
    for token in runs.config.train.exclude.token_ids:
        count = int(np.count_nonzero(tokens == token))
        if not count:
            raise UserError(
                f"train.exclude.token_ids: {token}: never occurs in text that this template and tokenizer make, so it "
                "excludes nothing; name the ids of the tokens that you mean"
            )
        name = tokenizer.id_to_token(token)
        yield f"token {token} ({name}) is excluded, as set: {count:,} of {tokens.size:,} training rows"
