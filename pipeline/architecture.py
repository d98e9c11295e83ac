"""The shape of the settings' model, without its weights: from its folder, the hub, or the facts that we ship.

`configs/models/<owner>--<name>/` holds the public numbers of the models that our settings name, so that a plan
can be made, and a run rehearsed, where the model cannot be had.
"""

from pathlib import Path
from typing import NamedTuple

from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.hub import hub_answers
from harvest.language_model import Skeleton, load_skeleton

SHIPPED = Path(__file__).resolve().parent.parent / "configs" / "models"


class Architecture(NamedTuple):
    """A model's module tree, where its numbers come from, and whether the model itself can be loaded from there."""

    skeleton: Skeleton
    origin: str  # for people
    folder: Path | None  # local folder of the model, or of the shipped facts
    has_model: bool


def find_architecture(model: ModelConfig, offline: bool) -> Architecture:
    """The shape of a model.

    Raises UserError when neither folder, hub, cache nor shipped facts have it.
    """
    local, shipped = Path(model.name), shipped_folder(model)
    if local.is_dir():
        return Architecture(load_skeleton(model, None, offline=True), f"{local}/config.json", local, True)
    reachable = not offline and hub_answers()
    try:
        skeleton = load_skeleton(model, model.revision, offline=not reachable)
        return Architecture(skeleton, "the hub" if reachable else "the hub's local cache", None, True)
    except UserError:
        if not shipped.is_dir():
            raise
    origin = f"configs/models/{shipped.name}/config.json, as the hub cannot be reached"
    skeleton = load_skeleton(ModelConfig(name=str(shipped)), None, offline=True)
    return Architecture(skeleton, origin, shipped, False)


def shipped_folder(model: ModelConfig) -> Path:
    """Where the facts of a hub model would be."""
    return SHIPPED / model.name.replace("/", "--")
