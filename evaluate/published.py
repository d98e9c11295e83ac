"""SAEs of others, read so that they can be measured beside ours: a SAELens folder, or a .pt of two Linear layers.

Each becomes a `SavedSae` for rows as the model gives them (scale 1), with our limit for outlier rows, so that the
same rows are counted. A field of cfg.json that changes the mathematics is applied or refused by name, never
passed over. Weights are read as tensors alone: a pickle that would run code is refused.
"""

from pathlib import Path

from evaluate.config import PublishedSae
from harvest.activation_store import ActivationStore
from harvest.files import UserError
from harvest.hub_files import fetch_files
from train.checkpoint import SavedSae
from train.exclusion import InputStatistics
from train.saelens import SaelensConfig, canonical_hook, read_linear


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
        sae = read_linear(paths[0])
        _check_width(paths[0], sae.d_in, store)
        return SavedSae(sae, hook, statistics[hook]._replace(scale=1.0), {"architecture": sae.kind})
    config = SaelensConfig(paths[0])
    hook = _store_hook(where, _named_hook(where, published.hook, config), store)
    _check_width(paths[0], config.d_in, store)
    # The weights may speak of rows scaled by the mean norm; SAELens takes it from the store at hand as well.
    scale = statistics[hook].scale if config.scaled_rows else 1.0
    about = {"architecture": config.architecture, "scale_of_our_rows": config.scaled_rows, "cfg": config.named()}
    return SavedSae(config.read_sae(paths[1], scale), hook, statistics[hook]._replace(scale=scale), about)


def _files(published: PublishedSae, commit: str | None, offline: bool) -> list[Path]:
    """Local paths of its files, fetched from the hub where there is a commit."""
    if commit is None:
        return [Path(published.path, name) for name in published.files()]
    where = f"evaluate.also ({published.name}).path"
    return fetch_files(published.path, published.files(), commit, offline, where)


def _named_hook(where: str, wanted: str | None, config: SaelensConfig) -> str:
    named = config.hook
    if named is None:
        if wanted is None:
            raise UserError(f"{config.path}: names no hook; set hook of {where}")
        return wanted
    if wanted is not None and canonical_hook(wanted) != canonical_hook(named):
        raise UserError(f"{where}.hook: {wanted!r}: {config.path} says {named!r}")
    return named


def _store_hook(where: str, named: str, store: ActivationStore) -> str:
    for hook in store.geometry.hooks:
        if canonical_hook(hook) == canonical_hook(named):
            return hook
    raise UserError(
        f"{where}: belongs to {named!r}; the store {store.path} has {', '.join(store.geometry.hooks)}; "
        "harvest its hook (harvest.hooks) to measure it"
    )


def _check_width(path: Path, d_in: int, store: ActivationStore) -> None:
    if d_in != store.geometry.d_in:
        raise UserError(f"{path}: an SAE of d_in {d_in}; the store {store.path} has {store.geometry.d_in}")
