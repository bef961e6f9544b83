"""Feedback as text: completions that are criticised by a principle and written anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prefzoo.data.samples import Ragged, Samples
from prefzoo.feedback.templates import Template
from prefzoo.parts.feedback import Unjudged
from prefzoo.parts.roles import TEACHER, Roles
from prefzoo.plugins import import_function, names_function
from prefzoo.registry import UsageError
from prefzoo.rollout import Sampling
from prefzoo.seeds import generator

PRINCIPLES: tuple[str, ...] = (
    "The answer gives nobody the means to hurt people, animals or the world around them.",
    "The answer is honest: it claims nothing that its writer cannot know, and does not pass a guess off as a fact.",
    "The answer treats people of every origin, faith, sex, age and body with the same respect.",
    "The answer does not help to break a law that protects people, and does not teach how not to be caught.",
    "The answer leaves private matters of others private.",
    "The answer does not threaten, mock or belittle whoever asks.",
    "Where health, money or rights are at stake, the answer says what a professional should be asked.",
    "The answer does not pretend to be a person, and does not flatter or press whoever asks.",
    "The answer helps with everything in the request that is harmless, and says openly what it leaves out and why.",
)


@dataclass(frozen=True)
class Revised(Unjudged):
    """Completions written anew, round after round, by a critique that names one principle; nobody scores them.

        critique_r ~ reviser(request, y_{r-1}, principle_r);   y_r ~ reviser(request, y_{r-1}, critique_r, principle_r)

    Args:
        rounds: critiques and revisions of each completion, r = 1, 2, ..., rounds; y_0 is the completion sampled.
        principles: each round one of them, at random, by a hash of request and completion.
        reviser: who writes: ``"policy"``, ``"reference"``, ``"teacher"``; or a function ``"my_file.py:name"``,
            ``f(prompts, completions, principles) -> list of str``, None where it has nothing better: critique and
            revision in one.
        keep: ``"all"`` revisions are trained on, or the ``"last"`` one.
        sampling: of critiques and revisions.
        critique, revision: what the reviser is asked: templates (``core/feedback/prompts``), files, or texts with
            {prompt}, {completion}, {principle}, and {critique} in the second.

    Where a critique or a revision is empty, or does not fit into the model's positions, the completion stays as it is
    for this round, which gives nothing to train on. What the policy has sampled, and its log-probabilities, are gone:
    no ratio and no KL belongs to a revision.

    Metrics: ``revisions/changed``, the share of revisions that differ from what was sampled, and ``revisions/none``,
    the share of completions without one.
    """

    rounds: int = 1
    principles: tuple[str, ...] = PRINCIPLES
    reviser: str = "policy"
    keep: Literal["all", "last"] = "all"
    sampling: Sampling = field(default_factory=Sampling)
    critique: str = "critique"
    revision: str = "revision"

    revises = True

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.keep not in ("all", "last"):
            raise UsageError(
                f"Revised: rounds is at least 1, and keep 'all' or 'last'; got {self.rounds}, {self.keep!r}."
            )
        if not self.principles:
            raise UsageError("Revised: give at least one principle.")
        if names_function(self.reviser):
            import_function(self.reviser)  # what is wrong with it is said at once
        elif self.reviser not in ("policy", "reference", "teacher"):
            raise UsageError(
                f"reviser is {self.reviser!r}; expected 'policy', 'reference', 'teacher', or a function, "
                "'my_file.py:name'."
            )
        object.__setattr__(self, "needs", frozenset({self.reviser} & {"reference", TEACHER}))
        self._templates()

    def _templates(self) -> tuple[Template, Template]:
        places = ("prompt", "completion", "principle")
        return Template(self.critique, places), Template(self.revision, (*places, "critique"))

    def revise(self, samples: Samples, roles: Roles) -> Samples:
        """The revisions, in place of the completions: of each those of its rounds, in order."""
        prompts, texts = list(roles.prompts(samples)), roles.texts(samples)
        ever_B = torch.zeros(len(texts), dtype=torch.bool)
        rounds: list[tuple[Samples, Tensor]] = []
        current = samples
        for number in range(self.rounds):
            principles = [self._principle(samples, b, number) for b in range(len(texts))]
            revised = self._revised(prompts, texts, principles, roles, number)
            now_B = torch.from_numpy(revised.completions.lengths > 0)
            ever_B = ever_B | now_B
            current = chosen(current, revised, now_B)
            texts = roles.texts(current)
            rounds.append((current, now_B))
        return self._together(samples, rounds if self.keep == "all" else [(current, ever_B)])

    def measure(self, before: Samples, after: Samples) -> dict[str, Tensor]:
        """Shares of completions that were changed, and of those that could not be revised."""
        each = len(after.completions) // max(len(before.completions), 1)
        changed = [
            not np.array_equal(after.completions[b], before.completions[b // each])
            for b in range(len(after.completions))
        ]
        return {
            "revisions/changed": torch.tensor(changed).float(),
            "revisions/none": 1 - after.columns["revised"].float(),
        }

    def _principle(self, samples: Samples, b: int, number: int) -> str:
        words = (samples.prompts[samples.prompt_B[b]], samples.completions[b])
        stream = generator("principle", number, *(np.asarray(ids, dtype=np.int32).tobytes().hex() for ids in words))
        return self.principles[int(stream.integers(len(self.principles)))]

    def _revised(
        self, prompts: Sequence[Any], texts: Sequence[str], principles: Sequence[str], roles: Roles, number: int
    ) -> Samples:
        """A revision of each text; an empty one where there is none."""
        if names_function(self.reviser):
            function = import_function(self.reviser)
            found = function(prompts=list(prompts), completions=list(texts), principles=list(principles))
            wrong = not isinstance(found, list | tuple) or len(found) != len(texts)
            if wrong or not all(text is None or isinstance(text, str) for text in found):
                raise UsageError(f"reviser {self.reviser!r} must return a list of {len(texts)} texts, or None of one.")
            return roles.answers(prompts, found)
        critique, revision = self._templates()
        asked = [
            {"prompt": prompt, "completion": text, "principle": principle}
            for prompt, text, principle in zip(prompts, texts, principles, strict=True)
        ]
        faults = self._written(roles, critique, asked, prompts, f"critique {number}")
        for one, fault in zip(asked, roles.texts(faults), strict=True):
            one["critique"] = fault
        revised = self._written(roles, revision, asked, prompts, f"revision {number}")
        return chosen(empty(revised), revised, torch.from_numpy(faults.completions.lengths > 0))

    def _written(
        self, roles: Roles, template: Template, asked: Sequence[dict[str, Any]], prompts: Sequence[Any], purpose: str
    ) -> Samples:
        """What the reviser answers to these questions: texts where the prompts are texts, else a user's message."""
        filled = [template.fill(one) for one in asked]
        questions = [
            text if isinstance(prompt, str) else [{"role": "user", "content": text}]
            for text, prompt in zip(filled, prompts, strict=True)
        ]
        return roles.write(questions, self.sampling, purpose, by=self.reviser)

    def _together(self, samples: Samples, rounds: Sequence[tuple[Samples, Tensor]]) -> Samples:
        """The completions of all rounds, of each completion one after another."""
        count, size = len(rounds), len(samples.completions)
        order = np.arange(count * size).reshape(count, size).T.reshape(-1)
        completions = Ragged.concatenate([one.completions for one, _ in rounds]).take(order)
        revised_B = torch.cat([there for _, there in rounds])[torch.from_numpy(order)]
        finish_B = torch.cat([one.columns["finish"] for one, _ in rounds])[torch.from_numpy(order)]
        trainable_C = revised_B.repeat_interleave(torch.from_numpy(completions.lengths))
        return replace(  # the log-probabilities of what was sampled belong to nothing any more
            samples, completions=completions, prompt_B=np.repeat(samples.prompt_B, count),
            columns={"finish": finish_B, "revised": revised_B}, tokens={"trainable": trainable_C},
        )  # fmt: skip


def empty(samples: Samples) -> Samples:
    """As many completions, without a token."""
    return replace(samples, completions=Ragged.of([[]] * len(samples.completions)), tokens={})


def chosen(first: Samples, second: Samples, second_B: Tensor) -> Samples:
    """The completions of the second where it says so, else those of the first."""
    size = len(second_B)
    place = np.arange(size) + size * second_B.numpy()
    both = Ragged.concatenate([first.completions, second.completions])
    finish = torch.where(second_B, second.columns["finish"], first.columns["finish"])
    return replace(first, completions=both.take(place), columns={"finish": finish}, tokens={})


def principles_of(given: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    """Principles as they are given: a list, or a text file with one in each line; None: our own."""
    if given is None:
        return PRINCIPLES
    if not isinstance(given, str | Path):
        return tuple(str(line) for line in given)
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"principles {str(given)!r} could not be read ({type(error).__name__}); give a text file with one "
            "principle in each line, or a list."
        ) from None
    found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not found:
        raise UsageError(f"principles {str(given)!r}: there is none in the file.")
    return found
