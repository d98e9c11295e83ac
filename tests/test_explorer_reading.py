"""Features of a text are those of the SAE's `encode` on what the model itself computes at the hook."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_tokenizers
import numpy as np
import pytest
import real
import torch
from conftest import TINY, only
from explored import MARKUP, TEXTS, reader_of, runs_of, shelves_of
from scipy.stats import binom
from transformers import AutoModelForCausalLM

from harvest.config import SampleConfig
from harvest.device import resolve_dtype
from harvest.documents import DocumentTokenizer
from harvest.files import UserError
from harvest.tokenizer import OTHERS_KEPT, opening
from pipeline.config import load
from pipeline.explore import reading
from pipeline.explore.catalog import Entry
from pipeline.explore.reading import Read, Reader, by_example, summed
from train.batchtopk import BatchTopK
from train.checkpoint import SavedSae, load_sae
from train.config import ExcludeConfig
from train.sae import Sae
from train.standard import Standard
from train.topk import TopK

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows_by_transformers(folder: str, layer: int, ids: list[int]) -> torch.Tensor:
    """Activations (S, D) behind a decoder layer in the reader's precision, by a line of hook of this test's own."""
    if folder not in MODELS:
        dtype = resolve_dtype("auto", torch.device("cpu"))
        MODELS[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found = []
    decoder = MODELS[folder].model.layers[layer]
    handle = decoder.register_forward_hook(lambda _m, _i, out: found.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        MODELS[folder](torch.tensor([ids]))
    handle.remove()
    return found[0][0] if found[0].ndim == 3 else found[0]


MODELS: dict[str, Any] = {}


def dense(read: Read, d_sae: int) -> np.ndarray:
    """(S, F), of the entries that were read."""
    f_SF = np.zeros((len(read.ids), d_sae), np.float32)
    for s in range(len(read.ids)):
        entries = slice(read.indptr_S1[s], read.indptr_S1[s + 1])
        f_SF[s, read.feature_N[entries]] = read.value_N[entries]
    return f_SF


class StandIn:
    """A shelf of a made SAE."""

    def __init__(self, saved: SavedSae, entry: Entry) -> None:
        self.saved, self.entry = saved, entry


def standing_in(saved: SavedSae, entry: Entry | None = None, **exclude: Any) -> Any:
    runs: Any = SimpleNamespace(config=SimpleNamespace(exclude=ExcludeConfig(norm_above_median=None, **exclude)))
    return StandIn(saved, entry or Entry("made", "made", runs, saved.hook))


@pytest.fixture(scope="module")
def tiny_reader(finished) -> Reader:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        return reader_of(shelves_of(finished)[0])


@pytest.fixture
def shelf(finished, monkeypatch) -> Any:
    monkeypatch.chdir(finished)
    return shelves_of(finished)[0]


@pytest.mark.parametrize("text", TEXTS)
def test_activations_are_those_of_encode_on_the_models_own_rows(tiny_reader, shelf, finished, text):
    read = tiny_reader.read(shelf, text)
    saved = load_sae(only(finished, "runs/train/*/model.layers.1"))
    rows = rows_by_transformers("assets/tiny-llama", 1, read.ids)
    expected = saved.sae.encode(rows).numpy()
    assert np.abs(dense(read, saved.sae.d_sae) - expected).max() < 1e-4
    assert len(read.feature_N) == (expected > 0).sum() > 0 and read.value_N.min() > 0
    assert (np.diff(read.feature_N)[np.diff(read.token_N) == 0] > 0).all()
    assert read.texts == [shelf.text(token) for token in read.ids]


def test_they_are_on_a_model_that_was_trained(real_run, monkeypatch):
    """SmolLM2-135M, layer 2; texts of 1 to more than 512 tokens."""
    monkeypatch.chdir(real_run)
    runs = runs_of(real_run, real.SETTINGS, real.CONFIG)[0]
    saved = load_sae(only(real_run, f"runs/train/*/{real.HOOK}"))
    entry = Entry("real", "real", runs, real.HOOK)
    reader, shelf = Reader.load([entry]), standing_in(saved, entry)
    lengths = set()
    for text in TEXTS:
        read = reader.read(shelf, text)
        lengths.add(len(read.ids))
        rows = rows_by_transformers("assets/smollm2-135m", 2, read.ids)
        expected = saved.sae.encode(rows).numpy()
        assert np.abs(dense(read, saved.sae.d_sae) - expected).max() < 1e-4
        norms = rows.float().norm(dim=1).numpy()
        assert np.array_equal(read.kept_S, norms <= saved.statistics.norm_limit)
        assert reader.tokenizer.decode(read.ids) == text
    assert 1 in lengths and max(lengths) > 512


@pytest.mark.parametrize("kind", ["standard", "topk", "batchtopk"])
def test_an_sae_of_any_kind_is_read_by_its_own_rule_a_few_rows_at_a_time(tiny_reader, finished, monkeypatch, kind):
    sae: Sae = {
        "standard": lambda: Standard.initial(32, 64, 3, scale=0.5),
        "topk": lambda: TopK.initial(32, 64, 3, k=5),
        "batchtopk": lambda: BatchTopK.initial(32, 64, 3, k=5),
    }[kind]()
    if kind == "batchtopk":
        sae.threshold.fill_(1e-3)
    hook = "model.layers.1"
    saved = SavedSae(sae, hook, load_sae(only(finished, f"runs/train/*/{hook}")).statistics, {})
    monkeypatch.chdir(finished)
    monkeypatch.setattr(reading, "AT_ONCE", 7 * 64)
    read = tiny_reader.read(standing_in(saved), TEXTS[3])
    expected = sae.encode(rows_by_transformers("assets/tiny-llama", 1, read.ids)).numpy()
    assert len(read.ids) > 14 and np.abs(dense(read, 64) - expected).max() < 1e-4
    assert 0 < len(read.feature_N) == (expected > 0).sum() < expected.size


def test_nothing_is_computed_behind_the_hook(tiny_reader, shelf):
    ran = []
    handle = tiny_reader.causal.lm_head.register_forward_hook(lambda *_: ran.append(1))
    tiny_reader.read(shelf, "so wait")
    handle.remove()
    assert not ran


def test_markup_of_strangers_is_text_and_a_chat_template_writes_its_own(tiny_reader, shelf):
    vocabulary = tiny_reader.tokenizer.get_vocab()
    read = tiny_reader.read(shelf, MARKUP)
    assert tiny_reader.tokenizer.decode(read.ids) == MARKUP
    assert not set(read.ids) & {vocabulary[name] for name in ("<|im_end|>", "<think>", "<｜User｜>")}
    assert not tiny_reader.has_chat
    with pytest.raises(UserError, match="no chat template"):
        tiny_reader.read(shelf, "so wait", chat=True)
    with pytest.raises(UserError, match="no chat template"):
        tiny_reader.prompt_ids([{"role": "user", "content": "so"}])
    tiny_reader.tokenizer.chat_template = CHAT
    try:
        ids = tiny_reader.read(shelf, "so wait", chat=True).ids
        turn = "<|im_start|>user\nso wait<|im_end|>\n<|im_start|>assistant\n"
        assert ids == tiny_reader.tokenizer(turn)["input_ids"] and vocabulary["<|im_end|>"] in ids
        talk = [{"role": "user", "content": "so"}, {"role": "assistant", "content": "wait"}]
        more = tiny_reader.prompt_ids([*talk, {"role": "user", "content": "why"}])
        assert tiny_reader.tokenizer.decode(more) == (
            "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\nwait<|im_end|>\n"
            "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
        )
    finally:
        tiny_reader.tokenizer.chat_template = None


def test_texts_that_name_ever_new_stand_ins_take_no_more_memory(tiny_reader):
    """A text that holds what special tokens are renamed to is read with yet other names: a tokenizer for each."""
    for count in range(OTHERS_KEPT + 3):
        text = "".join(map(opening, range(count))) + "<|im_end|> so"
        assert tiny_reader.tokenizer.decode(tiny_reader.text_ids(text)) == text
    assert len(tiny_reader.documents._others) == OTHERS_KEPT


@pytest.mark.parametrize("bos", ["document", "context", "none"])
def test_a_bos_is_where_the_sample_has_one(tiny_reader, bos):
    loaded = made_tokenizers.prepend()
    config = load(TINY, []).sample
    assert config
    documents = DocumentTokenizer(loaded, SampleConfig(**config.model_dump() | {"bos": bos}))
    made = Reader(tiny_reader.model, loaded, documents, bos)
    text = loaded("so wait", add_special_tokens=False)["input_ids"]
    assert made.text_ids("so wait") == ([] if bos == "none" else [loaded.bos_token_id]) + text
    assert made.text_ids(f"{loaded.bos_token} so")[1:].count(loaded.bos_token_id) == 0


def test_texts_that_cannot_be_read_are_refused_and_cut_ones_say_so(tiny_reader, shelf):
    for empty in ("",):
        with pytest.raises(UserError, match="the text is empty"):
            tiny_reader.read(shelf, empty)
    with pytest.raises(UserError, match="half a character"):
        tiny_reader.read(shelf, "so \ud83d")
    whole = tiny_reader.text_ids(TEXTS[-1])
    read = tiny_reader.read(shelf, TEXTS[-1])
    assert tiny_reader.limit == 128 < len(whole)
    assert read.ids == whole[:128] and read.cut == len(whole)
    assert tiny_reader.read(shelf, "so wait").cut is None
    wrong = standing_in(SavedSae(Standard.initial(16, 8), "model.layers.1", shelf.saved.statistics, {}))
    with pytest.raises(UserError, match=r"the SAE has d_in 16, but model\.layers\.1 of this model is 32 wide"):
        tiny_reader.read(wrong, "so wait")


def test_within_a_context_an_end_token_takes_the_first_place(tiny_reader, shelf, finished):
    end = tiny_reader.tokenizer.eos_token_id
    alone, within = tiny_reader.read(shelf, " wait"), tiny_reader.read(shelf, " wait", within=True)
    assert within.ids == [end, *alone.ids] and within.cut is None
    assert not within.kept_S[0] and within.kept_S[1:].all() and alone.kept_S.all()
    rows = rows_by_transformers("assets/tiny-llama", 1, within.ids)
    expected = load_sae(only(finished, "runs/train/*/model.layers.1")).sae.encode(rows).numpy()
    assert np.abs(dense(within, 128) - expected).max() < 1e-4
    assert np.abs(dense(within, 128)[1:] - dense(alone, 128)).max() > 1e-3


def test_rows_that_training_leaves_out_are_marked(tiny_reader, shelf):
    ids = tiny_reader.text_ids("so wait let me check")
    shelf = standing_in(shelf.saved, token_ids=[ids[2]], positions=[0])
    kept_S = tiny_reader.read(shelf, "so wait let me check").kept_S
    assert kept_S.tolist() == [n > 0 and token != ids[2] for n, token in enumerate(ids)]


def made(rows: list[dict[int, float]], kept: list[bool]) -> Read:
    """A text of which each token has these features."""
    entries = [(feature, value) for row in rows for feature, value in sorted(row.items())]
    counts = np.cumsum([0, *map(len, rows)])
    feature_N, value_N = np.array(entries, float).reshape(-1, 2).T
    ids = list(range(len(rows)))
    return Read(ids, [""] * len(ids), None, np.array(kept), counts, feature_N.astype(np.int32), value_N.astype("f4"))


def test_features_of_a_text_are_summed_over_the_rows_that_count():
    rows = [{7: 90.0}, {2: 1.0, 5: 3.0}, {2: 4.0}, {}, {2: 4.0, 7: 0.5}, {2: 2.0}]
    read = made(rows, [False, True, True, True, True, True])
    density = {2: 0.5, 5: 0.01, 7: 0.0}
    about = {i: {"label": f"l{i}", "density": p, "max": 8.0} for i, p in density.items()}
    table: Any = SimpleNamespace(of=lambda features: {i: about[i] for i in features})
    lines = summed(read, table)
    assert [line["feature"] for line in lines] == [2, 5, 7]
    assert [(line["max"], line["at"], line["sum"], line["count"]) for line in lines] == [
        (4.0, 2, 11.0, 4),
        (3.0, 1, 3.0, 1),
        (0.5, 4, 0.5, 1),
    ]
    tails = [binom.sf(3, 5, 0.5), binom.sf(0, 5, 0.01), binom.sf(0, 5, 1e-6)]
    assert np.allclose([line["unusual"] for line in lines], -np.log10(tails))
    assert [(line["label"], line["held_out_max"]) for line in lines] == [("l2", 8.0), ("l5", 8.0), ("l7", 8.0)]
    assert summed(made([{1: 1.0}], [False]), table) == []
    certain: Any = SimpleNamespace(of=lambda features: {i: {"density": 1.0, "max": 1.0} for i in features})
    assert summed(made([{1: 1.0}] * 3, [True] * 3), certain)[0]["unusual"] == 0


def test_features_by_example_fire_on_some_texts_and_not_on_others():
    yes = [made([{1: 9.0}, {2: 1.0, 3: 2.0}], [False, True]), made([{2: 5.0, 4: 1.0, 6: 7.0}], [True])]
    no = [made([{3: 4.0, 4: 0.5}], [True]), made([{5: 1.0}, {6: 1.0}], [True, False]), made([{}], [True])]
    assert by_example(yes, no) == [
        {"feature": 2, "yes": 5.0, "no": 0.0, "yes_texts": 2, "no_texts": 0},
        {"feature": 6, "yes": 7.0, "no": 0.0, "yes_texts": 1, "no_texts": 0},
        {"feature": 4, "yes": 1.0, "no": 0.5, "yes_texts": 1, "no_texts": 1},
        {"feature": 3, "yes": 2.0, "no": 4.0, "yes_texts": 1, "no_texts": 1},
    ]
    assert by_example(yes[:1], [yes[1], yes[1]])[0]["feature"] == 3  # 2 fires in all of them
    assert [line["feature"] for line in by_example(yes, [])] == [2, 6, 3, 4]


def test_one_reader_serves_several_saes_and_stops_at_the_hook_of_each(two_hooks, monkeypatch):
    monkeypatch.chdir(two_hooks)
    runs = runs_of(two_hooks, ("harvest.hooks=[model.layers.1,model.layers.0]", "train.sweep.lr=[1e-3,3e-3]"))
    shelves = []
    for each in runs:
        for hook in ("model.layers.1", "model.layers.0"):
            saved = load_sae(each.directory("train") / hook)
            shelves.append(standing_in(saved, Entry(hook, hook, each, hook)))
    threads, ran = [], []
    monkeypatch.setattr(reading, "set_threads", lambda *asked: threads.append(asked))
    reader = Reader.load([shelf.entry for shelf in shelves])
    assert threads == [(1, torch.device("cpu"))]  # as evaluate.runtime has it
    monkeypatch.setattr(reading, "ON_DEVICE", 2)
    handle = reader.causal.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    for shelf in shelves + shelves:
        before = len(ran)
        read = reader.read(shelf, "so wait let me")
        layer = int(shelf.saved.hook[-1])
        rows = rows_by_transformers(str(Path.cwd() / "assets/tiny-llama"), layer, read.ids)
        assert np.abs(dense(read, 128) - shelf.saved.sae.encode(rows).numpy()).max() < 1e-4
        assert (len(ran) > before) == (layer == 1)
    handle.remove()
