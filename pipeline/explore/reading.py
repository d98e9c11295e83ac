"""Text in, features out: the model's pass up to the hook, and what the SAE makes of each row.

Rows are the model's own, in the precision that `pipeline steer` computes in; a store holds them as bfloat16. Text is
read as the sample stage reads a document: what spells a special token stays text, and a BOS is where the sample has
one. Of the dense activations a few rows at a time are in memory, else the non-zeros alone.

The first position of a text has an activation a hundred times as large as the others, so training leaves its row out,
and what features say of it means little (`kept_S`). Where a BOS is there, it takes that place.

Shape suffixes: S tokens, S1 one more, B rows of a few, D d_in, N non-zeros, K features of a text, F d_sae.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import betainc
from torch import Tensor

from evaluate.engine import end_tokens
from evaluate.packed_weights import PackedWeights
from evaluate.prompts import Prompt, position_limit, prompt_ids
from evaluate.steering import check_fit
from harvest.activation_rows import kept_in_text
from harvest.chat_template import has_chat_template
from harvest.contexts import Contexts
from harvest.device import resolve_device, resolve_dtype, set_threads
from harvest.documents import DocumentTokenizer
from harvest.files import UserError
from harvest.hooked_model import HookedModel
from harvest.hub import resolved_commit
from harvest.language_model import load_model
from harvest.templates import Segment
from harvest.tokenizer import embedding_rows, load_whole_tokenizer
from pipeline.explore.catalog import Entry, Shelf
from pipeline.explore.features import FeatureTable
from train.checkpoint import SavedSae
from train.exclusion import Exclusion

LIMIT = 4096  # tokens of a text, where the model has as many positions
AT_ONCE = 1 << 24  # dense activations, 4 bytes each
ON_DEVICE = 4  # SAEs
RAREST = 1e-6  # what a lower density counts as


class Read(NamedTuple):
    """A text's tokens, and the features that are active at each, in CSR: `encode` of the model's rows, its zeros left
    out."""

    ids: list[int]
    texts: list[str]  # of the tokens
    cut: int | None  # tokens of the whole text, where only the first are here; else None
    kept_S: np.ndarray  # bool: the rows that training would keep; `summed` and `by_example` count these alone
    indptr_S1: np.ndarray  # int64: token s has entries indptr[s] to indptr[s + 1]
    feature_N: np.ndarray  # int32
    value_N: np.ndarray  # float32

    @property
    def token_N(self) -> np.ndarray:
        """The token of each entry, int64 (N,)."""
        return np.repeat(np.arange(len(self.ids)), np.diff(self.indptr_S1))


class Reader:
    """A model and its tokenizer; of the SAEs those that were used last are on its device.

    Only one thread may use it (`jobs.Desk`). `bos` is where the sample has a BOS, as in `Contexts.bos`.
    """

    def __init__(self, model: HookedModel, tokenizer: Any, documents: DocumentTokenizer, bos: str | None) -> None:
        self.model, self.tokenizer, self.documents, self.bos = model, tokenizer, documents, bos
        self.positions = position_limit(self.causal.config) or 0
        self.limit = min(LIMIT, self.positions) if self.positions else LIMIT
        self.ends = end_tokens(self.causal, tokenizer)
        self._saes: OrderedDict[Shelf, SavedSae] = OrderedDict()

    @classmethod
    def load(cls, entries: Sequence[Entry], tokenizer: Any = None) -> "Reader":
        """The model of these SAEs, computing in the precision that `pipeline steer` takes; `tokenizer` is its whole
        one, where that is loaded already.

        Raises UserError where there is none, and as loading one does.
        """
        runs = entries[0].runs
        config, settings = runs.config, runs.config.evaluate
        if config.model is None or config.sample is None:
            raise UserError("these rows were ingested without a model, so there is none to read or write text")
        where = config.model, resolved_commit(runs.inputs.model), settings.runtime.offline
        device = resolve_device(settings.runtime.device)
        set_threads(settings.runtime.threads, device)
        dtype = resolve_dtype(settings.downstream.compute_dtype if settings.downstream else "auto", device)
        contexts = runs.directory("sample") / "contexts"
        tokenizer = tokenizer or load_whole_tokenizer(*where)
        hooks = list(dict.fromkeys(entry.hook for entry in entries))
        return cls(
            load_model(*where[:2], hooks, dtype, device, offline=where[2], with_head=True),
            tokenizer,
            DocumentTokenizer(tokenizer, config.sample, embedding_rows(*where)),
            Contexts(contexts).bos if contexts.exists() else None,
        )

    @property
    def causal(self) -> Any:
        """The model as transformers has it."""
        return self.model.model

    @cached_property
    def weights(self) -> PackedWeights:
        """Its weights for products of few rows, on a CPU."""
        return PackedWeights(self.causal, self.model.device)

    @property
    def has_chat(self) -> bool:
        """Whether a text can be read as a user's turn."""
        return has_chat_template(self.tokenizer)

    def sae(self, shelf: Shelf) -> SavedSae:
        """The SAE of a shelf on the model's device.

        Raises UserError where its run was deleted, and for one that does not fit the model.
        """
        saved = shelf.saved
        if shelf not in self._saes:
            check_fit(self._up_to(saved.hook), saved)
            self._saes[shelf] = saved._replace(sae=saved.sae.to(self.model.device))
            if len(self._saes) > ON_DEVICE:
                self._saes.popitem(last=False)
        self._saes.move_to_end(shelf)
        return self._saes[shelf]

    def read(self, shelf: Shelf, text: str, *, chat: bool = False, within: bool = False) -> Read:
        """The features of a text; of one with more than `limit` tokens those of the first, which `cut` says.

        `chat` reads it as a user's turn by the model's chat template, `within` as a document that is not the first of
        its context: an end token comes before it, in `ids` too, and takes the first position (`by_example`). Raises
        UserError for a text without tokens, and for a model without what is asked.
        """
        saved = self.sae(shelf)
        whole = self.prompt_ids(text, chat=True) if chat else self.text_ids(text)
        has_bos, end = whole[0] == self.documents.bos_id, self.tokenizer.eos_token_id
        lead = [end] if within and not has_bos and end is not None else []
        whole = lead + whole
        ids = whole[: self.limit]
        acts_SD = self._rows(saved.hook, ids)
        rule = Exclusion(shelf.entry.runs.config.exclude, saved.statistics.norm_limit)
        kept_S = kept_in_text(rule, np.array([ids], np.uint32), acts_SD)
        kept_S[: len(lead)] = False
        parts = [saved.sae.nonzeros(part_BD) for part_BD in acts_SD.split(max(1, AT_ONCE // saved.sae.d_sae))]
        counts = np.concatenate([[0], *(np.diff(part.offset_B.cpu().numpy()) for part in parts)])
        return Read(
            ids,
            [self.documents.text(token) for token in ids],
            len(whole) if len(whole) > len(ids) else None,
            kept_S,
            counts.cumsum(dtype=np.int64),
            torch.cat([part.feature_N for part in parts]).int().cpu().numpy(),
            torch.cat([part.f_N for part in parts]).float().cpu().numpy(),
        )

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text as the sample stage reads a document.

        Raises UserError for one that has none.
        """
        try:
            ids = self.documents.encode([[Segment(text, False)]])[0].tolist()
        except (TypeError, UnicodeEncodeError):
            raise UserError("the text is not UTF-8: it holds half a character (a surrogate alone)") from None
        bos = self.documents.bos_id
        if not [token for token in ids if token != bos]:
            raise UserError("the text is empty; give it at least a word")
        return [bos, *ids] if self.documents.bos == "context" and bos is not None and ids[0] != bos else ids

    def prompt_ids(self, prompt: Prompt, chat: bool | None = None) -> list[int]:
        """Tokens of a prompt as `pipeline steer` reads it; of a conversation, with a turn of the model begun.

        Raises UserError for an empty one, and without a chat template for a conversation or `chat`.
        """
        if not self.has_chat and (chat or not isinstance(prompt, str)):
            raise UserError("this model's tokenizer has no chat template; give it plain text, without chat")
        return prompt_ids(self.tokenizer, [prompt], chat, self.bos)[0]

    @torch.inference_mode()
    def _rows(self, hook: str, ids: Sequence[int]) -> Tensor:
        """The model's activations (S, D) at a hook, behind which nothing is computed."""
        is_same = self.causal.dtype == torch.bfloat16  # packed weights change no bit of these products
        with self.weights() if is_same else nullcontext():
            return self._up_to(hook).activations(torch.tensor([ids]))[hook][0]

    def _up_to(self, hook: str) -> HookedModel:
        """The model with this hook alone, at which its pass ends."""
        return HookedModel(self.causal, {hook: self.model.modules[hook]}, self.model.device, self.model.layers)


def summed(read: Read, table: FeatureTable) -> list[dict[str, Any]]:
    """A line for each feature of a text, the largest activation first; rows that training leaves out do not count.

    `max`, the token `at` which it is, `sum`, `count` of tokens, and `unusual`: −log10 of the probability that a feature
    of its held-out density fires at so many of the text's tokens or more, if they were independent. What
    `FeatureTable.of` says comes with it, its own `max` as `held_out_max`.
    """
    counted_N = read.kept_S[read.token_N]
    feature_N, token_N, value_N = (each[counted_N] for each in (read.feature_N, read.token_N, read.value_N))
    features, index_N, count_K = np.unique(feature_N, return_inverse=True, return_counts=True)
    best_K = np.lexsort((-value_N, index_N))[count_K.cumsum() - count_K]
    sum_K = np.bincount(index_N, value_N, len(features))
    about = table.of(features.tolist())
    density_K = np.array([about[feature]["density"] for feature in features.tolist()])
    unusual_K = _unusual(count_K, int(read.kept_S.sum()), density_K)
    lines = [
        about[int(feature)]
        | {
            "held_out_max": about[int(feature)]["max"],
            "feature": int(feature),
            "max": float(value_N[best]),
            "at": int(token_N[best]),
            "sum": float(total),
            "count": int(count),
            "unusual": float(unusual),
        }
        for feature, best, total, count, unusual in zip(features, best_K, sum_K, count_K, unusual_K, strict=True)
    ]
    return sorted(lines, key=lambda line: -line["max"])


def _unusual(count_K: np.ndarray, tokens: int, density_K: np.ndarray) -> np.ndarray:
    """−log10 P(X ≥ count), X binomial over the tokens: the regularized incomplete beta function."""
    p_K = np.clip(density_K, RAREST, 1)
    return 0 - np.log10(np.maximum(betainc(count_K, tokens - count_K + 1, p_K), np.finfo(float).tiny))


def by_example(yes: Sequence[Read], no: Sequence[Read]) -> list[dict[str, Any]]:
    """Features that fire in the texts of `yes` more often than in those of `no`, best first.

    `yes_texts` and `no_texts` count the texts that a feature fires in, `yes` and `no` are its largest activations
    there. Sorted by the difference of the parts of texts, then by that of the largest activations. Rows that training
    leaves out do not count, so a text of one token needs `read(..., within=True)`.
    """
    found: dict[int, dict[str, Any]] = {}
    for side, reads in (("yes", yes), ("no", no)):
        for read in reads:
            counted_N = read.kept_S[read.token_N]
            peaks: dict[int, float] = {}
            for feature, value in zip(
                read.feature_N[counted_N].tolist(), read.value_N[counted_N].tolist(), strict=True
            ):
                peaks[feature] = max(value, peaks.get(feature, 0.0))
            for feature, peak in peaks.items():
                line = found.setdefault(
                    feature, {"feature": feature, "yes": 0.0, "no": 0.0, "yes_texts": 0, "no_texts": 0}
                )
                line[side] = max(line[side], peak)
                line[f"{side}_texts"] += 1

    def more(line: dict[str, Any]) -> float:
        return line["yes_texts"] / len(yes) - line["no_texts"] / max(1, len(no))

    chosen = [line for line in found.values() if more(line) > 0]
    return sorted(chosen, key=lambda line: (-more(line), line["no"] - line["yes"], line["feature"]))
