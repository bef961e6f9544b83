"""Judges: sources that compare the completions of one prompt, made from a function, a local model or an endpoint."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefzoo.data.samples import Samples
from prefzoo.feedback.rewards import RewardSource, finish
from prefzoo.feedback.sources import SOURCES
from prefzoo.feedback.templates import Template
from prefzoo.models.reference import token_scores
from prefzoo.models.roles import Policy
from prefzoo.models.tokenizer import end_ids
from prefzoo.models.tree import pack_rows
from prefzoo.registry import RunError, UsageError, suggest

JudgeFunction = Callable[..., Any]
CRITERION = "the better answer does what the request asks for, says nothing false, and harms nobody"


class Oracle(Protocol):
    """What answers questions with one of two words: :class:`LocalModel`, :class:`prefzoo.feedback.Endpoint`."""

    def __call__(self, questions: Sequence[str], words: tuple[str, str]) -> list[float | None]:
        """The probability of the first word for each question; None where there was no verdict."""
        ...

    def bind(self, device: torch.device | str) -> Oracle: ...

    def drain(self) -> dict[str, float]: ...


class Judge(RewardSource):
    """The reward of a completion is its mean probability of beating the other completions of its prompt.

        P_ij = (q(i, j) + 1 - q(j, i)) / 2,   R_i = mean over j != i of P_ij

    q(i, j) is what the judge says is the probability that the first, i, is better when j stands second. Judges prefer
    places, so both orders are asked; P_ij + P_ji = 1 exactly, and the mean reward of a prompt is 1/2 whatever the
    policy does: watch the win rate against a fixed opponent instead. Completions of the same text are a tie and are not
    asked about. A pair without a verdict in both orders is missing, one order alone being biased; a completion without
    any pair, such as the only one of its prompt, has no reward (NaN).

    Args:
        function: ``judge(prompts, first, second, **columns)``, plain or ``async``; it returns a list with one
            probability for each, or None. ``prompts`` are as the data has them (text or messages), ``first`` and
            ``second`` texts. It gets of the data's columns those that it names, or all if it has ``**columns``.
        tokenizer: the policy's; a run gives it (:meth:`bind`).
        both_orders: ask q(i, j) and q(j, i). Without, P_ij = q(i, j) for i < j alone, for judges that no order sways.
        opponents: compare each completion with so many others of its prompt, its next ones in a circle; None: all.
        against: a column of the data whose text is every completion's opponent instead: R_i = P(y_i beats it). Then one
            completion per prompt is enough, and the mean reward is the win rate.
        name: in metrics and in words; the function's by default.

    Convention: no KL enters here. Calls per prompt with n completions: n (n - 1), or 2 n ``opponents``.

    Metrics: ``judge/missing``, the share of pairs without a verdict; ``judge/position_bias``, the mean of q - 1/2, so
    above 0 where the first place is favoured; ``judge/agreement``, the share of pairs whose two orders name one winner.

    Source: judging both orders: Zheng et al., arXiv:2306.05685; the mean win probability as a reward:
    Swamy et al., arXiv:2401.04056.

    Example::

        def shorter(prompts, first, second):
            return [float(len(a) < len(b)) for a, b in zip(first, second)]

        prefzoo.train("grpo", model="my-model", dataset="prompts.jsonl", reward=prefzoo.feedback.Judge(shorter))
    """

    verifies = False
    compares = True

    def __init__(
        self,
        function: JudgeFunction,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        both_orders: bool = True,
        opponents: int | None = None,
        against: str | None = None,
        name: str | None = None,
    ) -> None:
        if not callable(function):
            raise UsageError(f"judge: expected a function of prompts, first and second, got {function!r}.")
        if opponents is not None and against is not None:
            raise UsageError("judge: opponents are other completions, and against= names another opponent; give one.")
        if opponents is not None and opponents < 1:
            raise UsageError(f"judge: opponents must be at least 1, got {opponents}; None compares with all.")
        self.function = function
        self.both_orders = both_orders
        self.opponents = opponents
        self.against = against
        self.compares = against is None
        self.name: str = name or getattr(function, "__name__", None) or type(function).__name__
        self.__name__ = self.name  # a file's judge is a callable of that name
        self._tokenizer = tokenizer
        parameters = inspect.signature(function).parameters.values()
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._accepts = None if everything else frozenset(p.name for p in parameters)
        self._seen: dict[str, list[float]] = defaultdict(list)

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu") -> Judge:
        bound = copy.copy(self)
        bound._tokenizer, bound._seen = tokenizer, defaultdict(list)
        if hasattr(self.function, "bind"):
            bound.function = self.function.bind(device)
        return bound

    def __call__(self, samples: Samples) -> Tensor:
        if self.against is None:
            return mean_wins(self.pair_probabilities(samples))
        rivals = samples.extra.get(self.against)
        if rivals is None or not all(isinstance(r, str) for r in rivals):
            known = [name for name in samples.extra if name != "prompt"]
            near = suggest(self.against, known)
            raise UsageError(
                f"judge, option 'against': the data has no text in a column {self.against!r}{near} "
                f"Its columns: {', '.join(known) or 'none'}."
            )
        answers = self._texts(samples)
        duels = [(int(p), answer, rivals[p]) for p, answer in zip(samples.prompt_B, answers, strict=True)]
        return torch.tensor(self._duels(duels, samples), dtype=torch.float32)

    def pair_probabilities(self, samples: Samples) -> Tensor:
        """Who beats whom: (B, B), at row i and column j the probability that completion i beats completion j.

        NaN for completions of different prompts, on the diagonal, and where there is no verdict; P + P^T = 1 elsewhere.
        """
        answers = self._texts(samples)
        wins_BB = torch.full((len(answers), len(answers)), torch.nan)
        pairs = list(_pairs(samples.prompt_B, self.opponents))
        duels = [(int(samples.prompt_B[i]), answers[i], answers[j]) for i, j in pairs]
        for (i, j), probability in zip(pairs, self._duels(duels, samples), strict=True):
            wins_BB[i, j] = probability
            wins_BB[j, i] = 1 - wins_BB[i, j]
        return wins_BB

    def _texts(self, samples: Samples) -> list[str]:
        if self._tokenizer is None:
            raise UsageError(f"judge {self.name!r} has no tokenizer to read completions with: call bind(tokenizer).")
        ids = [samples.completions[b].tolist() for b in range(len(samples.completions))]
        return list(self._tokenizer.batch_decode(ids, skip_special_tokens=True))

    def _duels(self, duels: Sequence[tuple[int, str, str]], samples: Samples) -> list[float]:
        """The probability that the first text of each beats the second, as answers to the prompt of that place."""
        asked: dict[tuple[int, str, str], float] = {}
        for p, one, two in duels:
            if one != two:
                asked.setdefault((p, one, two), math.nan)
                if self.both_orders:
                    asked.setdefault((p, two, one), math.nan)
        asked = dict(zip(asked, self._ask(list(asked), samples), strict=True)) if asked else {}
        found = []
        for p, one, two in duels:
            there = back = 0.5
            if one != two:
                there = asked[p, one, two]
                back = asked[p, two, one] if self.both_orders else 1 - there
                self._note(there, back)
            found.append((there + 1 - back) / 2)
        return found

    def _ask(self, questions: Sequence[tuple[int, str, str]], samples: Samples) -> list[float]:
        columns = {
            name: [values[p] for p, _, _ in questions]
            for name, values in samples.extra.items()
            if name not in ("prompt", "prompts", "first", "second") and (self._accepts is None or name in self._accepts)
        }
        prompts = [samples.extra["prompt"][p] for p, _, _ in questions]
        first, second = ([q[place] for q in questions] for place in (1, 2))
        try:
            result = finish(self.function(prompts=prompts, first=first, second=second, **columns))
        except (UsageError, RunError):
            raise
        except Exception as error:
            raise UsageError(f"judge {self.name!r} raised {type(error).__name__}: {error}.") from error
        return checked_probabilities(result, len(questions), f"judge {self.name!r}")

    def _note(self, there: float, back: float) -> None:
        missing = math.isnan(there) or math.isnan(back)
        self._seen["judge/missing"].append(float(missing))
        if not missing and self.both_orders:
            self._seen["judge/position_bias"].append((there + back) / 2 - 0.5)
            self._seen["judge/agreement"].append(float((there - 0.5) * (back - 0.5) < 0 or there == back == 0.5))

    def drain(self) -> tuple[dict[str, float], dict[str, list[Any]]]:
        means = {name: sum(values) / len(values) for name, values in self._seen.items()}
        self._seen.clear()
        return means | (self.function.drain() if hasattr(self.function, "drain") else {}), {}


def mean_wins(wins_BB: Tensor) -> Tensor:
    """Of each completion its mean probability of winning, over those it is compared with; NaN where there is none.

    >>> mean_wins(torch.tensor([[torch.nan, 1.0, 0.5], [0.0, torch.nan, torch.nan], [0.5, torch.nan, torch.nan]]))
    tensor([0.7500, 0.0000, 0.5000])
    """
    return wins_BB.nanmean(1)


def checked_probabilities(result: Any, count: int, who: str) -> list[float]:
    """A list of so many probabilities; None becomes NaN, everything else is an error of ``who``."""
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, list | tuple) or len(result) != count:
        got = f"{len(result)} values" if isinstance(result, list | tuple) else type(result).__name__
        raise UsageError(f"{who} must return a list of {count} probabilities, one per question; got {got}.")
    found = []
    for index, value in enumerate(result):
        number = isinstance(value, int | float) and 0 <= value <= 1
        if value is not None and not number:
            raise UsageError(f"{who}: value {index} is {value!r:.80}, not a probability from 0 to 1 or None.")
        found.append(math.nan if value is None else float(value))
    return found


def _pairs(prompt_B: np.ndarray, opponents: int | None) -> Iterator[tuple[int, int]]:
    """Completions of one prompt to compare, each two once, the earlier one first."""
    order = np.argsort(prompt_B, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(prompt_B[order])) + 1) if len(order) else ():
        n = len(group)
        if opponents is None or 2 * opponents >= n:
            places: Any = itertools.combinations(range(n), 2)
        else:
            places = sorted({tuple(sorted((a, (a + s) % n))) for a in range(n) for s in range(1, opponents + 1)})
        yield from ((int(group[a]), int(group[b])) for a, b in places)


class Comparison:
    """A judge's function that asks an oracle which of two answers is better, in the words of a template."""

    def __init__(self, oracle: Oracle, template: str | Path = "pair", criterion: str = CRITERION) -> None:
        self.oracle = oracle
        self.template = Template(template, ("prompt", "first", "second"))
        self.criterion = criterion

    def bind(self, device: torch.device | str) -> Comparison:
        bound = copy.copy(self)
        bound.oracle = self.oracle.bind(device)
        return bound

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str], **columns: Any
    ) -> list[float | None]:
        names = [*columns, "criterion", "prompt", "first", "second"]
        rows = zip(*columns.values(), [self.criterion] * len(prompts), prompts, first, second, strict=True)
        return self.oracle([self.template.fill(dict(zip(names, row, strict=True))) for row in rows], ("A", "B"))

    def drain(self) -> dict[str, float]:
        return self.oracle.drain()


class LocalModel:
    """A language model that answers with one of two words, by the log-probabilities of these.

        P(first word) = sigmoid(log p(first word | question) - log p(second word | question))

    The question is one user's message in the model's chat template, or plain text if it has none. A question that is
    longer than the model's positions has no verdict (None); nothing is cut. Metrics: ``judge/verdict_mass``, the mean
    of p(first) + p(second), which is small where the model would rather say something else; ``judge/too_long``.

    Args:
        model: whatever ``prefzoo.generate`` takes: a model or run folder, an adapter, a hub id, a loaded model.
        tokenizer: of a model in memory.
        token_budget: tokens of a batch.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase | None = None, token_budget: int = 16_384
    ) -> None:
        self.model = model
        self.token_budget = token_budget
        self._tokenizer = tokenizer
        self._seen: dict[str, list[float]] = defaultdict(list)

    def bind(self, device: torch.device | str) -> LocalModel:
        from prefzoo.generation import resolve_policy

        bound = copy.copy(self)
        policy, bound._tokenizer = resolve_policy(self.model, self._tokenizer, device=str(device))
        bound.model = policy.requires_grad_(False).eval()
        bound._seen = defaultdict(list)
        return bound

    def __call__(self, questions: Sequence[str], words: tuple[str, str]) -> list[float | None]:
        if not isinstance(self.model, Policy) or self._tokenizer is None:
            return self.bind("cuda" if torch.cuda.is_available() else "cpu")(questions, words)
        policy = self.model
        config = policy.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or math.inf
        encoded = [self._encode(question, words) for question in questions]
        fits = [q for q, (prompt, ends) in enumerate(encoded) if len(prompt) + max(map(len, ends)) <= positions]
        self._seen["judge/too_long"] += [float(q not in set(fits)) for q in range(len(questions))]
        found: list[float | None] = [None] * len(questions)
        if not fits:
            return found
        samples = pack_rows([encoded[q] for q in fits])
        device = next(policy.parameters()).device
        logps_C = token_scores(lambda tree: policy(tree).logps_C, samples, self.token_budget, device, policy.packed)
        owner_C = torch.from_numpy(np.repeat(np.arange(len(samples.completions)), samples.completions.lengths))
        logps_Q2 = torch.zeros(len(samples.completions)).index_add(0, owner_C, logps_C).view(-1, 2)
        self._seen["judge/verdict_mass"] += logps_Q2.exp().sum(1).tolist()
        for q, probability in zip(fits, (logps_Q2[:, 0] - logps_Q2[:, 1]).sigmoid().tolist(), strict=True):
            found[q] = probability
        return found

    def _encode(self, question: str, words: tuple[str, str]) -> tuple[list[int], list[list[int]]]:
        """The ids that both ways of going on share, and what each goes on with."""
        tokenizer = self._tokenizer
        assert tokenizer is not None
        chat = tokenizer.chat_template is not None
        if chat:
            message = [{"role": "user", "content": question.rstrip()}]
            start = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        else:
            start = question.rstrip() + " "
        ends = set(end_ids(tokenizer))
        sides = [list(tokenizer(start + word, add_special_tokens=not chat)["input_ids"]) for word in words]
        for ids in sides:
            while ids and ids[-1] in ends:  # a tokenizer that closes what it reads
                ids.pop()
        shared = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(*sides, strict=False)))
        if shared == 0 or min(map(len, sides)) == shared:
            raise UsageError(f"judge: the tokenizer cannot tell the verdicts {words[0]!r} and {words[1]!r} apart.")
        return sides[0][:shared], [ids[shared:] for ids in sides]

    def drain(self) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self._seen.items()}
        self._seen.clear()
        return means


@SOURCES.register
def judge(
    *, model: Any = None, endpoint: str | None = None, template: str | None = None, criterion: str = CRITERION,
    both_orders: bool = True, opponents: int | None = None, against: str | None = None,
    key_env: str = "OPENAI_API_KEY", cache: str | None = None,
    max_calls: int | None = None, concurrency: int = 8, timeout: float = 60.0, retries: int = 5,
    logprobs: bool = False, max_tokens: int = 1024,
) -> Judge:  # fmt: skip
    """A language model as a judge: one of yours (``model`` is a folder), or one behind an OpenAI-compatible endpoint.

    Args:
        model: folder, run, hub id or loaded model; with ``endpoint`` the model's name there.
        endpoint: its address, such as ``http://localhost:8000`` (``/v1/chat/completions`` is added).
        template: what is asked: ``pair`` (one letter), ``pair_reasoned`` (reasons, then a verdict; endpoints only), or
            a text file with {prompt}, {first} and {second}, and {criterion} or columns of the data.
        criterion: what makes an answer better.
        both_orders, opponents, against: as in :class:`Judge`.
        key_env, cache, max_calls, concurrency, timeout, retries, logprobs, max_tokens: as in
            :class:`prefzoo.feedback.Endpoint`; without ``endpoint`` they have no effect.

    Source: a language model's preferences as labels: Bai et al., arXiv:2212.08073; Lee et al., arXiv:2309.00267.

    Example::

        prefzoo train grpo ... --reward "judge(endpoint=http://localhost:8000, model=my-judge, cache=verdicts)"
        prefzoo train grpo ... --reward "judge(model=my-judge)"
    """
    transport = {
        "key_env": key_env, "cache": cache, "max_calls": max_calls, "concurrency": concurrency, "timeout": timeout,
        "retries": retries, "logprobs": logprobs, "max_tokens": max_tokens,
    }  # fmt: skip
    oracle = oracle_of("judge", model, endpoint, transport)
    if template == "pair_reasoned" and (endpoint is None or logprobs):
        raise UsageError(
            "judge: template 'pair_reasoned' asks for reasons before the verdict, which is read from the text of an "
            "endpoint's answer; a local model and logprobs read the first token: take 'pair'."
        )
    asks = Comparison(oracle, template or "pair", criterion)
    return Judge(asks, both_orders=both_orders, opponents=opponents, against=against, name="judge")


def oracle_of(who: str, model: Any, endpoint: str | None, transport: dict[str, Any]) -> Oracle:
    """What a model, or a model's name at an endpoint, answers with."""
    from prefzoo.feedback.endpoint import Endpoint

    if model is None:
        cure = "its name there" if endpoint is not None else "a folder or hub id, or endpoint=... and the name there"
        raise UsageError(f"{who}: which model? Give model=, {cure}.")
    if endpoint is not None:
        return Endpoint(endpoint, str(model), **transport)
    return LocalModel(model)
