"""What users bring: tokenizers and folders of all kinds, sound or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from prefzoo.models.load import (
    Adapter,
    end_ids,
    learn_tokenizer,
    load_causal,
    load_policy,
    load_tokenizer,
    save_policy,
    set_checkpointing,
    tiny_model,
)
from prefzoo.models.roles import Policy
from prefzoo.models.tokenizer import same_tokens, vocabulary_size
from prefzoo.models.tree import TreeBatch, pack_rows
from prefzoo.registry import UsageError
from prefzoo.rollout import Sampling, rollout_engine

hf_logging.disable_progress_bar()
SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture
def words() -> PreTrainedTokenizerBase:
    return learn_tokenizer(["a b c d e f"], 262)


@pytest.fixture
def folder(words: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=262, **SHAPE)).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------------ tokenizers


def test_padding_is_eos_where_there_is_none(words: PreTrainedTokenizerBase, folder: Path) -> None:
    words.pad_token = None
    words.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token_id == words.eos_token_id


def test_a_tokenizer_without_eos_is_refused(words: PreTrainedTokenizerBase, folder: Path) -> None:
    words.eos_token = None
    words.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"has no EOS token, so no answer would ever end; set tokenizer.eos_token"):
        load_tokenizer(folder)


def test_chatml_and_added_tokens(folder: Path) -> None:
    chat = load_tokenizer(folder, chat_template="chatml", added_tokens=("<tool>",))
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    text = chat.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
    prompt = chat.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    for token in ("<|im_start|>", "<|im_end|>", "<tool>"):
        assert len(chat(token, add_special_tokens=False)["input_ids"]) == 1
    assert vocabulary_size(chat) == 265 == len(chat)
    chat.save_pretrained(folder / "again")
    assert load_tokenizer(folder / "again").apply_chat_template(turns, tokenize=False) == text
    assert not same_tokens(chat, load_tokenizer(folder)) and same_tokens(load_tokenizer(folder), chat)


def test_a_template_from_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "turns.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}")
    chat = load_tokenizer(folder, chat_template=str(file))
    assert chat.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "user: a<eos>"
    for text, words in (("{% for", "cannot render"), ("{{ raise_exception('no') }}", r"cannot render.*\(no\)")):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            load_tokenizer(folder, chat_template=str(file))
    with pytest.raises(UsageError, match="neither 'chatml' nor a Jinja file"):
        load_tokenizer(folder, chat_template="chatlm")


def test_every_id_that_ends_an_answer(folder: Path) -> None:
    plain, chat = load_tokenizer(folder), load_tokenizer(folder, chat_template="chatml")
    end = chat.convert_tokens_to_ids("<|im_end|>")
    model = load_causal(folder)
    assert end_ids(plain) == (2,) and end_ids(chat) == (2, end)
    model.generation_config.eos_token_id = [7, 2]
    assert end_ids(plain, model) == (2, 7) and end_ids(chat, model) == (2, 7, end)
    chat.chat_template = "{% for m in messages %}{{ m.content }} bye {% endfor %}"
    assert end_ids(chat) == (2,), "ordinary words end no answer"
    chat.chat_template = "{{ raise_exception('other roles') }}"
    assert end_ids(chat) == (2,)


def test_rollouts_stop_at_every_end(folder: Path) -> None:
    policy = load_policy(folder)
    prompts = pack_rows([([5, 6], [[1]]), ([7], [[1]])]).as_prompts()
    sampled = rollout_engine(policy, range(0, 262, 3)).generate(prompts, 8, Sampling(max_new_tokens=12), seed=0)
    rows = [sampled.completions[i] for i in range(16)]
    assert all((row[:-1] % 3).all() for row in rows)
    assert [int(f) for f in sampled.columns["finish"]] == [int(row[-1] % 3 != 0) for row in rows]
    assert {int(row[-1]) for row in rows if row[-1] % 3 == 0} - {2}


# ------------------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_grow_with_the_tokenizer(tied: bool, folder: Path, words: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=262, tie_word_embeddings=tied, **SHAPE))
    model.save_pretrained(folder)
    more = load_tokenizer(folder, chat_template="chatml")
    notes: list[str] = []
    policy = load_policy(folder, tokenizer=more, note=notes.append)
    assert notes == ["the tokenizer has 264 ids, the model 262 embeddings: 2 rows were added."]
    old = AutoModelForCausalLM.from_pretrained(folder)
    for new_layer, old_layer in (
        (policy.model.get_input_embeddings(), old.get_input_embeddings()),
        (policy.model.get_output_embeddings(), old.get_output_embeddings()),
    ):
        assert torch.equal(new_layer.weight[:262], old_layer.weight)
        torch.testing.assert_close(new_layer.weight[262:].mean(0), old_layer.weight.mean(0), atol=1e-3, rtol=1e-2)
    with torch.no_grad():
        tree = TreeBatch.of(pack_rows([([262, 5], [[6, 263]])]))
        ours = policy(tree).logps_C
        save_policy(policy, more, folder / "out")
        torch.testing.assert_close(load_policy(folder / "out")(tree).logps_C, ours)
    again = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert set(again.generation_config.eos_token_id) == {2, 263}, "generate() stops where the answers end"
    same = [load_policy(folder, tokenizer=more).model.get_input_embeddings().weight for _ in range(2)]
    assert torch.equal(*same), "the new rows are drawn alike each time"


def test_a_larger_model_keeps_its_embeddings(folder: Path, words: PreTrainedTokenizerBase) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=320, **SHAPE)).save_pretrained(folder)
    notes: list[str] = []
    assert load_policy(folder, tokenizer=words, note=notes.append).model.config.vocab_size == 320 and not notes


# ------------------------------------------------------------------------------------------------ folders


def test_the_types_of_weights(folder: Path, words: PreTrainedTokenizerBase) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        policy = load_policy(folder, dtype=dtype)
        assert {p.dtype for p in policy.parameters()} == {dtype}
        save_policy(policy, words, folder / "out")
        assert AutoModelForCausalLM.from_pretrained(folder / "out", dtype="auto").dtype == dtype


def test_settings_of_generation_that_the_library_would_not_write(folder: Path, words: PreTrainedTokenizerBase) -> None:
    """A temperature without sampling, as published folders have it, must not lose a finished run."""
    policy = load_policy(folder)
    policy.model.generation_config.temperature = 0.7
    policy.model.generation_config.do_sample = False
    save_policy(policy, words, folder / "out")
    assert load_policy(folder / "out").model.generation_config.temperature == 0.7


@pytest.mark.parametrize("settings", [
    {"temperature": 0.7}, {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5}, {"pad_token_id": -1},
    {"do_sample": True, "temperature": 0.6, "use_cache": False, "cache_implementation": "static"},
], ids=str)  # fmt: skip
def test_settings_of_generation_that_contradict_each_other_lose_nothing(
    settings: dict[str, Any], folder: Path, words: PreTrainedTokenizerBase
) -> None:
    """Written whole, merged and as an adapter, and still with the id that ends an answer."""
    (folder / "generation_config.json").write_text(json.dumps(settings))
    adapted = load_policy(folder, adapter=Adapter(rank=2))
    for name, policy, merge in (("full", load_policy(folder), False), ("merged", adapted, True)):
        save_policy(policy, words, folder / name, merge=merge)
        written = AutoModelForCausalLM.from_pretrained(folder / name)
        assert written.generation_config.eos_token_id == 2
    save_policy(adapted, words, folder / "adapter")
    assert load_policy(folder / "adapter").adapter is None


def bert(folder: Path) -> None:
    AutoModelForCausalLM.from_config(BertConfig(vocab_size=262, **SHAPE)).save_pretrained(folder)


def classifier(folder: Path) -> None:
    config = LlamaConfig(vocab_size=262, num_labels=1, **SHAPE)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads((folder / "config.json").read_text())
    change(facts)
    (folder / "config.json").write_text(json.dumps(facts))


def remote(facts: dict[str, Any]) -> None:
    facts["model_type"] = "their_own"
    facts["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no causal language model .*model\.safetensors"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "holds no config.json, so it is not a model's folder"),
    "configuration not JSON": (lambda f: (f / "config.json").write_text("{"), "its configuration could not be read"),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "no causal language model could"),
    "unknown architecture": (lambda f: rewrite(f, lambda c: c.update(model_type="lama")), "lama"),
    "remote code": (lambda f: rewrite(f, remote), r"Give trust_remote_code=True if you trust it"),
    "another shape": (
        lambda f: rewrite(f, lambda c: c.update(intermediate_size=64)),
        "could not|could be|lacks weights",
    ),
    "more layers": (lambda f: rewrite(f, lambda c: c.update(num_hidden_layers=2)), r"lacks weights.*layers\.1\..*more"),
    "an encoder": (bert, "neither packed nor padded batches give"),
    "a classifier": (classifier, "is a sequence classifier .*not a language model; give it as reward="),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_no_language_model_is_told_in_words(name: str, folder: Path) -> None:
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(UsageError, match=message) as caught:
        load_policy(folder)
    assert name == "an encoder" or str(folder) in str(caught.value)


@pytest.mark.parametrize("load", [load_policy, load_tokenizer])
def test_paths_that_lead_nowhere(load: Any, folder: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder"):
        load(folder / "none")
    with pytest.raises(UsageError, match="is a file; give the folder"):
        load(folder / "config.json")
    with pytest.raises(UsageError, match=r"model 'org/none': "):
        load("org/none")


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match="no tokenizer could be loaded"):
        load_tokenizer(folder)


def test_options_without_effect_on_a_model_in_memory(words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="revision has no effect on a model in memory"):
        load_policy(tiny_model(words), revision="main")


# ------------------------------------------------------------------------------------------------ precision


def test_a_float32_head_over_a_bfloat16_trunk(folder: Path) -> None:
    """Float32 logits of the same hidden states; bfloat16 ones differ. Chunks, gradients and both batches agree."""
    tree = TreeBatch.of(pack_rows([([5, 6, 7], [[8, 9, 10], [11]]), ([12], [[13, 14]])]))
    policy = load_policy(folder)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = policy(tree).logps_C
        policy.fp32_head = True
        exact = policy(tree).logps_C
        torch.testing.assert_close(policy.chunked(tree, 2).logps_C, exact)
        hidden = policy.model.model(
            input_ids=tree.ids_N[None], position_ids=tree.positions_N[None], attention_plan=tree.plan, use_cache=False
        ).last_hidden_state[0, tree.predict_C]
    logits = hidden.float() @ policy.model.lm_head.weight.float().T
    expected = logits.log_softmax(-1).gather(-1, tree.target_C[:, None])[:, 0]
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, exact, atol=1e-5)
    half = load_policy(folder, dtype=torch.bfloat16)
    half.fp32_head = True
    logps = half(tree).logps_C
    assert logps.dtype == torch.float32
    logps.sum().backward()
    assert all(p.grad is not None for p in half.parameters())


def test_in_float32_the_float32_head_is_the_library_head(folder: Path) -> None:
    tree = TreeBatch.of(pack_rows([([5, 6, 7], [[8, 9, 10], [11]])]))
    policy = load_policy(folder)
    with torch.no_grad():
        plain = policy(tree).logps_C
        policy.fp32_head = True
        torch.testing.assert_close(policy(tree).logps_C, plain)


def test_checkpointing_that_a_model_does_not_know_is_refused(folder: Path) -> None:
    policy = load_policy(folder)
    policy.model.__class__ = type("Rigid", (type(policy.model),), {"supports_gradient_checkpointing": False})
    with pytest.raises(UsageError, match="'llama' cannot run with gradient_checkpointing"):
        set_checkpointing(policy)


def test_positions_of_a_gpt2(words: PreTrainedTokenizerBase) -> None:
    """Learned positions end: rollouts beyond them are refused before the first token."""
    config = GPT2Config(vocab_size=262, n_embd=32, n_layer=1, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2)
    policy = load_policy(AutoModelForCausalLM.from_config(config))
    engine = rollout_engine(policy, 2)
    prompts = pack_rows([([5] * 8, [[1]])]).as_prompts()
    assert len(engine.generate(prompts, 2, Sampling(max_new_tokens=8), 0)) == 2
    with pytest.raises(UsageError, match="16 positions"):
        engine.generate(prompts, 2, Sampling(max_new_tokens=9), 0)


def test_a_policy_is_a_source_too(folder: Path) -> None:
    policy = load_policy(folder)
    again = load_policy(policy)
    assert isinstance(again, Policy) and again.model is not policy.model
