"""Rollouts of a step: sampled, scored, kept, credited."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefzoo.data.samples import Ragged, Samples
from prefzoo.models.load import end_ids
from prefzoo.models.roles import Policy
from prefzoo.parts.credit import sequence_kl
from prefzoo.parts.reference import Moving
from prefzoo.parts.roles import REFERENCE, REWARD, TEACHER, critic_of_role, of_critic
from prefzoo.parts.source import Rollouts
from prefzoo.processes import ALONE
from prefzoo.registry import UsageError
from prefzoo.rollout import Finish, LoopEngine, Mixture, Sampling, rollout_engine
from prefzoo.seeds import derive_seed, generator
from prefzoo.training.crew import Crew
from prefzoo.training.metrics import Meter, RunLog


class Collector(Crew):
    """Makes what a rollout step trains on."""

    data: Samples
    log: RunLog
    now: Meter  # of this step
    spent: Any
    moving: Moving | None  # what the reference follows the policy by
    pool: Samples | None  # of a replay
    generated: int  # tokens that were written for the newest samples, by all processes
    measured: dict[str, tuple[float, int]]  # what controllers follow: the mean, and of how many

    def agree(self, value: Any) -> list[Any]:
        raise NotImplementedError

    def _collect(self, step: int, total: int) -> Samples:
        """Sample, score, keep, credit: what this rollout step trains on."""
        stage, source = self.stage, self.stage.source
        assert isinstance(source, Rollouts)
        if self.moving is not None:
            assert self.reference is not None
            self.moving.begin_round(self.reference, self.policy)
        shown = (step + 1) % self.config.logging_steps == 0 or step == 0 or step == total - 1
        samples, scores = self._scored_samples(step, self._prompts(step), "rollout", shown)
        if stage.keep is not None:
            samples, scores = self._kept(step, samples, scores)
        if stage.replay is not None:
            self.pool, scores = stage.replay.add(self.pool, samples, scores)
            samples = self.pool
        if len(samples) and stage.credit is not None:
            credited = stage.credit(samples, scores)
            for name, values in getattr(stage.credit, "measure", _nothing)(samples, scores, credited).items():
                self.now.add(name, values)
            samples = credited
        if len(samples) and stage.condition is not None:
            samples = stage.condition.marked(samples, self)
        for controller in stage.controllers.values():  # after the credit: this batch moves the next one's value
            if controller.follows in self.measured:  # others follow a prelude
                controller.update(*self.measured[controller.follows])
        return samples

    def _scored_samples(
        self, step: int, chosen: tuple[Samples, np.ndarray], purpose: str, shown: bool = False
    ) -> tuple[Samples, Tensor]:
        """Completions of these prompts with their scores, and what the stage's roles say of each token."""
        stage, source = self.stage, self.stage.source
        assert isinstance(source, Rollouts)
        rows, keys = chosen
        seed = derive_seed(self.config.seed, purpose, step)
        samples, scores = self._sample(rows, keys, seed, source)
        self.spent.prompts += len(samples.prompts)
        self.spent.generated_tokens += self.generated
        if REWARD in stage.feedback.needs:
            self.spent.reward_calls += len(samples.completions)
        self.watchdog.doing(f"scoring the samples of step {step + 1}")
        if any("sampling_logps_BT" in t.loss.extras for t in stage.terms):
            samples = samples.with_tokens(sampling_logps=samples.tokens["old_logps"])
        samples = self._as_learned(samples, source)
        if REFERENCE in stage.needs:
            samples = samples.with_tokens(ref_logps=self.reference_logps(samples))
        if TEACHER in getattr(stage.credit, "needs", ()):
            samples = samples.with_tokens(teacher_logps=self.teacher_logps(samples))
        for name in self._critic_names():
            samples = samples.with_tokens(**{of_critic("values", name): self.values(samples, name)})
        own = source.by == "policy" and samples_now(source, seed)
        measured = self._rollout_metrics(samples, scores, own)
        self.measured = measured if purpose == "rollout" else self.measured
        for name, controller in stage.controllers.items():
            self.now.add(f"{name}_coefficient", controller.value)
        if shown:
            self.log.samples(step + 1, self._shown(samples, scores))
        return samples, scores

    def _as_learned(self, samples: Samples, source: Rollouts) -> Samples:
        """With the learner's log-probabilities where the sampler's are others: the ratio must start at 1, and a KL is
        one of whole distributions."""
        exact = self.config.precision == self.config.dtype == "float32"
        changed = source.top_p < 1 or source.mask_top_p is not None
        own = "old_logps" in samples.tokens  # of completions that were revised nobody has sampled the tokens
        if not own or self.stage.condition is not None or (exact and not changed):
            return samples
        return samples.with_tokens(old_logps=self.policy_logps(samples))

    def _critic_names(self) -> list[str]:
        return [critic_of_role(role) or "" for role in self.critics]

    def _kept(self, step: int, samples: Samples, scores: Tensor) -> tuple[Samples, Tensor]:
        """What stays; where a keep part refills, further prompts are sampled until the step has all of its own."""
        keep, wanted = self.stage.keep, self.stage.schedule.prompts
        assert keep is not None
        before, refill = len(samples), getattr(keep, "refill", 0)
        samples, scores = keep(samples, scores)
        for number in range(refill):
            if len(samples.prompts) >= wanted:
                break
            more = self._scored_samples(step, self._fresh_prompts(step, number), f"refill {number}")
            before += len(more[0])
            more = keep(*more)
            samples, scores = Samples.concatenate([samples, more[0]]), torch.cat([scores, more[1]])
        self.now.add("kept", len(samples) / max(before, 1))
        rows = np.flatnonzero(samples.prompt_B < (wanted if refill else len(samples.prompts)))  # no more than asked for
        return (samples, scores) if len(rows) == len(samples) else (samples.take(rows), scores[torch.from_numpy(rows)])

    def _fresh_prompts(self, step: int, number: int) -> tuple[Samples, np.ndarray]:
        """Prompts beyond those of the step, at random, and keys that no other prompt of the step has."""
        rows, count = len(self.data), self.stage.schedule.prompts
        chosen = generator(self.config.seed, f"refill {number}", step).choice(rows, size=count, replace=count > rows)
        return self.data.take(chosen), np.arange(count)

    def _sample(self, rows: Samples, keys: np.ndarray | None, seed: int, source: Rollouts) -> tuple[Samples, Tensor]:
        """Completions and their scores; every process makes those of its share of the prompts, and all get all."""
        feedback, condition, size = self.stage.feedback, self.stage.condition, self.processes.size
        if len(rows) < size:
            raise UsageError(f"{len(rows)} prompts cannot be shared by {size} processes; sample from more at a time.")
        mine = np.asarray(self.processes.share(range(len(rows))))
        keys = mine if keys is None else keys[mine]
        rows = rows.take(mine)
        prompts = rows if rows.kind == "prompts" else own_prompts(rows)
        asked = prompts if condition is None else condition.best(prompts, self)
        self.watchdog.doing(f"sampling for step {self.step + 1}")
        with self._autocast():  # the learner's precision, or the ratio does not start at 1
            samples = self._written(asked, rows, keys, seed, source)
        self.written = generated_tokens(samples, source) if samples_now(source, seed) else 0
        if condition is not None:  # rewards read the prompt as it is, without words before it
            samples = replace(samples, prompts=prompts.prompts)
        if getattr(feedback, "revises", False):
            written, samples = samples, feedback.revise(samples, self)  # type: ignore[attr-defined]
            for name, values in getattr(feedback, "measure", _nothing)(written, samples).items():
                self.mine.add(name, values)
        scores = feedback(samples, self)  # type: ignore[operator]
        self.watchdog.doing(f"waiting for the samples of the other processes for step {self.step + 1}")
        parts = self.agree((samples, scores, self.shown_columns, self.written))
        self.shown_columns = {
            name: [value for _, _, columns, _ in parts for value in columns[name]]
            for name in self.shown_columns
            if all(name in columns for _, _, columns, _ in parts)
        }
        self.generated = sum(count for _, _, _, count in parts)
        return Samples.concatenate([p for p, _, _, _ in parts]), torch.cat([scores for _, scores, _, _ in parts])

    def _written(self, prompts: Samples, rows: Samples, keys: np.ndarray, seed: int, source: Rollouts) -> Samples:
        """The completions of all samplers, prompt by prompt; of a step that does not sample, those of the data."""
        if not samples_now(source, seed):
            return self._demonstrated(prompts, rows)
        masked = self._mixture(mask_top_p=source.mask_top_p)
        writer = self._writer(source.by)
        main = writer.generate(prompts, source.group_size, source.sampling, seed, keys, decoder=masked)
        if not source.beside:
            return main
        parts = [main]
        for number, sampler in enumerate(source.beside, 1):
            if sampler.role == "data":
                parts.append(self._demonstrated(prompts, rows))
                continue
            temperature = source.temperature if sampler.temperature is None else sampler.temperature
            sampling = Sampling(temperature, source.top_p, source.max_new_tokens)
            blended = self._mixture(sampler.blend)
            own = derive_seed(seed, "beside", number)
            writer = self._writer(sampler.role)
            parts.append(writer.generate(prompts, sampler.count, sampling, own, keys, decoder=blended))
        return side_by_side(parts)

    def _mixture(self, blend: float = 0.0, mask_top_p: float | None = None) -> Mixture | None:
        """Sampling with the reference reading along; None: where nothing asks for it."""
        if not blend and mask_top_p is None:
            return None
        assert self.reference is not None
        return Mixture(self.reference, blend, mask_top_p)

    def _writer(self, role: str) -> LoopEngine:
        """Who samples for a role."""
        assert self.rollouts is not None
        if role == "policy":
            return self.rollouts
        model: Policy | None = self.reference if role == "reference" else self.teacher
        assert model is not None, role
        return rollout_engine(model, end_ids(self.tokenizer, model.model))

    def _demonstrated(self, prompts: Samples, rows: Samples) -> Samples:
        """The completions of the rows, as if somebody had sampled them."""
        ends = set(end_ids(self.tokenizer, self.policy.model))
        last = [row[-1] if len(row := rows.completions[b]) else None for b in range(len(rows))]
        finish = [Finish.STOP if token in ends else Finish.LENGTH for token in last]
        samples = Samples(
            "completions", prompts.prompts, rows.completions, np.arange(len(rows)),
            columns={"finish": torch.tensor(finish, dtype=torch.long)}, extra=prompts.extra,
            tokens={k: v for k, v in rows.tokens.items() if k == "trainable"},  # of several turns, the assistant's
        )  # fmt: skip
        return samples.with_tokens(old_logps=self._alone(self.policy_logps, samples))

    def _alone(self, score: Callable[[Samples], Tensor], samples: Samples) -> Tensor:
        """A score of samples that this process alone has."""
        together, self.processes = self.processes, ALONE
        try:
            return score(samples)
        finally:
            self.processes = together

    def _prompts(self, step: int) -> tuple[Samples, np.ndarray]:
        """The prompts of a rollout step, epoch after epoch, and keys that name (epoch, row) to the sampler."""
        rows, count = len(self.data), self.stage.schedule.prompts
        chosen: list[int] = []
        keys: list[int] = []
        place = step * count
        while len(chosen) < count:
            epoch, offset = divmod(place + len(chosen), rows)
            piece = self._order("prompts", epoch, rows)[offset : offset + count - len(chosen)]
            chosen.extend(piece)
            keys.extend(epoch * rows + piece)
        return self.data.take(np.asarray(chosen)), np.asarray(keys)

    def _order(self, purpose: str, epoch: int, rows: int) -> np.ndarray:
        if not self.config.shuffle:
            return np.arange(rows)
        return generator(self.config.seed, purpose, epoch).permutation(rows)

    # ------------------------------------------------------------------------------------ what is measured

    def _rollout_metrics(self, samples: Samples, scores: Tensor, own: bool) -> dict[str, tuple[float, int]]:
        """Means over the main completions of each prompt; those of a sampler beside them are told by their rewards.
        ``own``: the policy wrote them; others' say nothing of its entropy and its KL."""
        add, scores_B = self.now.add, scores if scores.dim() == 1 else scores[:, 0]
        sampler_B = samples.columns.get("sampler")
        if sampler_B is not None:
            for number in range(1, int(sampler_B.max()) + 1):
                theirs = scores_B[sampler_B == number]
                add(f"reward/sampler_{number}", theirs[~theirs.isnan()])
            main = torch.nonzero(sampler_B == 0)[:, 0]
            samples, scores, scores_B = samples.take(main.numpy()), scores[main], scores_B[main]
        known_B = ~scores_B.isnan()
        add("reward", scores_B[known_B])
        if REWARD in self.stage.feedback.needs or bool(known_B.any()):
            add("reward_missing", (~known_B).float())
        length_B = torch.from_numpy(samples.completions.lengths).float()
        add("completions/mean_length", length_B)
        add("completions/clipped_ratio", (samples.columns["finish"] == Finish.LENGTH).float())
        measured = {"reward": scores_B[known_B], "length": length_B}
        own = own and "old_logps" in samples.tokens
        if own:
            measured["entropy"] = -samples.tokens["old_logps"]
            add("entropy", measured["entropy"])  # unbiased: the samples are the policy's own
        if own and "ref_logps" in samples.tokens:
            measured["kl"] = sequence_kl(samples)
            add("kl", measured["kl"])
        if scores.dim() == 2:
            for k in range(scores.shape[1]):
                measured[f"objective:{k}"] = scores[:, k][~scores[:, k].isnan()]
                add(f"reward/objective_{k}", measured[f"objective:{k}"])
        groups = scores_B.view(len(samples.prompts), -1)
        if groups.shape[1] > 1 and (REWARD in self.stage.feedback.needs or bool(known_B.any())):
            known_P = (~groups.isnan()).sum(1)
            squares_P = (groups - groups.nanmean(1, keepdim=True)).square().nansum(1)
            add("reward_std", (squares_P / (known_P - 1).clamp(min=1)).sqrt()[known_P > 1])
            # By the extremes: rounding may leave a standard deviation above 0. The missing do not count.
            highest, lowest = groups.nan_to_num(-math.inf).amax(1), groups.nan_to_num(math.inf).amin(1)
            add("frac_reward_zero_std", (highest <= lowest).float())
        return {name: (float(values.mean()) if len(values) else 0.0, len(values)) for name, values in measured.items()}

    def _shown(self, samples: Samples, scores: Tensor) -> list[dict[str, Any]]:
        count = min(self.config.log_completions, len(samples.completions))
        rows = np.linspace(0, max(len(samples.completions) - 1, 0), count).astype(int)

        def said(score: Tensor) -> Any:
            if score.dim():
                return [said(one) for one in score]
            return None if score.isnan() else float(score)

        return [
            {
                **{name: values[b] for name, values in self.shown_columns.items()},
                "prompt": self.tokenizer.decode(samples.prompts[samples.prompt_B[b]]),
                "completion": self.tokenizer.decode(samples.completions[b]),
                "reward": said(scores[b]),
            }
            for b in rows
        ]


def _nothing(*_: Any) -> dict[str, Tensor]:
    return {}


def samples_now(source: Rollouts, seed: int) -> bool:
    """Whether the step of this seed samples; the others take the completions of the data."""
    return source.share == 1 or bool(generator(seed, "share", 0).random() < source.share)


def generated_tokens(samples: Samples, source: Rollouts) -> int:
    """Tokens that a model has written."""
    lengths_B = samples.completions.lengths
    given = [k for k, sampler in enumerate(source.beside, 1) if sampler.role == "data"]
    if given:
        lengths_B = lengths_B[~np.isin(samples.columns["sampler"].numpy(), given)]
    return int(lengths_B.sum())


def own_prompts(rows: Samples) -> Samples:
    """The prompts of rows of completions, one for each row."""
    extra = {k: [v[p] for p in rows.prompt_B] for k, v in rows.extra.items()}
    return Samples("prompts", rows.prompts.take(rows.prompt_B), Ragged.of([]), np.zeros(0, dtype=np.int64), extra=extra)


def side_by_side(parts: list[Samples]) -> Samples:
    """Completions of the same prompts by several samplers, prompt by prompt; ``sampler`` says whose each is."""
    numbered = torch.cat([torch.full((len(p.completions),), k) for k, p in enumerate(parts)])
    first, tokens = parts[0], {"old_logps": torch.cat([p.tokens["old_logps"] for p in parts])}
    if any("trainable" in p.tokens for p in parts):
        tokens["trainable"] = torch.cat(
            [p.tokens.get("trainable", torch.ones(len(p.completions.flat), dtype=torch.bool)) for p in parts]
        )
    joined = Samples(
        "completions", first.prompts, Ragged.concatenate([p.completions for p in parts]),
        np.concatenate([p.prompt_B for p in parts]),
        columns={"finish": torch.cat([p.columns["finish"] for p in parts]), "sampler": numbered},
        tokens=tokens, extra=first.extra,
    )  # fmt: skip
    return joined.take(np.argsort(joined.prompt_B, kind="stable"))
