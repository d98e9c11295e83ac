"""Settings of the counterexamples that a language model writes."""

from pydantic import Field, model_validator

from harvest.config import Seed, Settings


class FalsifyConfig(Settings):
    """Texts that should fire a feature and hold no reasoning, and paraphrases of its strongest contexts."""

    features: int = Field(default=20, ge=1)
    """Features that are tried, at most: those of the highest ReasonScore that injection leaves context-dependent."""
    texts: int = Field(default=10, ge=1, le=100)
    """Texts without reasoning, for each feature."""
    contexts: int = Field(default=5, ge=1, le=100)
    """Strongest contexts that are reworded,"""
    paraphrases: int = Field(default=2, ge=1, le=10)
    """and wordings of each."""
    at_least: int = Field(default=3, ge=1)
    """Texts that have to fire, or paraphrases that have to be silent, for the verdict."""
    fires: float = Field(default=0.5, gt=0, le=1)
    """A text fires above this part of the feature's largest activation in its strongest contexts,"""
    silent: float = Field(default=0.25, gt=0, le=1)
    """and is silent below this one."""
    max_tokens: int = Field(default=2000, ge=16, le=32_768)
    """Longest answer; models that think first need more."""
    temperature: float = Field(default=0.8, ge=0, le=2)
    """Of the model that writes the texts."""
    seed: Seed = 0
    """Of its sampling."""

    @model_validator(mode="after")
    def _check(self) -> "FalsifyConfig":
        if self.silent > self.fires:
            raise ValueError(f"silent: {self.silent:g}: is above fires = {self.fires:g}; a text would be both")
        most = max(self.texts, self.contexts * self.paraphrases)
        if self.at_least > most:
            raise ValueError(f"at_least: {self.at_least}: more than there are texts or paraphrases ({most})")
        return self
