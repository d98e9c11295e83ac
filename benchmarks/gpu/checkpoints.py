"""What checkpoints cost: the same training with one every 1,000 steps and without, at the paper's width."""

from itertools import pairwise
from typing import Any

from benchmarks.gpu.check import Place
from benchmarks.gpu.training import differences, make_store, metrics, result, settings, undisturbed

STEPS, EVERY = 4000, 1000  # the first thousand, in which memory is allocated, do not count
LEAST = 0.98  # of the tokens a second without any
FASTER = 10  # times fewer steps without a GPU


def tokens_per_second(lines: list[dict[str, Any]]) -> float:
    """Of the log lines after the first, from their tokens and seconds."""
    tokens = [b["tokens"] - a["tokens"] for a, b in pairwise(lines)]
    seconds = [count / line["timings"]["tokens_per_second"] for count, line in zip(tokens, lines[1:], strict=True)]
    return sum(tokens) / sum(seconds)


def run(place: Place) -> None:
    """The check."""
    s, store = place.sizes, place.folder / "made"
    make_store(store, place)
    fewer = 1 if place.on_gpu else FASTER
    steps, rates, found = STEPS // fewer, {}, {}
    for name, every in (("without", 2 * steps), ("with", EVERY // fewer)):
        out = place.folder / name
        runtime = {"checkpoint_every": every, "keep_last": 1}
        about = settings("standard", s.d_sae, place, training_tokens=steps * s.batch, runtime=runtime)
        undisturbed(store, {str(out): about})
        lines = [line for line in metrics(out) if line["kind"] == "train" and line["step"] > EVERY // fewer]
        rates[name] = tokens_per_second(lines)
        found[name] = {file: of for file, of in result(out).items() if "checkpoints" not in file}
    share = rates["with"] / rates["without"]
    place.note(**{f"tokens/s {name} checkpoints": rate for name, rate in rates.items()}, of_it=share)
    assert not (different := differences(found["with"], found["without"])), f"{different} differ"
    if place.on_gpu:
        assert share >= LEAST, f"checkpoints leave {share:.3f} of the tokens a second, not {LEAST}"
