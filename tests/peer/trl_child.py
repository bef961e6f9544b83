"""One of TRL's trainers on given rows, to the end; runs in TRL's own environment, started by test_against_trl.py.

Argument 1 is a JSON file: trainer, its configuration, folders of models, rows, and where to write the weights.
"""

import json
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1"}

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

torch.set_num_threads(1)

job = json.loads(Path(sys.argv[1]).read_text())
tokenizer = AutoTokenizer.from_pretrained(job["model"])
kind = AutoModelForSequenceClassification if job["trainer"] == "reward" else AutoModelForCausalLM
model = kind.from_pretrained(job["model"], dtype=torch.float32)
more = {"max_grad_norm": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0, "bf16": False}
more |= {"gradient_checkpointing": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1}
more |= {"output_dir": job["out"] + ".run", "disable_tqdm": True, **job["config"]}
arguments = {"model": model, "processing_class": tokenizer}
if job["trainer"] in ("dpo", "kto"):
    arguments["ref_model"] = AutoModelForCausalLM.from_pretrained(job["reference"], dtype=torch.float32)


def rollouts(prompts, trainer):
    """The completions of the file, step by step, in place of samples."""
    step = job["completions"][trainer.state.global_step]
    return {
        "prompt_ids": [tokenizer(p)["input_ids"] for p in prompts],
        "completion_ids": step["ids"],
        "logprobs": [[0.0] * len(ids) for ids in step["ids"]],
    }


def rewards(prompts, completions, completion_ids, trainer_state, **columns):
    return job["completions"][trainer_state.global_step]["rewards"]


match job["trainer"]:
    case "dpo":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    case "kto":
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Trainer
    case "cpo":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    case "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    case "reward":
        from trl import RewardConfig as Config
        from trl import RewardTrainer as Trainer
    case "grpo":
        from trl import GRPOConfig as Config
        from trl import GRPOTrainer as Trainer

        arguments |= {"reward_funcs": [rewards], "rollout_func": rollouts}  # its reference is the start

if job["trainer"] != "grpo":
    more["train_sampling_strategy"] = "sequential"
trainer = Trainer(args=Config(**more), train_dataset=Dataset.from_list(job["rows"]), **arguments)
trainer.train()
save_file({k: v.detach().clone().contiguous() for k, v in trainer.model.named_parameters()}, job["out"])
