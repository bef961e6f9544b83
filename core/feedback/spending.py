"""What an endpoint has cost, and where it must stop."""

from __future__ import annotations

import threading
from pathlib import Path

from prefzoo.registry import RunError, UsageError


class Spending:
    """Requests and tokens so far, of all processes that keep them in one file, with a limit of each.

        cost = (prompt tokens * price[0] + completion tokens * price[1]) / 10**6

    The file has a line ``requests prompt_tokens completion_tokens`` for whatever was spent, and is only ever added to.
    What is under way when a limit is reached is still paid: at most one answer of every thread and process.

    Args:
        file: of the lines, read on by every process; None: this process alone.
        max_calls: requests, tries again included. max_cost: in the unit of the price.
        price: of a million prompt tokens, and of a million completion tokens.

    Errors: a limit is reached (RunError); a cost without a price, and an answer that does not say what it cost.

    >>> spending = Spending(max_cost=0.5, price=(1.0, 4.0))
    >>> spending.ask()
    >>> spending.pay(300_000, 50_000)
    >>> spending.cost
    0.5
    >>> spending.ask()
    Traceback (most recent call last):
    ...
    prefzoo.registry.RunError: judge: max_cost=0.5 is reached (0.5 for 1 requests); raise it and go on ...
    """

    def __init__(
        self, file: Path | None = None, *, max_calls: int | None = None, max_cost: float | None = None,
        price: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        if price is not None and (len(price) != 2 or not all(p >= 0 for p in price)):
            raise UsageError(f"judge, option 'price_per_million': expected two prices of at least 0, got {price!r}.")
        if max_cost is not None and (price is None or not any(price)):
            raise UsageError(
                "judge, option 'max_cost': what do tokens cost? Give price_per_million=(of prompts, of completions)."
            )
        self.file, self.max_calls, self.max_cost, self.price = file, max_calls, max_cost, price
        self.calls = self.prompt_tokens = self.completion_tokens = 0
        self._lock = threading.Lock()
        self._read = 0  # bytes of the file

    @property
    def cost(self) -> float:
        """In the unit of the price; 0 without one."""
        return self.worth(self.prompt_tokens, self.completion_tokens)

    def worth(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost."""
        each = self.price or (0.0, 0.0)
        return (prompt_tokens * each[0] + completion_tokens * each[1]) / 1e6

    def ask(self) -> None:
        """Count a request, unless a limit is reached."""
        with self._lock:
            self._look()
            limit = None
            if self.max_calls is not None and self.calls >= self.max_calls:
                limit = f"max_calls={self.max_calls} is reached"
            elif self.max_cost is not None and self.cost >= self.max_cost:
                limit = f"max_cost={self.max_cost:g} is reached ({self.cost:.4g} for {self.calls} requests)"
            if limit is not None:
                raise RunError(
                    f"judge: {limit}; raise it and go on (answers in the cache, if there is one, are not paid again)."
                )
            self._note(1, 0, 0)

    def pay(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count what an answer cost."""
        if self.max_cost is not None and not prompt_tokens:
            raise UsageError(
                "judge: the endpoint does not say how many tokens an answer cost (usage), so max_cost cannot be kept; "
                "leave it out and give max_calls."
            )
        with self._lock:
            self._note(0, prompt_tokens, completion_tokens)

    def _note(self, *spent: int) -> None:
        if self.file is None:
            self._add(*spent)
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab", buffering=0) as lines:  # one write at the end of a file: no process cuts another's
            lines.write(b"%d %d %d\n" % spent)

    def _look(self) -> None:
        """Count what was added to the file since it was read."""
        if self.file is None or not self.file.exists():
            return
        with self.file.open("rb") as lines:
            lines.seek(self._read)
            told = lines.read()
        whole = told[: told.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._add(*map(int, line.split()))

    def _add(self, calls: int, prompt_tokens: int, completion_tokens: int) -> None:
        self.calls += calls
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
