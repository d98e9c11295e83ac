"""Which next tokens a direction at a hook promotes: through the final norm and the LM head, nothing between.

Only these two weights are read from the model's files (57 of 269 MB of SmolLM2-135M). The layers between the hook
and the end are left out, as in the logit lens; the later the hook, the truer it is.

Shape suffixes: K directions, D d_in, V vocabulary, N tokens found.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from harvest.config import ModelConfig
from harvest.files import UserError, read_json
from harvest.language_model import load_skeleton

AT_ONCE = 64  # directions; their logits are AT_ONCE × V float32
VOCABULARY_AT_ONCE = 16_384


class Unembedding(NamedTuple):
    """What the end of a model does to a direction."""

    gain_D: Tensor  # of the final norm, float32
    centred: bool  # LayerNorm takes the mean off, RMSNorm does not
    head_VD: Tensor  # as stored


class Tokens(NamedTuple):
    """Tokens and their logits less the mean over the vocabulary, the first the most extreme."""

    token_KN: Tensor
    logit_KN: Tensor


def load_unembedding(model: ModelConfig, commit: str | None, offline: bool) -> Unembedding:
    """The final norm's gain and the LM head.

    Raises UserError where the model's parts are not found or not read.
    """
    skeleton = load_skeleton(model, commit, offline)
    tree: Any = skeleton.model
    parent = skeleton.layer_list.rpartition(".")[0]
    norms = [
        name
        for name, module in tree.named_modules()
        if "norm" in type(module).__name__.lower()
        and name.startswith(parent)
        and not name.startswith(f"{skeleton.layer_list}.")
    ]
    head: Any = tree.get_output_embeddings()
    if not norms or not isinstance(head, nn.Linear):
        raise UserError(f"no final norm and LM head were found in {type(tree).__name__}")
    norm = tree.get_submodule(norms[-1])
    names = {name: f"{norms[-1]}.{name}" for name in norm.state_dict()}
    head_names = [f"{name}.weight" for name, module in tree.named_modules(remove_duplicate=False) if module is head]
    if skeleton.config.get_text_config().tie_word_embeddings:
        embedding = tree.get_input_embeddings()
        head_names += [f"{name}.weight" for name, module in tree.named_modules() if module is embedding]
    files = _Files(model, commit, offline, f"{tree.base_model_prefix}.")
    weights = {name: files.tensor([where]).float() for name, where in names.items()}
    head_VD = files.tensor(head_names)
    norm = norm.to_empty(device="cpu").float()
    norm.load_state_dict(weights)
    return Unembedding(_gain(norm, head_VD.shape[1]), isinstance(norm, nn.LayerNorm), head_VD)


@torch.inference_mode()
def _gain(norm: nn.Module, d_in: int) -> Tensor:
    """Factor of each dimension, (D,), as the norm applies it: Gemma's is 1 + weight."""
    signs_D = torch.ones(d_in)
    signs_D[1::2] = -1  # of mean 0 and mean square 1: neither kind of norm changes it
    return (norm(signs_D[None]) - norm(-signs_D[None]))[0] / 2 * signs_D


@torch.inference_mode()
def promoted(unembedding: Unembedding, W_dec_KD: Tensor, count: int) -> tuple[Tokens, Tokens]:
    """The `count` tokens that each direction, at length 1, promotes most, and those that it suppresses most."""
    directions_KD = torch.nn.functional.normalize(W_dec_KD.float().cpu(), dim=1)
    if unembedding.centred:
        directions_KD = directions_KD - directions_KD.mean(1, keepdim=True)
    found: dict[bool, list[Any]] = {True: [], False: []}
    for part_KD in (directions_KD * unembedding.gain_D).split(AT_ONCE):
        blocks = unembedding.head_VD.split(VOCABULARY_AT_ONCE)  # all of it in float32 would be 2 GB at Llama's size
        logits_KV = torch.cat([part_KD @ block_VD.float().T for block_VD in blocks], 1)
        logits_KV -= logits_KV.mean(1, keepdim=True)  # softmax does not see it
        for largest, parts in found.items():
            parts.append(logits_KV.topk(min(count, logits_KV.shape[1]), largest=largest))
    up, down = (Tokens(torch.cat([p.indices for p in f]), torch.cat([p.values for p in f])) for f in found.values())
    return up, down


class _Files:
    """Single tensors of a model's safetensors, local or of the hub."""

    def __init__(self, model: ModelConfig, commit: str | None, offline: bool, prefix: str) -> None:
        self.model, self.commit, self.offline, self.prefix = model, commit, offline, prefix
        index = self._file("model.safetensors.index.json")
        self.shard_of: dict[str, str] | None = read_json(index)["weight_map"] if index else None

    def _file(self, name: str) -> Path | None:
        from transformers.utils.hub import cached_file

        found = cached_file(
            self.model.name,
            name,
            revision=self.commit,
            local_files_only=self.offline or Path(self.model.name).is_dir(),
            _raise_exceptions_for_missing_entries=False,
        )
        return Path(found) if found else None

    def tensor(self, names: list[str]) -> Tensor:
        """The first of these that the files have, with or without the base model's prefix."""
        wanted = [variant for name in names for variant in (name, name.removeprefix(self.prefix))]
        for name in wanted:
            path = self._file(self.shard_of.get(name, "-") if self.shard_of else "model.safetensors")
            if path is None:
                continue
            try:
                with safe_open(path, "pt") as file:
                    if name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                        return file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: damaged ({error})") from None
        raise UserError(f"{re.sub(r'[.]weight$', '', names[0])} was not found in the files of {self.model.name}")
