"""What an analysis may read: one SAE, the held-out rows and text, and, loaded when first asked for, the model.

Rows are encoded once: `feed` gives each batch to every reader, which adds to its sums. A reader has `add(batch)`, and
a result of its own when all were added.

Shape suffixes: B rows of a batch, D d_in, F d_sae.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from evaluate.config import EvaluateConfig
from evaluate.groups import Groups
from evaluate.unembedding import Unembedding
from harvest.activation_rows import RowBatch
from harvest.activation_store import ActivationStore, slug
from harvest.contexts import Contexts
from harvest.language_model import HookedModel
from harvest.progress import Progress
from harvest.tokenizer import SegmentTokenizer
from train.checkpoint import SavedSae
from train.config import ExcludeConfig
from train.exclusion import Exclusion


class Encoded(NamedTuple):
    """Rows of the SAE's hook and what it makes of them, on its device."""

    rows: RowBatch
    x_BD: Tensor  # float32
    f_BF: Tensor  # activations, in the SAE's own units


class Reader(Protocol):
    """Sums over rows."""

    def add(self, batch: Encoded) -> None:
        """Count the rows of a batch."""
        ...


class Subject(NamedTuple):
    """One SAE under evaluation. All of a run's share the store, the text and the model."""

    saved: SavedSae  # its weights on `device`, once `on_device` put them there
    store: ActivationStore  # its held-out split is complete
    exclude: ExcludeConfig  # of training
    contexts: Contexts  # None where rows were ingested: no analysis that reads text is run then
    groups: Groups  # of the held-out contexts
    model: Callable[[], HookedModel]  # whole, with its head and the store's hooks; one for all SAEs
    tokenizer: Callable[[], SegmentTokenizer]
    unembedding: Callable[[], Unembedding]  # without the model
    chat_tokenizer: Callable[[], Any]  # the same as transformers has it
    config: EvaluateConfig
    device: torch.device
    directory: Path  # where an analysis leaves its files
    name: str = ""  # of a third-party SAE

    @property
    def rules(self) -> dict[str, Exclusion]:
        """Which rows of its hook are counted."""
        return {self.saved.hook: Exclusion(self.exclude, self.saved.statistics.norm_limit)}

    def on_device(self) -> "Subject":
        """The same, with the weights where it is computed."""
        return self._replace(saved=self.saved._replace(sae=self.saved.sae.to(self.device)))

    def file(self, name: str, suffix: str) -> Path:
        """The file of an analysis for this SAE: `<name>-<hook><suffix>`, or `<name>-also-<its name><suffix>`."""
        whose = f"also-{self.name}" if self.name else slug(self.saved.hook)
        return self.directory / f"{name}-{whose}{suffix}"

    def progress(self, title: str, total: int, unit: str) -> Progress:
        """Progress of an analysis, for people and for `status`."""
        return Progress(f"{title} {self.name or self.saved.hook}", total, unit, path=self.directory / "progress.json")

    def counted(self, batches: Iterable[RowBatch], title: str, rows: int) -> Iterator[RowBatch]:
        """The batches, with the progress of `rows` rows in all."""
        with self.progress(title, rows, "rows") as progress:
            for batch in batches:
                yield batch
                progress.advance(batch.size)


def bos_id(subject: Subject) -> int | None:
    """The token that begins every text read like the sample's; None where its documents and contexts have none."""
    return subject.chat_tokenizer().bos_token_id if subject.contexts.bos in ("document", "context") else None


@torch.inference_mode()
def feed(saved: SavedSae, batches: Iterable[RowBatch], readers: Sequence[Reader]) -> None:
    """Encode rows once and give them to every reader."""
    for rows in batches:
        x_BD = rows.acts[saved.hook].to(saved.sae.W_dec.device).float()
        batch = Encoded(rows, x_BD, saved.sae.encode(x_BD))
        for reader in readers:
            reader.add(batch)
