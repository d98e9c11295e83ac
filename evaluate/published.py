"""SAEs of others, read so that they can be measured beside ours: a SAELens folder, or a .pt of two Linear layers.

Each becomes a `SavedSae` for rows as the model gives them (scale 1), with our limit for outlier rows, so that the
same rows are counted. A field of cfg.json that changes the mathematics is applied or refused by name, never
passed over. Weights are read as tensors alone: a pickle that would run code is refused.
"""

import pickle
import struct
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from evaluate.config import PublishedSae
from harvest.activation_store import ActivationStore
from harvest.files import UserError, read_json
from harvest.language_model import saelens_hook
from harvest.sources import hub_errors
from train.checkpoint import SavedSae
from train.exclusion import InputStatistics
from train.sae import SAE, jumprelu, topk

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def load_published(
    published: PublishedSae,
    commit: str | None,
    store: ActivationStore,
    statistics: dict[str, InputStatistics],
    offline: bool,
) -> SavedSae:
    """An SAE of others, float32, at one of the store's hooks; `statistics` are those of our SAEs by hook.

    Raises UserError for files that are missing, damaged or hold code, an architecture or a setting that is not
    supported, and a width or hook that the store does not have.
    """
    paths = _files(published, commit, offline)
    where = f"evaluate.also ({published.name})"
    if published.format == "linear":
        hook = _store_hook(where, published.hook or "", store)
        sae = _linear(paths[0])
        _check_width(paths[0], sae.d_in, store)
        about: dict[str, Any] = {"architecture": "standard"}
        return SavedSae(sae, hook, statistics[hook]._replace(scale=1.0), about)
    config = _Config(paths[0])
    hook = _store_hook(where, _named_hook(where, published.hook, config), store)
    _check_width(paths[0], config.d_in, store)
    sae = config.sae(_tensors(paths[1], config))
    # The weights then speak of rows scaled by the mean norm; SAELens takes it from the store at hand as well.
    scale = statistics[hook].scale if config.scaled_rows else 1.0
    about = {"architecture": config.architecture, "scale_of_our_rows": config.scaled_rows, "cfg": config.named()}
    return SavedSae(sae, hook, statistics[hook]._replace(scale=scale), about)


class _Config:
    """cfg.json of SAELens, forms 5 and 6: what decides the mathematics."""

    def __init__(self, path: Path) -> None:
        raw = read_json(path)
        metadata = raw.get("metadata")
        old_names = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
        flat = {**raw, **(metadata if isinstance(metadata, dict) else {})}
        self.path = path
        self.fields: dict[str, Any] = {str(old_names.get(name, name)): value for name, value in flat.items()}
        self.d_in, self.d_sae = self._count("d_in"), self._count("d_sae")
        activation = self.get("activation_fn", None) or self.get("activation_fn_str", "relu")
        self.architecture = "topk" if activation == "topk" else self.get("architecture", "standard")
        self._allow("architecture", self.architecture, ("standard", "jumprelu", "topk"))
        self._allow("activation_fn", activation, ("relu", "topk"))
        normalize = self.get("normalize_activations", "none")
        if isinstance(normalize, bool):
            normalize = "expected_average_only_in" if normalize else "none"
        self._allow("normalize_activations", normalize, ("none", "expected_average_only_in"))
        self.scaled_rows = normalize == "expected_average_only_in"
        at_z = "hook_z" if "hook_z" in str(self.get("hook_name", "")) else "none"
        self._allow("reshape_activations", self.get("reshape_activations", at_z), ("none",))
        self._allow("hook_head_index", self.get("hook_head_index", None), (None,))
        self._allow("rescale_acts_by_decoder_norm", self.get("rescale_acts_by_decoder_norm", False), (False,))
        self.b_dec_from_input = self.get("apply_b_dec_to_input", True)
        self._allow("apply_b_dec_to_input", self.b_dec_from_input, (True, False))
        self.k = 0
        if self.architecture == "topk":
            kwargs = self.get("activation_fn_kwargs", {})
            self.fields["k"] = self.fields.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)
            self.k = self._count("k")
            if self.k > self.d_sae:
                raise UserError(f"{path}: k: {self.k}: more than d_sae = {self.d_sae}")

    def get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def named(self) -> dict[str, Any]:
        """What a report says of it."""
        names = ("model_name", "hook_name", "dataset_path", "context_size", "normalize_activations", "dtype")
        return {name: self.fields[name] for name in names if isinstance(self.fields.get(name), str | int)}

    def sae(self, tensors: dict[str, Tensor]) -> SAE:
        """The SAE for rows as they come; b_dec, where it is subtracted from the input, goes into b_enc."""
        W_enc, b_enc, W_dec, b_dec = (tensors[name] for name in WEIGHTS)
        if self.b_dec_from_input:
            b_enc = (b_enc.double() - b_dec.double() @ W_enc.double()).float()
        sae = SAE(W_enc, b_enc, W_dec, b_dec)
        if self.architecture == "jumprelu":
            return jumprelu(sae, tensors["threshold"])
        return topk(sae, self.k) if self.architecture == "topk" else sae

    def shapes(self) -> dict[str, tuple[int, ...]]:
        d, f = self.d_in, self.d_sae
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}
        return shapes | ({"threshold": (f,)} if self.architecture == "jumprelu" else {})

    def _count(self, name: str) -> int:
        value = self.fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.path}: {name}: {value!r}: a whole number above 0 expected")
        return value

    def _allow(self, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
        if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
            known = ", ".join(str(a) for a in allowed)
            raise UserError(f"{self.path}: {name}: {value!r} is not supported; known here: {known}")


def _files(published: PublishedSae, commit: str | None, offline: bool) -> list[Path]:
    """Local paths of its files, fetched from the hub where there is a commit."""
    if commit is None:
        return [Path(published.path, name) for name in published.files()]
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

    where = f"evaluate.also ({published.name}).path: {published.path!r}"
    try:
        return [
            Path(hf_hub_download(published.path, name, revision=commit, local_files_only=offline))
            for name in published.files()
        ]
    except GatedRepoError:
        raise UserError(
            f"{where}: gated: accept its terms at https://huggingface.co/{published.path}, then `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise UserError(f"{where}: the hub cannot be reached and its cache lacks {published.files()}") from None
    except EntryNotFoundError:
        raise UserError(f"{where}: holds no {' and '.join(published.files())}; set file to the place in it") from None
    except hub_errors() as error:
        raise UserError(f"{where}: cannot be fetched ({type(error).__name__}: {str(error)[:200]})") from None


def _named_hook(where: str, wanted: str | None, config: _Config) -> str:
    named = config.get("hf_hook_name", None) or config.get("hook_name", None)
    if not isinstance(named, str):
        if wanted is None:
            raise UserError(f"{config.path}: names no hook; set hook of {where}")
        return wanted
    if wanted is not None and _canonical(wanted) != _canonical(named):
        raise UserError(f"{where}.hook: {wanted!r}: {config.path} says {named!r}")
    return named


def _canonical(hook: str) -> str:
    """One name for the residual stream after a layer, whoever names it."""
    before = hook.removesuffix(".hook_resid_pre").removeprefix("blocks.")
    if before.isdigit() and int(before) > 0 and hook == f"blocks.{before}.hook_resid_pre":
        return f"blocks.{int(before) - 1}.hook_resid_post"
    return saelens_hook(hook) or hook


def _store_hook(where: str, named: str, store: ActivationStore) -> str:
    for hook in store.geometry.hooks:
        if _canonical(hook) == _canonical(named):
            return hook
    raise UserError(
        f"{where}: belongs to {named!r}; the store {store.path} has {', '.join(store.geometry.hooks)}; "
        "harvest its hook (harvest.hooks) to measure it"
    )


def _check_width(path: Path, d_in: int, store: ActivationStore) -> None:
    if d_in != store.geometry.d_in:
        raise UserError(f"{path}: an SAE of d_in {d_in}; the store {store.path} has {store.geometry.d_in}")


def _tensors(path: Path, config: _Config) -> dict[str, Tensor]:
    """The tensors that cfg.json announces, float32; shapes are checked before a byte of them is read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = set(file.keys())
            for name, shape in config.shapes().items():
                if name not in found:
                    raise UserError(f"{path}: holds no {name}; found: {', '.join(map(repr, sorted(found)))[:200]}")
                has = tuple(file.get_slice(name).get_shape())
                if has != shape:
                    raise UserError(f"{path}: {name} is {has}; cfg.json says {shape}")
            tensors = {name: file.get_tensor(name).float().contiguous() for name in config.shapes()}
            scaling = file.get_tensor("scaling_factor") if "scaling_factor" in found else torch.ones(1)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, or no safetensors file ({error})") from None
    if not (scaling == 1).all():
        raise UserError(f"{path}: scaling_factor (finetuning_scaling_factor) is not supported")
    _finite(path, tensors)
    return tensors


def _linear(path: Path) -> SAE:
    """encoder.weight (F, D), encoder.bias (F,), decoder.weight (D, F), decoder.bias (D,)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: damaged, or a pickle that holds more than tensors; it was not run") from None
    except (  # what the unpickler lets through on mutated files
        *(OSError, RuntimeError, EOFError, ValueError, LookupError),
        *(AssertionError, TypeError, AttributeError, struct.error),
    ) as error:
        raise UserError(f"{path}: damaged, or no file of torch.save ({str(error)[:200]!r})") from None
    if not isinstance(state, dict) or not all(isinstance(state.get(name), Tensor) for name in LINEAR):
        found = ", ".join(map(repr, state))[:200] if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: holds {found}; expected {', '.join(LINEAR)}")
    encoder, b_enc, decoder, b_dec = (state[name].float() for name in LINEAR)
    shapes = [tuple(t.shape) for t in (encoder, b_enc, decoder, b_dec)]
    d_sae, d_in = (*b_enc.shape, 0)[0], (*b_dec.shape, 0)[0]
    if shapes != [(d_sae, d_in), (d_sae,), (d_in, d_sae), (d_in,)]:
        raise UserError(f"{path}: {', '.join(LINEAR)} are {shapes}, which do not fit each other")
    sae = SAE(encoder.t().contiguous(), b_enc, decoder.t().contiguous(), b_dec)
    _finite(path, sae._asdict())
    return sae


def _finite(path: Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds a NaN or an infinity")
