"""SAEs in the formats of others: SAELens' folders, both ways, and a .pt of two Linear layers, read.

SAELens' SAEs read rows as the model gives them, so the input scale s is folded into what is written:

    W_enc·s, b_enc, W_dec/s, b_dec/s        f(x) = activations(s x W_enc + b_enc),  x̂ = (f W_dec + b_dec) / s

Two fields of cfg.json matter in silence: `apply_b_dec_to_input` is true where it is absent, which would subtract b_dec
from the input, and metadata is dropped unless `metadata.sae_lens_version` is 6 or later. A field that changes the
mathematics is applied or refused by name, never passed over. Weights are read as tensors alone: a pickle that would
run code is refused.
"""

import pickle
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from harvest.files import UserError, read_json, replacing, write_json
from harvest.language_model import saelens_hook
from train.kinds import saelens_classes
from train.sae import Sae
from train.start_files import WEIGHTS

CONFIG = "cfg.json"
SAELENS_VERSION = "6.0.0"  # the form of cfg.json
SCALING = ("scaling_factor", "finetuning_scaling_factor")  # of each feature, in forms that are no longer written
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def folded(sae: Sae) -> Sae:
    """The same SAE with weights for rows as the model gives them: scale 1."""
    s, weights = sae.scale, sae.parameters
    scaled = {"W_enc": weights["W_enc"] * s, "W_dec": weights["W_dec"] / s, "b_dec": weights["b_dec"] / s}
    return replace(sae, parameters=weights | scaled, scale=1.0)


def write_saelens_folder(folder: Path, sae: Sae, metadata: dict[str, Any]) -> None:
    """Write sae_weights.safetensors and cfg.json of one SAE into a new folder; `metadata` names model, hook and data.

    Raises UserError where SAELens has no SAE with the same f.
    """
    sae = sae.exported()
    if sae.saelens is None:
        raise UserError(f"an SAE of kind {sae.kind} cannot be exported: SAELens has none with the same activations")
    config = {
        "architecture": sae.saelens,
        **sae.settings(),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, **metadata},
    }
    folder.mkdir(parents=True)
    weights = {name: weight.contiguous().cpu() for name, weight in folded(sae).published().items()}
    with replacing(folder / WEIGHTS) as partial:
        safetensors.torch.save_file(weights, partial)
    write_json(folder / CONFIG, config)


class SaelensConfig:
    """cfg.json of SAELens, forms 5 and 6: what decides the mathematics.

    `raw` is its content where it is no file, `path` is then what messages call it. Raises UserError for what is not
    supported, by name.
    """

    def __init__(self, path: Path, raw: dict[str, Any] | None = None) -> None:
        raw = read_json(path) if raw is None else raw
        metadata = raw.get("metadata")
        old_names = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
        flat = {**raw, **(metadata if isinstance(metadata, dict) else {})}
        self.path = path
        self.fields: dict[str, Any] = {str(old_names.get(name, name)): value for name, value in flat.items()}
        self.d_in, self.d_sae = self._count("d_in"), self._count("d_sae")
        activation = self.get("activation_fn", None) or self.get("activation_fn_str", "relu")
        self._allow("activation_fn", activation, ("relu", "topk"))
        self.architecture = "topk" if activation == "topk" else self.get("architecture", "standard")
        classes = saelens_classes()
        self._allow("architecture", self.architecture, tuple(classes))
        self.of_kind = classes[self.architecture]
        normalize = self.get("normalize_activations", "none")
        if isinstance(normalize, bool):
            normalize = "expected_average_only_in" if normalize else "none"
        self._allow("normalize_activations", normalize, ("none", "expected_average_only_in"))
        self.scaled_rows = normalize == "expected_average_only_in"
        at_z = "hook_z" if "hook_z" in str(self.get("hook_name", "")) else "none"
        self._allow("reshape_activations", self.get("reshape_activations", at_z), ("none",))
        self._allow("hook_head_index", self.get("hook_head_index", None), (None,))
        self.by_decoder_norm = self.get("rescale_acts_by_decoder_norm", False)
        known = (True, False) if self.architecture == "topk" else (False,)
        self._allow("rescale_acts_by_decoder_norm", self.by_decoder_norm, known)
        self.b_dec_from_input = self.get("apply_b_dec_to_input", True)
        self._allow("apply_b_dec_to_input", self.b_dec_from_input, (True, False))
        old = self.get("activation_fn_kwargs", {})  # where form 5 has k
        self.fields = (old if isinstance(old, dict) else {}) | self.fields
        self.rule = {name: self._count(name) for name in self.of_kind.rule}
        if above := [name for name, value in self.rule.items() if value > self.d_sae]:
            raise UserError(f"{path}: {above[0]}: {self.rule[above[0]]}: more than d_sae = {self.d_sae}")

    def get(self, name: str, default: Any) -> Any:
        """A field; the default where it is absent or null."""
        value = self.fields.get(name)
        return default if value is None else value

    @property
    def hook(self) -> str | None:
        """Where it belongs, as it says itself."""
        named = self.get("hf_hook_name", None) or self.get("hook_name", None)
        return named if isinstance(named, str) else None

    def named(self) -> dict[str, Any]:
        """What a report says of it."""
        names = (
            "model_name",
            "hook_name",
            "dataset_path",
            "context_size",
            "prepend_bos",
            "normalize_activations",
            "dtype",
        )
        return {name: self.fields[name] for name in names if isinstance(self.fields.get(name), str | int)}

    def read_sae(self, path: Path, scale: float) -> Sae:
        """The SAE whose weights are in a file, float32; b_dec, where it is subtracted from the input, is in b_enc.

        Shapes are checked before a byte is read. Raises UserError for a file that is damaged or does not fit.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                self._check_shapes(path, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
                tensors = {name: file.get_tensor(name) for name in self._names(file.keys())}
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from None
        return self.sae(path, tensors, scale)

    def sae(self, path: Path, tensors: Mapping[str, Tensor], scale: float) -> Sae:
        """The same of tensors in memory, of any float type and shapes as in cfg.json; `path` is for messages.

        Raises UserError for tensors that do not fit, or hold a NaN.
        """
        self._check_shapes(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        weights = {name: tensors[name].float().contiguous() for name in self._names(tensors)}
        for name in SCALING:
            if name in weights and not (weights.pop(name) == 1).all():
                raise UserError(f"{path}: {name} (finetuning_scaling_factor) is not supported")
        check_finite(path, weights)
        if self.b_dec_from_input:
            moved = weights["b_dec"].double() @ weights["W_enc"].double()
            weights["b_enc"] = (weights["b_enc"].double() - moved).float()
        sae = self.of_kind.from_published(weights, scale, **self.rule)
        return replace(sae, by_decoder_norm=True).finished() if self.by_decoder_norm else sae

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        names = self.of_kind.published_names
        return {names.get(n, n): shape for n, shape in self.of_kind.shapes(self.d_in, self.d_sae).items()}

    def _names(self, there: Iterable[str]) -> list[str]:
        found = set(there)
        return [*self._shapes(), *(name for name in SCALING if name in found)]

    def _check_shapes(self, path: Path, found: dict[str, tuple[int, ...]]) -> None:
        for name, shape in self._shapes().items():
            if name not in found:
                raise UserError(f"{path}: holds no {name}; found: {', '.join(map(repr, sorted(found)))[:200]}")
            if found[name] != shape:
                raise UserError(f"{path}: {name} is {found[name]}; cfg.json says {shape}")

    def _count(self, name: str) -> int:
        value = self.fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.path}: {name}: {value!r}: a whole number above 0 expected")
        return value

    def _allow(self, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
        if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
            known = ", ".join(str(a) for a in allowed)
            raise UserError(f"{self.path}: {name}: {value!r} is not supported; known here: {known}")


def canonical_hook(hook: str) -> str:
    """One name for the residual stream after a layer, whoever names it."""
    before = hook.removesuffix(".hook_resid_pre").removeprefix("blocks.")
    if before.isdigit() and int(before) > 0 and hook == f"blocks.{before}.hook_resid_pre":
        return f"blocks.{int(before) - 1}.hook_resid_post"
    module = hook.removesuffix(".output")  # as Gemma Scope 2 names it
    return saelens_hook(module) or module


def read_linear(path: Path) -> Sae:
    """A .pt of encoder.weight (F, D), encoder.bias (F,), decoder.weight (D, F), decoder.bias (D,), ReLU between.

    Raises UserError for a file that is damaged, holds code or does not fit.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: damaged, or a pickle that holds more than tensors; it was not run") from None
    except (  # what the unpickler lets through on mutated files
        *(OSError, RuntimeError, EOFError, ValueError, LookupError),
        *(AssertionError, TypeError, AttributeError, struct.error),
    ) as error:
        raise UserError(f"{path}: damaged, or not a file of torch.save ({str(error)[:200]!r})") from None
    if not isinstance(state, dict) or not all(isinstance(state.get(name), Tensor) for name in LINEAR):
        found = ", ".join(map(repr, state))[:200] if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: holds {found}; expected {', '.join(LINEAR)}")
    encoder, b_enc, decoder, b_dec = (state[name].float() for name in LINEAR)
    shapes = [tuple(t.shape) for t in (encoder, b_enc, decoder, b_dec)]
    d_sae, d_in = (*b_enc.shape, 0)[0], (*b_dec.shape, 0)[0]
    if shapes != [(d_sae, d_in), (d_sae,), (d_in, d_sae), (d_in,)]:
        raise UserError(f"{path}: {', '.join(LINEAR)} are {shapes}, which do not fit each other")
    tensors = {"W_enc": encoder.t().contiguous(), "b_enc": b_enc, "W_dec": decoder.t().contiguous(), "b_dec": b_dec}
    check_finite(path, tensors)
    return saelens_classes()["standard"](tensors)


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for tensors, of any shape, that hold a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds a NaN or an infinity")
