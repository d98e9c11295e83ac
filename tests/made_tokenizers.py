"""Small real tokenizers of every kind that models come with, trained on a little text."""

import json
import random
from collections.abc import Callable
from functools import cache, wraps

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|start|>",
    "<|end|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
]
# Added, but not marked special, as in R1's and Qwen3's tokenizers.
TAGS = [
    "<think>",
    "</think>",
    "<tool_response>",
    "</tool_response>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
]
ORDINARY = ["ú", "<h1>"]  # added tokens that are text
BLANKS = [" " * n for n in (2, 4, 8, 16)]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    "wait so the sum of two odd numbers is even. Let me check this: 17 + 25 = 42!\n\nThen what?\nYes.\n "
    "def f(x):\n    if x > 0:\n        return x\n\treturn -x # über  naïve café 東京 is fine, isn't it? user assistant "
    "system think It's 3.14159, hmm...\r\nOK.\n done.\n \n\n so"
)
EXTRAS = "".join(map(chr, range(33, 127)))


def text(pieces: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = WORDS.split(" ")
    return [" ".join(rng.choices(words, k=60)) for _ in range(pieces)]


def _finished(tokenizer: Tokenizer, bos: str | None = None) -> PreTrainedTokenizerFast:
    return from_json(tokenizer.to_str(), bos)


def from_json(spec: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer as from a file of this content."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(spec), eos_token="<|endoftext|>", bos_token=bos)


def _add(tokenizer: Tokenizer, *, blanks: bool = False) -> Tokenizer:
    """The chat tokens, then the others: blanks after chat tokens, as in the tokenizers that were numbered anew."""
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in TAGS + ORDINARY])
    if blanks:
        tokenizer.add_tokens([AddedToken(blank, normalized=False) for blank in BLANKS])
    return tokenizer


def trained_once(make: Callable[..., PreTrainedTokenizerFast]) -> Callable[..., PreTrainedTokenizerFast]:
    """A new tokenizer each time, of the files of the first."""
    made = cache(make)

    @wraps(make)
    def again(*given: object, **more: object) -> PreTrainedTokenizerFast:
        first = made(*given, **more)
        return from_json(first.backend_tokenizer.to_str(), first.bos_token)

    return again


@trained_once
def byte_level(*, blanks: bool = False, split: str | None = None) -> PreTrainedTokenizerFast:
    """GPT-2's kind; `split` is a pattern of another kind's, as Llama 3 has it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split is not None))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), whole]) if split else whole
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        text(200), trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    return _finished(_add(tokenizer, blanks=blanks), "<|begin_of_text|>" if split else None)


def _sentence_piece_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    tokenizer.train_from_iterator(
        [line for piece in text(200) for line in piece.splitlines()],
        trainers.BpeTrainer(vocab_size=1000, special_tokens=["<unk>", *bytes_], show_progress=False),
    )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][
        :1
    ]  # the trainer's special tokens are all added; bytes are not, in a model
    return Tokenizer.from_str(json.dumps(spec))


@trained_once
def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """Llama 2's and Mistral's kind; `scheme` is "first", "always" or "never"."""
    tokenizer = _sentence_piece_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return _finished(_add(tokenizer), "<bos>")


@trained_once
def prepend() -> PreTrainedTokenizerFast:
    """Llama 1's kind: the blank in front comes from the normalizer."""
    tokenizer = _sentence_piece_bpe()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return _finished(tokenizer, "<bos>")


@trained_once
def unigram() -> PreTrainedTokenizerFast:
    """T5's and ALBERT's kind, whose special tokens are pieces of the model as well."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        text(200),
        trainers.UnigramTrainer(
            vocab_size=400,
            unk_token="<unk>",
            special_tokens=["<unk>", *SPECIAL],
            initial_alphabet=list(EXTRAS),
            show_progress=False,
        ),
    )
    return _finished(_add(tokenizer), "<bos>")


@trained_once
def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind, in small letters and without white space."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        text(200),
        trainers.WordPieceTrainer(
            vocab_size=500, special_tokens=["[UNK]", *SPECIAL], initial_alphabet=list(EXTRAS), show_progress=False
        ),
    )
    return _finished(_add(tokenizer))


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level with blanks": lambda: byte_level(blanks=True),
    "llama 3": lambda: byte_level(split=LLAMA3),
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "prepend": prepend,
    "unigram": unigram,
    "word piece": word_piece,
}
