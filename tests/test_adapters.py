"""Adapters: what is trained, what they are compared with, and what comes out of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from prefzoo.models.load import (
    Adapter,
    critic_of,
    learn_tokenizer,
    load_policy,
    load_scorer,
    load_tokenizer,
    merged,
    new_critic,
    new_scorer,
    save_policy,
    save_scorer,
    set_checkpointing,
)
from prefzoo.models.reference import cached_logps, clone, reference_of, weights_hash
from prefzoo.models.roles import Policy, is_adapter
from prefzoo.models.tree import TreeBatch, pack_rows
from prefzoo.registry import UsageError
from prefzoo.rollout import Sampling, rollout_engine

hf_logging.disable_progress_bar()
ROWS = pack_rows([([5, 6, 7], [[8, 9, 10, 2], [11, 12]]), ([13, 14], [[15, 16, 17]])])
VARIANTS = ("lora", "dora", "rslora")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return learn_tokenizer(["a b c d e f"], 262)


@pytest.fixture(scope="module")
def base(words: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("llama", words, tmp_path_factory.mktemp("base"))


def write(kind: str, words: PreTrainedTokenizerBase, folder: Path) -> Path:
    """A tiny random model's folder."""
    torch.manual_seed(0)
    ends: dict[str, Any] = {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2}
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "max_position_embeddings": 128,
    }
    config = {
        "llama": lambda: LlamaConfig(**ends, **shape),
        "tied": lambda: LlamaConfig(**ends, **shape, tie_word_embeddings=True),
        "gpt2": lambda: GPT2Config(**ends, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
    }[kind]()  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def scores(policy: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return policy(TreeBatch.of(ROWS), **options).logps_C


def moved(policy: Policy, steps: int = 3) -> Policy:
    """A few steps of ascent on the log-probabilities."""
    policy.requires_grad_(True).train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    for _ in range(steps):
        policy.zero_grad()
        policy(TreeBatch.of(ROWS)).logps_C.sum().backward()
        with torch.no_grad():
            for p in trained:
                if p.grad is not None:
                    p += 0.02 * p.grad.sign()
    return policy


# ------------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_changes_nothing_and_is_all_that_moves(
    variant: Any, kind: str, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = write(kind, words, tmp_path)
    policy = load_policy(folder, adapter=Adapter(variant, rank=4))
    torch.testing.assert_close(scores(policy), scores(load_policy(folder)), atol=1e-5, rtol=1e-5)
    assert policy.fresh_adapter
    before = {k: v.clone() for k, v in policy.named_parameters()}
    moved(policy)
    changed = {k for k, v in policy.named_parameters() if not torch.equal(v, before[k])}
    assert changed and all(is_adapter(k) for k in changed)
    assert {k for k, v in policy.named_parameters() if v.requires_grad} >= changed
    assert any("magnitude" in k for k in changed) == (variant == "dora")
    assert not policy.fresh_adapter and not torch.allclose(scores(policy), scores(load_policy(folder)), atol=1e-2)


def test_every_parameter_has_one_name(base: Path) -> None:
    policy = load_policy(base, adapter=Adapter())
    assert not any("base_model.model" in k for k in policy.state_dict())
    assert len(list(policy.parameters())) == len({id(p) for p in policy.parameters()})


def test_seeds_draw_the_adapter_and_disturb_nothing(base: Path) -> None:
    def factor(seed: int) -> torch.Tensor:
        policy = load_policy(base, adapter=Adapter(seed=seed))
        return next(p for k, p in policy.named_parameters() if "lora_A" in k)

    state = torch.random.get_rng_state()
    assert torch.equal(factor(0), factor(0)) and not torch.equal(factor(0), factor(1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rslora_scales_by_the_root_of_the_rank(base: Path) -> None:
    scale = {}
    for variant in ("lora", "rslora"):
        policy = load_policy(base, adapter=Adapter(variant, rank=16, alpha=32))
        scale[variant] = next(m.scaling["default"] for m in policy.modules() if hasattr(m, "lora_A"))
    assert scale == {"lora": 2.0, "rslora": 8.0}


def test_bfloat16_weights_carry_a_float32_adapter(base: Path) -> None:
    """A step of 1e-6 vanishes in bfloat16."""
    policy = load_policy(base, dtype=torch.bfloat16, adapter=Adapter())
    kinds = {is_adapter(k): p.dtype for k, p in policy.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_targets_by_name(base: Path) -> None:
    policy = load_policy(base, adapter=Adapter(targets=("q_proj", "v_proj")))
    assert {k.split(".")[-4] for k, _ in policy.named_parameters() if "lora_A" in k} == {"q_proj", "v_proj"}
    with pytest.raises(UsageError, match=r"no adapter on .*query.*Linear layers: .*q_proj"):
        load_policy(base, adapter=Adapter(targets=("query",)))


def test_checkpointed_adapters_have_the_same_gradients(base: Path) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        policy = moved(load_policy(base, adapter=Adapter(rank=4)))
        if checkpointing:
            set_checkpointing(policy)
        policy.zero_grad()
        policy.train()(TreeBatch.of(ROWS)).logps_C.square().sum().backward()
        return {k: p.grad.clone() for k, p in policy.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys() and all("lora" in k for k in plain)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], atol=1e-6, rtol=1e-5)


def test_rollouts_are_of_the_adapted_model(base: Path) -> None:
    policy = moved(load_policy(base, adapter=Adapter(rank=4)))
    samples = rollout_engine(policy, 2).generate(ROWS.as_prompts(), 3, Sampling(max_new_tokens=8), seed=0)
    with torch.no_grad():
        learner_C = policy(TreeBatch.of(samples)).logps_C
        torch.testing.assert_close(samples.tokens["old_logps"], learner_C, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ references


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_of_a_fresh_adapter_is_the_model_under_it(variant: Any, base: Path) -> None:
    """The same weights, no copy, and as if full training asked; also between a forward and its backward."""
    start = scores(load_policy(base))
    policy = load_policy(base, adapter=Adapter(variant, rank=4))
    reference = reference_of(policy, live=True).requires_grad_(False).eval()
    assert {id(p) for p in reference.parameters()} == {id(p) for p in policy.parameters()}
    trained = {k for k, p in moved(policy).named_parameters() if p.requires_grad}
    policy.zero_grad()
    waiting = policy(TreeBatch.of(ROWS)).logps_C
    torch.testing.assert_close(reference(TreeBatch.of(ROWS)).logps_C, start, atol=1e-5, rtol=1e-5)
    assert {k for k, p in policy.named_parameters() if p.requires_grad} == trained and policy.training
    waiting.sum().backward()
    late = {k: p.grad.clone() for k, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    policy(TreeBatch.of(ROWS)).logps_C.sum().backward()
    assert all(torch.equal(late[k], p.grad) for k, p in policy.named_parameters() if p.grad is not None)


def test_the_kl_to_the_model_under_an_adapter(base: Path) -> None:
    """0 while the adapter is fresh; then that to the base, and the adapter is on again for the policy itself."""
    policy = load_policy(base, adapter=Adapter("lora", rank=4))
    other, tree, want = reference_of(policy, live=True), TreeBatch.of(ROWS), frozenset({"kl"})
    kl = lambda against, p=policy: p(tree, want=want, other=against).kl_C  # noqa: E731
    assert float(kl(other).detach().abs().max()) < 1e-6
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    moved = kl(other)
    torch.testing.assert_close(moved, kl(load_policy(base)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy.chunked(tree, 2, want=want, other=other).kl_C, moved, atol=1e-5, rtol=1e-5)
    assert float(moved.detach().max()) > 1e-3
    moved.sum().backward()
    assert all((p.grad is not None) == is_adapter(n) for n, p in policy.named_parameters())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_reference_of_a_fresh_adapter_takes_the_temperature(temperature: float, base: Path) -> None:
    policy = load_policy(base, adapter=Adapter(rank=4))
    reference = reference_of(policy, live=True)
    start = scores(load_policy(base), temperature=temperature)
    torch.testing.assert_close(scores(reference, temperature=temperature), start, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_an_adapter_on_the_embeddings_is_fresh_at_first(
    kind: str, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Of an embedding the first factor starts at zero, of a linear layer the second."""
    folder = write(kind, words, tmp_path)
    policy = load_policy(folder, adapter=Adapter(rank=4, targets=("embed_tokens", "lm_head", "q_proj")))
    assert policy.fresh_adapter
    reference = reference_of(policy, live=True)
    moved(policy)
    assert not policy.fresh_adapter
    torch.testing.assert_close(scores(reference), scores(load_policy(folder)), atol=1e-5, rtol=1e-5)


def test_the_reference_of_a_trained_adapter_is_the_policy_as_it_was(base: Path) -> None:
    policy = moved(load_policy(base, adapter=Adapter(rank=4)))
    then = scores(policy)
    assert reference_of(policy, live=False) is policy
    frozen = reference_of(policy, live=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    moved(policy)
    torch.testing.assert_close(scores(frozen), then)
    assert not torch.allclose(scores(policy), then)


def test_all_start_from_one_stored_reference(base: Path, tmp_path: Path) -> None:
    """Full training and adapters of any kind and seed ask for the same file; a trained adapter does not."""
    policies = [load_policy(base), *(load_policy(base, adapter=Adapter(v, rank=r, seed=r)) for v, r in
                                     (("lora", 2), ("lora", 4), ("dora", 4)))]  # fmt: skip
    found = [cached_logps(reference_of(p, live=False), ROWS, 64, "cpu", tmp_path) for p in policies]
    assert len(list(tmp_path.iterdir())) == 1
    assert all(torch.equal(f, found[0]) for f in found)
    trained = moved(policies[1])
    cached_logps(reference_of(trained, live=False), ROWS, 64, "cpu", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_each_precision_has_a_stored_reference_of_its_own(base: Path, tmp_path: Path) -> None:
    """And what is read back is what would be computed."""
    policy = load_policy(base)
    found = []
    for _ in range(2):
        for precision, policy.fp32_head in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
            stored = cached_logps(policy, ROWS, 64, "cpu", tmp_path, precision)
            assert torch.equal(stored, cached_logps(policy, ROWS, 64, "cpu", None, precision))
            found.append(stored)
    assert len(list(tmp_path.iterdir())) == 3
    assert not any(torch.equal(found[a], found[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_copy_is_whole(base: Path) -> None:
    policy = moved(load_policy(base, adapter=Adapter(rank=4)))
    copied = clone(policy)
    assert copied.adapter is not policy.adapter and copied.adapter.get_base_model() is copied.model
    assert torch.equal(scores(copied), scores(policy))
    moved(copied)
    assert not torch.equal(scores(copied), scores(policy))


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_and_the_library_load_what_was_saved(
    variant: Any, kind: str, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The adapter's folder with peft, the merged folder without; both give the trained log-probabilities."""
    import peft

    folder = write(kind, words, tmp_path / "base")
    policy = moved(load_policy(folder, adapter=Adapter(variant, rank=4)))
    ours = scores(policy)
    save_policy(policy, words, tmp_path / "adapter")
    save_policy(policy, words, tmp_path / "merged", merge=True)
    loaded = [
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload(),
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
        .merge_and_unload(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    ]  # fmt: skip
    for model in loaded:
        torch.testing.assert_close(scores(load_policy(model)), ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores(policy), ours)
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == words.get_vocab()
    assert not list((tmp_path / "adapter").glob("model*"))


def test_a_process_without_prefzoo_loads_it(base: Path, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    policy = moved(load_policy(base, adapter=Adapter(rank=4)))
    save_policy(policy, words, tmp_path / "adapter")
    save_policy(policy, words, tmp_path / "merged", merge=True)
    code = (
        "import sys, torch; from peft import AutoPeftModelForCausalLM as P; "
        "from transformers import AutoModelForCausalLM as M; ids = torch.tensor([[1, 5, 6]]); "
        "a = P.from_pretrained(sys.argv[1])(ids).logits; b = M.from_pretrained(sys.argv[2])(ids).logits; "
        "assert torch.allclose(a, b, atol=1e-4); assert 'prefzoo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "adapter", tmp_path / "merged"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_an_adapter_goes_on_where_it_was_left(base: Path, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    policy = moved(load_policy(base, adapter=Adapter("dora", rank=4)))
    save_policy(policy, words, tmp_path / "adapter")
    again = load_policy(tmp_path / "adapter", adapter=Adapter("dora"))
    torch.testing.assert_close(scores(again), scores(policy))
    moved(policy)
    torch.testing.assert_close(scores(moved(again)), scores(policy), atol=1e-4, rtol=1e-4)
    assert all(is_adapter(k) for k, p in again.named_parameters() if p.requires_grad)
    save_policy(again, words, tmp_path / "again")
    torch.testing.assert_close(scores(load_policy(tmp_path / "again", adapter=Adapter("dora"))), scores(again))


def test_without_being_asked_an_adapter_is_merged_and_all_is_trained(
    base: Path, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    policy = moved(load_policy(base, adapter=Adapter(rank=4)))
    save_policy(policy, words, tmp_path / "adapter")
    notes: list[str] = []
    for source in (tmp_path / "adapter", policy, policy.adapter):
        whole = load_policy(source, note=notes.append)
        assert whole.adapter is None and "merged" in notes.pop()
        assert all(p.requires_grad for p in whole.parameters())
        torch.testing.assert_close(scores(whole), scores(policy), atol=1e-4, rtol=1e-4)
        save_policy(whole, words, tmp_path / "whole")
        torch.testing.assert_close(scores(load_policy(tmp_path / "whole")), scores(whole))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_an_adapter_on_one_embedding_is_added_to_that_one_alone(
    target: str, kind: str, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Tied embeddings part; the merged model, its folder, and the adapter's folder are the model that was trained."""
    folder = write(kind, words, tmp_path / "base")
    policy = moved(load_policy(folder, adapter=Adapter(rank=4, targets=(target, "q_proj"))))
    ours = scores(policy)
    assert not torch.allclose(ours, scores(load_policy(folder)), atol=1e-2)
    save_policy(policy, words, tmp_path / "adapter")
    save_policy(policy, words, tmp_path / "merged", merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    again = load_policy(tmp_path / "adapter")
    save_policy(again, words, tmp_path / "again")
    for whole in (merged(policy), load_policy(tmp_path / "merged"), load_policy(loaded), again,
                  load_policy(tmp_path / "again")):  # fmt: skip
        torch.testing.assert_close(scores(whole), ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores(policy), ours)


def test_a_folder_named_from_where_one_stands_is_found_from_elsewhere(
    base: Path, words: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    policy = moved(load_policy(base.name, adapter=Adapter(rank=4)))
    save_policy(policy, words, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    torch.testing.assert_close(scores(load_policy("adapter", adapter=Adapter())), scores(policy))


def test_a_merged_adapter_has_the_type_that_was_asked_for(
    base: Path, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    policy = moved(load_policy(base, adapter=Adapter(rank=4)))
    save_policy(policy, words, tmp_path / "adapter")
    for source in (tmp_path / "adapter", policy, policy.adapter):
        for dtype in (torch.float32, torch.bfloat16):
            assert {p.dtype for p in load_policy(source, dtype=dtype).parameters()} == {dtype}


@pytest.mark.parametrize(("asked", "words_"), [
    (Adapter(rank=8), "has rank 4, not 8"), (Adapter(alpha=1.0), "has alpha 32, not 1.0"),
    (Adapter("dora"), "has variant 'lora', not 'dora'"), (Adapter(targets=("q_proj",)), "has targets"),
], ids=str)  # fmt: skip
def test_a_found_adapter_is_not_contradicted(
    asked: Adapter, words_: str, base: Path, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save_policy(load_policy(base, adapter=Adapter(rank=4)), words, tmp_path / "adapter")
    with pytest.raises(UsageError, match=words_):
        load_policy(tmp_path / "adapter", adapter=asked)


def test_a_model_in_memory_gives_a_merged_folder_and_says_so(
    base: Path, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Nobody can know that the weights in memory are still those of the folder that they came from."""
    notes: list[str] = []
    model = AutoModelForCausalLM.from_pretrained(base)
    policy = moved(load_policy(model, adapter=Adapter(rank=4), note=notes.append))
    assert "written merged" in notes[0]
    save_policy(policy, words, tmp_path / "out")
    torch.testing.assert_close(scores(load_policy(tmp_path / "out")), scores(policy), atol=1e-4, rtol=1e-4)


def test_so_does_a_peft_model_in_memory_whose_base_was_changed(
    base: Path, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    import peft

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    found = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM"))
    notes: list[str] = []
    policy = moved(load_policy(found, adapter=Adapter(), note=notes.append))
    assert "written merged" in notes[0]
    save_policy(policy, words, tmp_path / "out")
    assert not (tmp_path / "out/adapter_config.json").exists()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(scores(load_policy(written)), scores(policy), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_learn_with_the_adapter_and_survive(
    tied: bool, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    import peft

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    more = load_tokenizer(tmp_path / "base", chat_template="chatml", added_tokens=("<tool>",))
    notes: list[str] = []
    policy = load_policy(tmp_path / "base", tokenizer=more, adapter=Adapter(rank=4), note=notes.append)
    assert "3 rows were added" in notes[0]
    whole = load_policy(tmp_path / "base", tokenizer=more)
    assert weights_hash(reference_of(policy, live=False)) == weights_hash(whole)
    start = {k: v.clone() for k, v in policy.named_parameters()}
    new = [more.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<tool>")]
    rows = pack_rows([([new[0], 5], [[6, new[1]]]), ([new[2]], [[7, new[1]]])])
    policy.requires_grad_(True)
    for _ in range(2):
        policy.zero_grad()
        policy(TreeBatch.of(rows)).logps_C.sum().backward()
        with torch.no_grad():
            for p in policy.parameters():
                if p.grad is not None:
                    p += 0.05 * p.grad.sign()
    changed = {k for k, v in policy.named_parameters() if not torch.equal(v, start[k])}
    assert any("trainable_tokens" in k for k in changed) and all(is_adapter(k) for k in changed)
    save_policy(policy, more, tmp_path / "adapter")
    save_policy(policy, more, tmp_path / "merged", merge=True)
    with torch.no_grad():
        ours = policy(TreeBatch.of(rows)).logps_C
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
        for source in (loaded, tmp_path / "merged", tmp_path / "adapter"):
            found = load_policy(source)(TreeBatch.of(rows)).logps_C
            torch.testing.assert_close(found, ours, atol=1e-4, rtol=1e-4)
    assert len(load_tokenizer(tmp_path / "adapter")) == len(more)


def test_new_tokens_learn_where_the_model_had_rows_to_spare(words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Many models have more embeddings than their tokenizer has ids; nothing grows, and still these rows are new."""
    config = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=4)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    more = load_tokenizer(tmp_path, added_tokens=("<tool>",))
    policy = load_policy(tmp_path, tokenizer=more, adapter=Adapter())
    assert policy.model.config.vocab_size == 320
    learning = [p for k, p in policy.named_parameters() if "trainable_tokens" in k]
    assert len(learning) == 2 and all(len(p) == 1 and p.requires_grad for p in learning)
    assert not any("trainable_tokens" in k for k in load_policy(tmp_path, adapter=Adapter()).state_dict())


# ------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_is_refused_in_words(base: Path, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    more, tied = load_tokenizer(base, added_tokens=("<tool>",)), write("tied", words, tmp_path / "tied")
    cases: list[tuple[Any, str]] = [
        (lambda: Adapter("lorra"), "did you mean 'lora'"),  # type: ignore[arg-type]
        (lambda: Adapter(rank=0), "rank is above 0"),
        (lambda: load_policy(base, load_in_4bit=True), "needs an adapter"),
        (lambda: load_policy(base, load_in_4bit=True, adapter=Adapter()), "needs the package bitsandbytes|CUDA"),
        (lambda: load_policy(load_policy(base, adapter=Adapter()).model), "this model holds an adapter"),
        (
            lambda: load_policy(base, tokenizer=more, adapter=Adapter(targets=("embed_tokens", "q_proj"))),
            "of their own",
        ),
        (lambda: load_policy(base, tokenizer=more, adapter=Adapter(targets=("lm_head",))), r"lora_targets \('lm_head'"),
        (lambda: load_policy(tied, tokenizer=more, adapter=Adapter(targets=("lm_head",))), r"lora_targets \('lm_head'"),
        (lambda: load_policy(broken("not json")), "adapter_config.json cannot be read"),
        (lambda: load_policy(broken("{}")), "does not say which model it belongs to"),
        (lambda: load_policy(broken('{"base_model_name_or_path": "/no/such"}')), "there is no such folder"),
    ]

    def broken(text: str) -> Path:
        folder = tmp_path / str(len(text))
        folder.mkdir()
        (folder / "adapter_config.json").write_text(text)
        words.save_pretrained(folder)
        return folder

    for call, message in cases:
        with pytest.raises(UsageError, match=message):
            call()


# ------------------------------------------------------------------------------------------------ heads


def test_heads_of_an_adapted_policy_train_the_adapter_and_the_head(
    base: Path, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    policy = moved(load_policy(base, adapter=Adapter(rank=4)))
    tree = TreeBatch.of(ROWS)
    for make in (new_scorer, new_critic, lambda p: critic_of(new_scorer(p))):
        scorer = make(policy)
        assert {is_adapter(k) or k.startswith("head.") for k, p in scorer.named_parameters() if p.requires_grad} == {
            True
        }
        assert any(is_adapter(k) and p.requires_grad for k, p in scorer.named_parameters())
        assert not {p.data_ptr() for p in scorer.parameters()} & {p.data_ptr() for p in policy.parameters()}
    scorer = new_scorer(policy)
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    scorer(tree).rewards_B.sum().backward()
    assert any(is_adapter(k) and p.grad is not None and p.grad.any() for k, p in scorer.named_parameters())
    save_scorer(scorer, words, tmp_path / "reward")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    loaded = load_scorer(tmp_path / "reward")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tree).rewards_B, scorer(tree).rewards_B, atol=1e-4, rtol=1e-4)
    assert any(is_adapter(k) for k in scorer.state_dict()), "the model that is trained is left as it is"
    critic = critic_of(loaded, Adapter(rank=2))
    with torch.no_grad():
        torch.testing.assert_close(critic(tree).rewards_B, loaded(tree).rewards_B, atol=1e-5, rtol=1e-5)
    assert all(is_adapter(k) or k.startswith("head.") for k, p in critic.named_parameters() if p.requires_grad)


def test_merging_leaves_the_policy_as_it_is(base: Path) -> None:
    policy = moved(load_policy(base, adapter=Adapter(rank=4)))
    whole = merged(policy)
    assert whole.adapter is None and policy.adapter is not None
    assert not any(is_adapter(k) or "base_layer" in k for k in whole.state_dict())
    torch.testing.assert_close(scores(whole), scores(policy), atol=1e-4, rtol=1e-4)
