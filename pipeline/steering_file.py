"""`pipeline export --steering`: features to add, as the steering file of lm-eval's `--model steered` (0.4.13).

    {hookpoint: {"steering_vector": (d_in,) float32, "steering_coefficient": 1.0, "action": "add", ...}}

The vector is Σ γ_i · max_i · direction_i, what `steer` adds at all tokens, in units of the model's own rows; where it
goes is a module's path below the model without its head, as lm-eval looks it up. lm-eval reads no format but
torch.save's pickle; this file holds tensors and plain values alone, so that `weights_only=True` loads it too.

Shape suffixes: D d_in.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harvest.files import UserError, replacing
from harvest.hub import resolved_commit
from pipeline.settings_text import SettingsError
from pipeline.stages import Runs
from pipeline.steer import Request, check_target, held_out_maxima, one_sae, planned, saved_sae

SUFFIXES = (".pt", ".pth")  # by which lm-eval knows the file


def write_steering(sweep: Sequence[Runs], to: Path, features: Sequence[str], hook: str | None, force: bool) -> Path:
    """Write the file and return its path; `features` are as those of `steer`, `123` or `123:add:2`.

    Raises SettingsError for options that make no sense, and UserError for what lm-eval cannot do, for what does not fit
    the SAE, and for a file that is there already, unless `force`.
    """
    _check_free(to, force)
    if not features:
        raise SettingsError("--steering: no feature to write: give --feature 123 or --feature 123:add:2; repeatable")
    directory = one_sae(sweep, hook, "export --steering")
    (plan,) = planned(Request(list(features), together=True))
    for operation in plan.operations:
        if (operation.op, operation.where) != ("add", "all"):
            asked = f"{operation.feature}:{operation.op}:{operation.where}"
            raise UserError(
                f"--feature: {asked}: lm-eval adds a vector at all tokens and can do no more of this; write add and "
                "all, or take `pipeline benchmark`"
            )
    import torch

    from evaluate.operations import check_operations
    from harvest.language_model import find_hook, load_skeleton

    runs = sweep[0]
    config, name = runs.config, hook or runs.config.harvest.hooks[0]
    saved = saved_sae(runs, directory, name)
    check_operations(plan.operations, saved.sae.d_sae, "--feature")
    ids = [operation.feature for operation in plan.operations]
    maxima = held_out_maxima(runs, saved, ids)
    vector_D = torch.zeros(saved.sae.d_in)
    for operation, direction_D in zip(plan.operations, saved.sae.direction(ids), strict=True):
        vector_D += maxima[operation.feature] * direction_D * operation.strength  # as `operated`, for the same bits
    skeleton = load_skeleton(config.model, resolved_commit(runs.inputs.model), config.harvest.runtime.offline)
    entry: dict[str, Any] = {
        "steering_vector": vector_D,
        "steering_coefficient": 1.0,
        "action": "add",
        "bias": None,
        "head_index": None,
    }
    hookpoint = _below_base(skeleton.model, find_hook(skeleton, name).module)
    with replacing(to) as partial:
        torch.save({hookpoint: entry}, partial)
    return to


def _below_base(model: Any, module: str) -> str:
    """The path of a module below `model.base_model`, where lm-eval looks for it."""
    wanted, base = model.get_submodule(module), model.base_model
    found = next((name for name, each in base.named_modules() if each is wanted), None)
    if not found:
        raise UserError(
            f"{module}: is not below {type(base).__name__}, where lm-eval looks for hooks; take another hook"
        )
    return found


def _check_free(to: Path, force: bool) -> None:
    if to.suffix not in SUFFIXES:
        raise SettingsError(
            f"--steering: {to}: lm-eval knows the file by its name, which ends in {' or '.join(SUFFIXES)}"
        )
    check_target("--steering", to)
    if to.exists() and not force:
        raise UserError(f"{to}: is there already; --force writes it anew, or choose another name")
