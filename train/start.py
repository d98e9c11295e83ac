"""The SAE that a training starts from: weights and input scale of a finished one, hyperparameters of the settings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from harvest.files import UserError, read_json
from harvest.hub_files import fetch_files
from train.checkpoint import ABOUT, load_sae
from train.config import StartFrom, TrainConfig
from train.kinds import new_sae
from train.parallel import SINGLE, FeatureRanks
from train.sae import Sae
from train.saelens import CONFIG, SaelensConfig, canonical_hook, check_finite
from train.start_files import WEIGHTS, find_start, is_on_hub, saelens_files


def starting_sae(
    config: TrainConfig,
    hook: str,
    d_in: int | None,
    scale: float,
    device: torch.device | str,
    ranks: FeatureRanks = SINGLE,
) -> Sae:
    """The SAE of train.start_from for a hook whose rows have width `d_in`, where it is known: the features of this one
    of `ranks`.

    `scale` is that of these rows: an SAE of SAELens takes it whose weights are meant for scaled rows; others have
    their own. Raises UserError for an SAE that is missing, damaged, unfinished or holds a NaN, and for one of another
    hook, kind or width than the settings have.
    """
    assert config.start_from
    given, place = read_given(config.start_from, hook, scale, config.runtime.offline)
    d_in, chosen = d_in or given.d_in, config.sae
    for name, has, wanted, way_out in (
        ("kind", given.kind, chosen.kind, f"set train.sae.kind={given.kind}"),
        ("d_in", given.d_in, d_in, "choose a hook of its width"),
        ("d_sae", given.d_sae, chosen.width(d_in), f"set train.sae.d_sae={given.d_sae}"),
    ):
        if has != wanted:
            raise UserError(
                f"train.start_from: {place}: an SAE of {name} {has}, and the settings have {name} {wanted}; {way_out}, "
                "or start from another one"
            )
    check_finite(place, given.parameters)
    new = new_sae(config, d_in, given.scale, "meta")
    read = {name: given.parameters[name] for name in new.parameters}
    if ranks.size == 1 and torch.device(device).type == "cpu":
        read = {name: weight.clone() for name, weight in read.items()}  # it may still be the file's own pages
    return ranks.shard(replace(new, parameters=read)).to(device)


def check_start(config: TrainConfig, hooks: Sequence[str], d_in: int | None) -> None:
    """Read what each hook would start from.

    Raises UserError as `starting_sae` does.
    """
    for hook in hooks:
        starting_sae(config, hook, d_in, 1.0, "meta")


def read_given(start: StartFrom, hook: str, scale: float, offline: bool) -> tuple[Sae, Path]:
    """The given SAE of a hook on the CPU, and where it lies.

    Raises UserError for one that is missing, damaged or unfinished, and where none is of this hook.
    """
    if is_on_hub(start):
        files = fetch_files(
            start.path, saelens_files(start.file), start.revision or "main", offline, "train.start_from"
        )
        folder, about = files[0].parent, CONFIG
        has = {folder: SaelensConfig(folder / about).hook}
    else:
        found = find_start(start)
        about = found.about
        has = {folder: _hook_of(folder, about) for folder in found.folders}
    fitting = [f for f, named in has.items() if named is None or canonical_hook(named) == canonical_hook(hook)]
    if not fitting:
        raise UserError(
            f"train.start_from: {start.path!r}: belongs to {', '.join(map(repr, has.values()))}, not to {hook!r}; name "
            "an SAE of this hook, or harvest its hook"
        )
    folder = fitting[0]
    if about == ABOUT:
        return load_sae(folder).sae, folder
    config = SaelensConfig(folder / about)
    return config.read_sae(folder / WEIGHTS, scale if config.scaled_rows else 1.0), folder


def _hook_of(folder: Path, about: str) -> str | None:
    return SaelensConfig(folder / about).hook if about == CONFIG else str(read_json(folder / about).get("hook_name"))
