"""A language model whose activations are read, replaced and changed at named modules, by plain forward hooks.

What is read is what a module returned at that time, though the model may change it in place later. A pass that is
only read ends at the last hook. Where something is replaced, decoder layers are left out only if nothing of
theirs but the hidden states is used further on.

Shape suffixes: B sequences, S positions, D d_in, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from harvest.files import UserError, is_out_of_memory

PROBE_POSITIONS = 6  # of each of the two made texts


class Behind(NamedTuple):
    """What the part of a model behind a hook reads."""

    hidden_states_alone: bool = False  # of the layers up to the hook; so they need not run where it is replaced
    no_text: bool = False  # of the text either: no token ids, no embeddings


class _AllReadError(Exception):
    """Ends a forward pass that nobody needs the rest of."""


class HookedModel:
    """A model whose activations can be read, and replaced, at named modules; `layers` are its decoder layers."""

    def __init__(
        self, model: nn.Module, modules: dict[str, nn.Module], device: torch.device, layers: Sequence[nn.Module] = ()
    ) -> None:
        self.model, self.modules, self.device, self.layers = model, modules, device, list(layers)
        self._behind: dict[str, Behind] = {}
        self._passing: dict[nn.Module, Callable[..., Any]] = {}  # in the place of a layer that need not run

    def compile_layers(self, batch_BS: Tensor) -> None:
        """Compile the decoder layers, but those with a hook inside, for token ids of this shape.

        Compiled kernels are chosen by rule, never by timing: they are the same in every process. Raises UserError
        when this machine cannot compile; the layers are then as before.
        """
        hooked = set(self.modules.values())
        layers: list[Any] = [m for m in self.layers if hooked.isdisjoint(n for n in m.modules() if n is not m)]
        self.activations(batch_BS)  # what fails without compiling is not told as a fault of it
        try:
            for layer in layers:  # of the layer's own forward: hooks on the layer run outside
                layer.forward = torch.compile(layer.forward, dynamic=False, options={"deterministic": True})
            self.activations(batch_BS)
        except RuntimeError as error:  # torch._dynamo's and inductor's errors are RuntimeErrors
            if is_out_of_memory(error):
                raise
            for layer in layers:
                vars(layer).pop("forward", None)
            raise UserError(
                f"harvest.compile: true: torch.compile fails here ({_first_line(error)}); install a C compiler, or set "
                "it to false"
            ) from None

    def activations(self, tokens_BS: Tensor) -> dict[str, Tensor]:
        """Activations (B, S, d_in) at every hook, in the precision of the forward pass, which ends at the last."""
        return self._read(tokens_BS, to_the_end=not self.modules)[0]

    def read(self, tokens_BS: Tensor) -> tuple[dict[str, Tensor], Any]:
        """The activations (B, S, d_in) at every hook, and the model's own output."""
        return self._read(tokens_BS, to_the_end=True)

    @torch.inference_mode()
    def _read(self, tokens_BS: Tensor, *, to_the_end: bool) -> tuple[dict[str, Tensor], Any]:
        found: dict[str, Tensor] = {}

        def keep(name: str, output: Any) -> None:
            found[name] = first_tensor(output)
            if not to_the_end and len(found) == len(self.modules):
                raise _AllReadError
            found[name] = found[name].clone()  # Falcon adds the attention to its MLP's output in place

        output = None
        with self._each_hook(keep), suppress(_AllReadError):
            output = self._run(tokens_BS)
        return found, output

    @contextmanager
    def _each_hook(self, see: Callable[[str, Any], None]) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self.modules.items():
                hooks.enter_context(hooked(module, lambda _module, _inputs, output, name=name: see(name, output)))
            yield

    def _run(self, tokens_BS: Tensor) -> Any:
        return self.model(tokens_BS.to(self.device), use_cache=False)

    @torch.inference_mode()
    def check(self, setting: str) -> None:
        """Read two short made texts.

        Raises UserError when the model cannot be run on token ids alone, and for a hook that is reached never, or more
        than once: it has no one activation. `setting` names the model.
        """
        kind = type(self.model).__name__
        seen: dict[str, list[Any]] = {name: [] for name in self.modules}
        try:
            with self._each_hook(lambda name, output: seen[name].append(output)):
                self._run(self._made_texts())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if not all(seen.values()):  # else it fails behind the hooks only, where layers may have been cut off
                message = f"{setting}: {kind} cannot be run on token ids alone: {_first_line(error)}"
                raise UserError(message) from None
        for name, outputs in seen.items():
            if len(outputs) != 1:
                times = f"runs {len(outputs)} times" if outputs else "does not run"
                raise UserError(f"harvest.hooks: {name!r}: {times} in one pass of {kind}; hook a layer that runs once")
            if not isinstance(first_tensor(outputs[0]), Tensor):
                raise UserError(f"harvest.hooks: {name!r}: gives no tensor in {kind}; hook a layer")

    def _made_texts(self) -> Tensor:
        """Two texts that differ at every position."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        ids_2S = torch.arange(2 * PROBE_POSITIONS).view(2, PROBE_POSITIONS) + 1
        return ids_2S % getattr(embedding, "num_embeddings", 2 * PROBE_POSITIONS + 1)

    @contextmanager
    def replaced(self, hook: str, value_BSD: Tensor) -> Iterator[None]:
        """Within this, the activation at a hook is `value_BSD`, whatever the model reads.

        Where the hook is the output of a decoder layer, and nothing else of the layers up to there is used behind it,
        they are not computed.
        """
        with self._replaced(hook, value_BSD, skip=self.behind(hook).hidden_states_alone):
            yield

    @contextmanager
    def _replaced(self, hook: str, value_BSD: Tensor, skip: bool) -> Iterator[None]:
        module = self.modules[hook]
        skipped: list[Any] = self.layers[: self.layers.index(module) + 1] if skip else []

        def splice(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            new_BSD = torch.empty_like(first_tensor(output)).copy_(value_BSD)  # its own: it may be changed in place
            return _with_first_tensor(output, new_BSD)

        compiled = {layer: vars(layer).get("forward") for layer in skipped}
        with hooked(module, splice):
            try:
                for layer in skipped:
                    layer.forward = self._passing[layer]
                yield
            finally:
                for layer, forward in compiled.items():
                    vars(layer).pop("forward", None)
                    if forward:
                        layer.forward = forward

    @torch.inference_mode()
    def behind(self, hook: str) -> Behind:
        """What is read behind a hook: nothing is known of one that is not the output of a decoder layer.

        What layers hand each other shows in their arguments, at any length of text. That nothing goes another way is
        tried with two made texts, with the layers left out and not.
        """
        if hook not in self._behind:
            in_layers = self.modules[hook] in self.layers
            self._behind[hook] = self._look_behind(hook) if in_layers else Behind()
        return self._behind[hook]

    def _look_behind(self, hook: str) -> Behind:
        count = self.layers.index(self.modules[hook]) + 1
        ids_2S = self._made_texts()
        exchanged_2SD = self.read(ids_2S)[0][hook].flip(0)
        whole = self._traced(ids_2S, hook, exchanged_2SD, skip=False)
        rest = (leaf for output in whole.outputs[:count] for leaf in pytree.tree_leaves(output)[1:])
        if any(leaf is not None for leaf in rest) or not _is_plain(whole.arguments):
            return Behind()
        for layer, output in zip(self.layers[:count], whole.outputs, strict=False):
            self._passing[layer] = _passing_on(output)
        try:
            short = self._traced(ids_2S, hook, exchanged_2SD, skip=True)
            zeros, other = (
                self._traced(ids, hook, torch.zeros_like(exchanged_2SD), skip=True) for ids in (ids_2S, ids_2S.flip(0))
            )
        except (TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return Behind()  # a layer that takes its arguments otherwise, or a model that looks at one that did not run
        if not torch.equal(short.logits_2SV, whole.logits_2SV):
            return Behind()
        given = (pytree.tree_leaves((trace.logits_2SV, trace.arguments[count:])) for trace in (zeros, other))
        return Behind(True, all(torch.equal(a, b) for a, b in zip(*given, strict=True) if isinstance(a, Tensor)))

    def _traced(self, ids_2S: Tensor, hook: str, value_2SD: Tensor, skip: bool) -> "_Trace":
        """A pass with something replaced, and what the layers are given and return in it."""
        arguments: list[Any] = []
        outputs: list[Any] = []

        def given(_module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
            others = {name: value for name, value in keywords.items() if inputs or name != "hidden_states"}
            arguments.append((inputs[1:], *others.values()))

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(given, with_kwargs=True).remove)
                stack.enter_context(hooked(layer, lambda _module, _inputs, output: outputs.append(output)))
            stack.enter_context(self._replaced(hook, value_2SD, skip))
            return _Trace(self._run(ids_2S).logits, tuple(arguments), tuple(outputs))

    @contextmanager
    def changed(self, hook: str, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Within this, the activation (B, S, D) at a hook is `change(activation, token ids (B, S))`.

        It holds for each forward pass, so with a KV cache for the prompt and for every generated token.
        """
        ids_BS = torch.empty(0, 0, dtype=torch.long)

        def read(_module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
            nonlocal ids_BS
            ids_BS = inputs[0] if inputs else keywords["input_ids"]

        def put(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return _with_first_tensor(output, change(first_tensor(output), ids_BS))

        reading = self.model.register_forward_pre_hook(read, with_kwargs=True)
        try:
            with hooked(self.modules[hook], put):
                yield
        finally:
            reading.remove()


class _Trace(NamedTuple):
    logits_2SV: Tensor
    arguments: tuple[Any, ...]  # of each layer in the order of the pass, but for the hidden states
    outputs: tuple[Any, ...]


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook for a while."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def first_tensor(output: Any) -> Any:
    """The hidden states (B, S, d_in) of a module's output; some architectures return a tuple, or fields with names.

    Whatever a module returns that is no tensor comes back as it is.
    """
    if isinstance(output, dict):  # as transformers' ModelOutput is
        return next(iter(output.values()), output)
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _with_first_tensor(output: Any, new: Tensor) -> Any:
    """The output with other hidden states, and all else as the module returned it."""
    if isinstance(output, dict):
        return type(output)(**{**output, next(iter(output)): new})
    if isinstance(output, (tuple, list)):
        rest = [new, *output[1:]]
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    return new


def _passing_on(like: Any) -> Callable[..., Any]:
    return lambda hidden_states, *_args, **_kwargs: _with_first_tensor(like, hidden_states)


def _is_plain(value: Any) -> bool:
    """Whether nothing can be left in it for a later layer, as in a cache or a dict that all layers share."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor, torch.dtype))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
