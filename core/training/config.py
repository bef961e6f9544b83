"""Everything about a run that is not the algorithm's mathematics. One class for all algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from prefzoo.registry import UsageError, suggest


class TrainConfig(BaseModel):
    """How a run is trained; a *row* is one record of the loss's family: a pair, a completion.

    >>> TrainConfig.of({"learning_rate": 1e-5}, {"epochs": 2}).epochs
    2.0
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(1e-6, ge=0, description="peak learning rate of the policy (or reward model)")
    critic_learning_rate: float | None = Field(None, ge=0, description="of the critic; None: as learning_rate")
    rows_per_step: PositiveInt = Field(32, description="rows per optimizer step (data set sources)")
    epochs: float = Field(1.0, gt=0, description="passes over the rows, or over the prompts")
    max_steps: PositiveInt | None = Field(
        None, description="optimizer steps, whatever epochs says; rollout steps for rollout sources"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw or sgd")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW: decay of its means")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, of all weights")
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradient norm is clipped to this; None: not clipped")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="decay of the learning rate: linear, cosine, constant"
    )
    warmup_steps: float = Field(10, ge=0, description="optimizer steps of linear warm-up; below 1: a share of the run")
    final_learning_rate: float = Field(0.1, ge=0, le=1, description="fraction of the peak that the decay ends at")
    max_length: PositiveInt = Field(1024, description="tokens of prompt + completion; never over the model's positions")
    tokens_per_batch: PositiveInt = Field(8192, description="token budget of a micro-batch; does not change the result")
    shuffle: bool = Field(True, description="False: rows in the order of the file")
    seed: int = Field(0, description="of everything that is random")
    device: str | None = Field(None, description="None: a GPU where there is one")

    # The model.
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights in memory: float32, bfloat16, float16"
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the forward pass: float32 or bfloat16")
    fp32_head: bool = Field(False, description="logits in float32 where the forward pass is in bfloat16")
    gradient_checkpointing: bool = Field(False, description="less memory for activations, a second forward pass")
    revision: str | None = Field(None, description="branch, tag or commit of a model on the hub")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    chat_template: str | None = Field(None, description="'chatml' or a Jinja file, for a tokenizer without template")
    added_tokens: tuple[str, ...] = Field((), description="tokens that the tokenizer gets; the embeddings grow")
    lora: bool | Literal["dora", "rslora"] = Field(False, description="train an adapter: true, 'dora' or 'rslora'")
    lora_rank: PositiveInt = Field(16, description="rank of the adapter")
    lora_alpha: float = Field(32.0, gt=0, description="scale of the adapter: alpha / rank (rslora: / sqrt(rank))")
    lora_targets: str | tuple[str, ...] = Field("all-linear", description="modules that get an adapter")
    merge: bool = Field(False, description="write the adapter merged into the model")
    load_in_4bit: bool = Field(False, description="QLoRA: the model in 4 bits under the adapter (bitsandbytes)")

    # The data.
    columns: dict[str, str] | None = Field(
        None, description="what the data calls its columns: {chosen: good, rejected: bad}"
    )
    loss_on: Literal["completion", "assistant", "all"] | None = Field(
        None, description="tokens that carry the loss; None: completions, assistant turns, the whole of plain text"
    )
    implicit_prompt: Literal["word", "character"] = Field(
        "word", description="where pairs without prompt are split; 'character' is TRL's rule"
    )
    streaming: bool = Field(False, description="data larger than memory: read in blocks into the token store on disk")
    deduplicate: bool = Field(False, description="leave out rows that are copies of an earlier one")
    strict: bool = Field(False, description="stop at a faulty row of the data instead of dropping it")
    cache_dir: Path | None = Field(None, description="where tokens and reference log-probabilities are kept")

    # Runs one can trust.
    save_steps: PositiveInt | None = Field(
        None, description="steps between checkpoints; None: as often as costs 1 % of the time, none left at the end"
    )
    save_total_limit: PositiveInt = Field(2, description="checkpoints that are kept")
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="a loss or gradient that is not finite: stop, skip the step, or rollback to the last checkpoint",
    )
    stuck_minutes: float | None = Field(
        10.0, gt=0, description="minutes without progress after which the run says what it waits for"
    )
    deterministic: bool = Field(
        False, description="the same bits on a GPU too: slower kernels, seeded global generators"
    )

    # While training.
    logging_steps: PositiveInt = Field(10, description="steps between two lines of metrics")
    log_completions: int = Field(
        3, ge=0, description="sampled completions written to samples.jsonl at each logging step"
    )
    eval_split: float | None = Field(None, gt=0, lt=1, description="share of the prompts held out for evaluation")
    eval_steps: PositiveInt | None = Field(None, description="steps between evaluations; None: ten in a run")
    eval_samples: PositiveInt = Field(1, description="samples per prompt of an evaluation (rollout sources)")
    best_metric: str | None = Field(None, description="keep the best model by this, such as eval/loss, in OUTPUT/best")
    best_mode: Literal["min", "max"] | None = Field(None, description="None: min for losses and KL, max for others")
    patience: PositiveInt | None = Field(None, description="stop after so many evaluations without a better one")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        (), description="trackers that get the metrics too: tensorboard, wandb, trackio, mlflow"
    )

    @field_validator("report_to", "added_tokens", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One word is a list of one."""
        return (value,) if isinstance(value, str) else value

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
            option = error.errors()[0]["loc"][0]  # one of several types is told once for each
            said = "; or: ".join(e["msg"] for e in error.errors() if e["loc"][0] == option)
            raise UsageError(f"training option {option!r}: {said} (got {merged[str(option)]!r}).") from None


ONLY_DATASET = ("rows_per_step",)  # refused for rollout sources, whose schedule decides
