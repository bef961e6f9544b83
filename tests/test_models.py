"""Loading, roles and what is stored: the faults that would be silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import prefzoo
from prefzoo.data.samples import Samples
from prefzoo.data.tokens import encode_sides, tokenise
from prefzoo.models.load import (
    critic_of,
    learn_tokenizer,
    load_causal,
    load_policy,
    new_scorer,
    save_scorer,
    tiny_model,
)
from prefzoo.models.reference import cached_logps
from prefzoo.models.roles import Policy, Scorer
from prefzoo.models.tree import TreeBatch
from prefzoo.registry import UsageError

PAIRS = [{"prompt": "a b", "chosen": " c d", "rejected": " e"}, {"prompt": "a", "chosen": " b c", "rejected": " d e f"}]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return learn_tokenizer(["a b c d e f"], 270)


@pytest.fixture(scope="module")
def samples(words: PreTrainedTokenizerBase) -> Samples:
    return tokenise(PAIRS, words, "pairs")[0]


@pytest.fixture
def scorer(words: PreTrainedTokenizerBase) -> Scorer:
    made = new_scorer(Policy(tiny_model(words)), "last")
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(0))
    made.offset.fill_(0.7)
    made.scale.fill_(2.5)
    return made


def test_weights_are_float32_whatever_the_model_in_memory_holds(words: PreTrainedTokenizerBase) -> None:
    """A step of 1e-6 vanishes in bfloat16 weights; the caller's own model is left as it is."""
    half = tiny_model(words).to(torch.bfloat16)
    assert {p.dtype for p in load_policy(half).parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_critic_from_a_reward_model_predicts_its_standardised_rewards(scorer: Scorer, samples: Samples) -> None:
    """The value before the token after the last would be the reward: read the critic's head on the last state."""
    tree = TreeBatch.of(samples)
    with torch.no_grad():
        states = scorer.trunk(
            input_ids=tree.ids_N[None], position_ids=tree.positions_N[None], attention_plan=tree.plan, use_cache=False
        ).last_hidden_state[0][tree.last_B]
        rewards = scorer(tree).rewards_B
        torch.testing.assert_close(critic_of(scorer).head(states)[:, 0], rewards)
    assert not torch.allclose(scorer.head(states)[:, 0], rewards), "else the standardisation would not matter"


def test_scores_keep_float32_under_a_bfloat16_trunk(scorer: Scorer, samples: Samples) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        values = scorer(TreeBatch.of(samples), values=True).values_C
    assert values is not None and values.dtype == torch.float32
    assert not torch.equal(values, values.to(torch.bfloat16).float()), "eight bits of mantissa would be rounded away"


def test_a_reward_model_is_no_policy(scorer: Scorer, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a reward model, not a language model"):
        load_causal(save_scorer(scorer, words, tmp_path / "reward"))


def test_stored_reference_is_of_these_weights_this_configuration_and_this_code(
    words: PreTrainedTokenizerBase, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(tiny_model(words))
    stored = lambda: len(list(tmp_path.glob("reference-*")))  # noqa: E731
    first = cached_logps(policy, samples, 64, "cpu", tmp_path)
    assert torch.equal(cached_logps(policy, samples, 64, "cpu", tmp_path), first) and stored() == 1
    policy.model.config.logits_scaling = 2.0
    assert not torch.equal(cached_logps(policy, samples, 64, "cpu", tmp_path), first) and stored() == 2
    monkeypatch.setattr("prefzoo.models.reference.layer_hash", lambda: "other code")
    cached_logps(policy, samples, 64, "cpu", tmp_path)
    assert stored() == 3


def test_prompts_that_leave_no_room_for_an_answer_are_dropped_before_the_run(words: PreTrainedTokenizerBase) -> None:
    model = tiny_model(words, positions=64)
    rows = [{"prompt": "a b"}, {"prompt": "a b c " * 12}]
    options: dict[str, Any] = {"max_new_tokens": 40, "prompts_per_step": 2, "group_size": 2, "max_steps": 3, "kl": 0.0}
    run = prefzoo.train(
        "grpo", model=model, tokenizer=words, dataset=rows, reward=lambda completions: [0.0] * len(completions),
        quiet=True, **options,
    )  # fmt: skip
    assert run.spent.prompts == 6, "the short prompt alone, every time"


def test_white_space_after_the_last_turn_is_not_the_end_of_an_answer(words: PreTrainedTokenizerBase) -> None:
    """Many templates write a line break after the turn's EOS; rollouts stop at EOS, and so do data."""
    chat = learn_tokenizer(["a b c d e f \n"], 270)
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>\n{% endfor %}"
    prompt, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    _, sides = encode_sides(chat, [prompt], [[answer]])
    assert sides[0][0][-1] == chat.eos_token_id


def test_rollout_kl_is_the_sequences(words: PreTrainedTokenizerBase) -> None:
    """Nats per completion, for every algorithm, beside the loss term's own estimate per token."""
    run = prefzoo.train(
        "grpo", model=tiny_model(words), tokenizer=words, reference=tiny_model(words, seed=1), dataset=PAIRS,
        reward=lambda completions: [0.0] * len(completions), max_new_tokens=8, prompts_per_step=2, group_size=4,
        max_steps=1, learning_rate=0.0, logging_steps=1, quiet=True,
    )  # fmt: skip
    row = run.history[0]
    assert row["kl"] > 4 * row["kl/token"] / 2 > 0, "several tokens each"


@pytest.mark.parametrize("bad", ["much", None, True])
def test_a_weight_that_is_no_number_is_told(bad: Any, words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match=r"row 2.*expected a number"):
        tokenise([{**PAIRS[0], "weight": 0.5}, {**PAIRS[1], "weight": bad}], words, "pairs")


def test_rows_of_weight_zero_do_not_move_the_model(words: PreTrainedTokenizerBase) -> None:
    def after(rows: list[dict[str, Any]]) -> torch.Tensor:
        run = prefzoo.train(
            "dpo", model=tiny_model(words), tokenizer=words, dataset=rows, optimizer="sgd", learning_rate=0.1,
            max_steps=1, rows_per_step=2, warmup_steps=0, shuffle=False, max_grad_norm=None, quiet=True,
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in run.model.parameters()])

    other = {"prompt": "f", "chosen": " a", "rejected": " b b b"}
    silent = [after([{**PAIRS[0], "weight": 2.0}, {**row, "weight": 0.0}]) for row in (PAIRS[1], other)]
    torch.testing.assert_close(silent[0], silent[1])
    assert not torch.allclose(silent[0], after(PAIRS))
