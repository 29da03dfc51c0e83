"""Every setting of a run: frozen dataclasses without torch, so that `--help` and validation are instant.

Each section checks itself; what spans sections is checked by `RunConfig`. Sizes and times carry their unit in the name.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from specforge.errors import ConfigError


def require(condition: bool, key: str, value: object, rule: str, way_out: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value!r}: {rule}; {way_out}.")


def require_at_least(section: str, minimum: float, **values: float) -> None:
    for key, value in values.items():
        require(value >= minimum, f"{section}.{key}", value, f"must be at least {minimum}", "give a larger number")


def require_run_id(run_id: str) -> None:
    require(
        bool(run_id) and all(c.isalnum() or c in "._-" for c in run_id) and not run_id.startswith("."),
        "run_id", run_id, "may hold letters, digits, '.', '_' and '-' only", "it becomes part of folder names",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The target that is served, and what the draft takes over from it."""

    target_path: str = "???"
    """Folder of the Hugging Face causal language model (config, safetensors, tokenizer)."""
    target_revision: str = ""
    """A label of the target's version; part of the identity of evaluation features."""
    tokenizer_path: str = ""
    """Folder of the tokenizer; empty: the target's."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type in which the target runs and features are stored."""
    device_map: str = ""
    """Passed to accelerate ("auto" spreads and offloads a target larger than one device); empty: the rank's device."""
    aux_layer_ids: tuple[int, ...] = ()
    """Indices into Hugging Face `hidden_states` (0 = embeddings); empty: the method's own, of EAGLE-3 (2, n//2, n-3)."""
    draft_path: str = ""
    """Folder of an earlier draft (a checkpoint) whose weights and draft vocabulary this run starts from."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Conversations and how they become tokens."""

    train_path: str = "???"
    """JSONL or Parquet rows with `conversations`, `text`, or `input_ids` + `loss_mask`."""
    eval_path: str = ""
    """Held-out rows; empty: `eval_fraction` of the training rows, chosen by a hash of their id."""
    eval_fraction: float = 0.05
    """Share of the training rows that is held out where `eval_path` is empty."""
    max_length: int = 2048
    """Longer samples are truncated (and counted)."""
    chat_template: str = ""
    """Path of a Jinja template; empty: the tokenizer's own."""
    last_turn_only: bool = False
    """Supervise the last assistant turn only."""
    exclude_ids: tuple[str, ...] = ()
    """Samples that are never trained on."""

    def __post_init__(self) -> None:
        require_at_least("data", 4, max_length=self.max_length)
        require(
            0 < self.eval_fraction < 1,
            "data.eval_fraction",
            self.eval_fraction,
            "must lie between 0 and 1",
            "0.05 holds out one row in twenty",
        )


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Where the target's features come from and where they are kept."""

    source: Literal["offline", "online", "shared"] = "offline"
    """offline: captured before the training and kept; online: the target runs in the training process, nothing is kept;
    shared: `specforge produce` makes them in other processes, a few steps ahead of the training."""
    path: str = ""
    """Folder of the training features; empty: `output_dir/features/train`; of a shared source `output_dir/features/shared`."""
    cache_dir: str = ""
    """Root of the evaluation cache; empty: `output_dir/features`."""
    capture_tokens: int = 8192
    """Tokens of one forward pass of the target, padding included; 1: every sample alone, so that all sources give the same bits."""
    shard_mib: int = 256
    """Size at which a new shard begins."""
    teacher_top_k: int = 0
    """Keep the target's so many likeliest ids at each token in place of its last hidden state; 0: the hidden state, exact."""
    ahead_steps: int = 8
    """Source `shared`: features of so many optimiser steps are on the disk at a time."""
    retain: bool = False
    """Source `shared`: keep what was read, so that it can be read again; the disk is then not bounded."""
    wait_s: float = 3600.0
    """Source `shared`: how long trainer and producers wait for each other before they give up."""

    def __post_init__(self) -> None:
        require_at_least("features", 1, capture_tokens=self.capture_tokens, shard_mib=self.shard_mib, ahead_steps=self.ahead_steps)
        require_at_least("features", 0, teacher_top_k=self.teacher_top_k)
        require(self.wait_s > 0, "features.wait_s", self.wait_s, "must be positive", "an hour is 3600")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, optimiser and parallelism."""

    steps: int = 0
    """Optimiser steps; 0: as many as `epochs` need."""
    epochs: int = 1
    """Times that each sample is trained on, where `steps` is 0."""
    batch_samples: int = 16
    """Samples of one optimiser step, over all ranks."""
    micro_batch_tokens: int = 4096
    """Token budget of one forward pass on one rank; samples are packed into it."""
    learning_rate: float = 1e-4
    """Of AdamW, at its highest."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes after the warm-up: to 0 at the last step, or not at all."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises on a line to its highest."""
    weight_decay: float = 0.0
    """Of AdamW, on every parameter."""
    beta1: float = 0.9
    """What AdamW keeps of its first moment in a step."""
    beta2: float = 0.95
    """What AdamW keeps of its second moment in a step."""
    clip_norm: float = 0.5
    """Bound of the global gradient norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation; parameters, reductions and moments stay float32."""
    sharding: Literal["shard", "hybrid", "replicate"] = "shard"
    """shard: over all ranks; hybrid: within a node, replicated over nodes; replicate: whole on each rank."""
    resume_from: str = ""
    """`RUN/latest`, `RUN/best` or a step folder."""
    allow_config_change: bool = False
    """Resume although method, model or data settings differ from the checkpoint's."""
    allow_non_finite: bool = False
    """Continue a run that was stopped by a non-finite loss or gradient."""
    log_every: int = 10
    """Steps between lines of the log."""
    eval_every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    save_every: int = 0
    """Steps between checkpoints; 0: only after the last step."""
    profile: bool = False
    """Print where the time of a step goes. On a GPU each phase then waits for the device, which costs speed."""

    def __post_init__(self) -> None:
        require_at_least("train", 0, steps=self.steps, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        require_at_least("train", 0, eval_every=self.eval_every, save_every=self.save_every)
        require_at_least("train", 1, epochs=self.epochs, batch_samples=self.batch_samples, log_every=self.log_every)
        require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "must be positive", "1e-4 is a common start")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"train.{key}", getattr(self, key), "must lie in [0, 1)", "0.9 and 0.95 are common")
        require(self.clip_norm > 0, "train.clip_norm", self.clip_norm, "must be positive", "use a large number to switch clipping off")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run."""

    keep: int = 3
    """Newest checkpoints kept; the best is kept besides. 0: all."""
    best_metric: str = ""
    """Any `eval/*` number; empty: `eval/walk_acc_len` where it exists, else `eval/acc_len`."""

    def __post_init__(self) -> None:
        require_at_least("checkpoint", 0, keep=self.keep)
        require(
            not self.best_metric or self.best_metric.startswith("eval/"),
            "checkpoint.best_metric", self.best_metric, "must name an eval/* number", "eval/walk_acc_len, for instance",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How a draft is evaluated."""

    draft_tokens: int = 0
    """K, the length of the drafted chain; 0: as many as the method trains."""
    max_samples: int = 0
    """Evaluate the first so many held-out samples; 0: all."""
    bootstrap: int = 1000
    """Replicates behind the 95 % interval."""

    def __post_init__(self) -> None:
        require_at_least("eval", 0, draft_tokens=self.draft_tokens, max_samples=self.max_samples, bootstrap=self.bootstrap)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where numbers go besides the console and `metrics.jsonl`."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; offline: into a folder, to be sent later."""
    wandb_project: str = "specforge"


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A training method by its registered name, with the options of its own class."""

    name: str = "eagle3"
    """eagle3, peagle, dflash, domino or dspark."""
    options: Any = None
    """The class of options that belongs to the name; in a file a mapping, whose keys are checked as all others are."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run; written to `output_dir/config.yaml` before anything else."""

    run_id: str = "run"
    """Begins the names of its checkpoints, `{run_id}-step{N}`."""
    output_dir: str = "???"
    """Folder of the run; one that holds a run already is not overwritten."""
    seed: int = 0
    """Of the order of the samples, the new draft's weights, and all that a method draws."""
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalSettings = field(default_factory=EvalSettings)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        require(
            self.train.micro_batch_tokens >= self.data.max_length,
            "train.micro_batch_tokens", self.train.micro_batch_tokens,
            f"must hold the longest sample, data.max_length={self.data.max_length}", "raise it or shorten the samples",
        )  # fmt: skip
        require_run_id(self.run_id)

    @property
    def tokenizer_path(self) -> str:
        return self.model.tokenizer_path or self.model.target_path


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The identity of an evaluation set: what must be equal for two evaluations to read the same features.

    `identity_fields()` are the fields of that name and nothing else. `micro_batch_tokens` and `cache_dir` change how
    features are read, never what they are.
    """

    eval_data_path: str
    target_path: str = ""
    target_revision: str = ""
    tokenizer_path: str = ""
    chat_template: str = ""
    aux_hidden_state_layer_ids: tuple[int, ...] = ()
    max_length: int = 2048
    feature_dtype: str = "float32"
    mask_options: tuple[tuple[str, str], ...] = ()
    """Settings that decide which tokens are supervised or held out, as (name, value) pairs."""
    micro_batch_tokens: int = 4096
    cache_dir: str = ""

    def identity_fields(self) -> dict[str, Any]:
        return {
            "eval_data_path": self.eval_data_path,
            "target_path": self.target_path,
            "target_revision": self.target_revision,
            "tokenizer_path": self.tokenizer_path,
            "chat_template": self.chat_template,
            "aux_hidden_state_layer_ids": list(self.aux_hidden_state_layer_ids),
            "max_length": self.max_length,
        }
