"""The engine writes what plain generation with the same hook writes, and no bit of it depends on what is beside it."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import KNOWN_TORCH, KNOWN_TRANSFORMERS
from small_models import small_config, small_model
from transformers import GenerationConfig
from transformers.generation.logits_process import TopPLogitsWarper

from evaluate import engine
from evaluate.engine import Completion, Engine, Request, answers
from evaluate.operations import Interventions, Operation, effective
from evaluate.sampler import Draw, Sampling, chosen, gumbel, gumbel_on_device, noise_key
from evaluate.slot_cache import BLOCK, SlotCache, fits
from harvest.files import UserError
from harvest.hooked_model import HookedModel, first_tensor
from train.checkpoint import SavedSae
from train.exclusion import InputStatistics
from train.standard import Standard

TOKENIZER: Any = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: " ".join(map(str, ids)))
LAYER = 1
LISTS: tuple[tuple[Operation, ...], ...] = (
    (),
    (Operation(3, "add", 1.0),),
    (Operation(5, "set", 1.0), Operation(2, "scale", 3.0, "generated")),
)


def hooked(kind: str = "llama", hook: str = f"model.layers.{LAYER}", dtype: torch.dtype = torch.float32, **more):
    """A small random model, and what is done to its second layer."""
    whole = small_model(small_config(kind, **more)).to(dtype)
    whole.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=more.get("eos_token_id"))
    model = HookedModel(whole, {hook: whole.get_submodule(hook)}, torch.device("cpu"))
    width = first_tensor(model.activations(torch.arange(1, 6)[None])[hook]).shape[-1]
    saved = SavedSae(Standard.initial(width, 8, scale=0.5), hook, InputStatistics(0.5, 1.0, None), {})
    return model, Interventions(saved, {3: 3.0, 5: 2.0}, LISTS)


def requests(lengths: Sequence[int], lists: int = len(LISTS), vocabulary: int = 60) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    return [
        Request(torch.randint(1, vocabulary, (n,), generator=generator).tolist(), i % lists, (7, i))
        for i, n in enumerate(lengths)
    ]


def by_number(model: HookedModel, interventions: Interventions, asked, sampling: Sampling, slots: int):
    return dict(answers(model, TOKENIZER, interventions, asked, sampling, slots=slots))


def of(writer: Engine) -> Any:
    assert isinstance(writer.cache, SlotCache)
    return writer.cache


def generated(model: HookedModel, interventions: Interventions, request: Request, new: int) -> list[int]:
    """By transformers, with a hook of a line of its own; ids without what they begin with."""
    saved, operations = interventions.saved, interventions.lists[request.operations]
    assert [operation.op for operation in operations] in ([], ["add"])
    step_D = sum((3.0 * saved.sae.direction([3])[0] for _ in operations), torch.zeros(saved.sae.d_in))

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        changed_BSD = first_tensor(output) + step_D
        return type(output)([changed_BSD, *output[1:]]) if isinstance(output, (tuple, list)) else changed_BSD

    handle = model.modules[saved.hook].register_forward_hook(add)
    ids = torch.tensor([request.ids])
    causal: Any = model.model
    out = causal.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    handle.remove()
    return out[0, len(request.ids) :].tolist()


def test_greedy_answers_are_those_of_generate_for_prompts_of_5_to_400_tokens():
    model, interventions = hooked(max_position_embeddings=512)
    asked = requests([*np.random.default_rng(0).integers(5, 400, 48).tolist(), 5, 400], lists=2)
    found = by_number(model, interventions, asked, Sampling(12), slots=8)
    assert fits(model.model)
    for number, request in enumerate(asked):
        assert found[number].token_ids == generated(model, interventions, request, 12)
        assert found[number].processed == len(request.ids) + 11
        assert found[number].changed == found[number].processed * request.operations
    assert len({tuple(completion.token_ids) for completion in found.values()}) > 40


@pytest.mark.parametrize(
    ("kind", "hook", "is_in_slots"),
    [
        # Its scores are capped, which SDPA does not do.
        pytest.param("gemma2", "model.layers.1", False, marks=KNOWN_TRANSFORMERS),
        ("gemma3_text", "model.layers.1", True),  # windows of 4 tokens in some layers
        ("mistral", "model.layers.1", True),  # in all
        ("qwen3_moe", "model.layers.1", True),
        ("deepseek_v3", "model.layers.1", True),  # values are not as wide as keys
        ("gpt2", "transformer.h.1", True),
        ("gpt_neox", "gpt_neox.layers.1", True),
        ("bloom", "transformer.h.1", False),  # knows positions by its masks
        ("falcon_h1", "model.layers.1", False),  # a recurrent state
        ("rwkv", "rwkv.blocks.1", False),
        ("openai-gpt", "transformer.h.1", False),  # reads everything again for each token
    ],
)
def test_answers_of_other_architectures_are_those_of_generate(kind, hook, is_in_slots):
    model, interventions = hooked(kind, hook)
    asked = requests((5, 17, 3, 30, 9), lists=2)
    found = by_number(model, interventions, asked, Sampling(10), slots=2)
    assert fits(model.model) == is_in_slots
    for number, request in enumerate(asked):
        assert found[number].token_ids == generated(model, interventions, request, 10)
        assert (found[number].processed, found[number].changed) == (
            len(request.ids) + 9,
            request.operations * (len(request.ids) + 9),
        )


@pytest.fixture
def scores(monkeypatch) -> dict[tuple[int, ...], bytes]:
    """What each token of each answer was chosen by, whichever engine writes it."""
    seen: dict[tuple[int, ...], bytes] = {}

    def keep(logits_NV: torch.Tensor, sampling: Sampling, draws: Sequence[Draw | None]) -> list[int]:
        for row_V, draw in zip(logits_NV, draws, strict=True):
            if draw:
                key = (*draw.seed, draw.step)
                assert seen.setdefault(key, row_V.float().numpy().tobytes()) == row_V.float().numpy().tobytes()
        return chosen(logits_NV, sampling, draws)

    monkeypatch.setattr(engine, "chosen", keep)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_an_answer_depends_on_what_is_beside_it(scores, dtype):
    """Four queries a key, as Llama has them: their products would be split by the number of keys."""
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    model, interventions = hooked(dtype=dtype, max_position_embeddings=1024, **heads)
    asked = requests((120, 5, 130, 61, 63, 505, 186, 200))
    sampling = Sampling(16, 1.0, 0.9)
    together = by_number(model, interventions, asked, sampling, slots=4)
    count = len(scores)
    assert count == sum(len(completion.token_ids) for completion in together.values()) == 8 * 16
    for number in (1, 3, 6):  # alone
        assert by_number(model, interventions, [asked[number]], sampling, slots=4) == {0: together[number]}
    backwards = by_number(model, interventions, asked[::-1], sampling, slots=4)
    assert [backwards[7 - number] for number in range(8)] == [together[number] for number in range(8)]
    others = Interventions(interventions.saved, interventions.maxima, (LISTS[2], *LISTS))  # one more list, beside it
    left = [request._replace(operations=request.operations + 1) for request in asked[5:]]
    found = by_number(model, others, left, sampling, slots=4)
    assert [found[number] for number in range(3)] == [together[number] for number in range(5, 8)]
    assert len(scores) == count  # every comparison was made in `keep`


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=KNOWN_TORCH), torch.bfloat16])
def test_nor_on_its_slot_or_on_the_number_of_threads(scores, dtype):
    heads: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    model, interventions = hooked(dtype=dtype, max_position_embeddings=1024, **heads)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for request in (requests((61,))[0], requests((1, 2, 390))[2]):  # the same in each slot, so the same scores
                found = by_number(model, interventions, [request] * 7, Sampling(6, 1.0), slots=7)
                assert all(completion == found[0] for completion in found.values())
    finally:
        torch.set_num_threads(before)
    assert len(scores) == 2 * 6


def test_a_slot_keeps_nothing_of_the_answer_before(scores):
    """Not even an infinity, which a weight of 0 would make a NaN."""
    model, interventions = hooked()
    asked = requests((3, 5))
    alone = by_number(model, interventions, asked[1:], Sampling(4), slots=1)
    writer = Engine(model, TOKENIZER, interventions, Sampling(4), slots=1)
    writer.add(asked[0])
    while not writer.is_done:
        writer.step()
    for layer in of(writer).layers:
        layer.keys, layer.values = (torch.full_like(each, torch.inf) for each in (layer.keys, layer.values))
    writer.add(asked[1])
    while not (ended := writer.step()):
        pass
    assert ended == [(1, alone[0])] and all(
        np.isfinite(np.frombuffer(row, np.float32)).all() for row in scores.values()
    )


def test_the_cache_is_as_long_as_its_longest_answer():
    model, interventions = hooked(max_position_embeddings=1024)
    short, long = requests((BLOCK - 3, 5 * BLOCK))
    writer = Engine(model, TOKENIZER, interventions, Sampling(8), slots=3)
    columns: list[int] = []
    writer.add(short)
    writer.step()
    writer.add(long)
    while not writer.is_done:
        columns.append(of(writer).layers[0].keys.shape[2] // BLOCK)
        if writer.count == 2 and len(columns) == 4:
            writer.cancel(1)
        writer.step()
    assert columns[:5] == [1, 6, 6, 6, 2] and max(columns[4:]) == 2
    writer.add(requests((5,))[0])
    writer.step()
    assert of(writer).layers[0].keys.shape[2] == BLOCK


def test_requests_can_be_cancelled_and_the_rest_is_as_it_was():
    model, interventions = hooked()
    asked = requests((5, 9, 7, 4))
    whole = by_number(model, interventions, asked, Sampling(6), slots=2)
    writer = Engine(model, TOKENIZER, interventions, Sampling(6), slots=2)
    numbers = [writer.add(request) for request in asked]
    ended = writer.step()
    writer.cancel(numbers[0])
    writer.cancel(numbers[3])
    while not writer.is_done:
        ended += writer.step()
    assert numbers == [0, 1, 2, 3] and dict(ended) == {1: whole[1], 2: whole[2]}


def test_small_steps_read_one_prompt_or_write_a_token_of_every_slot():
    model, interventions = hooked()
    asked = requests((5, 9, 7))
    whole = by_number(model, interventions, asked, Sampling(3), slots=2)
    writer = Engine(model, TOKENIZER, interventions, Sampling(3), slots=2)
    answers_ = [writer.take(request) for request in asked]
    written, ended = [], {}
    while not writer.is_done:
        ended |= dict(writer.advance())
        written.append([len(answer.ids) for answer in answers_])
    assert written == [[1, 0, 0], [1, 1, 0], [2, 2, 0], [3, 3, 0], [3, 3, 1], [3, 3, 2], [3, 3, 3]]
    assert ended == whole and [answer.ids for answer in answers_] == [whole[n].token_ids for n in range(3)]


@pytest.mark.parametrize(
    ("kind", "hook"),
    [("llama", "model.layers.1"), ("falcon_h1", "model.layers.1"), ("openai-gpt", "transformer.h.1")],
)
def test_the_shaded_feature_is_read_at_each_token_before_operations(kind, hook):
    """In slots, alone with a cache, and alone where everything is read again."""
    model, interventions = hooked(kind, hook)
    sae = interventions.saved.sae
    cut = Interventions(interventions.saved, {}, ((), (Operation(4, "ablate", 0.0),)))
    writer = Engine(model, TOKENIZER, cut, Sampling(8, 2.0), slots=3, shade=4)
    asked = [request._replace(seed=(7, 0)) for request in requests((5, 9), lists=2)]
    answers_ = [writer.take(request) for request in asked]
    while not writer.is_done:
        writer.step()
    for request, answer in zip(asked, answers_, strict=True):
        # What is done at the hook changes layers behind it alone.
        acts_SD = model.activations(torch.tensor([[*request.ids, *answer.ids]]))[hook][0]
        f_S = sae.encode(acts_SD)[len(request.ids) :, 4]
        assert len(answer.values) == 7 == len(answer.ids) - 1 and f_S.max() > 0
        assert torch.tensor(answer.values).allclose(f_S[:-1], atol=1e-5)


def test_answers_end_at_the_tokens_that_end_a_text():
    model, interventions = hooked(eos_token_id=[0, 5, 9, 33])
    asked = requests([4, 6, 8] * 8)
    free = by_number(*hooked(), asked, Sampling(12), slots=5)
    found = by_number(model, interventions, asked, Sampling(12), slots=5)
    lengths = set()
    for number in range(24):
        ids = free[number].token_ids
        stop = next((i for i, token in enumerate(ids) if token in (0, 5, 9, 33)), None)
        assert found[number].token_ids == ids[:stop] and found[number].ended == (stop is not None)
        assert found[number].text == " ".join(map(str, ids[:stop]))
        assert found[number].processed == len(asked[number].ids) + (11 if stop is None else stop)
        lengths.add(stop)
    assert None in lengths and 0 in lengths and len(lengths) > 3
    one = by_number(model, interventions, asked, Sampling(1), slots=5)
    assert [len(one[n].token_ids) + one[n].ended for n in range(24)] == [1] * 24


def test_samples_share_the_reading_of_their_prompt(monkeypatch):
    model, interventions = hooked()
    passes: list[int] = []
    model.model.register_forward_pre_hook(lambda _m, args, _k: passes.append(args[0].shape[1]), with_kwargs=True)
    prompt = requests((9,))[0].ids
    asked = [Request(prompt, list_, (0, sample)) for list_ in (0, 1) for sample in range(3)]
    found = by_number(model, interventions, asked, Sampling(5, 1.0), slots=6)
    assert passes.count(9) == 2
    assert len({tuple(found[n].token_ids) for n in range(3)}) == 3
    assert {(c.processed, c.changed) for c in found.values()} == {(13, 0), (13, 13)}
    for number, request in enumerate(asked):
        assert by_number(model, interventions, [request], Sampling(5, 1.0), slots=6) == {0: found[number]}


def test_a_long_prompt_and_a_layer_that_is_passed_by_are_errors(monkeypatch):
    model, interventions = hooked()
    with pytest.raises(UserError, match="prompt 2 of 2 has 60 tokens; with 8 new ones that is more than"):
        by_number(model, interventions, requests((4, 60)), Sampling(8), slots=2)
    layer = model.modules[f"model.layers.{LAYER}"]
    run = type(layer).__call__
    skip = lambda self, x, *a, **k: (self.forward if x.shape[1] == 1 else run.__get__(self))(x, *a, **k)  # noqa: E731
    monkeypatch.setattr(type(layer), "__call__", skip)
    with pytest.raises(UserError, match=r"layers\.1: the model read 11 tokens of a sequence, and 4 passed the hook"):
        by_number(model, interventions, requests((4,)), Sampling(8), slots=2)


def test_a_model_that_does_not_write_is_named(monkeypatch):
    model, interventions = hooked("bloom", "transformer.h.1")
    for error, said in ((NotImplementedError("no cache\nof it"), "no cache$"), (TypeError(), "TypeError$")):

        def fails(*_ids, error=error, **_options):
            raise error

        monkeypatch.setattr(model.model, "generate", fails)
        with pytest.raises(UserError, match=f"^BloomForCausalLM does not generate text: {said}"):
            by_number(model, interventions, requests((4,)), Sampling(8), slots=2)


def test_out_of_memory_names_what_can_be_lowered(monkeypatch):
    model, interventions = hooked()
    monkeypatch.setattr(Engine, "_decode", lambda _self: torch.empty(1 << 60))
    with pytest.raises(
        UserError, match=r"out of memory while 3 answers are written .* \(benchmark\.slots\), or max_new"
    ):
        by_number(model, interventions, requests((4,)), Sampling(8), slots=3)
    monkeypatch.setattr("evaluate.engine.same_step", lambda *_: torch.empty(1 << 60))
    with pytest.raises(UserError, match="out of memory while 5 answers are written"):
        by_number(model, interventions, requests((4,)), Sampling(8), slots=5)


def test_noise_is_that_of_a_draw_from_the_softmax():
    """Chi-squared over 6,000 draws of five tokens, and another stream for another seed, step and token."""
    logits_V = torch.tensor([1.0, 0.0, -1.0, 2.0, -2.0])
    draws = [Draw((3, i // 100), i % 100) for i in range(6_000)]
    for temperature, top_p, kept in ((1.0, 1.0, [0, 1, 2, 3, 4]), (2.0, 1.0, [0, 1, 2, 3, 4]), (1.0, 0.9, [0, 1, 3])):
        found = np.bincount(
            chosen(logits_V.expand(len(draws), -1), Sampling(1, temperature, top_p), draws), minlength=5
        )
        p = np.exp(logits_V.numpy()[kept] / temperature)
        expected = 6_000 * p / p.sum()
        assert found.sum() == found[kept].sum()
        assert ((found[kept] - expected) ** 2 / expected).sum() < 18.5  # the 99.9th percentile at 4 degrees of freedom
    tokens = np.arange(50_000)
    noise = np.stack([gumbel(Draw(seed, step), tokens) for seed in ((0, 1), (1, 0), (0, 0, 1)) for step in (0, 1)])
    assert np.abs(np.corrcoef(noise) - np.eye(6)).max() < 0.03
    assert np.abs(np.corrcoef(noise[0, :-1], noise[0, 1:])[0, 1]) < 0.02
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01) and noise.var() == pytest.approx(
        np.pi**2 / 6, abs=0.03
    )
    assert np.array_equal(gumbel(Draw((0, 1), 1), tokens[[7, 9]]), noise[1, [7, 9]])  # of a token, wherever it stands


def test_the_noise_made_on_a_device_is_that_of_the_host():
    draws = [Draw((number, 2**40), step) for number in range(5) for step in (0, 1, 8191)]
    ours_NV = gumbel_on_device([noise_key(draw) for draw in draws], 70_000, torch.device("cpu"))
    assert ours_NV.dtype == torch.float64
    np.testing.assert_allclose(
        ours_NV, np.stack([gumbel(draw, np.arange(70_000)) for draw in draws]), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits_NV = 3 * torch.randn(40, 500, generator=torch.Generator().manual_seed(0))
    logits_NV[0, :] = 0.0
    logits_NV[0, 17] = 30.0  # one token is all of it
    warp: Any = TopPLogitsWarper(top_p)
    warped_NV = warp(None, logits_NV)
    draws = [Draw((n,), 0) for n in range(40)]
    noise_NV = torch.from_numpy(np.stack([gumbel(draw, np.arange(500)) for draw in draws]))
    assert chosen(logits_NV, Sampling(1, 1.0, top_p), draws) == (warped_NV + noise_NV).argmax(1).tolist()
    assert chosen(logits_NV, Sampling(1), draws) == logits_NV.argmax(1).tolist()


def test_lists_of_one_seed_have_the_same_noise():
    model, interventions = hooked()
    same = Interventions(interventions.saved, interventions.maxima, ((), (Operation(3, "add", 1e-7),), LISTS[1]))
    asked = [Request(requests((6,))[0].ids, list_, (1, 2)) for list_ in range(3)]
    found = by_number(model, same, asked, Sampling(20, 1.0), slots=2)
    assert found[0].token_ids == found[1].token_ids != found[2].token_ids
    assert isinstance(found[0], Completion) and effective(LISTS[0]) == []
