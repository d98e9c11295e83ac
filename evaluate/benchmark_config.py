"""Settings of the benchmark stage."""

from typing import Annotated

from pydantic import Field, model_validator

from evaluate.config import LARGEST_STRENGTH, Op, Where
from evaluate.task_config import TaskSource
from harvest.config import ComputeDtype, Device, Seed, Settings, check_different

BENCHMARK_VERSION = 1


class BenchmarkRuntime(Settings):
    """What changes no answer."""

    device: Device = "auto"
    """auto takes a GPU where there is one."""
    offline: bool = False
    """Use only what the hub's local cache holds."""
    wait_seconds: float = Field(default=600, ge=0)
    """How long a worker waits for worker 0 to begin; with a job array, more than that job queues."""


class BenchmarkConfig(Settings):
    """Problems answered with features operated on and without, and graded."""

    task: str | None = "arithmetic"
    """Problems and how they are graded: arithmetic (made here), gsm8k, math-500, aime-2024, aime-2025 or gpqa-diamond;
    null: a set of your own, which `source` describes."""
    source: TaskSource = TaskSource()
    """What differs from the task's own data, prompt and grading; all of it where task is null."""
    problems: int | None = Field(default=None, ge=1)
    """How many problems, the first ones; null takes all."""
    samples: int = Field(default=4, ge=1, le=1024)
    """Answers to each problem in each condition."""
    hook: str | None = None
    """Whose SAE, where several hooks were trained."""
    features: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Features that are operated on, one at a time; if empty, the `best_features` of the highest ReasonScore."""
    best_features: int = Field(default=2, ge=0, le=100)
    """How many of these; with 0 the model is measured as it is."""
    ops: tuple[Op, ...] = Field(default=("add",), min_length=1)
    """What is done to a feature's activation, as evaluate.steering.op; each is a condition of its own."""
    strengths: tuple[float, ...] = Field(default=(1.0, 2.0), min_length=1)
    """γ of the operation; each is a condition of its own. What changes nothing (add 0, scale 1) is no intervention,
    which is measured in any case. Ablation has none."""
    where: tuple[Where, ...] = Field(default=("all",), min_length=1)
    """At which tokens, as evaluate.steering.where; each is a condition of its own."""
    controls: int = Field(default=1, ge=0, le=10)
    """Random features beside each feature, of like density and of a like step (largest activation x norm of the
    direction), on which the same is done: an effect that they have as well is none of this feature."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest answer, thinking included."""
    temperature: float = Field(default=0.6, ge=0)
    """0 takes the likeliest token."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sampling from the likeliest tokens that make up this probability."""
    seed: Seed = 0
    """Of made or shuffled problems, of sampling (the same noise in every condition) and of the random features."""
    chat: bool | None = None
    """Whether a problem is a user's turn of the model's chat template; null: if there is one."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of the forward pass, as harvest.compute_dtype."""
    slots: int = Field(default=32, ge=1, le=1024)
    """Answers that are written side by side. Hashed, because an answer depends in its last bits on this number."""
    threads: int = Field(default=2, ge=1)
    """CPU threads of one worker. Hashed for the same reason; without effect on a GPU."""
    runtime: BenchmarkRuntime = BenchmarkRuntime()

    @model_validator(mode="after")
    def _check(self) -> "BenchmarkConfig":
        for name in ("features", "ops", "strengths", "where"):
            check_different(name, getattr(self, name))
        for strength in self.strengths:
            if not abs(strength) <= LARGEST_STRENGTH:
                reason = f"from -{LARGEST_STRENGTH:g} to {LARGEST_STRENGTH:g}"
                raise ValueError(f"strengths: {strength:g}: a strength is a number {reason}")
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples: {self.samples}: at temperature 0 all answers to a problem are the same; set samples to 1, "
                "or a temperature"
            )
        return self
