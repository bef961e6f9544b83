"""From the command line with models of five families: what comes out is what the libraries load, and says the same."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from prefzoo.cli import main
from prefzoo.data.formats import load_dataset
from prefzoo.data.tokens import tokenise
from prefzoo.models.load import learn_tokenizer, load_policy, load_scorer
from prefzoo.models.tree import TreeBatch

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda **ids: LlamaConfig(**SHAPE, **ids),
    "qwen3": lambda **ids: Qwen3Config(**SHAPE, **ids),
    "gemma": lambda **ids: GemmaConfig(**SHAPE, **ids),
    "gpt2": lambda **ids: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **ids),
    "mistral": lambda **ids: MistralConfig(**SHAPE, sliding_window=16, **ids),
}
START = "\n\nHuman: What is {a} and {b}?\n\nAssistant:"
PAIRS = [
    {
        "chosen": f"{START.format(a=a, b=b)} It is {a + b}, I think.",
        "rejected": f"{START.format(a=a, b=b)} No idea {a}.",
    }
    for a in range(6)
    for b in range(6)
]
TRAIN = ["--max-steps", "2", "--rows-per-step", "8", "--learning-rate", "1e-2", "--warmup-steps", "0", "--quiet"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in PAIRS)
    return file


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of this family and random weights, as the library saves it."""
    return make(request.param, [side for row in PAIRS for side in row.values()], tmp_path_factory.mktemp(request.param))


def make(family: str, texts: list[str], folder: Path) -> Path:
    words = learn_tokenizer(texts, 400)
    ids = {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
           "pad_token_id": words.pad_token_id}  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family](**ids)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def run(*words: Any) -> None:
    assert main([str(w) for w in words]) == 0


def logits(model: Any, words: PreTrainedTokenizerBase) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**words(PAIRS[3]["chosen"], return_tensors="pt", return_token_type_ids=False)).logits[0]


def test_the_result_of_dpo_is_a_model_of_the_library(model: Path, pairs: Path, tmp_path: Path) -> None:
    assert load_policy(model).packed, "this family passes the load check"
    run("train", "dpo", "--model", model, "--dataset", pairs, "--output-dir", tmp_path / "run", *TRAIN)
    words = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert trained.config.model_type == AutoModelForCausalLM.from_pretrained(model).config.model_type
    moved = (logits(trained, words) - logits(AutoModelForCausalLM.from_pretrained(model), words)).abs().max()
    assert torch.isfinite(moved) and moved > 1e-2
    answer = trained.generate(**words(START.format(a=1, b=2), return_tensors="pt", return_token_type_ids=False),
                              max_new_tokens=4, do_sample=False)  # fmt: skip
    assert answer.shape[1] > 4


def test_an_adapter_loads_with_peft_and_merges_to_the_same(model: Path, pairs: Path, tmp_path: Path) -> None:
    lora = ("--lora", "--lora-rank", "4")
    run("train", "dpo", "--model", model, "--dataset", pairs, "--output-dir", tmp_path / "a", *TRAIN, *lora)
    run("train", "dpo", "--model", model, "--dataset", pairs, "--output-dir", tmp_path / "b", *TRAIN, *lora, "--merge")
    words = AutoTokenizer.from_pretrained(tmp_path / "a" / "final")
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a" / "final")
    assert isinstance(adapter, PeftModel)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "final")
    torch.testing.assert_close(logits(adapter, words), logits(merged, words), rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(model)
    assert (logits(adapter, words) - logits(base, words)).abs().max() > 1e-3
    with adapter.disable_adapter():
        torch.testing.assert_close(logits(adapter, words), logits(base, words))


def test_a_reward_model_is_a_classifier_of_the_library_with_the_same_scores(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    final = tmp_path / "run" / "final"
    run("train", "reward_model", "--model", model, "--dataset", pairs, "--output-dir", tmp_path / "run", *TRAIN)
    words = AutoTokenizer.from_pretrained(final)
    samples, _ = tokenise(load_dataset(PAIRS[:6]), words, "pairs")
    with torch.no_grad():
        ours_B = load_scorer(final)(TreeBatch.of(samples)).rewards_B
    classifier = AutoModelForSequenceClassification.from_pretrained(final).eval()
    texts = [row[side] + words.eos_token for row in PAIRS[:6] for side in ("chosen", "rejected")]
    batch = words(texts, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
    with torch.no_grad():
        theirs_B = classifier(**batch).logits[:, 0]
    assert ours_B is not None and ours_B.std() > 1e-3
    torch.testing.assert_close(ours_B, theirs_B, rtol=1e-4, atol=1e-4)


def test_real_pairs(data_dir: Path, tmp_path: Path) -> None:
    """HH-RLHF, as somebody would who has just installed this: the file as it is, a Qwen3 of their own."""
    file = data_dir / "hh_rlhf" / "hh_rlhf_harmless_test.jsonl.gz"
    folder = make("qwen3", [row["chosen"] for row in load_dataset(file).rows[:200]], tmp_path / "model")
    run("train", "dpo", "--model", folder, "--dataset", file, "--output-dir", tmp_path / "run", *TRAIN)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["rows"] > 2000 and record["spent"]["optimizer_steps"] == 2
