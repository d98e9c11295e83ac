"""Settings of the train stage."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from harvest.config import ComputeDtype, Device, Seed, Settings, check_different

TRAIN_VERSION = 3


class Kind(NamedTuple):
    """A kind of SAE that can be trained."""

    place: str  # of its class
    hyperparameters: tuple[str, ...]  # settings of train.sae that are its own; those of other kinds are refused


AUX = ("aux_coefficient", "aux_k", "dead_after")
START = "b_dec_init_method"
KINDS = {
    "standard": Kind("train.standard:Standard", ("l1_coefficient",)),
    "topk": Kind("train.topk:TopK", (START, "k", *AUX)),
    "batchtopk": Kind("train.batchtopk:BatchTopK", (START, "k", *AUX)),
    "jumprelu": Kind("train.jumprelu:JumpRelu", (START, "l0_coefficient", "target_l0", "bandwidth")),
    "matryoshka": Kind("train.matryoshka:Matryoshka", (START, "k", "prefixes", *AUX)),
}
DEFAULTS = {
    "l1_coefficient": 5.0, "k": 64, "aux_coefficient": 1 / 32,
    "l0_coefficient": 1.0, "target_l0": 64.0, "bandwidth": 2.0, START: "mean",
}  # fmt: skip
OPTIONAL = ("target_l0",)  # may be null although they have a default
HYPERPARAMETERS = tuple(dict.fromkeys(name for kind in KINDS.values() for name in kind.hyperparameters))
SPARSITY_SETTINGS = ("k", "l1_coefficient", "l0_coefficient", "target_l0")  # what moves an SAE along its frontier


def exactly(value: Any) -> str:
    """Text of a setting; a float in as few digits as tell it apart."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def said(kind: str, hyperparameters: Mapping[str, Any]) -> str:
    """A kind and its hyperparameters for people, as `batchtopk, k = 34`; without those that are None."""
    given = {name: value for name, value in hyperparameters.items() if value is not None}
    return ", ".join([kind, *(f"{name} = {exactly(value)}" for name, value in given.items())])


def said_of(sae: Mapping[str, Any]) -> str:
    """The same of what sets the sparsity, from settings of train.sae that a manifest holds."""
    kind = sae.get("kind", SaeConfig.model_fields["kind"].default)  # left out while it is that
    return said(kind, {name: sae.get(name) for name in SPARSITY_SETTINGS})


def _own(name: str, **limits: Any) -> Any:
    """A setting of some kinds alone; None for the others."""

    def default(chosen: dict[str, Any]) -> Any:
        kind = KINDS.get(chosen.get("kind", ""))
        return DEFAULTS.get(name) if kind and name in kind.hyperparameters else None

    added = name != "l1_coefficient"
    return Field(default_factory=default, json_schema_extra={"added": True} if added else None, **limits)


class SaeConfig(Settings):
    """Kind, shape and sparsity of an SAE."""

    kind: str = Field(default="standard", json_schema_extra={"added": True})
    """standard (ReLU and an L1 penalty), topk, batchtopk, jumprelu or matryoshka. Each has settings of its own here."""
    d_sae: int | None = Field(default=None, ge=1, lt=2**31)
    """Number of features. Exactly one of d_sae and expansion_factor."""
    expansion_factor: int | None = Field(default=None, ge=1, lt=2**20)
    """d_sae as a multiple of d_in."""
    l1_coefficient: float | None = _own("l1_coefficient", ge=0)
    """standard: λ, weight of the sparsity penalty. Comparable only at the input scale √d_in that we train at."""
    k: int | None = _own("k", ge=1)
    """topk: features that are active in a row; batchtopk, matryoshka: on average over a batch. Where fewer are positive
    they are all active, and L0 counts those."""
    aux_coefficient: float | None = _own("aux_coefficient", ge=0)
    """topk, batchtopk, matryoshka: weight of what dead features leave of the residual; 0 leaves them alone."""
    aux_k: int | None = _own("aux_k", ge=1)
    """The same: dead features that rebuild a row's residual. Default d_in / 2."""
    dead_after: int | None = _own("dead_after", ge=1)
    """The same: a feature is dead that fired in none of so many rows. Default 10M, or a tenth of an
    epoch if that is fewer."""
    b_dec_init_method: Literal["mean", "zeros"] | None = _own(START)
    """All but standard: b_dec starts as the mean of the first window's rows, and b_enc such that W_enc sees rows less
    it; or both start at zero. Nothing to an SAE that start_from gives."""
    l0_coefficient: float | None = _own("l0_coefficient", ge=0)
    """jumprelu: weight of L0, or with target_l0 of its distance from that."""
    target_l0: float | None = _own("target_l0", gt=0)
    """jumprelu: rows pay for the square of their distance from this L0; null: for L0 itself, at some 0.2 each."""
    bandwidth: float | None = _own("bandwidth", gt=0)
    """jumprelu: width of the stretch around a threshold in which a pre-activation moves it (rows have norm √d_in)."""
    prefixes: tuple[Annotated[int, Field(ge=1)], ...] | None = _own("prefixes")
    """matryoshka: how many first features rebuild a row alone, up to d_sae. Default d_sae over 16, 8, 4, 2 and 1."""

    @model_validator(mode="after")
    def _check(self) -> "SaeConfig":
        if (self.d_sae is None) == (self.expansion_factor is None):
            raise ValueError("set exactly one of d_sae and expansion_factor (null takes one away)")
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r}: known kinds are {', '.join(KINDS)}")
        return self

    def check(self, kinds: Sequence[str]) -> None:
        """Raise ValueError for a setting that none of these kinds has, or that one needs and null took away."""
        needed = {name for kind in kinds for name in KINDS[kind].hyperparameters}
        for name in (name for name in HYPERPARAMETERS if name in self.model_fields_set):
            value, of = getattr(self, name), ", ".join(kinds)
            if value is None and name in needed and name in DEFAULTS and name not in OPTIONAL:
                raise ValueError(f"sae.{name}: kind {of} needs {name}; leave it out for its default")
            if value is not None and name not in needed:
                having = ", ".join(kind for kind, about in KINDS.items() if name in about.hyperparameters)
                text = f"sae.{name} = {exactly(value)} is a setting of kind {having}, and kind is {of}"
                raise ValueError(f"{text}; train.sae.{name}=null takes it away")

    def of_kind(self, kind: str, **chosen: Any) -> "SaeConfig":
        """The same of another kind, with those settings that it has, and these ones in their place."""
        own = KINDS[kind].hyperparameters
        given = self.model_dump(exclude_unset=True).items()
        kept = {name: value for name, value in given if name in own or name not in HYPERPARAMETERS}
        return SaeConfig.model_validate(kept | {"kind": kind} | chosen)

    def hyperparameters(self) -> dict[str, Any]:
        """The settings that the kind's class takes, by name."""
        names = KINDS[self.kind].hyperparameters
        return {name: getattr(self, name) for name in names if name not in ("dead_after", START)}

    def said(self, everything: bool = False) -> str:
        """Its kind and what sets its sparsity, as `batchtopk, k = 34`, or with all that the kind's own settings say."""
        return said(self.kind, self.hyperparameters()) if everything else said_of(self.model_dump())

    def width(self, d_in: int) -> int:
        """d_sae for rows of this width."""
        return self.d_sae or (self.expansion_factor or 0) * d_in


class ExcludeConfig(Settings):
    """Rows that are not trained on."""

    setting: ClassVar[str] = "train.exclude"  # as messages name it
    token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Rows of these tokens are not trained on (the paper: 128000 and 128001, BOS and EOS)."""
    positions: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Rows at these positions of a context are not trained on (0: the attention sink)."""
    norm_above_median: float | None = Field(default=10.0, gt=1)
    """Rows whose norm is above this multiple of the median norm are not trained on; null keeps them.
    A few such rows hold nearly all squared norm and would drown the rest."""

    @model_validator(mode="after")
    def _check(self) -> "ExcludeConfig":
        check_different("token_ids", self.token_ids)
        check_different("positions", self.positions)
        return self

    def check_positions(self, context_size: int) -> None:
        """Raise ValueError for positions that no context has."""
        if beyond := [position for position in self.positions if position >= context_size]:
            said = f"{self.setting}.positions: {beyond[0]}: a context has positions 0 to {context_size - 1}"
            raise ValueError(f"{said} (context_size), so this leaves out nothing")


def check_within(file: str) -> None:
    """Raise ValueError for a place that leaves the path it is relative to."""
    if ".." in file.split("/") or file.startswith("/"):
        raise ValueError(f"file: {file!r} must stay within path")


class StartFrom(Settings):
    """A finished SAE. A path alone stands for it."""

    path: str
    """A train directory (of several hooks, the same hook's SAE is taken), the folder of one SAE in it, a SAELens
    folder, or a hub id. Enters the fingerprint by content, or by commit."""
    revision: str | None = None
    """Hub commit; a branch is resolved once and recorded."""
    file: str = ""
    """Place of the SAELens folder within `path` (`blocks.19.hook_resid_post`)."""

    @model_validator(mode="before")
    @classmethod
    def _of_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check(self) -> "StartFrom":
        check_within(self.file)
        return self


class SweepConfig(Settings):
    """Several values of a setting: an SAE for each combination, from one reading of the store.

    A kind takes the values of its own settings alone: kind [standard, topk], l1_coefficient [3, 5] and k [16, 34] are
    four SAEs, not eight. What is one value for all of a kind stays in train.sae, of whichever of the kinds.
    """

    kind: tuple[str, ...] = ()
    """Values of train.sae.kind, in whose place they are."""
    k: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Values of train.sae.k."""
    l1_coefficient: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Values of train.sae.l1_coefficient."""
    l0_coefficient: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Values of train.sae.l0_coefficient."""
    target_l0: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Values of train.sae.target_l0."""
    lr: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Values of train.lr."""
    d_sae: tuple[Annotated[int, Field(ge=1, lt=2**31)], ...] = ()
    """Values of train.sae.d_sae."""

    @model_validator(mode="after")
    def _check(self) -> "SweepConfig":
        for name, values in self:
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names a value twice")
        for kind in self.kind:
            if kind not in KINDS:
                raise ValueError(f"kind: {kind!r}: known kinds are {', '.join(KINDS)}")
        return self


class TrainRuntime(Settings):
    """What changes no result."""

    device: Device = "auto"
    """auto takes a GPU where there is one."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 takes all cores. Recorded in the numerics: another number may change last bits."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int | None = Field(default=1000, ge=1)
    """Steps between checkpoints; null leaves them to checkpoint_minutes. One is also written at Ctrl-C."""
    checkpoint_minutes: float | None = Field(default=None, gt=0)
    """One is also written, at the next log line, when the last is so many minutes old; null: never."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that are kept."""
    spike_factor: float | None = Field(default=10.0, gt=1)
    """Stop when a logged loss is above this multiple of the median of the 20 logged before; null goes on."""
    peers_seconds: float = Field(default=60.0, gt=0)
    """Started as one of several processes: how long to wait at the start for the others."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Send the figures of metrics.jsonl there too (its package must be installed)."""
    offline: bool = False
    """Of start_from, use only what the hub's local cache holds."""

    @model_validator(mode="after")
    def _check(self) -> "TrainRuntime":
        if self.checkpoint_every is None and self.checkpoint_minutes is None:
            raise ValueError("set checkpoint_every, checkpoint_minutes or both: a killed run would begin anew")
        return self

    def checkpoints(self, steps: int, seconds: float) -> int:
        """How many are written at least in so many steps that take so many seconds."""
        by_steps = steps // self.checkpoint_every if self.checkpoint_every else 0
        return max(by_steps, int(seconds / 60 / self.checkpoint_minutes) if self.checkpoint_minutes else 0)


class TrainConfig(Settings):
    """Settings of the train stage."""

    sae: SaeConfig
    training_tokens: int | None = Field(default=None, ge=1)
    """Rows that the SAE sees, whole batches. Exactly one of training_tokens and epochs."""
    epochs: float | None = Field(default=None, gt=0)
    """The same as a multiple of the training rows of the store, excluded ones not counted out."""
    batch_size: int = Field(default=4096, ge=2, lt=2**31)
    """Rows of a step."""
    lr: float = Field(default=5e-5, ge=0)
    """Adam's learning rate, constant until the decay. 0 keeps the weights of start_from."""
    lr_decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Last part of the steps, over which lr falls linearly to 0."""
    l1_warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """First part of the steps, over which the coefficients of the loss (λ, l0_coefficient) rise linearly from 0."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's decay rates."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Global gradient norm that a step is clipped to."""
    exclude: ExcludeConfig = ExcludeConfig()
    window_shards: int = Field(default=128, ge=1)
    """Shards of a window: consecutive shards whose chunks are read in random order."""
    pool_rows: int = Field(default=131_072, ge=1, lt=2**40)
    """Rows that are shuffled together in memory; two pools are held."""
    kernel: Literal["auto", "dense", "sparse"] = "auto"
    """How gradients are computed: by five dense products, from the non-zeros alone (the same, faster while
    few features are active), or whichever suits the L0 of some steps before."""
    sparse_below: float = Field(default=0.01, gt=0, le=1)
    """auto goes sparse when L0 falls below this part of d_sae, and back to dense above twice as much."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of the matrix products; weights, sums and Adam stay float32. auto: as harvest.compute_dtype."""
    validate_every: int = Field(default=1000, ge=1)
    """Steps between looks at held-out rows; chooses the best SAE."""
    validation_rows: int = Field(default=16_384, ge=1)
    """Held-out rows of a look."""
    seed: Seed = 0
    """Initial weights and order of rows."""
    start_from: StartFrom | None = Field(default=None, json_schema_extra={"added": True})
    """An SAE whose weights and input scale start the training, of the same kind and width; Adam's moments start at
    zero, hyperparameters are those set here."""
    sweep: SweepConfig | None = Field(default=None, json_schema_extra={"added": True})
    """Several SAEs from one reading of the store: every combination of these values, each with a folder and
    a fingerprint of its own, as if it were trained alone."""
    runtime: TrainRuntime = TrainRuntime()

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        kinds = self.kinds
        for name, values in self.sweep or ():
            if values and name in HYPERPARAMETERS and not any(name in KINDS[kind].hyperparameters for kind in kinds):
                raise ValueError(f"sweep.{name}: kind {', '.join(kinds)} has no {name}")
        self.sae.check(kinds)
        if self.sweep and self.sweep.kind and self.start_from:
            raise ValueError("sweep.kind: not together with start_from, whose SAE is of one kind")
        if self.sweep and self.sweep.d_sae and self.sae.d_sae is None:
            raise ValueError("sweep.d_sae needs sae.d_sae instead of sae.expansion_factor")
        if self.sweep and self.sweep.d_sae and self.start_from:
            raise ValueError("sweep.d_sae: not together with start_from, whose SAE has one width")
        if self.lr == 0 and not self.start_from:
            raise ValueError("lr: 0: trains nothing; give a rate above 0 (0 is for start_from alone)")
        if (self.training_tokens is None) == (self.epochs is None):
            raise ValueError("set exactly one of training_tokens and epochs (null takes one away)")
        if self.training_tokens is not None and self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens: {self.training_tokens:,}: less than one batch of batch_size = {self.batch_size:,}; "
                "raise it or lower batch_size"
            )
        return self

    def batches(self, rows: int) -> int:
        """Steps of a run over so many training rows.

        Raises ValueError where epochs do not fill a batch.
        """
        tokens = self.training_tokens or int((self.epochs or 0) * rows)
        if tokens < self.batch_size:
            raise ValueError(
                f"train.epochs: {self.epochs:g}: gives {tokens:,} of the {rows:,} training rows, less than one batch "
                f"of train.batch_size = {self.batch_size:,}; raise it or lower train.batch_size"
            )
        return tokens // self.batch_size

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of SAE that these settings train."""
        return (self.sweep and self.sweep.kind) or (self.sae.kind,)

    def expanded(self) -> list["TrainConfig"]:
        """The single settings that a sweep stands for; without one, these settings."""
        if self.sweep is None:
            return [self]
        swept = {name: values for name, values in self.sweep if values and name != "kind"}
        out = []
        for kind in self.kinds:
            own = [n for n in swept if n not in HYPERPARAMETERS or n in KINDS[kind].hyperparameters]
            for values in itertools.product(*(swept[name] for name in own)):
                chosen = dict(zip(own, values, strict=True))
                lr = chosen.pop("lr", self.lr)
                sae = self.sae.of_kind(kind, **chosen)
                out.append(self.model_copy(update={"sae": sae, "lr": lr, "sweep": None}))
        return out
