"""Under which terms a data set or a model stands: what the hub says of it, or what came with the set-up."""

from typing import NamedTuple

from harvest.source_files import is_local
from harvest.sources import hub_errors

# What `make setup` fetches (configs/assets.txt).
SHIPPED = {"assets/smollm2-135m": "apache-2.0", "assets/champ": "mit", "assets/chitchat": "mit"}


class Terms(NamedTuple):
    """Under which terms something may be passed on."""

    licence: str | None  # as the hub writes it; None where it is not known
    free: bool  # known to be open: on the hub, neither gated nor private, or shipped with the set-up
    note: str  # for people


def source_terms(path: str) -> Terms:
    """Terms of a data set; asks the hub, and does not fail where it cannot be asked."""
    if path in SHIPPED:
        return Terms(SHIPPED[path], True, "open")
    if is_local(path):
        return Terms(None, False, "local files")
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(path, timeout=10)
    except hub_errors() as error:
        return Terms(None, False, f"not looked up ({type(error).__name__})")
    licence = getattr(info.card_data, "license", None) if info.card_data else None
    text = ", ".join(licence) if isinstance(licence, list) else licence
    closed = "gated" if info.gated else "private" if info.private else None
    return Terms(text, closed is None, closed or "open")
