"""What can be looked at: the SAEs of finished evaluations, and of each what is loaded, once, when first asked for.

Shape suffixes: V vocabulary, D d_in.
"""

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from evaluate.activity import Activity, read_activity
from evaluate.explain import by_feature
from evaluate.feature_pages import read_scores, usable, weigh
from evaluate.feature_views import Site, Views, Weighed
from evaluate.figures import Measured
from evaluate.operations import check_features
from evaluate.reason_score import sources_read
from evaluate.token_identity import read_identity
from evaluate.unembedding import Unembedding, load_unembedding, token_logits
from harvest.activation_store import slug
from harvest.device import resolve_device
from harvest.files import UserError, read_json
from harvest.hub import resolved_commit
from harvest.tokenizer import load_tokenizer
from pipeline.explore.features import FeatureTable
from pipeline.metrics import read_evaluation
from pipeline.stages import Runs, explained, swept
from pipeline.steer import saved_sae
from train.checkpoint import ABOUT, SavedSae

T = TypeVar("T")
NO_MODEL = "ingested rows have no model"
HELD = 1 << 29  # bytes of the LM head as float32, up to which it is kept so


class Entry(NamedTuple):
    """An SAE that can be looked at."""

    id: str  # safe in a URL and unique: the hook, and what a sweep varies
    title: str  # for people
    runs: Runs  # its settings and directories
    hook: str


class Once(Generic[T]):
    """Something that is made when it is first asked for, once, whatever thread asks; after an error anew."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock = make, threading.RLock()
        self._made: list[T] = []

    def __call__(self) -> T:
        """What is made."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


class Language:
    """The parts of the settings' model that tell what tokens are, without its layers; all entries share them."""

    def __init__(self, runs: Runs) -> None:
        model, runtime = runs.config.model, runs.config.evaluate.runtime
        offline, device = runtime.offline, resolve_device(runtime.device)
        commit = resolved_commit(runs.inputs.model) if model else None
        self.is_there = bool(model)  # ingested rows have no model
        self.tokenizer = Once(lambda: load_tokenizer(model, commit, offline))
        self._end = Once(lambda: _loaded_end(lambda: load_unembedding(model, commit, offline), device))

    def unembedding(self) -> Unembedding:
        """Final norm and LM head. Raises UserError where they cannot be used, after one attempt to load them."""
        found = self._end()
        if isinstance(found, UserError):
            raise found
        return found

    def text(self, token: int) -> str:
        """What a token adds to a text; empty where there is no model."""
        return self.tokenizer().text(token) if self.is_there else ""

    def joined(self, tokens: Sequence[int]) -> str:
        """The text of tokens, where a character may be made of several."""
        return self.tokenizer().whole.decode(list(tokens), skip_special_tokens=False)

    def vocabulary(self) -> int:
        """Tokens that it has."""
        return self.tokenizer().whole.get_vocab_size() if self.is_there else 0


def find_entries(sweep: Sequence[Runs]) -> list[Entry]:
    """The SAEs of finished evaluations of these settings: of all hooks and all values of a sweep.

    Raises UserError where none is finished, and for one whose figures are damaged.
    """
    entries: dict[str, Entry] = {}
    for runs in sweep:
        if not runs.of("evaluate").is_complete:
            continue
        saes = [sae for sae in read_evaluation(runs.of("evaluate")).saes if not sae.name]
        for hook in (sae.hook for sae in saes):
            named = "-".join(filter(None, (slug(hook), _url_safe(swept(runs, sweep, "-", "-")))))
            own = next(each for each in (named, *(f"{named}-{n}" for n in range(2, 10_000))) if each not in entries)
            label = runs.config.published.label if runs.config.published else ""
            title = ", ".join(filter(None, (hook, swept(runs, sweep), label)))
            entries[own] = Entry(own, title, runs, hook)
    if not entries:
        directory = sweep[0].directory("evaluate")
        raise UserError(
            f"explore: the evaluate stage for these settings is not complete ({directory}); run `make all` with the "
            "same CONFIG and SET first"
        )
    return list(entries.values())


def open_shelves(entries: Sequence[Entry]) -> dict[str, "Shelf"]:
    """A shelf of each entry by its id; nothing is read yet."""
    language = Language(entries[0].runs)
    return {entry.id: Shelf(entry, language) for entry in entries}


class Shelf:
    """What of an entry is loaded; safe for several threads. All of it raises UserError where its runs were deleted."""

    def __init__(self, entry: Entry, language: Language) -> None:
        self.entry, self.language = entry, language
        self._once: dict[str, Once[Any]] = {
            name: Once(make)
            for name, make in (
                ("measured", self._load_measured),
                ("saved", lambda: saved_sae(entry.runs, entry.runs.directory("train"), entry.hook)),
                ("activity", self._load_activity),
                ("views", self._load_views),
                ("table", self._load_table),
            )
        }

    @property
    def saved(self) -> SavedSae:
        """The SAE that was evaluated, on the CPU."""
        return self._open("saved")

    @property
    def activity(self) -> Activity:
        """What all features did on the held-out rows."""
        return self._open("activity")

    @property
    def views(self) -> Views:
        """What makes the views of its features; `site` in it is all that they are made from."""
        return self._open("views")

    @property
    def table(self) -> FeatureTable:
        """What is known of all features."""
        return self._open("table")

    def text(self, token: int) -> str:
        """What a token adds to a text; empty where there is no model."""
        return self.language.text(token)

    def view(self, feature: int) -> dict[str, Any]:
        """What the page of a feature shows (evaluate/feature_views.py).

        Raises UserError for a number that the SAE does not have.
        """
        return self.views.of(feature, self.weighed(feature))

    def weighed(self, feature: int) -> Weighed:
        """What the weights alone say of a feature. Raises UserError for a number that the SAE does not have."""
        check_features([feature], self.saved.sae.d_sae, "feature")
        return weigh(self.saved.sae.W_dec, np.array([feature]), self._end()[0])[feature]

    def about(self) -> dict[str, Any]:
        """What a list of SAEs says of it; weights and activity are not loaded for it."""
        self.check()
        entry, config = self.entry, self.entry.runs.config
        said, lists = read_json(self._folder() / ABOUT), self._open("measured").lists
        return {
            "id": entry.id,
            "title": entry.title,
            "hook": entry.hook,
            "kind": said["architecture"],
            "d_in": said["d_in"],
            "d_sae": said["d_sae"],
            "sources": [source.name for source in config.sample.sources] if config.sample else [],
            "has": {
                "score": self._file("reason_score", ".npz").exists(),
                "injection": bool(lists.get("token_injection")),
                "labels": bool(labels(entry.runs, entry.hook)),
            },
        }

    def check(self) -> None:
        """Raise UserError where a run of it is not there any more."""
        for stage in ("train", "evaluate"):
            run = self.entry.runs.of(stage)
            if not run.is_complete:
                raise UserError(f"{run.path}: was deleted while it was looked at; {run.way_out}, then explore again")

    def _open(self, name: str) -> Any:
        self.check()
        try:
            return self._once[name]()
        except (OSError, UserError):
            self.check()  # a file that is missing as all of them are says less
            raise

    def _folder(self) -> Path:
        config, folder = self.entry.runs.config, self.entry.runs.directory("train") / slug(self.entry.hook)
        return folder / "best" if config.evaluate.sae == "best" else folder

    def _file(self, name: str, suffix: str) -> Path:
        return self.entry.runs.directory("evaluate") / f"{name}-{slug(self.entry.hook)}{suffix}"

    def _end(self) -> tuple[Unembedding | None, str]:
        if not self.language.is_there:
            return None, NO_MODEL
        return usable(self.language.unembedding, self.saved.sae.d_in)

    def _load_activity(self) -> Activity:
        if not self.entry.runs.config.evaluate.features:
            raise UserError("evaluate.features: null: nothing is known of single features; leave it as it is")
        return read_activity(self._file("activity", ".safetensors"))

    def _load_views(self) -> Views:
        runs, hook, activity = self.entry.runs, self.entry.hook, self.activity
        config = runs.config.evaluate.features
        assert config  # there is activity
        injected = self._open("measured").lists.get("token_injection", {}).get("features", ())
        site = Site(
            hook,
            activity,
            self.text,
            self._end()[1],
            read_scores(self._file("reason_score", ".npz")),
            read_identity(self._file("token_identity", ".npz")),
            {each["feature"]: each for each in injected},
            labels(runs, hook),
        )
        return Views(site, config)

    def _load_table(self) -> FeatureTable:
        site = self.views.site
        sources = list(site.by_source())
        read = sources_read(self.entry.runs.config.evaluate.reason_score, sources)
        return FeatureTable(site, [sources[n] for n in read], self._logits, self.language.vocabulary())

    def _load_measured(self) -> Measured:
        found = read_evaluation(self.entry.runs.of("evaluate")).own(self.entry.hook)
        assert found  # as `find_entries` saw
        return found

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        unembedding, why_none = self._end()
        if not unembedding:
            raise UserError(f"promotes: {why_none}")
        return token_logits(unembedding, self.saved.sae.W_dec, tokens).cpu().numpy()


def _loaded_end(load: Callable[[], Unembedding], device: torch.device) -> Unembedding | UserError:
    try:
        return _quick(load(), device)
    except UserError as error:
        return error


def _quick(unembedding: Unembedding, device: torch.device) -> Unembedding:
    """The same on the device, with a head in float32 unless that is large: on a CPU to convert it takes longer than to
    multiply by it."""
    head_VD = unembedding.head_VD.to(device)
    head_VD = head_VD.float() if 4 * head_VD.numel() <= HELD else head_VD
    return unembedding._replace(gain_D=unembedding.gain_D.to(device), head_VD=head_VD)


def labels(runs: Runs, hook: str) -> dict[int, dict[str, Any]]:
    """Explanations by feature; of several runs of explain the newest speaks last."""
    found: dict[int, dict[str, Any]] = {}
    for run in reversed(explained(runs)):
        measured: Measured | None = read_evaluation(run).own(hook)
        if measured and "explanations" in measured.lists:
            found |= by_feature(measured.lists)
    return found


def _url_safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)
