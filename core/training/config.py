"""Everything about a run that is not the algorithm's mathematics. One class for all algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from prefzoo.registry import UsageError, suggest


class TrainConfig(BaseModel):
    """How a run is trained; a *row* is one record of the loss's family: a pair, a completion.

    >>> TrainConfig.of({"learning_rate": 1e-5}, {"epochs": 2}).epochs
    2.0
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(1e-6, ge=0, description="peak learning rate of the policy (or reward model)")
    critic_learning_rate: float | None = Field(None, ge=0, description="of the critic; None: as learning_rate")
    rows_per_step: PositiveInt = Field(32, description="rows per optimizer step (data set sources)")
    epochs: float = Field(1.0, gt=0, description="passes over the data (data set sources)")
    max_steps: PositiveInt | None = Field(
        None, description="optimizer steps, whatever epochs says; rollout steps for rollout sources"
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradient norm is clipped to this; None: not clipped")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay of the learning rate")
    warmup_steps: int = Field(10, ge=0, description="optimizer steps of linear warm-up")
    final_learning_rate: float = Field(0.1, ge=0, le=1, description="fraction of the peak that the decay ends at")
    max_length: PositiveInt = Field(1024, description="tokens of prompt + completion; never over the model's positions")
    tokens_per_batch: PositiveInt = Field(8192, description="token budget of a micro-batch; does not change the result")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the forward pass; weights stay float32"
    )
    gradient_checkpointing: bool = False
    shuffle: bool = Field(True, description="False: rows in the order of the file")
    seed: int = 0
    device: str | None = Field(None, description="None: a GPU where there is one")
    logging_steps: PositiveInt = 10
    log_completions: int = Field(
        3, ge=0, description="sampled completions written to samples.jsonl at each logging step"
    )
    strict: bool = Field(False, description="stop at a faulty row of the data instead of dropping it")
    cache_dir: Path | None = Field(None, description="where tokens and reference log-probabilities are kept")

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> TrainConfig:
        """Merge dictionaries, later ones over earlier ones; mistakes are told in words."""
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer
        for key in merged:
            if key not in cls.model_fields:
                raise UsageError(f"no training option {key!r}{suggest(key, cls.model_fields)}")
        try:
            return cls(**merged)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise UsageError(f"training option {where!r}: {first['msg']} (got {first['input']!r}).") from None


ONLY_DATASET = ("rows_per_step", "epochs")  # refused for rollout sources, whose schedule decides
