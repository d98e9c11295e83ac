from conftest import contents, only, pipeline

BAD = {
    "a flipped bit": "train/model.layers.1/acts/c/3/0",
    "a truncated file": "train/row/context/c/1",
    "a deleted shard": "train/model.layers.1/acts/c/0/0",
    "a deleted chunk of provenance": "holdout/row/token_id/c/1",
    "a record without its data": "train/shards/00005.json",
}


def test_what_is_bad_is_named_and_just_that_is_made_anew(run_folder):
    store = only(run_folder, "runs/harvest/*/store")
    before = contents(store)
    digest = pipeline("verify", "--digest").out
    assert len(digest.strip()) == 64
    assert pipeline("verify").status == 0
    untouched = store / "train/model.layers.1/acts/c/4/0"
    written = untouched.stat().st_mtime_ns

    flipped = store / BAD["a flipped bit"]
    data = bytearray(flipped.read_bytes())
    data[77] ^= 16
    flipped.write_bytes(data)
    truncated = store / BAD["a truncated file"]
    truncated.write_bytes(truncated.read_bytes()[:20])
    for name in ("a deleted shard", "a deleted chunk of provenance"):
        (store / BAD[name]).unlink()
    (store / BAD["a record without its data"]).write_text("{}")
    assert pipeline("verify", "--digest").out != digest

    ran = pipeline("verify")
    assert ran.status == 1
    for name in BAD.values():
        assert name in ran.out
    assert "5 bad shards are marked" in ran.out
    assert pipeline("harvest").status == 0
    assert contents(store) == before
    assert pipeline("verify", "--digest").out == digest
    assert untouched.stat().st_mtime_ns == written


def test_there_is_nothing_to_verify(fresh_folder):
    assert pipeline("verify").status == 1
    ran = pipeline("verify", "--digest")
    assert ran.status == 1
    assert "`make harvest` makes it" in ran.out
