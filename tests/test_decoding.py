"""Decoding by two models is the distribution that its formula says; products answer as they promise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, RwkvConfig

from prefzoo.data.samples import Ragged, Samples
from prefzoo.models.load import load_causal, load_policy
from prefzoo.models.reference import reference_of
from prefzoo.models.roles import Policy
from prefzoo.models.tree import TreeBatch
from prefzoo.registry import UsageError
from prefzoo.rollout import CacheEngine, LoopEngine, Mixture, Next, Sampling, rollout_engine

VOCABULARY, EOS = 13, 2
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "eos_token_id": EOS,
}  # fmt: skip


def random_model(config: Any, seed: int, scale: float = 0.3) -> Any:
    model = AutoModelForCausalLM.from_config(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                weight.normal_(0.0, scale, generator=draw)
    return model


def packed(seed: int) -> Policy:
    return Policy(load_causal(random_model(LlamaConfig(**SHAPE), seed)))


def eager(seed: int) -> Policy:
    policy = packed(seed)
    policy.model.set_attn_implementation("eager")
    return policy


def no_cache(seed: int) -> Policy:
    return load_policy(random_model(RwkvConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2), seed))


def with_window(seed: int) -> Policy:
    return load_policy(random_model(Gemma2Config(**SHAPE, head_dim=8, sliding_window=4), seed))


PROMPTS = Samples("prompts", Ragged.of([[1, 5, 6, 7], [1, 3], [1, 4, 4, 4], [1], [1, 8, 9, 10, 11]]), Ragged.of([]),
                  np.zeros(0, dtype=np.int64))  # fmt: skip
# Every way in which two models read along: by the hook, by the library's cache, the whole text again.
PAIRS: dict[str, tuple[Callable[[int], Policy], Callable[[int], Policy]]] = {
    "packed, packed": (packed, packed), "cache, cache": (eager, with_window), "packed, cache": (packed, with_window),
    "cache, packed": (eager, packed), "packed, no cache": (packed, no_cache),
}  # fmt: skip


def nucleus(probability_CV: Tensor, top_p: float) -> Tensor:
    """Tokens from the likeliest down until their probability reaches ``top_p``, one row at a time."""
    kept = torch.zeros_like(probability_CV, dtype=torch.bool)
    for row, probability in zip(kept, probability_CV, strict=True):
        total = 0.0
        for token in sorted(range(len(probability)), key=lambda t: -float(probability[t])):
            if total < top_p:
                row[token] = True
            total += float(probability[token])
    return kept


def mixed(policy: Policy, other: Policy, samples: Samples, mixture: Mixture, temperature: float) -> Tensor:
    """The mixture's distribution before every completion token, (C, V), from whole forward passes, in float64."""
    tree = TreeBatch.of(samples)
    mine, theirs = (
        (p.frozen_logits(tree, tree.predict_C).double() / temperature).log_softmax(-1) for p in (policy, other)
    )
    p_CV = ((1 - mixture.blend) * mine + mixture.blend * theirs).exp()
    if mixture.mask_top_p is not None:
        p_CV = p_CV * nucleus(theirs.exp(), mixture.mask_top_p)
    return p_CV / p_CV.sum(-1, keepdim=True)


def texts(samples: Samples) -> list[list[int]]:
    return [samples.completions[i].tolist() for i in range(len(samples.completions))]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("blend", "mask"), [(0.0, 0.6), (0.3, None), (0.7, 0.8)])
def test_reported_log_probabilities_are_the_mixtures(name: str, blend: float, mask: float | None) -> None:
    """To the token, for rows of different prompts that end early; with the temperature inside, and top-p of its own."""
    policy, other = (make(seed) for make, seed in zip(PAIRS[name], (0, 1), strict=True))
    mixture = Mixture(other, blend, mask)
    engine = rollout_engine(policy, [EOS, 4, 9], rows_per_batch=9)  # several, so that rows end early
    assert isinstance(engine, CacheEngine) != policy.packed
    for temperature in (1.0, 0.6):
        samples = engine.generate(PROMPTS, 3, Sampling(temperature, max_new_tokens=8), 4, decoder=mixture)
        p_CV = mixed(policy, other, samples, mixture, temperature)
        target_C = TreeBatch.of(samples).target_C[:, None]
        torch.testing.assert_close(
            samples.tokens["old_logps"].double(), p_CV.gather(1, target_C)[:, 0].log(), atol=2e-5, rtol=2e-5
        )
        plain = engine.generate(PROMPTS, 3, Sampling(temperature, max_new_tokens=8), 4)
        assert texts(samples) != texts(plain)
        assert len({len(row) for row in texts(samples)}) > 1


@pytest.mark.parametrize("make", [packed, eager], ids=["loop", "cache"])
@pytest.mark.parametrize(("blend", "mask", "top_p"), [(0.4, None, 1.0), (0.0, 0.7, 1.0), (0.4, 0.7, 0.8)])
def test_first_and_second_tokens_have_the_mixtures_frequencies(
    make: Callable[[int], Policy], blend: float, mask: float | None, top_p: float
) -> None:
    policy, other, n = make(0), make(1), 4000
    mixture = Mixture(other, blend, mask)
    prompt = PROMPTS.take([4])
    sampling = Sampling(top_p=top_p, max_new_tokens=2)
    samples = rollout_engine(policy, -1, rows_per_batch=2000).generate(prompt, n, sampling, 7, decoder=mixture)
    rows = np.array(texts(samples))
    p_NTV = mixed(policy, other, samples, mixture, 1.0).view(n, 2, VOCABULARY)
    likeliest = int(np.bincount(rows[:, 0]).argmax())
    after = rows[:, 0] == likeliest
    for tokens, p_V in ((rows[:, 0], p_NTV[0, 0]), (rows[after, 1], p_NTV[int(after.argmax()), 1])):
        p_V = p_V * nucleus(p_V[None], top_p)[0]
        expected = (p_V / p_V.sum()).numpy() * len(tokens)
        counts = np.bincount(tokens, minlength=VOCABULARY)
        assert not counts[expected == 0].any(), "a token that the mask forbids"
        usual = expected >= 5
        observed, wanted = counts[usual], expected[usual]
        assert len(tokens) > 300 and usual.sum() > 2
        assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("make", [packed, eager], ids=["loop", "cache"])
def test_a_blend_of_nothing_is_the_policy_and_of_all_the_other(make: Callable[[int], Policy]) -> None:
    policy, other = make(0), make(1)
    draw = lambda p, decoder=None: rollout_engine(p, EOS).generate(  # noqa: E731
        PROMPTS, 3, Sampling(max_new_tokens=10), 3, decoder=decoder
    )
    plain, alone = draw(policy), draw(other)
    for decoder, expected in (
        (Mixture(other, 0.0), plain), (Mixture(other, 0.0, 1.0), plain), (Mixture(other, 1.0), alone)
    ):  # fmt: skip
        found = draw(policy, decoder)
        assert texts(found) == texts(expected)
        assert torch.equal(found.tokens["old_logps"], expected.tokens["old_logps"]), "the same bits"
    assert texts(draw(policy, Mixture(policy, 0.5))) == texts(plain), "with itself"


def test_greedy_takes_the_mixtures_likeliest_tokens() -> None:
    policy, other = packed(0), packed(1)
    mixture = Mixture(other, 0.5, 0.5)
    samples = rollout_engine(policy, EOS).generate(PROMPTS, 1, Sampling(0.0, max_new_tokens=8), 0, decoder=mixture)
    p_CV = mixed(policy, other, samples, mixture, 1.0)
    target_C = TreeBatch.of(samples).target_C
    assert torch.equal(p_CV.argmax(-1), target_C)
    own_CV = mixed(policy, other, samples, Mixture(other, 0.0), 1.0)
    assert not torch.equal(own_CV.argmax(-1), target_C), "where the policy alone would have gone elsewhere"
    log_C = p_CV.gather(1, target_C[:, None])[:, 0].log()
    torch.testing.assert_close(samples.tokens["old_logps"].double(), log_C, atol=2e-5, rtol=2e-5)


def test_an_adapter_is_mixed_with_what_it_was_before() -> None:
    """The reference of a fresh adapter is the same weights with it switched off, and both keep their own memory."""
    from prefzoo.models.adapters import Adapter, add_adapter

    model = load_causal(random_model(LlamaConfig(**SHAPE), 0))
    start = Policy(copy.deepcopy(model))
    policy = Policy(model, add_adapter(model, Adapter(rank=4)))
    reference = reference_of(policy, live=True)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(3))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    draw = lambda other: rollout_engine(policy, EOS).generate(  # noqa: E731
        PROMPTS, 2, Sampling(max_new_tokens=8), 1, decoder=Mixture(other, 0.5, 0.9)
    )
    found, expected = draw(reference), draw(start)
    assert texts(found) == texts(expected)
    torch.testing.assert_close(found.tokens["old_logps"], expected.tokens["old_logps"], atol=1e-5, rtol=1e-5)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained


def test_both_models_are_left_as_they_were() -> None:
    policy, other = packed(0).train(), packed(1).eval()
    policy.model.model.norm.eval()
    rollout_engine(policy, EOS).generate(PROMPTS, 1, Sampling(max_new_tokens=2), 0, decoder=Mixture(other, 0.5))
    assert policy.model.training and not policy.model.model.norm.training and not other.training


@pytest.mark.parametrize("rows", [1, 4])
def test_neighbours_do_not_matter_to_a_mixture(rows: int) -> None:
    policy, other = packed(0), packed(1)
    draw = lambda rows, tokens=2**17: LoopEngine(policy, EOS, rows_per_batch=rows, tokens_per_batch=tokens).generate(  # noqa: E731
        PROMPTS, 3, Sampling(max_new_tokens=10), 5, decoder=Mixture(other, 0.5, 0.9)
    )
    whole = draw(512)
    assert texts(draw(rows)) == texts(whole) == texts(draw(512, 60))


class Told:
    """A decoder of its own: what it was told, and logits that leave one token."""

    other = None

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, here: Next) -> Tensor:
        assert here.other_RV is None and here.sampling.max_new_tokens == 3
        self.rows.append(len(here.logits_RV))
        return torch.full_like(here.logits_RV, -torch.inf).index_fill(1, torch.tensor([6]), 0.0)


def test_a_decoder_alone_decides() -> None:
    decoder = Told()
    samples = rollout_engine(packed(0), EOS).generate(PROMPTS, 2, Sampling(0.7, 0.9, 3), 0, decoder=decoder)
    assert texts(samples) == [[6, 6, 6]] * 10 and decoder.rows == [10, 10, 10]
    assert not samples.tokens["old_logps"].any()


def test_mixtures_that_cannot_be_are_refused_in_words() -> None:
    policy = packed(0)
    for options in ({"blend": -0.1}, {"blend": 1.5}, {"mask_top_p": 0.0}, {"mask_top_p": 1.1}):
        with pytest.raises(UsageError, match=next(iter(options))):
            Mixture(policy, **options)
    wider = Policy(load_causal(random_model(LlamaConfig(**{**SHAPE, "vocab_size": 20}), 0)))
    shorter = Policy(load_causal(random_model(LlamaConfig(**{**SHAPE, "max_position_embeddings": 8}), 0)))
    for other, words in ((wider, "same vocabulary.*13, 20"), (shorter, "8 positions")):
        with pytest.raises(UsageError, match=words):
            rollout_engine(policy, EOS).generate(PROMPTS, 1, Sampling(max_new_tokens=5), 0, decoder=Mixture(other, 0.5))
