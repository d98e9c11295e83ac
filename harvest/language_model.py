"""A causal language model of the hub or a folder: loaded no further than needed, read by plain forward hooks.

Hooks are named by module path as the causal model has it (`model.layers.19`), or as SAELens and
TransformerLens do (`blocks.19.hook_resid_post`, the output of decoder layer 19).

Shape suffixes: B sequences, S positions, D d_in.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.products import widens, with_widened_products

SAELENS_NAME = re.compile(r"blocks\.(\d+)\.hook_resid_post")
LAYER_PATH = re.compile(
    r"[A-Za-z_.]+\.(?:layers|h|blocks)\.(\d+)"
)  # a module path that ends in a decoder layer's number


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
        config = AutoConfig.from_pretrained(model.name, **_where(model, commit, offline))
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name: {model.name!r}: cannot be loaded: {str(error).splitlines()[0]}") from None
    layers = _layer_list(skeleton, config)
    if layers is None:
        raise UserError(f"model.name: {model.name!r}: {type(skeleton).__name__} has no list of decoder layers")
    return Skeleton(config, skeleton, layers)


def _layer_list(model: nn.Module, config: Any) -> str | None:
    """Path of the list of decoder layers."""
    layers = config.get_text_config().num_hidden_layers
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return min(lists, key=len, default=None)


def check_hooks(model: ModelConfig, commit: str | None, hooks: Sequence[str], offline: bool) -> None:
    """Raise UserError for a hook that the model does not have, from its configuration alone."""
    find_hooks(load_skeleton(model, commit, offline), hooks)


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
    layers = skeleton.config.get_text_config().num_hidden_layers
    saelens = SAELENS_NAME.fullmatch(hook)
    module = f"{skeleton.layer_list}.{saelens[1]}" if saelens else hook
    inside = re.match(re.escape(skeleton.layer_list) + r"\.(\d+)(\.|$)", module)
    if inside and int(inside[1]) >= layers:
        raise UserError(f"harvest.hooks: {hook!r}: the model has {layers} layers, 0 to {layers - 1}")
    names = [name for name, _ in skeleton.model.named_modules() if name]
    if module not in names or isinstance(skeleton.model.get_submodule(module), nn.ModuleList):
        close = difflib.get_close_matches(module, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"a layer is {skeleton.layer_list}.0"
        raise UserError(f"harvest.hooks: {hook!r}: no such module in {type(skeleton.model).__name__}; {hint}")
    return HookPoint(module, int(inside[1]) + 1 if inside else layers)


def saelens_hook(hook: str) -> str | None:
    """SAELens' name of a hook at the output of a decoder layer; None for a hook elsewhere."""
    layer = SAELENS_NAME.fullmatch(hook) or LAYER_PATH.fullmatch(hook)
    return f"blocks.{layer[1]}.hook_resid_post" if layer else None


class HookedModel:
    """A model whose activations can be read, and replaced, at named modules."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], device: torch.device) -> None:
        self.model, self.modules, self.device = model, modules, device
        self._in_tuples: dict[str, bool] = {}  # whether modules return tuples, as Falcon's and GPT-J's layers do

    def compile_layers(self, batch_BS: Tensor) -> None:
        """Compile the decoder layers, but those with a hook inside, for token ids of this shape.

        Compiled kernels are chosen by rule, never by timing: they are the same in every process. Raises UserError
        when this machine cannot compile; the layers are then as before.
        """
        path = _layer_list(self.model, self.model.config)
        layers: Any = self.model.get_submodule(path) if path else ()
        hooked = set(self.modules.values())
        layers = [layer for layer in layers if hooked.isdisjoint(m for m in layer.modules() if m is not layer)]
        self.activations(batch_BS)  # what fails without compiling is not told as a fault of it
        try:
            for layer in layers:  # of the layer's own forward: hooks on the layer run outside
                layer.forward = torch.compile(layer.forward, dynamic=False, options={"deterministic": True})
            self.activations(batch_BS)
        except RuntimeError as error:  # torch._dynamo's and inductor's errors are RuntimeErrors
            if isinstance(error, torch.OutOfMemoryError):
                raise
            for layer in layers:
                vars(layer).pop("forward", None)
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"harvest.compile: true: torch.compile fails here ({first}); install a C compiler, or set it to false"
            ) from None

    @torch.inference_mode()
    def activations(self, tokens_BS: Tensor) -> dict[str, Tensor]:
        """Activations (B, S, d_in) at every hook, in the precision of the forward pass."""
        return self.read(tokens_BS)[0]

    @torch.inference_mode()
    def read(self, tokens_BS: Tensor) -> tuple[dict[str, Tensor], Any]:
        """The activations (B, S, d_in) at every hook, and the model's own output."""
        out: dict[str, Tensor] = {}

        def reader(name: str) -> Callable[..., None]:
            def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
                self._in_tuples[name] = isinstance(output, tuple)
                out[name] = first_tensor(output)

            return read

        handles = [module.register_forward_hook(reader(name)) for name, module in self.modules.items()]
        try:
            output = self.model(tokens_BS.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return out, output

    @contextmanager
    def replaced(self, hook: str, value_BSD: Tensor) -> Iterator[None]:
        """Within this, the activation at a hook is `value_BSD`, whatever the model reads. `read` comes first.

        Where the hook is the output of a decoder layer, this layer and those before it are not computed: nothing
        of theirs is used.
        """
        module = self.modules[hook]
        layers = next((m for m in self.model.modules() if isinstance(m, nn.ModuleList) and module in list(m)), None)
        skipped = list(layers)[: list(layers).index(module) + 1] if layers is not None else []

        def splice(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return _with_first_tensor(output, value_BSD.to(first_tensor(output).dtype))

        handle = module.register_forward_hook(splice)
        for layer in skipped:
            layer.forward = _same_hidden_states_in_a_tuple if self._in_tuples.get(hook) else _same_hidden_states
        try:
            yield
        finally:
            handle.remove()
            for layer in skipped:
                del layer.forward

    @contextmanager
    def added(self, hook: str, value_BD: Tensor) -> Iterator[None]:
        """Within this, row b of `value_BD` is added to the activation at a hook at every position of sequence b.

        It holds for each forward pass, so with a KV cache for the prompt and for every generated token.
        """

        def add(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            acts_BSD = first_tensor(output)
            return _with_first_tensor(output, acts_BSD + value_BD.unsqueeze(1).to(acts_BSD))

        handle = self.modules[hook].register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def _same_hidden_states_in_a_tuple(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor]:
    return (hidden_states,)


def _same_hidden_states(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden_states


def first_tensor(output: Any) -> Tensor:
    """The hidden states (B, S, d_in) of a module's output; some architectures return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _with_first_tensor(output: Any, new: Tensor) -> Any:
    return (new, *output[1:]) if isinstance(output, tuple) else new


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
    """Load weights as bfloat16 and compute in `compute_dtype`, bfloat16 or float32.

    Without the head, decoder layers after the last hook are never loaded. Raises UserError for what
    cannot be loaded and for hooks that the model does not have.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    skeleton = load_skeleton(model, commit, offline)
    points = find_hooks(skeleton, hooks)
    config = skeleton.config
    if not with_head:
        slice_layers(config.get_text_config(), max(point.layers for point in points.values()))
    loader = AutoModelForCausalLM if with_head else AutoModel
    try:
        loaded: Any = loader.from_pretrained(
            model.name,
            config=config,
            dtype=torch.bfloat16,
            use_safetensors=True,
            **_where(model, commit, offline),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.name: {model.name!r}: its weights cannot be loaded: {first}") from None
    loaded = _apart_from_files(loaded.to(device)).eval().requires_grad_(False)
    if compute_dtype == torch.float32:
        loaded = loaded.float()  # never the other way: bfloat16 would round the rotary frequencies, which stay float32
    elif widens(device, compute_dtype):
        loaded.forward = with_widened_products(loaded.forward)
    head = loaded.get_output_embeddings() if with_head else None
    if head is not None:  # generation passes a strided view, for which torch would copy the weights once a sequence
        head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(), *inputs[1:]))
    prefix = "" if with_head else f"{skeleton.model.base_model_prefix}."
    try:
        modules = {hook: loaded.get_submodule(point.module.removeprefix(prefix)) for hook, point in points.items()}
    except AttributeError as error:
        raise UserError(
            f"harvest.hooks: {', '.join(hooks)}: {error}; hooks are taken in decoder layers, as {skeleton.layer_list}.0"
        ) from None
    return HookedModel(loaded, modules, device)


def _apart_from_files(model: Any) -> Any:
    """The model with weights of its own: on a CPU they are pages of its files, and change with those."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def _where(model: ModelConfig, commit: str | None, offline: bool) -> dict[str, Any]:
    local = Path(model.name).is_dir()
    return {"revision": commit, "local_files_only": offline or local, "trust_remote_code": False}


def slice_layers(config: Any, layers: int) -> None:
    """Make a configuration of the first decoder layers; per-layer lists are cut alike."""
    total = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total and layers < total:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
