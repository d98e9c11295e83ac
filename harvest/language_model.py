"""A causal language model of the hub or a folder: loaded no further than needed, read by plain forward hooks.

Hooks are named by module path as the causal model has it (`model.layers.19`), or as SAELens and
TransformerLens do (`blocks.19.hook_resid_post`, the output of decoder layer 19).

Shape suffixes: B sequences, S positions, D d_in.
"""

import difflib
import re
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.hooked_model import HookedModel
from harvest.hub import where_it_is
from harvest.products import widens, with_widened_products

SAELENS_NAME = re.compile(r"blocks\.(\d+)\.hook_resid_post")
LAYER_PATH = re.compile(r"[A-Za-z_.]+\.(?:layers|h|blocks)\.(\d+)")  # ends in a decoder layer's number

# transformers sets torch's defaults for all threads while it makes a model: two at once end with weights missing.
LOADING = threading.Lock()


class HookPoint(NamedTuple):
    """Where a hook sits: its module path in the causal model, and how many decoder layers it needs."""

    module: str
    layers: int


class Skeleton(NamedTuple):
    """A model without weights: its configuration and module tree, on the meta device."""

    config: Any
    model: nn.Module
    layer_list: str  # path of the decoder layers, "model.layers"


def load_skeleton(model: ModelConfig, commit: str | None, offline: bool) -> Skeleton:
    """Configuration and module tree, without weights.

    Raises UserError when the model cannot be had or is no causal language model.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(model.name, **where_it_is(model, commit, offline))
        with LOADING, torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of any kind: the classes check their numbers in many ways, or lack a package
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.name: {model.name!r}: cannot be loaded: {first}") from None
    layers = _layer_list(skeleton, config)
    if layers is None:
        raise UserError(f"model.name: {model.name!r}: {type(skeleton).__name__} has no list of decoder layers")
    return Skeleton(config, skeleton, layers)


def _layer_list(model: nn.Module, config: Any) -> str | None:
    """Path of the list of decoder layers; that of the text, where images have layers too."""
    try:
        text = config.get_text_config()
    except ValueError:  # a configuration of several texts
        return None
    names = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_layers")
    counts = {getattr(text, name, None) for name in names}
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) in counts]

    def is_of_text(path: str) -> bool:
        around = [n for n, m in model.named_modules() if hasattr(m, "config") and path.startswith(f"{n}." if n else "")]
        return type(model.get_submodule(max(around, key=len)).config) is type(text)

    return min(lists, key=lambda path: (not is_of_text(path), len(path)), default=None)


def find_hooks(skeleton: Skeleton, hooks: Sequence[str]) -> dict[str, HookPoint]:
    """Resolve the names of hooks.

    Raises UserError as `find_hook` does, and for two names of one module.
    """
    points = {hook: find_hook(skeleton, hook) for hook in hooks}
    by_module: dict[str, str] = {}
    for hook, point in points.items():
        if by_module.setdefault(point.module, hook) != hook:
            raise UserError(f"harvest.hooks: {hook!r}: the same module as {by_module[point.module]!r}")
    return points


def find_hook(skeleton: Skeleton, hook: str) -> HookPoint:
    """Resolve a hook's name.

    Raises UserError for a layer beyond the last, or a module that the model does not have.
    """
    modules = {n: m for n, m in skeleton.model.named_modules() if n and not isinstance(m, nn.ModuleList)}
    layers = len(skeleton.model.get_submodule(skeleton.layer_list))  # type: ignore[arg-type]
    saelens = SAELENS_NAME.fullmatch(hook)
    module = f"{skeleton.layer_list}.{saelens[1]}" if saelens else hook
    inside = re.match(re.escape(skeleton.layer_list) + r"\.(\d+)(\.|$)", module)
    if inside and int(inside[1]) >= layers:
        raise UserError(f"harvest.hooks: {hook!r}: the model has {layers} layers, 0 to {layers - 1}")
    if module not in modules:
        close = difflib.get_close_matches(module, modules, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"a layer is {skeleton.layer_list}.0"
        raise UserError(f"harvest.hooks: {hook!r}: no such module in {type(skeleton.model).__name__}; {hint}")
    return HookPoint(module, int(inside[1]) + 1 if inside else layers)


def saelens_hook(hook: str) -> str | None:
    """SAELens' name of a hook at the output of a decoder layer; None for a hook elsewhere."""
    layer = SAELENS_NAME.fullmatch(hook) or LAYER_PATH.fullmatch(hook)
    return f"blocks.{layer[1]}.hook_resid_post" if layer else None


def load_model(
    model: ModelConfig,
    commit: str | None,
    hooks: Sequence[str],
    compute_dtype: torch.dtype,
    device: torch.device,
    *,
    offline: bool = False,
    with_head: bool = False,
) -> HookedModel:
    """Load a model that computes in `compute_dtype`, bfloat16 or float32.

    Without the head, decoder layers after the last hook are never loaded. Raises UserError for what cannot be loaded
    or run, and for hooks that the model does not have.
    """
    skeleton = load_skeleton(model, commit, offline)
    points = find_hooks(skeleton, hooks)
    layers = max(point.layers for point in points.values())
    head = find_head(skeleton.model)
    for hook, point in points.items():
        if not with_head and skeleton.model.get_submodule(point.module) is head:
            raise UserError(
                f"harvest.hooks: {hook!r}: the head is not loaded; hooks are taken in decoder layers, as "
                f"{skeleton.layer_list}.0"
            )

    def cut(whole: Any) -> None:
        """Take away the decoder layers after the last hook, and the head unless its weights are the embedding's."""
        del whole.get_submodule(skeleton.layer_list)[layers:]
        head = find_head(whole)
        for name in [name for name, module in whole.named_modules() if module is head]:
            if f"{name}.weight" not in whole.all_tied_weights_keys:
                whole.set_submodule(name, nn.Identity())

    loaded = load_weights(skeleton, model, commit, offline, compute_dtype, None if with_head else cut)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        if device.type == "cpu":  # they are pages of the model's files, and would change with those
            tensor.data = tensor.data.clone()
    loaded = loaded.to(device).eval().requires_grad_(False)
    if widens(device, compute_dtype):
        loaded.forward = with_widened_products(loaded.forward)
    if with_head and (head := find_head(loaded)) is not None:
        # Generation passes a strided view, for which torch would copy the weights once a sequence.
        head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(), *inputs[1:]))
    modules = {hook: loaded.get_submodule(point.module) for hook, point in points.items()}
    hooked = HookedModel(loaded, modules, device, loaded.get_submodule(skeleton.layer_list))
    hooked.check(f"model.name: {model.name!r}")
    return hooked


def load_weights(
    skeleton: Skeleton,
    model: ModelConfig,
    commit: str | None,
    offline: bool,
    dtype: torch.dtype | str,
    cut: Callable[[Any], None] | None = None,
) -> Any:
    """The model with its weights, but for the modules that `cut` takes out of it before any is loaded.

    The configuration stays whole, so what depends on the number of layers (scales, which layers share keys) is as it is
    in the whole model. `dtype` "auto" is that of the files. A model without a cut reads its own settings of generation
    too. Raises UserError for weights that cannot be loaded, and for those that are missing.
    """
    kind: Any = type(skeleton.model)

    def init(self: Any, config: Any, *inputs: Any, **keywords: Any) -> None:
        kind.__init__(self, config, *inputs, **keywords)
        if cut:
            cut(self)
        kept = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        tied = self.all_tied_weights_keys.items()
        self.all_tied_weights_keys = {name: source for name, source in tied if {name, source} <= kept}

    can_generate = classmethod(lambda _kind: cut is None)
    own = {"__init__": init, "__module__": kind.__module__, "can_generate": can_generate}
    without: Any = type(kind.__name__, (kind,), own)
    try:
        with LOADING:
            loaded, about = without.from_pretrained(
                model.name,
                config=deepcopy(skeleton.model.config),
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **where_it_is(model, commit, offline),
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.name: {model.name!r}: its weights cannot be loaded: {first}") from None
    if missing := sorted(about["missing_keys"]):  # transformers would go on with random ones
        raise UserError(
            f"model.name: {model.name!r}: its weights cannot be loaded: {len(missing)} of {kind.__name__} are not in "
            f"its files ({missing[0]})"
        )
    return loaded


def find_head(model: nn.Module) -> nn.Module | None:
    """What makes logits of hidden states: GPT-NeoX calls it `embed_out`, which transformers does not know of."""
    causal: Any = model
    if (head := causal.get_output_embeddings()) is not None:
        return head
    rows = causal.get_input_embeddings().weight.shape[0]
    linear = [m for m in model.children() if isinstance(m, nn.Linear) and m.out_features == rows]
    return linear[-1] if linear else None
