"""Modules that return no plain tensor, and layers that cannot be left out: what is read and replaced all the same."""

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.hooked_model import HookedModel
from harvest.language_model import find_head, load_model

CPU = torch.device("cpu")
TOKENS = torch.arange(24).view(2, 12)


class Part(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, x_BSD: Tensor):
        """What `give` makes of it."""
        return self.give(x_BSD)


class Toy(nn.Module):
    """An embedding, and a part that returns what `give` makes of it."""

    def __init__(self, give):
        super().__init__()
        self.embed, self.part = nn.Embedding(30, 4), Part(give)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids, use_cache=False):
        del use_cache
        return self.part(self.embed(input_ids))


def hooked(give) -> HookedModel:
    toy = Toy(give)
    return HookedModel(toy, {"part": toy.part}, CPU)


def test_fields_with_names_are_read_and_changed():
    """The first of them; the others stay as the module returned them."""
    model = hooked(lambda x: BaseModelOutput(last_hidden_state=x + 1, hidden_states=(x,)))
    model.check("model.name")
    x = model.model.embed(TOKENS)
    assert torch.equal(model.activations(TOKENS)["part"], x + 1)
    with torch.no_grad(), model.changed("part", lambda acts, ids: acts * ids[..., None]):
        out = model.model(TOKENS)
        by_name = model.model(input_ids=TOKENS)
    assert type(out) is BaseModelOutput and torch.equal(out.hidden_states[0], x)
    assert torch.equal(out.last_hidden_state, (x + 1) * TOKENS[..., None])
    assert torch.equal(by_name.last_hidden_state, out.last_hidden_state)


@pytest.mark.parametrize("given", ["text", None, {}, ()])
def test_a_hook_that_gives_no_tensor_is_refused(given):
    with pytest.raises(UserError, match=r"harvest\.hooks: 'part': gives no tensor in Toy; hook a layer"):
        hooked(lambda _x: given).check("model.name")


def out_of_memory(*_arguments, **_options):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_too_little_memory_is_no_fault_of_the_model():
    with pytest.raises(torch.OutOfMemoryError):
        hooked(out_of_memory).check("model.name")


def tiny(hook: str) -> HookedModel:
    return load_model(ModelConfig(name="assets/tiny-llama"), None, [hook], torch.float32, CPU, with_head=True)


def test_too_little_memory_is_no_lack_of_a_compiler(fresh_folder, monkeypatch):
    model = tiny("model.layers.1")
    monkeypatch.setattr("torch.compile", lambda _forward, **_options: out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model.compile_layers(TOKENS)


def test_layers_that_a_later_one_looks_at_are_not_left_out(fresh_folder):
    model = tiny("model.layers.0")
    assert model.behind("model.layers.0").hidden_states_alone
    model = tiny("model.layers.0")
    left = []
    model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: left.append(output))
    model.layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: output + left.pop())
    assert model.behind("model.layers.0") == (False, False)
    acts = model.activations(TOKENS)["model.layers.0"]
    with torch.inference_mode():
        whole = model.model(TOKENS).logits
        with model.replaced("model.layers.0", acts):
            assert torch.equal(model.model(TOKENS).logits, whole)


def test_a_head_that_transformers_does_not_know_of():
    toy = Toy(lambda x: x)
    assert find_head(toy) is None
    toy.other, toy.embed_out, toy.last = nn.Linear(4, 30), nn.Linear(4, 30), nn.Linear(4, 4)
    assert find_head(toy) is toy.embed_out
