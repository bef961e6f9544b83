"""What the fields of each of TRL's trainers are here; with the shared ones, all that its configuration has."""

from __future__ import annotations

from prefzoo.spellings.trl.rules import (
    Rule,
    argument,
    fixed,
    flag,
    no_effect,
    option,
    positive,
    real,
    setting,
    text,
    whole,
)
from prefzoo.spellings.trl.rules_data import completions_shown, entropy, loss_on, rewards, template, text_field, vllm
from prefzoo.spellings.trl.rules_run import evaluation, fp32_head, logging, max_length, max_steps
from prefzoo.spellings.trl.tables import COSMETIC, FORMAT, MODEL, OLDER, SCRIPT, SPEED, SPREAD, TRAINING, Table

EXPERTS = fixed(None, 0.0, why="experts get no balancing loss")
DROPOUT = fixed(True, why="there is no dropout: two passes over the same tokens must agree")
KEEP_START = fixed("keep_start", why="completions over the limit are cut at their end")
MAX_LENGTH = Rule("`max_length`; null is the model's own limit", max_length)
CACHED = no_effect("reference log-probabilities of rows are always computed once, before the first step")
OTHER_MODELS = "models with an encoder and a decoder"
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
    "f_divergence_type": option(text), "f_alpha_divergence_coef": option(real), "ld_alpha": option(real),
    "use_weighting": option(flag), "discopop_tau": option(real),
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
CPO: Table = {
    "loss_type": option(), "beta": option(real), "cpo_alpha": option(real), "simpo_gamma": option(real),
    "alpha": option(real), "label_smoothing": option(real),
    "max_length": MAX_LENGTH,
    "max_completion_length": fixed(None, why=f"of {OTHER_MODELS}"),
    "is_encoder_decoder": fixed(None, False, why=f"{OTHER_MODELS} are not here"),
    "generate_during_eval": fixed(False, why="evaluation is of the loss"),
    "disable_dropout": DROPOUT,
}  # fmt: skip
ORPO: Table = {
    "beta": option(real),
    **{name: CPO[name] for name in ("max_length", "max_completion_length", "is_encoder_decoder",
                                    "generate_during_eval", "disable_dropout")},
    "padding_value": FORMAT,
}  # fmt: skip
BCO: Table = {
    **{name: ORPO[name] for name in ("beta", "max_length", "max_completion_length", "is_encoder_decoder",
                                     "generate_during_eval", "disable_dropout")},
    "truncation_mode": no_effect("completions over the limit are cut at their end, and no prompt is cut"),
    "precompute_ref_log_probs": CACHED,
    **dict.fromkeys(("prompt_sample_size", "min_density_ratio", "max_density_ratio"),
                    no_effect("no classifier of prompts is trained here, as in TRL without an embedding function")),
}  # fmt: skip
NOT_YET = "not in the zoo yet"
SAMPLING: Table = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), option(positive)),
    **dict.fromkeys(("steps_per_generation", "generation_batch_size"), option(whole)),
    "num_generations": option(positive), "num_iterations": option(positive),
    "max_completion_length": option(positive), "temperature": option(real), "top_p": option(real),
    "beta": option(real), "epsilon": option(real), "epsilon_high": option(real),
    "mask_truncated_completions": option(flag), **FOLLOWS,
    "max_steps": Rule("`max_steps`, by the optimizer steps of a sampling", max_steps),
    "logging_steps": Rule("`logging_steps`, by the optimizer steps of a sampling", logging),
    "eval_steps": Rule("`eval_steps`, by the optimizer steps of a sampling", evaluation),
    "num_generations_eval": no_effect("evaluation samples one completion of each prompt"),
    "shuffle_dataset": setting("shuffle", flag),
    "remove_unused_columns": fixed(False, why="reward functions get every column"),
    "train_sampling_strategy": no_effect("shuffle_dataset decides"),
    "reward_weights": argument("reward_weights"),
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
         "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
        Rule("no effect: of use_vllm", vllm)),
    "disable_dropout": no_effect("there is no dropout"),
    "log_completions": Rule("`log_completions`, a number", completions_shown),
    "num_completions_to_print": Rule("`log_completions`", completions_shown),
    "log_multimodal": COSMETIC, "log_unique_prompts": COSMETIC,
    "reward_model_name_or_path": Rule("`reward=`", rewards),
    "reward_funcs": Rule("`reward=`: my_module.function is my_module.py:function", rewards),
    "router_aux_loss_coef": EXPERTS,
}  # fmt: skip
GRPO: Table = {
    "loss_type": option(), "delta": option(real), "scale_rewards": option(), "use_bias_correction_kl": option(flag),
    "importance_sampling_level": option(text),
    "multi_objective_aggregation": fixed(
        "sum_then_normalize", why="rewards are summed before the credit is given; GDPO is a function to call"
    ),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
                     "vespo_lambda_neg", "top_entropy_quantile", "entropy_coef", "off_policy_mask_threshold"),
                    option(real)),
    "use_adaptive_entropy": fixed(False, why="entropy_coef is a constant here"),
    **dict.fromkeys(("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
                    Rule("no effect: of use_adaptive_entropy", entropy)),
    **dict.fromkeys(("vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
                     "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
                     "vllm_importance_sampling_cap"), Rule("no effect: of use_vllm", vllm)),
    "max_tool_calling_iterations": fixed(None, why=f"tools are {NOT_YET}"),
    "cast_lm_head_to_fp32": Rule("`fp32_head`, with bf16", fp32_head),
    "log_completions_hub_repo": fixed(None, why="samples are in OUTPUT/samples.jsonl"),
}  # fmt: skip
GMPO: Table = {  # what its trainer, which is GRPO's but for the loss, does not read
    **dict.fromkeys(
        ("loss_type", "delta", "use_bias_correction_kl", "importance_sampling_level", "sapo_temperature_neg",
         "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "entropy_coef",
         "use_adaptive_entropy", "off_policy_mask_threshold"),
        no_effect("GMPOTrainer does not read it")),
    "top_entropy_quantile": fixed(1.0, why="the mean is over all tokens of a completion"),
}  # fmt: skip
RLOO: Table = {"normalize_advantages": option(flag), "reward_clip_range": option()}

OWN: dict[str, Table] = {
    "sft": SFT, "reward": REWARD, "dpo": DPO, "cpo": CPO, "orpo": ORPO, "kto": KTO, "bco": BCO,
    "grpo": SAMPLING | GRPO, "gmpo": SAMPLING | GRPO | GMPO, "rloo": SAMPLING | RLOO,
}  # fmt: skip
TABLES: dict[str, Table] = {  # as docs/from-trl.md shows them
    "All trainers": TRAINING,
    "The model": MODEL,
    "The data": SCRIPT,
    "SFTConfig": SFT,
    "RewardConfig": REWARD,
    "DPOConfig": DPO,
    "CPOConfig": CPO,
    "ORPOConfig": ORPO,
    "KTOConfig": KTO,
    "BCOConfig": BCO,
    "Sampling: GRPOConfig, GMPOConfig, RLOOConfig": SAMPLING,
    "GRPOConfig": GRPO,
    "GMPOConfig": GMPO,
    "RLOOConfig": RLOO,
    "Older names": OLDER,
}
FIELDS: dict[str, Table] = {trainer: OLDER | TRAINING | MODEL | SCRIPT | own for trainer, own in OWN.items()}
TRAINERS = {
    "sft": "SFTTrainer",
    "reward": "RewardTrainer",
    "dpo": "DPOTrainer",
    "cpo": "CPOTrainer",
    "orpo": "ORPOTrainer",
    "kto": "KTOTrainer",
    "bco": "BCOTrainer",
    "grpo": "GRPOTrainer",
    "gmpo": "GMPOTrainer",
    "rloo": "RLOOTrainer",
}
