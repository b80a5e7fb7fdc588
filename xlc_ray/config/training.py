"""Settings of a training run, its evaluation, and what both take from the cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from xlc_ray.config.base import Fraction, Name, Settings
from xlc_ray.config.errors import UserError
from xlc_ray.config.losses import Linear, Loss, Schedule


class Resample(Settings):
    """Dead features start anew on inputs that are badly reconstructed (Bricken et al. 2023)."""

    every: Annotated[int, Field(ge=1)]
    """Steps between resamplings."""
    tokens: Annotated[int, Field(ge=1)]
    """Rows that inputs are drawn from, with probability proportional to the square of their loss."""
    scale: Annotated[float, Field(gt=0)] = 0.2
    """Norm of the new encoder row, as a share of the mean of living features'."""
    decoder: Literal["error", "target"] = "error"
    """Direction of the new decoder row: what is left of the drawn row's target, or the target less b_dec."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises again after each resampling."""
    until: Fraction = 1.0
    """Share of the run after which no feature is resampled any more."""

    @model_validator(mode="after")
    def _rate_recovers(self) -> Resample:
        if self.warmup > self.every:
            raise ValueError(
                f"warmup = {self.warmup} exceeds every = {self.every}: the rate would never be whole again"
            )
        return self

    @staticmethod
    def check_tying(by: str | None) -> None:
        """Raise UserError where a wiring ties decoders so (None: not at all) that no row is one feature's own."""
        if by == "per_target":
            raise UserError(
                "train.resample: decoders tied per_target belong to features of all groups, dead or not; use "
                "train.loss.auxk, train.loss.ghost or tied: per_source"
            )


class EndToEnd(Settings):
    """The loss is taken after the language model has run on with the reconstruction (Braun et al. 2024)."""

    kl: Annotated[float, Field(ge=0)] = 1.0
    """Weight of KL(original predictions || predictions with a site reconstructed), nats a token, summed over sites."""
    downstream: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the error that the reconstruction causes in later resid_post sites: scaled to E|x|^2 = d, mean over
    those sites."""
    reconstruction: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the reconstruction error itself."""

    @model_validator(mode="after")
    def _wants_something(self) -> EndToEnd:
        if not (self.kl or self.downstream or self.reconstruction):
            raise ValueError("kl, downstream and reconstruction are all 0; at least one must be more")
        return self


class Optimizer(Settings):
    """Adam or AdamW, fused where the device has it."""

    kind: Literal["adam", "adamw"] = "adam"
    """adamw decouples weight decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay."""
    states: Literal["float32", "int8"] = "float32"
    """Moments in memory: int8 takes a quarter, in blocks with a scale each (needs the extra `lowbit`)."""


class Wandb(Settings):
    """Log to Weights & Biases (needs the extra `wandb`)."""

    project: Name
    """Project name."""
    entity: str | None = None
    """Team or user."""
    group: Name | None = None
    """Shows runs together under this name; trials of a sweep have its name by themselves."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to the run directory; sync later."""


class Train(Settings):
    """One training run."""

    steps: Annotated[int, Field(ge=1)]
    """Optimizer steps."""
    batch_tokens: Annotated[int, Field(ge=1)]
    """Tokens of a step, over all replicas and micro-batches."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    lr_schedule: Schedule = Linear()
    """Learning rate over the run."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""
    loss: Loss = Loss()
    """What is minimised."""
    end_to_end: EndToEnd | None = None
    """Train sae or transcoder by what the language model makes of it; runs the model on the text of the store."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null = no clipping."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches a step and replica. BatchTopK ranks, and z-scores, (L0 / target_l0 - 1)^2 and the strength that lp
    keeps are of, one of them of all replicas at a time: they depend on it."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: autocast over float32 weights; float64: for references."""
    dead_after_tokens: Annotated[int, Field(ge=1)] = 1_000_000
    """A feature is dead when it was silent for this many tokens."""
    resample: Resample | None = None
    """Start dead features anew from time to time."""
    calibration_tokens: Annotated[int, Field(ge=1)] = 65536
    """Training rows read for b_dec, its geometric median, and the scales of end_to_end.downstream, at most."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Steps between lines of metrics."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 1000
    """Steps between checkpoints; one is always written at the end."""
    async_checkpoints: bool = True
    """Train on while a checkpoint is written, from a copy that takes 12 bytes of host memory for each of a rank's
    parameters; false: wait."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints to keep."""
    wandb: Wandb | None = None
    """Weights & Biases, if wanted."""


class Evaluate(Settings):
    """Measured on held-out tokens."""

    tokens: Annotated[int, Field(ge=1)] = 65536
    """Held-out rows for the reconstruction metrics, at most."""
    batch_tokens: Annotated[int, Field(ge=1)] = 2048
    """Rows of a batch."""
    windows: Annotated[int, Field(ge=0)] = 64
    """Held-out windows for the replacement model; 0 = skip it."""
    batch_windows: Annotated[int, Field(ge=1)] = 16
    """Windows in one forward pass."""
    ablate_features: Annotated[int, Field(ge=0)] = 0
    """Active features, drawn at random, whose single effect on the cross-entropy is measured; 0 = none."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Ray tasks that share the rows and windows; each takes what a language-model actor does."""


class Cluster(Settings):
    """What the jobs take from the Ray cluster."""

    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Ranks that one dictionary is split over, by features."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Data-parallel copies; each takes an equal part of every batch."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 0.5
    """CPUs of a training worker; leave some to Ray Data."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of a training worker."""
    model_actors: Annotated[int, Field(ge=1)] = 1
    """Language-model actors, at most."""
    cpus_per_model: Annotated[float, Field(gt=0)] = 1.0
    """CPUs of a language-model actor."""
    gpus_per_model: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of a language-model actor."""
    placement: Literal["spread", "pack", "any"] = "spread"
    """Replicas on as many nodes as can be, or on few; a replica's ranks on one node, except with any."""
    min_replicas: Annotated[int, Field(ge=1)] | None = None
    """Train with as few replicas while nodes are missing; null = never with fewer than replicas."""
    fallback_tensor_parallel: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Ranks of a dictionary, in order of preference, where no replica of tensor_parallel ranks finds room."""
    node_wait_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds to wait for room that the cluster lacks, before it is an error."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts of a failed worker group in a row without a new checkpoint in between."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without a step after which training counts as failed: more than a checkpoint takes. The first step
    after a start has three minutes at least."""
    read_retry_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds for which a file system that fails to give activations, or to tell of checkpoints, is asked again."""

    @model_validator(mode="after")
    def _waits_before_it_fails(self) -> Cluster:
        if self.hang_timeout_s <= self.read_retry_s:
            raise ValueError(
                f"hang_timeout_s = {self.hang_timeout_s:g} should be more than read_retry_s = {self.read_retry_s:g}: "
                "a file system that is waited for would count as a hang"
            )
        return self
