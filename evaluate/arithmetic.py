"""The task `arithmetic`: sums and products of two numbers from 2 to 10, which a model of 135M parameters half knows.

It needs no data set, and its answers are short: SmolLM2-135M-Instruct has half of them right within 48 tokens at
temperature 0.6 (of sums of two-digit numbers 12%), so that an effect may show in both directions.
"""

NUMBERS = range(2, 11)


def questions() -> list[tuple[str, str]]:
    """All questions, each with its answer."""
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
    sums = [(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]
    return sums + [(f"What is {a} * {b}?", str(a * b)) for a, b in pairs]
