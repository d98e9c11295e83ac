"""What the hub is asked for, and whether it can be asked: its own client tries for half a minute before it says no."""

from functools import cache
from pathlib import Path
from typing import Any

from harvest.config import ModelConfig

HUB = "hub:"  # begins an identity that is a commit, not content
SECONDS = 3.0  # that the hub gets to answer


def resolved_commit(identity: str | None) -> str | None:
    """The commit in what a fingerprint holds of an input, `hub:<name>@<commit>`; None for local content."""
    return identity.rpartition("@")[2].partition("/")[0] if identity and identity.startswith(HUB) else None


def where_it_is(model: ModelConfig, commit: str | None, offline: bool) -> dict[str, Any]:
    """What `from_pretrained` of transformers is told beside a model's name; no code of the model's is ever run."""
    local = Path(model.name).is_dir()
    return {"revision": commit, "local_files_only": offline or local, "trust_remote_code": False}


@cache
def hub_answers() -> bool:
    """Whether the hub answers, through the client's own settings (endpoint, proxies, HF_HUB_OFFLINE)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of whatever HTTP library the client has: it is none of Python's own errors
        return False
    return True
