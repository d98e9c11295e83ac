"""The assets of configs/tiny.yaml: a random two-layer Llama, its tokenizer, and made-up text in both schemas."""

import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = tuple(dict.fromkeys(re.findall(r"\w+", "wait therefore the sum of two numbers is even so let me check")))
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def conversations(count: int, seed: int = 0) -> list[dict]:
    """Rows in the schema of LMSYS-Chat-1M."""
    rng = random.Random(seed)
    return [
        {
            "conversation_id": str(i),
            "conversation": [
                {"role": role, "content": text(rng, rng.randint(5, 30))} for role in ("user", "assistant") * 2
            ],
        }
        for i in range(count)
    ]


def solutions(count: int, seed: int = 1) -> list[dict]:
    """Rows in the schema of OpenThoughts-114k's metadata subset; each problem three times."""
    rng = random.Random(seed)
    problems = [text(rng, 12) for _ in range(count // 3 + 1)]
    return [
        {
            "problem": problems[i // 3],
            "deepseek_reasoning": text(rng, rng.randint(20, 60)),
            "deepseek_solution": text(rng, 8),
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the markers of both templates; R1's thinking tags are added, but not special."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*CHATML, *DEEPSEEK], initial_alphabet=alphabet, show_progress=False
    )
    rng = random.Random(2)
    bpe.train_from_iterator([text(rng, 200)], trainer)
    bpe.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make_assets(folder: Path, documents: int = 120, **shape: int) -> None:
    """Write assets/tiny-llama, of another shape if one is given, assets/tiny-chat.jsonl and
    assets/tiny-reasoning.jsonl under a folder.
    """
    assets = folder / "assets"
    tiny = tokenizer()
    torch.manual_seed(0)
    own = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    own |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(vocab_size=len(tiny), tie_word_embeddings=True, **(own | shape))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(assets / "tiny-llama")
    tiny.save_pretrained(assets / "tiny-llama")
    write_jsonl(assets / "tiny-chat.jsonl", conversations(documents))
    write_jsonl(assets / "tiny-reasoning.jsonl", solutions(documents))


if __name__ == "__main__":
    make_assets(Path())
