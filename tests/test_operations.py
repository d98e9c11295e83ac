"""Operations on features, held against a plain implementation: the whole text read anew for each token, no cache."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_steering import HOOK, TINY

from evaluate.engine import Completion
from evaluate.generation import complete
from evaluate.operations import Interventions, Operation, Operator, Reading, Tags, check_operations
from evaluate.prompts import prompt_ids, thinking_tags
from evaluate.sampler import Draw, Sampling, gumbel
from harvest.files import UserError
from harvest.language_model import HookedModel, load_model
from harvest.tokenizer import load_whole_tokenizer
from train.checkpoint import SavedSae
from train.exclusion import InputStatistics
from train.sae import Sae
from train.standard import Standard
from train.topk import TopK

PROMPTS = ("wait therefore the sum", "is even <think>so let me", "<think>numbers</think> of <think>two", "check")
MAXIMA = {3: 5.0, 7: 3.0, 11: 2.0}
LISTS: dict[str, tuple[Operation, ...]] = {
    **{op: (Operation(3, op, 1.5),) for op in ("add", "set", "scale")},
    "ablate": (Operation(3, "ablate", 0.0),),
    **{where: (Operation(3, "set", 2.0, where),) for where in ("prompt", "generated", "thinking")},
    "several": (
        Operation(3, "set", 1.0, "thinking"),
        Operation(7, "scale", -2.0),
        Operation(11, "add", 2.0, "prompt"),
        Operation(5, "ablate", 0.0, "generated"),
    ),
}


def saved(kind: str) -> SavedSae:
    """Features that fire often, of biases and directions that are not each other's transposes."""
    sae = TopK.initial(32, 64, scale=0.7, k=24) if kind == "topk" else Standard.initial(32, 64, scale=0.7)
    generator = torch.Generator().manual_seed(4)
    for name, size in (("W_enc", 0.3), ("b_enc", 0.3), ("W_dec", 0.3), ("b_dec", 0.3)):
        weight = getattr(sae, name)
        weight.copy_(size * torch.randn(weight.shape, generator=generator))
    return SavedSae(sae, HOOK, InputStatistics(0.7, 1.0, None), {})


@pytest.fixture
def tiny(finished, monkeypatch) -> tuple[HookedModel, SimpleNamespace]:
    monkeypatch.chdir(finished)
    model = load_model(TINY, None, [HOOK], torch.float32, torch.device("cpu"), with_head=True)
    tokenizer = load_whole_tokenizer(TINY, None, offline=True)
    tokenizer.bos_token = "<｜begin▁of▁sentence｜>"
    return model, tokenizer


def places(ids: Sequence[int], prompt: int, where: str, tags: Tags) -> list[bool]:
    out, thinking = [], False
    for position, token in enumerate(ids):
        thinking = thinking and token != tags.end
        is_in = {"all": True, "prompt": position < prompt, "generated": position >= prompt, "thinking": thinking}
        out.append(is_in[where] and not (where == "thinking" and token == tags.start))
        thinking = thinking or token == tags.start
    return out


def plainly(sae: Sae, x_SD: torch.Tensor, operations: Sequence[Operation], ids: list[int], prompt: int, tags: Tags):
    """Encode, change f, decode, add the error back; and at how many positions that is done."""
    f = sae.encode(x_SD)
    changed, any_place = f.clone(), torch.zeros(len(ids), dtype=torch.bool)
    for feature, op, strength, where in operations:
        place = torch.tensor(places(ids, prompt, where, tags))
        new = {
            "add": f[:, feature] + strength * MAXIMA.get(feature, 0),
            "set": torch.full((len(ids),), strength * MAXIMA.get(feature, 0)),
            "ablate": torch.zeros(len(ids)),
            "scale": strength * f[:, feature],
        }[op]
        changed[:, feature] = torch.where(place, new, f[:, feature])
        any_place |= place
    return sae.decode(changed) + (x_SD - sae.decode(f)), int(any_place.sum())


def write_plainly(
    model: HookedModel, tokenizer, sae: Sae, operations, ids: list[int], sampling: Sampling, number: int
) -> Completion:
    """A completion, token by token."""
    prompt, end, tags = len(ids), tokenizer.eos_token_id, thinking_tags(tokenizer, [ids])
    ids, count, token = list(ids), 0, -1

    def put(_module, _inputs, x_1SD):
        nonlocal count
        x_SD, count = plainly(sae, x_1SD[0], operations, ids, prompt, tags)
        return x_SD[None]

    handle = model.modules[HOOK].register_forward_hook(put)
    with torch.no_grad():
        while True:
            logits = model.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            if sampling.temperature:
                draw = Draw((sampling.seed, number), len(ids) - prompt)
                logits = logits / sampling.temperature + torch.from_numpy(gumbel(draw, np.arange(len(logits)))).float()
            token = int(logits.argmax())
            if token == end or len(ids) + 1 == prompt + sampling.max_new_tokens:
                break
            ids.append(token)
    handle.remove()
    written = ids[prompt:] + [token] * (token != end)
    return Completion(tokenizer.decode(written), written, token == end, len(ids), count)


@pytest.mark.parametrize("kind", ["standard", "topk"])
@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_completions_equal_the_plain_implementation(tiny, kind, temperature):
    model, tokenizer = tiny
    of, sampling, tags = saved(kind), Sampling(16, temperature, seed=2), thinking_tags(tokenizer, [])
    liked = torch.zeros(len(tokenizer))  # so that a random model thinks, and ends
    if temperature:
        liked[list(tags)], liked[tokenizer.eos_token_id] = 0.7, 0.5
    model.model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits + liked)
    lists = [(), *LISTS.values()]
    found = complete(model, tokenizer, Interventions(of, MAXIMA, lists), PROMPTS, sampling, bos="auto")
    ids = prompt_ids(tokenizer, PROMPTS, bos="auto")
    assert all(row[0] == tokenizer.bos_token_id for row in ids) and len(set(map(len, ids))) > 2
    for number, row in enumerate(found):
        for operations, completion in zip(lists, row, strict=True):
            assert completion == write_plainly(model, tokenizer, of.sae, operations, ids[number], sampling, number)
    assert len({tuple(completion.token_ids) for row in found for completion in row}) > 10  # they do change something
    if temperature:
        thought = [completion for row in found for completion in row if set(tags) <= set(completion.token_ids)]
        assert len(thought) > 3 and {completion.ended for row in found for completion in row} == {True, False}


@pytest.mark.parametrize("kind", ["standard", "topk"])
@pytest.mark.parametrize("name", LISTS)
def test_activations_equal_the_plain_implementation(tiny, kind, name):
    """A prompt, and then six tokens one at a time, both tags among them."""
    of, tags = saved(kind), thinking_tags(tiny[1], [])
    rows = [[5, 60, tags.start, 61], [70, 71, 72, 73]]
    later = [[62, tags.end, 63, tags.start, 64, 65], [74, tags.start, 75, 76, tags.end, 77]]
    operator, readings = Operator(Interventions(of, MAXIMA, [])), [Reading(LISTS[name], 4, tags) for _ in rows]
    x_BSD = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1))
    ids_BS = torch.tensor([a + b for a, b in zip(rows, later, strict=True)])

    def after(readings: list[Reading | None], start: int, end: int) -> torch.Tensor:
        tokens = ids_BS[:, start:end].tolist()
        operator.expect([reading and (reading, row) for reading, row in zip(readings, tokens, strict=True)])
        return operator(x_BSD[:, start:end], ids_BS[:, start:end])

    out_BSD = torch.cat([after(readings, a, b) for a, b in ((0, 4), *((i, i + 1) for i in range(4, 10)))], 1)
    for b, reading in enumerate(readings):
        expected, count = plainly(of.sae, x_BSD[b], LISTS[name], ids_BS[b].tolist(), 4, tags)
        assert torch.allclose(out_BSD[b], expected, rtol=1e-5, atol=1e-5)
        assert (reading.processed, reading.changed) == (10, count)
    again = [Reading(LISTS[name], 4, tags), None]
    for end in range(4, 11):  # as a model without a cache does
        whole_BSD = after(again, 0, end)
    assert torch.allclose(whole_BSD[0], out_BSD[0], atol=1e-5) and again[0] == readings[0]
    assert torch.equal(whole_BSD[1], x_BSD[1])  # nobody's


def test_what_a_feature_is_already_changes_nothing(tiny):
    """Adding 0 and scaling by 1 do no arithmetic; a feature set to what it is has the same tokens."""
    model, tokenizer = tiny
    of = saved("standard")
    of.sae.W_enc[:, 3], of.sae.b_enc[3] = 0, 1.37  # it has one value everywhere
    of.sae.b_enc[7] = -1e6  # it never fires
    of.sae.W_dec[9] = torch.inf
    (value,) = of.sae.columns(torch.zeros(1, 32), [3])[0].tolist()
    lists = [
        (),
        (Operation(9, "add", 0.0), Operation(3, "scale", 1.0)),
        (Operation(3, "set", 1.0), Operation(7, "ablate", 0.0)),
        (Operation(7, "scale", 5.0, "generated"),),
        (Operation(3, "set", 2.0),),
    ]
    maxima = {3: value, 9: 1.0}
    for sampling in (Sampling(12), Sampling(12, 0.05)):
        for free, *same, other in complete(model, tokenizer, Interventions(of, maxima, lists), PROMPTS, sampling):
            assert all(completion.token_ids == free.token_ids for completion in same)
            assert other.token_ids != free.token_ids
            assert [c.changed for c in (free, *same)] == [0, 0, free.processed, len(free.token_ids) - (not free.ended)]


def test_a_hook_that_skips_decoded_tokens_is_found(tiny, monkeypatch):
    """As a captured graph does, and a compiled layer may: what a layer computes is the same, its hooks do not run."""
    model, tokenizer = tiny
    layer = model.modules[HOOK]
    run = type(layer).__call__
    skipping = lambda self, x, *a, **k: (self.forward if x.shape[1] == 1 else run.__get__(self))(x, *a, **k)  # noqa: E731
    monkeypatch.setattr(type(layer), "__call__", skipping)
    interventions = Interventions(saved("standard"), MAXIMA, [LISTS["set"]])
    says = f"{HOOK}: the model read 15 tokens of a sequence, and 4 passed the hook: it runs this layer in another way"
    with pytest.raises(UserError, match=says):
        complete(model, tokenizer, interventions, PROMPTS[:1], Sampling(12))


def test_sums_are_of_float32_and_rounded_once():
    of = saved("standard")
    x_SD = (8 * torch.randn(40, 32, generator=torch.Generator().manual_seed(2))).bfloat16()
    ids = list(range(40))

    def after(*operations: Operation) -> torch.Tensor:
        operator = Operator(Interventions(of, MAXIMA, []))
        operator.expect([(Reading(operations, 40), ids)])
        out_BSD = operator(x_SD[None], torch.tensor([ids]))
        assert out_BSD.dtype == torch.bfloat16
        return out_BSD[0]

    several = Operation(3, "set", 1.0), Operation(7, "scale", -2.0), Operation(5, "ablate", 0.0)
    expected_SD, _ = plainly(of.sae, x_SD.float(), several, ids, 40, Tags(-1, -2))
    assert (after(*several) == expected_SD.bfloat16()).float().mean() > 0.999  # but where float32's last bits decide
    vector_D = (5.0 * of.sae.direction([3])[0] * 0.3).bfloat16()
    assert torch.equal(after(Operation(3, "add", 0.3)), x_SD + vector_D)


CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
R1 = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"


def test_thinking_begins_in_the_prompt_of_a_template_that_says_so(tiny):
    model, tokenizer = tiny
    tokenizer.chat_template = R1.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    interventions = Interventions(saved("standard"), MAXIMA, [(Operation(3, "add", 0.1, "thinking"),)])
    for (completion,) in complete(model, tokenizer, interventions, ["wait", "so let me"], Sampling(4)):
        assert completion.changed == 1 + 3 and not completion.ended  # the line feed, and what was written but the last


def test_thinking_that_cannot_be_known_is_an_error(tiny):
    model, tokenizer = tiny
    interventions = Interventions(saved("standard"), MAXIMA, [LISTS["thinking"]])
    tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match="where: thinking: the model's chat template does not know </think>"):
        complete(model, tokenizer, interventions, ["so"], Sampling(4))
    assert complete(model, tokenizer, interventions, ["<think>so"], Sampling(4))[0][0].changed > 0
    assert complete(model, tokenizer, interventions, ["so"], Sampling(4), chat=False)[0][0].changed == 0
    with pytest.raises(UserError, match="where: thinking: this model's tokenizer has no tokens <think> and </think>"):
        thinking_tags(SimpleNamespace(get_vocab=lambda: {"<think>": 1}), [])


@pytest.mark.parametrize(
    ("operations", "says"),
    [
        ([(3, "add", 1.0), (3, "ablate", 0.0)], "--feature: 3: one list has two operations on this feature"),
        ([(64, "add", 1.0)], "--feature: 64: the SAE has 64 features, 0 to 63"),
        ([(3, "set", float("nan"))], "--feature: nan: a strength is a number from"),
    ],
)
def test_operations_that_make_no_sense_are_named(operations, says):
    with pytest.raises(UserError, match=says):
        check_operations([Operation(*each) for each in operations], 64, "--feature")
