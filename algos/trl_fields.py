"""Every field of TRL 1.16's configurations, and what it is here.

One rule for each field of a trainer's configuration, of ``ModelConfig`` and of the arguments of TRL's scripts. A field
becomes an option of the ``trl:`` entry, a training option, an argument of ``train``; or it has no effect here; or it
can only be what it is by default. What cannot be done is refused with the reason, never left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefzoo.algos.trl_rules import (
    MODEL_KWARGS,
    NO_LIMIT,
    Refusal,
    Rule,
    Translated,
    adapter,
    argument,
    best,
    betas,
    checkpointing,
    clip,
    completions_shown,
    data,
    device,
    dtype,
    entropy,
    epochs,
    evaluation,
    fixed,
    flag,
    four_bit,
    fp32_head,
    logging,
    lora_dropout,
    loss_on,
    max_length,
    max_steps,
    model_kwargs,
    no_effect,
    optimizer,
    option,
    positive,
    precision,
    push,
    real,
    resume,
    revision,
    rewards,
    rows,
    sampling_order,
    save_limit,
    saving,
    scale,
    scheduler,
    setting,
    template,
    text,
    text_field,
    trackers,
    vllm,
    warmup,
    weight_decay,
    whole,
)
from prefzoo.parts.source import Rollouts
from prefzoo.registry import UsageError, suggest
from prefzoo.yaml_numbers import read_yaml

Table = dict[str, Rule]
HUB = no_effect("the hub gets the model once, at the end")
CHECKPOINTS = no_effect("a checkpoint always holds all that the run needs, and is written where output_dir is")
LOADER = no_effect("rows are tokenised once and read from memory")
SPREAD = no_effect("gradients of all processes are summed once in a step")
COSMETIC = no_effect("of the log's looks")
SPEED = no_effect("speed and memory only; the result is the same")
PROCESSES = "models are not sharded yet; every process holds the whole one"
FORMAT = no_effect("masks come from positions, so padding does not matter")

TRAINING: Table = {
    "output_dir": argument("output_dir"),
    "per_device_train_batch_size": Rule("`rows_per_step`, times gradient_accumulation_steps", rows),
    "gradient_accumulation_steps": Rule("`rows_per_step`, times per_device_train_batch_size", rows),
    "num_train_epochs": Rule("`epochs`", epochs),
    "max_steps": Rule("`max_steps`", max_steps),
    "learning_rate": setting("learning_rate", real),
    "lr_scheduler_type": Rule("`schedule`: linear, cosine, constant, cosine_with_min_lr", scheduler),
    "lr_scheduler_kwargs": Rule("`final_learning_rate`, of min_lr or min_lr_rate", scheduler),
    "warmup_steps": Rule("`warmup_steps`", warmup),
    "optim": Rule("`optimizer`: adamw, sgd", optimizer),
    "optim_args": fixed(None, why="the optimizer takes no other arguments"),
    "optim_target_modules": fixed(None, why="for optimizers that are not here"),
    "weight_decay": Rule("`weight_decay`", weight_decay),
    "adam_beta1": Rule("`betas`", betas),
    "adam_beta2": Rule("`betas`", betas),
    "adam_epsilon": fixed(1e-8, why="the optimizer's own"),
    "max_grad_norm": Rule("`max_grad_norm`; 0 is null", clip),
    "average_tokens_across_devices": SPREAD,
    "label_smoothing_factor": fixed(0.0, why="losses are not smoothed"),
    "bf16": Rule("`precision`: bfloat16 or float32", precision),
    "fp16": fixed(False, why="float16 needs scaled losses; use bf16"),
    "bf16_full_eval": fixed(False, why="evaluation has the precision of training"),
    "fp16_full_eval": fixed(False, why="evaluation has the precision of training"),
    "tf32": fixed(None, False, why="products of matrices stay in float32"),
    "activation_checkpointing": Rule("`gradient_checkpointing`", checkpointing),
    "activation_checkpointing_kwargs": no_effect("always the non-reentrant kind"),
    "gradient_checkpointing": Rule("`gradient_checkpointing`", checkpointing),
    "gradient_checkpointing_kwargs": no_effect("always the non-reentrant kind"),
    "torch_compile": SPEED, "torch_compile_backend": SPEED, "torch_compile_mode": SPEED, "use_liger_kernel": SPEED,
    "liger_kernel_config": SPEED, "use_cache": SPEED, "torch_empty_cache_steps": SPEED, "auto_find_batch_size": SPEED,
    "activation_offloading": SPEED, "neftune_noise_alpha": fixed(None, why="embeddings get no noise"),
    "logging_strategy": no_effect("metrics are logged every logging_steps steps"),
    "logging_steps": Rule("`logging_steps`", logging),
    "logging_first_step": COSMETIC, "log_on_each_node": COSMETIC, "log_level": COSMETIC, "log_level_replica": COSMETIC,
    "disable_tqdm": COSMETIC, "logging_nan_inf_filter": no_effect("a loss that is not finite is always told"),
    "include_num_input_tokens_seen": no_effect("num_tokens is always logged"),
    "report_to": Rule("`report_to`", trackers),
    "run_name": COSMETIC, "project": COSMETIC, "trackio_space_id": COSMETIC, "trackio_bucket_id": COSMETIC,
    "trackio_static_space_id": COSMETIC,
    "eval_strategy": Rule("`eval_steps`, of `eval_dataset=`; no or steps", evaluation),
    "eval_steps": Rule("`eval_steps`", evaluation),
    "eval_delay": fixed(0, why="evaluation starts with the run"),
    "eval_on_start": no_effect("the start is always evaluated"),
    "per_device_eval_batch_size": SPEED, "eval_accumulation_steps": SPEED, "eval_do_concat_batches": SPEED,
    "eval_use_gather_object": SPREAD, "prediction_loss_only": no_effect("there is no compute_metrics"),
    "include_for_metrics": no_effect("there is no compute_metrics"),
    "batch_eval_metrics": no_effect("there is no compute_metrics"),
    "label_names": no_effect("there is no compute_metrics"),
    "save_strategy": Rule("`save_steps`; steps, or no, which is ours to decide", saving),
    "save_steps": Rule("`save_steps`", saving),
    "save_total_limit": Rule("`save_total_limit`", save_limit),
    "save_only_model": CHECKPOINTS, "save_on_each_node": CHECKPOINTS, "enable_jit_checkpoint": CHECKPOINTS,
    "resume_from_checkpoint": Rule("`resume=`, of the newest checkpoint in output_dir", resume),
    "ignore_data_skip": CHECKPOINTS, "restore_callback_states_from_checkpoint": CHECKPOINTS,
    "load_best_model_at_end": Rule("`best_metric`; the best is in OUTPUT/best", best),
    "metric_for_best_model": Rule("`best_metric`", best),
    "greater_is_better": Rule("`best_mode`", best),
    "push_to_hub": Rule("`push_to_hub=`, with hub_model_id", push),
    "hub_model_id": Rule("`push_to_hub=`", push),
    "hub_token": fixed(None, why="log in with the hub's own command; tokens do not belong in files"),
    "hub_private_repo": fixed(None, False, why="make the repository private on the hub first"),
    "hub_strategy": HUB, "hub_always_push": HUB, "hub_revision": fixed(None, "main", why="the main branch is written"),
    "full_determinism": setting("deterministic", flag),
    "seed": setting("seed", whole), "data_seed": fixed(None, why="one seed is for all"),
    "use_cpu": Rule("`device`", device),
    "accelerator_config": fixed(None, why=PROCESSES), "parallelism_config": fixed(None, why=PROCESSES),
    "fsdp": fixed(None, "", False, why=PROCESSES), "fsdp_config": fixed(None, why=PROCESSES),
    "deepspeed": fixed(None, why=PROCESSES),
    "local_rank": SPREAD, "ddp_find_unused_parameters": SPREAD, "ddp_bucket_cap_mb": SPREAD,
    "ddp_broadcast_buffers": SPREAD, "ddp_static_graph": SPREAD, "ddp_backend": SPREAD, "ddp_timeout": SPREAD,
    "ignore_bias_buffers": SPREAD,
    "dataloader_drop_last": fixed(False, why="the last rows of an epoch are trained on"),
    "dataloader_num_workers": LOADER, "dataloader_pin_memory": LOADER, "dataloader_persistent_workers": LOADER,
    "dataloader_prefetch_factor": LOADER, "dataloader_multiprocessing_context": LOADER, "dataloader_in_order": LOADER,
    "dataset_num_proc": LOADER, "remove_unused_columns": no_effect("columns that nobody reads cost nothing"),
    "train_sampling_strategy": Rule("`shuffle`: random or sequential", sampling_order),
    "length_column_name": no_effect("rows are not sorted by length"),
    "debug": COSMETIC, "skip_memory_metrics": COSMETIC, "do_train": no_effect("of HF's own scripts"),
    "do_eval": no_effect("eval_strategy decides"), "do_predict": no_effect("of HF's own scripts"),
    "model_init_kwargs": Rule("`dtype`, `revision`, `trust_remote_code`", model_kwargs),
    "trust_remote_code": setting("trust_remote_code", flag),
    "pad_to_multiple_of": FORMAT, "pad_token": FORMAT,
}  # fmt: skip

MODEL: Table = {
    "model_name_or_path": argument("model", text),
    "model_revision": Rule("`revision`", revision),
    "dtype": Rule("`dtype`", dtype),
    "attn_implementation": no_effect("attention is our own, checked against the model's at load"),
    "use_peft": Rule("`lora`", adapter),
    "lora_r": Rule("`lora_rank`", adapter),
    "lora_alpha": Rule("`lora_alpha`", adapter),
    "lora_dropout": Rule("only `0`: two passes over the same tokens must agree", lora_dropout),
    "lora_target_modules": Rule("`lora_targets`", adapter),
    "lora_target_parameters": fixed(None, why="adapters are on modules"),
    "lora_modules_to_save": fixed(None, [], why="what is not an adapter stays as it is"),
    "lora_task_type": no_effect("it follows from what is trained"),
    "use_rslora": Rule("`lora: rslora`", adapter),
    "use_dora": Rule("`lora: dora`", adapter),
    "load_in_8bit": fixed(False, why="there are 4 bits (load_in_4bit)"),
    "load_in_4bit": Rule("`load_in_4bit`, with use_peft", four_bit),
    "bnb_4bit_quant_type": fixed("nf4", why="the 4 bits are nf4"),
    "use_bnb_nested_quant": fixed(False, why="quantisation is not nested"),
    "bnb_4bit_quant_storage": fixed(None, why="the library's own"),
}

SCRIPT: Table = {
    "dataset_name": Rule("`dataset=`", data),
    "dataset_config": Rule("`dataset=`, its name", data),
    "dataset_train_split": Rule("`dataset=`, its split", data),
    "dataset_test_split": Rule("`eval_dataset=`, its split, with eval_strategy", data),
    "dataset_streaming": Rule("`streaming`", data),
    "datasets": Rule("`dataset=`, a list with weights", data),
    "streaming": Rule("`streaming`, of datasets", data),
    "test_split_size": Rule("`eval_split`, of datasets", data),
    "env": no_effect("set the variables in the shell, before the run"),
    "accelerate_config": fixed("single_gpu", None, why=PROCESSES),
    "num_processes": fixed(1, None, why="the launcher says how many: accelerate launch --num_processes N"),
}

EXPERTS = fixed(None, 0.0, why="experts get no balancing loss")
DROPOUT = fixed(True, why="there is no dropout: two passes over the same tokens must agree")
KEEP_START = fixed("keep_start", why="completions over the limit are cut at their end")
MAX_LENGTH = Rule("`max_length`; null is the model's own limit", max_length)
CACHED = no_effect("reference log-probabilities of rows are always computed once, before the first step")
FOLLOWS: Table = {
    "sync_ref_model": option(flag),
    "ref_model_mixup_alpha": option(real),
    "ref_model_sync_steps": option(positive),
}

SFT: Table = {
    "loss_type": option(),
    "max_length": MAX_LENGTH,
    "truncation_mode": KEEP_START,
    "completion_only_loss": Rule("`loss_on`: completion or all", loss_on),
    "assistant_only_loss": Rule("`loss_on`: assistant", loss_on),
    "packing": fixed(False, why="a step is made of whole examples, however they are packed in memory"),
    "packing_strategy": no_effect("without packing"),
    "eval_packing": fixed(None, False, why="rows are packed in memory anyway"),
    "padding_free": no_effect("batches never have padding"),
    "shuffle_dataset": no_effect("every epoch is shuffled anyway"),
    "dataset_text_field": Rule("`columns`: {text: ...}", text_field),
    "dataset_kwargs": fixed(None, why="rows are always prepared here"),
    "chat_template_path": Rule("`chat_template`, a Jinja file", template),
    "eos_token": fixed(None, why="the tokenizer's own"),
    "router_aux_loss_coef": EXPERTS,
}
REWARD: Table = {
    "center_rewards_coefficient": option(real),
    "max_length": MAX_LENGTH,
    "chat_template_path": Rule("`chat_template`, a Jinja file", template),
    "disable_dropout": DROPOUT,
    "eos_token": fixed(None, why="the tokenizer's own"),
}
DPO: Table = {
    "loss_type": option(), "loss_weights": option(), "beta": option(real), "label_smoothing": option(real), **FOLLOWS,
    "max_length": MAX_LENGTH,
    "truncation_mode": KEEP_START,
    "padding_free": no_effect("batches never have padding"),
    "precompute_ref_log_probs": CACHED, "precompute_ref_batch_size": SPEED,
    "ld_alpha": fixed(None, 1.0, why="all tokens weigh the same"),
    "f_divergence_type": fixed("reverse_kl", why="other divergences are not in the zoo yet"),
    "f_alpha_divergence_coef": fixed(0.5, why="of a divergence that is not in the zoo yet"),
    "use_weighting": fixed(False, why="WPO is not in the zoo yet"),
    "discopop_tau": fixed(0.05, why="of a loss that is not in the zoo yet"),
    "disable_dropout": DROPOUT,
    "router_aux_loss_coef": EXPERTS,
}  # fmt: skip
KTO: Table = {
    "loss_type": option(), "beta": option(real), "desirable_weight": option(real), "undesirable_weight": option(real),
    **FOLLOWS,
    "max_length": MAX_LENGTH,
    "precompute_ref_log_probs": CACHED, "precompute_ref_batch_size": SPEED,
    "disable_dropout": DROPOUT,
    "router_aux_loss_coef": EXPERTS,
}  # fmt: skip
NOT_YET = "not in the zoo yet"
GRPO: Table = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), option(positive)),
    **dict.fromkeys(("steps_per_generation", "generation_batch_size"), option(whole)),
    "num_generations": option(positive), "num_iterations": option(positive),
    "max_completion_length": option(positive), "temperature": option(real), "top_p": option(real),
    "loss_type": option(), "beta": option(real), "epsilon": option(real), "epsilon_high": option(real),
    "delta": option(real), "scale_rewards": option(scale), "mask_truncated_completions": option(flag),
    "use_bias_correction_kl": option(flag), **FOLLOWS,
    "max_steps": Rule("`max_steps`, by the optimizer steps of a sampling", max_steps),
    "logging_steps": Rule("`logging_steps`, by the optimizer steps of a sampling", logging),
    "eval_steps": Rule("`eval_steps`, by the optimizer steps of a sampling", evaluation),
    "num_generations_eval": no_effect("evaluation samples one completion of each prompt"),
    "shuffle_dataset": setting("shuffle", flag),
    "remove_unused_columns": fixed(False, why="reward functions get every column"),
    "train_sampling_strategy": no_effect("shuffle_dataset decides"),
    "reward_weights": argument("reward_weights"),
    "multi_objective_aggregation": fixed("sum_then_normalize", why=NOT_YET),
    "importance_sampling_level": fixed("token", why=f"GSPO is {NOT_YET}"),
    "top_k": fixed(0, None, why="all tokens can be sampled"), "min_p": fixed(None, 0.0, why="no token is left out"),
    "repetition_penalty": fixed(1.0, why="samples come from the policy itself"),
    "generation_kwargs": fixed(None, {}, why="there are temperature, top_p and max_completion_length"),
    "chat_template_kwargs": fixed(None, {}, why="give them as a column of the data, chat_template_kwargs"),
    "cache_implementation": SPEED, "ds3_gather_for_generation": SPREAD,
    "use_transformers_continuous_batching": SPEED, "transformers_continuous_batching_config": SPEED,
    "use_transformers_paged": SPEED,
    "use_vllm": fixed(False, why=f"vLLM is {NOT_YET}; the built-in sampler does it"),
    **dict.fromkeys(
        ("vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
         "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
         "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
         "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
         "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap"),
        Rule("no effect: of use_vllm", vllm)),
    "sapo_temperature_neg": fixed(1.05, why=f"of SAPO, {NOT_YET}"),
    "sapo_temperature_pos": fixed(1.0, why=f"of SAPO, {NOT_YET}"),
    "vespo_k_pos": fixed(2.0, why=f"of VESPO, {NOT_YET}"),
    "vespo_lambda_pos": fixed(3.0, why=f"of VESPO, {NOT_YET}"),
    "vespo_k_neg": fixed(3.0, why=f"of VESPO, {NOT_YET}"),
    "vespo_lambda_neg": fixed(2.0, why=f"of VESPO, {NOT_YET}"),
    "top_entropy_quantile": fixed(1.0, why=f"a mask by entropy is {NOT_YET}"),
    "entropy_coef": fixed(0.0, why=f"an entropy bonus is {NOT_YET}"),
    "use_adaptive_entropy": fixed(False, why=f"an entropy bonus is {NOT_YET}"),
    **dict.fromkeys(("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
                    Rule("no effect: of use_adaptive_entropy", entropy)),
    "off_policy_mask_threshold": fixed(None, why=f"a mask of off-policy samples is {NOT_YET}"),
    "max_tool_calling_iterations": fixed(None, why=f"tools are {NOT_YET}"),
    "disable_dropout": no_effect("there is no dropout"),
    "cast_lm_head_to_fp32": Rule("`fp32_head`, with bf16", fp32_head),
    "log_completions": Rule("`log_completions`, a number", completions_shown),
    "num_completions_to_print": Rule("`log_completions`", completions_shown),
    "log_multimodal": COSMETIC, "log_unique_prompts": COSMETIC,
    "log_completions_hub_repo": fixed(None, why="samples are in OUTPUT/samples.jsonl"),
    "reward_model_name_or_path": Rule("`reward=`", rewards),
    "reward_funcs": Rule("`reward=`: my_module.function is my_module.py:function", rewards),
    "router_aux_loss_coef": EXPERTS,
}  # fmt: skip

# Fields of older versions that are still in people's files.
OLDER: Table = {
    "warmup_ratio": Rule("`warmup_steps`, a share below 1", warmup),
    "torch_dtype": Rule("`dtype`", dtype),
    "evaluation_strategy": Rule("`eval_steps`, of `eval_dataset=`; no or steps", evaluation),
    "no_cuda": Rule("`device`", device),
    "logging_dir": COSMETIC,
    "save_safetensors": no_effect("weights are always written so"),
    "overwrite_output_dir": fixed(False, why="a folder that holds a run is never written over"),
    "group_by_length": fixed(False, why="rows are not sorted by length"),
    "max_prompt_length": fixed(None, why="TRL took it out: prompts are never cut; rows over max_length are dropped"),
    "rpo_alpha": fixed(None, why=f"a likelihood term is {NOT_YET}"),
    "use_liger_loss": SPEED,
    "label_pad_token_id": FORMAT,
    "padding_value": FORMAT,
    "reference_free": fixed(False, why="there is a reference, or none is needed"),
    "generate_during_eval": no_effect("TRL took it out"),
}

MODEL_KWARGS.update(
    {k: MODEL[k] for k in ("dtype", "attn_implementation")}
    | {"torch_dtype": OLDER["torch_dtype"], "revision": MODEL["model_revision"],
       "trust_remote_code": TRAINING["trust_remote_code"], "use_cache": SPEED, "low_cpu_mem_usage": SPEED,
       "device_map": SPREAD, "use_kernels": SPEED}
)  # fmt: skip

OWN: dict[str, Table] = {"sft": SFT, "reward": REWARD, "dpo": DPO, "kto": KTO, "grpo": GRPO}
TABLES: dict[str, Table] = {  # as docs/from-trl.md shows them
    "All trainers": TRAINING,
    "The model": MODEL,
    "The data": SCRIPT,
    "SFTConfig": SFT,
    "RewardConfig": REWARD,
    "DPOConfig": DPO,
    "KTOConfig": KTO,
    "GRPOConfig": GRPO,
    "Older names": OLDER,
}
FIELDS: dict[str, Table] = {trainer: OLDER | TRAINING | MODEL | SCRIPT | own for trainer, own in OWN.items()}
TRAINERS = {
    "sft": "SFTTrainer",
    "reward": "RewardTrainer",
    "dpo": "DPOTrainer",
    "kto": "KTOTrainer",
    "grpo": "GRPOTrainer",
}


# ------------------------------------------------------------------------------------------------ the translation


ARGUMENTS = {  # what users give to a trainer beside its configuration -> ours
    "train_dataset": "dataset=", "ref_model": "reference=", "processing_class": "tokenizer=",
    "peft_config": "lora=True, with lora_rank, lora_alpha, lora_targets", "args": "the options themselves",
    "callbacks": "callback=",
}  # fmt: skip


def translate(
    trainer: str, fields: Mapping[str, Any], *, algorithm: str | None = None, source: str = "these options"
) -> Translated:
    """What a trainer's fields are here. Nothing is left out: what is not mapped is told to have no effect, or refused.

    Args:
        trainer: ``"dpo"``, ``"trl:dpo"`` or ``"DPOTrainer"``; sft, reward, dpo, kto, grpo.
        fields: by TRL's names.
        algorithm: the entry that takes the options; by default the trainer's.
        source: what the fields are called in messages.

    >>> found = translate("dpo", {"per_device_train_batch_size": 2, "loss_type": "ipo"})
    >>> found.options, found.settings
    ({'loss_type': 'ipo'}, {'rows_per_step': 2})
    """
    name = trainer_of(trainer)
    out = Translated(algorithm or f"trl:{name}", dict(fields), source)
    for key in out.given:
        rule = FIELDS[name].get(key)
        owners = [TRAINERS[other] for other, table in OWN.items() if key in table]
        if rule is not None:
            rule(out, key)
        elif key in ARGUMENTS:
            out.refuse(key, f"an argument of the trainer; here it is {ARGUMENTS[key]}.")
        elif owners:
            out.refuse(key, f"a field of {', '.join(owners)}, not of {TRAINERS[name]}; leave it out.")
        else:
            out.refuse(key, f"{TRAINERS[name]} has no such field{suggest(key, FIELDS[name])}")
    if "bf16" not in out.given:
        out.notes.append("bf16 is not given: the forward pass is in float32; TRL's default is bfloat16.")
    _try(out)
    return out


def _try(out: Translated) -> None:
    """Values that are wrong, or that do not go together, are told by those who take them."""
    from prefzoo.algorithm import create_algorithm
    from prefzoo.training.config import TrainConfig

    options = out.options
    if out.refused:  # options lean on each other, and some are missing now; the loss's name stands alone
        options = {k: v for k, v in options.items() if k == "loss_type"}
    try:
        TrainConfig.of(out.settings)
        (stage,) = create_algorithm(out.algorithm, **options).stages
    except UsageError as error:
        out.refused.append(("", None, str(error)))
        return
    if isinstance(stage.source, Rollouts) and not out.refused:
        group, s = stage.source.group_size, stage.schedule
        out.notes.append(
            f"{s.prompts} prompts x {group} samples = {s.prompts * group} completions are sampled at once; they serve "
            f"{s.inner_epochs} x {s.minibatches} optimizer steps of {s.prompts * group // s.minibatches}."
        )


def trainer_of(name: str) -> str:
    """The short name of a trainer.

    >>> trainer_of("trl:DPOTrainer"), trainer_of("grpo")
    ('dpo', 'grpo')
    """
    bare = name.removeprefix("trl:")
    for short, long in TRAINERS.items():
        if bare in (short, long, long.replace("Trainer", "Config")):
            return short
    from prefzoo.algorithm import ALGORITHMS  # the reason, where TRL has it and we do not

    raise ALGORITHMS.unknown(f"trl:{bare}", [f"trl:{short}" for short in TRAINERS])


def read_trl_config(
    path: str | Path, trainer: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Translated:
    """The translation of a YAML file, as ``trl dpo --config FILE`` takes it.

    Args:
        trainer: whose file it is; None: what the key ``trainer`` or ``command`` of the file says.
        overrides: fields that win over the file's, by TRL's names.
    """
    fields = {**read_yaml(path), **(overrides or {})}
    named = [str(fields.pop(key)) for key in ("trainer", "command") if key in fields]
    for name in named:
        if trainer is not None and trainer_of(name) != trainer_of(trainer):
            raise UsageError(f"config {str(path)!r} is one of {name}, not of {trainer}.")
    chosen = trainer or next(iter(named), None)
    if chosen is None:
        raise UsageError(
            f"config {str(path)!r} does not say whose it is: name the trainer ({', '.join(TRAINERS)}), as in "
            "'prefzoo train trl:dpo --from-trl FILE', or write 'trainer: dpo' into the file."
        )
    return translate(chosen, fields, source=f"config {str(path)!r}")


def spelling(trainer: str, algorithm: str) -> Callable[[Mapping[str, Any]], Translated]:
    """What ``prefzoo.train("trl:...", **options)`` does with its options: TRL's names, and ours where TRL has none."""

    def spell(given: Mapping[str, Any]) -> Translated:
        from prefzoo.training.config import TrainConfig

        ours = {k for k in given if k not in FIELDS[trainer] and k in TrainConfig.model_fields}
        if "eval_strategy" not in given:  # who gives eval_dataset wants it evaluated
            ours |= {"eval_steps"} & set(given)
        out = translate(trainer, {k: v for k, v in given.items() if k not in ours}, algorithm=algorithm)
        for key in sorted(ours):
            if key in out.settings:
                theirs = next(f for f, name, _ in out.mapped if name == key)
                out.refused.append((key, given[key], f"{theirs} says it too, in TRL's words; give one."))
            out.settings[key] = given[key]
        for key in out.arguments:
            theirs = next(f for f, name, _ in out.mapped if name == key)
            out.refused.append((theirs, out.given[theirs], f"give it to train() as {key}=."))
        out.check()
        for name, reason in out.ignored:
            warnings.warn(f"{algorithm}: {name} has no effect here: {reason}.", stacklevel=2)
        return out

    return spell


__all__ = [
    "FIELDS",
    "NO_LIMIT",
    "TRAINERS",
    "Refusal",
    "Rule",
    "Translated",
    "read_trl_config",
    "spelling",
    "translate",
]
