"""Settings of the sample and harvest stages. No torch here: a settings error must answer at once.

`runtime` sections hold what never changes a result and stay out of every fingerprint; all else is hashed.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

SAMPLE_VERSION = 2
HARVEST_VERSION = 1
LARGEST = 1e30  # of any number in the settings: products with it stay within float32

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Device = Literal["auto", "cpu", "cuda"]
ComputeDtype = Literal["auto", "bfloat16", "float32"]
StoredForm = Literal["bf16", "bf16-zstd", "int8"]


class Settings(BaseModel):
    """Frozen and strict: an unknown name is an error, a derived value is a property."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_given(cls, value: Any, about: ValidationInfo) -> Any:
        kinds = {cls.model_fields[about.field_name or ""].annotation}
        kinds |= {kind for union in kinds if get_origin(union) is not tuple for kind in get_args(union)}
        for given in value if isinstance(value, list) else (value,) if kinds & {int, float, str} else ():
            if isinstance(given, bool):
                raise ValueError("a number or text is meant, not true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _check_value(cls, value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, int | float) and not abs(each) <= LARGEST:
                raise ValueError(f"a finite number of at most {LARGEST:g} is meant")
            if isinstance(each, str) and any("\ud800" <= c <= "\udfff" for c in each):
                raise ValueError("holds half of a surrogate pair, which is no character")
        return value


def check_different(setting: str, values: Sequence[Any]) -> None:
    """Raise ValueError where a list names something twice, which would count as once."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{setting}: names {value!r} twice; leave one of them out")


class ModelConfig(Settings):
    """The language model."""

    name: str
    """Hub id, or a folder with config.json, safetensors and the tokenizer. Enters the fingerprint by
    commit or by content hash, never by path."""
    revision: str | None = None
    """Hub commit; a branch is resolved once and recorded. Not for local folders."""


Value = StrictBool | StrictInt | StrictFloat | StrictStr


class Source(Settings):
    """One source of text."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    """How reports call it: small letters, digits, _ and -, up to 32."""
    path: str
    """Hub id, or local JSON (Lines or an array, also as .gz, .zst, .bz2, .xz), parquet or arrow: a file, a folder (of
    `datasets.save_to_disk` as well), or a glob. `~` is the home directory."""
    revision: str | None = None
    """Hub commit of the data set."""
    subset: str | None = None
    """Configuration of a hub data set, as OpenThoughts-114k's `metadata`."""
    split: str = "train"
    """Split of a hub data set, or of a local folder that has files of several; `train+test` reads both."""
    rows: Literal["conversation", "conversations", "messages", "reasoning", "text", "tokens"]
    """Columns of a row: `conversation` (LMSYS-Chat-1M), `conversations` (OpenThoughts) or `messages`, a list of turns
    with role/content or from/value; `reasoning` problem/deepseek_reasoning/deepseek_solution (OpenThoughts metadata);
    `text`; `tokens`, a list of token ids `input_ids` or `tokens` (SAELens' pre-tokenized sets), taken as they are."""
    share: float = Field(gt=0, le=1)
    """Part of the tokens that this source gives, in both splits."""
    where: dict[str, Value | tuple[Value, ...]] | None = Field(default=None, json_schema_extra={"added": True})
    """Rows to take, by column: a value or a list of values, `{domain: [math, physics], correct: true}`."""
    strata: str | None = Field(default=None, json_schema_extra={"added": True})
    """A column of at most 255 values, each of which gives an equal part of this source's contexts."""
    drop: Literal["few", "any"] = Field(default="few", json_schema_extra={"added": True})
    """few: a row that is damaged, or more than half of the rows without anything usable, is an error. any: such rows
    are left out and counted, however many they are."""

    @field_validator("where")
    @classmethod
    def _check_where(cls, where: dict[str, Any] | None) -> dict[str, Any] | None:
        for column, values in (where or {}).items():
            for value in values if isinstance(values, tuple) else (values,):
                cls._check_value(value)
            if values == ():
                raise ValueError(f"{column}: an empty list takes no row")
        return where


class SampleRuntime(Settings):
    """What changes no context."""

    offline: bool = False
    """Use only what the hub's local cache holds."""


class SampleConfig(Settings):
    """Settings of the sample stage."""

    sources: tuple[Source, ...] = Field(min_length=1, max_length=255)
    """Where text comes from; the shares sum to 1."""
    template: Literal["model", "chatml", "deepseek-r1", "deepseek-r1-paper"] | None = None
    """How a conversation becomes text. `model` is the chat template of the model's tokenizer, and what null means where
    there is one; the others are written out in harvest/templates.py. Sources of `text` and `tokens` take none."""
    bos: Literal["auto", "document", "context", "none"] = Field(default="auto", json_schema_extra={"added": True})
    """Where the tokenizer's BOS stands: at the start of each document, or of each context, or nowhere. auto: each
    document where the template writes one or the tokenizer puts one in front of a text (Gemma, Llama), else nowhere."""
    context_size: int = Field(ge=2, le=65_535)
    """Tokens of a context, the sequence that the model sees."""
    shard_contexts: int = Field(ge=1)
    """Contexts of a shard, the unit of writing and resuming. Splits hold whole shards."""
    train_tokens: int = Field(ge=0)
    """Tokens to sample for training, rounded down to whole shards; 0 beside `published`, where nothing is trained."""
    holdout_tokens: int = Field(ge=1)
    """Tokens held out for evaluation, from documents that training never sees; rounded down as well."""
    holdout_fraction: float = Field(gt=0, lt=1)
    """Part of the documents that is held out, by a hash of the first user turn or the problem."""
    seed: Seed = 0
    """Order of documents and contexts, choice of the held-out ones."""
    runtime: SampleRuntime = SampleRuntime()

    @property
    def shard_rows(self) -> int:
        """Tokens, and so rows, of a shard."""
        return self.shard_contexts * self.context_size

    def shards(self, split: str) -> int:
        """Whole shards of a split, "train" or "holdout"."""
        return (self.train_tokens if split == "train" else self.holdout_tokens) // self.shard_rows

    @model_validator(mode="after")
    def _check(self) -> "SampleConfig":
        total, names = sum(source.share for source in self.sources), [source.name for source in self.sources]
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of sources sum to {total:g}; they must sum to 1")
        if len(set(names)) < len(names) or {"all", "shards", "bos"} & set(names):
            raise ValueError(f"sources need names of their own, not 'all', 'shards' or 'bos': {', '.join(names)}")
        for split in ("train", "holdout"):
            if self.shards(split) < 1 and (split == "holdout" or self.train_tokens):
                raise ValueError(
                    f"{split}_tokens is less than one shard of shard_contexts x context_size = "
                    f"{self.shard_rows} tokens; raise {split}_tokens or lower shard_contexts"
                )
        return self


class HarvestRuntime(Settings):
    """What changes no byte of the store."""

    device: Device = "auto"
    """auto takes a GPU where there is one."""
    offline: bool = False
    """Use only what the hub's local cache holds."""
    store: str | None = Field(default=None, pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*/?$")
    """Where the store lies, `s3://bucket/prefix`; below it in a folder named by the fingerprint. null: in the run's
    folder. Credentials, endpoint and region come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)."""
    allow_http: bool = False
    """Let AWS_ENDPOINT_URL be plain http to another machine: credentials and data are then readable on the way."""
    disk_limit: str | None = Field(
        default=None,
        coerce_numbers_to_str=True,
        pattern=r"(?i)^[0-9]+([.][0-9]+)? ?(shards?|windows?|b|[kmgt]i?b)?$",
    )
    """Of `make stream` only: the most that its training rows may take on the disk, as bytes, `500GB`, `1.5 TB`,
    `12 shards` or `3 windows` (of train.window_shards). It takes two windows, and refuses a lower limit."""
    wait_seconds: float = Field(default=600, ge=0)
    """How long a worker waits for worker 0 to begin the harvest; with a job array, more than that job queues."""

    def store_at(self, fingerprint: str) -> dict[str, Any] | None:
        """What begun.json and the manifest keep of where a store lies; None where it is in the run's folder."""
        if self.store is None:
            return None
        return {"url": f"{self.store.rstrip('/')}/{fingerprint}", "allow_http": self.allow_http}


class HarvestConfig(Settings):
    """Settings of the harvest stage."""

    hooks: tuple[str, ...] = Field(min_length=1)
    """Where activations are taken: module paths (`model.layers.19`) or SAELens names
    (`blocks.19.hook_resid_post`). Several are taken in one pass; each gets its own array and its own SAE."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of the forward pass. The weights are bfloat16 in any case and rows are stored as bfloat16.
    auto: bfloat16, except on GPUs before Ampere and on CPUs without bfloat16 instructions, which emulate it."""
    compile: bool = Field(default=False, json_schema_extra={"added": True})
    """Compile the decoder layers with torch.compile: a quarter faster on an H100. It rounds in fewer places, so rows
    differ in their last bits. Needs a C compiler."""
    batch_contexts: int = Field(default=8, ge=1)
    """Contexts of one forward pass. Hashed, because a row depends in its last bits on the batch's shape."""
    threads: int = Field(default=2, ge=1)
    """CPU threads of one worker. Hashed for the same reason; without effect on a GPU."""
    chunk_rows: int = Field(default=1024, ge=1)
    """Rows of a chunk, the unit of reading. 2 to 8 MB are best."""
    stored: StoredForm = Field(default="bf16", json_schema_extra={"added": True})
    """Form of the rows in the store. bf16-zstd: the same values, compressed, for disks behind a network. int8: in
    blocks of 64 values with a scale each, 1.94 times smaller, not exact."""
    runtime: HarvestRuntime = HarvestRuntime()

    @model_validator(mode="after")
    def _check(self) -> "HarvestConfig":
        check_different("hooks", self.hooks)
        return self


class IngestConfig(Settings):
    """Settings of a harvest stage that takes activations which are there already."""

    path: str
    """Activations that are there already: a `.npy`, `.safetensors`, `.pt` or `.pth` file, a folder of them (taken
    in order of their names), or a folder of `datasets` as SAELens' cache_activations_runner leaves it. Arrays
    are (rows, d_in) or (contexts, context_size, d_in), float32, float16 or bfloat16. Enters the fingerprint by
    content."""
    hooks: tuple[str, ...] = ()
    """Arrays (or columns) to take, by name; each becomes a hook with its own SAE. Empty takes all. Where a file
    holds only one array, this is the name that it gets."""
    token_ids: str | None = None
    """File or folder of token ids, one for each row in the same order, where they do not stand beside the
    activations as `token_ids`. Needed for train.exclude.token_ids alone."""
    context_size: int | None = Field(default=None, ge=1, le=65_536)
    """Rows of a context, where arrays are (rows, d_in) and contexts lie end to end. Without it, a file_is_context
    or a column `context`, held-out rows are blocks of chunk_rows, whose neighbours may be of the same document."""
    file_is_context: bool = False
    """Each file of (rows, d_in) is one context."""
    shard_rows: int = Field(default=16_384, ge=1)
    """Rows of a shard, the unit of writing and resuming. Splits hold whole shards."""
    chunk_rows: int = Field(default=1024, ge=1)
    """Rows of a chunk, the unit of reading; divides shard_rows. 2 to 8 MB are best."""
    stored: StoredForm = "bf16"
    """Form of the rows in the store, as harvest.stored."""
    holdout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Part of the rows that is held out, whole contexts chosen at random; at least one shard."""
    seed: Seed = 0
    """Choice of the held-out contexts, order of contexts and rows."""

    @model_validator(mode="after")
    def _check(self) -> "IngestConfig":
        check_different("hooks", self.hooks)
        if self.context_size and self.file_is_context:
            raise ValueError("set context_size or file_is_context, not both")
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"chunk_rows: {self.chunk_rows}: must divide shard_rows = {self.shard_rows}")
        return self
