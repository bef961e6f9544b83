"""What the run's ``reward=`` may be, behind one interface: samples in, one score per completion out."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import json
import math
import os
import threading
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prefzoo.data.samples import Samples
from prefzoo.feedback.sources import SOURCES, named_source
from prefzoo.feedback.verifiers import KEYWORDS, VERIFIERS, verifier
from prefzoo.models.folders import REWARD_FILE, no_bars, run_model
from prefzoo.models.load import load_scorer
from prefzoo.models.roles import Scorer
from prefzoo.models.scorers import open_classifier
from prefzoo.models.tokenizer import open_tokenizer, same_tokens
from prefzoo.models.tree import packed
from prefzoo.plugins import import_function, names_function
from prefzoo.registry import UsageError, suggest

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Pending:
    """A score to come: ``result()`` makes it, or waits for it where it is made already; ``cancel()`` gives it up."""

    result: Callable[[], Tensor]
    cancel: Callable[[], object] = lambda: None
    running: bool = False


class RewardSource:
    """Scores completions. ``verifies``: it checks (a function, a verifier) rather than judges (a reward model).
    ``compares``: it can only compare completions of one prompt, and its score is a mean probability of winning.

    A subclass has ``name``, ``verifies`` and ``__call__``. The engine tells where the run is before a call
    (:meth:`begin`) and collects what was logged after it (:meth:`drain`).
    """

    name: str
    verifies: bool
    compares: bool = False

    def __call__(self, samples: Samples) -> Tensor:
        """One score per completion (B,), NaN where there is none."""
        raise NotImplementedError

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu") -> RewardSource:
        """This source, ready for completions of a policy with that tokenizer: what it names by folder is loaded."""
        return self

    @property
    def width(self) -> int:
        """K, how many objectives it has."""
        return 1

    def objectives(self, samples: Samples) -> Tensor:
        """The scores that are several, each by itself (B, K); here the only one."""
        return self(samples)[:, None]

    def start(self, samples: Samples) -> Pending:
        """Begin what can go on beside other work; here nothing: the score is made when it is asked for."""
        return Pending(functools.partial(self, samples))

    def begin(self, state: Any) -> None:
        """Where the run is: a namespace with ``global_step``, ``max_steps`` and ``epoch``."""

    def drain(self) -> tuple[dict[str, float], dict[str, list[Any]]]:
        """Metrics since the last drain, as means, and columns, aligned with the completions of the last call."""
        return {}, {}


class FunctionReward(RewardSource):
    """A function with TRL's signature, plain or ``async``; it returns a list of float or None, one per completion.

    It is called with keywords, and gets of them those that it names, or all if it has ``**kwargs``: ``prompts``,
    ``completions``, ``completion_ids`` and every other column of the data as lists, one item per completion;
    ``trainer_state`` with ``global_step``, ``max_steps`` and ``epoch``; ``log_metric(name, number)``, averaged until
    the next line of metrics (NaN is left out); ``log_extra(column, values)``, shown beside the completions.

    Errors: a wrong result, an argument that the data does not have, and what the function raises (``__cause__``).
    Source: TRL 1.16. Departures: no ``environments``; NaN is refused, since it may be a bug: None says no reward.
    """

    verifies = True

    def __init__(self, function: RewardFunction, tokenizer: PreTrainedTokenizerBase) -> None:
        self.function = function
        self.tokenizer = tokenizer
        plain = function.func if isinstance(function, functools.partial) else function
        self.name = getattr(plain, "__name__", type(plain).__name__)
        self._async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(plain).__call__)
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:
            raise UsageError(f"reward: {function!r} does not say which arguments it takes; wrap it in a def.") from None
        # TRL passes everything to everybody; a function without **kwargs gets the columns that it names.
        by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._accepted = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else by_name.keys()
        self._required = [name for name, p in by_name.items() if p.default is p.empty]
        self._state: Any = SimpleNamespace(global_step=0, max_steps=0, epoch=0.0)  # outside of a run
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._columns: dict[str, list[Any]] = {}

    def begin(self, state: Any) -> None:
        self._state = state

    def drain(self) -> tuple[dict[str, float], dict[str, list[Any]]]:
        return _means(self._metrics), self._columns

    def __call__(self, samples: Samples) -> Tensor:
        return self.start(samples).result()

    def start(self, samples: Samples) -> Pending:
        keywords, self._columns = self._keywords(samples), {}
        if not self._async:
            return Pending(lambda: self._scores(keywords, self._call))
        running = _submit(self._call(keywords))
        return Pending(lambda: self._scores(keywords, lambda _: _wait(running)), running.cancel, running=True)

    def _keywords(self, samples: Samples) -> dict[str, Any]:
        """What a function may ask for."""
        count = len(samples.completions)
        ids = [samples.completions[i].tolist() for i in range(count)]
        prompts = [samples.extra["prompt"][p] for p in samples.prompt_B]
        completions: list[Any] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        if prompts and not isinstance(prompts[0], str):  # messages in, messages out
            completions = [[{"role": "assistant", "content": c}] for c in completions]
        log_extra = functools.partial(self._log_extra, count)
        given = (prompts, completions, ids, self._state, self._log_metric, log_extra)
        keywords: dict[str, Any] = dict(zip(KEYWORDS, given, strict=True))
        for name, values in samples.extra.items():
            if name != "prompt" and name not in keywords:  # what was sampled wins over a column of the same name
                keywords[name] = [values[p] for p in samples.prompt_B]
        missing = next((name for name in self._required if name not in keywords), None)
        if missing is not None:
            raise UsageError(
                f"reward function {self.name!r} asks for {missing!r}, which is no column of the data"
                f"{suggest(missing, keywords)} It can ask for {', '.join(keywords)}."
            )
        return keywords

    def _call(self, keywords: dict[str, Any]) -> Any:
        return self.function(**{k: v for k, v in keywords.items() if self._accepted is None or k in self._accepted})

    def _scores(self, keywords: dict[str, Any], call: Callable[[dict[str, Any]], Any]) -> Tensor:
        try:
            result = call(keywords)
            if inspect.isawaitable(result):  # a plain function that hands on what an asynchronous one returned
                result = _wait(_submit(result))
        except UsageError:
            raise
        except Exception as error:
            prompts = keywords["prompts"]
            where = f"; the first prompt of the batch: {_short(prompts[0])}" if prompts else ""
            raise UsageError(
                f"reward function {self.name!r} raised {type(error).__name__}: {error}{_place(error)}{where}."
            ) from error
        return self._checked(result, len(keywords["completions"]))

    def _checked(self, result: Any, count: int) -> Tensor:
        result = result.tolist() if hasattr(result, "tolist") else result  # tensors, arrays, series
        if not isinstance(result, Sequence) or isinstance(result, str | bytes) or len(result) != count:
            listed = isinstance(result, Sequence) and not isinstance(result, str | bytes)
            got = f"{len(result)} values" if listed else type(result).__name__
            raise UsageError(
                f"reward function {self.name!r} must return a list of {count} numbers, one per completion; got {got}."
            )
        scores = [math.nan] * count
        for index, value in enumerate(result):
            if value is None:
                continue
            try:
                if isinstance(value, str | bytes):  # float() would read it, but a text is a mistake
                    raise TypeError
                scores[index] = float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several numbers
                raise UsageError(
                    f"reward function {self.name!r}: value {index} is {_short(value)}, not a number or None."
                ) from None
            if not abs(scores[index]) <= torch.finfo(torch.float32).max:
                raise UsageError(
                    f"reward function {self.name!r}: value {index} is {_short(value)}; return None where there is no "
                    "reward."
                )
        return torch.tensor(scores, dtype=torch.float32)

    def _log_metric(self, name: str, value: float) -> None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UsageError(
                f"reward function {self.name!r}: log_metric({name!r}, ...) takes one number, got {_short(value)}."
            ) from None
        if math.isfinite(number):  # the mean over nothing, usually
            self._metrics[str(name)].append(number)

    def _log_extra(self, count: int, column: str, values: Sequence[Any]) -> None:
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list | tuple) or len(values) != count:
            got = f"{len(values)} values" if isinstance(values, list | tuple) else type(values).__name__
            raise UsageError(
                f"reward function {self.name!r}: log_extra({column!r}, ...) takes a list of {count} values, one per "
                f"completion; got {got}."
            )
        self._columns[str(column)] = [_plain(v) for v in values]


class ModelReward(RewardSource):
    """A reward model that shares the policy's tokenizer: it reads the same ids, nothing is tokenised again."""

    verifies = False

    def __init__(self, scorer: Scorer, name: str = "reward_model", token_budget: int = 16_384) -> None:
        self.scorer = scorer.requires_grad_(False).eval()
        self.name = name
        self.token_budget = token_budget

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        scores_B = torch.zeros(len(samples.completions))
        for completions, tree in packed(samples, self.token_budget, self.scorer.head.weight.device, self.scorer.packed):
            scores_B[torch.from_numpy(completions)] = self.scorer(tree).rewards_B.float().cpu()
        return scores_B


class Several(RewardSource):
    """What is made of the scores of several sources; asynchronous functions among them run at the same time.

    A subclass has :meth:`combine`, and :meth:`facts` where it has settings. Metrics: ``rewards/<name>/mean`` and
    ``rewards/<name>/std`` of each source, and what the sources log themselves; where two log the same name, the later
    one's gets its source's name in front.

    Args:
        parts: sources, or whatever ``reward=`` takes, which :meth:`bind` then makes sources of.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self._given = list(parts)
        self.parts: dict[str, RewardSource] = {}
        if all(isinstance(part, RewardSource) for part in parts):
            self._take(parts)
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def _take(self, parts: Sequence[RewardSource]) -> None:
        self.parts = {}
        for part in parts:
            name, number = part.name, 1
            while name in self.parts:  # two lambdas, say
                number += 1
                name = f"{part.name}_{number}"
            self.parts[name] = part

    @property
    def name(self) -> str:  # type: ignore[override]
        return "+".join(self.parts)

    @property
    def verifies(self) -> bool:  # type: ignore[override]
        return all(p.verifies for p in self.parts.values())

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu") -> RewardSource:
        bound = copy.copy(self)
        bound._take([resolve_reward(part, tokenizer, device) for part in self._given])
        bound._metrics = defaultdict(list)
        return bound

    def combine(self, scores_KB: Tensor, samples: Samples) -> Tensor:
        """One score per completion (B,) from those of each source."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """The settings that the scores depend on, for the record of a run."""
        return {}

    def begin(self, state: Any) -> None:
        for part in self.parts.values():
            part.begin(state)

    def __call__(self, samples: Samples) -> Tensor:
        return self.start(samples).result()

    def start(self, samples: Samples) -> Pending:
        pending = self._start(samples)

        def result() -> Tensor:
            return self.combine(pending.result(), samples)

        return Pending(result, pending.cancel, pending.running)

    def scores(self, samples: Samples) -> Tensor:
        """The scores of each source, (K, B)."""
        return self._start(samples).result()

    def _start(self, samples: Samples) -> Pending:
        if not self.parts:
            raise UsageError(f"{type(self).__name__}: not bound to a tokenizer yet; call bind(tokenizer) first.")
        started: list[Pending] = []

        def cancel() -> None:
            for pending in started:
                pending.cancel()

        def result() -> Tensor:
            scores: dict[int, Tensor] = {}
            try:
                for k in sorted(range(len(started)), key=lambda k: started[k].running):  # while those run, the others
                    scores[k] = started[k].result()
            finally:
                cancel()  # where one fails, nobody waits for the rest
            return self._logged(torch.stack([scores[k] for k in range(len(started))]))

        try:
            started.extend(part.start(samples) for part in self.parts.values())
        except BaseException:
            cancel()
            raise
        return Pending(result, cancel, running=any(pending.running for pending in started))

    def _logged(self, scores_KB: Tensor) -> Tensor:
        for name, scores_B, said_B in zip(self.parts, scores_KB, ~scores_KB.isnan(), strict=True):
            known = scores_B[said_B]
            if len(known):
                self._metrics[f"rewards/{name}/mean"].append(float(known.mean()))
            if len(known) > 1:
                self._metrics[f"rewards/{name}/std"].append(float(known.std()))
        return scores_KB

    def drain(self) -> tuple[dict[str, float], dict[str, list[Any]]]:
        metrics = _means(self._metrics)
        columns: dict[str, list[Any]] = {}
        for name, part in self.parts.items():
            logged, shown = part.drain()
            metrics |= {f"{name}/{key}" if key in metrics else key: value for key, value in logged.items()}
            columns |= {f"{name}/{key}" if key in columns else key: values for key, values in shown.items()}
        return metrics, columns


class SumReward(Several):
    """The weighted sum of several sources; asynchronous functions among them run at the same time.

        R_i = sum_k w_k r_ki, over the sources k that say something about completion i

    A source of weight 0 is only watched; a completion about which no other source says anything has no reward.
    Metrics: ``rewards/<name>/mean`` and ``rewards/<name>/std`` of each source, before its weight, and what the sources
    log themselves; where two log the same name, the later one's gets its source's name in front.

    Errors: weights that are not one finite number per source, or all 0.
    Source: TRL 1.16, ``reward_funcs`` and ``reward_weights``. Departure: there, a source of weight 0 that speaks alone
    makes a reward of 0.
    """

    def __init__(self, parts: Sequence[RewardSource], weights: Sequence[float] | None = None) -> None:
        super().__init__(parts)
        self.weights_K = _weights(weights, list(self.parts))

    def facts(self) -> dict[str, Any]:
        return {"weights": self.weights_K.tolist()}

    def combine(self, scores_KB: Tensor, samples: Samples) -> Tensor:
        weights_K1 = self.weights_K[:, None]
        counts_B = (~scores_KB.isnan() & (weights_K1 != 0)).any(0)
        return torch.where(counts_B, (weights_K1 * scores_KB.nan_to_num()).sum(0), torch.nan)

    @property
    def width(self) -> int:
        return len(self.parts)

    def objectives(self, samples: Samples) -> Tensor:
        """Each source's scores times its weight, in their order (B, K): NaN where it says nothing, 0 at weight 0."""
        weighted_KB = self.weights_K[:, None] * self.scores(samples)
        watched_K1 = self.weights_K[:, None] == 0  # of these a missing score takes nothing away
        return weighted_KB.masked_fill(watched_K1, 0.0).T


def resolve_reward(
    reward: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str = "cpu",
    weights: Sequence[float] | None = None,
) -> RewardSource:
    """A source from what the user gave: a function, a verifier's name with its options (``exact``,
    ``repetition_penalty(ngram_size=4)``), a reward-model folder, a judge, an ensemble or another source in the same
    spelling (``ensemble(runs/rm1, runs/rm2, combine=minimum)``), or a list of these with a weight for each."""
    if isinstance(reward, list | tuple) or weights is not None:
        given = list(reward) if isinstance(reward, list | tuple) else [reward]
        if not given:
            raise UsageError("reward: the list is empty; give a function, a verifier's name or a reward-model folder.")
        parts = [resolve_reward(r, tokenizer, device) for r in given]
        return parts[0] if len(parts) == 1 and weights is None else SumReward(parts, weights)
    if isinstance(reward, RewardSource):
        return reward.bind(tokenizer, device)
    if isinstance(reward, Scorer):
        return ModelReward(reward.to(device))
    if isinstance(reward, str) and (function := verifier(reward)) is not None:
        return FunctionReward(function, tokenizer)
    if isinstance(reward, str) and (source := named_source(reward)) is not None:
        return source.bind(tokenizer, device)
    if names_function(reward):  # inside an ensemble, say
        return resolve_reward(import_function(reward), tokenizer, device)
    if isinstance(reward, str | Path):
        return _model_reward(str(reward), tokenizer, device)
    if isinstance(reward, nn.Module):  # callable, but not a reward function
        raise UsageError(
            f"reward: a {type(reward).__name__} in memory has no tokenizer; save both and give the folder, or write a "
            "function that calls it."
        )
    if callable(reward):
        return FunctionReward(reward, tokenizer)
    raise UsageError(
        f"reward: expected a function, a verifier's name or a reward-model folder, got {type(reward).__name__}."
    )


def _model_reward(source: str, tokenizer: PreTrainedTokenizerBase, device: torch.device | str) -> RewardSource:
    """The reward model of a folder or a hub id."""
    local, known = Path(source).is_dir(), VERIFIERS.names()
    no_reward = f"reward {source!r} is neither a reward-model folder nor a verifier"
    if not local and ("/" not in source or source.endswith(")")):
        near = suggest(source.partition("(")[0], [*known, *SOURCES.names()])
        raise UsageError(f"{no_reward}{near} Verifiers: {', '.join(known)}. Others: {', '.join(SOURCES.names())}.")
    try:
        return _open_reward_model(source, tokenizer, device)
    except UsageError as error:
        if local:
            raise
        raise UsageError(f"{no_reward}, and could not be had from the hub: {error}") from error


@no_bars()
def _open_reward_model(source: str, tokenizer: PreTrainedTokenizerBase, device: torch.device | str) -> RewardSource:
    """One that reads the policy's ids, where each means the same to it and it scores a last token; else the text."""
    from prefzoo.feedback.text import TextReward

    given, source = Path(source), run_model(source)
    try:
        own = open_tokenizer(source)
    except UsageError:
        open_classifier(source)  # without a model either, that is what is at fault
        raise
    name = given.parent.name if given.name in ("final", "best") else given.name  # of a run, the run's
    name, only_ids = name or given.name, (Path(source) / f"{REWARD_FILE}.json").exists()
    same = same_tokens(tokenizer, own)
    if only_ids and not same:
        raise UsageError(f"reward model {source!r} has another tokenizer than the policy; train one on this model.")
    if same:
        try:
            return ModelReward(load_scorer(source).to(device), name)
        except UsageError:
            if only_ids:
                raise
    return TextReward(open_classifier(source).to(device), own, tokenizer, name)


def _weights(weights: Sequence[float] | None, names: Sequence[str]) -> Tensor:
    if weights is None:
        return torch.ones(len(names))
    if not isinstance(weights, list | tuple) or len(weights) != len(names):
        got = f"{len(weights)} weights" if isinstance(weights, list | tuple) else _short(weights)
        raise UsageError(
            f"reward weights: expected one for each of the {len(names)} rewards ({', '.join(names)}); got {got}."
        )
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UsageError(f"reward weights: that of {name!r} must be a number, got {_short(weight)}.")
    if not any(weights):
        raise UsageError("reward weights: all are 0, so there is nothing to learn; one must be another number.")
    return torch.tensor([float(w) for w in weights])


# ---------------------------------------------------------------------------------------- asynchronous functions


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own, so that it works in a notebook, whose thread has a running loop, and one for the
    whole process, because a client of a service (httpx, openai) stays bound to the loop of its first call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"prefzoo rewards {process}", daemon=True).start()
    return loop


def _submit(awaitable: Awaitable[Any]) -> Future[tuple[Any, BaseException | None]]:
    async def outcome() -> tuple[Any, BaseException | None]:
        try:
            return await awaitable, None
        except (SystemExit, KeyboardInterrupt) as error:  # would end the loop and leave us waiting for ever
            return None, error

    return asyncio.run_coroutine_threadsafe(outcome(), _event_loop(os.getpid()))


def _wait(running: Future[tuple[Any, BaseException | None]]) -> Any:
    try:
        result, error = running.result()
    finally:
        running.cancel()  # Ctrl-C came while we waited
    if error is not None:
        raise error
    return result


def finish(result: Any) -> Any:
    """A result, waited for where an asynchronous function gave it."""
    return _wait(_submit(result)) if inspect.isawaitable(result) else result


# ---------------------------------------------------------------------------------------- words and numbers


def _place(error: BaseException) -> str:
    """Where in the user's file it happened: the deepest frame of the file that we called."""
    between = {__file__, Future.result.__code__.co_filename}
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in between]
    if not theirs:
        return ""
    frame = next(f for f in reversed(theirs) if f.filename == theirs[0].filename)
    return f" ({frame.filename}, line {frame.lineno}: {frame.line})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _plain(value: Any) -> Any:
    """A value that a JSON file can hold: itself, or else its text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def _means(values: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each list; they start again from nothing."""
    means = {name: sum(v) / len(v) for name, v in values.items()}
    values.clear()
    return means
