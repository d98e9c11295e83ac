"""Sources with `strata` and `where`, from their rows to the report."""

import gzip
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import zarr
from conftest import TINY, contents, current_copy, only, pipeline

from evaluate.figures import read_figures
from evaluate.groups import context_groups
from harvest.activation_store import ActivationStore
from harvest.contexts import CHECKSUMS, NO_STRATUM, Contexts
from harvest.conversations import is_held_out
from harvest.sources import unpacked_bytes
from pipeline.config import load
from train.checkpoint import load_sae

HOOK = "model.layers.1"
VOCABULARY = {"letters": "wait therefore the sum of two", "digits": "7 1 4 90 23 8", "signs": "( [ % } ~ ="}
LENGTHS = {"letters": 60, "digits": 12, "signs": 5}
KINDS = "{name: kinds, path: kinds.jsonl, rows: text, share: 0.52"
CHAT = "{name: chat, path: assets/tiny-chat.jsonl, rows: conversation, share: 0.48}"
QUICK = ("train.epochs=1", "evaluate.steering=null", "evaluate.features=null", "evaluate.reason_score=null")


def settings(more: str = "strata: kind") -> str:
    return f"sample.sources=[{KINDS}, {more}}}, {CHAT}]"


def made_rows() -> list[dict]:
    """Three kinds of text of unlike words and amount; some rows have no kind, or a number for one."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(420):
        kind = ["letters", "letters", "digits"][number % 3] if number < 400 else "signs"
        words = rng.choice(VOCABULARY[kind].split(), LENGTHS[kind])
        rows.append({"text": " ".join(words), "kind": kind, "level": number % 4, "good": bool(number % 2)})
    rows[5] |= {"kind": None}
    return rows


ROWS = made_rows()
TWO = "strata: kind, where: {kind: [letters, digits]}"


@pytest.fixture(scope="module")
def stratified(finished, tmp_path_factory):
    """The folder of a run whose first source has strata; read only."""
    folder = tmp_path_factory.mktemp("stratified")
    shutil.copytree(finished / "assets", folder / "assets")
    tiny.write_jsonl(folder / "kinds.jsonl", ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ran = pipeline("run", settings(TWO), *QUICK)
    assert ran.status == 0, ran.out
    return folder


@pytest.fixture
def kinds_folder(fresh_folder):
    tiny.write_jsonl(fresh_folder / "kinds.jsonl", ROWS)
    return fresh_folder


def sampled(folder: Path) -> tuple[zarr.Group, dict]:
    """The contexts of a folder's one sample, and the summary of the source with kinds."""
    directory = only(folder, "runs/sample/*")
    manifest = json.loads((directory / "manifest.json").read_text())
    return zarr.open_group(directory / "contexts", mode="r"), manifest["summary"]["kinds"]


def test_every_stratum_has_an_equal_part_of_whole_contexts(stratified):
    group, summary = sampled(stratified)
    assert group.attrs["strata"] == [{"source": "kinds", "value": "digits"}, {"source": "kinds", "value": "letters"}]
    for split, parts in (("train", [25, 25]), ("holdout", [9, 8])):  # 0.52 of 96 and of 32 contexts
        stratum_C = group[f"{split}/stratum"][:]
        assert stratum_C.dtype == np.uint16
        source_C, document = group[f"{split}/source"][:], group[f"{split}/document"][:]
        assert [(stratum_C == number).sum() for number in range(2)] == parts
        assert (stratum_C[source_C == 1] == NO_STRATUM).all()
        assert (source_C[stratum_C == NO_STRATUM] == 1).all()
        for number, kind in enumerate(("digits", "letters")):
            rows = np.unique(document[stratum_C == number])
            assert {ROWS[row]["kind"] for row in rows} == {kind}
        assert set(Contexts(only(stratified, "runs/sample/*/contexts")).strata_of(split, 0, 3)) <= {0, 1, NO_STRATUM}
    counts = [summary[f"rows_{name}"] for name in ("used", "dropped", "filtered", "not_needed", "not_reached")]
    assert sum(counts) == len(ROWS) == summary["rows"]
    assert summary["rows_filtered"] <= 21  # signs, and the one without a kind
    assert summary["dropped"] == {}


def test_figures_by_source_and_stratum_are_those_of_the_stores_rows(stratified):
    sae = read_figures(only(stratified, "runs/evaluate/*")).own(HOOK)
    store = ActivationStore.open(only(stratified, "runs/harvest/*/store"))
    chunks = range(store.geometry.holdout_shards * store.geometry.chunks_per_shard)
    bits = np.concatenate([store.read_chunk("holdout", HOOK, chunk) for chunk in chunks])
    x = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    context = np.concatenate([store.read_provenance("holdout", "context", shard) for shard in range(2)])
    group, _ = sampled(stratified)
    source, stratum = (group[f"holdout/{name}"][:][context] for name in ("source", "stratum"))
    saved = load_sae(only(stratified, f"runs/train/*/{HOOK}"))
    w_enc, b_enc, w_dec, b_dec = (
        getattr(saved.sae, name).double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    scale = saved.statistics.scale
    f = np.maximum(x * scale @ w_enc + b_enc, 0)
    x_hat = (f @ w_dec + b_dec) / scale
    groups = {
        "all": source >= 0,
        "chat": source == 1,
        "kinds": source == 0,
        "kinds/digits": stratum == 0,
        "kinds/letters": stratum == 1,
    }
    kept = np.linalg.norm(x, axis=1) <= saved.statistics.norm_limit
    for counted, rows in (("all_rows", kept | True), ("outliers_excluded", kept)):
        found = {
            group: {name: figure.value for name, figure in figures.items()}
            for (of, group), figures in sae.table("fidelity").items()
            if of == counted
        }
        assert found.keys() == groups.keys()
        for name, chosen in groups.items():
            of, rebuilt = x[rows & chosen], x_hat[rows & chosen]
            explained = 1 - np.square(of - rebuilt).sum() / np.square(of - of.mean(0)).sum()
            assert found[name]["rows"] == len(of)
            assert found[name]["l0"] == pytest.approx((f[rows & chosen] > 0).sum(1).mean(), rel=1e-3)
            assert found[name]["explained_variance"] == pytest.approx(explained, abs=1e-4)
    means = [x[groups[name]].mean(0) for name in ("kinds/digits", "kinds/letters")]
    assert np.linalg.norm(means[0] - means[1]) > 0.2 * np.linalg.norm(means[0])  # strata that differ
    assert {"kinds/digits"} <= {group for _, group in sae.table("downstream")} <= groups.keys()


def test_the_report_names_strata_below_their_source(stratified):
    html = only(stratified, "runs/evaluate/*/report.html").read_text()
    lines = re.findall(r'<tr><td( class="part")?>([^<]*), all rows</td><td>([\d,]+)<', html)
    part = ' class="part"'
    assert lines == [
        ("", "all", "512"),
        ("", "kinds", "272"),
        (part, "kinds/digits", "144"),
        (part, "kinds/letters", "128"),
        ("", "chat", "240"),
    ]


def test_values_that_look_the_same_are_groups_of_their_own():
    class Two(Contexts):
        sources, strata = ["s"], [{"source": "s", "value": value} for value in (1, "1", "1 (2)")]

        def __init__(self):
            self.arrays = {"source": np.zeros(6, np.uint8), "stratum": np.arange(6, dtype=np.uint16) // 2}

        def read(self, _split, name, first, count):
            return self.arrays[name][first : first + count]

        def count(self, _split):
            return 6

    groups = context_groups(Two(), "holdout")
    assert {name: mask.sum() for name, mask in groups.items()} == {"s": 6, "s/1": 2, "s/1 (2)": 2, "s/1 (2) (2)": 2}


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_a_missing_or_damaged_chunk_of_strata_is_found(stratified, tmp_path, monkeypatch, split):
    current_copy(stratified, tmp_path / "copy", monkeypatch)
    arguments = (settings(TWO), *QUICK)
    assert pipeline("verify", *arguments).status == 0
    chunk = only(Path(), f"runs/sample/*/contexts/{split}/stratum/c/1")
    good = chunk.read_bytes()
    assert len(good) == 16 * 2 + 4
    name = f"contexts/{split}/stratum/c/1"
    other = chunk.with_name("0").read_bytes()
    for bad in (good[:3] + bytes([good[3] ^ 1]) + good[4:], other, good[:-2], None):
        chunk.unlink()
        if bad is not None and bad != good:
            chunk.write_bytes(bad)
        ran = pipeline("verify", *arguments)
        assert ran.status == 1
        assert name in ran.out
        if bad is None or len(bad) < len(good):
            assert name in pipeline("status", *arguments).out
        chunk.write_bytes(good)
    assert name not in pipeline("status", *arguments).out


def test_without_strata_there_is_no_array_of_them(finished):
    directory = only(finished, "runs/sample/*")
    names = set(contents(directory / "contexts"))
    arrays = [f"{split}/{name}" for split in ("train", "holdout") for name in ("tokens", "document", "source")]
    groups = {"zarr.json", "train/zarr.json", "holdout/zarr.json", *(f"{name}/zarr.json" for name in arrays)}
    assert {name for name in names if "/c/" not in name} == groups
    assert set(json.loads((directory / CHECKSUMS).read_text())) - {"crc32c"} == set(arrays)
    attributes = json.loads((directory / "contexts/zarr.json").read_text())["attributes"]
    assert attributes.keys() == {"schema", "sources", "context_size", "seed", "bos"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("strata: knd", r"strata: 'knd': the data set has no such column; did you mean 'kind'\?"),
        ("where: {quality: 1}", r"where: 'quality': the data set .* it has good, kind, level, none, text"),
        ("where: {kid: letters}", r"where: 'kid': the data set has no such column; did you mean 'kind'\?"),
        ("strata: text", r"strata: 'text' has more than 255 values \('[^)]+', \.\.\.\); name a column of few"),
        ("strata: kind, where: {kind: none}", r"where: none of the 420 rows has .* kind is 'letters', 'digits', N"),
        ("where: {good: 1, level: 1}", r"where: none of the 420 rows has .* good is False, True; level is 0, 1, 2, 3"),
        ("strata: none, where: {level: 1}", r"strata: 'none': no row that is taken has a value there"),
        ("where: {level: 1}", r"source 'kinds' has [\d,]+ tokens .* add text\. 315 rows are not those of `where`"),
        ("where: {kind: []}", r"kind: an empty list takes no row"),
    ],
)
def test_what_cannot_be_chosen_is_named(kinds_folder, more, says):
    rows = [row | {"text": f"{number} {row['text']}", "none": None} for number, row in enumerate(ROWS)]
    tiny.write_jsonl(Path("kinds.jsonl"), rows)
    ran = pipeline("sample", settings(more), *QUICK, "sample.train_tokens=20000")
    assert ran.status in (1, 2)
    assert re.search(says, ran.out), ran.out


def test_a_stratum_with_too_little_text_is_named_with_both_numbers(kinds_folder):
    ran = pipeline("sample", settings(), *QUICK)
    assert ran.status == 1
    texts = [row["text"] for row in ROWS if row["kind"] == "signs"]
    tokenizer = tiny.tokenizer()
    has = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts if not is_held_out(text, 0, 0.25))
    share = 16 * 16  # of 50 contexts, the last of three strata has 16
    assert 0 < has < share
    says = f"source 'kinds', kind = 'signs', has {has:,} tokens for the train split and its share is {share}; lower"
    assert says in ran.out


def test_a_stratum_needs_a_context_of_each_split(kinds_folder):
    ran = pipeline("sample", settings(), *QUICK, "sample.shard_contexts=4", "sample.holdout_tokens=64")
    assert ran.status == 1
    assert "sample.holdout_tokens: source 'kinds' gets 2 contexts of the holdout split, and its 3 strata" in ran.out


@pytest.mark.parametrize(
    ("where", "takes"),
    [
        ("{kind: letters}", lambda row: row["kind"] == "letters"),
        ("{level: [1, 2.0]}", lambda row: row["level"] in (1, 2)),
        ("{good: true}", lambda row: row["good"]),
        ("{kind: [letters, digits], level: 3}", lambda row: row["kind"] in ("letters", "digits") and row["level"] == 3),
    ],
)
def test_where_takes_the_rows_of_its_values_alone(kinds_folder, where, takes):
    small = ("sample.train_tokens=768", "sample.holdout_tokens=256")
    ran = pipeline("sample", settings(f"where: {where}"), *QUICK, *small)
    assert ran.status == 0, ran.out
    group, summary = sampled(kinds_folder)
    document, source_C = (
        np.concatenate([group[f"{split}/{name}"][:] for split in ("train", "holdout")])
        for name in ("document", "source")
    )
    rows = np.unique(document[source_C == 0])
    assert all(takes(ROWS[row]) for row in rows)
    assert len(rows) == summary["rows_used"]
    looked_at = np.random.default_rng([0, 0]).permutation(len(ROWS))[: len(ROWS) - summary["rows_not_reached"]]
    assert summary["rows_filtered"] == sum(not takes(ROWS[row]) for row in looked_at)
    assert "stratum" not in group["train"]


def test_rows_without_a_stratum_are_dropped_and_counted(kinds_folder):
    small = ("sample.train_tokens=768", "sample.holdout_tokens=256")
    for row in ROWS[400:]:
        assert row["kind"] == "signs"
    rows = [row | ({"kind": None} if row["kind"] == "signs" else {}) for row in ROWS]
    tiny.write_jsonl(kinds_folder / "kinds.jsonl", rows)
    ran = pipeline("sample", settings("strata: kind, drop: any"), *QUICK, *small)
    assert ran.status == 0, ran.out
    _, summary = sampled(kinds_folder)
    looked_at = np.random.default_rng([0, 0]).permutation(len(rows))[: len(rows) - summary["rows_not_reached"]]
    without = Counter(rows[row]["kind"] for row in looked_at)[None]
    assert summary["dropped"]["no value in kind"]["rows"] == without > 0
    assert f"{without} no value in kind" in ran.out
    assert "kinds  rows_dropped" in ran.out
    assert "rows_malformed" not in ran.out  # there were none


def test_room_is_asked_for_what_is_unpacked(kinds_folder, monkeypatch):
    """Of parquet, the columns that are needed; of compressed JSON, twice its size."""
    big = [row | {"other": "x" * 5000 + str(number)} for number, row in enumerate(ROWS)]
    datasets.Dataset.from_list(big).to_parquet("kinds.parquet")
    Path("kinds.jsonl.gz").write_bytes(gzip.compress(Path("kinds.jsonl").read_bytes()))
    packed = Path("kinds.jsonl.gz").stat().st_size
    text = sum(len(row["text"]) + 4 for row in ROWS)
    for name, least, most in (("parquet", text, 1.5 * text), ("jsonl.gz", 2 * packed, 2 * packed)):
        source = f"sample.sources=[{{name: kinds, path: kinds.{name}, rows: text, share: 1, strata: kind}}]"
        found = unpacked_bytes(load(TINY, [source, *QUICK]).sample.sources)
        assert least <= found <= most
        for free, status in ((16 * 2048 + found, 0), (16 * 2048 + found - 1, 1)):
            usage = shutil._ntuple_diskusage(10**9, 0, free)
            with monkeypatch.context() as patch:
                patch.setattr(shutil, "disk_usage", lambda _path, usage=usage: usage)
                ran = pipeline("sample", source.replace("strata: kind", "where: {kind: letters}"), *QUICK)
            assert ran.status == status, ran.out
            assert status == 0 or "of it for unpacked files of the sources, and its disk has" in ran.out
            shutil.rmtree("runs")
