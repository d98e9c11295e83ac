"""What an analysis may read: one SAE, the held-out rows and text, and, loaded when first asked for, the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluate.config import EvaluateConfig
from evaluate.groups import Groups
from evaluate.unembedding import Unembedding
from harvest.activation_store import ActivationStore, slug
from harvest.contexts import Contexts
from harvest.language_model import HookedModel
from harvest.progress import Progress
from harvest.tokenizer import SegmentTokenizer
from train.checkpoint import SavedSae
from train.config import ExcludeConfig


class NoText(Contexts):
    """The text of a store that was ingested: there is none."""

    def __init__(self) -> None:
        self.sources, self.strata, self.bos = [], [], None

    def count(self, split: str) -> int:  # noqa: ARG002
        """No contexts."""
        return 0

    def read(self, split: str, name: str, first: int, count: int) -> np.ndarray:  # noqa: ARG002
        """Nothing, (0,)."""
        return np.zeros(0, np.uint8)


class Subject(NamedTuple):
    """One SAE under evaluation. All of a run's share the store, the text and the model."""

    saved: SavedSae  # its weights on `device`
    store: ActivationStore  # its held-out split is complete
    exclude: ExcludeConfig  # of training
    contexts: Contexts
    context_source: np.ndarray  # uint8 (held-out contexts,): index into contexts.sources; empty without text
    groups: Groups  # of the held-out contexts
    model: Callable[[], HookedModel]  # whole, with its head and the store's hooks; one for all SAEs
    tokenizer: Callable[[], SegmentTokenizer]
    unembedding: Callable[[], Unembedding]  # without the model
    chat_tokenizer: Callable[[], Any]  # the same as transformers has it
    config: EvaluateConfig
    device: torch.device
    directory: Path  # where an analysis leaves its files
    name: str | None = None  # of an SAE of others

    def file(self, name: str, suffix: str) -> Path:
        """The file of an analysis for this SAE: `<name>-<hook><suffix>`, or `<name>-also-<its name><suffix>`."""
        whose = f"also-{self.name}" if self.name else slug(self.saved.hook)
        return self.directory / f"{name}-{whose}{suffix}"

    def progress(self, title: str, total: int, unit: str) -> Progress:
        """Progress of an analysis, for people and for `status`."""
        return Progress(f"{title} {self.name or self.saved.hook}", total, unit, path=self.directory / "progress.json")
