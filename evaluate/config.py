"""Settings of the evaluate stage."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from evaluate.spellings import check_words
from harvest.config import ComputeDtype, Device, ModelConfig, Seed, Settings, check_different
from train.published_config import PublishedFiles

EVALUATE_VERSION = 11
LARGEST_STRENGTH = 1e6
Op = Literal["add", "set", "ablate", "scale"]
Where = Literal["all", "prompt", "generated", "thinking"]
AS_IT_IS: dict[Op, float] = {"add": 0.0, "scale": 1.0}  # strengths that change nothing


class DownstreamConfig(Settings):
    """Cross-entropy with the SAE spliced into the model."""

    contexts: int = Field(default=32, ge=1)
    """Held-out contexts that the whole model reads, in order; all if there are fewer."""
    batch_contexts: int = Field(default=4, ge=1)
    """Contexts of one forward pass."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of the forward pass, as harvest.compute_dtype."""


class FeaturesConfig(Settings):
    """Pages of single features."""

    count: int = Field(default=200, ge=1, le=2000)
    """Features that get a page: the best by ReasonScore and a random part; all at random where there is none."""
    random_share: float = Field(default=0.25, ge=0, le=1)
    """Part of them that is drawn at random from those that fire, so that not only the best are seen."""
    include: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Features that get a page in any case."""
    contexts: int = Field(default=12, ge=1, le=100)
    """Strongest contexts on a page."""
    samples: int = Field(default=3, ge=0, le=16)
    """Examples from each quarter of a feature's activations."""
    tokens: int = Field(default=64, ge=4, le=1024)
    """Tokens of a context that are shown; the active one is three quarters in."""
    activity_bytes: int = Field(default=1 << 29, ge=1, json_schema_extra={"added": True})
    """Bound of the file that holds the activity of all features, and of the memory for it: fewer excerpts of each
    feature are kept where they would exceed it."""
    seed: Seed = 0
    """Choice of the random features and of the examples."""

    @model_validator(mode="after")
    def _check(self) -> "FeaturesConfig":
        check_different("include", self.include)
        return self


class ReasonScoreConfig(Settings):
    """Which features fire at words of reasoning."""

    words: tuple[str, ...] = Field(
        default=(
            *("alternatively", "hmm", "maybe", "wait", "perhaps", "let me", "therefore", "however"),
            *("But", "Another"),
        ),
        min_length=1,
    )
    """Words of reasoning. A word in lower case stands for its four spellings (`wait`, ` wait`, `Wait`, ` Wait`); one
    with a capital or a leading space is taken as it is; `hmm|hm` are alternatives that share one group. The default
    is the paper's vocabulary as its code spells it."""
    window: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (1, 2)
    """Tokens before and after each match that belong to it."""
    ignored_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Tokens that count neither inside nor outside, beside the rows that training leaves out (train.exclude)."""
    alpha: float = Field(default=0.7, ge=0)
    """Weight of the entropy over words: 0 ignores it."""
    sources: tuple[str, ...] = ()
    """Sources whose contexts are read, by name; all if empty. The paper reads reasoning text alone."""
    contexts: int | None = Field(default=None, ge=1)
    """Contexts that are read: held-out ones first, then training ones, all if there are fewer; null takes the held-out
    split. Their rows come from the store where it holds them all, else from one forward pass of the model."""
    quantile: float = Field(default=0.997, gt=0, lt=1)
    """Features whose score is above this quantile of all scores are selected (linear interpolation between
    ranks): 197 of 65,536, the paper's 200."""

    @field_validator("words")
    @classmethod
    def _check_words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        check_words(words, apart=True)
        return words

    @model_validator(mode="after")
    def _check(self) -> "ReasonScoreConfig":
        check_different("sources", self.sources)
        return self


class SteeringConfig(Settings):
    """What operations on features do to what the model writes."""

    op: Op = Field(default="add", json_schema_extra={"added": True})
    """What is done to a feature's activation: strength times its largest held-out activation is added to it ("add") or
    put in its place ("set"), it becomes 0 ("ablate"), or strength times what it is ("scale")."""
    where: Where = Field(default="all", json_schema_extra={"added": True})
    """At which tokens: all, those of the prompt, those that the model wrote, or those between <think> and </think>."""
    features: int = Field(default=3, ge=1)
    """How many features are operated on, one at a time, those of the highest ReasonScore."""
    feature_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """These features instead."""
    strengths: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    """γ of the operation; the text without it is written in any case. Where the text repeats itself, it is too much.
    Ablation has none."""
    prompts: tuple[str, ...] = ()
    """What the model is asked; the first `built_in_prompts` of evaluate/prompts.txt if empty."""
    built_in_prompts: int = Field(default=6, ge=1, le=60)
    """How many of the built-in prompts."""
    words: tuple[str, ...] = ()
    """Words that are counted in what it writes; those of reason_score if empty."""
    max_new_tokens: int = Field(default=24, ge=1)
    """Longest completion."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token; R1 wants 0.6."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sampling from the likeliest tokens that make up this probability."""
    seed: Seed = 0
    """Of sampling; the same for all strengths."""

    @field_validator("words")
    @classmethod
    def _check_words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        check_words(words)
        return words

    @model_validator(mode="after")
    def _check(self) -> "SteeringConfig":
        for strength in self.strengths:
            if strength == (as_it_is := AS_IT_IS.get(self.op)):
                raise ValueError(
                    f"strengths: {strength:g}: a strength is a number other than {as_it_is:g}, which is written in any "
                    "case"
                )
            if not abs(strength) <= LARGEST_STRENGTH:
                reason = f"from -{LARGEST_STRENGTH:g} to {LARGEST_STRENGTH:g}"
                raise ValueError(f"strengths: {strength:g}: a strength is a number {reason}")
        for number, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise ValueError(f"prompts.{number}: {prompt!r}: is empty; give it text or leave it out")
        for name in ("strengths", "feature_ids", "prompts", "words"):
            check_different(name, getattr(self, name))
        return self


class TokenInjectionConfig(Settings):
    """Whether a feature's own tokens alone drive it, in text of another source (arXiv 2601.05679)."""

    features: int = Field(default=20, ge=1, le=1000)
    """Features that are tested, those of the highest ReasonScore, and as many random ones of like density."""
    into: tuple[str, ...] = ()
    """Sources whose text tokens are injected into; those that reason_score does not read if empty."""
    texts: int = Field(default=20, ge=4)
    """Injected texts of each feature and strategy."""
    read: int = Field(default=256, ge=4)
    """Texts that are read as they are, of these sources and of the reasoning ones: all features share them."""
    tokens: int = Field(default=24, ge=8)
    """Tokens of every text, injected ones included; a context's, where contexts are shorter."""
    injected: int = Field(default=3, ge=1)
    """Tokens or n-grams that are injected into a text; fewer where half of the text would not stay."""
    seed: Seed = 0
    """Choice of texts, of tokens, of their places and of the control group."""

    @model_validator(mode="after")
    def _check(self) -> "TokenInjectionConfig":
        check_different("into", self.into)
        return self


class AblationConfig(Settings):
    """What the model loses on reasoning text without a feature."""

    features: int = Field(default=10, ge=1)
    """How many features are ablated, one at a time, those of the highest ReasonScore."""
    contexts: int = Field(default=8, ge=1)
    """Held-out contexts of the sources that ReasonScore reads, in order; all if there are fewer."""
    batch_contexts: int = Field(default=4, ge=1)
    """Contexts of one forward pass."""


class DiffConfig(Settings):
    """Firing rates on two sources, or under two models."""

    sources: tuple[str, str] | None = None
    """Two sources whose firing rates are compared; null takes the first two, if there are several."""
    model: ModelConfig | None = None
    """A second model of the same vocabulary and width (the base of a distilled one): it reads the same held-out
    contexts. Enters the fingerprint by content, as `model` does."""
    contexts: int = Field(default=64, ge=1)
    """Held-out contexts that both models read, in order; all if there are fewer."""
    batch_contexts: int = Field(default=4, ge=1)
    """Contexts of one forward pass."""
    present: float = Field(default=1e-3, gt=0, le=1)
    """A feature appears on one side only where its rate is at least this there,"""
    absent: float = Field(default=1e-5, gt=0, le=1)
    """and below this on the other side."""

    @model_validator(mode="after")
    def _check(self) -> "DiffConfig":
        check_different("sources", self.sources or ())
        if self.absent > self.present:
            raise ValueError(
                f"absent: {self.absent:g}: is above present = {self.present:g}; only_a would hold what both have"
            )
        return self


class EvaluateRuntime(Settings):
    """What changes no figure."""

    device: Device = "auto"
    """auto takes a GPU where there is one."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 takes all cores."""
    offline: bool = False
    """Use only what the hub's local cache holds."""


class PublishedSae(PublishedFiles):
    """An SAE of others, to be measured on our rows."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """How reports call it: letters, digits, dots, _ and -, up to 64."""


class EvaluateConfig(Settings):
    """Settings of the evaluate stage."""

    sae: Literal["last", "best"] = "last"
    """Which SAE of the training run: after the last step, or with the least held-out loss."""
    batch_rows: int = Field(default=4096, ge=2)
    """Rows of a batch of the fidelity figures; the legacy explained variance depends on it."""
    downstream: DownstreamConfig | None = DownstreamConfig()
    """Cross-entropy with the SAE spliced into the model; null leaves it out."""
    features: FeaturesConfig | None = FeaturesConfig()
    """Pages of single features; null leaves them out."""
    reason_score: ReasonScoreConfig | None = ReasonScoreConfig()
    """Which features fire at words of reasoning (arXiv 2503.18878); null leaves it out."""
    also: tuple[PublishedSae, ...] = Field(default=(), json_schema_extra={"added": True})
    """SAEs of others, measured on the same held-out text for comparison."""
    steering: SteeringConfig | None = SteeringConfig()
    """What the features of the highest ReasonScore do to what the model writes; null leaves it out."""
    token_injection: TokenInjectionConfig | None = Field(
        default=TokenInjectionConfig(), json_schema_extra={"added": True}
    )
    """Whether tokens alone drive a feature; null leaves it out, and what tokens explain of all features with it."""
    ablation: AblationConfig | None = Field(default=AblationConfig(), json_schema_extra={"added": True})
    """What the model loses on reasoning text without the features of the highest ReasonScore; null leaves it out."""
    diff: DiffConfig | None = DiffConfig()
    """Firing rates on two sources of text, or under two models, against each other; null leaves it out."""
    runtime: EvaluateRuntime = EvaluateRuntime()

    @model_validator(mode="after")
    def _check_names(self) -> "EvaluateConfig":
        names = [each.name for each in self.also]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"also: names {twice[0]!r} twice")
        return self
