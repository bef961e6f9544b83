"""Coming from TRL: ``trl:`` names, the translation of every field, YAML files, and the page about them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import prefzoo
from prefzoo.algorithm import ALGORITHMS, Term, create_algorithm, list_algorithms
from prefzoo.losses import LOSSES
from prefzoo.parts.count import Count
from prefzoo.parts.credit import GroupRelative, LeaveOneOut
from prefzoo.parts.prelude import EntropyFloor
from prefzoo.parts.reference import Moving
from prefzoo.parts.source import Rollouts
from prefzoo.registry import UsageError
from prefzoo.spellings.trl import ABSENT, generation_schedule, read_trl_config, translate
from prefzoo.spellings.trl.fields import FIELDS, NO_LIMIT, OLDER, TABLES, TRAINERS, trainer_of
from prefzoo.spellings.trl.names import LOSS_TYPES, READ_BY, SPELLINGS
from prefzoo.training.config import TrainConfig

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "from-trl.md").read_text()
CLASSES: dict[str, dict[str, Any]] = json.loads((HERE / "golden" / "trl_fields.json").read_text())
SHARED = ("TrainingArguments", "_BaseConfig", "ModelConfig", "ScriptArguments", "DatasetMixtureConfig")
CONFIGS = {name: trainer.replace("Trainer", "Config") for name, trainer in TRAINERS.items()}
NAMES = sorted(f"trl:{name}" for name in [*TRAINERS, *SPELLINGS])
SAMPLED = ("grpo", "gmpo", "rloo")
LAUNCHER = {"env", "accelerate_config", "num_processes"}  # keys of a file that no class has


def defaults(trainer: str) -> dict[str, Any]:
    """Every field that ``trl TRAINER --config FILE`` takes, with TRL's default."""
    more = ("GRPOScriptArguments",) if trainer in SAMPLED else ()  # RLOO's script has the same
    more = (*more, "GRPOConfig") if trainer == "gmpo" else more
    return {k: v for name in (*SHARED, *more, CONFIGS[trainer]) for k, v in CLASSES[name].items()}


def pairs(count: int = 12) -> list[dict[str, str]]:
    return [{"prompt": f"{i} + 1?", "chosen": f" It is {i + 1}.", "rejected": f" {i}"} for i in range(count)]


# ------------------------------------------------------------------------------------------------ names


def test_names_with_a_prefix_are_listed_only_when_asked_for() -> None:
    assert list_algorithms("trl:*") == NAMES == ALGORITHMS.names("trl:*")
    assert not any(":" in name for name in [*list_algorithms(), *ALGORITHMS.names(), *list_algorithms("*po")])
    assert list_algorithms("*:?po") == ["trl:cpo", "trl:dpo", "trl:ipo"] and len(NAMES) == len(set(NAMES)) == 34


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_complete(name: str) -> None:
    algorithm = create_algorithm(name)
    entry = ALGORITHMS.entry(name)
    assert algorithm.name == name and entry.line.startswith("TRL's ") and entry.paper
    assert "Departures:" in (entry.function.__doc__ or "") and name in (entry.function.__doc__ or "")
    for option in algorithm.options:
        assert option in (entry.function.__doc__ or ""), "the card says what every option is"
        assert option in defaults(trainer_of(name))
    TrainConfig.of(algorithm.recommended)


@pytest.mark.parametrize("short", TRAINERS)
def test_trainers_have_aliases(short: str) -> None:
    alias = f"trl:{TRAINERS[short]}"
    assert create_algorithm(alias).name == f"trl:{short}" == f"trl:{trainer_of(alias)}"
    assert trainer_of(CONFIGS[short]) == short
    assert f"| `{TRAINERS[short]}` | `trl:{short}` |" in PAGE


def test_names_of_losses() -> None:
    for alias, name in {"sigmoid": "trl:dpo", "dapo": "trl:grpo", "nll": "trl:sft", "kto": "trl:kto"}.items():
        assert create_algorithm(f"trl:{alias}").name == name


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_loss_of_trls_is_its_trainer_with_that_loss(name: str) -> None:
    """The entry is the trainer's with some options fixed; it has those of the others that its loss reads."""
    made, entry = SPELLINGS[name], ALGORITHMS.entry(f"trl:{name}")
    chosen = create_algorithm(f"trl:{made.trainer}", **made.fixed, **made.defaults)
    mine = create_algorithm(f"trl:{name}")
    assert repr(mine).partition("): ")[2] == repr(chosen).partition("): ")[2]
    assert told(mine.stages[0].terms[0]) == told(chosen.stages[0].terms[0])
    assert (
        mine.stages[0].terms[0].loss.name == made.loss == entry.function.__doc__.partition("loss ``")[2].split("`")[0]
    )
    whole = ALGORITHMS.entry(f"trl:{made.trainer}").own_options
    assert set(entry.own_options) == set(whole) - made.hidden and made.hidden <= set(whole)
    assert made.why.split()[0] in entry.function.__doc__
    for option in set(READ_BY.get(made.trainer, {})) & set(entry.own_options):  # all that it has, it reads
        changed = create_algorithm(f"trl:{name}", **{option: OTHER[option]}, **NEEDED.get(option, {}))
        without = create_algorithm(f"trl:{name}", **NEEDED.get(option, {}))
        assert [told(t) for t in changed.stages[0].terms] != [told(t) for t in without.stages[0].terms], option


OTHER: dict[str, Any] = {
    "beta": 0.3, "label_smoothing": 0.2, "f_divergence_type": "js_divergence", "f_alpha_divergence_coef": 0.7,
    "ld_alpha": 0.5, "use_weighting": True, "discopop_tau": 0.1, "cpo_alpha": 0.4, "simpo_gamma": 0.9, "alpha": 0.1,
    "epsilon": 0.1, "epsilon_high": 3.0, "delta": 8.0, "importance_sampling_level": "sequence",
    "sapo_temperature_neg": 2.0, "sapo_temperature_pos": 2.0, "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0,
}  # fmt: skip
NEEDED = {"f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"}}


def test_every_loss_type_of_trls_has_an_entry() -> None:
    theirs = {name for names in LOSS_TYPES.values() for name in names}
    unlike = {"sft", "grpo", "dapo", "kto", "nll", "sigmoid"}  # of a trainer, or an alias of its entry
    assert theirs - unlike == set(SPELLINGS) - {"gspo"}
    for trainer, names in LOSS_TYPES.items():
        for name, ours in names.items():
            row = f"| `{name}` | `{ours}` |"
            assert ours in LOSSES and row in PAGE, (trainer, row)
    for name, made in SPELLINGS.items():
        assert made.why.replace("``", "`") in PAGE, name


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_here_yet_is_refused_with_the_nearest_that_is(name: str) -> None:
    why, near = ABSENT[name]
    with pytest.raises(UsageError, match="is not in the zoo yet: ") as caught:
        create_algorithm(f"trl:{name}")
    assert f"trl:{name}" in str(caught.value) and f"{why}; nearest is {near!r}" in str(caught.value)
    create_algorithm(near)
    assert f"trl:{name}" not in ALGORITHMS


def test_what_is_left_out() -> None:
    """Of TRL 1.16's trainers and those it has dropped, without the spellings of their classes."""
    assert {name for name in ABSENT if not name.endswith("Trainer")} == {
        "tpo", "online_dpo", "xpo", "nash_md", "gkd", "gold", "distillation", "server_distillation",
        "async_distillation", "sdft", "sdpo", "iw_opd", "prm", "ppo", "a2po", "async_grpo",
    }  # fmt: skip
    assert all(f"`{name}`" in PAGE for name in ABSENT if not name.endswith("Trainer"))


def test_an_unknown_name_suggests_one_of_its_own_prefix() -> None:
    with pytest.raises(UsageError, match=r"no algorithm 'trl:dpoo'; did you mean 'trl:dpo'\?"):
        create_algorithm("trl:dpoo")
    with pytest.raises(UsageError, match=r"did you mean 'trl:DPOTrainer'\?"):
        create_algorithm("trl:DPOTrainr")
    with pytest.raises(UsageError) as caught:
        create_algorithm("dpoo")
    assert "trl:" not in str(caught.value)
    with pytest.raises(UsageError, match="is 'trl:sft': how the loss is cut into pieces"):
        create_algorithm("trl:chunked_nll")


# ------------------------------------------------------------------------------------------------ mathematics


@pytest.mark.parametrize(
    ("name", "options", "ours", "theirs"),
    [
        ("trl:dpo", {}, "dpo", {}),
        ("trl:dpo", {"beta": 0.5, "loss_type": ["sigmoid"]}, "dpo", {"beta": 0.5}),
        ("trl:dpo", {"loss_type": "ipo", "beta": 0.2}, "ipo", {"beta": 0.2}),
        ("trl:ipo", {}, "ipo", {}),
        ("trl:kto", {"undesirable_weight": 1.33}, "kto", {"undesirable_weight": 1.33}),
        ("trl:sft", {}, "sft", {}),
        ("trl:reward", {"center_rewards_coefficient": 0.01}, "reward_model", {"centering": 0.01}),
        ("trl:hinge", {"beta": 0.2, "ld_alpha": 0.5, "use_weighting": True}, "hinge",
         {"beta": 0.2, "ld_alpha": 0.5, "wpo": True}),
        ("trl:dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}, "dpo",
         {"divergence": "alpha", "divergence_alpha": 0.3, "alpha_convention": "trl"}),
        ("trl:dpo", {"loss_type": "aot", "label_smoothing": 0.1, "ld_alpha": 1}, "aot", {"label_smoothing": 0.1}),
        ("trl:robust", {"label_smoothing": 0.2}, "robust_dpo", {"label_smoothing": 0.2}),
        ("trl:exo_pair", {}, "exo_pair", {}),
        ("trl:discopop", {"discopop_tau": 0.1}, "discopop", {"tau": 0.1}),
        ("trl:dpo", {"loss_type": "sft"}, "chosen_nll", {}),
        ("trl:simpo", {"simpo_gamma": 1.0, "label_smoothing": 0.1}, "simpo",
         {"beta": 0.1, "gamma": 1.0, "label_smoothing": 0.1}),
        ("trl:cpo", {"cpo_alpha": 0.0, "label_smoothing": 0.1}, "cpo", {"nll": 0.0, "label_smoothing": 0.1}),
        ("trl:cpo", {"loss_type": "simpo", "alpha": 0.5, "cpo_alpha": 0.0}, "alphapo", {"beta": 0.1, "alpha": 0.5}),
        ("trl:kto", {"loss_type": "apo_zero_unpaired", "beta": 0.3}, "apo_zero_unpaired", {"beta": 0.3}),
        ("trl:bco", {"beta": 0.3}, "bco", {"beta": 0.3, "running": False, "balanced": False}),
        ("trl:sft", {"loss_type": "dft"}, "dft", {}),
        ("trl:rloo", {"num_generations": 4, "per_device_train_batch_size": 128, "max_completion_length": 256}, "rloo",
         {}),
        ("trl:grpo", {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False, "max_completion_length": 256,
                      "num_generations": 4, "per_device_train_batch_size": 128}, "grpo", {"group_size": 4}),
        ("trl:grpo", {"mask_truncated_completions": True, "scale_rewards": False, "per_device_train_batch_size": 256,
                      "max_completion_length": 256},
         "grpo", {"kl": 0.0, "count": "token", "std": False, "mask_truncated": True}),
    ],
)  # fmt: skip
def test_an_entry_is_the_composition_of_ours(
    name: str, options: dict[str, Any], ours: str, theirs: dict[str, Any]
) -> None:
    (mine,), (other,) = create_algorithm(name, **options).stages, create_algorithm(ours, **theirs).stages
    assert [told(t) for t in mine.terms] == [told(t) for t in other.terms]
    for part in ("source", "feedback", "keep", "credit", "prelude", "schedule", "reference", "pooling"):
        assert getattr(mine, part) == getattr(other, part), part


def told(term: Term) -> tuple[Any, ...]:
    loss = term.loss
    return loss.name, {**loss.entry.options, **loss.options}, term.counted, term.weight, term.trains, term.rows


def end_to_end() -> ModuleType:
    """The golden file's own tests, to run them with TRL's names in place of ours."""
    spec = importlib.util.spec_from_file_location("golden_of_trl", HERE / "test_end_to_end_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOLDEN = end_to_end()
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo-sigmoid-beta0.1": ("trl:dpo", {"beta": 0.1}),
    "dpo-sigmoid-beta0.5": ("trl:sigmoid", {"beta": 0.5}),
    "dpo-ipo-beta0.1": ("trl:dpo", {"loss_type": "ipo", "beta": 0.1}),
    "dpo-hinge-beta0.1": ("trl:dpo", {"loss_type": "hinge"}),
    "dpo-apo_zero-beta0.2": ("trl:apo_zero", {"beta": 0.2}),
    "dpo-mpo-beta0.1": ("trl:dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    "dpo-truncation-18": ("trl:DPOTrainer", {"max_length": 18}),
    "cpo-beta0.1-alpha1.0": ("trl:CPOTrainer", {}),
    "simpo-beta2.0-alpha0.0": ("trl:simpo", {"beta": 2.0}),
    "simpo-beta2.5-alpha0.3": (
        "trl:cpo", {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.4, "cpo_alpha": 0.3}
    ),
    "orpo-beta0.1": ("trl:orpo", {}),
    "orpo-beta1.0": ("trl:ORPOTrainer", {"beta": 1.0}),
    "apo_zero_unpaired-beta0.1-w1.0-1.0": ("trl:apo_zero_unpaired", {}),
    "kto-beta0.1-w1.0-1.0": ("trl:kto", {}),
    "kto-beta0.5-w1.0-1.33": ("trl:kto", {"beta": 0.5, "undesirable_weight": 1.33}),
}  # fmt: skip
SAMPLES: dict[str, dict[str, Any]] = {
    "grpo-dapo": {},
    "grpo-grpo-beta=0.04-use_bias_correction_kl=False": {
        "loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False
    },
    "grpo-grpo-beta=0.04-use_bias_correction_kl=True": {"loss_type": "grpo", "beta": 0.04},
    "grpo-dr_grpo-scale_rewards=none": {
        "loss_type": "dr_grpo", "scale_rewards": "none", "max_completion_length": 32
    },
    "grpo-grpo-epsilon=0.2-num_iterations=2": {"loss_type": "grpo", "epsilon": 0.2},
    "grpo-dapo-mask_truncated_completions=True": {"mask_truncated_completions": True},
    "grpo-grpo-mask_truncated_completions=True": {"loss_type": "grpo", "mask_truncated_completions": True},
    "grpo-grpo-importance_sampling_level=sequence-epsilon=0.003-epsilon_high=0.004-num_iterations=2": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.003, "epsilon_high": 0.004
    },
    "grpo-cispo-epsilon_high=5.0-num_iterations=2": {"loss_type": "cispo", "epsilon_high": 5.0},
    "rloo-beta=0.0": {"beta": 0.0},
    "rloo-beta=0.05": {},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_two_steps_are_those_of_trl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(TRAINED) == set(GOLDEN.TRAINED)
    monkeypatch.setitem(GOLDEN.TRAINED, name, TRAINED[name])
    GOLDEN.test_training(name, 8192)


@pytest.mark.parametrize("name", SAMPLES)
def test_two_steps_on_samples_are_those_of_trl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(SAMPLES) == set(GOLDEN.SAMPLED)
    algorithm = f"trl:{name.partition('-')[0]}"
    monkeypatch.setitem(
        GOLDEN.SAMPLED, name, (lambda: create_algorithm(algorithm, **SAMPLES[name]), GOLDEN.SAMPLED[name][1])
    )
    GOLDEN.test_policy_gradient(name, GOLDEN.load_tokenizer(GOLDEN.POLICY))


def test_two_losses_at_once_are_their_weighted_sum() -> None:
    (stage,) = create_algorithm("trl:dpo", loss_type=["sigmoid", "ipo"], loss_weights=[0.8, 0.2]).stages
    assert [(t.loss.name, t.weight) for t in stage.terms] == [("dpo", 0.8), ("ipo", 0.2)]


def test_terms_beside_the_loss() -> None:
    """What TRL adds to a loss with a mean of its own is a term of its own."""
    (stage,) = create_algorithm("trl:cpo", loss_type="hinge", cpo_alpha=0.3).stages
    assert [told(t)[0::2][:2] for t in stage.terms] == [("cpo_hinge", Count("row")), ("chosen_nll", Count("token"))]
    assert stage.terms[0].loss.options["nll"] == 0 and [t.weight for t in stage.terms] == [1.0, 0.3]
    (stage,) = create_algorithm("trl:orpo", beta=0.3).stages
    assert [t.loss.name for t in stage.terms] == ["orpo", "prompt_chosen_nll"]
    assert stage.terms[0].loss.options == {"beta": 0.3, "nll": 0.0}
    (stage,) = create_algorithm("trl:grpo", loss_type="grpo", entropy_coef=0.01, beta=0.1).stages
    assert [(t.loss.name, t.counted.unit, t.weight) for t in stage.terms] == [
        ("clipped_surrogate", "row", 1.0), ("kl_penalty", "row", 0.1), ("entropy_bonus", "token", 0.01)
    ]  # fmt: skip
    (stage,) = create_algorithm("trl:gspo", beta=0.1).stages
    assert stage.terms[1].loss.options == {"estimator": "k3", "importance": True, "level": "sequence"}
    (stage,) = create_algorithm("trl:gmpo", beta=0.1).stages
    assert [t.counted.unit for t in stage.terms] == ["row", "row"]
    assert stage.terms[1].loss.options == {"estimator": "k3"}


def test_what_changes_the_samples_or_their_credit() -> None:
    (stage,) = create_algorithm("trl:luspo", top_entropy_quantile=0.2, off_policy_mask_threshold=0.5).stages
    assert stage.prelude == EntropyFloor(0.2)
    assert {m.name for m, _ in stage.terms[0].loss.modifiers} == {"high_entropy", "off_policy_mask"}
    (stage,) = create_algorithm("trl:vespo", scale_rewards="batch").stages
    assert stage.credit == GroupRelative("batch")
    (stage,) = create_algorithm(
        "trl:rloo", normalize_advantages=True, reward_clip_range=[-1, 1], sync_ref_model=True
    ).stages
    assert stage.credit == LeaveOneOut(0.05, True, (-1, 1)) and stage.reference == Moving(0.6, 512)
    assert create_algorithm("trl:rloo", beta=0.0).needs == {"policy", "reward"}
    assert create_algorithm("trl:cispo", epsilon_high=3.0).stages[0].terms[0].loss.options == {"clip_high": 2.0}


@pytest.mark.parametrize("name", ["trl:dpo", "trl:ipo", "trl:kto", "trl:apo_down", "trl:rloo"])
def test_a_reference_that_follows(name: str) -> None:
    (stage,) = create_algorithm(name, sync_ref_model=True, ref_model_sync_steps=64).stages
    assert stage.reference == Moving(0.6, 64)


@pytest.mark.parametrize(("group", "micro", "accumulation"), [*itertools.product((2, 4, 8), (2, 4, 8), (1, 2, 4))])
def test_the_schedule_counts_as_trl_does(group: int, micro: int, accumulation: int) -> None:
    """prompts x group is what is sampled at once; what is sampled makes whole optimizer steps."""
    for per_generation, iterations in itertools.product((None, 1, 2, 4, 8), (1, 3)):
        sampled, update = micro * (per_generation or accumulation), micro * accumulation
        fits = sampled % group == 0 and (sampled % update == 0 or (iterations == 1 and update % sampled == 0))
        if not fits:
            with pytest.raises(UsageError, match="trl:grpo: "):
                generation_schedule(group, micro, accumulation, per_generation, None, iterations)
            continue
        schedule = generation_schedule(group, micro, accumulation, per_generation, None, iterations)
        assert schedule == generation_schedule(group, micro, accumulation, None, sampled, iterations)
        assert schedule.prompts * group == schedule.minibatches * update == max(sampled, update)
        assert schedule.inner_epochs == iterations


# ------------------------------------------------------------------------------------------------ fields


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_field_is_forgotten(trainer: str) -> None:
    assert set(defaults(trainer)) <= set(FIELDS[trainer])
    more = set(FIELDS[trainer]) - set(defaults(trainer)) - set(OLDER) - LAUNCHER
    assert more <= {
        "pad_token",
        "pad_to_multiple_of",
        "dataset_num_proc",
        "activation_offloading",
        "trust_remote_code",
    }, "of other trainers, and harmless"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trls_defaults_are_the_entrys(trainer: str) -> None:
    """All of TRL's defaults, written out, change nothing; what stays different is listed here."""
    found = translate(trainer, defaults(trainer))
    refused = {field for field, _, _ in found.refused}
    assert not refused, found.lines()
    algorithm = create_algorithm(f"trl:{trainer}")
    plain = {**found.options, "loss_type": "sigmoid"} if trainer == "dpo" else found.options
    assert plain == algorithm.options
    config = TrainConfig.of(algorithm.recommended)
    different = {k for k, v in found.settings.items() if getattr(config, k) != v}
    assert different - {"gradient_checkpointing", "seed", "save_steps"} == (
        {"shuffle"} if trainer == "kto" else {"log_completions"} if trainer in SAMPLED else set()
    )
    assert not found.arguments
    handled = {f for f, *_ in (*found.mapped, *found.ignored, *found.refused)}
    assert handled == set(defaults(trainer))


def test_the_order_of_the_fields_does_not_matter() -> None:
    fields = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "use_peft": True, "lora_r": 8,
        "use_dora": True, "adam_beta1": 0.8, "eval_strategy": "steps", "eval_steps": 5, "dataset_name": "d",
        "dataset_config": "c", "dataset_test_split": "valid", "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-7}, "learning_rate": 1e-6, "max_steps": 7, "bf16": True,
    }  # fmt: skip
    there, back = translate("dpo", fields), translate("dpo", dict(reversed(fields.items())))
    assert not there.refused and there.options == back.options
    assert there.settings == back.settings and there.arguments == back.arguments
    assert there.settings == {
        "rows_per_step": 8, "lora": "dora", "lora_rank": 8, "betas": (0.8, 0.999), "eval_steps": 5,
        "schedule": "cosine", "final_learning_rate": pytest.approx(0.1), "learning_rate": 1e-6, "max_steps": 7,
        "precision": "bfloat16",
    }  # fmt: skip
    assert there.arguments == {
        "dataset": {"path": "d", "name": "c"}, "eval_dataset": {"path": "d", "name": "c", "split": "valid"}
    }  # fmt: skip


BECOMES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rows of a step": ("dpo", {"gradient_accumulation_steps": 4}, {"rows_per_step": 32}),
    "epochs": ("sft", {"num_train_epochs": 2}, {"epochs": 2.0}),
    "no clipping": ("sft", {"max_grad_norm": 0}, {"max_grad_norm": None}),
    "no limit": ("sft", {"max_length": None}, {"max_length": NO_LIMIT}),
    "numbers as text": ("dpo", {"learning_rate": "5e-7", "max_steps": "20"}, {"learning_rate": 5e-7, "max_steps": 20}),
    "a share of warm-up": ("dpo", {"warmup_ratio": 0.1, "warmup_steps": 0}, {"warmup_steps": 0.1}),
    "constant": ("dpo", {"lr_scheduler_type": "constant"}, {"schedule": "constant"}),
    "sgd": ("dpo", {"optim": "sgd", "adam_beta2": 0.9}, {"optimizer": "sgd"}),
    "one tracker": ("dpo", {"report_to": "wandb"}, {"report_to": ("wandb",)}),
    "no tracker": ("dpo", {"report_to": "none"}, {"report_to": ()}),
    "the best": ("dpo", {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
                         "greater_is_better": False}, {"best_metric": "eval/loss", "best_mode": "min"}),
    "file order": ("kto", {"train_sampling_strategy": "sequential"}, {"shuffle": False}),
    "assistant turns": ("sft", {"assistant_only_loss": True}, {"loss_on": "assistant"}),
    "everything": ("sft", {"completion_only_loss": False}, {"loss_on": "all"}),
    "another column": ("sft", {"dataset_text_field": "content"}, {"columns": {"text": "content"}}),
    "model arguments": ("dpo", {"model_init_kwargs": '{"dtype": "bfloat16", "attn_implementation": "sdpa"}'},
                        {"dtype": "bfloat16"}),
    "rslora": ("dpo", {"use_peft": True, "use_rslora": True, "lora_target_modules": ["q_proj"]},
               {"lora": "rslora", "lora_targets": ("q_proj",)}),
    "qlora": ("dpo", {"use_peft": True, "load_in_4bit": True}, {"lora": True, "load_in_4bit": True}),
    "a mixture held out": ("dpo", {"datasets": [{"path": "d"}], "test_split_size": 0.1}, {"eval_split": 0.1}),
    "rollout steps": ("grpo", {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 40, "logging_steps": 8},
                      {"max_steps": 10, "logging_steps": 2}),
    "fp32 head": ("grpo", {"cast_lm_head_to_fp32": True, "bf16": True}, {"fp32_head": True, "precision": "bfloat16"}),
    "samples shown": ("grpo", {"log_completions": True, "num_completions_to_print": 5}, {"log_completions": 5}),
}  # fmt: skip


@pytest.mark.parametrize("what", BECOMES)
def test_a_field_becomes_a_training_option(what: str) -> None:
    trainer, fields, settings = BECOMES[what]
    found = translate(trainer, fields)
    assert not found.refused and found.settings == settings
    TrainConfig.of(found.settings)


GIVEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a path": ({"dataset_name": "d"}, {"dataset": "d"}),
    "a split": ({"dataset_name": "d", "dataset_train_split": "s"}, {"dataset": {"path": "d", "split": "s"}}),
    "a file": ({"datasets": [{"path": "json", "data_files": "x.jsonl"}]}, {"dataset": "x.jsonl"}),
    "a mixture": (
        {
            "datasets": [{"path": "a", "fraction": 0.3}, {"path": "b", "name": "n", "fraction": 0.7}],
            "dataset_name": "c",
        },
        {"dataset": [{"path": "a", "weight": 0.3}, {"path": "b", "name": "n", "weight": 0.7}]},
    ),
    "a model": ({"model_name_or_path": "m"}, {"model": "m"}),
    "the hub": ({"push_to_hub": True, "hub_model_id": "me/m"}, {"push_to_hub": "me/m"}),
    "my reward": ({"reward_funcs": ["lib.rewards.short"]}, {"reward": "lib/rewards.py:short"}),
    "rewards": (
        {"reward_model_name_or_path": "rm", "reward_funcs": ["think_format_reward"], "reward_weights": [1, 2]},
        {"reward": ["rm", "think_format_reward"], "reward_weights": [1, 2]},
    ),
}


@pytest.mark.parametrize("what", GIVEN)
def test_a_field_becomes_an_argument(what: str) -> None:
    fields, arguments = GIVEN[what]
    found = translate("grpo", fields)
    assert not found.refused and found.arguments == arguments


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "unknown field": ("dpo", {"bta": 0.1}, "DPOTrainer has no such field", "did you mean 'beta'"),
    "of another trainer": ("dpo", {"num_generations": 4}, "a field of GRPOTrainer, GMPOTrainer, RLOOTrainer, not",
                           "leave it out"),
    "an unknown loss": ("dpo", {"loss_type": "sigmod"}, "'sigmod' is unknown", "did you mean 'sigmoid'"),
    "a loss twice": ("dpo", {"loss_type": ["ipo", "ipo"]}, "list of different names", "['ipo', 'ipo']"),
    "a loss of another name": ("trl:hinge", {"loss_type": "ipo"}, "trl:hinge is loss_type 'hinge'", "take trl:dpo"),
    "an option of another name": ("trl:hinge", {"discopop_tau": 0.1}, "no part of trl:hinge reads it", "leave it out"),
    "weights": ("dpo", {"loss_weights": [1, 2]}, "one of loss_weights each", "[1, 2]"),
    "smoothing": ("dpo", {"label_smoothing": 0.1}, "label_smoothing=0.1 has no effect on sigmoid, it belongs to",
                  "'cdpo'"),
    "no smoothing": ("dpo", {"loss_type": "exo_pair"}, "'exo_pair' needs label_smoothing above 0", "1e-3"),
    "half of the labels": ("trl:robust", {"label_smoothing": 0.5}, "'robust' needs label_smoothing below 0.5", "0.5"),
    "tau of another loss": ("dpo", {"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect", "belongs to discopop"),
    "alpha of no divergence": ("dpo", {"f_alpha_divergence_coef": 0.1}, "no effect without", "alpha_divergence"),
    "an unknown divergence": ("dpo", {"f_divergence_type": "js"}, "f_divergence_type", "js_divergence"),
    "an anchor and a divergence": ("dpo", {"loss_type": ["sigmoid", "apo_zero"], "f_divergence_type": "js_divergence"},
                                   "'apo_zero' does not take 'divergence'", "through a difference"),
    "sorted pairs weighted": ("dpo", {"loss_type": "aot", "use_weighting": True}, "'aot' does not take 'wpo'",
                              "couples the pairs"),
    "tokens weighted as pairs": ("dpo", {"loss_type": ["sigmoid", "sft"], "use_weighting": True},
                                 "'chosen_nll' does not take 'wpo'", "one value per token"),
    "one side of two": ("dpo", {"loss_type": "sft", "f_divergence_type": "forward_kl"}, "sft reads the chosen one",
                        "leave it out"),
    "beta of a likelihood": ("dpo", {"loss_type": "sft", "beta": 0.5}, "beta=0.5 has no effect on sft", "leave it out"),
    "rpo_alpha": ("dpo", {"rpo_alpha": 1.0}, "it is loss_type [sigmoid, sft]", "only null"),
    "a smoothed hinge": ("cpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "has no effect on hinge",
                         "sigmoid, simpo"),
    "a bent hinge": ("cpo", {"loss_type": "hinge", "alpha": 0.1}, "alpha=0.1 has no effect on hinge", "simpo, alphapo"),
    "a likelihood of alphapo": ("cpo", {"loss_type": "alphapo", "cpo_alpha": 0.5}, "has no effect on alphapo",
                                "in TRL too"),
    "an encoder": ("orpo", {"is_encoder_decoder": True}, "encoder and a decoder are not here", "only null or false"),
    "a follower that does not": ("dpo", {"ref_model_sync_steps": 5}, "no effect without sync_ref_model", "trl:dpo"),
    "one row of KTO": ("kto", {"per_device_train_batch_size": 1}, "at least 2", "per_device_train_batch_size = 1"),
    "packing": ("sft", {"packing": True}, "whole examples", "only false"),
    "chunks": ("sft", {"loss_type": "chunked_nll"}, "'chunked_nll' is unknown", "nll, dft"),
    "dropout": ("reward", {"disable_dropout": False}, "no dropout", "only true"),
    "fp16": ("sft", {"fp16": True}, "use bf16", "only false"),
    "optimizer": ("sft", {"optim": "adamw_8bit"}, "adamw_torch", "optim = 'adamw_8bit'"),
    "schedule": ("sft", {"lr_scheduler_type": "cosin"}, "there are linear", "did you mean 'cosine'"),
    "epoch-wise": ("sft", {"eval_strategy": "epoch"}, "every eval_steps steps", "eval_strategy: steps"),
    "tracker": ("sft", {"report_to": ["comet_ml"]}, "there are tensorboard", "comet_ml"),
    "shards": ("sft", {"deepspeed": "zero3.json"}, "not sharded", "only null"),
    "launcher": ("sft", {"num_processes": 8}, "accelerate launch", "only 1"),
    "resume": ("sft", {"resume_from_checkpoint": "c"}, "newest checkpoint of its output_dir", "give true"),
    "checkpoints by epoch": ("sft", {"save_strategy": "epoch"}, "every save_steps steps", "save_strategy: steps"),
    "hub without a name": ("sft", {"push_to_hub": True}, "give hub_model_id", "push_to_hub = True"),
    "both adapters": ("sft", {"use_peft": True, "use_dora": True, "use_rslora": True}, "together", "choose one"),
    "adapter dropout": ("sft", {"use_peft": True, "lora_dropout": 0.05}, "no dropout", "set it to 0"),
    "4 bits alone": ("sft", {"load_in_4bit": True}, "through an adapter", "use_peft"),
    "dtype": ("sft", {"dtype": "auto"}, "name it: float32", "dtype = 'auto'"),
    "model argument": ("sft", {"model_init_kwargs": {"rope_theta": 1}}, "rope_theta is not passed", "There are dtype"),
    "not a number": ("sft", {"learning_rate": "fast"}, "expected a number", "learning_rate = 'fast'"),
    "not whole": ("sft", {"gradient_accumulation_steps": 1.5}, "whole number", "1.5"),
    "a wrong type": ("dpo", {"beta": True}, "expected a number", "beta = True"),
    "a mixture without rows held out": ("sft", {"datasets": [{"path": "d"}], "eval_strategy": "steps"},
                                        "give test_split_size", "held out"),
    "half weighted": ("sft", {"datasets": [{"path": "d", "fraction": 0.5}, {"path": "e"}]}, "for all", "or for none"),
    "mixture key": ("sft", {"datasets": [{"path": "d", "splt": "s"}]}, "no key 'splt'", "did you mean 'split'"),
    "an unknown scale": ("grpo", {"scale_rewards": "bach"}, "did you mean 'batch'", "group, batch and none"),
    "no cap": ("grpo", {"loss_type": "cispo"}, "'cispo' with epsilon_high=0.2", "epsilon_high=5.0"),
    "epsilon of cispo": ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.1},
                         "epsilon=0.1 has no effect on cispo", "leave it out"),
    "token ratios of luspo": ("grpo", {"loss_type": "luspo"}, "ratio of sequences",
                              "importance_sampling_level='sequence'"),
    "sequence ratios of sapo": ("grpo", {"loss_type": "sapo", "importance_sampling_level": "sequence"},
                                "ratio of the sequence through the gate", "leave the level out"),
    "two clips of sequences": ("trl:gspo", {"delta": 4.0}, "no part of trl:gspo reads it", "delta = 4.0"),
    "kernel of another": ("grpo", {"vespo_k_pos": 1.0}, "no effect on dapo", "belongs to vespo"),
    "an empty quantile": ("grpo", {"top_entropy_quantile": 0.0}, "a share above 0", "got 0"),
    "two means of entropy": ("grpo", {"top_entropy_quantile": 0.2, "entropy_coef": 0.1}, "the tokens that are kept",
                             "give one of them"),
    "gdpo": ("grpo", {"multi_objective_aggregation": "normalize_then_sum"}, "rewards are summed before",
             "only sum_then_normalize"),
    "adaptive entropy": ("grpo", {"use_adaptive_entropy": True}, "a constant here", "only false"),
    "tokens of gmpo": ("gmpo", {"top_entropy_quantile": 0.5}, "over all tokens of a completion", "only 1.0"),
    "a range": ("rloo", {"reward_clip_range": [1, 0]}, "a least and a largest reward", "[1, 0]"),
    "vllm": ("grpo", {"use_vllm": True}, "vLLM is not in the zoo yet", "only false"),
    "partial groups": ("grpo", {"per_device_train_batch_size": 6}, "no multiple of num_generations=8", "6 completions"),
    "straddling steps": ("grpo", {"gradient_accumulation_steps": 2, "steps_per_generation": 3},
                         "one must be a multiple of the other", "24 completions are sampled at once and 16"),
    "half a sampling": ("grpo", {"num_iterations": 2, "max_steps": 5}, "multiple of 2", "(6)"),
    "two sizes": ("grpo", {"steps_per_generation": 1, "generation_batch_size": 8}, "not both", "steps_per_generation"),
    "no KL to correct": ("grpo", {"use_bias_correction_kl": False}, "no effect without beta", "KL"),
    "latex": ("grpo", {"reward_funcs": ["accuracy_reward"]}, "reads LaTeX", "'numeric'"),
    "reward": ("grpo", {"reward_funcs": ["think_format"]}, "no reward function of TRL's", "did you mean 'think_format"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_in_words(what: str) -> None:
    trainer, fields, fault, cure = REFUSED[what]
    found = translate(trainer, fields)
    with pytest.raises(UsageError) as caught:
        found.check()
    for words in (fault, cure):
        assert words in str(caught.value) and words in "\n".join(found.lines())
    assert "is refused:" in "\n".join(found.lines())


def test_the_arithmetic_of_batches_is_shown() -> None:
    fields = {"num_generations": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 3}
    assert translate("grpo", fields).notes[-1] == (
        "8 prompts x 4 samples = 32 completions are sampled at once; they serve 3 x 2 optimizer steps of 16."
    )


def test_everything_that_is_wrong_is_told_at_once() -> None:
    fields = {"loss_type": "hing", "packing": True, "learning_rate": "fast", "beta": 0.2, "hub_strategy": "end"}
    found = translate("dpo", fields)
    assert [f for f, _, _ in found.refused] == ["packing", "learning_rate", ""]
    with pytest.raises(UsageError, match=r"packing = True(?s:.*)learning_rate = 'fast'(?s:.*)'hing' is unknown"):
        found.check()
    text = "\n".join(found.lines())
    assert "beta = 0.2 -> beta = 0.2" in text and "hub_strategy = 'end': the hub gets the model once" in text
    assert [f for f, _, _ in translate("grpo", {"use_vllm": True, "min_p": 0.1}).refused] == ["use_vllm", "min_p"]


JUNK = (None, True, False, 5, -1, 1.5, math.inf, "nan", "", "x", [], [5], ["x"], {}, {"x": 5}, [{"x": 5}], [[]])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_value_of_any_field_gives_a_traceback(trainer: str) -> None:
    """Alone and beside what switches it on: mapped, without effect or refused, and always told."""
    for field, value in itertools.product(FIELDS[trainer], JUNK):
        for beside in ({}, {"use_peft": True, "eval_strategy": "steps", "dataset_name": "d", "push_to_hub": True}):
            found = translate(trainer, {**beside, field: value})
            assert field in {f for f, *_ in (*found.mapped, *found.ignored, *found.refused)}, (field, value)
            assert any(f"{field} = {value!r}" in line for line in found.lines()), (field, value)


# ------------------------------------------------------------------------------------------------ YAML files


def test_a_file_of_trls(tmp_path: Path) -> None:
    file = tmp_path / "dpo.yaml"
    file.write_text(
        "model_name_or_path: m\ndataset_name: d\nlearning_rate: 5e-7\nbeta: 0.2\neval_strategy: no\nsave_strategy: no\n"
        "report_to: none\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 8\n"
    )
    found = read_trl_config(file, "dpo")
    found.check()
    assert found.call() == {
        "model": "m", "dataset": "d", "beta": 0.2,
        "config": {"learning_rate": 5e-7, "report_to": (), "rows_per_step": 16},
    }  # fmt: skip
    assert read_trl_config(file, "trl:DPOTrainer", {"beta": 0.3}).options == {"beta": 0.3}
    with pytest.raises(UsageError, match=r"does not say whose it is: name the trainer \(sft, reward, dpo, cpo, orpo,"):
        read_trl_config(file)
    named = tmp_path / "named.yaml"
    named.write_text(f"command: dpo\n{file.read_text()}")
    assert read_trl_config(named).settings == found.settings
    with pytest.raises(UsageError, match="is one of dpo, not of kto"):
        read_trl_config(named, "kto")
    with pytest.raises(UsageError, match="'trl:xpo' is not in the zoo yet"):
        read_trl_config(file, "xpo")
    with pytest.raises(UsageError, match="cannot be read"):
        read_trl_config(tmp_path / "none.yaml", "dpo")


def test_the_pages_file_loads(tmp_path: Path) -> None:
    (block,) = re.findall("```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "dpo.yaml").write_text(block)
    found = read_trl_config(tmp_path / "dpo.yaml", "dpo")
    found.check()
    assert set(yaml.safe_load(block)) == {f for f, *_ in (*found.mapped, *found.ignored)}
    assert found.settings["lora"] is True and found.settings["eval_steps"] == 50


def test_the_pages_tables_are_the_codes() -> None:
    sections = re.split(r"^### ", PAGE, flags=re.MULTILINE)
    shown = {s.splitlines()[0]: s for s in sections}
    for title, table in TABLES.items():
        rows = re.findall(r"^\| (`.*?`) \| (.*) \|$", shown[title], re.MULTILINE)
        assert {f: ours for fields, ours in rows for f in re.findall("`(.+?)`", fields)} == {
            f: rule.ours for f, rule in table.items()
        }, title


# ------------------------------------------------------------------------------------------------ runs


def spell(name: str, **options: Any) -> Any:
    return ALGORITHMS.entry(name).tags["spelling"](options)


def test_our_own_options_stand_beside_trls() -> None:
    found = spell("trl:dpo", per_device_train_batch_size=4, tokens_per_batch=100, beta=0.2, eval_steps=5)
    assert found.options == {"beta": 0.2}
    assert found.settings == {"rows_per_step": 4, "tokens_per_batch": 100, "eval_steps": 5}
    with pytest.raises(UsageError, match="per_device_train_batch_size says it too"):
        spell("trl:dpo", per_device_train_batch_size=4, rows_per_step=4)
    with pytest.raises(UsageError, match=r"give it to train\(\) as model="):
        spell("trl:dpo", model_name_or_path="m")
    with pytest.raises(UsageError, match="no such field"):
        spell("trl:dpo", clip=0.2)
    with pytest.warns(UserWarning, match="dataloader_num_workers has no effect here: rows are tokenised once"):
        spell("trl:dpo", dataloader_num_workers=4)


def test_train_takes_trls_words() -> None:
    run = prefzoo.train(
        "trl:dpo", model="tiny", dataset=pairs(), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        loss_type="ipo", num_train_epochs=1, logging_steps=1, quiet=True,
    )  # fmt: skip
    assert [row["step"] for row in run.history] == [1, 2, 3] and run.algorithm == "trl:dpo"
    with pytest.raises(UsageError, match="packing = True: a field of SFTTrainer, not of DPOTrainer"):
        prefzoo.train("trl:dpo", model="tiny", dataset=pairs(), packing=True)


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(c) % 3) for c in completions]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_under_every_name(name: str, tmp_path: Path) -> None:
    sampled = isinstance(create_algorithm(name).stages[0].source, Rollouts)
    fields = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    if sampled:
        fields |= {"num_generations": 2, "max_completion_length": 4}
    found = translate(name, fields)
    found.check()
    assert found.algorithm == name
    run = prefzoo.train(
        name, model="tiny", dataset=pairs(), output_dir=tmp_path / "run", quiet=True,
        **({"reward": reward} if sampled else {}), **found.call(),
    )  # fmt: skip
    assert len(run.history) == 2 and run.spent.optimizer_steps == 2 and run.algorithm == name
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["algorithm"] == name and record["config"]["betas"] == [0.9, 0.999]
    if not sampled:
        assert record["config"]["rows_per_step"] == 4


def test_arguments_of_a_trainer_are_told_by_our_names() -> None:
    found = translate("dpo", {"train_dataset": "pairs.jsonl", "ref_model": "other"})
    assert [field for field, _, _ in found.refused] == ["train_dataset", "ref_model"]
    assert "here it is dataset=" in "\n".join(found.lines()) and "here it is reference=" in "\n".join(found.lines())


def test_our_settings_stand_beside_a_file(tmp_path: Path) -> None:
    """Where TRL has no field of the name; what TRL names wins over the file by TRL's name."""
    from prefzoo.cli.training import read_trl

    (tmp_path / "dpo.yaml").write_text("trainer: dpo\nbeta: 0.2\n")
    name, call = read_trl(tmp_path / "dpo.yaml", None, {"eval_split": 0.2, "beta": 0.4, "output_dir": "here"})
    assert name == "trl:dpo" and call["beta"] == 0.4 and call["output_dir"] == "here"
    assert call["config"]["eval_split"] == 0.2
