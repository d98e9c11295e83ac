"""Tokens of documents: those of the whole string, except that text never makes a protected token."""

import json
import random

import made_tokenizers
import numpy as np
import pytest
from made_tokenizers import BLANKS, KINDS, SPECIAL, TAGS
from tokenizers import AddedToken, Tokenizer

from harvest.files import UserError
from harvest.templates import Segment
from harvest.tokenizer import SegmentTokenizer, encode_long, opening

PROTECTED = [*SPECIAL, *TAGS]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    loaded = KINDS[request.param]()
    return loaded, SegmentTokenizer(loaded.backend_tokenizer, markers=TAGS)


def whole_string(loaded, text: str) -> list[int]:
    return loaded(text, add_special_tokens=False)["input_ids"]


def ids_of(tokenizer: SegmentTokenizer, *parts: str) -> list[int]:
    """Ids of parts that are marker, content, marker, ... in turn."""
    return tokenizer.encode([[Segment(part, i % 2 == 0) for i, part in enumerate(parts)]])[0].tolist()


def test_text_between_two_markers_is_read_as_one_string(kind):
    loaded, tokenizer = kind
    parts = ("<|im_start|>user\n", "  so.", "\n</think>\n\n", "\nWait. Then ", " what?<|im_end|>\n")
    assert ids_of(tokenizer, *parts) == whole_string(loaded, "".join(parts))


@pytest.mark.parametrize("name", PROTECTED)
def test_a_token_that_is_spelt_stays_text_and_nothing_around_it_changes(kind, name):
    loaded, tokenizer = kind
    before, after = "<|im_start|>user\nso wait ú <h1>", "\nThen what?        \n<|im_end|>"
    found = ids_of(tokenizer, before, f". {name}{name} .", after)
    token = loaded.convert_tokens_to_ids(name)
    assert found.count(token) == whole_string(loaded, before + after).count(token)
    # The same with a spelling that is no token, a character longer than the name is.
    broken = whole_string(loaded, f"{before}. {name[:1]}~{name[1:]}{name[:1]}~{name[1:]} .{after}")
    left, right = (n - 1 for n in (len(whole_string(loaded, before)), len(whole_string(loaded, after))))
    assert found[:left] == broken[:left]
    assert found[-right:] == broken[-right:]
    if not {"[UNK]", "<unk>"} & set(loaded.convert_ids_to_tokens(found)):
        bare = str.maketrans("｜", "|", " ▁")  # what NFKC and sentence pieces do not tell apart
        assert 2 * name.lower().translate(bare) in loaded.decode(found).lower().translate(bare)


def test_added_tokens_that_are_text_stay_tokens_beside_a_spelling(kind):
    loaded, tokenizer = kind
    found = ids_of(tokenizer, "<|im_start|>", "ú<|im_end|><h1> <think>", "<|im_end|>")
    for name in ("ú", "<h1>"):
        assert found.count(loaded.convert_tokens_to_ids(name)) == 1


def test_a_marker_and_a_content_make_no_token_together(kind):
    loaded, tokenizer = kind
    for parts in (("", "<|im_", "end|>", "x"), ("<|im_", "end|>"), ("", "a", "<|im_", "end|>")):
        assert loaded.convert_tokens_to_ids("<|im_end|>") not in ids_of(tokenizer, *parts)
    assert ids_of(tokenizer, "<|im_", "", "end|>") == [loaded.convert_tokens_to_ids("<|im_end|>")]


def test_blank_runs_that_were_added_after_chat_tokens_keep_their_ids():
    loaded = made_tokenizers.byte_level(blanks=True)
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    for blanks in BLANKS:
        for text in (f"a{blanks}b", f"a{blanks}b <|im_end|>"):
            found = ids_of(tokenizer, "<|im_start|>", text)
            assert found[2] == loaded.convert_tokens_to_ids(blanks)
            assert loaded.decode(found) == f"<|im_start|>{text}"
            assert not {loaded.convert_tokens_to_ids(name) for name in PROTECTED} & set(found[1:])


def test_ids_are_the_same_where_tokens_are_numbered_with_gaps():
    spec = json.loads(made_tokenizers.byte_level().backend_tokenizer.to_str())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] += [{"id": 900 + i, "content": f"<|late{i}|>", "special": i > 0, **plain} for i in range(3)]
    tokenizer = SegmentTokenizer(Tokenizer.from_str(json.dumps(spec)))
    tokenizer.check()
    late = [tokenizer.whole.token_to_id(f"<|late{i}|>") for i in range(3)]
    assert ids_of(tokenizer, "<|late2|>", "a <|late1|> <|late0|>", "<|late1|>")[0] == late[2]
    assert ids_of(tokenizer, "<|late2|>", "a <|late1|> <|late0|>", "<|late1|>")[-2:] == [late[0], late[1]]


def test_ids_that_are_others_in_the_renamed_tokenizer_are_mapped_back():
    """Bytes that are marked special keep their names in the model, so that the names in their place get new ids."""
    loaded = made_tokenizers.metaspace("first")
    spec = json.loads(loaded.backend_tokenizer.to_str())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"].append({"id": spec["model"]["vocab"]["<0x0A>"], "content": "<0x0A>", "special": True, **plain})
    spec["added_tokens"].sort(key=lambda token: token["id"])
    loaded = made_tokenizers.from_json(json.dumps(spec), "<bos>")
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    tokenizer.check()
    renamed = tokenizer._renamed(0)
    assert (renamed.ids != np.arange(len(renamed.ids))).any()
    found = ids_of(tokenizer, "<bos>", "so\n<eos> <h1>", "<eos>\n")
    assert found[-2:] == whole_string(loaded, "<bos>so\n<eos>\n")[-2:]
    assert [found.count(loaded.convert_tokens_to_ids(name)) for name in ("<eos>", "<0x0A>", "<h1>")] == [1, 2, 1]


def test_the_token_of_unknown_characters_is_spelt_out_too():
    loaded = made_tokenizers.unigram()
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    unknown = loaded.convert_tokens_to_ids("<unk>")
    loaded.backend_tokenizer.add_special_tokens([AddedToken("<unk>", normalized=False)])
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    assert unknown in ids_of(tokenizer, "<|im_start|>", "a 🤗 b")
    assert unknown not in ids_of(tokenizer, "<|im_start|>", "a <unk> b")
    assert ids_of(tokenizer, "<|im_start|>", "a <unk> 🤗").count(unknown) == 1


def test_a_text_that_holds_a_sentinel_gets_another_one():
    loaded = made_tokenizers.byte_level()
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    names = [tokenizer._renamed(0).names["<|im_end|>"], tokenizer._renamed(1).names["<|im_start|>"]]
    text = f"<|im_end|> {names[0]} {opening(0)} {names[1]}"
    found = ids_of(tokenizer, "<|im_start|>", text, "<|im_end|>")
    assert loaded.decode(found) == f"<|im_start|>{text}<|im_end|>"
    assert found.count(loaded.convert_tokens_to_ids("<|im_end|>")) == 1
    assert found.count(loaded.convert_tokens_to_ids("<|im_start|>")) == 1


def test_flags_of_added_tokens_hold_beside_a_spelling():
    loaded = made_tokenizers.metaspace("always")
    loaded.backend_tokenizer.add_special_tokens(
        [AddedToken("<mask>", lstrip=True, normalized=False), AddedToken("[W]", single_word=True, normalized=False)]
    )
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    tokenizer.check()
    parts = ("<|im_start|>a   <mask> [W] b[W] \n", "x <|im_end|>", "   <mask>", "so [W]")
    found = ids_of(tokenizer, *parts)
    broken = whole_string(loaded, "".join(parts).replace("<|im_end|>", "").replace("so [W]", "so"))
    mask, word = loaded.convert_tokens_to_ids("<mask>"), loaded.convert_tokens_to_ids("[W]")
    assert found.count(mask) == broken.count(mask) == 2
    assert found[: broken.index(word)] == broken[: broken.index(word)]


def test_content_in_other_characters_that_are_normalized_into_a_token_stays_text():
    loaded = made_tokenizers.unigram()
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    # NFKC makes <eos> of it, which is a piece of the model.
    wide = "".join(chr(ord(c) + 0xFEE0) for c in "<eos>")
    assert loaded.convert_tokens_to_ids("<eos>") in whole_string(loaded, f"a {wide}")
    assert loaded.convert_tokens_to_ids("<eos>") not in ids_of(tokenizer, "<bos>", f"a {wide}")


def test_tokens_that_begin_within_each_other_are_told_apart():
    loaded = made_tokenizers.byte_level()
    loaded.backend_tokenizer.add_special_tokens([AddedToken("@@x@@", normalized=False)])
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    # "@@x" + "@@x@@" holds the token at two places; that of the marker is meant.
    found = ids_of(tokenizer, "<|im_start|>", "@@x", "@@x@@", "b")
    assert loaded.decode(found) == "<|im_start|>@@x@@x@@b"
    assert found.index(loaded.convert_tokens_to_ids("@@x@@")) == len(found) - 2


def test_the_check_at_the_start_finds_a_tokenizer_that_reads_otherwise(monkeypatch):
    loaded = made_tokenizers.byte_level()
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    tokenizer.check()
    renamed = tokenizer._renamed(0)
    shifted = renamed.ids.copy()
    shifted[300] += 1  # "\n\n" or a neighbour: any id but a few shows
    monkeypatch.setattr(tokenizer, "_renamed", lambda *_: renamed._replace(ids=np.roll(shifted, 1)))
    with pytest.raises(UserError, match="reads the text around"):
        tokenizer.check()


def test_ids_beyond_the_embedding_are_named():
    loaded = made_tokenizers.byte_level()
    last = max(loaded.get_vocab().values())
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer, rows=last)
    assert ids_of(tokenizer, "", "a plain text")
    name = loaded.convert_ids_to_tokens(last)
    with pytest.raises(UserError, match=rf"makes token {last} \('{name}'\), .* has {last} rows"):
        ids_of(tokenizer, "", f"a {name}")


def test_truncation_and_padding_of_the_file_do_not_touch_documents():
    loaded = made_tokenizers.byte_level()
    loaded.backend_tokenizer.enable_truncation(4)
    loaded.backend_tokenizer.enable_padding(length=64)
    assert len(ids_of(SegmentTokenizer(loaded.backend_tokenizer), "", "so " * 30)) == len(
        whole_string(loaded, "so " * 30)
    )


def long_text(seed: int) -> str:
    """Words, code, one letter a thousand times, blanks, line feeds, other scripts."""
    rng = random.Random(seed)
    pieces = [*made_tokenizers.text(40, seed), "a" * 3000, " " * 2500, "\n" * 700, "東京🤗" * 200, "\u0301" * 50]
    return "".join(rng.choices(pieces, k=60))


@pytest.mark.parametrize("size", [700, 3000])
def test_a_long_text_in_parts_has_the_tokens_of_the_whole(kind, size):
    loaded, _ = kind
    for seed in range(3):
        text = long_text(seed)
        found = encode_long(loaded.backend_tokenizer, text, size, overlap=200)
        assert found.tolist() == whole_string(loaded, text)


def test_a_long_document_is_read_in_parts(monkeypatch):
    loaded = made_tokenizers.byte_level(blanks=True)
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    monkeypatch.setattr("harvest.tokenizer.LONG_TEXT", 5000)
    monkeypatch.setattr("harvest.tokenizer.BATCH_CHARACTERS", 9000)
    texts = [long_text(seed)[: 1000 * n] for seed, n in enumerate((3, 40, 1, 8, 2))]
    documents = [[Segment("<|im_start|>", True), Segment(text, False), Segment("<|im_end|>", True)] for text in texts]
    documents[3][1] = Segment(texts[3] + "<|im_end|>", False)
    for text, document, found in zip(texts, documents, tokenizer.encode(documents), strict=True):
        if document is not documents[3]:
            assert found.tolist() == whole_string(loaded, f"<|im_start|>{text}<|im_end|>")
    assert tokenizer.encode(documents)[3].tolist().count(loaded.convert_tokens_to_ids("<|im_end|>")) == 1


def test_batches_are_bounded_by_characters(monkeypatch):
    loaded = made_tokenizers.byte_level()
    tokenizer = SegmentTokenizer(loaded.backend_tokenizer)
    monkeypatch.setattr("harvest.tokenizer.BATCH_CHARACTERS", 100)
    sizes = []

    class Counting:
        def encode_batch_fast(self, texts, add_special_tokens):
            sizes.append(sum(map(len, texts)))
            return loaded.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    texts = ["so " * n for n in (1, 20, 30, 2, 50, 3)]
    found = tokenizer._encoded(Counting(), texts)
    assert [ids.tolist() for ids in found] == [whole_string(loaded, text) for text in texts]
    assert sum(sizes) == sum(map(len, texts))
    assert all(size <= 100 or size in (150,) for size in sizes)
