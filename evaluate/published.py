"""SAEs of others, read so that they can be measured beside ours: a SAELens folder, or a .pt of two Linear layers.

Each becomes a `SavedSae` for rows as the model gives them (scale 1), with our limit for outlier rows, so that the
same rows are counted. A field of cfg.json that changes the mathematics is applied or refused by name, never
passed over. Weights are read as tensors alone: a pickle that would run code is refused.
"""

from pathlib import Path

from evaluate.config import PublishedSae
from harvest.activation_store import ActivationStore
from harvest.files import UserError
from harvest.language_model import saelens_hook
from harvest.sources import hub_errors
from train.checkpoint import SavedSae
from train.exclusion import InputStatistics
from train.saelens import SaelensConfig, read_linear


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


def _named_hook(where: str, wanted: str | None, config: SaelensConfig) -> str:
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
