"""A finished run whose SAE has planted features: each fires on one token id, wherever it stands."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import only, unlisted

from harvest.activation_rows import stored_rows
from harvest.activation_store import ActivationStore
from harvest.config import ModelConfig
from harvest.store_files import files_of
from harvest.tokenizer import load_tokenizer
from train.checkpoint import load_sae, save_sae

HOOK = "model.layers.1"
COUNT = 10  # planted features, 0 to 9; the others never fire
EVALUATED = (
    f"evaluate.features.count={COUNT}",
    *(f"evaluate.{name}=null" for name in ("downstream", "steering", "diff", "token_injection")),
)


def plant(folder: Path) -> list[int]:
    """Put the SAE in the place of the trained one, and take the evaluation away; the token of each planted feature.

    The detectors are linear: least squares of the token's indicator on all rows, the token's rows as heavy as all
    others, which a random model of small weights allows. Raises AssertionError where one is not exact, or they are few.
    """
    store = ActivationStore.open(files_of(only(folder, "runs/harvest/*")))
    place = only(folder, f"runs/train/*/{HOOK}")
    saved = load_sae(place)
    rules = {HOOK: lambda rows: np.ones(len(rows("token_id")), bool)}
    batches = [batch for split in ("train", "holdout") for batch in stored_rows(store, split, rules, 512)]
    x = torch.cat([batch.acts[HOOK] for batch in batches]).double() * saved.sae.scale
    token = np.concatenate([batch.token for batch in batches])
    ids, counts = np.unique(batches[-1].token, return_counts=True)
    text = load_tokenizer(ModelConfig(name=str(folder / "assets/tiny-llama")), None, offline=True).text
    alone = [sum(text(one) in text(other) for other in ids) == 1 for one in ids]  # an oracle looks for the word
    ids, counts = ids[alone], counts[alone]
    chosen = ids[np.argsort(np.abs(counts - 25), kind="stable")[:COUNT]]  # rare enough for windows without
    weights = {name: torch.zeros_like(value) for name, value in saved.sae.parameters.items()}
    weights["b_enc"][:] = -1
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    for feature, wanted in enumerate(chosen.tolist()):
        is_token = torch.from_numpy(token == wanted).unsqueeze(1)
        balance = torch.where(is_token, 1 / is_token.sum(), 1 / (~is_token).sum()).double().sqrt()
        found = torch.linalg.lstsq(ones * balance, is_token.double() * balance).solution
        z = ones @ found
        least, most = float(z[is_token].min()), float(z[~is_token].max())
        weights["W_enc"][:, feature], weights["b_enc"][feature] = found[:-1, 0], found[-1, 0] - (least + most) / 2
        weights["W_dec"][feature] = x[is_token[:, 0]].mean(0)
    sae = replace(saved.sae, parameters=weights)
    fires = sae.encode((x / sae.scale).float())[:, :COUNT] > 0
    assert len(chosen) == COUNT
    assert np.array_equal(fires.numpy(), token[:, None] == chosen)
    save_sae(place, sae, HOOK, saved.statistics, saved.about)
    unlisted(place.parent)
    shutil.rmtree(folder / "runs/evaluate")
    return chosen.tolist()
