"""Every setting of a ranking run: a file whose first key is `task: ranking`. The sections that a draft's run has too are the same ones."""

from dataclasses import dataclass, field
from typing import Literal

from specforge.config.levers import Levers
from specforge.config.schema import CheckpointConfig, LogConfig, TrainConfig, require, require_at_least, require_run_id


@dataclass(frozen=True, kw_only=True)
class RankingModelConfig:
    """The shape of the model; the defaults are those of the ranking model of the CTI contest of 2026."""

    slots: int = 28
    """Bags of signs in a row; signs of slots beyond are left out."""
    rows: int = 5_000_000
    """Rows of the one table of signs, of which row 0 is padding."""
    slot_width: int = 512
    """Width of a row of the table."""
    width: int = 512
    """Width of the layers."""
    layers: int = 8
    heads: int = 8
    """Heads of the attention of a layer, of `width / heads` each."""
    inner: int = 1024
    """Inner numbers of an expert."""
    experts: int = 8
    """Experts of each layer's feed-forward."""
    top_k: int = 2
    """Experts that answer a row."""
    balance_weight: float = 0.01
    """What the experts' unevenness, std / mean of their importance, adds to the loss of a row."""

    def __post_init__(self) -> None:
        require_at_least("model", 1, slots=self.slots, slot_width=self.slot_width, layers=self.layers, inner=self.inner, top_k=self.top_k)
        require_at_least("model", 2, rows=self.rows, experts=self.experts)
        require_at_least("model", 0, balance_weight=self.balance_weight)
        require(
            self.heads >= 1 and self.width >= 1 and self.width % self.heads == 0,
            "model.heads", self.heads, f"must divide model.width={self.width}", "change one of them",
        )  # fmt: skip
        require(self.top_k <= self.experts, "model.top_k", self.top_k, f"must be at most model.experts={self.experts}", "pick fewer")


@dataclass(frozen=True, kw_only=True)
class RankingDataConfig:
    """Files of rows; `specforge.ranking.rows` says what a row is."""

    train_path: str = "???"
    """Users to learn from."""
    eval_path: str = "???"
    """Users of which scored rows are predicted, the rows before them are history."""
    cache_dir: str = ""
    """Root of the rows in packed form; empty: `output_dir/rows`."""
    max_rows: int = 0
    """Newest rows of a user that are kept (older ones are counted); 0: all."""
    exclude_ids: tuple[str, ...] = ()
    """Users that are never trained on."""

    def __post_init__(self) -> None:
        require_at_least("data", 0, max_rows=self.max_rows)


@dataclass(frozen=True, kw_only=True)
class RankingConfig:
    """Everything that defines a run; written to `output_dir/config.yaml` before anything else.

    `train.batch_samples` counts users, `train.micro_batch_tokens` their rows.
    """

    task: Literal["ranking"] = "ranking"
    run_id: str = "run"
    output_dir: str = "???"
    seed: int = 0
    model: RankingModelConfig = field(default_factory=RankingModelConfig)
    data: RankingDataConfig = field(default_factory=RankingDataConfig)
    levers: Levers = field(default_factory=Levers)
    """Of training and evaluation; merging, compiling and small data types are for a model that is trained."""
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(best_metric="eval/auc"))
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        require_run_id(self.run_id)
        for key, neutral in (("dtype", "float32"), ("keep_fp32_modules", ()), ("expert_merge", False), ("compile", False)):
            require(
                getattr(self.levers, key) == neutral,
                f"levers.{key}", getattr(self.levers, key), "is for a model that is trained already",
                "leave it out here, and give it to `load_ranking_model`; data types of a training are in train.precision",
            )  # fmt: skip
