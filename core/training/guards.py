"""What watches a run: a watchdog over time, a monitor over numbers, the post-mortem of a step that is not finite."""

from __future__ import annotations

import contextlib
import json
import linecache
import math
import os
import sys
import sysconfig
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prefzoo.data.samples import Samples, sides_of
from prefzoo.files import replacing_file

# ------------------------------------------------------------------------------------------------ the watchdog


class Watchdog:
    """Says what a stuck run waits for: in which phase, since when, and at which line.

    Args:
        minutes: without any progress, before it says something, and again after twice, four times, ... as long; None:
            it never does.
        say: gets one line, in a thread of the watchdog's own. What it raises is dropped.
        clock: seconds that only go forward.

    The line is where the thread that trains is: of the user's own code inside ours (a reward function) if there is
    any, else of ours. What holds Python's lock (a C extension that never returns to the interpreter) silences it.

    >>> now, said = [0.0], []
    >>> dog = Watchdog(10, said.append, clock=lambda: now[0])
    >>> dog.doing("reward function 'slow' for step 57")
    >>> now[0] = 601.0
    >>> dog.look()
    >>> print(said[0])
    nothing has moved for 10 minutes (since ...): reward function 'slow' for step 57, at ... goes on waiting...
    """

    def __init__(
        self, minutes: float | None, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = math.inf if minutes is None else 60.0 * minutes
        self._say = say
        self._clock = clock
        self._now: tuple[str, float, int] | None = None  # phase, its beginning, its thread; one write, so no lock
        self._told: tuple[str, float, int] | None = None  # the phase there was an alarm about
        self._next = self._limit  # seconds in one phase until the next alarm
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._limit < math.inf and self._thread is None:
            self._end.clear()
            self._thread = threading.Thread(target=self._watch, name="prefzoo watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._now = None
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)  # it may be inside a say that hangs; it is a daemon
            self._thread = None

    def doing(self, what: str) -> None:
        """The run is at this phase now; that it says so is progress."""
        self._now = (what, self._clock(), threading.get_ident())

    def idle(self) -> None:
        """The run is not inside: its caller's own loop is. No alarms until the next phase."""
        self._now = None

    def look(self) -> None:
        """Say what there is to say now; its own thread calls this every few seconds."""
        now = self._now
        if self._told is not None and now is not self._told:
            what, began, _ = self._told
            self._told, self._next = None, self._limit
            self._tell(f"the run goes on, after {_duration(self._clock() - began)}: {what}.")
        if now is None:
            return
        what, began, thread = now
        stuck = self._clock() - began
        if stuck < self._next:
            return
        while self._next <= stuck:
            self._next *= 2
        self._told = now
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - stuck))  # for the reader only
        self._tell(
            f"nothing has moved for {_duration(stuck)} (since {since}): {what}, at {_place(thread)}. The run goes on "
            "waiting. Ctrl-C (a second one if the first does not get through) ends it and keeps a checkpoint; from "
            f"elsewhere: kill -TERM {os.getpid()}."
        )

    def _watch(self) -> None:
        pause = min(5.0, self._limit / 20)
        while not self._end.wait(pause):
            with contextlib.suppress(Exception):  # a guard never ends what it guards
                self.look()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(Exception):
            self._say(line)


def _duration(seconds: float) -> str:
    """
    >>> _duration(3.2), _duration(60), _duration(605), _duration(9000)
    ('3 seconds', '1 minute', '10 minutes', '2.5 hours')
    """
    for size, name in ((3600.0, "hour"), (60.0, "minute"), (1.0, "second")):
        if seconds >= size or size == 1:
            count = round(seconds / size, 1 if size == 3600 else 0)
            return f"{count:g} {name}{'' if count == 1 else 's'}"
    raise AssertionError


_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _place(thread: int) -> str:
    """``file, line n: source`` of the deepest frame that says something."""
    frame = sys._current_frames().get(thread)
    stack: list[FrameType] = []  # the deepest first
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    if not stack:
        return "a thread that has ended"
    ours = [i for i, f in enumerate(stack) if _is_ours(f)]
    # The user's script that calls us says nothing; the user's function that we call says all.
    theirs = [i for i, f in enumerate(stack) if _is_users(f) and (not ours or i < ours[-1])]
    best = stack[(theirs or ours or [0])[0]]
    file, line = best.f_code.co_filename, best.f_lineno
    return f"{file}, line {line}: {linecache.getline(file, line, best.f_globals).strip() or best.f_code.co_name}"


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "prefzoo"


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not (_is_ours(frame) or file.startswith(("<frozen", *_LIBRARIES)) or "site-packages" in file)


# ------------------------------------------------------------------------------------------------- the monitor


class Monitor:
    """Says in words what the metrics of a healthy run do not show: spikes, wild ratios, rewards that say nothing.

        loss:           x > median + max(12 s, |median|, r, 0.1), r = max - min
        gradient norm:  x > median + max(12 s, 9 median), without the steps where it is 0
        ratio:          over 10 for a token; on fresh samples also under 0.1

    over the last 50 values, s = 1.4826 MAD, after ten of them.

    Args:
        note: gets a line per finding; of one kind at most one in 20 steps, then with the number of those not shown.

    Constants are such that healthy runs of every family say nothing (measured: ``docs/when-a-run-goes-wrong.md``).

    >>> said = []
    >>> monitor = Monitor(said.append)
    >>> for step in range(20):
    ...     monitor.watch(step, {"loss": 0.7 + 0.01 * (step % 3)})
    >>> monitor.watch(20, {"loss": 9.0})
    >>> print(said[0])
    step 20: loss is 9, far above the 20 steps before (median 0.71, largest 0.72). ...
    """

    SPIKES = ("loss", "grad_norm", "loss/critic", "grad_norm/critic")
    WINDOW, FIRST, EVERY, STREAK = 50, 10, 20, 5
    LOWEST, HIGHEST = 0.1, 10.0

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._seen: dict[str, list[float]] = {}
        self._equal = 0  # steps in a row in which every group had equal rewards
        self._told: dict[str, list[int]] = {}  # by kind: the step of its last line, findings since that were not shown

    def watch(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of one step: means over it; of ratios the extremes over its tokens, ``ratio/max``, and
        ``ratio/fresh_max`` and ``ratio/fresh_min`` of the first optimizer step on new samples."""
        for kind, (last, hidden) in self._told.items():
            if hidden and step - last > self.EVERY:
                self._told[kind] = [last, 0]
                self._note(f"step {step}: {hidden} more {kind} since step {last}, not shown.")
        for name in self.SPIKES:
            self._spike(step, name, values.get(name, math.nan))
        self._ratios(step, values)
        self._rewards(step, values)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to say the same; JSON values."""
        return {"seen": {k: [*v] for k, v in self._seen.items()}, "equal": self._equal,
                "told": {k: [*v] for k, v in self._told.items()}}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = {k: [*v] for k, v in state["seen"].items()}
        self._equal = state["equal"]
        self._told = {k: [*v] for k, v in state["told"].items()}

    def _say(self, kind: str, step: int, text: str) -> None:
        last, hidden = self._told.get(kind, (step - self.EVERY, 0))
        if step - last < self.EVERY:
            self._told[kind] = [last, hidden + 1]
            return
        self._told[kind] = [step, 0]
        self._note(f"step {step}: {text}" + (f" ({hidden} more since step {last}, not shown)" if hidden else ""))

    def _spike(self, step: int, name: str, value: float) -> None:
        norm = name.startswith("grad_norm")
        if not math.isfinite(value) or (norm and value == 0):  # the first is the guard's; 0: there was no gradient
            return
        seen = self._seen.setdefault(name, [])
        if len(seen) >= self.FIRST:
            middle, top = median(seen), max(seen)
            spread = 1.4826 * median([abs(x - middle) for x in seen])
            if value > middle + max(12 * spread, 9 * middle if norm else max(abs(middle), 0.1)):
                self._say(
                    f"spikes of {name}", step,
                    f"{name} is {value:.4g}, far above the {len(seen)} steps before (median {middle:.4g}, largest "
                    f"{top:.4g}). Once, it is a batch unlike the others; again and again, the learning rate is too "
                    "high, or rows are faulty.",
                )  # fmt: skip
        seen.append(value)
        del seen[: -self.WINDOW]

    def _ratios(self, step: int, values: Mapping[str, float]) -> None:
        low, high = values.get("ratio/fresh_min", 1.0), values.get("ratio/fresh_max", 1.0)
        if low < self.LOWEST or high > self.HIGHEST:
            self._say(
                "wild ratios of fresh samples", step,
                f"tokens are {low:.3g} to {high:.3g} times as likely as when they were sampled, before any step on "
                "them: the numbers of the sampler are not those of the learner.",
            )  # fmt: skip
        elif (high := values.get("ratio/max", 1.0)) > self.HIGHEST:  # low ones are what unlearning a token looks like
            self._say(
                "wild ratios", step,
                f"a token is {high:.3g} times as likely as when it was sampled: the policy has gone far from its "
                "samples. Fewer inner_epochs or minibatches, or a lower learning rate, keep it near.",
            )  # fmt: skip

    def _rewards(self, step: int, values: Mapping[str, float]) -> None:
        if values.get("reward_missing") == 1:
            self._say("steps without reward", step, "the reward of every sample is missing (None or NaN).")
            return
        equal = values.get("frac_reward_zero_std")
        if equal is not None:
            self._equal = self._equal + 1 if equal == 1 else 0
        if self._equal >= self.STREAK and equal is not None:
            none = "no gradient exists" if not values.get("grad_norm") else "their comparison gives no gradient"
            self._say(
                "steps with equal rewards", step,
                f"for {self._equal} steps all samples of a prompt got the same reward: {none}. The prompts are too "
                "easy or too hard, the samples too alike (temperature), or the reward does not look at the answer.",
            )  # fmt: skip
            return
        if values.get("skipped_steps"):
            self._say("steps without rows", step, f"nothing is left to train on, no step is taken. {_why(values)}")
        elif values.get("grad_norm") == 0:
            self._say("steps without gradient", step, f"there is no gradient. {_why(values)}")


# What may leave a batch without gradient, by its metric where that is 1, in the order in which it is told.
REASONS = {
    "revisions/none": "nothing was revised: a request for it leaves no room in the model's positions, or has no answer",
    "prompts/tied": "all samples of each prompt have equal scores",
    "frac_reward_zero_std": "all samples of each prompt have the same reward",
    "prompts/unused": "no prompt gave a row",
    "completions/clipped_ratio": "every completion was cut at the limit (max_new_tokens)",
}


def _why(values: Mapping[str, float]) -> str:
    """Why a batch has no gradient, as far as its metrics say."""
    reason = next((words for name, words in REASONS.items() if values.get(name) == 1), None)
    return "Its losses do not depend on the weights there." if reason is None else f"{reason[0].upper()}{reason[1:]}."


# ------------------------------------------------------------------------------------- a step that is not finite

ROWS, TEXT, PARAMETERS = 64, 4000, 20  # shown in full: rows, characters of a text, parameters
SAID = {
    "ref_logps": "reference log-probability", "old_logps": "log-probability when it was sampled",
    "advantages": "advantage", "values": "value of the critic", "returns": "return",
}  # fmt: skip


def not_finite(losses: Mapping[str, float], norms: Mapping[str, float]) -> list[str]:
    """The reasons not to take a step; none where all numbers are finite.

    >>> not_finite({"loss": float("nan"), "loss/critic": 0.1}, {"policy": float("inf")})
    ['loss is nan', 'gradient norm of policy is inf']
    """
    named = [*losses.items(), *((f"gradient norm of {role}", norm) for role, norm in norms.items())]
    return [f"{name} is {value}" for name, value in named if not math.isfinite(value)]


@torch.no_grad()
def gradient_norms(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """Norm of the gradient of every parameter that has one, in one pass and with one wait for the device.

    In float32 whatever the parameters are in. Call it before clipping: that multiplies all gradients by one number,
    and where this is NaN all of them are NaN afterwards.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
    >>> gradient_norms(layer.named_parameters())
    {'weight': 5.0}
    """
    grads = {name: p.grad for name, p in named_parameters if p.grad is not None}
    if not grads:
        return {}
    norms = torch._foreach_norm([*grads.values()], 2, dtype=torch.float32)
    return dict(zip(grads, torch.stack([n.to(norms[0].device) for n in norms]).tolist(), strict=True))


def words(
    batches: Mapping[str, Samples],
    row_losses: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    gradients: Mapping[str, float] = {},
) -> str:
    """The first culprits of a step that is not finite, for its error message; "" where none is found.

    Rows are counted from 1, in the order of the batch.
    """
    sentences = []
    for name, rows in batches.items():
        faults = _faults(rows, row_losses.get(name))
        if not faults:
            continue
        first = min(faults, key=lambda row: (len(faults[row]) == 1 and faults[row][0].startswith("a loss"), row))
        where = "" if name == "main" else f" of {name}"
        prompt = repr(_decode(tokenizer, rows.prompts[_prompt(rows, first)])[-60:])
        more = f" ({len(faults)} of {len(rows)} rows are not finite)" if len(faults) > 1 else ""
        sentences.append(f"row {first + 1}{where} (prompt {prompt}) has {' and '.join(faults[first])}{more}")
        if len(faults) == len(rows) > 1 and all(len(f) == 1 for f in faults.values()):
            sentences.append("all rows alike: look at the weights and the learning rate before the rows")
    wrong = [name for name, norm in gradients.items() if not math.isfinite(norm)]
    if wrong:
        count = f"{len(wrong)} of {len(gradients)} parameters"
        sentences.append(f"the gradient of {wrong[0]} is {gradients[wrong[0]]} ({count} not finite)")
    return "; ".join(sentences) + "." if sentences else ""


def write_post_mortem(
    file: Path,
    *,
    step: int,
    reasons: Sequence[str],
    losses: Mapping[str, float],
    norms: Mapping[str, float],
    gradients: Mapping[str, float],
    batches: Mapping[str, Samples],
    row_losses: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    extra: Mapping[str, Any],
    say: Callable[[str], None] = warnings.warn,
) -> Path | None:
    """Write all that is known about a step that was not finite, as JSON for people; rows at fault first.

    Args:
        file: written aside, synced and renamed.
        step: number of the step that was not taken.
        reasons: what is not finite, in words.
        losses: by name; norms: of the gradient, by role; gradients: norm by name of the parameter.
        batches: the rows of the step, by the name that terms know them by (``main``, ``ptx``).
        row_losses: one loss per row of a batch, where known; NaN are kept.
        tokenizer: decodes the rows.
        extra: other facts, such as the learning rate.
        say: told in words why nothing could be written.

    Returns:
        The file; None where it could not be written, since the error that led here must not be lost over it.

    NaN and infinities are the strings ``"nan"``, ``"inf"`` and ``"-inf"``: strict JSON. Rows and tokens are counted
    from 1. At most 64 rows and 4000 characters of a text are shown, the rest is counted.
    """
    try:
        wrong = {name: norm for name, norm in gradients.items() if not math.isfinite(norm)}
        largest = sorted(((n, g) for n, g in gradients.items() if n not in wrong), key=lambda item: -item[1])
        report = {
            "step": step,
            "not_finite": [*reasons],
            "culprits": words(batches, row_losses, tokenizer, gradients),
            "losses": losses,
            "gradient_norms": norms,
            "facts": extra,
            "gradients": {
                "parameters": len(gradients),
                "not_finite": len(wrong),
                "of_these": dict([*wrong.items()][:PARAMETERS]),
                "largest": dict(largest[:PARAMETERS]),
            },
            "batches": {name: _batch(rows, row_losses.get(name), tokenizer) for name, rows in batches.items()},
        }
        text = json.dumps(_plain(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with replacing_file(file) as aside:
            aside.write_bytes(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair becomes its escape
    except Exception as error:
        with contextlib.suppress(Exception):
            said = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
            say(f"no post-mortem written to {str(file)!r}: {said}.")
        return None
    return file


def _batch(rows: Samples, losses: Tensor | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    faults = _faults(rows, losses)
    order = sorted(range(len(rows)), key=lambda row: (row not in faults, row))
    shown = order[:ROWS]
    return {
        "kind": rows.kind,
        "rows": len(rows),
        "rows_not_finite": len(faults),
        "rows_not_shown": len(order) - len(shown),
        "shown": [_row(rows, r, faults.get(r, []), losses, tokenizer) for r in shown],
    }


def _row(
    rows: Samples, row: int, faults: list[str], losses: Tensor | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """One row, decoded, with all that is known about it."""
    prompt = _prompt(rows, row)
    names = sides_of(rows)
    return {
        "row": row + 1,
        "not_finite": faults,
        **({} if losses is None else {"loss": losses[row]}),
        "prompt": _decode(tokenizer, rows.prompts[prompt]),
        "prompt_tokens": len(rows.prompts[prompt]),
        **{
            name: _completion(rows, b, tokenizer)
            for b, name in enumerate(names, row * rows.per_row)
            if len(rows.completions[b])
        },
        **{name: column[row] for name, column in rows.row_columns.items()},
        **({"extra": {k: v[prompt] for k, v in rows.extra.items()}} if rows.extra else {}),
    }


def _completion(rows: Samples, index: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = rows.completions[index]
    start, end = rows.completions.offsets[index : index + 2]
    return {
        "text": _decode(tokenizer, ids),
        "tokens": len(ids),
        **{name: column[index] for name, column in rows.columns.items()},
        **{name: _summary(column[start:end], ids, tokenizer) for name, column in rows.tokens.items()},
    }


def _summary(values: Tensor, ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A token column of one completion: its sum, the extremes of what is finite, and the first that is not."""
    values = values.detach().cpu().double()
    finite = values[values.isfinite()]
    wrong = (~values.isfinite()).nonzero().flatten().tolist()
    return {
        "sum": values.sum(),
        **({"min": finite.min(), "max": finite.max()} if len(finite) else {}),
        **({"not_finite": len(wrong)} if wrong else {}),
        **({"first": {"token": wrong[0] + 1, "text": _decode(tokenizer, ids[wrong[0] : wrong[0] + 1]),
                      "value": values[wrong[0]]}} if wrong else {}),
    }  # fmt: skip


def _faults(rows: Samples, losses: Tensor | None) -> dict[int, list[str]]:
    """By row, in words, what is not finite in it."""
    found: dict[int, list[str]] = defaultdict(list)

    def wrong(values: Tensor) -> list[tuple[int, float]]:
        values = values.detach().cpu().double()
        where = (~values.isfinite()).nonzero().flatten()
        return [*zip(where.tolist(), values[where].tolist(), strict=True)]

    for row, value in [] if losses is None else wrong(losses):
        found[row].append(f"a loss of {value}")
    for name, column in rows.row_columns.items():
        for row, value in wrong(column):
            found[row].append(f"a {name} of {value}")
    for name, column in rows.columns.items():
        for index, value in wrong(column):
            found[index // rows.per_row].append(f"{_a(name)} of {value}{_side(rows, index)}")
    for name, column in rows.tokens.items():
        last = -1
        for position, value in wrong(column):
            index = int(np.searchsorted(rows.completions.offsets, position, side="right")) - 1
            if index != last:  # the first of each completion
                token = position - int(rows.completions.offsets[index]) + 1
                text = f"{_a(SAID.get(name, name))} of {value} (token {token}{_side(rows, index)})"
                found[index // rows.per_row].append(text)
            last = index
    return dict(found)


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _side(rows: Samples, index: int) -> str:
    return f" of {sides_of(rows)[index % rows.per_row]}" if rows.per_row > 1 else ""


def _prompt(rows: Samples, row: int) -> int:
    return row if rows.kind == "prompts" else int(rows.prompt_B[row * rows.per_row])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    try:
        return str(tokenizer.decode(ids))
    except Exception as error:  # an id that the tokenizer does not know may be what is wrong
        return f"ids {ids[:100].tolist()} that cannot be decoded ({error!r})"


def _plain(value: Any) -> Any:
    """A JSON value of anything; numbers that JSON does not have become strings."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value if len(value) <= TEXT else f"{value[:TEXT]} ... ({len(value) - TEXT} characters more)"
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return _plain(str(value))


__all__ = ["Monitor", "Watchdog", "gradient_norms", "not_finite", "words", "write_post_mortem"]
