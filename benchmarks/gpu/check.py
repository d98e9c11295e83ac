"""What a check is given: sizes, a folder for its files, and a place to note each figure as soon as it is known."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


class Sizes(NamedTuple):
    """Of the tensors: the paper's on a GPU, so small that a CPU needs seconds elsewhere."""

    d_in: int
    d_sae: int
    batch: int
    narrow_d_sae: int  # of an SAE whose every checkpoint is compared
    past_int32_d_sae: int  # batch × this and this × d_in pass 2³¹; none on a CPU
    context_size: int
    shard_contexts: int
    timed_shards: int


FULL = Sizes(4096, 65_536, 4096, 16_384, 524_800, 1024, 64, 12)
SMALL = Sizes(96, 512, 64, 256, 0, 16, 8, 10)


class Place:
    """Sizes, device and folder of a check, and the file that its figures go to."""

    def __init__(self, folder: Path, notes: Path) -> None:
        self.folder, self._notes = folder, notes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sizes = FULL if self.on_gpu else SMALL

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is there."""
        return self.device.type == "cuda"

    def note(self, **figures: Any) -> None:
        """Keep figures by name, even if the check is ended from outside after this."""
        for name, value in figures.items():
            print(f"  {name}: {value}", flush=True)
        with self._notes.open("a") as file:
            file.write(json.dumps(figures) + "\n")
            file.flush()
            os.fsync(file.fileno())


def start(arguments: Sequence[str], cwd: Path | None = None, **environment: str) -> subprocess.Popen[bytes]:
    """`python -m arguments` of this clone, whatever the folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "0",
        **environment,
    }
    return subprocess.Popen([sys.executable, "-m", *arguments], cwd=cwd or ROOT, env=environment)


def finish(*processes: subprocess.Popen[bytes]) -> None:
    """Wait for processes; all must end well."""
    ended = [process.wait() for process in processes]
    assert not any(ended), f"exit statuses {ended}: {[process.args for process in processes]}"
