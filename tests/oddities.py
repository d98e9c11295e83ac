"""Made-up conversations with every oddity that data sets have, as lines of a JSON Lines file."""

import json
import random
from typing import Any

ROLES = ["user", "human", "User", "assistant", "gpt", "chatgpt", "model", "system", "developer", "tool", "function"]
STRANGE = ["narrator", "", None, 7]
CONTENTS = [None, "", "  \n", 4, 2.5, True, [], [{"type": "image", "url": "x"}], [{"type": "text", "text": None}]]
ANSWERS = [
    "yes",
    "<think>\nhm {n}\n</think>\n\nyes",
    "hm {n}</think>yes",
    "first <think>hm {n}</think> yes",
    "<think>hm {n}</think>yes<think>or</think>no",
    "<|begin_of_thought|>\n\nhm {n}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nyes\n\n<|end_of_solution|>",
    "<|begin_of_thought|>hm {n}<|end_of_thought|>yes",
    "<think></think>\n\nyes {n}",
    "<think>hm {n}",
    "<think>a<think>b</think>c</think>yes {n}",
    "hm</think>yes</think> {n}",
    "<think>hm {n}<|end_of_thought|>yes",
]
BROKEN = [
    '{"conversation": [',
    "[1, 2]",
    "17",
    '{"conversation": [{"role": "user", "content": "\\ud800"}], "kind": "a"}',
    "\udcff",
    '{"conversation": [{"role": "user", "content": "\udcff"}], "kind": "a"}',
]


def _turn(rng: random.Random, number: int) -> dict[str, Any]:
    role: Any = rng.choice(ROLES)
    content: Any = rng.choice(ANSWERS).format(n=number) if role in ROLES[3:7] else f"say {number}"
    if rng.random() < 0.1:
        role = rng.choice(STRANGE)
    if rng.random() < 0.12:
        content = rng.choice(CONTENTS)
    elif rng.random() < 0.1:
        content = [{"type": "text", "text": content}, {"type": "text", "text": " more"}, " and more"]
    keys = rng.choice([("role", "content"), ("from", "value")])
    turn = {keys[0]: role, keys[1]: content}
    if rng.random() < 0.1:
        turn |= {
            rng.choice(["reasoning_content", "thinking", "reasoning"]): rng.choice([None, "", " ", f"so {number}"])
        }
    return turn


def _row(rng: random.Random, number: int) -> dict[str, Any]:
    turns: Any = [_turn(rng, number) for _ in range(rng.randint(0, 6))]
    if rng.random() < 0.6 and turns:  # most begin as they should
        turns = [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": "fine"}, *turns][
            : len(turns)
        ]
    form = rng.random()
    if form < 0.1 and turns:
        same = [turn for turn in turns if set(turn) == set(turns[0])]
        turns = {name: [turn[name] for turn in same] for name in turns[0]}
    elif form < 0.2:
        turns = json.dumps(turns)
    elif form < 0.25:
        turns = rng.choice([None, 5, "hello", {"role": "user"}, ["hello"], [None]])
    row = {"conversation": turns, "kind": rng.choice(["a", "b", "c"]), "extra": rng.choice([None, 1, "x", {"y": [1]}])}
    return row if rng.random() < 0.98 else {name: value for name, value in row.items() if name != "conversation"}


def lines(count: int, seed: int) -> list[str]:
    """So many rows, one a line; bytes that are no UTF-8 as `surrogateescape` has them."""
    rng = random.Random(seed)
    return [
        rng.choice(BROKEN) if rng.random() < 0.05 else json.dumps(_row(rng, number), ensure_ascii=rng.random() < 0.5)
        for number in range(count)
    ]
