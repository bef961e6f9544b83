"""Tree batches are exact: sharing a prompt, packing, windows, chunks and recomputation change no log-probability."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip

from prefzoo.data.samples import Ragged, Samples
from prefzoo.models import roles
from prefzoo.models.load import (
    check_packing,
    learn_tokenizer,
    load_causal,
    load_policy,
    new_critic,
    new_scorer,
    set_checkpointing,
    tiny_model,
)
from prefzoo.models.reference import token_scores
from prefzoo.models.roles import Policy
from prefzoo.models.tree import HOOK, TreeBatch, micro_batches, pack_rows
from prefzoo.registry import UsageError

GOLDEN = Path(__file__).parent / "golden" / "tiny_model" / "policy"
VOCABULARY = 61
Rows = list[tuple[list[int], list[list[int]]]]

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def made(config: Any, spread: float = 0.3) -> PreTrainedModel:
    """A random model with weights large enough that every token matters."""
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                weight.normal_(0.0, spread, generator=generator)
    return model


def tiny() -> PreTrainedModel:
    return tiny_model(learn_tokenizer(["some words to learn from"], 262))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "ours": tiny,
    "golden": lambda: AutoModelForCausalLM.from_pretrained(GOLDEN),
    "llama with grouped keys": lambda: made(LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "qwen2 with biases": lambda: made(Qwen2Config(**SHAPE, num_key_value_heads=4)),
    "mistral with a window of 5": lambda: made(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=5)),
    "qwen3": lambda: made(Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8)),
    "gemma": lambda: made(GemmaConfig(**SHAPE, num_key_value_heads=1, head_dim=8)),
    "gpt2": lambda: made(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "mistral with a window of 2": lambda: made(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=2)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_causal(MODELS[request.param]())


def forest(seed: int, trees: int = 7) -> Rows:
    """Ragged trees: prompts of 1 to 30 tokens, 1 to 5 completions of 1 to 40."""
    draw = np.random.default_rng(seed)
    ids = lambda most: draw.integers(VOCABULARY, size=draw.integers(1, most + 1)).tolist()  # noqa: E731
    rows = [(ids(30), [ids(40) for _ in range(draw.integers(1, 6))]) for _ in range(trees)]
    return [*rows, ([3], [[4]]), (list(range(30)), [list(range(40)), [5]])]  # the extremes


def one_by_one(model: PreTrainedModel, rows: Rows) -> Tensor:
    """The library's own forward of each prompt + completion, without packing."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = []
        for prompt, completions in rows:
            for completion in completions:
                ids = torch.tensor([prompt + completion])
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                out.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0])
        return torch.cat(out)
    finally:
        model.set_attn_implementation(attention)


def gradients(model: PreTrainedModel, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= rtol * theirs[name].norm() + 1e-6, name


def weights_of(values_C: Tensor) -> Tensor:
    """A weight for every token, so that no error can cancel another."""
    return torch.linspace(-1, 1, len(values_C))


# ------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_gives_the_log_probabilities_of_single_sequences(model: PreTrainedModel, seed: int) -> None:
    rows = forest(seed)
    with torch.no_grad():
        packed = Policy(model)(TreeBatch.of(pack_rows(rows))).logps_C
        torch.testing.assert_close(packed, one_by_one(model, rows), atol=1e-5, rtol=1e-5)


def test_a_tree_gives_the_gradient_of_single_sequences(model: PreTrainedModel) -> None:
    rows = forest(3, trees=4)
    packed = Policy(model)(TreeBatch.of(pack_rows(rows))).logps_C
    ours = gradients(model, (packed * weights_of(packed)).sum())
    single = one_by_one(model, rows)
    assert_same_gradients(ours, gradients(model, (single * weights_of(single)).sum()))


def test_recomputed_and_interleaved_forwards_keep_their_own_plans(model: PreTrainedModel) -> None:
    """Two forwards of different batches, then one backward with every layer recomputed: each with its own plan."""
    first, second = forest(4, trees=3), forest(5, trees=3)
    singles = [one_by_one(model, rows) for rows in (first, second)]
    expected = gradients(model, sum((s * weights_of(s)).sum() for s in singles))
    policy = copy.deepcopy(Policy(model)).train()
    set_checkpointing(policy)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    mlp = next(m for name, m in policy.named_modules() if name.endswith("mlp"))
    mlp.register_forward_pre_hook(count)
    packed = [policy(TreeBatch.of(pack_rows(rows))).logps_C for rows in (first, second)]
    assert_same_gradients(gradients(policy.model, sum((p * weights_of(p)).sum() for p in packed)), expected)
    assert calls == 4, "twice forward, twice again in the backward pass"


def test_siblings_do_not_see_each_other(model: PreTrainedModel) -> None:
    """Another text, another length: the other completions keep their log-probabilities, and so do strangers."""
    prompt, kept, stranger = [5, 6, 7], [8, 9, 10, 11], ([12, 13], [[14, 15, 16]])
    policy, found = Policy(model), []
    for sibling in ([20, 21, 22], [23, 24, 25], [26], list(range(40))):
        with torch.no_grad():
            logps_C = policy(TreeBatch.of(pack_rows([(prompt, [sibling, kept]), stranger]))).logps_C
        found.append(logps_C[len(sibling) :])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)
    assert torch.equal(found[0], found[1]), "of equal shapes, to the bit"


def test_the_future_is_not_seen(model: PreTrainedModel) -> None:
    """A gradient with respect to the inputs: token t depends on the prompt and on tokens before t only."""
    samples = pack_rows([([5, 6, 7], [[8, 9, 10, 11], [12, 13]]), ([3, 4], [[14, 15]])])
    tree = TreeBatch.of(samples)
    embedded = model.get_input_embeddings()(tree.ids_N).detach().requires_grad_()
    logits = model(
        inputs_embeds=embedded[None], position_ids=tree.positions_N[None], use_cache=False, attention_plan=tree.plan,
        logits_to_keep=tree.predict_C,
    ).logits[0]  # fmt: skip
    # Storage: prompt 0-2, its completions 3-6 and 7-8; prompt 9-10, its completion 11-12.
    sees = {0: {0, 1, 2}, 1: {0, 1, 2, 3}, 3: {0, 1, 2, 3, 4, 5}, 4: {0, 1, 2}, 5: {0, 1, 2, 7}, 7: {9, 10, 11}}
    for token, allowed in sees.items():
        (gradient,) = torch.autograd.grad(logits[token].square().sum(), embedded, retain_graph=True)
        touched = set(torch.nonzero(gradient.abs().sum(-1))[:, 0].tolist())
        assert touched <= allowed and max(allowed) in touched


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_bookkeeping_of_a_tree(shape: list[tuple[int, list[int]]], random: Any) -> None:
    """Positions, targets, owners and masks, against a loop; prompts may be shared by completions in any order."""
    rows = [([random.randrange(99) for _ in range(p)], [[random.randrange(99) for _ in range(c)] for c in cs])
            for p, cs in shape]  # fmt: skip
    flat = [(number, c) for number, (_, cs) in enumerate(rows) for c in cs]
    random.shuffle(flat)
    samples = Samples(
        "completions", Ragged.of([p for p, _ in rows]), Ragged.of([c for _, c in flat]), np.array([n for n, _ in flat])
    )
    tree = TreeBatch.of(samples)
    assert len(tree) == sum(p for p, _ in shape) + sum(sum(cs) for _, cs in shape)
    cursor = 0
    for b, (number, completion) in enumerate(flat):
        prompt = rows[number][0]
        for t, target in enumerate(completion):
            own, predict = int(tree.own_C[cursor]), int(tree.predict_C[cursor])
            assert int(tree.target_C[cursor]) == target == int(tree.ids_N[own])
            assert int(tree.owner_C[cursor]) == b
            assert int(tree.positions_N[own]) == len(prompt) + t == int(tree.positions_N[predict]) + 1
            assert int(tree.ids_N[predict]) == (completion[t - 1] if t else prompt[-1])
            cursor += 1
        assert int(tree.last_B[b]) == int(tree.own_C[cursor - 1])
        assert tree.mask_BT[b].tolist() == [t < len(completion) for t in range(tree.mask_BT.shape[1])]


# ------------------------------------------------------------------------------------------------ padded rows

PADDED: dict[str, tuple[Callable[[], Any], str]] = {
    "soft-capped attention": (
        lambda: Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0),
        "gemma2.*packed batches.*softcap",
    ),
    "no attention at all": (lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2), "mamba"),
    "positions in the scores": (
        lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "bloom.*do not let their attention be replaced",
    ),
    "attention sinks": (
        lambda: GptOssConfig(**SHAPE, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
                             sliding_window=6, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "gpt_oss.*s_aux",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows_give_log_probabilities_and_gradients_of_single_sequences(name: str) -> None:
    model = load_policy(made(PADDED[name][0]())).model
    rows = forest(3, trees=3)
    single = one_by_one(model, rows)
    theirs = gradients(model, (single * weights_of(single)).sum())
    for share in (True, False):
        samples = pack_rows(rows)
        with torch.no_grad():
            found = token_scores(lambda tree: Policy(model)(tree).logps_C, samples, 60, "cpu", share)
        torch.testing.assert_close(found, single.detach(), atol=1e-4, rtol=1e-4)
    padded = Policy(model)(TreeBatch.of(pack_rows(rows))).logps_C
    assert_same_gradients(gradients(model, (padded * weights_of(padded)).sum()), theirs, rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 50), max_size=4)), min_size=1, max_size=6))
def test_padded_rows_hold_every_position_after_what_precedes_it(shape: list[tuple[int, list[int]]]) -> None:
    number = iter(range(10**6))
    rows = [([next(number) for _ in range(p)], [[next(number) for _ in range(c)] for c in cs]) for p, cs in shape]
    tree = TreeBatch.of(pack_rows(rows))
    flat = [ids for bucket in tree.padded.buckets for ids in tree.ids_N[bucket].flatten().tolist()]
    width = [bucket.shape[1] for bucket in tree.padded.buckets for _ in range(bucket.numel())]
    assert [flat[i] for i in tree.padded.where_N.tolist()] == tree.ids_N.tolist()
    begin = 0
    starts = []
    for bucket in tree.padded.buckets:
        starts += [begin + i // bucket.shape[1] * bucket.shape[1] for i in range(bucket.numel())]
        begin += bucket.numel()
    before = {}
    for prompt, completions in rows:
        for c in [*completions, []]:
            whole = prompt + c
            before |= {token: whole[: i + 1] for i, token in enumerate(whole)}
    for i in tree.padded.where_N.tolist():
        assert flat[starts[i] : i + 1] == before[flat[i]] and i - starts[i] < width[i]


# ------------------------------------------------------------------------------------------------ packing


def paired(seed: int) -> Samples:
    """Pairs, some of which share their prompt."""
    draw = np.random.default_rng(seed)
    ids = lambda most: draw.integers(VOCABULARY, size=draw.integers(1, most)).tolist()  # noqa: E731
    return Samples(
        "pairs", Ragged.of([ids(12) for _ in range(4)]), Ragged.of([ids(20) for _ in range(14)]),
        np.repeat([0, 0, 1, 2, 2, 2, 3], 2),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["completions", "pairs"])
def test_any_packing_gives_the_same_scores(kind: str) -> None:
    policy = Policy(load_causal(MODELS["llama with grouped keys"]()))
    samples = pack_rows(forest(6)) if kind == "completions" else paired(6)
    forward = lambda tree: policy(tree).logps_C  # noqa: E731
    whole = token_scores(forward, samples, 10**6, "cpu")
    for budget in (1, 50, 200):
        torch.testing.assert_close(token_scores(forward, samples, budget, "cpu"), whole, atol=1e-5, rtol=1e-5)
    order = np.random.default_rng(0).permutation(len(samples))
    mixed = samples.with_tokens(whole=whole).take(order)
    torch.testing.assert_close(token_scores(forward, mixed, 100, "cpu"), mixed.tokens["whole"], atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["completions", "pairs"]), st.integers(1, 80))
def test_micro_batches(data: st.DataObject, kind: str, budget: int) -> None:
    """Every row once and unsplit; no batch over the budget unless it is one row; trees together where they fit."""
    trees = data.draw(st.lists(st.tuples(st.integers(1, 15), st.integers(1, 5)), min_size=1, max_size=6))
    per_row = 2 if kind == "pairs" else 1
    owners = np.repeat(np.arange(len(trees)), [n for _, n in trees])
    lengths = data.draw(st.lists(st.integers(1, 15), min_size=len(owners) * per_row, max_size=len(owners) * per_row))
    shuffled = data.draw(st.permutations(range(len(owners))))
    samples = Samples(
        kind, Ragged.of([[1] * p for p, _ in trees]), Ragged.of([[1] * n for n in lengths]),
        np.repeat(owners[shuffled], per_row),
    )  # fmt: skip
    batches = micro_batches(samples, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(samples)))
    assert all(sorted(b.tolist()) == b.tolist() for b in batches)
    again = micro_batches(samples, budget)
    assert len(again) == len(batches) and all(map(np.array_equal, batches, again))
    for batch in batches:
        assert len(batch) == 1 or len(TreeBatch.of(samples.take(batch))) <= budget
    of_row = samples.prompt_B[::per_row]
    for prompt in range(len(trees)):
        rows = np.flatnonzero(of_row == prompt)
        if len(TreeBatch.of(samples.take(rows))) <= budget:
            assert sum(bool(np.isin(rows, b).any()) for b in batches) == 1, "a tree that fits was cut"
    total = len(TreeBatch.of(samples))
    assert total > budget or len(batches) == 1, "all of it fits into one"


# ------------------------------------------------------------------------------------------------ long vocabularies


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["ours", "golden", "llama with grouped keys"])
def test_chunks_of_the_head_give_the_same_scores(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a budget of five rows of logits the head runs chunk by chunk, and again in the backward pass."""
    model = load_causal(MODELS[name]())
    tree, calls = TreeBatch.of(pack_rows(forest(7, trees=3))), 0
    original = roles._score_logits

    def counted(logits: Tensor, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(logits, *rest)

    monkeypatch.setattr(roles, "_score_logits", counted)

    def run() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        scores = Policy(model)(tree, temperature=temperature, want=frozenset({"entropy"}))
        value = (scores.logps_C * weights_of(scores.logps_C)).sum() + scores.entropy_C.square().sum()
        return scores.logps_C.detach(), scores.entropy_C.detach(), gradients(model, value)

    whole = run()
    assert calls == 1
    monkeypatch.setattr(roles, "LOGITS_BYTES", 5 * 4 * model.config.vocab_size)
    chunked = run()
    assert calls == 1 + 2 * math.ceil(len(tree.target_C) / 5)
    for ours, theirs in zip(chunked[:2], whole[:2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert_same_gradients(chunked[2], whole[2])


def test_entropy_is_that_of_the_distribution() -> None:
    model = load_causal(tiny())
    tree = TreeBatch.of(pack_rows(forest(8, trees=2)))
    with torch.no_grad():
        found = Policy(model)(tree, want=frozenset({"entropy"}), temperature=0.5).entropy_C
        logits = model(input_ids=tree.ids_N[None], position_ids=tree.positions_N[None], attention_plan=tree.plan).logits
    expected = torch.distributions.Categorical(logits=logits[0, tree.predict_C] / 0.5).entropy()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert Policy(model)(tree).entropy_C is None


EVERYTHING = frozenset({"entropy", "log_sq", "kl", "prompt"})


@pytest.mark.parametrize("name", ["ours", "golden", "llama with grouped keys"])
def test_what_is_wanted_of_the_distribution_is_that_of_the_library_one_by_one(name: str) -> None:
    """log Σp², the exact KL to another policy and the prompts' own log-probabilities, against plain forwards."""
    ours, theirs = (load_causal(MODELS[name]()) for _ in range(2))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.1)
    rows = forest(12, trees=3)
    tree = TreeBatch.of(pack_rows(rows))
    with torch.no_grad():
        found = Policy(ours)(tree, want=EVERYTHING, other=Policy(theirs), temperature=0.7)
    log_sq, kl, prompts = [], [], []
    for model in (ours, theirs):
        model.set_attn_implementation("eager")
    for prompt, completions in rows:
        for completion in completions:
            with torch.no_grad():
                mine, other = (
                    (m(torch.tensor([prompt + completion])).logits[0, :-1] / 0.7).log_softmax(-1)
                    for m in (ours, theirs)
                )
            own = slice(len(prompt) - 1, None)
            log_sq.append(mine[own].exp().square().sum(-1).log())
            kl.append((other[own].exp() * (other[own] - mine[own])).sum(-1))
        prompts.append(mine[: len(prompt) - 1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0])
    torch.testing.assert_close(found.log_sq_C, torch.cat(log_sq), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.kl_C, torch.cat(kl), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.prompt_logps_R, torch.cat(prompts), atol=1e-5, rtol=1e-5)
    assert tree.prompts.mask_PT.sum(-1).tolist() == [len(prompt) - 1 for prompt, _ in rows]


def test_what_is_wanted_is_the_same_in_chunks_and_the_other_policy_gets_no_gradient() -> None:
    ours, theirs = (load_causal(MODELS["golden"]()) for _ in range(2))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.1)
    tree = TreeBatch.of(pack_rows(forest(7, trees=3)))
    policy, other = Policy(ours), Policy(theirs)
    whole = policy(tree, want=EVERYTHING, other=other)
    chunked = policy.chunked(tree, 5, want=EVERYTHING, other=other)
    moved = []
    for scores in (whole, chunked):
        names = ("logps_C", "entropy_C", "log_sq_C", "kl_C", "prompt_logps_R")
        parts = [getattr(scores, n) for n in names]
        moved.append(gradients(ours, sum((p * weights_of(p)).sum() for p in parts)))
        for part, same in zip(parts, (getattr(whole, n) for n in names), strict=True):
            torch.testing.assert_close(part, same, atol=1e-5, rtol=1e-5)
    assert_same_gradients(moved[1], moved[0])
    assert all(p.grad is None for p in theirs.parameters())


# ------------------------------------------------------------------------------------------------ heads


def test_rewards_and_values_read_the_right_states() -> None:
    """Against the trunk run one by one: the last own token, the mean of all, and the state before each token."""
    model = load_causal(MODELS["golden"]())
    rows = forest(9, trees=3)
    tree, trunk = TreeBatch.of(pack_rows(rows)), model.base_model
    scorer = new_critic(Policy(model))
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    scorer.head.bias.data.fill_(0.25)
    last, mean, values = [], [], []
    with torch.no_grad():
        trunk.set_attn_implementation("eager")
        for prompt, completions in rows:
            for completion in completions:
                hidden = trunk(input_ids=torch.tensor([prompt + completion]), use_cache=False).last_hidden_state[0]
                raw = scorer.head(hidden)[:, 0]
                last.append(raw[-1])
                mean.append(raw[len(prompt) :].mean())
                values.append(raw[len(prompt) - 1 : -1])
        trunk.set_attn_implementation(HOOK)
        torch.testing.assert_close(scorer(tree, values=True).values_C, torch.cat(values), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scorer(tree).rewards_B, torch.stack(last), atol=1e-5, rtol=1e-5)
        scorer.pooling = "mean"
        scorer.offset.fill_(0.5)
        scorer.scale.fill_(2.0)
        torch.testing.assert_close(scorer(tree).rewards_B, (torch.stack(mean) - 0.5) / 2.0, atol=1e-5, rtol=1e-5)


def test_a_new_scorer_knows_nothing_and_shares_nothing() -> None:
    model = load_causal(MODELS["golden"]())
    scorer = new_scorer(Policy(model))
    tree = TreeBatch.of(pack_rows(forest(1, trees=2)))
    assert bool((scorer(tree).rewards_B == 0).all()) and bool((scorer(tree, values=True).values_C == 0).all())
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not theirs & {p.data_ptr() for p in scorer.parameters()}


# ------------------------------------------------------------------------------------------------ refusals


def test_models_that_fit_pass_the_check(model: PreTrainedModel) -> None:
    assert check_packing(Policy(model)) < 1e-5


@pytest.mark.parametrize("name", PADDED)
def test_models_that_do_not_fit_fall_back_in_words(name: str) -> None:
    config, words = PADDED[name]
    notes: list[str] = []
    policy = load_policy(made(config()), note=notes.append)
    assert not policy.packed and len(notes) == 1
    assert re.search(words, notes[0]) and "Batches are padded instead" in notes[0]
    assert check_packing(policy) < 1e-4
    if "let their" not in words:
        with pytest.raises(UsageError, match=words):
            check_packing(Policy(load_causal(made(config()))))


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(UsageError, match="type 'bert' cannot be trained here: neither packed nor padded"):
        load_policy(made(BertConfig(**SHAPE)))


def test_a_window_that_only_the_mask_knows_is_not_packed() -> None:
    """Short rows would not show it."""
    model = load_causal(made(Qwen3Config(**SHAPE, num_key_value_heads=4, use_sliding_window=True, sliding_window=99,
                                         max_window_layers=0, head_dim=8)))  # fmt: skip
    assert model.config.layer_types == ["sliding_attention"] * 2 and check_packing(Policy(model)) < 1e-5
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(UsageError, match="layers of 'sliding_attention' cannot run on packed batches"):
        check_packing(Policy(model))


def test_the_check_compares_and_does_not_trust() -> None:
    model = load_causal(MODELS["golden"]())
    policy = Policy(model)
    original = model.base_model.forward
    model.base_model.forward = lambda *a, position_ids=None, **k: original(  # type: ignore[method-assign]
        *a, position_ids=None if position_ids is None else position_ids * 3 + 1, **k
    )
    with pytest.raises(UsageError, match="other log-probabilities on packed batches"):
        check_packing(policy)


@pytest.mark.parametrize("config", [
    CohereConfig(**SHAPE, num_key_value_heads=2, logit_scale=0.25),
    Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=2.0),
], ids=["cohere scales", "gemma2 caps"])  # fmt: skip
def test_heads_that_scale_or_cap(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between hidden states and logits some architectures do more than a product; chunks must not forget it."""
    model = load_causal(made(config))
    check_packing(Policy(model))
    rows = forest(2, trees=2)
    monkeypatch.setattr(roles, "LOGITS_BYTES", 5 * 4 * VOCABULARY)
    with torch.no_grad():
        chunked = Policy(model)(TreeBatch.of(pack_rows(rows))).logps_C
        torch.testing.assert_close(chunked, one_by_one(model, rows), atol=1e-5, rtol=1e-5)


def test_a_head_that_is_not_known_is_refused() -> None:
    """What chunks would forget must not wait for a large batch to be seen."""
    model = load_causal(made(CohereConfig(**SHAPE, num_key_value_heads=2, logit_scale=0.25)))
    del model.config.logit_scale
    assert model.logit_scale == 0.25
    with pytest.raises(UsageError, match="head does more"):
        check_packing(Policy(model))


def test_an_ordinary_call_is_refused_in_words() -> None:
    model = load_causal(MODELS["golden"]())
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_dropout_is_off() -> None:
    """Two passes in training mode agree, whatever the configuration says."""
    config = LlamaConfig(**SHAPE, attention_dropout=0.5)
    model = load_causal(made(config)).train()
    tree = TreeBatch.of(pack_rows(forest(1, trees=2)))
    with torch.no_grad():
        assert torch.equal(Policy(model)(tree).logps_C, Policy(model)(tree).logps_C)
