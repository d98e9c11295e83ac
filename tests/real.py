"""A small run on real text: the first three layers of SmolLM2-135M read problems and chats of the embedded data sets.

`make setup` makes the assets. 10,240 held-out rows; the SAE is trained for 100 steps, enough for features that mean
something (explained variance 0.8 on rows that are no outliers).
"""

from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "smollm2.yaml"
HOOK = "model.layers.2"
SETTINGS = (
    "sample.context_size=128",
    "sample.shard_contexts=16",
    "sample.train_tokens=4096",
    "sample.holdout_tokens=10240",
    "sample.holdout_fraction=0.6",
    f"harvest.hooks=[{HOOK}]",
    "harvest.chunk_rows=1024",
    "harvest.threads=1",
    "harvest.runtime.device=cpu",
    "train.sae.d_sae=768",
    "train.sae.l1_coefficient=8",
    "train.epochs=8",
    "train.batch_size=512",
    "train.window_shards=2",
    "train.pool_rows=4096",
    "train.validation_rows=1024",
    "train.runtime.device=cpu",
    "train.runtime.threads=1",
    "evaluate.reason_score.contexts=null",
    "evaluate.runtime.device=cpu",
    "evaluate.runtime.threads=1",
)
EVERY = {"champ": 200, "chitchat": 100}  # documents: from all problems, not fifty answers of the first


def make_assets(folder: Path) -> None:
    """Part of the text under `folder`/assets, and a link to the model."""
    if not (ROOT / "assets" / ".complete").exists():
        pytest.skip("assets/ is not complete; run make setup")  # make test does; a GPU machine without network has none
    for name, every in EVERY.items():
        target = folder / "assets" / name / "train.jsonl"
        target.parent.mkdir(parents=True)
        with (ROOT / "assets" / name / "train.jsonl").open("rb") as lines:
            target.write_bytes(b"".join(islice(lines, 0, None, every)))
    (folder / "assets" / "smollm2-135m").symlink_to((ROOT / "assets" / "smollm2-135m").resolve())
