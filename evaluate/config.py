"""Settings of the evaluate stage."""

from typing import Literal

from pydantic import Field

from harvest.config import ComputeDtype, Device, Settings

EVALUATE_VERSION = 1


class DownstreamConfig(Settings):
    contexts: int = Field(default=32, ge=1)
    """Held-out contexts that the whole model reads, in order; all if there are fewer."""
    batch_contexts: int = Field(default=4, ge=1)
    """Contexts of one forward pass."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of the forward pass, as harvest.compute_dtype."""


class EvaluateRuntime(Settings):
    device: Device = "auto"
    """auto takes a GPU where there is one."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 takes all cores."""
    offline: bool = False
    """Use only what the hub's local cache holds."""


class EvaluateConfig(Settings):
    sae: Literal["last", "best"] = "last"
    """Which SAE of the training run: after the last step, or with the least held-out loss."""
    batch_rows: int = Field(default=4096, ge=2)
    """Rows of a batch of the fidelity figures; the legacy explained variance depends on it."""
    downstream: DownstreamConfig | None = DownstreamConfig()
    """Cross-entropy with the SAE spliced into the model; null leaves it out."""
    runtime: EvaluateRuntime = EvaluateRuntime()
