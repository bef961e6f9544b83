"""Numbers of the zoo that were wrong once: of what nobody sampled, of tokens that carry no loss, of nothing at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import prefzoo
from prefzoo.algorithm import create_algorithm
from prefzoo.data.samples import Ragged, Samples
from prefzoo.models.load import learn_tokenizer, tiny_model
from prefzoo.models.roles import Policy
from prefzoo.parts.baselines import MovingMean
from prefzoo.parts.feedback import MaskTruncated
from prefzoo.parts.prelude import ClassMidpoint, RotatedBaseline
from prefzoo.parts.safety import Multiplier
from prefzoo.parts.schedule import Schedule
from prefzoo.registry import UsageError
from prefzoo.training.collect import side_by_side

ROWS = [{"prompt": f"add {i} and {j}", "completion": f" {i + j} done"} for i in range(3) for j in range(3)]


class Roles:
    """A policy whose log-ratio of a token is its place in the batch; it remembers what it was asked."""

    def policy_logps(self, samples: Samples) -> Tensor:
        self.asked = [
            (samples.prompts[p].tolist(), samples.completions[b].tolist()) for b, p in enumerate(samples.prompt_B)
        ]
        return torch.arange(len(samples.completions.flat)).float()

    def reference_logps(self, samples: Samples) -> Tensor:
        return torch.zeros(len(samples.completions.flat))


def unpaired(completions: list[list[int]], prompt_B: list[int], **tokens: Tensor) -> Samples:
    good = torch.arange(len(completions)) % 2 == 0
    prompts = Ragged.of([[p] for p in range(max(prompt_B) + 1)])
    return Samples(
        "unpaired", prompts, Ragged.of(completions), np.array(prompt_B), columns={"desirable": good}, tokens=tokens
    )


def test_kto_s_baseline_of_samples_is_of_other_prompts() -> None:
    roles: Any = Roles()
    RotatedBaseline()(unpaired([[10], [11], [20], [21]], [0, 0, 1, 1]), roles)
    assert all(prompt[0] != completion[0] // 10 - 1 for prompt, completion in roles.asked)
    RotatedBaseline()(unpaired([[10], [20], [30]], [0, 1, 2]), roles)
    assert roles.asked == [([0], [30]), ([1], [10]), ([2], [20])], "else the row before"


def test_log_ratios_of_preludes_are_of_the_tokens_that_carry_loss() -> None:
    roles: Any = Roles()
    samples = unpaired([[10, 11], [20, 21]], [0, 1], trainable=torch.tensor([False, True, False, True]))
    assert float(ClassMidpoint()(samples, roles)) == (1 + 3) / 2
    assert float(RotatedBaseline()(samples, roles)) == (1 + 3) / 2


def test_steps_without_rewards_leave_the_baseline() -> None:
    moving = MovingMean()
    moving.update(2.0, 8)
    moving.update(0.0, 0)
    assert moving.value == 2.0


def test_a_multiplier_comes_back_from_any_cost() -> None:
    multiplier = Multiplier(1.0, budget=0.0, largest=None)
    multiplier.update(-1e6, 8)
    assert 0 < multiplier.value < 1e-20


def test_cut_answers_and_turns_of_others_are_both_left_out() -> None:
    samples = Samples(
        "completions", Ragged.of([[1]]), Ragged.of([[2, 3], [4, 5]]), np.array([0, 0]),
        columns={"finish": torch.tensor([0, 1])}, tokens={"trainable": torch.tensor([False, True, True, True])},
    )  # fmt: skip
    kept, _ = MaskTruncated()(samples, torch.zeros(2))
    assert kept.tokens["trainable"].tolist() == [False, True, False, False]


def test_turns_of_others_stay_out_beside_samples() -> None:
    parts = [
        Samples(
            "completions", Ragged.of([[1]]), Ragged.of([[2, 3]]), np.array([0]),
            columns={"finish": torch.tensor([0])}, tokens={"old_logps": torch.zeros(2), **more},
        )
        for more in ({}, {"trainable": torch.tensor([False, True])})
    ]  # fmt: skip
    assert side_by_side(parts).tokens["trainable"].tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("grpo", {"kl": -0.1}, "kl"), ("dapo", {"kl": -0.1}, "kl"), ("ppo", {"kl": -1.0}, "kl"),
        ("ppo", {"gamma": 1.5}, "gamma"), ("ppo", {"lam": 2.0}, "lam"), ("ppo", {"ptx": -1.0}, "ptx"),
        ("raft", {"rows_per_update": 0}, "at least 1"), ("canonical_rlaif", {"reward_steps": 0}, "at least 1"),
        ("reinforce", {"baseline": "batch", "decay": 0.5}, "decay"), ("rejection_sampling", {"best": 9}, "at least 9"),
        ("rso", {"accepted": 65}, "65 of 64"),
    ],
)  # fmt: skip
def test_options_out_of_their_range_or_without_effect_are_refused(
    name: str, options: dict[str, Any], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        create_algorithm(name, **options)


def test_schedules_have_no_steps_of_nothing() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        Schedule(steps=0)


def test_minillm_has_one_temperature() -> None:
    (stage,) = create_algorithm("minillm", temperature=0.7).stages
    assert stage.terms[0].loss.options["temperature"] == 0.7
    assert create_algorithm("minillm", temperature=0.0).stages[0].terms[0].loss.options["temperature"] == 1.0


def length(prompts: Any, completions: Any, **_: Any) -> list[float]:
    return [float(len(c) % 5) for c in completions]


def test_a_policy_that_has_not_moved_has_no_kl_in_an_evaluation_either() -> None:
    run = prefzoo.train(
        "ppo_max", model="tiny", dataset=ROWS, eval_dataset=[{"prompt": "add 7 and 9"}, {"prompt": "add 6 and 9"}],
        reward=length, prompts_per_step=2, max_new_tokens=5, top_p=0.5, max_steps=1, eval_steps=1, learning_rate=0.0,
        critic_learning_rate=0.0, quiet=True,
    )  # fmt: skip
    found = [h["eval/kl"] for h in run.history if "eval/kl" in h]
    assert found and max(map(abs, found)) < 1e-5


def test_an_evaluation_does_not_score_demonstrations() -> None:
    run = prefzoo.train(
        "spin", model="tiny", dataset=ROWS, eval_dataset=[{"prompt": "add 7 and 9", "completion": " 16 done"}],
        prompts_per_round=2, max_new_tokens=4, max_steps=1, eval_steps=1, quiet=True,
    )  # fmt: skip
    told = {name for h in run.history for name in h if name.startswith("eval/")}
    assert "eval/kl" in told and not {name for name in told if "reward" in name}


def test_demonstrations_say_nothing_of_the_policy_s_entropy() -> None:
    words = learn_tokenizer([row["prompt"] + row["completion"] for row in ROWS], 270)
    teacher, told = Policy(tiny_model(words, seed=1)), {}
    for share in (0.0, 1.0):
        run = prefzoo.train(
            "gkd", model="tiny", teacher=teacher, tokenizer=words, dataset=ROWS, on_policy=share,
            prompts_per_step=2, max_new_tokens=4, max_steps=1, logging_steps=1, quiet=True,
        )  # fmt: skip
        told[share] = any("entropy" in h for h in run.history)
    assert told == {0.0: False, 1.0: True}
