"""A language model whose responses can be enumerated, and that the engine trains like any other.

Its logits are a table with a row for every text read so far, so it can be any distribution over the responses; there is
no other arithmetic, and a training step costs a few milliseconds. Two prompts, nine responses of two or three tokens
each: a letter of ``abc``, then a letter of ``AB`` or the end, then the end. Everything else has a fixed, tiny
probability.

    >>> world = EnumerableWorld.make()
    >>> world.log_probs().exp().sum(-1).round(decimals=3).tolist()
    [1.0, 1.0]

The text read so far is found as attention finds it, by a mean over what each token may see: packed batches, shared
prompts and the decoding loop are those of every transformer. Legend: **P** prompts, **R** responses.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from prefzoo.algorithm import Algorithm
from prefzoo.data.chat import encode_sides
from prefzoo.data.rows import Row
from prefzoo.data.samples import Kind
from prefzoo.feedback import Judge, Rules
from prefzoo.models.causal import prepare
from prefzoo.models.roles import Policy, Scorer
from prefzoo.models.tree import TreeBatch, pack_rows
from prefzoo.theory.policies import END, Tabular

PROMPTS = ("p", "qq")
FIRST, SECOND = "abc", "AB"
RESPONSES = tuple(a + b for a, b in itertools.product(FIRST, ("", *SECOND)))
WORDS = ("<pad>", "<eos>", "<other>", "p", "q", *FIRST, *SECOND, *"12345")  # digits: of control words
EOS = WORDS.index("<eos>")
NEVER = -15.0  # logit of a token that may not follow: finite, so that the log-probability of any text is
SLOTS = 128  # rows of the table for each last token; texts are dealt to them by a hash


def may_follow(token: str) -> str:
    """Tokens that may come after this one, the end written as a full stop."""
    if token in FIRST:
        return f"{SECOND}."
    return "." if token in SECOND or token == "<eos>" else FIRST


class EnumerableConfig(PretrainedConfig):
    """Configuration of the table."""

    model_type = "prefzoo_enumerable"

    def __init__(self, **options: Any) -> None:
        self.vocab_size, self.hidden_size = len(WORDS), 2 * len(WORDS)
        self.max_position_embeddings = 4096
        super().__init__(**{"pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": None} | options)


class _Base(PreTrainedModel):
    config_class = EnumerableConfig
    base_model_prefix = "model"
    _supports_attention_backend = True
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """The table is filled where the model is made."""


class Codes(nn.Module):
    """A number for each token; it stands where other models have their embeddings, and is not trained."""

    weight: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", ((torch.arange(size) * 40_503 + 11) % 8191)[:, None].float(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids, 0]


class Trunk(_Base):
    """Token ids to hidden states: the row of the table that belongs to the text so far, and which tokens may not
    follow, (1, N, 2 V)."""

    legal_SV: Tensor

    def __init__(self, config: EnumerableConfig) -> None:
        super().__init__(config)
        size = len(WORDS)
        self.table = nn.Embedding(size * SLOTS, size)
        legal_VV = torch.zeros(size, size, dtype=torch.bool)
        for row, token in enumerate(WORDS):
            legal_VV[row, [EOS if t == "." else WORDS.index(t) for t in may_follow(token)]] = True
        self.register_buffer("legal_SV", legal_VV.repeat_interleave(SLOTS, 0), persistent=False)
        self.codes = Codes(size)

    def get_input_embeddings(self) -> nn.Module:
        return self.codes

    def forward(self, input_ids: Tensor, **options: Any) -> BaseModelOutput:
        state = self.states(input_ids, **options)
        rows, illegal = self.table(state), ~self.legal_SV[state]
        return BaseModelOutput(last_hidden_state=torch.cat([rows, illegal.to(rows.dtype)], -1))

    def states(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_plan: Any = None, **_: Any
    ) -> Tensor:
        """The row of the table that belongs to the text up to each token."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        place = position_ids + 1
        # Whole numbers below 2^53, so the text's code is exact; a head of size one that looks at all tokens alike.
        value = (self.codes(input_ids) * place).double()[:, None, :, None]
        nothing = torch.zeros_like(value)
        if attention_plan is None:
            seen = F.scaled_dot_product_attention(nothing, nothing, value, is_causal=True).transpose(1, 2)
        else:
            seen = attention_plan.attend(0, nothing, nothing, value, 1.0, None)
        code = (seen[:, :, 0, 0] * place).round().long()
        return input_ids * SLOTS + code % SLOTS


class Head(nn.Module):
    """Logits are what the table says; those of tokens that may not follow are fixed."""

    def forward(self, hidden: Tensor) -> Tensor:
        rows, illegal = hidden.chunk(2, -1)
        return rows.masked_fill(illegal > 0.5, NEVER)


class EnumerableLM(_Base):
    """The trunk with its head."""

    def __init__(self, config: EnumerableConfig) -> None:
        super().__init__(config)
        self.model = Trunk(config)
        self.head = Head()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, logits_to_keep: Any = 0, **options: Any) -> CausalLMOutput:
        hidden = self.model(input_ids, **options).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutput(logits=self.head(hidden[:, kept]))


def tokenizer() -> PreTrainedTokenizerBase:
    """One token for each letter of the model; all else is ``<other>``."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<other>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("<eos>|<pad>|."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<other>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def table(seed: int, spread: float) -> EnumerableLM:
    """A model with random logits; the global random stream is not touched."""
    model = EnumerableLM(EnumerableConfig())
    weight = model.model.table.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight.copy_(spread * noise)
    return prepare(model)


def laboratory_policy(log_probs_R: Tensor) -> Tabular:
    """One prompt's responses as the laboratory has them, in float64 and without an engine."""
    letters = {letter: i + 1 for i, letter in enumerate(FIRST + SECOND)}
    strings = [(*map(letters.__getitem__, response), END) for response in RESPONSES]
    policy = Tabular(len(letters) + 1, 3, strings=strings).become(log_probs_R)
    with torch.no_grad():
        policy.table.clamp_(min=NEVER)
    return policy


@dataclass(frozen=True)
class EnumerableWorld:
    """The model, what is asked of it, and what is true: the reward of every response.

    Each prompt's nine responses are worth -1, -3/4, ..., 1, in an order of its own; sums of such numbers are exact.
    Data were written by a behaviour that is even over the responses. Labels and feedback speak of ``told_PR``, which is
    the truth but in a control.
    """

    start: EnumerableLM
    words: PreTrainedTokenizerBase
    rewards_PR: Tensor
    told_PR: Tensor

    @classmethod
    def make(cls, seed: int = 0, spread: float = 0.6) -> Self:
        """The world of a seed; ``spread`` is that of the start's logits."""
        generator = torch.Generator().manual_seed(1000 + seed)
        order_PR = torch.stack([torch.randperm(len(RESPONSES), generator=generator) for _ in PROMPTS])
        rewards_PR = (order_PR.double() - 4) / 4
        return cls(table(seed, spread), tokenizer(), rewards_PR, rewards_PR)

    def control(self) -> EnumerableWorld:
        """The same with permuted feedback: best and worst exchanged, second best and second worst, ..."""
        return replace(self, told_PR=-self.rewards_PR)

    def constant(self, value: float) -> EnumerableWorld:
        """The same, told that all responses are worth this."""
        return replace(self, told_PR=torch.full_like(self.told_PR, value))

    def shifted(self, by: float) -> EnumerableWorld:
        """The same, all rewards told larger by so much."""
        return replace(self, told_PR=self.told_PR + by)

    # ---------------------------------------------------------------------------------------- what is known exactly

    @cached_property
    def everything(self) -> TreeBatch:
        """Every response to every prompt."""
        rows = [(p, r) for p in PROMPTS for r in RESPONSES]
        prompts, answers = encode_sides(self.words, [p for p, _ in rows], [[r for _, r in rows]])
        ids, size = [a for (a,) in answers], len(RESPONSES)
        return TreeBatch.of(pack_rows([(prompts[i], ids[i : i + size]) for i in range(0, len(rows), size)]))

    @torch.no_grad()
    def log_probs(self, policy: Policy | None = None) -> Tensor:
        """Log-probability of every response, (P, R); of the start where no policy is given."""
        policy = Policy(self.start) if policy is None else policy
        tree = self.everything
        logps_C = policy(tree).logps_C
        assert logps_C is not None
        nothing_B = torch.zeros(len(tree.mask_BT), dtype=torch.float64)
        return nothing_B.index_add(0, tree.owner_C, logps_C.double()).view(len(PROMPTS), -1)

    @torch.no_grad()
    def scores(self, scorer: Scorer) -> Tensor:
        """A reward model's score of every response, (P, R)."""
        rewards_B = scorer(self.everything).rewards_B
        assert rewards_B is not None
        return rewards_B.double().view(len(PROMPTS), -1)

    @torch.no_grad()
    def step_scores(self, scorer: Scorer) -> Tensor:
        """The probability that a process reward model gives the last step of every response, (P, R)."""
        tree = self.everything
        steps_C = scorer(tree, steps=True).steps_C
        assert steps_C is not None
        last_B = tree.mask_BT.sum(-1).cumsum(0) - 1
        return steps_C[last_B].double().view(len(PROMPTS), -1).sigmoid()

    @torch.no_grad()
    def model_of(self, log_probs_PR: Tensor) -> EnumerableLM:
        """A model that gives the responses these log-probabilities; texts that no data hold are as at the start."""
        model = copy.deepcopy(self.start)
        answers = [[*map(WORDS.index, response), EOS] for response in RESPONSES]
        for i, prompt in enumerate(PROMPTS):
            asked = [*map(WORDS.index, prompt)]
            for prefix in {tuple(answer[:t]) for answer in answers for t in range(len(answer))}:
                row = model.model.table.weight[model.model.states(torch.tensor([[*asked, *prefix]]))[0, -1]]
                next_tokens = sorted({a[len(prefix)] for a in answers if tuple(a[: len(prefix)]) == prefix})
                for token in next_tokens:
                    goes_on = [j for j, a in enumerate(answers) if tuple(a[: len(prefix) + 1]) == (*prefix, token)]
                    row[token] = log_probs_PR[i, goes_on].logsumexp(0)
                row[next_tokens] -= row[next_tokens].logsumexp(0)
        return model

    def expected_reward(self, log_probs_PR: Tensor) -> float:
        """True reward of a sample, the mean over the prompts."""
        return float((log_probs_PR.softmax(-1) * self.rewards_PR).sum(-1).mean())

    def gained(self, log_probs_PR: Tensor) -> float:
        """The share of the way from the start's expected reward to that of the best responses."""
        start, best = self.expected_reward(self.log_probs()), float(self.rewards_PR.max(-1).values.mean())
        return (self.expected_reward(log_probs_PR) - start) / (best - start)

    def kl_to_start(self, log_probs_PR: Tensor) -> float:
        """KL(policy || start) of whole responses in nats, the mean over the prompts."""
        return float((log_probs_PR.exp() * (log_probs_PR - self.log_probs())).sum(-1).mean())

    def entropy(self, log_probs_PR: Tensor) -> float:
        """Entropy of the responses in nats, the mean over the prompts."""
        return float(-(log_probs_PR.exp() * log_probs_PR).sum(-1).mean())

    def optimum(self, beta: float) -> Tensor:
        """Log-probabilities of the KL-regularised optimum, ref exp(r / beta) normalised, (P, R)."""
        return (self.log_probs() + self.rewards_PR / beta).log_softmax(-1)

    # ---------------------------------------------------------------------------------------- what is trained on

    def wins(self) -> Tensor:
        """Probability that the row's response is preferred to the column's: Bradley-Terry labels, (P, R, R)."""
        return torch.sigmoid(self.told_PR[:, :, None] - self.told_PR[:, None])

    def win_rate(self) -> Tensor:
        """Probability of beating another response that the behaviour has written, (P, R)."""
        apart_RR = 1 - torch.eye(len(RESPONSES), dtype=torch.float64)
        return (self.wins() * apart_RR).sum(-1) / apart_RR.sum(-1)

    def reward(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The reward function of a run; what is no response is worth less than all of them."""
        worst = float(self.told_PR.min()) - 1.0
        told = self._told
        return [told.get((p, c), worst) for p, c in zip(prompts, completions, strict=True)]

    def cost(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Another objective: one for each of the letters b and B, whatever the reward."""
        return [float("b" in c.lower()) for c in completions]

    @property
    def rules(self) -> Rules:
        """One rule: no letter b or B."""
        return Rules({"b": {"pattern": "[bB]", "violation": True}})

    @property
    def judge(self) -> Judge:
        """A judge who prefers one response to another with the probability of the labels."""
        told = self._told

        def preferred(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
            said = zip(prompts, first, second, strict=True)
            gaps = [told.get((p, a), -2.0) - told.get((p, b), -2.0) for p, a, b in said]
            return [1 / (1 + math.exp(-gap)) for gap in gaps]

        return Judge(preferred)

    @cached_property
    def _told(self) -> dict[tuple[str, str], float]:
        return {(p, r): float(self.told_PR[i, j]) for i, p in enumerate(PROMPTS) for j, r in enumerate(RESPONSES)}

    def rows(self, kind: Kind, columns: Iterable[str] = (), *, weighted: bool = True, beta: float = 0.5) -> list[Row]:
        """Data of a kind: everything that could be in it, weighted with its probability.

        Args:
            columns: further columns that a loss reads of pairs: margin, probability.
            weighted: False: without weights; every pair once, the better response chosen.
            beta: of completions, which demonstrate the policy ref exp(r / beta).
        """
        makers: dict[Kind, Callable[[], list[Row]]] = {
            "prompts": self._prompts, "pairs": self._pairs, "unpaired": self._unpaired, "rankings": self._rankings,
            "scored": self._scored, "completions": functools.partial(self._completions, beta=beta),
            "steps": self._steps,
        }  # fmt: skip
        made = makers[kind]()
        keep = {"weight"} if weighted else set[str]()
        drop = {"margin", "probability", "weight"} - keep - set(columns)
        if kind == "pairs" and not weighted:
            made = [row for row in made if row["margin"] > 0]
        return [{k: v for k, v in row.items() if k not in drop} for row in made]

    def _each(self) -> Iterator[tuple[int, int, Row]]:
        for i, prompt in enumerate(PROMPTS):
            for j, response in enumerate(RESPONSES):
                yield i, j, {"prompt": prompt, "completion": response}

    def _prompts(self) -> list[Row]:
        return [{"prompt": prompt} for prompt in PROMPTS]

    def _pairs(self) -> list[Row]:
        """Every ordered pair; the weight is twice the probability of this label."""
        wins_PRR = self.wins()
        return [
            {"prompt": prompt, "chosen": RESPONSES[j], "rejected": RESPONSES[k], "weight": 2 * float(wins_PRR[i, j, k]),
             "probability": float(wins_PRR[i, j, k]), "margin": float(self.told_PR[i, j] - self.told_PR[i, k])}
            for i, prompt in enumerate(PROMPTS) for j, k in itertools.permutations(range(len(RESPONSES)), 2)
        ]  # fmt: skip

    def _unpaired(self) -> list[Row]:
        """Every response, desirable as often as it beats another one."""
        rate_PR = self.win_rate()
        return [
            {**row, "label": label, "weight": 2 * float(rate_PR[i, j] if label else 1 - rate_PR[i, j])}
            for i, j, row in self._each()
            for label in (True, False)
        ]

    def _rankings(self) -> list[Row]:
        """All responses with their scores."""
        return [
            {"prompt": prompt, "completions": list(RESPONSES), "scores": self.told_PR[i].tolist()}
            for i, prompt in enumerate(PROMPTS)
        ]

    @cached_property
    def other(self) -> EnumerableLM:
        """A model far from the start and from the teacher."""
        return self.model_of(self.optimum(0.1))

    @cached_property
    def teacher(self) -> EnumerableLM:
        """A model that has learned: ref exp(r / 0.5), of what is told."""
        return self.model_of(replace(self, rewards_PR=self.told_PR).optimum(0.5))

    def rows_for(self, algorithm: Algorithm) -> list[Row]:
        """Data of the algorithm's kind, with the columns that its losses read."""
        losses = [t.loss for s in algorithm.stages for t in s.terms]
        columns = {column for loss in losses for column in loss.columns}
        read = {column for s in algorithm.stages for column in getattr(s.credit, "reads", ())}
        kind = algorithm.data
        if kind == "rankings" and not columns & {"score", "scores"}:
            return self.drawn_rankings()
        rows = self.rows(kind, columns, weighted=all(loss.by_row for loss in losses))
        if kind == "unpaired" and "score" in read:
            rows = [{**row, "score": self._told[row["prompt"], row["completion"]]} for row in rows]
        return rows

    def drawn_rankings(self) -> list[Row]:
        """Lists of three responses in every order, each with its probability under Plackett and Luce."""
        size, rows = len(RESPONSES), list[Row]()
        for i, prompt in enumerate(PROMPTS):
            for first in range(size):
                shown = [first, (first + 1) % size, (first + 3) % size]
                for order in itertools.permutations(shown):
                    told_K = self.told_PR[i, list(order)]
                    log_p = sum(float(told_K[k] - told_K[k:].logsumexp(0)) for k in range(len(order)))
                    rows.append({"prompt": prompt, "completions": [RESPONSES[j] for j in order],
                                 "ranks": [1, 2, 3], "weight": 6 * math.exp(log_p)})  # fmt: skip
        return rows

    def _scored(self) -> list[Row]:
        return [{**row, "score": float(self.told_PR[i, j])} for i, j, row in self._each()]

    def _completions(self, beta: float) -> list[Row]:
        """Demonstrations of the KL-regularised optimum."""
        shown_PR = replace(self, rewards_PR=self.told_PR).optimum(beta).exp()
        return [{**row, "weight": len(RESPONSES) * float(shown_PR[i, j])} for i, j, row in self._each()]

    def _steps(self) -> list[Row]:
        """Responses in steps of one letter, each right as often as the response would beat another one."""
        rate_PR = self.win_rate()
        return [
            {
                "prompt": row["prompt"],
                "completions": [*row["completion"]],
                "labels": [label] * len(row["completion"]),
                "weight": 2 * float(rate_PR[i, j] if label else 1 - rate_PR[i, j]),
            }
            for i, j, row in self._each()
            for label in (True, False)
        ]
