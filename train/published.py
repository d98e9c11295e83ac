"""SAEs of others: a SAELens folder, a .pt of two Linear layers, or a release that SAELens reads.

One is measured beside ours (`evaluate.also`), or stands in the place of training (`published`): then its folder is
what training leaves, so whatever uses an SAE uses it. Each becomes a `SavedSae` for rows as the model gives them
(scale 1). A field of cfg.json that changes the mathematics is applied or refused by name, never passed over. Weights
are read as tensors alone: a pickle that would run code is refused.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harvest.activation_store import ActivationStore, slug
from harvest.device import numerics
from harvest.files import UserError
from harvest.hub_files import fetch_files
from harvest.store_files import files_of
from train.checkpoint import SavedSae, run_fingerprint, save_sae
from train.exclusion import InputStatistics, input_statistics
from train.published_config import PublishedConfig, PublishedFiles
from train.sae import Sae
from train.saelens import SaelensConfig, canonical_hook, read_linear
from train.saelens_releases import load_release, release_config


def run(
    config: PublishedConfig,
    commit: str | None,
    harvest_directory: Path,
    directory: Path,
    begin: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write the SAE into `directory/<hook>`, as training writes its own, and return its shape.

    Norm limit and scale come from the held-out rows, as others may be missing. Raises UserError as `load_published`
    does, and for a store of several hooks.
    """
    begin(numerics(torch.device("cpu"), torch.float32))
    store = ActivationStore.open(files_of(harvest_directory))
    store.check_complete(("holdout",))
    g = store.geometry
    if len(g.hooks) > 1:
        raise UserError(f"published: is one SAE; the store {store.path} has {', '.join(g.hooks)}; keep its hook alone")
    window = {"exclude": config.exclude, "window_shards": g.holdout_shards, "split": "holdout"}
    statistics = partial(input_statistics, store, **window)
    saved = load_published("published", config, commit, store, statistics, config.runtime.offline)
    sae, folder = saved.sae, directory / slug(saved.hook)
    about = {
        **({"fingerprint": fingerprint} if (fingerprint := run_fingerprint(folder)) else {}),
        "architecture": sae.kind,
        **sae.settings(),
        "model": store.attributes.get("model"),
        "context_size": store.attributes.get("ingested", g._asdict())["context_size"],
        "published": {"label": config.label, **saved.about},
    }
    save_sae(folder, sae, saved.hook, saved.statistics, about)
    shape = {"SAE": config.label, "kind": sae.kind, "d_in": sae.d_in, "d_sae": sae.d_sae, "input scale": sae.scale}
    return {saved.hook: shape}


def load_published(
    where: str,
    published: PublishedFiles,
    commit: str | None,
    store: ActivationStore,
    statistics: Callable[[str], InputStatistics],
    offline: bool,
) -> SavedSae:
    """An SAE of others, float32, at one of the store's hooks; `where` is what messages call its settings.

    `statistics` gives those of a hook's rows. Raises UserError for files that are missing, damaged or hold code, an
    architecture or a setting that is not supported, and a width or hook that the store does not have.
    """
    whose, g = f"the store {store.path}", store.geometry
    if published.format == "linear":
        (path,) = _files(where, published, commit, offline)
        hook = matching_hook(where, published.hook or "", g.hooks, whose)
        sae = read_linear(path)
        check_width(path, sae.d_in, g.d_in, whose)
        return SavedSae(sae, hook, statistics(hook)._replace(scale=1.0), {"architecture": sae.kind})
    config, read = _opened(where, published, commit, offline)
    hook = matching_hook(where, named_hook(where, published.hook, config), g.hooks, whose)
    check_width(config.path, config.d_in, g.d_in, whose)
    # The weights may speak of rows scaled by the mean norm; SAELens takes it from the store at hand as well.
    found = statistics(hook)
    found = found if config.scaled_rows else found._replace(scale=1.0)
    about = {"architecture": config.architecture, "scale_of_our_rows": config.scaled_rows, "cfg": config.named()}
    return SavedSae(read(found.scale), hook, found, about)


def _opened(
    where: str, published: PublishedFiles, commit: str | None, offline: bool
) -> tuple[SaelensConfig, Callable[[float], Sae]]:
    """What is said of an SAE, and what reads it at a scale."""
    if published.release is None or published.id is None:
        about, weights = _files(where, published, commit, offline)
        config = SaelensConfig(about)
        return config, partial(config.read_sae, weights)
    theirs = load_release(f"{where}.release: {published.label}", published.release, published.id, commit, offline)
    config = SaelensConfig(Path(published.label), theirs.cfg.to_dict())
    return config, partial(config.sae, config.path, theirs.state_dict())


def read_config(where: str, published: PublishedFiles, commit: str | None, offline: bool) -> SaelensConfig | None:
    """What is said of an SAE, without its weights; None of a .pt, which says nothing.

    Raises UserError as `load_published` does.
    """
    if published.format == "linear":
        return None
    if published.release is None or published.id is None:
        return SaelensConfig(_files(where, published, commit, offline, published.files()[:1])[0])
    named = f"{where}.release: {published.label}"
    return SaelensConfig(Path(published.label), release_config(named, published.release, published.id, commit, offline))


def _files(
    where: str, published: PublishedFiles, commit: str | None, offline: bool, names: Sequence[str] = ()
) -> list[Path]:
    """Local paths of its files, or of those named, fetched from the hub where there is a commit."""
    path, names = str(published.path), names or published.files()
    if commit is None:
        return [Path(path, name) for name in names]
    return fetch_files(path, names, commit, offline, f"{where}.path")


def named_hook(where: str, wanted: str | None, config: SaelensConfig) -> str:
    """The hook that an SAE names, or else the settings.

    Raises UserError where neither does, and where they name two.
    """
    named = config.hook
    if named is None:
        if wanted is None:
            raise UserError(f"{config.path}: names no hook; set hook of {where}")
        return wanted
    if wanted is not None and canonical_hook(wanted) != canonical_hook(named):
        raise UserError(f"{where}.hook: {wanted!r}: {config.path} says {named!r}")
    return named


def matching_hook(where: str, named: str, hooks: Sequence[str], whose: str) -> str:
    """The one of `hooks`, which are `whose`, that an SAE belongs to.

    Raises UserError that names both where there is none.
    """
    for hook in hooks:
        if canonical_hook(hook) == canonical_hook(named):
            return hook
    raise UserError(
        f"{where}: belongs to {named!r}; {whose} has {', '.join(hooks)}; harvest its hook (harvest.hooks) to measure it"
    )


def check_width(path: Path, d_in: int, width: int, whose: str) -> None:
    """Raise UserError where an SAE is of another width than the rows, which are `whose`."""
    if d_in != width:
        raise UserError(f"{path}: an SAE of d_in {d_in}; {whose} has {width}")


def other_model(config: SaelensConfig, model_name: str) -> str | None:
    """The model that an SAE says it is of, where its name is another one than the settings'."""
    said = config.get("model_name", None)
    last = [str(name).rstrip("/").rpartition("/")[2].lower() for name in (said, model_name)]
    return said if isinstance(said, str) and last[0] != last[1] else None
