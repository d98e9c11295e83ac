"""Feature pages and what they are made of."""

import base64
import hashlib
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import hostile
import numpy as np
import pytest
import torch
from conftest import only, pipeline
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, OPTConfig

from evaluate import unembedding
from evaluate.config import FeaturesConfig
from evaluate.feature_pages import choose_features, nearest_features, read_scores, usable, write_pages
from evaluate.feature_views import Views, number, visible
from evaluate.figures import read_figures
from evaluate.unembedding import load_unembedding, promoted, token_logits
from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.tokenizer import load_tokenizer

HOOK = "model.layers.1"


def test_features_are_chosen_by_score_and_by_chance():
    density = np.array([0, 0.5, 0.1, 0.2, 0.3, 0.4, 0.01, 0])
    score = np.array([9, 0.1, 0.2, 0.3, np.nan, 0.4, 0.5, 8])
    config = FeaturesConfig(count=4, random_share=0.5, include=(7,))
    chosen = choose_features(config, density, score).tolist()
    assert chosen[:3] == [7, 6, 5]  # asked for, though it is dead; then the living by score
    assert len(chosen) == len(set(chosen)) == 4
    assert density[chosen[3]] > 0
    drawn = [choose_features(FeaturesConfig(count=2, seed=seed), density, None).tolist() for seed in range(20)]
    assert {feature for pair in drawn for feature in pair} == {1, 2, 3, 4, 5, 6}  # not the dense ones alone
    assert sorted(choose_features(FeaturesConfig(count=200), density, None)) == [1, 2, 3, 4, 5, 6]
    assert choose_features(config, np.zeros(8), None).tolist() == [7]
    assert choose_features(FeaturesConfig(), np.zeros(8), None).tolist() == []
    with pytest.raises(UserError, match=r"include: 8: the SAE has 8 features, 0 to 7"):
        choose_features(FeaturesConfig(include=(8,)), density, None)


def test_the_nearest_feature_has_the_highest_cosine():
    W_dec = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    found = nearest_features(W_dec, np.array([3, 17]), count=5)
    for feature, others in zip((3, 17), found, strict=True):
        cosine = torch.nn.functional.cosine_similarity(W_dec[feature], W_dec)
        cosine[feature] = -2
        assert [other for other, _ in others] == cosine.topk(5).indices.tolist()
        assert np.allclose([value for _, value in others], cosine.topk(5).values)


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
CONFIGS = {
    "tied": LlamaConfig(**SMALL, intermediate_size=8, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, intermediate_size=8, tie_word_embeddings=False),
    "gain is 1 + weight": GemmaConfig(**SMALL, intermediate_size=8, head_dim=8, num_key_value_heads=1),
    "LayerNorm": GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_promoted_tokens_are_what_the_model_s_own_end_makes_likelier(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(unembedding, "VOCABULARY_AT_ONCE", 16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    norm = model.transformer.ln_f if kind == "LayerNorm" else model.model.norm
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    directions = torch.randn(3, 16) * 5
    up, down = promoted(load_unembedding(ModelConfig(name=str(tmp_path)), None, True), directions, 4)
    # A row of length √d_in that is the direction alone passes the norm unscaled.
    unit = torch.nn.functional.normalize(directions, dim=1)
    if kind == "LayerNorm":
        unit = unit - unit.mean(1, keepdim=True)
    row = unit * 4 / unit.norm(dim=1, keepdim=True)
    with torch.no_grad():
        logits = (model.get_output_embeddings()(norm(row)) / 4) * unit.norm(dim=1, keepdim=True)
    logits -= logits.mean(1, keepdim=True)
    for tokens, largest in ((up, True), (down, False)):
        best = logits.topk(4, largest=largest)
        assert torch.equal(tokens.token_KN, best.indices)
        assert torch.allclose(tokens.logit_KN, best.values, atol=1e-4)
    some = token_logits(load_unembedding(ModelConfig(name=str(tmp_path)), None, True), directions, [7, 3, 49])
    assert torch.allclose(some, logits[:, [7, 3, 49]], atol=1e-4)


def test_a_model_without_a_final_norm_is_named(tmp_path):
    config = OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=16, do_layer_norm_before=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no final norm and LM head were found in OPTForCausalLM"):
        load_unembedding(ModelConfig(name=str(tmp_path)), None, True)


def test_pages_say_why_there_are_no_tokens(tmp_path):
    config = OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load = partial(load_unembedding, ModelConfig(name=str(tmp_path)), None, True)
    between = "model.decoder.project_out is between the final norm and the LM head of OPTForCausalLM"
    assert usable(load, 16) == (None, between)
    narrow = SimpleNamespace(head_VD=torch.zeros(50, 8))
    assert usable(lambda: narrow, 16) == (None, "the hook is of width 16, the LM head of width 8")
    assert usable(lambda: narrow, 8) == (narrow, "")


def test_token_texts_keep_blanks_and_name_half_characters(finished, monkeypatch):
    monkeypatch.chdir(finished)
    tokenizer = load_tokenizer(ModelConfig(name="assets/tiny-llama"), None, True)
    ids = tokenizer.whole.encode("wait the é\n", add_special_tokens=False).ids
    texts = [tokenizer.text(i) for i in ids]
    assert texts[:2] == ["wait", " the"]
    assert "\\xc3" in "".join(texts)
    assert texts[-1] == "\n"
    assert tokenizer.text(tokenizer.whole.token_to_id("<|im_end|>")) == "<|im_end|>"
    assert tokenizer.text(10**6) == ""


def test_nothing_in_a_token_is_hidden():
    assert visible(" wait\n\t") == "·wait↵⇥"
    assert visible(" wait", " ") == " wait"
    assert visible("\u202egpj\x00\x1b[31m") == "⟨U+202E⟩gpj⟨U+0000⟩⟨U+001B⟩[31m"
    assert visible("\u0301") == "◌\u0301"
    assert visible("é🙂") == "é🙂"
    assert visible("=" * 500) == "=" * 40 + "… (500 characters)"


def test_numbers_are_short():
    given = (0, 0.5, 12.345, 1234.5, 5e-5, 3e7, None, float("nan"))
    assert [number(value) for value in given] == ["0.00", "0.500", "12.3", "1,234", "5.00e-05", "3.00e+07", "–", "–"]


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("href", "src") and value]


def test_every_page_is_there_linked_and_locked(finished):
    run = only(finished, "runs/evaluate/*")
    section = read_figures(run).own(HOOK).lists["feature_pages"]
    assert section["index"] == f"features/{HOOK}/index.html"
    assert f'href="{section["index"]}"' in (run / "report.html").read_text()
    folder = run / "features" / HOOK
    assert {p.name for p in folder.iterdir()} == {"index.html", *(f"{n}.html" for n in section["numbers"])}
    assert len(section["numbers"]) == 8
    for path in folder.iterdir():
        html = path.read_text()
        page = Page(html)
        assert all((folder / link).resolve().is_file() for link in page.links)
        assert not any(name.startswith("on") or name == "style" for name in page.attributes)
        policy = html[html.index("Content-Security-Policy") :].split('"')[2]
        policy = policy.replace("&#39;", "'")
        for tag in ("style", "script"):
            (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
        assert "default-src 'none'" in policy
    first, *_ = section["numbers"]
    html = (folder / f"{first}.html").read_text()
    excerpts = re.findall(r'<p class="meta"><b class="number">([\d.]+)</b>', html.split("Examples by quarter")[0])
    assert all(float(a) >= float(b) for a, b in pairwise(excerpts))
    assert "Promotes" in html
    assert "Nearest features" in html


def test_hostile_tokens_stay_text(finished, tmp_path):
    write_pages(tmp_path, *hostile.site(finished), hostile.CONFIG)
    for path in tmp_path.iterdir():
        html = path.read_text()
        assert html.count("<script>") == html.count("</script>") == 1
        assert "<img" not in html
        assert not set(html) & {"\u202e", "\u2066", "\u200f", "\x00", "\x1b", "\x7f"}
        assert not any(name.startswith("on") for name in Page(html).attributes)
        assert "w" * 41 not in html
    assert "&lt;/script&gt;&lt;script&gt;" in html
    assert "&lt;b&gt;let me&lt;/b&gt;" in (tmp_path / "0.html").read_text()


def test_the_best_score_comes_first(finished, tmp_path):
    site, weighed = hostile.site(finished)
    np.savez(tmp_path / "scores.npz", score=site.scored.score_F, word_means=np.ones((1, 128)), words=np.array(["wait"]))
    scored = read_scores(tmp_path / "scores.npz")
    views = Views(site._replace(scored=scored), hostile.CONFIG).all(weighed)
    assert [view["number"] for view in views] == np.argsort(-scored.score_F[:12]).tolist()
    assert views[0]["rank"] == (scored.score_F >= scored.score_F[:12].max()).sum()
    assert views[0]["words"] == [("wait", 1.0, 100.0)]
    assert read_scores(tmp_path / "none.npz") is None
    unscored = Views(site._replace(scored=None), hostile.CONFIG).all(weighed)
    assert [view["density"] for view in unscored] == sorted((view["density"] for view in unscored), reverse=True)


def test_pages_of_chosen_features_or_none(run_folder):
    old = only(run_folder, "runs/evaluate/*")
    shutil.rmtree(old)
    ran = pipeline("evaluate", "evaluate.features.include=[500]", "evaluate.downstream=null")
    assert ran.status == 1
    assert "evaluate.features.include: 500: the SAE has 128 features, 0 to 127" in ran.out
    assert not list(run_folder.glob("runs/evaluate/*"))
    assert pipeline("evaluate", "evaluate.features=null", "evaluate.downstream=null").status == 0
    run = only(run_folder, "runs/evaluate/*")
    assert not (run / "features").exists()
    assert "Feature pages" not in (run / "report.html").read_text()
