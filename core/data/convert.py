"""Conversions: the same data as another type."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

from prefzoo.data.rows import ANSWERS, Dataset, DataType, Passes, Report, Row, digest, lookalikes
from prefzoo.registry import UsageError

Give = Callable[[Row, Report], Iterable[Row]]  # the rows made from one, and what is to be counted


JUDGED = ("score", "score_chosen", "score_rejected", "margin", "probability", "tie")  # what is said about answers


def _without(row: Row, *columns: str) -> Row:
    return {k: v for k, v in row.items() if k not in columns}


def prompt_only(row: Row) -> Row:
    """The row without answers and labels; the user's other columns stay."""
    return _without(row, *ANSWERS, *JUDGED)


def _prompt(row: Row, report: Report) -> Iterable[Row]:
    yield prompt_only(row)


def _chosen(row: Row, report: Report) -> Iterable[Row]:
    if row.get("tie"):
        report.notes["demonstrations are the chosen side of a tie"] += 1
    yield {**_without(row, "chosen", "rejected", "tie"), "completion": row["chosen"]}


def _both_sides(row: Row, report: Report) -> Iterable[Row]:
    if row.get("tie"):
        report.cut["ties left out: neither side is the better one"] += 1
        return
    scores, rest = _scores_of_pair(row), _without(row, "chosen", "rejected", "tie")
    for place, side in enumerate(("chosen", "rejected")):
        known = {} if scores is None else {"score": scores[place]}
        yield {**rest, "completion": row[side], "label": side == "chosen", **known}


def _desirable(row: Row, report: Report) -> Iterable[Row]:
    if row["label"]:
        yield _without(row, "label")
    else:
        report.cut["undesirable completions left out"] += 1


def _whole(row: Row, report: Report) -> Iterable[Row]:
    column = "text" if isinstance(row["prompt"], str) else "messages"
    yield {**_without(row, "prompt", "completion"), column: row["prompt"] + row["completion"]}


def _last_turn(row: Row, report: Report) -> Iterable[Row]:
    """Of a dialogue, the last turn of the assistant and what comes before it; what is said later is left out."""
    said = row.get("messages")
    if said is None:
        raise UsageError(
            f"data {report.source}: plain text (column 'text') has no prompt; give 'prompt' and 'completion'."
        )
    last = max((i for i, m in enumerate(said) if m["role"] == "assistant"), default=0)
    if last == 0:
        report.cut["dialogues left out: nothing that the assistant answers"] += 1
        return
    if len(said) > last + 1:
        report.cut["messages after the last answer left out"] += len(said) - last - 1
    yield {**_without(row, "messages"), "prompt": said[:last], "completion": [said[last]]}


def _asked(row: Row, report: Report) -> Iterable[Row]:
    said = row.get("messages")
    if said and said[-1]["role"] in ("user", "tool"):
        yield {**_without(row, "messages"), "prompt": said}
    else:
        yield from map(prompt_only, _last_turn(row, report))


def _steps(row: Row, report: Report) -> Iterable[Row]:
    rest = _without(row, "completions", "labels")
    yield {**rest, "completion": "".join(row["completions"]), "label": all(row["labels"])}


def _right_steps(row: Row, report: Report) -> Iterable[Row]:
    for whole in _steps(row, report):
        yield from _desirable(whole, report)


def worth_of(row: Row) -> list[float]:
    """What orders the completions of a ranking, a higher one better: its ranks where it has them, else its scores."""
    return [-float(r) for r in row["ranks"]] if row.get("ranks") is not None else row["scores"]


def best_first(row: Row) -> list[int]:
    """The completions of a ranking from the best to the worst; equal ones keep their order.

    >>> best_first({"scores": [0.1, 0.9, 0.5, 0.9]})
    [1, 3, 2, 0]
    """
    worth = worth_of(row)
    return sorted(range(len(worth)), key=lambda i: -worth[i])


def _all_pairs(row: Row, report: Report) -> Iterable[Row]:
    rest, scores = _without(row, "completions", "scores", "ranks"), worth_of(row)
    if len(set(scores)) < 2:
        report.cut["prompts left out: no two answers of different score"] += 1
        return
    for i, j in itertools.combinations(range(len(scores)), 2):
        if row["completions"][i] == row["completions"][j]:
            report.cut["pairs of identical completions left out"] += 1
        elif scores[i] == scores[j]:
            report.cut["pairs of equal score left out"] += 1
        else:
            win, lose = (i, j) if scores[i] > scores[j] else (j, i)
            given = row.get("scores")
            known = {} if given is None else {"score_chosen": given[win], "score_rejected": given[lose]}
            yield {**rest, "chosen": row["completions"][win], "rejected": row["completions"][lose], **known}


def _best(row: Row, report: Report) -> Iterable[Row]:
    scores = worth_of(row)
    rest = _without(row, "completions", "scores", "ranks")
    yield {**rest, "completion": row["completions"][scores.index(max(scores))]}


def _best_and_worst(row: Row, report: Report) -> Iterable[Row]:
    rest, scores = _without(row, "completions", "scores", "ranks"), worth_of(row)
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        report.cut["prompts left out: no two answers of different score"] += 1
        return
    yield {**rest, "completion": row["completions"][best], "label": True}
    yield {**rest, "completion": row["completions"][worst], "label": False}


def _scores_of_pair(row: Row) -> list[float] | None:
    """What the columns ``score_chosen`` and ``score_rejected`` say, where both hold a number."""
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    told = all(isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in scores)
    return [float(s) for s in scores if s is not None] if told else None


def _of_two(row: Row, report: Report) -> Iterable[Row]:
    """A pair as a ranking. The order is the choice, whatever its scores say."""
    if row.get("tie"):
        report.cut["ties left out: neither side is the better one"] += 1
        return
    scores = _scores_of_pair(row)
    known = {} if scores is None else {"scores": scores}
    rest = _without(row, "chosen", "rejected", *JUDGED)
    yield {**rest, "completions": [row["chosen"], row["rejected"]], "ranks": [1, 2], **known}


def _scored_sides(row: Row, report: Report) -> Iterable[Row]:
    scores = _scores_of_pair(row)
    if scores is None:
        report.cut["pairs left out: no number in score_chosen and score_rejected"] += 1
        return
    for side, score in zip(("chosen", "rejected"), scores, strict=True):
        yield {**_without(row, "chosen", "rejected", *JUDGED), "completion": row[side], "score": score}


def _each(row: Row, report: Report) -> Iterable[Row]:
    if row.get("scores") is None:
        report.cut["rankings left out: ranks, but no scores"] += 1
        return
    rest = _without(row, "completions", "scores", "ranks")
    yield from ({**rest, "completion": c, "score": s} for c, s in zip(row["completions"], row["scores"], strict=True))


STEPS: dict[tuple[DataType, DataType], Give] = {
    ("preference", "prompt_completion"): _chosen,
    ("preference", "unpaired"): _both_sides,
    ("preference", "ranking"): _of_two,
    ("preference", "scored"): _scored_sides,
    ("preference", "prompt"): _prompt,
    ("unpaired", "prompt_completion"): _desirable,
    ("unpaired", "prompt"): _prompt,
    ("prompt_completion", "language_modeling"): _whole,
    ("prompt_completion", "prompt"): _prompt,
    ("language_modeling", "prompt_completion"): _last_turn,
    ("language_modeling", "prompt"): _asked,
    ("stepwise", "prompt_completion"): _right_steps,
    ("stepwise", "unpaired"): _steps,
    ("stepwise", "prompt"): _prompt,
    ("ranking", "preference"): _all_pairs,
    ("ranking", "prompt_completion"): _best,
    ("ranking", "unpaired"): _best_and_worst,
    ("ranking", "scored"): _each,
    ("ranking", "prompt"): _prompt,
    ("scored", "prompt"): _prompt,
}
THROUGH: dict[tuple[DataType, DataType], DataType] = {  # in two steps
    (kind, "language_modeling"): "prompt_completion" for kind in ("preference", "unpaired", "stepwise", "ranking")
}
GROUPED: tuple[DataType, ...] = ("ranking", "preference", "unpaired", "prompt_completion", "language_modeling")


def can_become(to: DataType) -> list[DataType]:
    """The types that can be converted to a type, itself first."""
    found: list[DataType] = [to, *(a for a, b in [*STEPS, *THROUGH] if b == to)]
    return [*found, "scored"] if to in GROUPED else found


def convert(data: Dataset, to: DataType) -> Dataset:
    """The same data as another type.

    Pairs become chosen answers, desirable and undesirable rows, rankings of two, or prompts; rankings become all their
    pairs of different score, the best answer, or the best and the worst; scored answers are grouped by prompt into
    rankings. Where pairs or rankings have scores, they become scored answers.
    Rows made from one stay neighbours: the training order is shuffled by (seed, epoch) anyway, so classes mix.
    """
    if data.type == to:
        return data
    if data.type == "scored" and to in GROUPED:
        return convert(_grouped(data), to)
    between = THROUGH.get((data.type, to))
    steps = [STEPS.get((data.type, between or to)), *([STEPS.get((between, to))] if between else [])]
    first, *then = steps
    if first is None:
        raise UsageError(
            f"data {data.report.source} is of type {data.type}{lookalikes(next(iter(data), {}))}; it cannot become "
            f"{to}. "
            f"Types that can: {', '.join(can_become(to))}."
        )

    def make(report: Report) -> Iterator[Row]:
        made: Iterable[Row] = (new for row in data for new in first(row, report))
        for step in then:
            assert step is not None
            made = (new for row in made for new in step(row, report))
        return _distinct(made, report) if to == "prompt" else iter(made)

    return derived(data, to, make)


def derived(data: Dataset, to: DataType, make: Callable[[Report], Iterator[Row]]) -> Dataset:
    """A data set made from another one, streamed if that is."""
    report = Report(data.report.source, to)
    rows = Passes(make, report)
    return Dataset(rows if data.streamed else list(rows), to, report)


def _distinct(rows: Iterable[Row], report: Report) -> Iterator[Row]:
    seen: set[bytes] = set()
    for row in rows:
        key = digest(row)
        if key in seen:
            report.cut["rows left out that ask the same as another"] += 1
            continue
        seen.add(key)
        yield row


def _grouped(data: Dataset) -> Dataset:
    """Scored answers as rankings: the answers of one prompt together, in the order of the first."""
    if data.streamed:
        raise UsageError(
            f"data {data.report.source}: scored answers are grouped by prompt, for which all must be in memory; "
            "leave out streaming, or store rankings (prompt, completions, scores)."
        )
    groups: dict[bytes, Row] = {}
    for row in data:
        new = {**_without(row, "completion", "score"), "completions": [], "scores": []}
        group = groups.setdefault(digest([row["prompt"], row.get("tools"), row.get("chat_template_kwargs")]), new)
        group["completions"].append(row["completion"])
        group["scores"].append(row["score"])
    rows = list(groups.values())
    return Dataset(rows, "ranking", Report(data.report.source, "ranking", len(rows)))


def to_implicit(row: Row) -> Row:
    """A pair without its prompt: each side begins with it."""
    rest = _without(row, "prompt", "chosen", "rejected")
    return {**rest, "chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
