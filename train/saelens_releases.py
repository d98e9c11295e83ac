"""Releases of SAEs that SAELens knows: where each lies on the hub, and the SAE that SAELens makes of it.

SAELens is an extra (`pip install -e '.[saelens]'`). Its list is read as a file, as importing SAELens takes seconds.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from harvest.files import UserError
from harvest.sources import hub_errors

EXTRA = "`pip install -e '.[saelens]'` installs it"


def release_place(setting: str, release: str, sae_id: str) -> tuple[str, str]:
    """The hub repository of an SAE, and its place in there.

    Raises UserError without SAELens, and for a release or an id that it does not know.
    """
    releases = _releases()
    if releases is None:
        raise UserError(f"{setting}.release: {release!r}: needs SAELens; {EXTRA}")
    if release not in releases:
        if "/" in release:  # a repository of SAELens' own form
            return release, sae_id
        raise UserError(f"{setting}.release: {release!r}: SAELens knows no such release")
    known = {str(sae["id"]): str(sae["path"]) for sae in releases[release]["saes"]}
    if sae_id not in known:
        few = ", ".join(list(known)[:5])
        raise UserError(f"{setting}.id: {sae_id!r}: not in the release {release!r}, which has {few}, ...")
    return str(releases[release]["repo_id"]), known[sae_id]


@cache
def _releases() -> dict[str, Any] | None:
    """SAELens' list, None where it is not installed."""
    spec = find_spec("sae_lens")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("pretrained_saes.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def release_config(where: str, release: str, sae_id: str, commit: str | None, offline: bool) -> dict[str, Any]:
    """What cfg.json of SAELens' form would say of an SAE.

    Raises UserError where SAELens cannot tell.
    """
    with _saelens(where, commit, offline) as loaders:
        return loaders.load_sae_config_from_huggingface(release, sae_id)


def load_release(where: str, release: str, sae_id: str, commit: str | None, offline: bool) -> Any:
    """SAELens' own SAE, float32 on the CPU.

    Raises UserError where SAELens cannot load it.
    """
    with _saelens(where, commit, offline):
        from sae_lens import SAE

        return SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")


@contextmanager
def _saelens(where: str, commit: str | None, offline: bool) -> Iterator[Any]:
    """SAELens' loaders, which take what they fetch at this commit: they have no argument for it."""
    try:
        from sae_lens.loading import pretrained_sae_loaders as loaders
    except ImportError as error:
        raise UserError(f"{where}: needs SAELens ({error}); {EXTRA}") from None
    fetch = loaders.hf_hub_download
    loaders.hf_hub_download = partial(fetch, revision=commit, local_files_only=offline)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scale that is not known: it is measured here
            yield loaders
    except (*hub_errors(), KeyError, TypeError, AttributeError) as error:  # or of a converter, on files of another form
        raise UserError(f"{where}: SAELens cannot load it ({type(error).__name__}: {str(error)[:200]})") from None
    finally:
        loaders.hf_hub_download = fetch
