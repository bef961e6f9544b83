"""The decode loop samples from the learner's own distribution, row by row, whatever stands beside a row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MambaConfig, MistralConfig, RwkvConfig

import prefzoo
from prefzoo.data.samples import Ragged, Samples
from prefzoo.models.load import learn_tokenizer, load_causal, load_policy, tiny_model
from prefzoo.models.roles import Policy
from prefzoo.models.tree import HOOK, TreeBatch, pack_rows
from prefzoo.registry import UsageError
from prefzoo.rollout import CacheEngine, Finish, LoopEngine, Sampling, rollout_engine
from prefzoo.rollout.loop import choose
from prefzoo.seeds import derive_seed, generator, uniforms

VOCABULARY, EOS = 23, 2
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": EOS,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral with a window": lambda: MistralConfig(**SHAPE, sliding_window=4),
}


@pytest.fixture(scope="module", params=MODELS)
def policy(request: pytest.FixtureRequest) -> Policy:
    """Random, and peaked enough that greedy choices are no ties."""
    model = AutoModelForCausalLM.from_config(MODELS[request.param]())
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                weight.normal_(0.0, 0.25, generator=draw)
    return Policy(load_causal(model))


def prompts_of(lists: list[list[int]]) -> Samples:
    return Samples("prompts", Ragged.of(lists), Ragged.of([]), np.zeros(0, dtype=np.int64), extra={"prompt": lists})


PROMPTS = prompts_of([[1, 5, 6, 7, 8, 9, 10], [1, 3], [1, 4, 4, 4], [1], [1, 12, 13], [1, 5, 6, 7, 8, 9, 11]])


def texts(samples: Samples) -> list[list[int]]:
    return [samples.completions[i].tolist() for i in range(len(samples.completions))]


def sample(policy: Policy, prompts: Samples = PROMPTS, n: int = 3, seed: int = 0, rows: int = 512, eos: int = EOS,
           keys: np.ndarray | None = None, **sampling: Any) -> Samples:  # fmt: skip
    options = {"max_new_tokens": 20, **sampling}
    return LoopEngine(policy, eos, rows_per_batch=rows).generate(prompts, n, Sampling(**options), seed, keys)


# ------------------------------------------------------------------------------------------------ the distribution


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampler_and_learner_agree(policy: Policy, temperature: float) -> None:
    """The log-probability that the sampler reports is the one that the learner computes."""
    samples = sample(policy, temperature=temperature)
    with torch.no_grad():
        learner_C = policy(TreeBatch.of(samples), temperature=temperature).logps_C
    torch.testing.assert_close(samples.tokens["old_logps"], learner_C, atol=1e-5, rtol=1e-5)


def test_at_temperature_zero_the_log_probabilities_are_the_models(policy: Policy) -> None:
    samples = sample(policy, temperature=0.0)
    with torch.no_grad():
        torch.testing.assert_close(
            samples.tokens["old_logps"], policy(TreeBatch.of(samples)).logps_C, atol=1e-5, rtol=1e-5
        )


def test_greedy_is_the_librarys_greedy(policy: Policy) -> None:
    endless = texts(sample(policy, n=1, temperature=0.0, eos=-1))
    eos = endless[0][4]  # some rows end early, some do not
    ours = texts(sample(policy, n=1, temperature=0.0, eos=eos))
    assert len({len(row) for row in ours}) > 1
    model = policy.model
    model.set_attn_implementation("eager")
    try:
        for row, prompt in zip(ours, PROMPTS.extra["prompt"], strict=True):
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20,
                                 eos_token_id=eos, pad_token_id=0)  # fmt: skip
            assert out[0, len(prompt) :].tolist() == row
    finally:
        model.set_attn_implementation(HOOK)


def test_first_and_second_tokens_have_the_models_frequencies(policy: Policy) -> None:
    """Chi-square tests of 4,000 samples against the softmax, at the first token and after the likeliest one."""
    prompt, n = PROMPTS.extra["prompt"][0], 4000
    samples = sample(policy, prompts_of([prompt]), n=n, seed=11, rows=1000, max_new_tokens=2)
    first = np.array([row[0] for row in texts(samples)])
    chi_square(first, probabilities(policy, prompt))
    likeliest = int(np.bincount(first[first != EOS]).argmax())
    second = np.array([row[1] for row in texts(samples) if row[0] == likeliest])
    assert len(second) > 300
    chi_square(second, probabilities(policy, [*prompt, likeliest]))


def probabilities(policy: Policy, prompt: list[int]) -> np.ndarray:
    every = pack_rows([(prompt, [[token] for token in range(VOCABULARY)])])
    with torch.no_grad():
        found = policy(TreeBatch.of(every)).logps_C.double().exp().numpy()
    assert found.sum() == pytest.approx(1.0, abs=1e-5)
    return found / found.sum()


def chi_square(tokens: np.ndarray, expected: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=VOCABULARY)
    usual = expected * len(tokens) >= 5  # the rule of thumb; the rare ones are one cell together
    pool = lambda x: np.append(x[usual], x[~usual].sum())  # noqa: E731
    observed, wanted = pool(counts), pool(expected * len(tokens))
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep] * observed[keep].sum() / wanted[keep].sum()).pvalue > 1e-3


def naive_nucleus(logits: Tensor, temperature: float, top_p: float) -> dict[int, float]:
    """Tokens from the likeliest down until their probability reaches ``top_p``; renormalised."""
    probability = torch.softmax(logits.double() / temperature, -1)
    kept, total = {}, 0.0
    for token in sorted(range(len(logits)), key=lambda t: -float(probability[t])):
        if total >= top_p:
            break
        kept[token] = float(probability[token])
        total += kept[token]
    return {token: p / total for token, p in kept.items()}


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_choose_is_inverse_cdf_of_the_nucleus(top_p: float, temperature: float) -> None:
    """On a fine grid of uniform numbers every token has the share of its probability, and no other token appears."""
    logits = torch.randn(5, 17, generator=torch.Generator().manual_seed(3)) * 2
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for row in logits:
        expected = naive_nucleus(row, temperature, top_p)
        token, logp = choose(row.expand(len(grid), -1), grid, Sampling(temperature, top_p))
        assert set(token.tolist()) <= set(expected)
        for t, p in expected.items():
            chosen = token == t
            assert float(chosen.double().mean()) == pytest.approx(p, abs=1.5 / 4000)
            assert logp[chosen].exp().numpy() == pytest.approx(p, rel=1e-4)


@pytest.mark.parametrize("top_p", [0.3, 1.0])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53, 1 - 2**-25])
def test_the_ends_of_the_unit_interval_stay_in_the_nucleus(uniform: float, top_p: float) -> None:
    """The largest uniform number rounds to 1 in float32; it must not fall off the end of the distribution."""
    impossible = -200.0
    logits = torch.tensor([[impossible, 1.0, 1.5, 0.5, impossible], [2.0, 0.1, 0.2, impossible, impossible]])
    token, logp = choose(logits, torch.full((2,), uniform, dtype=torch.float64), Sampling(1.0, top_p))
    for row, t in enumerate(token.tolist()):
        assert t in naive_nucleus(logits[row], 1.0, top_p) and logits[row, t] != impossible
    assert bool(logp.isfinite().all())


def test_top_p_is_the_distribution_that_is_reported(policy: Policy) -> None:
    """Log-probabilities after top-p: above the model's by the constant of the nucleus, 0 where one token is left."""
    samples = sample(policy, top_p=0.6, seed=4)
    with torch.no_grad():
        learner_C = policy(TreeBatch.of(samples)).logps_C
    gain_C = samples.tokens["old_logps"] - learner_C
    assert bool((gain_C > -1e-5).all()) and bool((gain_C < -np.log(0.6) + 1e-5).all()) and float(gain_C.max()) > 0.05
    alone = sample(policy, top_p=1e-6, seed=4)
    assert texts(alone) == texts(sample(policy, temperature=0.0))
    assert bool((alone.tokens["old_logps"].abs() < 1e-6).all())


# ------------------------------------------------------------------------------------------------ independence


@pytest.mark.parametrize("rows", [1, 5, 6, 1000])
def test_neighbours_do_not_matter(policy: Policy, rows: int) -> None:
    """Any batch size, any company and any order of the prompts: a prompt with its key gets the same completions."""
    whole = sample(policy, seed=7)
    same = sample(policy, seed=7, rows=rows)
    assert texts(same) == texts(whole)
    torch.testing.assert_close(same.tokens["old_logps"], whole.tokens["old_logps"], atol=1e-5, rtol=1e-5)
    order = np.array([4, 1, 3])
    part = sample(policy, PROMPTS.take(order), seed=7, rows=rows, keys=order)
    assert texts(part) == [texts(whole)[3 * p + g] for p in order for g in range(3)]


def test_more_samples_do_not_change_the_first_ones(policy: Policy) -> None:
    few, many = texts(sample(policy, n=2)), texts(sample(policy, n=5))
    assert few == [many[5 * p + g] for p in range(len(PROMPTS)) for g in range(2)]


def test_a_longer_limit_only_appends(policy: Policy) -> None:
    short, long = texts(sample(policy, max_new_tokens=6)), texts(sample(policy, max_new_tokens=20))
    assert short == [row[:6] for row in long]


def test_seeds_and_keys_decide(policy: Policy) -> None:
    assert texts(sample(policy, seed=1)) == texts(sample(policy, seed=1)) != texts(sample(policy, seed=2))
    keys = np.arange(len(PROMPTS))
    assert texts(sample(policy, keys=keys)) == texts(sample(policy)) != texts(sample(policy, keys=keys + 100))
    twice = sample(policy, PROMPTS.take([0, 0]), n=4, keys=np.array([3, 9]))
    assert texts(twice)[:4] != texts(twice)[4:], "one prompt twice in a step is sampled with other numbers"


def test_rows_that_finish_are_dropped_without_a_trace(policy: Policy) -> None:
    """Against a run in which nothing ever finishes, cut afterwards at the first EOS."""
    dropping = sample(policy, n=8, seed=5)
    endless = sample(policy, n=8, seed=5, eos=-1)
    cut = [row[: row.index(EOS) + 1] if EOS in row else row for row in texts(endless)]
    assert texts(dropping) == cut
    lengths = {len(row) for row in cut}
    assert len(lengths) >= 5 and min(lengths) < 4 and 20 in lengths, "early, late, never: the slab shrinks repeatedly"
    kept = torch.cat([
        endless.tokens["old_logps"][s : s + len(row)]
        for s, row in zip(endless.completions.offsets, cut, strict=False)
    ])  # fmt: skip
    torch.testing.assert_close(dropping.tokens["old_logps"], kept, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ the library's cache


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_both_engines_draw_the_same_samples(policy: Policy, rows: int) -> None:
    """The library's cache against the slab behind the hook, for a model that both can serve."""
    assert type(rollout_engine(policy, EOS)) is LoopEngine
    expected = sample(policy, n=4, seed=9, top_p=0.9)
    other = copy.deepcopy(policy)
    other.model.set_attn_implementation("eager")
    engine = rollout_engine(other, EOS, rows_per_batch=rows)
    assert type(engine) is CacheEngine
    for wrong, served in ((CacheEngine, policy), (LoopEngine, other)):
        with pytest.raises(UsageError, match="rollout_engine"):
            wrong(served, EOS)
    found = engine.generate(PROMPTS, 4, Sampling(top_p=0.9, max_new_tokens=20), 9)
    assert texts(found) == texts(expected)
    assert found.columns["finish"].tolist() == expected.columns["finish"].tolist()
    torch.testing.assert_close(found.tokens["old_logps"], expected.tokens["old_logps"], atol=1e-5, rtol=1e-5)


UNPACKED: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=4),
    "mamba": lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
    "no cache that drops rows": lambda: RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
}


@pytest.mark.parametrize("name", UNPACKED)
def test_models_on_padded_batches_are_sampled_from_exactly(name: str) -> None:
    """Sampler and learner agree, neighbours do not matter, and finished rows leave no trace."""
    torch.manual_seed(0)
    padded = load_policy(AutoModelForCausalLM.from_config(UNPACKED[name]()))
    assert not padded.packed
    draw = lambda rows, eos=EOS: rollout_engine(padded, eos, rows_per_batch=rows).generate(  # noqa: E731
        PROMPTS, 3, Sampling(max_new_tokens=20), 5
    )
    whole = draw(512)
    with torch.no_grad():
        learner_C = padded(TreeBatch.of(whole)).logps_C
    torch.testing.assert_close(whole.tokens["old_logps"], learner_C, atol=1e-4, rtol=1e-4)
    assert texts(draw(1)) == texts(whole)
    endless = texts(draw(512, -1))
    assert texts(whole) == [row[: row.index(EOS) + 1] if EOS in row else row for row in endless] != endless


# ------------------------------------------------------------------------------------------------ what comes back


def test_the_end_of_sequence_is_part_of_a_finished_completion_once(policy: Policy) -> None:
    samples = sample(policy, n=6, max_new_tokens=7)
    for row, finish in zip(texts(samples), samples.columns["finish"].tolist(), strict=True):
        assert EOS not in row[:-1] and 1 <= len(row) <= 7
        assert finish == (Finish.STOP if row[-1] == EOS else Finish.LENGTH)
        assert finish == Finish.STOP or len(row) == 7
    assert set(samples.columns["finish"].tolist()) == {Finish.STOP, Finish.LENGTH}


def test_rows_are_prompt_by_prompt(policy: Policy) -> None:
    samples = sample(policy, n=2)
    assert samples.kind == "completions" and samples.prompt_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len(samples.tokens["old_logps"]) == len(samples.completions.flat)
    assert samples.extra["prompt"] == PROMPTS.extra["prompt"]
    assert [samples.prompts[i].tolist() for i in range(len(PROMPTS))] == PROMPTS.extra["prompt"]


def test_the_policy_is_left_as_it_was(policy: Policy) -> None:
    policy.train()
    sample(policy, n=1, max_new_tokens=2)
    assert policy.model.training and all(p.grad is None for p in policy.parameters())


def test_prompts_that_leave_no_room_are_refused_in_words(policy: Policy) -> None:
    limit = SHAPE["max_position_embeddings"]
    sample(policy, prompts_of([[1] * (limit - 20)]), n=1)
    with pytest.raises(UsageError, match=rf"{limit - 19} tokens and max_new_tokens=20 exceed.*{limit} pos.*lower"):
        sample(policy, prompts_of([[1], [1] * (limit - 19)]), n=1)


def test_a_run_keeps_the_prompts_that_leave_room() -> None:
    """Prompt and answer may fill the positions to the last one; longer prompts are dropped, and counted."""
    words = learn_tokenizer(["a"], 261)
    model = tiny_model(words, positions=24)
    empty = len(words("").input_ids)
    rows = [{"prompt": "b" * (length - empty)} for length in (15, 16, 17)]
    assert [len(words(row["prompt"]).input_ids) for row in rows] == [15, 16, 17]
    run = prefzoo.steps("grpo", model=model, tokenizer=words, dataset=rows, reward=lambda completions, **_: [0.0] * len(
        completions), max_new_tokens=8, max_steps=1, prompts_per_step=2, group_size=2, quiet=True)  # fmt: skip
    next(run)
    assert run.engine is not None
    assert sorted(run.engine.data.prompts.lengths.tolist()) == [15, 16]


@pytest.mark.parametrize("options", [
    {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0},
], ids=str)  # fmt: skip
def test_impossible_sampling_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="sampling needs"):
        Sampling(**options)


# ------------------------------------------------------------------------------------------------ random numbers


def test_uniform_numbers_look_uniform() -> None:
    numbers = uniforms(123, np.arange(500), 400)
    assert numbers.shape == (500, 400) and numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.reshape(-1), "uniform").pvalue > 1e-3
    assert numbers.mean() == pytest.approx(1 / 2, abs=4 * (1 / 12 / numbers.size) ** 0.5)
    assert numbers.var() == pytest.approx(1 / 12, abs=4 * (1 / 180 / numbers.size) ** 0.5)
    for a, b in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):  # neighbours in time, and in rows
        assert abs(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]) < 4 / a.size**0.5


def test_a_rows_numbers_are_its_own() -> None:
    whole = uniforms(5, np.arange(50), 30)
    assert np.array_equal(uniforms(5, np.array([31, 7]), 30), whole[[31, 7]])
    assert np.array_equal(uniforms(5, np.arange(50), 10), whole[:, :10])
    assert np.array_equal(uniforms(5, np.arange(50), 30), whole)


def test_no_number_appears_twice() -> None:
    """Across steps, rows and seeds; small seeds meet small row keys, and must not become each other."""
    numbers = np.stack([uniforms(seed, np.arange(40), 40) for seed in range(40)])
    assert len(np.unique(numbers)) == numbers.size


def test_seeds_are_derived_by_purpose() -> None:
    parts = [(0, "a", 1), (0, "a", 2),
             (0, "b", 1), (1, "a", 1), (0, "a", "1"), ("0", "a", 1), (0, "a1"), (0, "a", 1, 0)]  # fmt: skip
    assert len({derive_seed(*p) for p in parts}) == 8
    assert derive_seed(0, "a") == derive_seed(0, "a") and 0 <= derive_seed(0, "a") < 2**63
    assert generator(1, "x").random() == generator(1, "x").random() != generator(2, "x").random()
