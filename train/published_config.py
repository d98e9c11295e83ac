"""Settings of SAEs that others published: where one is, and one that stands in the place of training."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from harvest.config import Settings
from train.config import ExcludeConfig, check_within
from train.start_files import saelens_files

PUBLISHED_VERSION = 1
PLACE = ("path", "revision", "file", "release", "id")  # settings that enter a fingerprint by content


class PublishedFiles(Settings):
    """Where an SAE of others is, and what is to be known of it."""

    path: str | None = None
    """Hub id, or a local folder or file. Enters the fingerprint by commit or by content."""
    revision: str | None = None
    """Hub commit; a branch is resolved once and recorded."""
    file: str = ""
    """Place within `path`: the folder of cfg.json (`blocks.19.hook_resid_post`), or the .pt file."""
    format: Literal["saelens", "linear"] = "saelens"
    """saelens: a folder with cfg.json and sae_weights.safetensors. linear: a .pt with the state of two Linear
    layers, `encoder` and `decoder`, ReLU between them, as qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19."""
    hook: str | None = None
    """Which of harvest.hooks it belongs to; a SAELens folder says so itself."""
    release: str | None = Field(default=None, json_schema_extra={"added": True})
    """In place of path: a release that SAELens knows (`gemma-scope-2b-pt-res`). SAELens reads and converts it, so it
    has to be installed: `pip install -e '.[saelens]'`."""
    id: str | None = Field(default=None, json_schema_extra={"added": True})
    """SAE of the release (`layer_20/width_16k/average_l0_71`)."""

    @model_validator(mode="after")
    def _check(self) -> "PublishedFiles":
        if (self.release is None) != (self.id is None):
            missing = "id" if self.id is None else "release"
            raise ValueError(f"{missing}: is missing; a release of SAELens takes release and id")
        if (self.path is None) == (self.release is None):
            raise ValueError("set either path, or release and id")
        if self.release and (self.file or self.format != "saelens"):
            raise ValueError("file and format belong to path; a release has id alone")
        if self.format == "linear" and self.hook is None:
            raise ValueError("format linear needs hook, as the file does not say where it belongs")
        check_within(self.file)
        return self

    @property
    def label(self) -> str:
        """How reports and messages call it."""
        return f"{self.release}/{self.id}" if self.release else "/".join(filter(None, (self.path, self.file)))

    def files(self) -> tuple[str, ...]:
        """What is read, relative to `path`; an empty name is `path` itself."""
        if self.format == "linear":
            return (self.file,)
        return saelens_files(self.file)


class PublishedExclude(ExcludeConfig):
    """Rows that figures leave out, as training would."""

    setting: ClassVar[str] = "published.exclude"


class PublishedRuntime(Settings):
    """What changes no result."""

    offline: bool = False
    """Use only what the hub's local cache holds."""


class PublishedConfig(PublishedFiles):
    """An SAE of others in the place of training."""

    exclude: PublishedExclude = PublishedExclude()
    """Rows that the figures without outliers leave out (the paper: 128000 and 128001, BOS and EOS)."""
    runtime: PublishedRuntime = PublishedRuntime()
