"""What users get wrong: each mistake is told in words by our own code, and costs nothing that was there before."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig
from transformers.utils import logging as hf_logging

import prefzoo
from prefzoo.cli import main
from prefzoo.models.load import learn_tokenizer, load_policy, load_tokenizer
from prefzoo.registry import UsageError
from prefzoo.training.engine import NonFiniteError

hf_logging.disable_progress_bar()
SHAPE: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i in range(8)]
PAIR = PAIRS[0]
TURNS = [{"messages": [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]}]
LORA = {"lora": True, "lora_rank": 2}
ABSENT = ("bitsandbytes", "wandb")
ON_POLICY = ("grpo", "rlvr", "ppo")


# ------------------------------------------------------------------------------------------------- a user's folder


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with nothing wrong in it, its weights in two shards."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    model.save_pretrained(folder, max_shard_size="20KB")
    learn_tokenizer([str(PAIRS)], 264).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def rewards(value: Any) -> Callable[..., Any]:
    """A reward function that says this of every completion."""
    return lambda completions, **_: [value] * len(completions)


class Here:
    """A user's folder, and calls that go wrong in it; before each call it is noted what there was."""

    def __init__(self, folder: Path, sound: Path) -> None:
        self.folder, self.sound, self.out = folder, str(sound), folder / "out"
        self.before = self.files()

    def files(self) -> dict[Path, str]:
        every = (p for p in self.folder.rglob("*") if p.is_file())
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in every}

    # What a user brings.

    def file(self, name: str, content: str | bytes | list[Any]) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(f"{json.dumps(row)}\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def model(self, **changed: Any) -> Path:
        """A copy of the sound model; ``config_json={...}`` changes keys of config.json, None removes it."""
        folder = self.folder / "model"
        shutil.copytree(self.sound, folder)
        for name, change in changed.items():
            path = folder / name.replace("_json", ".json")
            if change is None:
                path.unlink()
            elif isinstance(change, dict):
                path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
            else:
                path.write_text(change)
        return folder

    def weights(self, change: Callable[[Path], object]) -> Path:
        """The model with one shard of its weights changed."""
        folder = self.model()
        change(min(folder.glob("*.safetensors")))
        return folder

    def adapter(self, **changed: Any) -> Path:
        facts = {"peft_type": "LORA", "base_model_name_or_path": self.sound, "r": 2, "target_modules": ["q_proj"]}
        self.file("adapter/adapter_config.json", json.dumps({**facts, "task_type": "CAUSAL_LM", **changed}))
        return self.folder / "adapter"

    def classifier(self, labels: int = 1) -> Path:
        folder = self.model()
        for old in folder.glob("model*"):
            old.unlink()
        AutoModelForSequenceClassification.from_config(LlamaConfig(**SHAPE, num_labels=labels)).save_pretrained(folder)
        return folder

    def stranger(self) -> Path:
        """A model whose ids mean other words."""
        folder = self.model()
        learn_tokenizer(["the cat sat on the mat"], 264).save_pretrained(folder)
        return folder

    def reward_model(self) -> Path:
        folder = self.model()
        self.file("model/prefzoo_reward.json", '{"pooling": "mean", "offset": 0.0, "scale": 1.0}')
        return folder

    def tokenizer(self, **changed: Any) -> Any:
        tokenizer = load_tokenizer(self.sound)
        for name, value in changed.items():
            setattr(tokenizer, name, value)
        return tokenizer

    # What a user calls.

    def load(self, source: Any, **options: Any) -> Any:
        self.before = self.files()
        return prefzoo.load_dataset(source, **options)

    def train(self, name: Any = "dpo", **given: Any) -> Any:
        """A run of one step; by default nothing is wrong with it."""
        quick: dict[str, Any] = {"model": self.sound, "dataset": PAIRS, "max_steps": 1, "warmup_steps": 0}
        if str(name).removeprefix("trl:") in ON_POLICY:
            short = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 3}
            quick |= {"reward": rewards(1.0)} | {k: v for k, v in short.items() if name != "ppo" or k != "group_size"}
        self.before = self.files()
        return prefzoo.train(name, **{"output_dir": self.out, "quiet": True, **quick, **given})

    def reward(self, reward: Any, **given: Any) -> Any:
        return self.train("grpo", reward=reward, **given)

    def generate(self, *prompts: Any, **given: Any) -> Any:
        self.before = self.files()
        return prefzoo.generate(given.pop("model", self.sound), given.pop("all", prompts), **given)

    def cli(self, *words: Any) -> int:
        self.before = self.files()
        return main([str(word) for word in words])


def remove_weights(folder: Path) -> Path:
    for file in folder.glob("model*"):
        file.unlink()
    return folder


def remove_tokenizer(folder: Path) -> Path:
    for file in folder.glob("*token*"):
        file.unlink()
    return folder


def no_eos(folder: Path) -> Path:
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return folder


def broken(adapter: Path) -> Path:
    (adapter / "adapter_config.json").write_text("{")
    return adapter


def leave_out(file: Path) -> None:
    weights = load_file(file)
    save_file(dict(list(weights.items())[1:]), file, metadata={"format": "pt"})


def fill(file: Path, value: float) -> None:
    save_file({k: torch.full_like(v, value) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


async def later_fails(completions: list[str], **_: Any) -> list[float]:
    return {}["score"]


def finished(h: Here) -> Path:
    h.file("old/run.json", '{"finished": true, "config": {}, "data": {}, "composition": ""}')
    h.file("old/final/model.safetensors", "weights")
    h.file("old/metrics.jsonl", "{}")
    return h.folder / "old"


def taken(h: Here) -> Path:
    return Path(h.file("old/metrics.jsonl/mine", "mine")).parent.parent


# ------------------------------------------------------------------------------------------------- the table


class Case(NamedTuple):
    mistake: Callable[[Here], Any]
    words: tuple[str, ...]
    error: type[Exception]
    todo: str | None  # what falls short today


CASES: dict[str, Case] = {}


def case(
    name: str, mistake: Callable[[Here], Any], *words: str, error: type[Exception] = UsageError, todo: str | None = None
) -> None:
    """A mistake, and the words that its message must hold: what is at fault, and the cure where there is one."""
    assert name not in CASES
    CASES[name] = Case(mistake, words, error, todo)


# fmt: off

# Files that cannot be read.

case("no such file", lambda h: h.load(h.file("pairs.jsonl", PAIRS)[:-7] + ".jsonl"), "no such file", "'pairs.jsonl'")
case("no such folder", lambda h: h.load("nowhere/pairs.jsonl"), "'nowhere/pairs.jsonl'", "no such file")
case("a hub id offline", lambda h: h.load("no-such/data-set"), "'no-such/data-set'", "no file here", "hub id")
case("a folder without data", lambda h: h.load(Path(h.file("notes/a.md", "text")).parent), "notes", ".jsonl")
case("no such split", lambda h: h.load(Path(h.file("d/train.jsonl", PAIRS)).parent.as_posix() + ":trian"), "'train'")
case("a split of a file", lambda h: h.load(h.file("a.jsonl", PAIRS) + ":train"), "split='train'", "no effect")
case("an empty file", lambda h: h.load(h.file("a.jsonl", "")), "a.jsonl", "no rows")
case("a header without rows", lambda h: h.load(h.file("a.csv", "prompt,completion\n")), "a.csv", "no rows")
case("no rows in memory", lambda h: h.load([]), "no rows")
case("not JSON", lambda h: h.load(h.file("a.jsonl", '{"text": "x"}\nprompt: y\n')), "a.jsonl", "line 2", "not JSON")
case("an array that ends too early", lambda h: h.load(h.file("a.json", '[{"text": "x"},')), "a.json", "not JSON")
case("lines that are no objects", lambda h: h.load(h.file("a.jsonl", '{"text": "x"}\n[1]\n')), "line 2", "object",
     "list")
case("items that are no objects", lambda h: h.load(h.file("a.json", '[{"text": "x"}, 3]')), "row 2", "object", "int")
case("no gzip", lambda h: h.load(h.file("a.jsonl.gz", PAIRS)), "a.jsonl.gz", "cannot be read")
case("half a gzip", lambda h: h.load(h.file("a.jsonl.gz", gzip.compress(json.dumps(PAIR).encode() * 99)[:-30])),
     "a.jsonl.gz", "cannot be read")
case("not UTF-8", lambda h: h.load(h.file("a.jsonl", '{"text": "é"}'.encode("latin-1"))), "a.jsonl", "utf-8")
case("a workbook", lambda h: h.load(h.file("a.xlsx", b"PK\3\4\0\0\x9c")), "a.xlsx", ".csv")
case("no Parquet", lambda h: h.load(h.file("a.parquet", b"PAR1 no")), "a.parquet", "cannot be read")
case("no Arrow", lambda h: h.load(h.file("a.arrow", b"ARROW1 no")), "a.arrow", "cannot be read")
case("half a saved data set", lambda h: h.load(Path(h.file("d/state.json", "{}")).parent), "d'", "cannot be read")
case("a ragged row", lambda h: h.load(h.file("a.csv", "prompt,completion\na,b\na,b,c\n")), "a.csv", "row 2", "cells")
case("a short row", lambda h: h.load(h.file("a.csv", "prompt,completion\na,b\na\n"), strict=True), "a.csv", "row 2",
     "fewer cells")
case("an open quote", lambda h: h.load(h.file("a.csv", 'prompt,completion\na,"b\n')), "a.csv", "cannot be read")
case("a stream of an array", lambda h: h.load(h.file("a.json", "[{}]"), streaming=True), "a.json", "JSON Lines")
case("a number as data", lambda h: h.load(5), "int", "a path")
case("rows that are no mappings", lambda h: h.load([PAIR, "a text"]), "row 2", "mapping", "str")

# Columns and values.

case("columns of no type", lambda h: h.load([{"a": 1, "b": 2}]), "a, b", "no known type", "columns={")
case("a column misspelled", lambda h: h.train(dataset=[{"prompt": "a", "choosen": "b", "rejected": "c"}]),
     "'choosen'", "'chosen'")
case("a missing column", lambda h: h.load([PAIR, {"prompt": "a", "chosen": "b"}]), "row 2", "'rejected'", "missing")
case("a number as text", lambda h: h.load([{**PAIR, "chosen": 5}]), "row 1", "'chosen'", "5", "int")
case("text as messages", lambda h: h.load([{"messages": "hello"}]), "row 1", "'messages'", "list of messages")
case("columns= of another file", lambda h: h.load(PAIRS, columns={"chosen": "choosen"}), "'choosen'", "'chosen'",
     "columns=")
case("columns= to nothing known", lambda h: h.train(columns={"chosne": "chosen"}), "chosne", "'chosen'")
case("labels in words", lambda h: h.load([{"prompt": "a", "completion": "b", "label": "yes"}]), "row 1", "'label'",
     "'yes'")
case("a score in words", lambda h: h.load([{"prompt": "a", "completion": "b", "score": "9"}]), "'score'", "number",
     "'9'")
case("ranks from 0", lambda h: h.load([{"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1]}]), "'ranks'",
     "from 1")
case("tools that are no JSON", lambda h: h.load([{**TURNS[0], "tools": "f(x)"}]), "row 1", "'tools'", "not JSON")
case("pictures", lambda h: h.load([{**PAIR, "images": ["a.png"]}]), "row 1", "'images'", "not supported")
case("pictures in messages", lambda h: h.load([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}]),
     "row 1", "message 1", "image", "text")
case("an unknown role", lambda h: h.load([{"conversations": [{"from": "usr", "value": "a"}]}]), "message 1", "'usr'",
     "'user'")
case("messages without role", lambda h: h.load([{"messages": [{"content": "a"}]}]), "message 1", "role and content")
case("an alien asks", lambda h: h.load([{"prompt": [{"role": "alien", "content": "a"}]}]), "no usable row",
     "dropped 1", "role alien")
case("empty rows only", lambda h: h.load([{**PAIR, "chosen": ""}] * 3), "no usable row", "dropped 3", "empty side")
case("null rows only", lambda h: h.load([{**PAIR, "chosen": None}] * 3), "no usable row", "dropped 3", "chosen is null")
case("identical pairs", lambda h: h.train(dataset=[{**PAIR, "chosen": PAIR["rejected"]}] * 4), "dropped 4", "identical")
case("one faulty row, strictly", lambda h: h.train(dataset=[PAIR, {**PAIR, "chosen": ""}], strict=True), "row 2",
     "empty")
case("no shared prompt", lambda h: h.load([{"chosen": "a b", "rejected": "c d"}]), "dropped 1", "share no prompt")
case("steps and labels that differ", lambda h: h.load([{"prompt": "a", "completions": ["b", "c"], "labels": [True]}]),
     "dropped 1", "another number of labels")
case("one answer to compare", lambda h: h.train(dataset=[{"prompt": "a", "completions": ["b"], "scores": [1.0]}]),
     "no usable row", "no two answers of different score")
case("scores that are all equal",
     lambda h: h.train(dataset=[{"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}]),
     "no two answers of different score")
case("demonstrations as pairs", lambda h: h.train(dataset=[{"prompt": "a", "completion": "b"}]), "prompt_completion",
     "cannot become preference", "ranking")
case("a margin in words",
     lambda h: h.train("reward_model", dataset=h.file("a.jsonl", [{**PAIR, "chosen": ""}, {**PAIR, "margin": "big"}])),
     "a.jsonl", "row 2", "'margin'", "number", "'big'")
case("a margin that is NaN", lambda h: h.train("reward_model", dataset=[{**PAIR, "margin": float("nan")}]),
     "no usable row", "margin is not a finite number")
case("a mixture of types", lambda h: h.load([h.file("a.jsonl", PAIRS), h.file("b.jsonl", TURNS)]), "b.jsonl",
     "preference")
case("weights of some only",
     lambda h: h.load([{"path": h.file("a.jsonl", PAIRS), "weight": 1}, {"path": h.file("b.jsonl", PAIRS)}]),
     "weights", "[1, None]")
case("a key of a source misspelled", lambda h: h.load({"path": h.file("a.jsonl", PAIRS), "wieght": 1}), "'wieght'",
     "'weight'")
case("a key misspelled in a mixture", lambda h: h.load([{"path": h.file("a.jsonl", PAIRS), "wieght": 1}]), "'wieght'",
     "'weight'")
case("prompts over the limit", lambda h: h.train(max_length=3), "no usable row", "dropped 8", "limit of 3 tokens")
case("answers over the model", lambda h: h.train("grpo", max_new_tokens=999), "max_new_tokens", "128")
case("messages without template", lambda h: h.train("sft", dataset=TURNS), "no chat template",
     "chat_template='chatml'")
case("turns in plain text", lambda h: h.train("sft", loss_on="assistant"), "loss_on='assistant'", "plain text")
case("prompts to evaluate pairs on", lambda h: h.train(eval_dataset=[{"prompt": "a"}]), "type prompt",
     "become preference")
case("only evaluation prompts", lambda h: h.train(eval_dataset=PAIRS), "no usable row", "evaluation data")
case("one prompt to hold out", lambda h: h.train(dataset=[PAIR], eval_split=0.5), "one prompt", "held out")
case("no data", lambda h: h.train(dataset=None), "dataset=", "pairs")

# Models and tokenizers.

case("no model", lambda h: h.train(model=None), "which model?", "FOLDER")
case("a number as model", lambda h: h.train(model=5), "model", "int")
case("a model's folder misspelled", lambda h: h.train(model=f"{h.sound}l"), "modell'", "no such folder")
case("a hub model offline", lambda h: h.train(model="no-such/model"), "'no-such/model'")
case("a model misspelled", lambda h: h.train(model=Path(h.model()).name + "s"), "'models'", "no folder")
case("a file as model", lambda h: h.train(model=h.file("model.gguf", "x")), "model.gguf", "is a file", "folder")
case("a folder without config", lambda h: h.train(model=h.model(config_json=None)), "config.json")
case("a folder without weights", lambda h: h.train(model=remove_weights(h.model())), "no causal language model",
     "model")
case("a folder without tokenizer", lambda h: h.train(model=remove_tokenizer(h.model())), "no tokenizer",
     "tokenizer.json")
case("a config that is no JSON", lambda h: h.train(model=h.model(config_json="{not json")), "model'", "JSON")
case("an unknown architecture", lambda h: h.train(model=h.model(config_json={"model_type": "llamma"})), "llamma")
case("no causal model",
     lambda h: h.train(model=h.model(config_json={**BertConfig().to_dict(), "architectures": ["BertForMaskedLM"]})),
     "no causal language model")
case("weights that are cut", lambda h: h.train(model=h.weights(lambda f: f.write_bytes(f.read_bytes()[:500]))),
     "model'")
case("a missing shard", lambda h: h.train(model=h.weights(Path.unlink)), "model'", "safetensors")
case("weights left out", lambda h: h.train(model=h.weights(lambda f: leave_out(f))), "lacks weights", "model.")
case("weights of another shape", lambda h: h.train(model=h.model(config_json={"intermediate_size": 48})), "shape",
     "mlp")
case("weights that are NaN", lambda h: h.train(model=h.weights(lambda f: fill(f, float("nan")))), "not finite")
case("a reward model as model", lambda h: h.train(model=h.reward_model()), "is a reward model", "reward=")
case("a classifier as model", lambda h: h.train(model=h.classifier()), "sequence classifier", "reward=")
case("remote code",
     lambda h: h.train(model=h.model(config_json={"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})),
     "trust_remote_code=True")
case("a tokenizer without EOS", lambda h: h.train(model=no_eos(h.model())), "no EOS token", "tokenizer.eos_token")
for name in ("sft", "grpo"):
    case(f"a tokenizer object without EOS: {name}",
         lambda h, name=name: h.train(name, tokenizer=h.tokenizer(eos_token=None)),
         "no EOS token", "tokenizer.eos_token")
case("a model in memory without tokenizer",
     lambda h: h.train(model=AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))), "tokenizer=")
case("a revision of a model in memory",
     lambda h: h.train(model=load_policy(h.sound).model, tokenizer=h.tokenizer(), revision="v1"), "revision",
     "in memory")
case("a template that is not there", lambda h: h.train(chat_template="chatlm"), "'chatlm'", "chatml", "Jinja")
case("a template that is broken", lambda h: h.train(chat_template=h.file("a.jinja", "{% for m in")), "a.jinja",
     "render")
case("an adapter without base", lambda h: h.train(model=h.adapter(base_model_name_or_path="/nowhere/base")),
     "/nowhere/base", "no such folder")
case("an adapter that says no base",
     lambda h: h.train(model=h.adapter(base_model_name_or_path=None), tokenizer=h.tokenizer()), "does not say",
     "base")
case("an adapter without weights", lambda h: h.train(model=h.adapter(), lora=True), "adapter'", "adapter_model")
case("an adapter that is no JSON", lambda h: h.train(model=broken(h.adapter())), "adapter_config.json",
     "cannot be read")
case("adapters on nothing", lambda h: h.train(lora=True, lora_targets="attention"), "'attention'", "q_proj")
case("4 bits without the package", lambda h: h.train(lora=True, load_in_4bit=True), "load_in_4bit", "bitsandbytes")
case("a path as tokenizer", lambda h: h.train(tokenizer=h.sound), "tokenizer", "str")
case("a reference of another vocabulary", lambda h: h.train(reference=h.stranger()), "reference", "tokenizer",
     "other ids")
case("a reference that is not there", lambda h: h.train(reference=f"{h.sound}x"), "modelx'", "no such folder")

# Algorithms and options.

case("an unknown algorithm", lambda h: h.train("dop"), "'dop'", "did you mean 'dpo'?")
case("an algorithm of TRL's that is not here", lambda h: h.train("trl:xpo"), "'trl:xpo'", "not in the zoo yet",
     "nearest is 'xpo'")
case("an algorithm that is no name", lambda h: h.train(5), "algorithm", "int")
case("an unknown option", lambda h: h.train(betta=0.2), "'betta'", "did you mean 'beta'?")
case("an unknown option of training", lambda h: h.train(learning_rat=0.2), "'learning_rat'", "'learning_rate'")
case("an unknown key of config=", lambda h: h.train(config={"epochss": 2}), "'epochss'", "'epochs'")
case("a file as config=", lambda h: h.train(config=h.file("a.yaml", "epochs: 2")), "config", "str")
case("an argument as option of training", lambda h: h.train(config={"reward": "exact"}), "'reward'")
case("an option of the wrong type", lambda h: h.train(beta="strong"), "'beta'", "float", "'strong'")
case("an option out of range", lambda h: h.train("grpo", group_size=1), "group_size", "at least 2", "1")
case("a negative beta", lambda h: h.train(beta=-0.1), "beta", "-0.1")
case("a learning rate in words", lambda h: h.train(learning_rate="high"), "'learning_rate'", "number", "'high'")
case("a learning rate below 0", lambda h: h.train(learning_rate=-1e-5), "'learning_rate'", "-1e-05")
case("an infinite learning rate", lambda h: h.train(learning_rate=float("inf")), "'learning_rate'", "finite")
case("no steps", lambda h: h.train(max_steps=0), "'max_steps'", "greater than 0")
case("a split of all", lambda h: h.train(eval_split=1.5), "'eval_split'", "less than 1")
case("an optimizer that is not here", lambda h: h.train(optimizer="adam"), "'optimizer'", "'adamw'", "'adam'")
case("an adapter that is not here", lambda h: h.train(lora="loraa"), "'lora'", "'loraa'", "'dora'")
case("a device that is not there", lambda h: h.train(device="cuda:7"), "'cuda:7'", "not there", "leave device out")
case("a device of no kind", lambda h: h.train(device="gpu"), "'gpu'", "not there", "'cuda'")
case("a tracker that is not here", lambda h: h.train(report_to=["wandb"]), "report_to", "wandb", "pip install")
case("a callback that is no function", lambda h: h.train(callback=["log"]), "callback", "str")
case("a number as callback", lambda h: h.train(callback=5), "callback", "int")
case("a file as cache", lambda h: h.train(cache_dir=h.file("cache", "x")), "cache_dir", "is a file", "folder")
case("new tokens and an adapter on their embeddings",
     lambda h: h.train(lora=True, added_tokens=("<t>",), lora_targets=["embed_tokens"]), "lora_targets",
     "'embed_tokens'", "leave those out")
case("an unknown best metric", lambda h: h.train(eval_split=0.5, best_metric="los"), "best_metric", "'eval/loss'")
case("the best of a run without folder", lambda h: h.train(eval_split=0.5, best_metric="loss", output_dir=None),
     "output_dir")
case("a push without folder", lambda h: h.train(push_to_hub="me/model", output_dir=None), "push_to_hub", "output_dir")
for name, given in {
    "lora_rank": {"lora_rank": 8}, "lora_alpha": {"lora_alpha": 8.0}, "lora_targets": {"lora_targets": "q_proj"},
    "merge": {"merge": True}, "load_in_4bit": {"load_in_4bit": True}, "fp32_head": {"fp32_head": True},
    "betas": {"betas": (0.9, 0.99), "optimizer": "sgd"}, "log_completions": {"log_completions": 2},
    "final_learning_rate": {"final_learning_rate": 0.0, "schedule": "constant"}, "best_mode": {"best_mode": "min"},
    "best_metric": {"best_metric": "loss"}, "eval_steps": {"eval_steps": 3}, "patience": {"patience": 2},
    "eval_split": {"eval_split": 0.1, "eval_dataset": PAIRS}, "critic_learning_rate": {"critic_learning_rate": 1e-5},
}.items():  # fmt: skip
    case(f"without effect: {name}", lambda h, given=given: h.train(**given), f"'{name}'", "no effect", "leave it out")
for name, given in {"rows_per_step": {"rows_per_step": 4}, "loss_on": {"loss_on": "all"}}.items():
    case(f"without effect: {name} of grpo", lambda h, given=given: h.train("grpo", **given), f"'{name}'", "no effect")
case("without effect: revision of a folder", lambda h: h.train(revision="v1"), "revision", "no effect")
case("without effect: reward_weights of dpo", lambda h: h.train(reward_weights=[1.0]), "reward_weights", "no effect")
case("without effect: merge of a reward model", lambda h: h.train("reward_model", **LORA, merge=True), "'merge'",
     "no effect")

# Rewards.

case("no reward", lambda h: h.reward(None), "'grpo' needs a reward", "f(prompts, completions, **columns)", "exact")
case("too few rewards", lambda h: h.reward(lambda completions, **_: [1.0]), "4 numbers", "one per completion",
     "1 values")
case("one number", lambda h: h.reward(lambda completions, **_: 1.0), "'<lambda>'", "4 numbers", "float")
case("rewards that are NaN", lambda h: h.reward(rewards(float("nan"))), "value 0", "nan", "None")
case("rewards without end", lambda h: h.reward(rewards(float("-inf"))), "value 0", "-inf", "None")
case("rewards in words", lambda h: h.reward(rewards("1.0")), "value 0", "'1.0'", "number")
case("rewards that raise", lambda h: h.reward(lambda completions, **_: 1 / 0), "ZeroDivisionError", "line",
     "first prompt")
case("an asynchronous reward that raises", lambda h: h.reward(later_fails), "'later_fails'", "KeyError", "line")
case("an argument that is no column", lambda h: h.reward(lambda completions, anwser: []), "'anwser'", "no column",
     "prompts")
case("a number as reward", lambda h: h.reward(5), "reward", "function", "int")
case("no rewards", lambda h: h.reward([]), "reward", "empty")
case("a verifier misspelled", lambda h: h.reward("exat"), "'exat'", "'exact'", "numeric")
case("a verifier without answers", lambda h: h.reward("exact"), "answer", "solution")
case("weights of another number", lambda h: h.reward(rewards(1.0), reward_weights=[1, 2]), "one for each", "2 weights")
case("weights that are 0", lambda h: h.reward(rewards(1.0), reward_weights=[0]), "weights", "all are 0")
case("a model in memory as reward", lambda h: h.reward(torch.nn.Linear(1, 1)), "Linear", "tokenizer", "folder")
case("a classifier of two labels as reward", lambda h: h.reward(str(h.classifier(2))), "2 labels", "one is needed")
case("a language model as reward", lambda h: h.reward(h.sound), "is a language model", "train reward_model")
case("a judge where a check is needed", lambda h: h.train("rlvr", reward=str(h.classifier())), "verifier", "'grpo'")
case("a metric that is taken", lambda h: h.reward(lambda completions, log_metric: log_metric("loss", 1) or [1.0] * 4),
     "'loss'", "another")

# Folders, and numbers that run away.

case("a folder of another run", lambda h: h.train(output_dir=finished(h)), "holds another run", "new folder")
case("a folder with a run.json of one's own", lambda h: h.train(output_dir=Path(h.file("own/run.json", "{}")).parent),
     "run.json", "not written by a run", "new folder")
case("a folder with checkpoints of another library",
     lambda h: h.train(output_dir=Path(h.file("hf/checkpoint-5/trainer_state.json", "{}")).parent.parent),
     "checkpoint-5", "not written by us", "new folder")
case("a folder that is a file", lambda h: h.train(output_dir=h.file("out", "mine")), "is a file", "another name")
case("a folder in a file", lambda h: h.train(output_dir=h.file("mine", "mine") + "/run"), "mine/run", "cannot be")
case("a folder that holds the user's own",
     lambda h: h.train(dataset=h.file("samples.jsonl", PAIRS), output_dir=h.folder), "samples.jsonl",
     "not written by a run")
case("a folder with a folder of our name", lambda h: h.train(output_dir=taken(h)), "metrics.jsonl",
     "not written by a run")
if sys.platform == "linux":
    case("a folder that takes no files", lambda h: h.train(output_dir="/proc/self/task"), "/proc/self/task",
         "cannot be")
case("numbers that run away",
     lambda h: h.train("sft", max_steps=9, learning_rate=1e18, max_grad_norm=None, schedule="constant"), "step",
     "not finite", "Lower the learning rate", error=NonFiniteError)
# Answers.

case("one string as prompts", lambda h: h.generate(all="1 + 1 ="), "prompts", "one string", "list")
case("no prompts", lambda h: h.generate(), "no rows")
case("a number as prompt", lambda h: h.generate("1 + 1 =", 5), "row 2", "'prompt'", "5", "int")
case("an empty prompt", lambda h: h.generate("1 + 1 =", ""), "row 2", "empty prompt")
case("a prompt without room", lambda h: h.generate("1 + " * 99, max_new_tokens=8), "8", "128", "max_new_tokens")
case("answers over the positions", lambda h: h.generate("1", max_new_tokens=999), "999", "128", "max_new_tokens")
case("no answers", lambda h: h.generate("1", n=0, max_new_tokens=4), "n=0")
case("answers without tokens", lambda h: h.generate("1", max_new_tokens=0), "max_new_tokens >= 1")
case("turns for a model without template", lambda h: h.generate(TURNS[0]["messages"][:1]), "no chat template")
case("answers of no model", lambda h: h.generate("1", model=None), "model", "NoneType")
case("answers of a model without tokenizer", lambda h: h.generate("1", model=nameless(h.sound)), "tokenizer=")

# fmt: on


def nameless(folder: Any) -> Any:
    """A policy that does not know where it came from."""
    policy = load_policy(folder)
    policy.config._name_or_path = ""
    return policy


# ------------------------------------------------------------------------------------------------- the proofs


@pytest.fixture
def here(tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec  # the same whatever is installed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: find(name, *a) if name not in ABSENT else None)
    return Here(tmp_path, sound)


def marks(one: Case) -> list[Any]:
    return [pytest.mark.xfail(strict=True, reason=one.todo)] if one.todo else []


@pytest.mark.parametrize("one", [pytest.param(one, id=name, marks=marks(one)) for name, one in CASES.items()])
def test_a_mistake_is_told_in_words_and_costs_nothing(one: Case, here: Here) -> None:
    with pytest.raises(one.error) as caught:
        one.mistake(here)
    message = str(caught.value)
    missing = [word for word in one.words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert len(message.splitlines()) <= 6 and len(message) < 1500, message
    assert raised_by(caught.value).startswith("prefzoo"), "told by our own code"
    assert_nothing_lost(here, kept=one.error is NonFiniteError)


def raised_by(error: BaseException) -> str:
    """The module whose line raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    return str(trace.tb_frame.f_globals["__name__"])


def assert_nothing_lost(here: Here, kept: bool = False) -> None:
    """What was there is there, bit for bit; no result was written, and nothing half."""
    after = here.files()
    assert {path: after.get(path) for path in here.before} == here.before
    new = {path.relative_to(here.folder).parts for path in after if path not in here.before}
    models = {"final", "best"} | (set() if kept else {"run.json"})
    assert not [parts for parts in new if models & set(parts) or any(".part" in p for p in parts)]


def test_what_is_kept_of_numbers_that_run_away(here: Here) -> None:
    """The model of before the step whose loss is not finite: a whole folder, all weights finite."""
    with pytest.raises(NonFiniteError):
        CASES["numbers that run away"].mistake(here)
    kept = AutoModelForCausalLM.from_pretrained(next(here.out.glob("checkpoint-*")))
    assert all(torch.isfinite(p).all() for p in kept.parameters())


# ------------------------------------------------------------------------------------------------- the command line

COMMANDS: dict[str, tuple[Callable[[Here], tuple[Any, ...]], tuple[str, ...]]] = {
    "an unknown algorithm": (lambda h: ("train", "dop", "--model", h.sound), ("'dpo'",)),
    "no algorithm": (lambda h: ("train", "--model", h.sound), ("which algorithm?",)),
    "no model": (lambda h: ("train", "dpo"), ("which model?", "--model")),
    "an unknown option": (lambda h: ("train", "dpo", "--model", h.sound, "--betta", "1"), ("'betta'", "'beta'")),
    "a second name": (lambda h: ("train", "dpo", "kto", "--model", h.sound), ("'kto'", "--key value")),
    "a setting without value": (lambda h: ("train", "dpo", "-s", "beta"), ("-s 'beta'", "KEY=VALUE")),
    "columns without =": (lambda h: (*trains(h), "--columns", "good"), ("'good'", "OURS=THEIRS")),
    "no such data": (lambda h: (*trains(h), "--dataset", "a.jsonl"), ("'a.jsonl'", "no such file")),
    "a config that is not there": (lambda h: ("train", "--config", "a.yaml"), ("'a.yaml'", "cannot be read")),
    "a config that is no YAML": (lambda h: ("train", "--config", h.file("a.yaml", "a: [1")), ("a.yaml", "not YAML")),
    "a config that is a list": (lambda h: ("train", "--config", h.file("a.yaml", "- a")), ("a.yaml", "key: value")),
    "a config with an unknown key": (
        lambda h: ("train", "dpo", "--config", h.file("a.yaml", f"model: {h.sound}\nlearnig_rate: 1")),
        ("'learnig_rate'", "'learning_rate'"),
    ),
    "TRL's configuration of nobody": (
        lambda h: ("train", "--from-trl", h.file("a.yaml", "learning_rate: 1e-5")), ("a.yaml", "trainer"),
    ),
    "TRL's configuration of an unknown trainer": (
        lambda h: ("train", "--from-trl", h.file("a.yaml", "trainer: dop\nlearning_rate: 1e-5")), ("dop'", "'trl:dpo'"),
    ),
    "TRL's configuration with an unknown field": (
        lambda h: ("train", "--from-trl", h.file("a.yaml", "trainer: dpo\nlearnig_rate: 1e-5"), "--model", h.sound),
        ("a.yaml", "learnig_rate", "'learning_rate'"),
    ),
    "an option without its value": (
        lambda h: (*trains(h), "--dataset", h.file("a.jsonl", PAIRS), "--beta"), ("'beta'", "float"),
    ),
    "an import that is no Python": (
        lambda h: ("train", "dpo", "--import", h.file("mine.py", "def loss(\n")), ("mine.py", "line 1", "SyntaxError"),
    ),
    "an import that is not there": (lambda h: ("train", "dpo", "--import", "mine.py"), ("mine.py", "no such file")),
    "a reward function that is not there": (
        lambda h: ("train", "grpo", "--model", h.sound, "--reward", h.file("mine.py", "def score(): ...") + ":scor"),
        ("mine.py", "'scor'", "'score'"),
    ),
    "a folder of another run": (
        lambda h: (*trains(h), "--dataset", h.file("a.jsonl", PAIRS), "--output-dir", finished(h)), ("another run",),
    ),
    "data to look at": (lambda h: ("data", h.file("a.jsonl", "no\n")), ("a.jsonl", "line 1")),
    "a dry run on no data": (lambda h: ("doctor", "dpo", "--model", h.sound, "--dataset", "b.jsonl"), ("'b.jsonl'",)),
    "data for nothing": (lambda h: ("data", h.file("a.jsonl", PAIRS), "--for", "dop"), ("'dop'", "'dpo'")),
    "a list of nothing": (lambda h: ("list", "y*"), ("'y*'", "dpo")),
    "a report of nothing": (lambda h: ("report", "nowhere"), ("'nowhere'", "results.json", "--out")),
    "a suite of nothing": (lambda h: ("bench", "pears"), ("'pears'", "'pairs'")),
    "a card of nothing": (lambda h: ("show", "dop"), ("'dpo'",)),
    "a dry run of an unknown algorithm": (lambda h: ("doctor", "dop", "--model", h.sound), ("'dpo'",)),
    "numbers that run away": (
        lambda h: (*trains(h, "sft"), "--dataset", h.file("a.jsonl", PAIRS), "--max-steps", 9, "--output-dir", h.out,
                   "--learning-rate", 1e18, "--max-grad-norm", "null"),
        ("not finite", "learning rate"),
    ),
}  # fmt: skip


def trains(h: Here, name: str = "dpo") -> tuple[str, ...]:
    return ("train", name, "--model", h.sound, "--quiet", "--warmup-steps", "0", "--schedule", "constant")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_tells_it_in_one_line(name: str, here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = COMMANDS[name]
    assert here.cli(*words(here)) == 2
    told_before, message = capsys.readouterr().err.split("error: ")
    assert [word for word in said if word not in message] == [] and len(message.splitlines()) <= 6
    assert "Traceback" not in told_before + message and told_before[-1:] in ("", "\n")
    assert_nothing_lost(here, kept=name == "numbers that run away")


GENERATION: dict[str, tuple[Callable[[Here], tuple[Any, ...]], tuple[str, ...]]] = {
    "a prompt over the model": (lambda h: (h.sound, "--prompt", "1 + " * 99), ("128",)),
    "an answer over the model": (lambda h: (h.sound, "--prompt", "1", "--max-new-tokens", 999), ("999", "128")),
    "a file that is there": (
        lambda h: (h.sound, "--prompt", "1", "--out", h.file("a.jsonl", PAIRS)),
        ("a.jsonl", "exist"),
    ),
    "no such model": (lambda h: (f"{h.sound}l", "--prompt", "1"), ("no such folder",)),
    "no such prompts": (lambda h: (h.sound, "--prompts", "a.jsonl"), ("'a.jsonl'", "no such file")),
    "no prompts in the data": (
        lambda h: (h.sound, "--prompts", h.file("a.jsonl", [{"text": "a"}])),
        ("a.jsonl", "prompt"),
    ),
    "no part of the tokens": (lambda h: (h.sound, "--prompt", "1", "--top-p", 0), ("top_p",)),
    "a reward model": (lambda h: (h.classifier(), "--prompt", "1"), ("sequence classifier",)),
}


@pytest.mark.parametrize("name", GENERATION)
def test_so_does_generation(name: str, here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = GENERATION[name]
    assert here.cli("generate", *words(here)) == 2
    told_before, message = capsys.readouterr().err.split("error: ")
    assert [word for word in said if word not in message] == [] and "Traceback" not in told_before
    assert here.files() == here.before


# ------------------------------------------------------------------------------------------------- what is no mistake


def test_no_reward_at_all_is_a_step_without_gradient(here: Here) -> None:
    run = here.reward(rewards(None))
    assert run.history[-1]["reward_missing"] == 1.0 and "reward" not in run.history[-1]
    old, new = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (here.sound, here.out / "final"))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_an_asynchronous_reward_works(here: Here) -> None:
    async def later(completions: list[str], **_: Any) -> list[float]:
        return [2.0] * len(completions)

    assert here.reward(later).history[-1]["reward"] == 2.0


def test_a_model_with_too_few_embeddings_grows(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(here.sound, added_tokens=("<more>",))
    here.train(tokenizer=tokenizer, quiet=False)
    assert "1 rows were added" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(here.out / "final").get_input_embeddings().weight.shape[0] == 265


def test_a_folder_of_a_run_that_left_nothing_is_taken_again(here: Here) -> None:
    with contextlib.suppress(UsageError):
        here.reward(rewards("no"))
    assert here.out.is_dir()
    here.reward(rewards(1.0))
    assert (here.out / "final" / "config.json").exists()
