"""Every causal class of the installed transformers, small and random: what is read and replaced is the whole model's.

The references are the whole model, as transformers makes and runs it, with hooks of the tests' own.
"""

import re
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from conftest import KNOWN_TRANSFORMERS
from safetensors.torch import load_file, save_file
from small_models import small_config, small_model
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import harvest.language_model
from evaluate import unembedding
from harvest import run as harvest_run
from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.hooked_model import HookedModel, first_tensor
from harvest.language_model import load_model

pytestmark = KNOWN_TRANSFORMERS
TOKENS = torch.arange(24).view(2, 12)
CPU = torch.device("cpu")
# Those that cannot be made small from their default configuration, and why.
UNMADE = {
    "blt": "its byte patcher and hash embeddings have 96M weights at any width",
    "dbrx": "its attention's settings lack what its rotary positions read",
    "dots3_note": "its image encoder's list of experts is for its own number of layers; dots3_note_text is made",
    "gemma3n": "its image encoder needs timm; gemma3n_text is made",
    "gemma4_assistant": "reads keys that another model made",
    "gemma4_unified_assistant": "reads keys that another model made",
    "musicgen": "generates sound: several text configurations, none of them the model's",
    "musicgen_melody": "generates sound: several text configurations, none of them the model's",
    "phi4_multimodal": "its sound and image encoders have 3M weights at any width; phi3 is its text",
    "roc_bert": "its table of shapes has 13M weights at any width",
}
# Those that cannot be harvested, and what is said.
REFUSED = {
    "emu3": "cannot be loaded: Unrecognized configuration class",  # of the text alone, as it is saved here
    "mllama": "cannot be loaded: Unrecognized configuration class",
    "hrm_text": "HrmTextForCausalLM has no list of decoder layers",
    "xmod": "XmodForCausalLM cannot be run on token ids alone: Input language unknown",
}
# Those without one norm between the last layer and the head, through which a direction could be read.
NO_END = (
    *("bart", "bert-generation", "blenderbot-small", "git", "marian", "mvp", "openai-gpt", "plbart", "prophetnet"),
    *("qwen4_exp", "qwen4_exp_text", "trocr", "xlm", "xlnet"),
)
MADE = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNMADE and name not in REFUSED]


class Case(NamedTuple):
    """A model in a folder, and the same as transformers runs it."""

    kind: str
    model: ModelConfig
    whole: Any
    layer_list: str
    rows: dict[str, Tensor]  # of every layer, and of the modules in the first two that run once
    logits: Tensor


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, as more would wait for each other, and one module tree for all loads of a folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    skeletons = cache(harvest.language_model.load_skeleton)
    with pytest.MonkeyPatch.context() as patch:
        for module in (harvest.language_model, unembedding):
            patch.setattr(module, "load_skeleton", skeletons)
        yield
    torch.set_num_threads(threads)


def made(folder: Any, kind: str, config: Any = None) -> Case:
    whole = small_model(config or small_config(kind))
    whole.save_pretrained(folder)
    return traced(folder, kind, whole)


def traced(folder: Any, kind: str, whole: Any) -> Case:
    model = ModelConfig(name=str(folder))
    layer_list = harvest.language_model.load_skeleton(model, None, True).layer_list
    seen: dict[str, list[Tensor | None]] = {}
    inside = tuple(f"{layer_list}.{number}." for number in (0, 1))
    layers = {f"{layer_list}.{number}" for number in range(len(whole.get_submodule(layer_list)))}
    handles = []
    for name, module in whole.named_modules():
        if name in layers or name.startswith(inside):

            def keep(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                acts = first_tensor(output)
                seen.setdefault(name, []).append(acts.clone() if isinstance(acts, Tensor) else None)

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        logits = whole(TOKENS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert all(len(seen[layer]) == 1 for layer in layers)
    once = {name: acts[0] for name, acts in seen.items() if len(acts) == 1 and acts[0] is not None}
    rows = {name: acts for name, acts in once.items() if name in layers or acts.shape[:-1] == TOKENS.shape}
    return Case(kind, model, whole, layer_list, rows, logits)


@pytest.fixture(scope="module", params=MADE)
def case(request, tmp_path_factory) -> Case:
    return made(tmp_path_factory.mktemp(request.param), request.param)


def load(case: Case, hooks: list[str], with_head: bool = False) -> HookedModel:
    return load_model(case.model, None, hooks, torch.float32, CPU, offline=True, with_head=with_head)


def check_sliced(case: Case, layer: int) -> None:
    """Layers up to this one are loaded, and they and all that is in this one give the whole model's rows."""
    here = f"{case.layer_list}.{layer}"
    hooks = [hook for hook in case.rows if hook == here or hook.startswith(f"{here}.")]
    hooks += [f"{case.layer_list}.{before}" for before in range(layer)]
    model = load(case, hooks)
    assert len(model.layers) == layer + 1
    found = model.activations(TOKENS)
    for hook in hooks:
        assert torch.equal(found[hook], case.rows[hook]), hook


def test_rows_of_a_sliced_model_are_the_whole_models(case):
    check_sliced(case, 0)


def test_rows_of_every_layer_and_logits_with_them_replaced_are_the_whole_models(case):
    hooks = [f"{case.layer_list}.{number}" for number in range(len(case.whole.get_submodule(case.layer_list)))]
    model = load(case, hooks, with_head=True)
    acts, output = model.read(TOKENS)
    assert torch.equal(output.logits, case.logits)
    for hook in hooks:
        assert torch.equal(acts[hook], case.rows[hook]), hook
    check_replaced(case, model, hooks[1], acts[hooks[1]])


@torch.no_grad()
def check_replaced(case: Case, model: HookedModel, hook: str, acts: Tensor) -> None:
    """Also by what another text gives: as a plain hook on the whole model does it, whatever layers are left out."""
    with model.replaced(hook, acts):
        assert torch.equal(model.model(TOKENS, use_cache=False).logits, case.logits), hook
    other = acts.flip(-2)

    def splice(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if hasattr(output, "_fields"):
            return output._replace(hidden_states=other.clone())
        return type(output)([other.clone(), *output[1:]]) if isinstance(output, (tuple, list)) else other.clone()

    handle = case.whole.get_submodule(hook).register_forward_hook(splice)
    expected = case.whole(TOKENS, use_cache=False).logits
    handle.remove()
    with model.replaced(hook, other):
        assert torch.equal(model.model(TOKENS, use_cache=False).logits, expected), hook
    assert not torch.allclose(expected, case.logits)


def test_promoted_tokens_go_through_the_norm_that_ran_last(case):
    check_promoted(case)


@torch.no_grad()
def check_promoted(case: Case) -> None:
    if case.kind in NO_END:
        with pytest.raises(UserError, match=r"no final norm and LM head were found in|is between the final norm"):
            unembedding.load_unembedding(case.model, None, True)
        return
    ran: list[nn.Module] = []
    head = case.whole.get_output_embeddings() or case.whole.embed_out  # as GPT-NeoX-Japanese calls it
    handles = [
        m.register_forward_hook(lambda m, _i, _o: ran.append(m))
        for m in case.whole.modules()
        if m is head or "norm" in type(m).__name__.lower()
    ]
    case.whole(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    norm = ran[ran.index(head) - 1]
    found = unembedding.load_unembedding(case.model, None, True)
    d_in = found.head_VD.shape[1]
    directions = torch.randn(3, d_in, generator=torch.Generator().manual_seed(0))
    up, down = unembedding.promoted(found, directions, 5)
    rows = torch.nn.functional.normalize(directions, dim=1) * 1e4  # so long that a norm's epsilon is nothing
    expected = head(norm(rows)) - head(norm(-rows))  # biases cancel
    assert torch.equal(up.token_KN, expected.topk(5).indices)
    assert torch.equal(down.token_KN, expected.topk(5, largest=False).indices)


def test_a_hundred_configurations_and_a_reason_for_each_that_is_missing():
    assert len(MADE) >= 100
    assert set(UNMADE) | set(REFUSED) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("kind", REFUSED)
def test_those_that_cannot_be_read_are_refused_by_name(kind, tmp_path):
    small_model(small_config(kind)).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(name=str(tmp_path)), None, ["blocks.0.hook_resid_post"], torch.float32, CPU)
    assert re.search(REFUSED[kind], str(caught.value))
    assert str(caught.value).startswith("model.name:") and "\n" not in str(caught.value)


WINDOW = {"sliding_window": 4}  # shorter than the contexts, so that layers with and without one differ
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "windows in later layers": ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "windows in every second layer": ("gemma2", WINDOW),
    "scales by the number of layers": ("minicpm3", {"scale_depth": 1.4}),
    "embeddings of every layer, shared keys": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "shared keys, several streams": ("gemma3n_text", {"num_kv_shared_layers": 3}),
    "indices of keys from earlier layers": ("glm_moe_dsa", {"indexer_types": ["full", "shared"] * 2, "index_topk": 4}),
    "the same with several streams": ("hy_v4", {"indexer_types": ["full", "shared"] * 2, "index_topk": 4}),
    "one block in several places": ("zamba", {}),
    "state spaces and experts": ("bamba", {}),
    "rescaled every few layers": ("rwkv", {"rescale_every": 2}),
    "added to in place": ("falcon", {"parallel_attn": True}),
    "two attentions in a layer": ("longcat_flash", {}),
    "lists by layer": ("laguna", {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_every_cut_and_every_replaced_layer_where_layers_depend_on_others(name, tmp_path):
    kind, settings = SPECIAL[name]
    case = made(tmp_path, kind, small_config(kind, **settings))
    count = len(case.whole.get_submodule(case.layer_list))
    for layer in range(count):
        check_sliced(case, layer) if layer < 2 else check_layers_before(case, layer)
    hooks = [f"{case.layer_list}.{layer}" for layer in range(count)]
    model = load(case, hooks, with_head=True)
    for hook in hooks:
        check_replaced(case, model, hook, case.rows[hook])


def check_layers_before(case: Case, layer: int) -> None:
    hook = f"{case.layer_list}.{layer}"
    model = load(case, [hook])
    assert len(model.layers) == layer + 1
    assert torch.equal(model.activations(TOKENS)[hook], case.rows[hook])


@pytest.mark.parametrize(
    ("kind", "alone", "no_text"),
    [
        ("llama", True, True),
        ("gptj", False, False),  # its layers return attention weights too: who reads them is not known
        ("gemma4_text", False, False),  # keys of earlier layers, and an embedding of every layer
        (
            "glm_moe_dsa",
            False,
            False,
        ),  # what an earlier layer chose; at any length of text, though it takes all of a short
        ("inkling2_text", True, False),  # embeddings of the text go into every layer
        ("falcon_h1", True, True),
    ],
)
def test_what_is_read_behind_a_layer(kind, alone, no_text, tmp_path):
    case = made(tmp_path, kind)
    hook = f"{case.layer_list}.1"
    inside = next(name for name in case.rows if name.startswith(f"{hook}."))
    model = load(case, [hook, inside], with_head=True)
    assert model.behind(hook) == (alone, no_text)
    assert model.behind(inside) == (False, False)


def test_a_text_model_inside_one_of_images(tmp_path):
    """Llama 4's files have the names of the whole, of which the text model alone is read."""
    whole = small_model(small_config("llama4"))
    whole.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {f"language_model.{name}": w for name, w in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    small_config("llama4").save_pretrained(tmp_path)
    case = traced(tmp_path, "llama4", whole)
    check_sliced(case, 1)
    check_promoted(case)


def test_weights_that_the_files_lack_are_named_and_never_random(tmp_path):
    small_model(small_config("llama")).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 of LlamaForCausalLM are not in its files \(model\.layers\.0\.mlp\.up_proj"):
        load_model(ModelConfig(name=str(tmp_path)), None, ["model.layers.1"], torch.float32, CPU)


@pytest.mark.parametrize("kind", ["gemma3n_text", "deepseek_v4", "hy_v4", "xlnet", "cpmant"])
def test_a_layer_without_a_row_for_each_token_is_refused_and_one_inside_is_not(kind, tmp_path):
    case = made(tmp_path, kind)
    hook = f"{case.layer_list}.0"
    with pytest.raises(UserError, match=r"not a row for each; hook a layer, or a module in one, that does"):
        harvest_run._width(load(case, [hook]), (hook,))
    inside = [name for name, acts in case.rows.items() if name.startswith(f"{hook}.") and acts.shape[:-1] == (2, 12)]
    if inside:
        assert harvest_run._width(load(case, inside[:1]), (inside[0],)) == case.rows[inside[0]].shape[-1]


def test_a_module_that_runs_twice_has_no_one_activation(tmp_path):
    case = made(tmp_path, "phi")
    with pytest.raises(UserError, match=r"resid_dropout': runs 2 times in one pass of PhiForCausalLM"):
        load(case, [f"{case.layer_list}.0.resid_dropout"])
