"""Every architecture's activations are those of the whole model: tiny random models, all layers that matter."""

import pytest
import torch
import transformers as hf

from harvest.config import ModelConfig
from harvest.language_model import HookedModel, load_model

TOKENS = torch.arange(24).view(2, 12)
LAYERS = 4
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
GATED = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
# Windows shorter than the contexts, so that layers with and without one differ; where the class knows of them.
WINDOW = {"sliding_window": 4}
MODELS = {
    "llama": hf.LlamaConfig(**GATED),
    "mistral": hf.MistralConfig(**GATED, **WINDOW),
    "qwen2": hf.Qwen2Config(**GATED, **WINDOW, use_sliding_window=True, max_window_layers=2),
    "qwen3": hf.Qwen3Config(**GATED, tie_word_embeddings=True),
    "gemma": hf.GemmaConfig(**GATED),
    "gemma2": hf.Gemma2Config(**GATED, **WINDOW),
    "gemma3": hf.Gemma3TextConfig(**GATED, **WINDOW),
    "phi": hf.PhiConfig(**SIZES, intermediate_size=64),
    "phi3": hf.Phi3Config(**SIZES, intermediate_size=64, pad_token_id=0),
    "gpt_neox": hf.GPTNeoXConfig(**SIZES, intermediate_size=64),
    "gpt2": hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=LAYERS, n_head=4),
    "gptj": hf.GPTJConfig(vocab_size=60, n_embd=32, n_layer=LAYERS, n_head=4, rotary_dim=4),
    "falcon": hf.FalconConfig(**SIZES),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """(folder of a model, the whole model as transformers computes it in float32)."""
    folder = tmp_path_factory.mktemp(request.param)
    config = MODELS[request.param]
    config.bos_token_id = config.eos_token_id = 0
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    # Read back: rotary frequencies are rounded by .bfloat16(), but not when weights are loaded as bfloat16.
    return folder, hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()


def load(folder, hooks: list[str], with_head: bool = False) -> HookedModel:
    return load_model(
        ModelConfig(name=str(folder)), None, hooks, torch.float32, torch.device("cpu"), with_head=with_head
    )


@torch.no_grad()
def test_activations_equal_the_hidden_states_of_the_whole_model(saved):
    """Bit for bit, from a model that was cut after the hooked layer. Before the final norm, at the last layer."""
    folder, whole = saved
    layer_list = next(
        name
        for name, module in whole.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == LAYERS
    )
    last: list[torch.Tensor] = []  # hidden_states[-1] has been through the final norm
    handle = whole.get_submodule(f"{layer_list}.{LAYERS - 1}").register_forward_hook(
        lambda _module, _inputs, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    hidden = whole(TOKENS, output_hidden_states=True).hidden_states
    handle.remove()
    assert not torch.equal(hidden[LAYERS], last[0])
    for layer in (0, 2, LAYERS - 1):
        expected = hidden[layer + 1] if layer < LAYERS - 1 else last[0]
        for hook in (f"{layer_list}.{layer}", f"blocks.{layer}.hook_resid_post"):
            model = load(folder, [hook])
            assert len(model.model.get_submodule(layer_list.partition(".")[2])) == layer + 1
            assert torch.equal(model.activations(TOKENS)[hook], expected), (layer, hook)


@torch.no_grad()
def test_replacing_activations_by_themselves_gives_the_same_logits(saved):
    folder, whole = saved
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (0, 2, LAYERS - 1)]
    model = load(folder, hooks, with_head=True)
    logits = whole(TOKENS).logits
    acts, output = model.read(TOKENS)
    assert torch.equal(output.logits, logits)
    for hook in hooks:
        with model.replaced(hook, acts[hook]):
            assert torch.equal(model.model(TOKENS, use_cache=False).logits, logits), hook
        with model.replaced(hook, acts[hook].flip(0)):
            assert not torch.allclose(model.model(TOKENS, use_cache=False).logits, logits), hook
    assert torch.equal(model.model(TOKENS).logits, logits)
