"""Single files of a hub repository, through the hub's own client and its local cache."""

from collections.abc import Sequence
from pathlib import Path

from harvest.files import UserError
from harvest.sources import hub_errors


def fetch_files(repository: str, names: Sequence[str], commit: str, offline: bool, setting: str) -> list[Path]:
    """Local paths of a model repository's files at a commit.

    Raises UserError, which names the setting, where the hub does not give them.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

    where, listed = f"{setting}: {repository!r}", " and ".join(names)
    try:
        return [Path(hf_hub_download(repository, name, revision=commit, local_files_only=offline)) for name in names]
    except GatedRepoError:
        page = f"https://huggingface.co/{repository}"
        raise UserError(f"{where}: gated: accept its terms at {page}, then `hf auth login`") from None
    except LocalEntryNotFoundError:
        raise UserError(f"{where}: the hub cannot be reached and its cache lacks {listed}") from None
    except EntryNotFoundError:
        raise UserError(f"{where}: holds no {listed}; set file to the place in it") from None
    except hub_errors() as error:
        raise UserError(f"{where}: cannot be fetched ({type(error).__name__}: {str(error)[:200]})") from None
