"""What checkpoints cost: the same training with one every 1,000 steps and without, at the paper's width."""

from typing import Any

from benchmarks.gpu.check import Place
from benchmarks.gpu.training import differences, make_store, metrics, result, settings, undisturbed

STEPS, EVERY = 3000, 1000
LEAST = 0.98  # of the tokens a second without any
FASTER = 10  # times fewer steps without a GPU


def tokens_per_second(lines: list[dict[str, Any]]) -> float:
    """Of all log lines that have a rate, from their tokens and seconds."""
    tokens = seconds = before = 0.0
    for line in lines:
        if rate := line["timings"].get("tokens_per_second"):
            tokens += line["tokens"] - before
            seconds += (line["tokens"] - before) / rate
        before = line["tokens"]
    return tokens / seconds


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
        rates[name] = tokens_per_second([line for line in metrics(out) if line["kind"] == "train"])
        found[name] = {file: of for file, of in result(out).items() if "checkpoints" not in file}
    share = rates["with"] / rates["without"]
    place.note(**{f"tokens/s {name} checkpoints": rate for name, rate in rates.items()}, of_it=share)
    assert not (different := differences(found["with"], found["without"])), f"{different} differ"
    if place.on_gpu:
        assert share >= LEAST, f"checkpoints leave {share:.3f} of the tokens a second, not {LEAST}"
