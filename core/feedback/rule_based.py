"""Rule-based rewards: named statements about a completion, each with a probability, combined into one reward."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefzoo.data.samples import Samples
from prefzoo.feedback.judges import Oracle, checked_probabilities, oracle_of
from prefzoo.feedback.rewards import FunctionReward, RewardSource, resolve_reward
from prefzoo.feedback.sources import SOURCES
from prefzoo.feedback.templates import Template
from prefzoo.plugins import import_function
from prefzoo.registry import UsageError, suggest
from prefzoo.yaml_numbers import read_yaml

Way = Literal["sum", "minimum", "product"]
KINDS = ("pattern", "function", "question")
SETS = Path(__file__).parent / "rule_sets"


@dataclass(frozen=True)
class Rule:
    """A statement about a completion.

    Args:
        pattern: a regular expression: 1 where it is found in the completion, else 0.
        function: with TRL's signature, giving probabilities: a function, or ``my_file.py:function``.
        question: a statement in words, for a judge: "The answer apologises."
        weight: in the sum; fitted by :meth:`Rules.fit`. None: 1, or -1 of a violation.
        violation: the statement describes what is *not* wanted: ``minimum`` and ``product`` take 1 - p of it.
    """

    pattern: str | None = None
    function: Callable[..., Any] | str | None = None
    question: str | None = None
    weight: float | None = None
    violation: bool = False

    @property
    def weighs(self) -> float:
        return self.weight if self.weight is not None else (-1.0 if self.violation else 1.0)


class Rules(RewardSource):
    """A reward from rules.

        sum: R = sum_k w_k p_k        minimum: R = min_k q_k        product: R = prod_k q_k
        q_k = 1 - p_k for a rule that describes a violation, else p_k

    Add it to a preference reward by giving both: ``reward=["runs/rm", prefzoo.feedback.Rules(...)]``. No KL enters
    here. A completion that one rule says nothing about (None) has no score.

    Args:
        rules: name -> :class:`Rule`, or its fields as a mapping, or a function.
        combine: see above.
        judge: what answers questions: a model's folder, an :class:`prefzoo.feedback.Endpoint` or a
            :class:`prefzoo.feedback.LocalModel`; needed where a rule is a question.

    Convention: RBR's features are probabilities of a language model's verdict and the weights are fitted
    (:meth:`fit`). Sparrow's rules are learned from violations that people found, here they are whatever gives a
    probability; in RL it adds the mean over rules to the preference reward, which is ``sum`` with weights 1/n, and when
    it reranks it multiplies.

    Metrics: ``rules/<name>``, the mean probability of each.

    Source: Mu et al., Rule Based Rewards, arXiv:2411.01111; Glaese et al., Sparrow, arXiv:2209.14375.

    Example::

        rules = prefzoo.feedback.Rules({
            "link": {"pattern": "https?://", "violation": True},
            "polite": {"question": "The answer is polite."},
        }, judge="my-model")
        prefzoo.train("grpo", ..., reward=["runs/rm", rules])
    """

    def __init__(
        self, rules: Mapping[str, Any], *, combine: Way = "sum", judge: Any = None, name: str = "rules"
    ) -> None:
        if not isinstance(rules, Mapping) or not rules:
            raise UsageError("rules: give a mapping, name -> rule, with at least one rule.")
        if combine not in ("sum", "minimum", "product"):
            raise UsageError(f"rules, option 'combine': expected sum, minimum or product, got {combine!r}.")
        self.names = tuple(str(rule) for rule in rules)
        self.rules = tuple(_rule(str(rule), given) for rule, given in rules.items())
        self.how = combine
        self.name = name
        self.judge: Any = oracle_of("rules", str(judge), None, {}) if isinstance(judge, str | Path) else judge
        self._template = Template("question", ("criterion", "completion"))
        self.template = self._template.text
        asks = next((n for n, r in zip(self.names, self.rules, strict=True) if r.question is not None), None)
        if asks is not None and judge is None:
            raise UsageError(f"rules: {asks!r} is a question, and nobody answers it: give judge= a model or endpoint.")
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._seen: dict[str, list[float]] = defaultdict(list)

    @property
    def verifies(self) -> bool:  # type: ignore[override]
        return all(rule.question is None for rule in self.rules)

    @property
    def weights(self) -> dict[str, float]:
        return {name: rule.weighs for name, rule in zip(self.names, self.rules, strict=True)}

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu") -> Rules:
        bound = copy.copy(self)
        bound._tokenizer, bound._seen = tokenizer, defaultdict(list)
        if self.judge is not None and not self.verifies:
            bound.judge = self.judge.bind(device)
        return bound

    def __call__(self, samples: Samples) -> Tensor:
        p_BK = self.probabilities(samples)
        for name, p_B in zip(self.names, p_BK.T, strict=True):
            self._seen[f"rules/{name}"] += p_B[~p_B.isnan()].tolist()
        if self.how == "sum":
            return p_BK @ torch.tensor([rule.weighs for rule in self.rules])
        violation_K = torch.tensor([rule.violation for rule in self.rules])
        kept_BK = torch.where(violation_K, 1 - p_BK, p_BK)
        return kept_BK.amin(1) if self.how == "minimum" else kept_BK.prod(1)

    @property
    def width(self) -> int:
        return len(self.rules) if self.how == "sum" else 1

    def objectives(self, samples: Samples) -> Tensor:
        """In a sum, what each rule adds, (B, K); else the one reward."""
        if self.how != "sum":
            return self(samples)[:, None]
        return self.probabilities(samples) * torch.tensor([rule.weighs for rule in self.rules])

    def probabilities(self, samples: Samples) -> Tensor:
        """How likely each statement is true of each completion, (B, K); NaN where nothing is said."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise UsageError("rules: no tokenizer to read completions with: call bind(tokenizer).")
        ids = [samples.completions[b].tolist() for b in range(len(samples.completions))]
        answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = [samples.extra["prompt"][p] for p in samples.prompt_B]
        columns: dict[int, list[float]] = {}
        for k, rule in enumerate(self.rules):
            if rule.pattern is not None:
                columns[k] = [float(re.search(rule.pattern, answer) is not None) for answer in answers]
            elif rule.function is not None:
                function = import_function(rule.function) if isinstance(rule.function, str) else rule.function
                scores = FunctionReward(function, tokenizer)(samples)
                listed = [None if s != s else s for s in scores.tolist()]
                columns[k] = checked_probabilities(listed, len(answers), f"rule {self.names[k]!r}")
        # All questions together, so that an endpoint answers them side by side.
        asked = [(k, rule.question) for k, rule in enumerate(self.rules) if rule.question is not None]
        texts = [
            self._template.fill({"criterion": question, "prompt": prompt, "completion": answer})
            for _, question in asked
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        if texts:
            found = checked_probabilities(self.judge(texts, ("YES", "NO")), len(texts), "the rules' judge")
            for place, (k, _) in enumerate(asked):
                columns[k] = found[place * len(answers) : (place + 1) * len(answers)]
        return torch.tensor([columns[k] for k in range(len(self.rules))], dtype=torch.float32).T

    def fit(
        self,
        pairs: Any,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        base: Any = None,
        margin: float = 1.0,
        l1: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> Rules:
        """The same rules with weights that make the chosen completions of pairs win by a margin.

            min_w  1/N sum_i max(0, margin - (R(chosen_i) - R(rejected_i)))  +  l1 sum_k |w_k|
            R = base + sum_k w_k p_k

        A linear program, solved exactly, so that the same pairs give the same weights.

        Args:
            pairs: comparisons of any form with chosen and rejected answers; RBR makes them from completions that are
                ideal, merely acceptable or unacceptable by the rules.
            tokenizer: the policy's, unless the rules are bound to one.
            base: the preference reward that they will be added to, as ``reward=`` takes it; None: 0.
            margin: 1 in the paper, in units of the base reward.
            l1: of many best solutions it takes that of the smallest weights. Departure: the paper has no such term.

        Source: Mu et al., arXiv:2411.01111, the hinge loss of their weights.
        """
        from scipy import sparse
        from scipy.optimize import linprog

        from prefzoo.data.tokens import tokenise

        tokenizer = tokenizer or self._tokenizer
        if tokenizer is None:
            raise UsageError("rules.fit: give tokenizer=, that of the policy.")
        if self.how != "sum":
            raise UsageError(f"rules.fit: weights belong to combine='sum', not to {self.how!r}.")
        if margin <= 0 or l1 < 0:
            raise UsageError(f"rules.fit: margin must be above 0 and l1 at least 0, got {margin} and {l1}.")
        samples, _ = tokenise(pairs, tokenizer, "pairs")
        bound = self.bind(tokenizer, device)
        p_BK = bound.probabilities(samples).double().numpy()
        base_B = np.zeros(len(p_BK))
        if base is not None:
            base_B = resolve_reward(base, tokenizer, device)(samples).double().numpy()
        ahead_NK, lead_N = p_BK[0::2] - p_BK[1::2], base_B[0::2] - base_B[1::2]
        known_N = ~(np.isnan(ahead_NK).any(1) | np.isnan(lead_N))
        ahead_NK, lead_N = ahead_NK[known_N], lead_N[known_N]
        n, k = ahead_NK.shape
        if not n or not np.abs(ahead_NK).max() > 0:
            raise UsageError("rules.fit: no pair in which a rule tells chosen from rejected; nothing can be fitted.")
        # Variables: w = w_plus - w_minus, each at least 0, and the slack of every pair.
        cost = np.concatenate([np.full(2 * k, l1), np.full(n, 1 / n)])
        ahead = sparse.csr_array(ahead_NK)
        solved = linprog(
            cost, A_ub=sparse.hstack([-ahead, ahead, -sparse.eye_array(n)]), b_ub=lead_N - margin, bounds=(0, None)
        )
        if solved.status != 0:
            raise UsageError(f"rules.fit: the linear program was not solved ({solved.message}).")
        weights = solved.x[:k] - solved.x[k : 2 * k]
        fitted = copy.copy(bound)
        fitted.rules = tuple(replace(r, weight=float(w)) for r, w in zip(self.rules, weights, strict=True))
        return fitted

    def save(self, file: str | Path) -> Path:
        """A YAML file that ``rules(FILE.yaml)`` and :func:`rules` read."""
        rows: dict[str, dict[str, Any]] = {}
        for name, rule in zip(self.names, self.rules, strict=True):
            if rule.function is not None and not isinstance(rule.function, str):
                raise UsageError(f"rule {name!r}: a function cannot be written; name it, 'my_file.py:function'.")
            rows[name] = {key: getattr(rule, key) for key in KINDS if getattr(rule, key) is not None}
            rows[name] |= {"weight": rule.weighs} | ({"violation": True} if rule.violation else {})
        Path(file).write_text(yaml.safe_dump(rows, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return Path(file)

    def drain(self) -> tuple[dict[str, float], dict[str, list[Any]]]:
        means = {name: sum(values) / len(values) for name, values in self._seen.items() if values}
        self._seen.clear()
        return means | (self.judge.drain() if self.judge is not None else {}), {}


def _rule(name: str, given: Any) -> Rule:
    rule = given
    if callable(given):
        rule = Rule(function=given)
    elif isinstance(given, Mapping):
        for key in given:
            if key not in Rule.__dataclass_fields__:
                known = Rule.__dataclass_fields__
                raise UsageError(
                    f"rule {name!r} has no field {key!r}{suggest(str(key), known)} It has {', '.join(known)}."
                )
        rule = Rule(**given)
    if not isinstance(rule, Rule) or sum(getattr(rule, kind) is not None for kind in KINDS) != 1:
        raise UsageError(f"rule {name!r}: give one of {', '.join(KINDS)}; got {given!r:.100}.")
    if rule.pattern is not None:
        try:
            re.compile(rule.pattern)
        except (re.error, TypeError) as error:
            raise UsageError(f"rule {name!r}, pattern {rule.pattern!r}: {error}.") from None
    number = isinstance(rule.weight, int | float) and not isinstance(rule.weight, bool) and np.isfinite(rule.weight)
    if rule.weight is not None and not number:
        raise UsageError(f"rule {name!r}, weight: expected a number, got {rule.weight!r}.")
    return replace(rule, weight=rule.weighs)


def _rule_file(name: str) -> Path:
    """The file of a set of the package (``sparrow``), or the user's own."""
    ours = SETS / f"{name}.yaml"
    return ours if name in {file.stem for file in SETS.glob("*.yaml")} else Path(name)


@SOURCES.register
def rules(
    file: Any, *, combine: Way = "sum", model: Any = None, endpoint: str | None = None, key_env: str = "OPENAI_API_KEY",
    cache: str | None = None, max_calls: int | None = None, concurrency: int = 8, timeout: float = 60.0,
    retries: int = 5, logprobs: bool = False, max_tokens: int = 1024,
) -> Rules:  # fmt: skip
    """Rules of a YAML file, ``rules(rules.yaml, model=my-judge)``: name -> the fields of :class:`Rule`; or a set of the
    package, ``rules(sparrow, model=my-judge)``: Sparrow's in our words, each a violation.

    ``model`` and ``endpoint`` answer rules that are questions, with the options that ``judge(...)`` has.
    """
    transport = {
        "key_env": key_env, "cache": cache, "max_calls": max_calls, "concurrency": concurrency, "timeout": timeout,
        "retries": retries, "logprobs": logprobs, "max_tokens": max_tokens,
    }  # fmt: skip
    given = file if isinstance(file, Mapping) else read_yaml(_rule_file(str(file)))
    answers: Oracle | None = None
    if model is not None or endpoint is not None:
        answers = oracle_of("rules", model, endpoint, transport)
    return Rules(given, combine=combine, judge=answers)
