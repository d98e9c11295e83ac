"""The steering file for lm-eval: what is in it, and that lm-eval writes the same tokens as `steer` with it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import TWO_HOOKS, only, pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from harvest.activation_store import ActivationStore
from harvest.files import UserError
from pipeline.steering_file import _below_base
from train.checkpoint import load_sae
from train.exclusion import ExcludeConfig, kept_rows

HOOK, CHILD = "model.layers.1", Path(__file__).with_name("lm_eval_steered.py")
FLOAT32 = "evaluate.downstream.compute_dtype=float32"
WORDS = ["wait", "therefore", "the", "sum", "is", "even", "so", "let", "me", "check", "of", "two", "numbers"]
PROMPTS = [" ".join(WORDS[n % 5 : n % 5 + 2 + n]) for n in range(10)]  # 2 to 11 words
NEW = 12


def largest(folder: Path) -> torch.Tensor:
    """The largest activation of each feature on the kept held-out rows, read row by row."""
    store = ActivationStore.open(only(folder, "runs/harvest/*/store"))
    saved, g = load_sae(only(folder, f"runs/train/*/{HOOK}")), store.geometry
    found = []
    for shard in range(g.holdout_shards):
        kept = kept_rows(store, "holdout", HOOK, shard, ExcludeConfig(), saved.statistics.norm_limit)
        chunks = range(shard * g.chunks_per_shard, (shard + 1) * g.chunks_per_shard)
        rows = torch.cat([torch.from_numpy(store.read_chunk("holdout", HOOK, chunk)) for chunk in chunks])
        found.append(saved.sae.encode(rows.view(torch.bfloat16)[torch.from_numpy(kept)]).amax(0))
    return torch.stack(found).amax(0)


def strongest(folder: Path) -> list[int]:
    return largest(folder).topk(2).indices.tolist()


def test_the_file_holds_what_steer_adds(finished, monkeypatch, tmp_path):
    monkeypatch.chdir(finished)
    one, two = strongest(finished)
    to = tmp_path / "two.pt"
    ran = pipeline("export", "--steering", str(to), "--feature", f"{one}:2", "--feature", f"{two}:add:-0.5:all")
    assert (ran.status, ran.out.strip()) == (0, str(to))
    file = torch.load(to, weights_only=True)
    (entry,) = file.values()
    assert [*file] == ["layers.1"]
    assert {name: entry[name] for name in ("action", "steering_coefficient", "bias", "head_index")} == {
        "action": "add",
        "steering_coefficient": 1.0,
        "bias": None,
        "head_index": None,
    }
    sae, maxima = load_sae(only(finished, f"runs/train/*/{HOOK}")).sae, largest(finished)
    wanted_D = 2 * maxima[one] * sae.W_dec[one] / sae.scale - 0.5 * maxima[two] * sae.W_dec[two] / sae.scale
    assert torch.allclose(entry["steering_vector"], wanted_D, rtol=1e-5, atol=1e-7)
    assert entry["steering_vector"].dtype == torch.float32
    assert sae.scale != 1 and wanted_D.norm() > 0.01


def steered_by(folder: Path, feature: str, to: Path) -> list[list[int]]:
    """Token ids of what `steer` writes after each prompt, with the operation of the steering file `to`."""
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    ran = pipeline("export", FLOAT32, "--steering", str(to), "--feature", feature)
    assert ran.status == 0, ran.out
    ran = pipeline(
        *("steer", FLOAT32, "--feature", feature, *asked, "--max-new-tokens", str(NEW), "--no-chat"),
        *("--json", str(folder / "steered.json")),
    )
    assert ran.status == 0, ran.out
    (found,) = json.loads((folder / "steered.json").read_text())["completions"]
    plain = [row[0]["token_ids"] for row in found["completions"]]
    steered = [row[1]["token_ids"] for row in found["completions"]]
    assert plain != steered
    return steered


def test_a_plain_hook_with_the_file_writes_the_tokens_of_steer(finished, monkeypatch, tmp_path):
    monkeypatch.chdir(finished)
    to = tmp_path / "one.pt"
    wanted = steered_by(tmp_path, f"{strongest(finished)[0]}:add:3", to)
    ((hookpoint, entry),) = torch.load(to, weights_only=True).items()
    model = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny-llama")
    layer = dict(model.base_model.named_modules())[hookpoint]
    layer.register_forward_hook(lambda _layer, _input, output: output + entry["steering_vector"])
    for prompt, tokens in zip(PROMPTS, wanted, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
        assert out[: len(tokens)] == tokens
        assert all(
            token in (model.generation_config.eos_token_id, tokenizer.pad_token_id) for token in out[len(tokens) :]
        )


def test_lm_eval_writes_the_tokens_of_steer(finished, monkeypatch, tmp_path):
    """LM_EVAL_PYTHON names an interpreter with lm-eval 0.4.13, in an environment of its own."""
    python = os.environ.get("LM_EVAL_PYTHON")
    if not python:
        pytest.skip("LM_EVAL_PYTHON names no Python with lm-eval")
    monkeypatch.chdir(finished)
    to = tmp_path / "one.pt"
    wanted = steered_by(tmp_path, f"{strongest(finished)[0]}:add:3", to)
    command = [python, str(CHILD), str(finished / "assets/tiny-llama"), str(to), str(NEW)]
    said = subprocess.run(command, cwd=tmp_path, input=json.dumps(PROMPTS), capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny-llama")
    assert len(answers) == 10
    for tokens, answer in zip(wanted, answers, strict=True):
        assert answer["token_ids"][: len(tokens)] == tokens
        assert answer["text"].strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steering", "x.safetensors", "--feature", "1"), "--steering: x.safetensors: lm-eval knows the file by its"),
        (("--steering", "x.pt"), "--steering: no feature to write: give --feature 123 or --feature 123:add:2"),
        (("--steering", "no/x.pt", "--feature", "1"), "--steering: no/x.pt: there is no folder no"),
        (("--feature", "1"), "export: --feature and --hook go with --steering FILE.pt"),
        (("--steering", "x.pt", "--feature", "1:set"), "--feature: 1:set:all: lm-eval adds a vector at all tokens"),
        (("--steering", "x.pt", "--feature", "1::prompt"), "--feature: '1::prompt': '' is no operation"),
        (("--steering", "x.pt", "--feature", "1:prompt"), "--feature: 1:add:prompt: lm-eval adds a vector at all"),
        (("--steering", "x.pt", "--feature", "128"), "--feature: 128: the SAE has 128 features, 0 to 127"),
        (("--steering", "x.pt", "--feature", "1", "--hook", "model.layers.9"), "--hook: 'model.layers.9': these set"),
        (("--steering", "there.pt", "--feature", "1"), "there.pt: is there already; --force writes it anew"),
    ],
)
def test_options_that_make_no_file(finished, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(finished)
    there = tmp_path / "there.pt"
    there.write_text("mine")
    ran = pipeline("export", *(str(there) if argument == there.name else argument for argument in arguments))
    assert ran.status in (1, 2)
    assert message in " ".join(ran.out.split())
    assert there.read_text() == "mine"
    assert not (finished / "x.pt").exists()


def test_the_sae_of_another_hook(two_hooks, monkeypatch, tmp_path):
    monkeypatch.chdir(two_hooks)
    to = tmp_path / "zero.pt"
    settings = (TWO_HOOKS, "train.lr=3e-3")
    feature = next(
        feature
        for feature in range(128)
        if pipeline(
            "export", *settings, "--steering", str(to), "--feature", str(feature), "--hook", "model.layers.0"
        ).status
        == 0
    )
    assert [*torch.load(to, weights_only=True)] == ["layers.0"]
    again = pipeline("export", *settings, "--force", "--steering", str(to), "--feature", str(feature))
    assert again.status == 0, again.out
    assert [*torch.load(to, weights_only=True)] == ["layers.1"]


@pytest.mark.parametrize("module", ["lm_head", ""])
def test_a_hook_that_lm_eval_cannot_find_is_named(finished, module):
    model = AutoModelForCausalLM.from_pretrained(finished / "assets/tiny-llama")
    assert _below_base(model, "model.layers.1.mlp") == "layers.1.mlp"
    with pytest.raises(
        UserError, match=f"^{module}: is not below LlamaModel, where lm-eval looks for hooks; take anoth"
    ):
        _below_base(model, module)
