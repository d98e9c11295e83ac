"""The headers of a model's safetensors, local or of the hub."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from harvest.config import ModelConfig
from harvest.files import UserError, read_json


def holds_more_than_bfloat16(model: ModelConfig, commit: str | None, offline: bool) -> bool:
    """Whether bfloat16 would round some of the weights.

    Raises UserError for a damaged file.
    """
    for path in _files(model, commit, offline):
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                if any(file.get_slice(name).get_dtype() in ("F64", "F32", "F16") for name in names):
                    return True
        except (SafetensorError, OSError) as error:
            raise UserError(f"model.name: {model.name!r}: its weights cannot be loaded: {path}: {error}") from None
    return False


def _files(model: ModelConfig, commit: str | None, offline: bool) -> Iterator[Path]:
    from transformers.utils.hub import cached_file

    def found(name: str) -> str | None:
        return cached_file(
            model.name,
            name,
            revision=commit,
            local_files_only=offline or Path(model.name).is_dir(),
            _raise_exceptions_for_missing_entries=False,
        )

    index = found("model.safetensors.index.json")
    names = sorted(set(read_json(Path(index))["weight_map"].values())) if index else ["model.safetensors"]
    yield from (Path(path) for path in map(found, names) if path)
