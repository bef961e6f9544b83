"""``prefzoo generate`` and ``prefzoo chat``: answers of a model, to prompts given or typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from prefzoo.cli.training import read_columns
from prefzoo.data.formats import convert, load_dataset
from prefzoo.generation import resolve_policy, sample, texts
from prefzoo.registry import UsageError
from prefzoo.rollout import Finish, Sampling
from prefzoo.seeds import derive_seed


def generate(
    model: str,
    prompts: Sequence[str],
    file: Path | None,
    columns: str | None,
    out: Path | None,
    n: int,
    sampling: Sampling,
    seed: int,
    loading: dict[str, Any],
    reward: str | None = None,
    plain: bool = False,
) -> None:
    """Answer prompts of the command line, of a data set, or of standard input (one a line)."""
    if out is not None and out.exists():
        raise UsageError(f"--out {str(out)!r} exists already; choose another name.")
    rows: list[dict[str, Any]] = [{"prompt": p} for p in prompts]
    if file is not None:
        named = None if columns is None else read_columns(columns)
        rows += convert(load_dataset(file, columns=named), "prompt").rows
    elif columns is not None:
        raise UsageError("--columns has no effect without --prompts, the file that has them.")
    if not rows and not sys.stdin.isatty():
        rows = [{"prompt": line.rstrip("\n")} for line in sys.stdin if line.strip()]
    if not rows:
        raise UsageError("which prompts? --prompt TEXT, --prompts FILE, or lines on standard input.")
    policy, tokenizer = resolve_policy(model, **loading)
    samples = sample(policy, tokenizer, rows, n, sampling, seed, reward=reward, plain=plain)
    answers, finish = texts(samples, tokenizer), samples.columns["finish"].tolist()
    if out is not None:
        with out.open("w", encoding="utf-8") as lines:
            for i, row in enumerate(rows):
                which = range(i * n, (i + 1) * n)
                found = {
                    "completions": [answers[k] for k in which],
                    "finished": [finish[k] == Finish.STOP for k in which],
                }
                lines.write(json.dumps({**row, **found}, ensure_ascii=False) + "\n")
        print(f"{len(answers)} answers to {len(rows)} prompts are in {out}")
        return
    console = Console(highlight=False, soft_wrap=True)
    for i, row in enumerate(rows):
        console.print(f"[bold]{escape(_shown(row['prompt']))}[/bold]")
        for k in range(i * n, (i + 1) * n):
            cut = " [dim](cut)[/dim]" if finish[k] == Finish.LENGTH else ""
            console.print(f"  → {escape(answers[k].strip())}{cut}")


def chat(model: str, system: str | None, sampling: Sampling, seed: int, loading: dict[str, Any]) -> None:
    """Talk with a model: turns through its chat template, or plain text that it goes on with."""
    policy, tokenizer = resolve_policy(model, **loading)
    plain = tokenizer.chat_template is None
    if plain and system is not None:
        raise UsageError(
            "--system has no effect: the tokenizer has no chat template (--chat-template chatml gives one)."
        )
    how = "no chat template: each line is continued as plain text" if plain else "turns go through the chat template"
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[dim]{escape(model)}: {how}. /reset forgets, /exit or Ctrl-D leaves.[/dim]")
    first: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    turns = list(first)
    number = 0
    while True:
        try:
            line = console.input("[bold]you>[/bold] ").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            turns = list(first)
            continue
        if not line:
            continue
        prompt: Any = line if plain else [*turns, {"role": "user", "content": line}]
        number += 1
        try:
            samples = sample(policy, tokenizer, [{"prompt": prompt}], 1, sampling, derive_seed(seed, "chat", number))
        except UsageError as error:  # a conversation that has become too long
            console.print(f"[red]{escape(str(error))}[/red]\n[dim]/reset forgets the conversation.[/dim]")
            continue
        answer = texts(samples, tokenizer)[0]
        console.print(f"[bold]model>[/bold] {escape(answer.strip())}")
        if not plain:
            turns = [*prompt, {"role": "assistant", "content": answer}]


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
