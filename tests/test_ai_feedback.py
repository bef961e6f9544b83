"""AI feedback as stages: judges' labels, revisions, rules beside a reward, and rewards under a budget of cost."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import prefzoo
from prefzoo.algorithm import Algorithm, Stage, create_algorithm
from prefzoo.data.samples import Ragged, Samples
from prefzoo.feedback import Judge, Rules
from prefzoo.feedback.rewards import resolve_reward
from prefzoo.losses import advantages
from prefzoo.models.load import end_ids, learn_tokenizer, tiny_model
from prefzoo.parts.controllers import FixedKL
from prefzoo.parts.critics import GAE
from prefzoo.parts.judged import AILabels, Judged, RuleRewards
from prefzoo.parts.pairs import TopAgainstBottom
from prefzoo.parts.revision import PRINCIPLES, Revised, principles_of
from prefzoo.parts.safety import Lagrangian, Multiplier
from prefzoo.registry import UsageError
from prefzoo.theory.enumerable_lm import PROMPTS, RESPONSES, EnumerableWorld

NAN = math.nan
ASKED = [{"prompt": f"{a} and {b}:"} for a in "abcd" for b in "efgh"]
TEMPLATE = {"chat_template": "chatml"}
PLACE = {response: i for i, response in enumerate(RESPONSES)}


@pytest.fixture(scope="module")
def world() -> EnumerableWorld:
    return EnumerableWorld.make()


@pytest.fixture(scope="module")
def words():
    """A tokenizer of these requests."""
    return learn_tokenizer([row["prompt"] for row in ASKED] + list("abcdefgh"))


def sized(algorithm: Algorithm, samples: int = 128) -> Algorithm:
    """The algorithm with rollouts as short as the responses of the world."""

    def stage(stage: Stage) -> Stage:
        prompts = max(2, samples // stage.source.group_size)
        source = replace(stage.source, max_new_tokens=4)
        return replace(stage, source=source, schedule=replace(stage.schedule, prompts=prompts))

    algorithm.stages = tuple(map(stage, algorithm.stages))
    return algorithm


def fit(world: EnumerableWorld, algorithm: Algorithm, **settings: Any) -> SimpleNamespace:
    """A run on the world, and the engine of each of its stages."""
    given = {
        "learning_rate": 0.1, "schedule": "linear", "final_learning_rate": 0.0, "warmup_steps": 0, "quiet": True,
        "max_grad_norm": None, "logging_steps": 1_000, "device": "cpu", **settings,
    }  # fmt: skip
    run = prefzoo.steps(algorithm, model=world.start, tokenizer=world.words, dataset=world.rows("prompts"), **given)
    with run.stopping, run:
        engines = {step.stage: run.engine for step in run}
        return SimpleNamespace(run=run.finish(), engines=list(engines.values()))


def total_variation(mine_PR: torch.Tensor, theirs_PR: torch.Tensor) -> float:
    """The larger one of the prompts."""
    return float((mine_PR.exp() - theirs_PR.exp()).abs().sum(-1).max() / 2)


def judge_of(world: EnumerableWorld) -> Judge:
    """The truth of the world, as probabilities of Bradley and Terry."""
    wins_PRR = world.wins()

    def oracle(prompts, first, second):
        return [
            float(wins_PRR[PROMPTS.index(p), PLACE[a], PLACE[b]]) if a in PLACE and b in PLACE else None
            for p, a, b in zip(prompts, first, second, strict=True)
        ]

    return Judge(oracle, both_orders=False)


def samples_of(texts: list[list[int]], group: int = 2, **tokens: torch.Tensor) -> Samples:
    completions = Ragged.of(texts)
    prompts = len(texts) // group
    return Samples(
        "completions", Ragged.of([[5, p] for p in range(prompts)]), completions, np.repeat(np.arange(prompts), group),
        columns={"finish": torch.zeros(len(texts), dtype=torch.long)}, tokens=tokens,
        extra={"prompt": [f"request {p}" for p in range(prompts)]},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ judges


def test_labels_are_the_judges_probabilities_and_never_a_margin():
    samples = samples_of([[1], [2], [3], [4], [5], [6]])
    scores_B = torch.tensor([0.9, 0.1, 0.3, 0.7, 0.5, 0.5])
    soft = AILabels(TopAgainstBottom("win_rates"))(samples, scores_B)
    assert soft.row_columns.keys() == {"probability"}
    torch.testing.assert_close(soft.row_columns["probability"], torch.tensor([0.9, 0.7]))
    assert [ids.tolist() for ids in (soft.completions[0], soft.completions[2])] == [[1], [4]]
    clamped = AILabels(TopAgainstBottom("win_rates"), largest=0.75)(samples, scores_B)
    torch.testing.assert_close(clamped.row_columns["probability"], torch.tensor([0.75, 0.7]))
    hard = AILabels(TopAgainstBottom("win_rates"), soft=False)
    assert not hard(samples, scores_B).row_columns and not hard.columns
    told = AILabels(TopAgainstBottom("win_rates")).measure(samples, scores_B, soft)
    assert float(told["prompts/tied"].mean()) == pytest.approx(1 / 3)
    assert float(told["judge/confidence"].mean()) == pytest.approx(0.8)


def rated(completions, **_):
    return [float(len(c)) for c in completions]


RULES = {"long": {"pattern": "..", "violation": True}}
REFUSED: dict[str, tuple[str, Any, str]] = {
    "a reward for rlaif": ("rlaif", rated, "give a judge"),
    "a reward for canonical_rlaif": ("canonical_rlaif", rated, "give a judge"),
    "a reward for constitutional": ("constitutional", rated, "give a judge"),
    "no rules": ("rbr", rated, "give both, the rules last"),
    "rules alone": ("rbr", Rules(RULES), "for rules alone take"),
    "rules first": ("rbr", [Rules(RULES), rated], "the rules last"),
    "one reward for two": ("safe_rlhf", rated, "expected a list of 2 rewards, got 1"),
    "three for two": ("safe_rlhf", [rated, rated, rated], "expected a list of 2 rewards, got 3"),
    "a judge beside rules": ("rbr", [Judge(lambda prompts, first, second: [0.5]), Rules(RULES)], "give a reward model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_reward_that_cannot_serve_is_refused_before_any_step(case, world):
    name, reward, cure = REFUSED[case]
    with pytest.raises(UsageError, match=cure):
        fit(world, sized(create_algorithm(name)), reward=reward)


def test_a_judge_is_no_reward_that_a_penalty_could_be_taken_from(world):
    with pytest.raises(UsageError, match="missing_eos_penalty has no effect on a judge"):
        Judged(1.0).check(judge_of(world))


@pytest.mark.parametrize("rl", ["dpo", "rlaif", "rlvr", "best_of_n", "rloo(3)"])
def test_the_last_stage_must_learn_from_the_reward_model(rl):
    with pytest.raises(UsageError, match="rl="):
        create_algorithm("canonical_rlaif", rl=rl)


def test_options_of_the_last_stage_stand_in_its_brackets():
    algorithm = create_algorithm("constitutional", rl="rloo(kl=0.25, max_new_tokens=5)", max_new_tokens=7)
    assert [s.source.max_new_tokens for s in algorithm.stages] == [7, 7, 5] and algorithm.stages[2].credit.kl == 0.25
    assert not algorithm.trains_reward and algorithm.asks_for_reward and algorithm.data == "prompts"


def test_rlaif_ends_at_the_regularised_optimum_of_its_judge(world):
    ended = fit(world, sized(create_algorithm("rlaif", beta=0.5)), reward=judge_of(world), max_steps=40)
    log_probs_PR = world.log_probs(ended.run.policy)
    assert total_variation(world.log_probs(), world.optimum(0.5)) > 0.4
    assert total_variation(log_probs_PR, world.optimum(0.5)) < 0.06


def test_the_reward_model_of_a_stage_is_that_of_the_next_and_no_part_of_the_result(world):
    """Its reward is the truth that the judge speaks of, although no reward was given; then the policy rises in it."""
    options = {"rl": "rloo(kl=0.5)", "reward_rate": 1.0}
    ended = fit(world, sized(create_algorithm("canonical_rlaif", **options)), reward=judge_of(world), max_steps=60)
    first, second = ended.engines
    known_PR = world.scores(first.scorer) - world.scores(first.scorer).mean(-1, keepdim=True)
    off_PR = world.log_probs().exp() * (known_PR - world.rewards_PR).abs()  # what is rarely seen is not known as well
    assert float(off_PR.sum(-1).max()) < 0.1
    assert second.reward.scorer is first.scorer and ended.run.scorer is None
    assert not any(p.requires_grad for p in first.scorer.parameters())
    assert total_variation(world.log_probs(ended.run.policy), world.optimum(0.5)) < 0.1


# ------------------------------------------------------------------------------------------------ revisions


class Scribe:
    """Roles that write what they are told; texts are ids divided by spaces."""

    def __init__(self, answers):
        self.answers_to, self.asked = answers, []

    def prompts(self, samples):
        return [samples.extra["prompt"][p] for p in samples.prompt_B]

    def texts(self, samples):
        return [" ".join(map(str, samples.completions[b].tolist())) for b in range(len(samples.completions))]

    def write(self, prompts, sampling, purpose, by="policy"):
        self.asked.append((purpose, by, list(prompts)))
        return self.answers(prompts, [self.answers_to(purpose, prompt) for prompt in prompts])

    def answers(self, prompts, texts):
        ids = [[*map(int, text.split())] if text else [] for text in texts]
        return samples_of(ids, 1)


def line_after(text: str, heading: str) -> str:
    lines = text.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("==") and line.endswith(heading)) + 1]


def test_each_round_revises_what_the_round_before_has_made():
    def answer(purpose, prompt):
        return "77" if purpose.startswith("critique") else f"{line_after(prompt, 'the answer')} 9"

    scribe, samples = Scribe(answer), samples_of([[1, 2], [3]], old_logps=torch.zeros(3))
    made = Revised(rounds=2, keep="all").revise(samples, scribe)
    assert [made.completions[b].tolist() for b in range(4)] == [[1, 2, 9], [1, 2, 9, 9], [3, 9], [3, 9, 9]]
    assert made.prompt_B.tolist() == [0, 0, 0, 0] and "old_logps" not in made.tokens
    assert bool(made.tokens["trainable"].all()) and made.extra == samples.extra
    assert [purpose for purpose, _, _ in scribe.asked] == ["critique 0", "revision 0", "critique 1", "revision 1"]
    assert all("77" in prompt for prompt in scribe.asked[1][2]), "the critique stands in the request for a revision"
    last = Revised(rounds=2, keep="last").revise(samples, Scribe(answer))
    assert [last.completions[b].tolist() for b in range(2)] == [[1, 2, 9, 9], [3, 9, 9]]
    assert "old_logps" not in last.tokens


@pytest.mark.parametrize("silent", ["critique", "revision"])
def test_what_is_not_revised_is_not_trained_on(silent):
    def answer(purpose, prompt):
        return "" if purpose.startswith(silent) and "\n3\n" in prompt else "4 4"

    samples = samples_of([[1, 2], [3]])
    feedback = Revised()
    made = feedback.revise(samples, Scribe(answer))
    assert [made.completions[b].tolist() for b in range(2)] == [[4, 4], [3]]
    assert made.tokens["trainable"].tolist() == [True, True, False]
    told = {name: float(values.mean()) for name, values in feedback.measure(samples, made).items()}
    assert told == {"revisions/changed": 0.5, "revisions/none": 0.5}
    once = Revised(rounds=2, keep="last").revise(
        samples, Scribe(lambda purpose, prompt: "" if purpose == "revision 1" else "4 4")
    )
    assert bool(once.tokens["trainable"].all()), "a revision of the first round is one, if the second has none"


def test_principles_are_dealt_by_what_is_criticised():
    samples = samples_of([[n, n + 1] for n in range(200)])
    feedback = Revised()
    drawn = [feedback._principle(samples, b, 0) for b in range(200)]
    assert set(drawn) == set(PRINCIPLES)
    assert drawn == [feedback._principle(samples, b, 0) for b in range(200)]
    assert drawn != [feedback._principle(samples, b, 1) for b in range(200)], "another one in the next round"


def test_principles_come_from_a_file_or_a_list(tmp_path):
    (tmp_path / "mine.txt").write_text("# about tone\nBe kind.\n\nBe brief.\n")
    assert principles_of(tmp_path / "mine.txt") == ("Be kind.", "Be brief.") == principles_of(["Be kind.", "Be brief."])
    (tmp_path / "none.txt").write_text("# nothing\n")
    for wrong in ("none.txt", "absent.txt"):
        with pytest.raises(UsageError, match="principles"):
            principles_of(tmp_path / wrong)
    with pytest.raises(UsageError, match="at least one principle"):
        Revised(principles=())
    with pytest.raises(UsageError, match="reviser is 'somebody'"):
        Revised(reviser="somebody")


CODE = """
def best(prompts, completions, principles):
    return [None if c.startswith("b") else "cA" for c in completions]

def letters(prompts, completions, principles):
    return ["".join(sorted(p)) for p in prompts]

def ab(prompts, completions, principles):
    return ["ab"] * len(prompts)

def short(prompts, completions, principles):
    return ["cA"]
"""


@pytest.fixture(scope="module")
def reviser(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("revisers") / "revisers.py"
    file.write_text(CODE)
    return str(file)


def first_stage(algorithm: Algorithm) -> Algorithm:
    algorithm.stages = algorithm.stages[:1]
    return algorithm


def test_the_policy_learns_the_revisions_and_not_what_it_wrote(world, reviser):
    algorithm = create_algorithm("constitutional", reviser=f"{reviser}:best", revision_rate=1.0)
    run = fit(world, sized(first_stage(algorithm)), max_steps=40).run
    before_PR, after_PR = (world.log_probs(policy).exp() for policy in (None, run.policy))
    assert bool((after_PR[:, PLACE["cA"]] > 0.75).all()) and bool((before_PR[:, PLACE["cA"]] < 0.5).all())
    with pytest.raises(UsageError, match="must return a list of"):
        fit(world, sized(first_stage(create_algorithm("constitutional", reviser=f"{reviser}:short"))), max_steps=1)


def test_critiques_and_revisions_are_charged_to_the_run(world):
    """Sampled tokens: the completion, its critique, its revision. Nobody was asked for a reward."""
    run = fit(world, sized(first_stage(create_algorithm("constitutional"))), max_steps=2, logging_steps=1).run
    assert run.spent.generated_tokens > 2 * run.spent.trained_tokens > 0 == run.spent.reward_calls
    assert all(0 < row["revisions/changed"] <= 1 and "reward_missing" not in row for row in run.history)


def test_what_leaves_no_room_for_a_critique_is_told(words, capsys):
    """The model has room for an answer, and none for the request to find its faults."""
    algorithm = create_algorithm("constitutional", prompts_per_step=2, max_new_tokens=40)
    settings = {"dataset": ASKED, "max_steps": 1, "warmup_steps": 0, "logging_steps": 1, "device": "cpu"}
    run = prefzoo.train(first_stage(algorithm), model=tiny_model(words, positions=64), tokenizer=words, **settings)
    assert run.history[0]["revisions/none"] == 1 and run.spent.trained_tokens == 0
    assert "Nothing was revised" in capsys.readouterr().err


@pytest.mark.parametrize("messages", [False, True])
def test_a_reviser_answers_texts_and_messages_with_an_end(messages, words, reviser):
    """What a function has written ends as demonstrations do, so the policy learns to end."""
    prompt = lambda text: [{"role": "user", "content": text}] if messages else text  # noqa: E731
    algorithm = create_algorithm("constitutional", reviser=f"{reviser}:ab", prompts_per_step=2, max_new_tokens=4)
    steps = prefzoo.steps(
        first_stage(algorithm), model=tiny_model(words), tokenizer=words, quiet=True, max_steps=1, device="cpu",
        dataset=[{"prompt": prompt(row["prompt"])} for row in ASKED], **(TEMPLATE if messages else {}),
    )  # fmt: skip
    seen, sample = [], steps.algorithm.stages[0].feedback.revise

    def watched(feedback, samples, roles):
        seen.append((sample(samples, roles), roles.tokenizer))
        return seen[0][0]

    with pytest.MonkeyPatch.context() as patch, steps.stopping, steps:
        patch.setattr(Revised, "revise", watched)
        list(steps)
    made, tokenizer = seen[0]
    for b in range(len(made.completions)):
        ids = made.completions[b].tolist()
        assert tokenizer.decode(ids, skip_special_tokens=True) == "ab" and ids[-1] in end_ids(tokenizer), ids


# ------------------------------------------------------------------------------------------------ stages that go on


def bits(folder: Path) -> list[Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = sorted((folder / "final").glob("*.safetensors"))
    return [*[{k: v for k, v in row.items() if k != "time"} for row in rows], *[f.read_bytes() for f in files]]


EACH = {"prompts_per_step": 4, "max_new_tokens": 4}


def more_letters(prompts, first, second):
    ahead = [len(set(a)) - len(set(b)) for a, b in zip(first, second, strict=True)]
    return [0.5 + 0.4 * ((gap > 0) - (gap < 0)) for gap in ahead]


@pytest.fixture(scope="module")
def staged(words, reviser, tmp_path_factory, no_pictures) -> SimpleNamespace:
    """A run of three stages, whole, and how to make another one."""
    options = {"reviser": f"{reviser}:letters", "rl": "ppo(kl=0.1, inner_epochs=2)", "revision_steps": 2}
    algorithm = create_algorithm("constitutional", **options, **EACH, reward_steps=3)
    settings = {
        "model": tiny_model(words), "tokenizer": words, "dataset": ASKED, "reward": Judge(more_letters),
        "max_steps": 2, "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-3, "warmup_steps": 0, "quiet": True,
        "device": "cpu",
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("staged")
    run = prefzoo.train(algorithm, output_dir=folder / "whole", **settings)
    return SimpleNamespace(algorithm=algorithm, settings=settings, folder=folder, run=run, whole=bits(folder / "whole"))


PLACES = [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
QUICK = [(1, 2), (2, 1)]


@pytest.mark.parametrize("place", [p if p in QUICK else pytest.param(p, marks=pytest.mark.long) for p in PLACES])
def test_a_run_of_stages_goes_on_from_any_step_to_the_same_bits(place, staged):
    folder = staged.folder / "-".join(map(str, place))
    run = prefzoo.steps(staged.algorithm, output_dir=folder, **staged.settings)
    for step in run:
        if (step.stage, step.number) == place:
            break
    run.close()
    again = prefzoo.steps(staged.algorithm, output_dir=folder, resume=True, **staged.settings)
    with again.stopping, again:
        left = [(step.stage, step.number) for step in again]
    assert left == PLACES[len(PLACES) - len(left) :] and len(PLACES) - len(left) - PLACES.index(place) in (0, 1)
    assert bits(folder) == staged.whole


def test_what_is_written_in_the_end_is_a_policy_that_writes(staged):
    assert staged.run.policy is not None and staged.run.scorer is None
    for source in (staged.run, staged.folder / "whole"):
        answers = prefzoo.generate(source, ["a and e:", "b and f:"], n=3, max_new_tokens=4)
        assert [len(a) for a in answers] == [3, 3]
    assert not (staged.folder / "whole" / "final" / "prefzoo_reward.json").exists()


def test_stages_draw_samples_of_their_own(staged, tmp_path):
    """The policy of both stages is the start, but its answers are not those that the reward model was trained on."""
    algorithm = create_algorithm("canonical_rlaif", rl="rloo(group_size=2)", **EACH)
    prefzoo.train(algorithm, output_dir=tmp_path, **{**staged.settings, "max_steps": 1, "log_completions": 8})
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    first, second = ({(row["prompt"], row["completion"]) for row in part} for part in (rows[:8], rows[8:]))
    assert len(rows) == 16 and not first & second


def test_a_run_that_is_ended_while_it_learns_a_reward_gives_its_policy(staged, tmp_path):
    run = prefzoo.steps(staged.algorithm, output_dir=tmp_path, **staged.settings)
    for step in run:
        if (step.stage, step.number) == (1, 2):
            break
    ended = run.finish()
    assert ended.policy is not None and ended.scorer is None
    policy, _ = prefzoo.training.load_run_policy(tmp_path)
    assert policy is not None


def test_an_evaluation_by_a_judge_is_against_the_start(staged):
    """Answers of one policy win half of the time against each other, so that would say nothing."""
    settings = {k: v for k, v in staged.settings.items() if k != "save_steps"}
    held_out = [{"prompt": f"{a} and {a}:"} for a in "abcdefg"]
    algorithm = create_algorithm("rlaif", **EACH)
    run = prefzoo.train(algorithm, **{**settings, "max_steps": 1, "eval_dataset": held_out})
    for row in (r for r in run.history if "eval/reward" in r):
        assert row["eval/reward"] + row["eval/reward/sampler_1"] == pytest.approx(1)


def test_patience_ends_a_stage_and_a_callback_the_run(staged):
    settings = {k: v for k, v in staged.settings.items() if k != "save_steps"}
    settings |= {"max_steps": 6, "eval_dataset": [{"prompt": "a and a:"}, {"prompt": "b and b:"}], "eval_steps": 1}
    settings |= {"learning_rate": 0.0}
    algorithm = create_algorithm("canonical_rlaif", rl="rloo", **EACH)
    steps = prefzoo.steps(algorithm, patience=2, **settings)
    with steps.stopping, steps:
        taken = [(s.stage, s.number) for s in steps]
    assert [stage for stage, _ in taken] == [0, 0, 1, 1], "nothing gets better at a learning rate of 0"
    steps = prefzoo.steps(algorithm, callback=lambda *_: True, **settings)
    with steps.stopping, steps:
        assert [(s.stage, s.number) for s in steps] == [(0, 1)]


# ------------------------------------------------------------------------------------------------ rules


def test_rules_are_added_to_what_the_other_reward_says(world):
    words = world.words
    rules = Rules({"second": {"pattern": "[AB]", "weight": 2.0}, "first": {"pattern": "^a", "violation": True}})
    source = resolve_reward([world.reward, rules], words)
    feedback = RuleRewards(0.5, weight=3.0)
    feedback.check(source)
    texts = ["aA", "b", "cB"]
    samples = replace(
        samples_of([words(t)["input_ids"] for t in texts], 3), extra={"prompt": [PROMPTS[0]]},
        columns={"finish": torch.tensor([0, 1, 0])},
    )  # fmt: skip
    helpful = world.reward([PROMPTS[0]] * 3, texts)
    said_B = feedback(samples, SimpleNamespace(objectives=source.objectives))
    expected = [helpful[0] + 3 * (2 - 1), helpful[1] - 0.5, helpful[2] + 3 * 2]
    torch.testing.assert_close(said_B, torch.tensor(expected))
    mute = SimpleNamespace(objectives=lambda samples: torch.tensor([[NAN, 1.0], [1.0, NAN], [1.0, 1.0]]))
    assert feedback(samples, mute).isnan().tolist() == [True, True, False]


def test_rule_based_rewards_change_what_is_learned(world):
    """The policy ends where the sum of both is regularised to the start: far from the optimum of the reward alone."""
    rules = Rules({"second": {"pattern": "[AB]$", "violation": True}})
    algorithm = sized(create_algorithm("rbr", rl="rloo(kl=0.5)", rule_weight=0.75))
    run = fit(world, algorithm, reward=[world.reward, rules], max_steps=60).run
    broken_R = torch.tensor([float(r[-1] in "AB") for r in RESPONSES])
    optimum_PR = (world.log_probs() + (world.rewards_PR - 0.75 * broken_R) / 0.5).log_softmax(-1)
    assert total_variation(optimum_PR, world.optimum(0.5)) > 0.2
    assert total_variation(world.log_probs(run.policy), optimum_PR) < 0.06


# ------------------------------------------------------------------------------------------------ reward and cost


def test_the_multiplier_climbs_while_the_cost_is_over_its_budget():
    """Its step is that of gradient ascent on λ (C - budget) in ln λ."""
    made = Multiplier(0.7, budget=0.5, rate=0.2, largest=None)
    log_value = torch.tensor(math.log(0.7), dtype=torch.float64, requires_grad=True)
    (log_value.exp() * (2.0 - 0.5)).backward()
    made.update(2.0, 8)
    assert made.value == pytest.approx(math.exp(float(log_value.detach() + 0.2 * log_value.grad)))
    for cost, direction in ((0.6, 1), (0.4, -1)):
        before = made.value
        made.update(cost, 8)
        assert (made.value - before) * direction > 0
    before = made.value
    made.update(0.5, 8)
    assert made.value == before, "on its budget it rests"
    made.update(100.0, 0)
    assert made.value == before, "nobody has said a cost"
    twin = Multiplier()
    twin.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert twin.value == made.value
    bounded = Multiplier(1.0, largest=3.0)
    bounded.update(1e9, 8)
    assert bounded.value == 3.0
    for wrong in ({"init": 0.0}, {"rate": -1.0}, {"init": 2.0, "largest": 1.0}):
        with pytest.raises(UsageError, match="Multiplier"):
            Multiplier(**wrong)


def scored_tokens(seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    texts = [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    names = ("old_logps", "ref_logps", "values", "values:cost")
    return samples_of(texts, **{name: torch.randn(9, generator=generator) for name in names})


def credit(value: float, kl: float = 0.0, **options: Any) -> Lagrangian:
    penalty = FixedKL(kl)
    return Lagrangian(
        Multiplier(value), GAE(kl=penalty, whiten=False), GAE(kl=penalty, whiten=False, critic="cost"), **options
    )


SCORES = torch.tensor([[1.0, 0.5], [2.0, -1.0], [-1.0, 2.0], [0.0, 0.0]])


@pytest.mark.parametrize("value", [1e-6, 0.5, 4.0])
def test_the_advantage_weighs_reward_and_cost_by_the_multiplier(value):
    samples = scored_tokens()
    made = credit(value)(samples, SCORES)
    mask_BT = samples.mask_BT()

    def alone(scores_B, values):
        rewards_BT = torch.zeros(mask_BT.shape)
        rewards_BT[torch.arange(4), mask_BT.sum(-1) - 1] = scores_B
        return advantages.gae(rewards_BT, samples.padded(values), mask_BT, gamma=1.0, lam=0.95)

    gain_BT, returns_BT = alone(SCORES[:, 0], samples.tokens["values"])
    cost_BT, costs_BT = alone(SCORES[:, 1], -samples.tokens["values:cost"])  # the critic knows the cost's negative
    torch.testing.assert_close(made.tokens["advantages"], ((gain_BT - value * cost_BT) / (1 + value))[mask_BT])
    torch.testing.assert_close(made.tokens["returns"], returns_BT[mask_BT])
    torch.testing.assert_close(made.tokens["returns:cost"], -costs_BT[mask_BT])


def test_the_kl_weighs_the_same_whatever_the_multiplier_is():
    samples = scored_tokens()
    apart = [
        credit(value, 0.3)(samples, SCORES).tokens["advantages"] - credit(value)(samples, SCORES).tokens["advantages"]
        for value in (0.1, 5.0)
    ]
    torch.testing.assert_close(*apart)
    assert float(apart[0].abs().max()) > 0.1


def test_a_completion_that_lacks_reward_or_cost_gives_no_signal():
    scores_BK = SCORES.clone()
    scores_BK[0, 1], scores_BK[2, 0] = NAN, NAN
    made = credit(1.0)(scored_tokens(), scores_BK)
    assert made.tokens["trainable"].tolist() == [False] * 3 + [True] + [False] * 2 + [True] * 3
    whitened = credit(1.0, whiten=True)(scored_tokens(), scores_BK)
    known = whitened.tokens["advantages"][whitened.tokens["trainable"]]
    assert abs(float(known.mean())) < 1e-5 and abs(float(known.std()) - 1) < 0.2
    with pytest.raises(UsageError, match="give Objectives"):
        credit(1.0)(scored_tokens(), SCORES[:, 0])
    with pytest.raises(UsageError, match="a critic each"):
        Lagrangian(Multiplier(), GAE(), GAE())


def test_safe_rlhf_keeps_the_budget_that_ppo_breaks(world):
    """The three responses of the highest rewards are unsafe; the best of the others is worth 1/4."""
    unsafe_PR = (world.rewards_PR >= 0.5).double()

    def cost(prompts, completions, **_):
        return [
            float(unsafe_PR[PROMPTS.index(p), PLACE[c]]) if c in PLACE else 0.0
            for p, c in zip(prompts, completions, strict=True)
        ]

    free = {"kl": 0.02, "inner_epochs": 1}
    safe = {**free, "budget": 0.1, "multiplier_rate": 0.5}
    paid, earned = {}, {}
    for name, options, given in (("safe_rlhf", safe, [world.reward, cost]), ("ppo", free, world.reward)):
        algorithm = sized(create_algorithm(name, **options), samples=64)
        policy = fit(world, algorithm, reward=given, max_steps=40).run.policy
        paid[name] = float((world.log_probs(policy).exp() * unsafe_PR).sum(-1).mean())
        earned[name] = world.expected_reward(world.log_probs(policy))
    start = float((world.log_probs().exp() * unsafe_PR).sum(-1).mean())
    assert paid["safe_rlhf"] <= 0.1 < start, "the start is over the budget"
    assert paid["ppo"] > max(0.7, start), "and PPO alone goes farther from it"
    assert earned["safe_rlhf"] > 0.15, "and most of the reward that is safe is had"


@pytest.mark.long
def test_the_multiplier_is_kept_with_a_run(staged, tmp_path):
    algorithm = create_algorithm("safe_rlhf", multiplier_rate=0.05, budget=-0.5, **EACH)
    settings = {**staged.settings, "reward": [rated, rated], "max_steps": 3}
    prefzoo.train(algorithm, output_dir=tmp_path / "whole", **settings)
    run = prefzoo.steps(algorithm, output_dir=tmp_path / "cut", **settings)
    next(run)
    run.close()
    prefzoo.train(algorithm, output_dir=tmp_path / "cut", resume=True, **settings)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
    values = [row["multiplier_coefficient"] for row in bits(tmp_path / "whole")[:3]]
    assert values == sorted(set(values)), "dearer with every step over the budget"
