"""`pipeline push`: an export, and what was measured of it, to a repository of the hub.

Nothing leaves the machine without `yes`. Feature pages and the report hold text of the data sets: they, and what
metrics.json quotes, are left out unless every source is known to be open, or the caller says so. The token is that of
`hf auth login` or HF_TOKEN; it is passed on and never written.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluate.figures import FILE
from harvest.files import UserError, json_bytes, read_json, sealed
from harvest.sources import hub_errors
from harvest.stage_directory import Run
from pipeline.export import EXPLANATIONS, closed_sources, export_name
from pipeline.metrics import read_evaluation
from pipeline.stages import Runs
from pipeline.tables import table

QUOTED = {"token_injection": ("ngrams", "example")}  # of each feature in a section's lists: text of the data sets
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Push(NamedTuple):
    """What would be pushed: place in the repository → file, or its bytes; and what is left out, with the reason."""

    files: dict[str, Path | bytes]
    left_out: list[str]


def plan_push(sweep: Sequence[Runs], folder: Path | None, with_text: bool) -> Push:
    """The files of an export and of the evaluations of its runs.

    Raises UserError for a folder that is no export of ours, and for a file that is not what was exported or measured.
    """
    from train.export import MARKER, check_exported, read_marker

    folder = folder or sweep[0].root / "export" / export_name(sweep)
    if not folder.is_dir():
        raise UserError(f"push: {folder}: there is no export; run `make export` with the same CONFIG and SET first")
    marker = read_marker(folder)
    exported = {(sae.get("train"), sae.get("which_sae")) for sae in marker.get("saes", [])}
    if exported != {(runs.fingerprints["train"], runs.config.evaluate.sae) for runs in sweep}:
        raise UserError(f"push: {folder}: was exported from other settings; export anew, or give those settings")
    check_exported(folder, marker)
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted([*marker["files"], MARKER])}
    closed = closed_sources(sweep[0].config)
    left_out = []
    if closed and not with_text:
        quoting = [name for name in files if Path(name).name == EXPLANATIONS]
        files = {name: path for name, path in files.items() if name not in quoting}
        left_out += [f"{name}, which may quote text of {', '.join(closed)}; --with-text pushes it" for name in quoting]
    for run in (runs.of("evaluate") for runs in sweep):
        if run.is_complete:
            names = _measured(run)
            texts = [name for name in names if name.endswith(".html")]
            there = f"evaluation/{run.path.name}"
            if closed and not with_text:
                reason = f"text of {', '.join(closed)} in {run.path}; --with-text pushes them"
                left_out.append(f"{len(texts)} pages, n-grams and examples in {FILE} with {reason}")
                files[f"{there}/{FILE}"] = _without_text(run.path / FILE)
            else:
                files |= {f"{there}/{name}": run.path / name for name in (FILE, *texts)}
    return Push(files, left_out)


def _without_text(path: Path) -> bytes:
    """The bytes of a metrics.json without what it quotes."""
    metrics = read_json(path)
    for sae in metrics["saes"]:
        for section, keys in QUOTED.items():
            for feature in sae["lists"].get(section, {}).get("features", []):
                feature.update({key: [] for key in keys})
    return json_bytes(sealed(metrics))


def _measured(run: Run) -> list[str]:
    """Names of the files that an evaluation left.

    Raises UserError where one is missing or changed, or that of another run.
    """
    read_evaluation(run)
    if changed := run.changed():
        raise UserError(f"{run.said(changed)}; restore it, or {run.way_out}")
    if listed := run.manifest.get("files"):
        return sorted(listed)
    pages = (path for path in sorted(run.path.rglob("*.html")) if not path.is_symlink())  # of an earlier version
    return [str(path.relative_to(run.path)) for path in pages]


def push(repository: str, planned: Push, *, public: bool, yes: bool, say: Callable[[str], None]) -> None:
    """Show what would be pushed, and push it as one commit where `yes` is set.

    A missing repository is made, private unless `public`. Raises UserError where nobody is logged in,
    the token may not write, or the hub cannot be reached.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"push: {repository!r}: a repository of the hub is OWNER/NAME")
    sizes = [
        (f"{len(file) if isinstance(file, bytes) else file.stat().st_size:,}", place)
        for place, file in planned.files.items()
    ]
    for line in [*table(sizes, right=(0,)), *(f"left out: {line}" for line in planned.left_out)]:
        say(line)
    if not yes:
        say(f"nothing was pushed to {repository}; --yes pushes these {len(planned.files)} files")
        return
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not get_token():
        raise UserError("push: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN")
    operations = [CommitOperationAdd(place, file) for place, file in planned.files.items()]
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Push sparse autoencoders and their figures")
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = {401: "the token is not valid", 403: "the token may not write there"}.get(status, f"status {status}")
        raise UserError(f"push: {repository}: the hub refuses: {why}; check `hf auth whoami` and the token") from None
    except hub_errors() as error:
        detail = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"push: {repository}: the hub cannot be reached, or takes no such name ({detail})") from None
    say(str(commit.commit_url))
