from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.language_model import HookedModel, load_model

CPU = torch.device("cpu")
TOKENS = torch.arange(24).view(2, 12)


def load(hooks, with_head=False, dtype=torch.float32, name="assets/tiny-llama") -> HookedModel:
    return load_model(ModelConfig(name=name), None, hooks, dtype, CPU, with_head=with_head)


@pytest.fixture
def whole(fresh_folder):
    del fresh_folder
    return AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.bfloat16).float().eval()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["model.layers.{}", "blocks.{}.hook_resid_post"])
def test_activations_are_the_models_own(whole, layer, name):
    hook = name.format(layer)
    found = load([hook]).activations(TOKENS)[hook]
    hidden = []
    handle = whole.model.layers[layer].register_forward_hook(lambda _m, _i, output: hidden.append(output))
    whole(TOKENS)
    handle.remove()
    assert torch.equal(found, hidden[0])


def test_several_hooks_in_one_pass_and_no_layer_more_than_needed(whole):
    model = load(["model.layers.0"])
    assert len(model.layers) == len(model.model.model.layers) == 1
    both = load(["model.layers.0", "model.layers.1", "model.layers.0.mlp"])
    found = both.activations(TOKENS)
    assert torch.equal(found["model.layers.0"], model.activations(TOKENS)["model.layers.0"])
    assert torch.equal(found["model.layers.0"], whole(TOKENS, output_hidden_states=True).hidden_states[1])
    assert set(found) == {"model.layers.0", "model.layers.1", "model.layers.0.mlp"}


@pytest.mark.parametrize("hook", ["model.layers.0", "model.layers.1", "model.layers.0.mlp", "model.embed_tokens"])
def test_replacing_an_activation_by_itself_changes_nothing(whole, hook):
    model = load([hook], with_head=True)
    acts = model.activations(TOKENS)[hook]
    with torch.no_grad():
        with model.replaced(hook, acts):
            same = model.model(TOKENS).logits
        with model.replaced(hook, torch.zeros_like(acts)):
            zero = model.model(TOKENS).logits
        assert torch.equal(same, whole(TOKENS).logits)
        assert not torch.allclose(zero, same)
        assert torch.equal(model.model(TOKENS).logits, same)


def test_compiled_layers_are_compiled_after_a_replacement(fresh_folder):
    hook = "model.layers.0"
    model, seen = load([hook], with_head=True), list[int]()
    assert model.behind(hook).hidden_states_alone
    layer, own = model.layers[0], model.layers[0].forward
    layer.forward = lambda *arguments, **options: (seen.append(1), own(*arguments, **options))[1]
    compiled = layer.forward
    with model.replaced(hook, model.activations(TOKENS)[hook]):
        model.model(TOKENS)
    assert layer.forward is compiled and len(seen) == 1


def test_memory_that_a_library_lacks_while_layers_are_compiled_is_told_as_memory(fresh_folder, monkeypatch):
    def compiled(_forward, **_options):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        load(["model.layers.1"]).compile_layers(TOKENS)


def test_rotary_frequencies_stay_float32(fresh_folder, monkeypatch):
    """Rounded to bfloat16 they are off by half a radian at position 1000; the weights alone are bfloat16."""
    monkeypatch.setattr("harvest.products.has_bfloat16", lambda _device: True)  # to compare with torch's own products
    for with_head in (False, True):
        model = load(["model.layers.1"], with_head=with_head, dtype=torch.bfloat16)
        assert {buffer.dtype for buffer in model.model.buffers()} == {torch.float32}
        assert {weight.dtype for weight in model.model.parameters()} == {torch.bfloat16}
        own = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.bfloat16).eval()
        hidden = own(TOKENS, output_hidden_states=True).hidden_states[1]
        assert torch.equal(load(["model.layers.0"], dtype=torch.bfloat16).activations(TOKENS)["model.layers.0"], hidden)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("model.layers.2", "'model.layers.2': the model has 2 layers, 0 to 1"),
        ("blocks.7.hook_resid_post", "the model has 2 layers, 0 to 1"),
        ("model.layer.1", "no such module in LlamaForCausalLM; did you mean 'model.layers.1'?"),
        ("model.layers", "no such module"),
        ("lm_head", "hooks are taken in decoder layers"),
        ("xyz", "no such module in LlamaForCausalLM; a layer is model.layers.0"),
    ],
)
def test_hooks_that_the_model_does_not_have(fresh_folder, hook, message):
    del fresh_folder
    with pytest.raises(UserError) as caught:
        load([hook])
    assert message in str(caught.value)


def test_models_that_cannot_be_loaded(fresh_folder):
    weights = Path("assets/tiny-llama/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="weights cannot be loaded"):
        load(["model.layers.0"])
    Path("assets/tiny-llama/config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(["model.layers.0"])


@pytest.fixture
def without_compiler(monkeypatch):
    """torch.compile's tracing, without the C compiler that its last step needs."""
    real = torch.compile
    monkeypatch.setattr("torch.compile", lambda fn, dynamic, options: real(fn, dynamic=dynamic, backend="aot_eager"))


@pytest.mark.parametrize("hooks", [["model.layers.1"], ["model.layers.0.mlp", "model.layers.0", "model.layers.1"]])
def test_compiled_layers_give_the_same_activations(fresh_folder, without_compiler, hooks):
    """Layers with a hook inside stay as they are, so that the hook is called."""
    model = load(hooks)
    before = model.activations(TOKENS)
    model.compile_layers(TOKENS)
    compiled = [hasattr(layer.forward, "_torchdynamo_orig_callable") for layer in model.layers]
    assert compiled == [len(hooks) == 1, True]
    after = model.activations(TOKENS)
    assert set(after) == set(hooks)
    for hook in hooks:
        torch.testing.assert_close(after[hook], before[hook], rtol=1e-5, atol=1e-6)


def test_a_machine_that_cannot_compile_says_so(fresh_folder, monkeypatch):
    def refuse(*_arguments, **_options):
        raise RuntimeError("No working C++ compiler found\nand more")

    model = load(["model.layers.1"])
    before = model.activations(TOKENS)["model.layers.1"]
    for compile_layer in (lambda _forward, **_options: refuse, refuse):  # as it is called, or as it is compiled
        monkeypatch.setattr("torch.compile", compile_layer)
        with pytest.raises(UserError, match=r"harvest\.compile: true: .*\(No working C\+\+ compiler found\); install"):
            model.compile_layers(TOKENS)
        assert torch.equal(model.activations(TOKENS)["model.layers.1"], before)


def test_a_strided_view_before_the_head_costs_no_copies_of_its_weights(whole):
    """torch multiplies such a view in a batched product, with the weights once for each sequence."""
    model = load(["model.layers.1"], with_head=True)
    seen = []
    model.model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    last = model.model(TOKENS, logits_to_keep=1).logits
    assert last.shape[1] == 1
    assert seen[0].is_contiguous()
    torch.testing.assert_close(last[:, 0], whole(TOKENS).logits[:, -1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_as_the_files_hold_them(fresh_folder, stored):
    """In float32; bfloat16 ones are widened, which changes nothing."""
    exact = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.float32)
    with torch.no_grad():
        for weight in exact.parameters():
            weight.add_(1e-3 * torch.rand_like(weight))
    exact.to(stored).save_pretrained("assets/tiny-llama")
    whole = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.float32).eval()
    for with_head in (False, True):
        model = load(["model.layers.1.mlp"], with_head=with_head)
        kept = dict(model.model.named_parameters())
        assert all(torch.equal(weight, kept[name]) for name, weight in whole.named_parameters())
    rounded = load(["model.layers.1"], dtype=torch.bfloat16)
    assert {weight.dtype for weight in rounded.model.parameters()} == {torch.bfloat16}


def test_what_a_module_returned_is_read_though_it_is_changed_later(whole):
    """In either kind of pass; and what is put in is not changed for the caller."""
    model = load(["model.layers.0.mlp", "model.layers.1.mlp"], with_head=True)
    before = model.activations(TOKENS)
    # As Falcon does: the residual is added in place to what the MLP returned.
    for layer in model.layers:
        forward = layer.forward

        def adding(hidden_states, *inputs, layer=layer, forward=forward, **keywords):
            kept = []
            handle = layer.mlp.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
            out = forward(hidden_states, *inputs, **keywords)
            handle.remove()
            kept[0].add_(7)
            return out

        layer.forward = adding
    for found in (model.activations(TOKENS), model.read(TOKENS)[0]):
        assert all(torch.equal(found[hook], before[hook]) for hook in before)
    given = torch.zeros_like(before["model.layers.0.mlp"])
    with torch.inference_mode(), model.replaced("model.layers.0.mlp", given):
        model.model(TOKENS)
    assert not given.any()


def test_a_pass_ends_at_the_last_hook(fresh_folder):
    model = load(["model.layers.0", "model.layers.0.mlp"], with_head=True)
    ran = []
    model.layers[1].register_forward_hook(lambda *_given: ran.append("behind"))
    assert set(model.activations(TOKENS)) == {"model.layers.0", "model.layers.0.mlp"}
    assert not ran
    model.read(TOKENS)
    assert ran == ["behind"]
