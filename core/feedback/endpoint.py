"""A model behind an OpenAI-compatible endpoint (``/v1/chat/completions``), asked for verdicts."""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from prefzoo.feedback.spending import Spending
from prefzoo.files import replacing_file
from prefzoo.registry import RunError, UsageError

LARGEST = 4 * 2**20  # bytes of an answer that are read; more is no verdict
LONGEST_WAIT = 60.0  # seconds between two tries
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # what may be over when it is tried again
OF_THE_QUESTION = frozenset({400, 413, 422})  # this one is too long, say; others may do
TIE = "TIE"
VERDICT_KEYS = frozenset({"winner", "verdict", "better", "choice"})  # of an answer in JSON


class Failed(Exception):
    """No answer was had from the endpoint, in words."""


class Endpoint:
    """Asks a model for one of two words through ``POST .../v1/chat/completions``, and counts what it costs.

    A verdict is read from the last line of the answer, ``[[A]]``, or the word alone (``A``, ``Verdict: A.``), or from
    an answer that is JSON, ``{"winner": "A"}``; ``TIE``, and ``C`` beside A and B, counts 1/2. Everything else, also a
    line that names both, is no verdict: None, counted, never guessed. What a question cannot be answered for after all
    tries is None too; where that befalls a whole batch, the run stops.

    Args:
        url: address of the server; ``/v1/chat/completions`` is added where it is not there.
        model: the model's name there.
        key_env: environment variable that holds the API key; one that is not set sends none. A key is sent to ``url``
            alone (redirects are not followed) and is written nowhere.
        timeout: seconds to wait for an answer. retries: tries after the first one, each after twice the wait
            (``backoff`` seconds at first), or what the server asks for (``Retry-After``).
        concurrency: questions under way at one time.
        max_calls: requests, tries again included, after which the run stops; None: no limit.
        max_cost: what answers may cost, by the tokens that the server counts times ``price_per_million`` (of prompt
            tokens, of completion tokens). Both limits hold for all processes that share a cache, now and earlier.
        cache: a folder of answers by the hash of address, model and question; one that is there is not asked for again,
            whichever process has asked. Without one they are kept in memory.
        logprobs: read the probability of the first token from ``top_logprobs`` instead of the text: graded verdicts.
        max_tokens: limit of an answer. temperature: 0, so that a verdict can be repeated.
        body: further fields of the request; None takes one away (``{"max_tokens": None}``).

    Metrics: ``judge/calls``, ``judge/cached``, ``judge/unparsed`` and ``judge/failed`` (shares of the questions),
    ``judge/prompt_tokens`` and ``judge/completion_tokens`` as the server counts them, ``judge/cost`` where there is a
    price; numbers are means of the steps.

    Source: the protocol: OpenAI's chat completions; verdicts by log-probabilities: Lee et al., arXiv:2309.00267.
    """

    def __init__(
        self, url: str, model: str, *, key_env: str = "OPENAI_API_KEY", timeout: float = 60.0, retries: int = 5,
        backoff: float = 1.0, concurrency: int = 8, max_calls: int | None = None, max_cost: float | None = None,
        price_per_million: tuple[float, float] | None = None, cache: str | Path | None = None,
        logprobs: bool = False, max_tokens: int = 1024, temperature: float = 0.0, body: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.url = address(url)
        self.model = model
        least = {"timeout": (timeout, 1e-3), "retries": (retries, 0), "backoff": (backoff, 0),
                 "concurrency": (concurrency, 1), "max_calls": (max_calls, 1), "max_cost": (max_cost, 0),
                 "max_tokens": (max_tokens, 1)}  # fmt: skip
        for name, (value, lowest) in least.items():
            if value is not None and not value >= lowest:
                raise UsageError(f"judge, option {name!r}: expected at least {lowest}, got {value!r}.")
        request = {"model": model, "temperature": temperature, "max_tokens": 1 if logprobs else max_tokens}
        request |= {"logprobs": True, "top_logprobs": 20} if logprobs else {}
        request = {k: v for k, v in (request | (body or {})).items() if v is not None}
        self.request = json.dumps(request, sort_keys=True)  # text, so that a run's record hashes it
        # In dictionaries stands what does not change a verdict, so that runs may differ in it (see fingerprint).
        self._how: dict[str, Any] = {
            "timeout": timeout, "retries": retries, "backoff": backoff, "concurrency": concurrency, "key_env": key_env,
        }  # fmt: skip
        bill = None
        if cache is not None:
            bill = Path(cache) / f"spent-{hashlib.sha256(f'{self.url} {model}'.encode()).hexdigest()[:16]}.txt"
        spending = Spending(bill, max_calls=max_calls, max_cost=max_cost, price=price_per_million)
        self._state: dict[str, Any] = {"lock": threading.Lock(), "calls": 0, "known": {}, "spending": spending}
        self._spent = dict.fromkeys(
            ("calls", "cached", "unparsed", "failed", "asked", "prompt_tokens", "completion_tokens"), 0
        )
        self._cache = {"folder": None if cache is None else Path(cache)}
        if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
            raise UsageError(f"judge, option 'cache': {str(cache)!r} is a file; give a folder.")

    def bind(self, device: torch.device | str) -> Endpoint:
        return self

    @property
    def calls(self) -> int:
        """Requests that were sent so far, tries again included."""
        return int(self._state["calls"])

    def __call__(self, questions: Sequence[str], words: tuple[str, str]) -> list[float | None]:
        """The probability of the first word for each question; None where there is no verdict."""
        unique = list(dict.fromkeys(questions))
        answers: dict[str, dict[str, Any] | Failed] = {}
        with ThreadPoolExecutor(min(self._how["concurrency"], max(1, len(unique)))) as pool:
            over = threading.Event()
            waiting = [pool.submit(self._answer, question, over) for question in unique]
            try:
                for question, future in zip(unique, waiting, strict=True):
                    try:
                        answers[question] = future.result()
                    except Failed as error:
                        answers[question] = error
            finally:  # an error, or Ctrl-C: nobody waits for the rest, and what has not begun is not begun
                over.set()
                for future in waiting:
                    future.cancel()
        failed = [a for a in answers.values() if isinstance(a, Failed)]
        if failed and len(failed) == len(unique):
            raise RunError(f"judge: none of {len(unique)} questions was answered by {self.url}; the last: {failed[-1]}")
        found = [self._verdict(answers[question], words) for question in questions]
        self._spent["asked"] += len(questions)
        self._spent["failed"] += sum(isinstance(answers[q], Failed) for q in questions)
        self._spent["unparsed"] += sum(
            v is None and not isinstance(answers[q], Failed) for q, v in zip(questions, found, strict=True)
        )
        return found

    def drain(self) -> dict[str, float]:
        s = dict(self._spent)
        self._spent.update(dict.fromkeys(s, 0))
        shares = {f"judge/{k}": s[k] / s["asked"] for k in ("unparsed", "failed")} if s["asked"] else {}
        found = shares | {f"judge/{k}": s[k] for k in ("calls", "cached", "prompt_tokens", "completion_tokens")}
        spending = self._state["spending"]
        if spending.price is not None:
            found["judge/cost"] = spending.worth(s["prompt_tokens"], s["completion_tokens"])
        return found

    # ------------------------------------------------------------------------------------ answers

    def _verdict(self, answer: dict[str, Any] | Failed, words: tuple[str, str]) -> float | None:
        if isinstance(answer, Failed):
            return None
        if '"logprobs": true' not in self.request:
            return read_verdict(answer["text"], words)
        if answer["first"] is None:
            raise UsageError(f"judge: {self.url} gave no top_logprobs; leave logprobs out.")
        masses = [sum(math.exp(v) for k, v in answer["first"] if k.strip() == word) for word in words]
        return masses[0] / sum(masses) if sum(masses) > 0 else None

    def _answer(self, question: str, over: threading.Event) -> dict[str, Any]:
        """From memory, from the disk, or from the endpoint."""
        fields = json.loads(self.request) | {"messages": [{"role": "user", "content": question}]}
        body = json.dumps(fields, sort_keys=True).encode(errors="replace")
        key = hashlib.sha256(self.url.encode() + b"\0" + body).hexdigest()
        known, folder = self._state["known"], self._cache["folder"]
        file = None if folder is None else folder / key[:2] / f"{key}.json"
        found = known.get(key)
        if found is None and file is not None and file.exists():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                found = found if isinstance(found.get("text"), str) and "first" in found else None
            except (OSError, ValueError, AttributeError):  # a damaged file is asked for again
                found = None
        if found is not None:
            self._count(cached=1)
        else:
            found = read_answer(self._tried(body, over))
            spent = found.pop("spent")
            self._count(**spent)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                with replacing_file(file, shared=True) as aside:
                    aside.write_text(json.dumps(found | {"request": fields}), encoding="utf-8")
            self._state["spending"].pay(**spent)
        if file is None:
            known[key] = found
        return dict(found)

    def _count(self, **spent: int) -> None:
        with self._state["lock"]:
            for name, number in spent.items():
                self._spent[name] += number

    # ------------------------------------------------------------------------------------ the wire

    def _tried(self, body: bytes, over: threading.Event) -> Any:
        """What the endpoint answers, tried again where that may help."""
        how, problem = self._how, Failed("the batch was given up")
        for number in range(how["retries"] + 1):
            wait = min(LONGEST_WAIT, how["backoff"] * 2**number)
            self._pay()
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                words = f"HTTP {error.code} {_clean(_said(error))}"
                if error.code in OF_THE_QUESTION:
                    raise Failed(words) from None
                if error.code not in AGAIN:
                    cure = self._cure(error.code)
                    raise UsageError(f"judge: {self.url} refuses the request: {words}.{cure}") from None
                asked = error.headers.get("Retry-After") or ""
                wait = min(LONGEST_WAIT, float(asked)) if re.fullmatch(r"\d{1,6}(\.\d+)?", asked) else wait
                problem = Failed(words)
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:  # also what is no JSON
                problem = Failed(_clean(f"{type(error).__name__}: {error}"))
            if number == how["retries"] or over.wait(wait):
                break
        raise problem

    def _pay(self) -> None:
        self._state["spending"].ask()
        with self._state["lock"]:
            self._state["calls"] += 1
            self._spent["calls"] += 1

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "prefzoo"}
        key = os.environ.get(self._how["key_env"], "").strip()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        with _OPENER.open(request, timeout=self._how["timeout"]) as answer:
            text, until = b"", time.monotonic() + self._how["timeout"]
            while piece := answer.read1(2**16):
                text += piece
                if len(text) > LARGEST:
                    raise ValueError(f"an answer of more than {LARGEST} bytes")
                if time.monotonic() > until:  # the timeout above is that of one piece
                    raise TimeoutError("the answer did not end in time")
        found = json.loads(text)
        read_answer(found)  # what is no completion is tried again too
        return found

    def _cure(self, code: int) -> str:
        name = self._how["key_env"]
        if code in (401, 403):
            state = "is set" if os.environ.get(name) else "is not set"
            return f" The key is read from the environment variable {name} (key_env), which {state}."
        if code == 404:
            return f" Is the model's name right (model={self.model!r}), and the address?"
        return ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key, and what is judged, to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def address(url: str) -> str:
    """The address that requests are sent to.

    >>> address("http://localhost:8000"), address("https://api.example.com/v1/")
    ('http://localhost:8000/v1/chat/completions', 'https://api.example.com/v1/chat/completions')
    """
    parts = urllib.parse.urlsplit(str(url).strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"judge, option 'endpoint': expected http://... or https://..., got {url!r}.")
    if parts.username or parts.password:
        raise UsageError("judge, option 'endpoint': no name and password in the address; a key is read from key_env.")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if re.search(r"/v\d+\w*$", path) else "/v1/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def read_answer(found: Any) -> dict[str, Any]:
    """Text, log-probabilities of the first token and cost of an answer; ValueError: it is no completion."""
    try:
        choice = found["choices"][0]
        text = choice["message"].get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"an answer that is no chat completion: {str(found)[:200]}") from None
    text = text if isinstance(text, str) else ""  # a refusal, or a call of a tool: nothing was said
    first = None
    try:
        said = choice["logprobs"]["content"][0]["top_logprobs"]
        first = [(str(t["token"]), float(t["logprob"])) for t in said if float(t["logprob"]) <= 1e-6]
    except (KeyError, IndexError, TypeError, ValueError):
        pass
    usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
    spent = {
        k: v if isinstance(v := usage.get(k), int) and v >= 0 else 0 for k in ("prompt_tokens", "completion_tokens")
    }
    return {"text": text, "first": first, "spent": spent}


def read_verdict(text: str, words: tuple[str, str]) -> float | None:
    """1 for the first word, 0 for the second, 1/2 for a tie; None where the last line gives no single verdict.

    >>> [read_verdict(t, ("A", "B")) for t in ("[[A]]", "B has a fault.\\nVerdict: **A**", "a", '{"winner": "A"}')]
    [1.0, 1.0, 1.0, 1.0]
    >>> [read_verdict(t, ("A", "B")) for t in ("TIE", "[[C]]", "B", '{"verdict": "tie", "why": "A is as good"}')]
    [0.5, 0.5, 0.0, 0.5]
    >>> [read_verdict(t, ("A", "B")) for t in ("A or B", "[[A]] [[B]]", "A is not better", "[[A]]\\nor not", "")]
    [None, None, None, None, None]
    """
    ties = (TIE, "C") if words == ("A", "B") else (TIE,)  # as in MT-bench's templates
    worth = dict.fromkeys(ties, 0.5) | {words[0].upper(): 1.0, words[1].upper(): 0.0}
    if text.strip().startswith(("{", "```json")):
        told = _in_json(text)
        return worth.get(told.pop()) if len(told) == 1 else None
    line = next((piece for piece in reversed(text.splitlines()) if piece.strip()), "")[-1000:]
    names = "|".join(map(re.escape, worth))
    found = {m.upper() for m in re.findall(rf"\[\[\s*({names})\s*\]\]", line, re.IGNORECASE)}
    if not found and "[[" not in line:  # a mark that is cut off, or holds something else
        lead = r"(?:(?:my |the |final )*(?:verdict|answer|winner)(?: is)?\W+)?"
        alone = re.fullmatch(rf"[\W_]*{lead}({names})[\W_]*", line.strip(), re.IGNORECASE)
        found = {alone[1].upper()} if alone else set()
    return worth.get(found.pop()) if len(found) == 1 else None


def _in_json(text: str) -> set[str]:
    """The verdicts of an answer that is one JSON object, in a fence or not."""
    told = re.fullmatch(r"\s*(?:```(?:json)?)?\s*(\{.*\})\s*(?:```)?\s*", text, re.DOTALL)
    try:
        found = json.loads(told[1]) if told else {}
    except (ValueError, RecursionError):
        return set()
    return {str(value).strip().upper() for key, value in found.items() if key.lower() in VERDICT_KEYS}


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _clean(text: str) -> str:
    """A server's words on one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]
