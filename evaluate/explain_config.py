"""Settings of the explain stage."""

import os
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator, model_validator

from evaluate.falsify_config import FalsifyConfig
from harvest.config import Seed, Settings, check_different
from harvest.files import UserError

if TYPE_CHECKING:
    from evaluate.endpoint import Endpoint  # loads an HTTP client

EXPLAIN_VERSION = 1


class ExplainRuntime(Settings):
    """Where the language model answers, and how patiently it is asked; changes no result."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Address of an OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, `transformers serve`, OpenRouter."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the endpoint's key; null sends none. The key itself belongs in no
    file."""
    parallel: int = Field(default=4, ge=1, le=256)
    """Calls side by side."""
    timeout_s: float = Field(default=120, gt=0, le=3600)
    """Seconds that one call may take."""
    tries: int = Field(default=6, ge=1, le=100)
    """Calls for one question that fails (429, 5xx, no answer in time), with growing waits between; then it is counted
    as a problem."""

    @field_validator("api_key_env")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not (name.isidentifier() and name.isascii()):
            raise ValueError("the name of an environment variable is meant (letters, digits, _), never the key itself")
        return name


class ExplainConfig(Settings):
    """Explanations of features by a language model, and how well they predict."""

    model: str = Field(min_length=1)
    """Name of the model that is asked, as the endpoint calls it."""
    feature_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Features that are explained; those that have pages if empty."""
    tokens: int = Field(default=32, ge=4, le=512)
    """Tokens of an example: held-out contexts are cut into windows of so many."""
    strongest: int = Field(default=8, ge=1, le=64)
    """Examples with the largest activations that the explanation is written from,"""
    samples: int = Field(default=2, ge=0, le=16)
    """and examples from each quarter of the activations."""
    tests: int = Field(default=20, ge=4, le=200)
    """Examples that activate the feature in a test, a quarter of them from each quarter of its activations; as many
    stand against them."""
    hard_share: float = Field(default=0.5, ge=0, le=1)
    """Part of the silent examples of a test that hold a token at which the feature fires elsewhere."""
    batch: int = Field(default=8, ge=1, le=40)
    """Examples of one call of a test."""
    max_tokens: int = Field(default=400, ge=16, le=32_768)
    """Longest answer; models that think first need thousands."""
    falsify: FalsifyConfig | None = None
    """Also look for counterexamples: texts without reasoning that fire a feature, paraphrases of its strongest contexts
    that do not. `{}` takes the defaults."""
    seed: Seed = 0
    """Choice of the examples and of the marks that are wrong."""
    runtime: ExplainRuntime = ExplainRuntime()

    @model_validator(mode="after")
    def _check(self) -> "ExplainConfig":
        check_different("feature_ids", self.feature_ids)
        return self


def endpoint_of(config: ExplainConfig) -> "Endpoint":
    """Where the settings say that the language model answers.

    Raises UserError where the variable that they name holds no key.
    """
    from evaluate.endpoint import Endpoint

    runtime = config.runtime
    key = os.environ.get(runtime.api_key_env) if runtime.api_key_env else None
    if runtime.api_key_env and not key:
        raise UserError(f"explain.runtime.api_key_env: {runtime.api_key_env}: this variable is not set; export the key")
    return Endpoint(runtime.base_url, config.model, key, runtime.timeout_s, runtime.tries, runtime.parallel)
