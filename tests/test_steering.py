"""Steering on the tiny model: strength 0 changes nothing, a feature that writes a word makes it written."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import only, pipeline, unlisted
from transformers import AutoModelForCausalLM

from evaluate.generation import complete
from evaluate.operations import Interventions, Operation, operated
from evaluate.sampler import Draw, Sampling, gumbel
from evaluate.steering import built_in_prompts, figures, max_activations, plan, steer, word_pattern
from evaluate.visible import visible
from harvest.activation_store import ActivationStore
from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.language_model import HookedModel, load_model
from harvest.tokenizer import load_whole_tokenizer
from train.checkpoint import SavedSae, load_sae, save_sae
from train.config import ExcludeConfig
from train.exclusion import InputStatistics, kept_rows
from train.standard import Standard

HOOK = "model.layers.1"
TINY = ModelConfig(name="assets/tiny-llama")
PROMPTS = ("wait therefore the sum", "is even so let me check the sum of two", "numbers")


@pytest.fixture
def tiny_model(finished, monkeypatch) -> tuple[HookedModel, object]:
    monkeypatch.chdir(finished)
    model = load_model(TINY, None, [HOOK, "model.layers.0"], torch.float32, torch.device("cpu"), with_head=True)
    return model, load_whole_tokenizer(TINY, None, offline=True)


def writing(model: HookedModel, token: int) -> SavedSae:
    """An SAE whose feature 3 points where the LM head reads one token."""
    sae = Standard.initial(32, 8, scale=0.5)
    sae.W_dec[3] = model.model.lm_head.weight[token] / model.model.lm_head.weight[token].norm()
    return SavedSae(sae, HOOK, InputStatistics(0.5, 1.0, None), {})


def adding(vector_D: torch.Tensor, *strengths: float, hook: str = HOOK) -> Interventions:
    """Feature 3 of an SAE whose direction is a vector, added with each strength; 0 adds nothing."""
    sae = Standard.initial(32, 8, scale=0.5)
    sae.W_dec[3] = 0.5 * vector_D
    saved = SavedSae(sae, hook, InputStatistics(0.5, 1.0, None), {})
    return Interventions(saved, {3: 1.0}, [(Operation(3, "add", strength),) for strength in strengths])


NOTHING = adding(torch.zeros(32), 0)


def amplified(feature: int, strengths: tuple[float, ...]):
    return plan({strength: (Operation(feature, "add", strength),) for strength in strengths})


@pytest.mark.parametrize("hook", [HOOK, "model.layers.0"])
@pytest.mark.parametrize("temperature", [0.0, 0.05])
def test_strength_zero_writes_the_very_same_tokens(tiny_model, hook, temperature):
    model, tokenizer = tiny_model
    sampling = Sampling(12, temperature, seed=3)
    vector_D = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 20
    both = complete(model, tokenizer, adding(vector_D, 0, 1, hook=hook), PROMPTS, sampling)
    plain = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.bfloat16).float().eval()
    for number, (prompt, row) in enumerate(zip(PROMPTS, both, strict=True)):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]

        def noisy(written, scores, number=number, prompt=ids.shape[1]):
            noise = gumbel(Draw((3, number), written.shape[1] - prompt), np.arange(scores.shape[1]))
            return scores / temperature + torch.from_numpy(noise).float() if temperature else scores

        free = plain.generate(ids, max_new_tokens=12, do_sample=False, logits_processor=[noisy], pad_token_id=0)[0]
        assert row[0].token_ids == free[ids.shape[1] :].tolist() != row[1].token_ids
    unhooked = HookedModel(plain, {hook: torch.nn.Identity()}, torch.device("cpu"))
    with pytest.raises(UserError, match=f"{hook}: the model read 15 tokens of a sequence, and 0 passed the hook"):
        complete(unhooked, tokenizer, adding(vector_D, 0, hook=hook), PROMPTS, sampling)


def test_a_sample_depends_on_seed_and_prompt_not_on_the_batch(tiny_model):
    model, tokenizer = tiny_model
    together = complete(model, tokenizer, NOTHING, PROMPTS, Sampling(8, 1.0, seed=1))
    apart = complete(model, tokenizer, NOTHING, PROMPTS, Sampling(8, 1.0, seed=1), slots=1)
    other = complete(model, tokenizer, NOTHING, PROMPTS, Sampling(8, 1.0, seed=2))
    assert together == apart
    assert together != other


def test_a_word_rises_with_the_strength_of_the_feature_that_writes_it(tiny_model):
    model, tokenizer = tiny_model
    (token,) = tokenizer(" check", add_special_tokens=False)["input_ids"]
    saved = writing(model, token)
    prompts = [f"{prompt} {' '.join(['so', 'let', 'me'][: i % 4])}" for i in range(20) for prompt in PROMPTS]
    strengths = (0.1, 0.2, 0.4, 1.6)
    (steered,) = steer(model, tokenizer, saved, {3: 1.0}, [amplified(3, strengths)], prompts, Sampling(8, 0.1))
    found = figures(steered, ["check"])
    assert found["rises"] and found["prompts"] == 60
    last = found["by_strength"][-1]
    assert last["words_per_100_tokens_change"]["low"] > 10
    for g, line in enumerate(found["by_strength"]):
        texts = [row[g].text for row in steered.completions]
        assert line["words"] == sum(re.split(r"\W+", text).count("check") for text in texts)
        rate = line["words_per_100_tokens"]
        assert rate["value"] == pytest.approx(100 * line["words"] / (60 * line["tokens"]["value"]))
        assert rate["low"] <= rate["value"] <= rate["high"]


def test_the_vector_is_in_units_of_the_activation(tiny_model, finished):
    """Adding strength 1 moves the SAE's pre-activation of the feature by max_activation · W_dec,i · W_enc,i."""
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    saved = load_sae(only(finished, f"runs/train/*/{HOOK}"))
    exclude = ExcludeConfig()
    rows = []
    g = store.geometry
    for chunk in range(g.holdout_shards * g.chunks_per_shard):
        acts = torch.from_numpy(store.read_chunk("holdout", HOOK, chunk)).view(torch.bfloat16).float()
        kept = kept_rows(store, "holdout", HOOK, chunk // g.chunks_per_shard, exclude, saved.statistics.norm_limit)
        start = chunk % g.chunks_per_shard * len(acts)
        rows.append(acts[torch.from_numpy(kept[start : start + len(acts)])])
    largest = saved.sae.encode(torch.cat(rows)).amax(0)
    feature = int(largest.argmax())
    (maximum,) = max_activations(store, saved, exclude, [feature])
    assert maximum == pytest.approx(float(largest[feature]), rel=1e-5)
    added = operated(
        saved.sae, torch.zeros(1, 32), [Operation(feature, "add", 1.0)], {feature: maximum}, torch.ones(1, 1).bool()
    )
    vector_D = added[0]
    rebuilt = saved.sae.decode(torch.nn.functional.one_hot(torch.tensor([feature]), saved.sae.d_sae) * maximum)
    assert torch.allclose(vector_D, rebuilt[0] - saved.sae.b_dec / saved.sae.scale, rtol=1e-4, atol=1e-5)


def test_words_are_whole_and_spelled_as_the_vocabulary_says():
    found = word_pattern(["wait", "let me", "But", "hmm|hm"]).findall(
        "Wait, await. let  me: But but Hm hmm hmmm WAIT\nLet me"
    )
    assert found == ["Wait", "let  me", "But", "Hm", "hmm", "Let me"]
    with pytest.raises(UserError, match="no word"):
        word_pattern(["|", " "])


def test_hidden_characters_are_shown_as_escapes():
    assert visible("a\x1b[31m\u202eb\r\x00\ud800") == r"a\x1b[31m\u202eb\r\x00\ud800"
    assert visible("né 好\n\t[bold]") == "né 好\n    [bold]"


def test_built_in_prompts_are_sixty_different_ones():
    assert len(set(built_in_prompts())) == 60


def test_steer_shows_completions_side_by_side_and_writes_figures(run_folder):
    Path("prompts.txt").write_text("wait [red]so[/red]\n\nthe sum \x1b[31m\n")
    ran = pipeline(
        *("steer", "--feature", "3", "--feature", "5", "--strength", "2", "--strength", "8", "--max-activation", "1"),
        *("--prompts", "prompts.txt", "--max-new-tokens", "4", "--word", "even", "--json", "out.json"),
    )
    assert ran.status == 0, ran.out
    assert "as it is" in ran.out and "strength 8" in ran.out
    assert "[red]so[/red]" in ran.out and "\x1b" not in ran.out and r"\x1b[31m" in ran.out
    out = json.loads(Path("out.json").read_text())
    assert [f["feature"] for f in out["figures"]] == [3, 5]
    assert [line["strength"] for line in out["figures"][0]["by_strength"]] == [0, 2, 8]
    assert out["completions"][0]["completions"][0][0] == out["completions"][1]["completions"][0][0]
    ran = pipeline("steer", "--feature", "3", "--measure", "--max-new-tokens", "1", "--max-activation", "1")
    assert ran.status == 0, ran.out
    assert "60 prompts" in ran.out


def test_steer_says_that_it_changed_nothing(run_folder):
    given = ("steer", "--max-activation", "1", "--prompt", "so", "--max-new-tokens", "1")
    ran = pipeline(*given, "--feature", "3:add:2:thinking")
    assert ran.status == 0, ran.out
    said = "feature 3 (add, thinking), largest activation 1: nothing was changed: no token was in such a place\n"
    assert said in ran.out
    assert "nothing was changed" not in pipeline(*given, "--feature", "3:add:2:prompt").out


def test_each_feature_has_its_own_largest_activation(run_folder):
    rest = ("--prompt", "so", "--max-new-tokens", "1", "--measure", "--together", "--json", "out.json")
    ran = pipeline("steer", "--feature", "5", "--feature", "3", "--max-activation=2", "--max-activation=0.1", *rest)
    assert ran.status == 0, ran.out
    together = json.loads(Path("out.json").read_text())["figures"][0]["together"]
    assert [(each["feature"], each["max_activation"]) for each in together] == [(5, 2), (3, 0.1)]


def test_several_features_are_operated_on_at_once(run_folder):
    one = ("--feature", "3:ablate", "--feature", "5:set:generated", "--feature", "7:scale:3")
    rest = ("--prompt", "so <think>let me</think>", "--max-new-tokens", "4", "--max-activation", "8", "--measure")
    ran = pipeline("steer", *one, *rest, "--strength", "2", "--strength", "1", "--together", "--json", "out.json")
    assert ran.status == 0, ran.out
    assert "feature 3 (ablate, all), 5 (set, generated), 7 (scale, all), 1 prompts" in ran.out
    out = json.loads(Path("out.json").read_text())
    (figures,), (made,) = out["figures"], out["completions"]
    assert [line["strength"] for line in figures["by_strength"]] == made["strengths"] == [None, 1, 2]
    assert [(each["feature"], each["op"], each["where"]) for each in figures["together"]] == [
        (3, "ablate", "all"),
        (5, "set", "generated"),
        (7, "scale", "all"),
    ]
    assert [[list(o.values()) for o in each] for each in made["operations"]] == [
        [],
        [[3, "ablate", 0, "all"], [5, "set", 1, "generated"], [7, "scale", 3, "all"]],
        [[3, "ablate", 0, "all"], [5, "set", 2, "generated"], [7, "scale", 3, "all"]],
    ]
    assert [c["changed"] for c in made["completions"][0]][1:] == [c["processed"] for c in made["completions"][0]][1:]
    ran = pipeline("steer", "--feature", "3", "--op", "ablate", *rest, "--where", "thinking", "--json", "out.json")
    assert ran.status == 0, ran.out
    out = json.loads(Path("out.json").read_text())
    assert out["figures"][0]["rises"] is None and out["completions"][0]["strengths"] == [None, 0]
    assert out["completions"][0]["completions"][0][1]["changed"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--feature", "128", "--prompt", "a"], "--feature: 128: the SAE has 128 features, 0 to 127"),
        (["--feature", "-1", "--prompt", "a"], "0 to 127"),
        (["--feature", "1", "--prompt", "a", "--strength", "nan"], "--strength: nan: a strength is a number"),
        (["--feature", "x", "--prompt", "a"], "--feature: 'x': a feature is a number, as 123 or 123:set:2:thinking"),
        (["--feature", "1:sets", "--prompt", "a"], "'sets' is no operation (add, set, ablate, scale), place (all"),
        (["--feature", "1:set:add", "--prompt", "a"], "'add' is no operation (add, set, ablate, scale), place (all"),
        (["--feature", "1:nan", "--prompt", "a"], "--feature: nan: a strength is a number"),
        (["--feature", "1", "--op", "sets", "--prompt", "a"], "Invalid value for '--op'"),
        (["--feature", "1:set", "--feature", "1:ablate", "--together", "--prompt", "a"], "1: one list has two operat"),
        (["--feature", "1", "--prompt", "  "], "prompt 1 of 1 is empty"),
        (["--feature", "1", "--prompt", "so " * 200], "more than the model's 128 positions"),
        (["--feature", "1"], "no prompt: give --prompt TEXT"),
        (["--feature", "1", "--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--feature", "1", "--prompts", "latin-1.txt"], "latin-1.txt: not UTF-8 text; prompts are one a line"),
        (["--feature", "1", "--prompts", "blank.txt"], "blank.txt: holds no prompt; write one a line"),
        (["--feature", "1", "--prompts", "blank.jsonl"], "blank.jsonl: holds no prompt"),
        (["--feature", "1", "--prompt", "a", "--chat"], "no chat template"),
        (["--feature", "1", "--prompt", "a", "--max-activation", "0"], "--max-activation: 0.0, 1.0: a number above 0"),
        (["--feature", "1", "--prompt", "a", "--max-activation", "2"], "give one, or one for each --feature"),
        (["--feature", "1", "--prompt", "a", "--hook", "model.layers.0"], "these settings have model.layers.1"),
        (["--feature", "1", "--prompt", "a", "--json", "no/folder.json"], "there is no folder no"),
        (["--feature", "1", "--prompt", "a", "--json", "."], "--json: .: is a folder"),
        (["--feature", "1", "--prompt", "\udcff"], "not UTF-8 text"),
        (["--feature", "1", "--prompt", "a", "train.seed=7"], "the train stage for these settings is not complete"),
    ],
)
def test_bad_input_is_named(finished, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(finished)
    for name, data in (("latin-1.txt", b"caf\xe9\n"), ("blank.txt", b" \n\n"), ("blank.jsonl", b"\n")):
        (tmp_path / name).write_bytes(data)
        arguments = [str(tmp_path / name) if argument == name else argument for argument in arguments]
    extra = [] if "not complete" in says else ["--max-activation", "1"]
    ran = pipeline("steer", *arguments, *extra)
    assert ran.status in (1, 2), ran.out
    assert says in ran.out


def test_an_sae_of_another_width_is_refused(run_folder):
    folder = only(run_folder, f"runs/train/*/{HOOK}")
    save_sae(folder, Standard.initial(16, 8), HOOK, load_sae(folder).statistics, {})
    unlisted(folder.parent)
    ran = pipeline("steer", "--feature", "1", "--prompt", "a", "--max-activation", "1")
    assert ran.status == 1
    assert "the SAE has d_in 16, but model.layers.1 of this model is 32 wide" in ran.out


def test_a_feature_that_never_fires_has_no_maximum(finished):
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    saved = load_sae(only(finished, f"runs/train/*/{HOOK}"))
    saved.sae.b_enc[5] = -math.inf
    with pytest.raises(UserError, match="feature 5 fires on none"):
        max_activations(store, saved, ExcludeConfig(), [2, 5])


def test_prompts_go_through_the_chat_template(tiny_model):
    model, tokenizer = tiny_model
    plain = complete(model, tokenizer, NOTHING, PROMPTS, Sampling(6))
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    chat = complete(model, tokenizer, NOTHING, PROMPTS, Sampling(6))
    by_hand = complete(
        model, tokenizer, NOTHING, [f"<|im_start|>{p}<|im_end|>" for p in PROMPTS], Sampling(6), chat=False
    )
    assert chat == by_hand
    assert chat != plain
    assert complete(model, tokenizer, NOTHING, PROMPTS, Sampling(6), chat=False) == plain
