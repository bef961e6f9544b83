"""Decoding by two models is the distribution that its formula says; products answer as they promise."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, RwkvConfig

import prefzoo
from prefzoo.data.samples import Ragged, Samples
from prefzoo.data.tokens import tokenise
from prefzoo.feedback import Judge, RewardSource
from prefzoo.models.load import learn_tokenizer, load_causal, load_policy, tiny_model
from prefzoo.models.reference import reference_of
from prefzoo.models.roles import Policy
from prefzoo.models.tree import TreeBatch, pack_rows
from prefzoo.parts.product import BestOfN, Draw, Prefix, Product, best_of, best_of_n_kl, read_product, write_product
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


# ------------------------------------------------------------------------------------------------ products


TOKENS = 260  # of the tokenizer


@pytest.fixture(scope="module")
def start() -> tuple[Policy, Any]:
    words = learn_tokenizer(["ab"], 261)
    model = tiny_model(words, seed=3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)  # they are the input's too: else it repeats the last token
    return Policy(load_causal(model)), words


class ByToken(RewardSource):
    """A reward of the first token of a completion."""

    name, verifies = "by_token", True

    def __init__(self, rewards_V: Tensor) -> None:
        self.rewards_V = rewards_V

    def __call__(self, samples: Samples) -> Tensor:
        first = samples.completions.flat[samples.completions.offsets[:-1]]
        return self.rewards_V[torch.from_numpy(first).long()]


def drawn(
    start: tuple[Policy, Any], product: Product, n: int, prompt: str = "a", seed: int = 0, **sampling: Any
) -> Samples:
    policy, words = start
    prompts, _ = tokenise([{"prompt": prompt}], words, "prompts")
    return product.answer(Draw(policy, words, Sampling(**{"max_new_tokens": 1, **sampling}), seed), prompts, n)


@pytest.mark.parametrize("classes", [2, 7, TOKENS])
def test_best_of_n_is_the_order_statistic_and_its_kl_below_the_bound(start: tuple[Policy, Any], classes: int) -> None:
    """Of answers of one token, by enumeration: with two rewards, with seven, and with one for every token."""
    policy, words = start
    rewards_V = torch.arange(TOKENS) * classes // TOKENS
    every = pack_rows([(words("a")["input_ids"], [[token] for token in range(TOKENS)])])
    with torch.no_grad():
        p_V = policy(TreeBatch.of(every)).logps_C.double().exp().numpy()
    n, answers = 4, 3000

    def best_of_classes(p_C: np.ndarray) -> tuple[np.ndarray, float]:
        upto_C = p_C.cumsum()
        best_C = upto_C**n - (upto_C - p_C) ** n
        return best_C, float(np.sum(best_C * np.log(best_C / p_C)))

    best_C, exact = best_of_classes(np.bincount(rewards_V.numpy(), weights=p_V / p_V.sum()))
    product = BestOfN(n, finished=False).of_run(source=ByToken(rewards_V.float()), reward="somewhere")
    found = drawn(start, product, answers, seed=classes)
    counts_C = np.bincount(found.columns["score"].numpy().astype(int), minlength=classes)
    usual = best_C * answers >= 5
    observed, wanted = counts_C[usual], best_C[usual] * answers
    assert usual.sum() > 1
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3
    bound = float(found.columns["decoding_kl"][0])
    assert bound == pytest.approx(np.log(n) - (n - 1) / n)
    untied = best_of_classes(p_V / p_V.sum())[1]
    assert (exact < untied if classes < TOKENS else exact == pytest.approx(untied)) and untied < bound


def test_the_bound_is_reached_where_no_answers_tie() -> None:
    p = 1 / 5000
    for n in (1, 2, 16):
        upto = np.arange(1, 5001) * p
        best = upto**n - (upto - p) ** n
        assert best_of_n_kl(n) == pytest.approx(float(np.sum(best * np.log(best / p))), abs=2e-3)


def test_the_control_of_best_of_n_costs_the_same_and_looks_at_nothing(start: tuple[Policy, Any]) -> None:
    control = BestOfN(4, choose="random")
    assert not control.needs and BestOfN(4).needs == {"reward"}
    found = drawn(start, control, 6, max_new_tokens=5)
    policy, words = start
    prompts, _ = tokenise([{"prompt": "a"}], words, "prompts")
    whole = Draw(policy, words, Sampling(max_new_tokens=5), 0)(prompts, 24)
    assert texts(found) == texts(whole)[::4]
    assert not found.columns["decoding_kl"].any()


def test_more_answers_do_not_change_the_first_ones_of_best_of_n(start: tuple[Policy, Any]) -> None:
    product = BestOfN(3, finished=False).of_run(source=ByToken(torch.arange(float(TOKENS))))
    assert texts(drawn(start, product, 2, max_new_tokens=4)) == texts(drawn(start, product, 5, max_new_tokens=4))[:2]


def test_a_judge_compares_the_samples_of_one_answer_alone(start: tuple[Policy, Any]) -> None:
    """One that likes the later letter: the largest of each four; and it is asked about pairs of those four only."""
    asked: list[int] = []

    def later(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
        asked.append(len(first))
        return [float(a > b) for a, b in zip(first, second, strict=True)]

    judged = BestOfN(4, finished=False).of_run(source=Judge(later, start[1]))
    found = drawn(start, judged, 3, max_new_tokens=4)
    every = drawn(start, BestOfN(1, "random"), 12, max_new_tokens=4)
    words = [start[1].decode(ids, skip_special_tokens=True) for ids in texts(every)]
    best = [max(words[i : i + 4]) for i in (0, 4, 8)]
    assert [start[1].decode(ids, skip_special_tokens=True) for ids in texts(found)] == best
    assert sum(asked) <= 3 * 4 * 3


def test_cut_answers_and_those_without_a_score_win_only_where_nothing_else_is_left() -> None:
    nan = float("nan")
    scores = torch.tensor([[1.0, 9.0, 2.0], [1.0, nan, 0.5], [nan, nan, nan], [3.0, 4.0, nan], [-2.0, -2.0, -3.0]])
    cut = torch.tensor([[False, True, False], [False, False, False], [False, True, False], [True, True, False],
                        [False, False, False]])  # fmt: skip
    assert best_of(scores, cut).tolist() == [2, 0, 0, 1, 0]


def test_words_before_a_prompt_are_the_prompt_with_the_words(start: tuple[Policy, Any]) -> None:
    """The same answers and the same log-probabilities as of the words written by hand, and the prompt comes back."""
    found = drawn(start, Prefix("<good>"), 5, prompt="ab", max_new_tokens=6)
    policy, words = start
    by_hand, _ = tokenise([{"prompt": "<good>ab"}], words, "prompts")
    expected = Draw(policy, words, Sampling(max_new_tokens=6), 0)(by_hand, 5)
    assert texts(found) == texts(expected) != texts(drawn(start, Prefix("<bad>"), 5, prompt="ab", max_new_tokens=6))
    assert torch.equal(found.tokens["old_logps"], expected.tokens["old_logps"])
    assert found.prompts[0].tolist() == words("ab")["input_ids"]


@dataclasses.dataclass(frozen=True)
class Shouted(Product):
    """A product of a user's."""

    loud: int = 3

    def answer(self, draw: Draw, prompts: Samples, n: int) -> Samples:
        return draw(prompts, n)


@pytest.mark.parametrize("product", [
    BestOfN(5, reward="runs/rm/final"), BestOfN(2, "random", finished=False), Prefix("<|good|>"), Shouted(7),
    BestOfN(3, reward=["exact", "runs/rm"], reward_weights=[1.0, 0.5]),
], ids=str)  # fmt: skip
def test_products_come_back_from_their_file(product: Product, tmp_path: Path) -> None:
    write_product(product, tmp_path)
    assert read_product(tmp_path) == product
    assert read_product(tmp_path / "elsewhere") is None


def test_a_function_has_no_place_in_a_file(tmp_path: Path) -> None:
    write_product(BestOfN(2).of_run(reward=lambda completions: [0.0]), tmp_path)
    assert read_product(tmp_path) == BestOfN(2)


@pytest.mark.parametrize(("text", "words"), [
    ("{", "cannot be read"), ("[]", "no object"), ("{}", "no product"), ('{"product": "BestOfM"}', "mean 'BestOfN'"),
    ('{"product": "Prefix", "txt": "a"}', "txt"), ('{"product": "BestOfN", "n": 0}', "at least 1"),
])  # fmt: skip
def test_files_that_say_no_product_are_refused_in_words(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "decode.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        read_product(tmp_path)


def test_a_run_of_best_of_n_writes_its_model_and_answers_by_it(start: tuple[Policy, Any], tmp_path: Path) -> None:
    policy, words = start
    file = tmp_path / "judge.py"
    file.write_text(
        "def letters(completions, **_):\n    return [float(sum(map(str.isalpha, c))) for c in completions]\n"
    )
    options: dict[str, Any] = {"model": policy.model, "tokenizer": words, "n": 6, "quiet": True}
    run = prefzoo.train("best_of_n", reward=f"{file}:letters", output_dir=tmp_path / "run", **options)
    assert run.policy is not None and run.spent.optimizer_steps == 0
    answer = lambda model, **more: prefzoo.generate(  # noqa: E731
        model, ["a", "b"], n=4, max_new_tokens=6, seed=1, **more
    )
    best, plain = answer(run), answer(run, plain=True)
    letters = lambda answers: np.mean([sum(map(str.isalpha, a)) for row in answers for a in row])  # noqa: E731
    assert letters(best) > letters(plain)
    assert answer(tmp_path / "run") == answer(tmp_path / "run" / "final") == best
    assert answer(policy, tokenizer=words) == plain == answer(tmp_path / "run", plain=True), (
        "the weights are as they were"
    )
    shortest = answer(
        tmp_path / "run", reward=lambda completions, **_: [-float(sum(map(str.isalpha, c))) for c in completions]
    )
    assert letters(shortest) < letters(plain)
    again = prefzoo.train("best_of_n", reward=f"{file}:letters", output_dir=tmp_path / "run", resume=True, **options)
    assert answer(again) == best
    with pytest.raises(UsageError, match="nothing chooses"):
        answer(policy, tokenizer=words, reward="exact")
    with pytest.raises(UsageError, match="nothing chooses"):
        answer(run, reward="exact", plain=True)
    nothing = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
    assert answer(prefzoo.train("best_of_n", reward=nothing, output_dir=tmp_path / "b", **options))
    with pytest.raises(UsageError, match="give reward="):
        answer(tmp_path / "b")
