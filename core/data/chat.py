"""Text and messages to token ids, and which of them carry loss: the one tokenisation path of everything."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from prefzoo.data.rows import Fault, Row, show
from prefzoo.models.tokenizer import end_ids
from prefzoo.registry import UsageError

LossOn = Literal["completion", "assistant", "all"]
Ids = list[int]


@dataclass(frozen=True)
class Encoded:
    """A row as ids: its prompt, its completions, and for each the tokens that carry loss (None: all).

    ``labels``: of a completion in steps, one number per token, which the last token of each step carries.
    """

    prompt: Ids
    completions: list[Ids]
    trained: list[list[bool] | None]
    moved: int = 0  # tokens at the end of the prompt alone that the text with its answer does not have
    labels: list[float] | None = None


@dataclass(frozen=True)
class _Turns:
    """Messages as the template renders them, and the first message that may carry loss."""

    said: list[Row]
    first: int
    text: str


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[Ids]:
    """Ids of prompts: with the tokenizer's own special tokens (BOS), or through the chat template for messages."""
    return [_or_raise(e).prompt for e in encode_rows(tokenizer, [{"prompt": p} for p in prompts], [])]


def encode_sides(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], sides: Sequence[Sequence[Any]]
) -> tuple[list[Ids], list[list[Ids]]]:
    """Ids of prompts and of one or two completions each.

    Prompt + completion is tokenised as a whole; the completion starts after the longest token prefix that all sides
    share with the prompt tokenised alone (tokens may merge across the boundary; what merges goes to the completion).
    Plain text gets the EOS token if it does not end with it; for messages the chat template closes the turn.

    Returns:
        prompt ids, and per row the ids of each side.
    """
    rows = [{"prompt": p, **{str(s): side[i] for s, side in enumerate(sides)}} for i, p in enumerate(prompts)]
    encoded = encode_rows(tokenizer, rows, [str(s) for s in range(len(sides))], "completion")
    found = [_or_raise(e) for e in encoded]
    return [e.prompt for e in found], [e.completions for e in found]


def _or_raise(encoded: Encoded | Fault) -> Encoded:
    if isinstance(encoded, Fault):
        raise UsageError(f"{encoded}.")
    return encoded


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], sides: Sequence[str], loss_on: LossOn | None = None
) -> list[Encoded | Fault]:
    """Ids of rows of one format, with the tokens that carry loss; a row that cannot be encoded gives its fault.

    ``sides`` are the columns of the completions (``completions``: a list of them, of any length); none: the rows are
    prompts. Rows of the type language_modeling (``messages`` or ``text`` and no prompt) become one completion, their
    "prompt" being what precedes the first token that carries loss.
    """
    if not rows:
        return []
    if not sides:
        return _prompts(tokenizer, rows)
    if sides == ["text"]:
        whole = _text_ids(tokenizer, [_closed(tokenizer, row["text"]) for row in rows])
        return [Encoded(ids[:1], [ids[1:]], [None]) for ids in whole]
    if sides == ["messages"]:
        return _dialogues(tokenizer, rows, loss_on)
    if not isinstance(rows[0]["prompt"], str):
        return _answers(tokenizer, rows, sides, loss_on)
    alone = _text_ids(tokenizer, [row["prompt"] for row in rows])
    said = [_answers_of(row, sides) for row in rows]
    texts = [row["prompt"] + _closed(tokenizer, a) for row, answers in zip(rows, said, strict=True) for a in answers]
    rest = iter(_text_ids(tokenizer, texts))
    each = [list(itertools.islice(rest, len(answers))) for answers in said]
    return [_split(prompt, ids, [None] * len(ids)) for prompt, ids in zip(alone, each, strict=True)]


def _answers_of(row: Row, sides: Sequence[str]) -> list[Any]:
    """The completions of a row, each in a column of its own or all in one."""
    return row["completions"] if sides == ["completions"] else [row[side] for side in sides]


def encode_steps(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Encoded | Fault]:
    """Ids of rows of the type stepwise: the last token of each step carries loss, and its label.

    The steps are tokenised as one text. A token that reaches from one step into the next ends the earlier one; the last
    step ends with the token that ends the answer, so that a score read there is the last step's.
    """
    if not tokenizer.is_fast:
        raise UsageError("the labels of steps need a fast tokenizer, which knows where tokens begin.")
    alone = _text_ids(tokenizer, [row["prompt"] for row in rows])
    texts = [row["prompt"] + _closed(tokenizer, "".join(row["completions"])) for row in rows]
    found = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    encoded: list[Encoded | Fault] = []
    for row, prompt, ids, raw, spans in zip(
        rows, alone, _text_ids(tokenizer, texts), found["input_ids"], found["offset_mapping"], strict=True
    ):
        skipped = next(i for i in range(len(raw)) if raw[i : i + len(ids)] == ids)  # a BOS token that was doubled
        starts = [start for start, _ in spans[skipped : skipped + len(ids)]]
        split = _split(prompt, [ids], [None])
        shared = len(split.prompt)
        ends = list(itertools.accumulate(map(len, row["completions"][:-1]), initial=len(row["prompt"])))[1:]
        places = [bisect.bisect_left(starts, end) - 1 - shared for end in ends] + [len(ids) - 1 - shared]
        if any(b <= a for a, b in itertools.pairwise([-1, *places])):
            encoded.append(Fault("two steps that end in one token"))
            continue
        mask, labels = [False] * len(split.completions[0]), [0.0] * len(split.completions[0])
        for place, label in zip(places, row["labels"], strict=True):
            mask[place], labels[place] = True, float(label)
        encoded.append(Encoded(split.prompt, split.completions, [mask], split.moved, labels))
    return encoded


def _split(prompt: Ids, whole: Sequence[Ids], trained: Sequence[list[bool] | None]) -> Encoded:
    """Prompt and completions: what all of them share with the prompt alone, and the rest of each."""
    shared = min(_common_prefix(prompt, ids) for ids in whole)
    masks = [None if mask is None else mask[shared:] for mask in trained]
    return Encoded(prompt[:shared], [ids[shared:] for ids in whole], masks, len(prompt) - shared)


def _common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------------------------- plain text


def _closed(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    eos = tokenizer.eos_token
    if eos is None:
        raise UsageError("the tokenizer has no end-of-sequence token, so no answer would end; set tokenizer.eos_token.")
    return text if text.endswith(eos) else text + eos


def _text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Ids with the tokenizer's own special tokens; a BOS token that the text begins with is not doubled."""
    if not texts:
        return []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    appended = eos is not None and tokenizer("")["input_ids"][-1:] == [eos] != [bos]
    found = []
    for text, ids in zip(texts, tokenizer(list(texts), verbose=False)["input_ids"], strict=True):
        ids = ids[:-1] if appended else ids  # a prompt has no end, an answer gets its own
        doubled = bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token)
        found.append(ids[1:] if doubled else ids)
    return found


# ---------------------------------------------------------------------------------------------- messages


def render(tokenizer: PreTrainedTokenizerBase, row: Row, messages: Sequence[Row], **flags: bool) -> str:
    """Messages as the chat template writes them, with the row's tools and template arguments."""
    if tokenizer.chat_template is None:
        raise UsageError(
            "the data holds messages, but the tokenizer has no chat template; set chat_template='chatml' or a Jinja "
            "file, or tokenizer.chat_template."
        )
    arguments = {
        **row.get("chat_template_kwargs", {}),
        "tools": row.get("tools"),
        "add_generation_prompt": False,
        **flags,
    }
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **arguments))
    except Exception as error:  # templates are programs: they refuse roles and orders, and fail in their own ways
        raise Fault(f"the chat template refuses it: {str(error)[:100]}") from error


def _render_prompt(
    tokenizer: PreTrainedTokenizerBase, row: Row, prompt: Sequence[Row], answer: str = "assistant"
) -> str:
    """A prompt up to where the answer begins: a new turn, or the last one of the assistant continued."""
    if prompt[-1]["role"] != "assistant":
        return render(tokenizer, row, prompt, add_generation_prompt=True)
    return render(tokenizer, row, prompt, continue_final_message=answer == "assistant")


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Ids of rendered messages: the template has written every special token."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Encoded | Fault]:
    if isinstance(rows[0]["prompt"], str):
        return [Encoded(ids, [], []) for ids in _text_ids(tokenizer, [row["prompt"] for row in rows])]
    texts: list[str | Fault] = []
    for row in rows:
        try:
            texts.append(_render_prompt(tokenizer, row, row["prompt"]))
        except Fault as fault:
            texts.append(fault)
    ids = iter(_plain_ids(tokenizer, [text for text in texts if isinstance(text, str)]))
    return [text if isinstance(text, Fault) else Encoded(next(ids), [], []) for text in texts]


def _answers(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], sides: Sequence[str], loss_on: LossOn | None
) -> list[Encoded | Fault]:
    """Prompts and completions of messages. In a completion of several turns only the assistant's carry loss."""
    ends = set(end_ids(tokenizer))
    found: list[tuple[str, list[_Turns]] | Fault] = []
    for row in rows:
        try:
            answers = _answers_of(row, sides)
            first = answers[0][0]["role"]
            turns = [_continued(tokenizer, row, answer) for answer in answers]
            found.append((_render_prompt(tokenizer, row, row["prompt"], first), turns))
        except Fault as fault:
            found.append(fault)
    texts = [text for one in found if not isinstance(one, Fault) for text in (one[0], *(turn.text for turn in one[1]))]
    ids = iter(_plain_ids(tokenizer, texts))
    encoded: list[Encoded | Fault] = []
    for row, one in zip(rows, found, strict=True):
        if isinstance(one, Fault):
            encoded.append(one)
            continue
        prompt, whole = next(ids), [next(ids) for _ in one[1]]
        try:
            masks = [_mask(tokenizer, row, turns, i, ends, loss_on) for turns, i in zip(one[1], whole, strict=True)]
            stops = [_to_last_end(tokenizer, i, ends) if m is None else _after_last(m)
                     for i, m in zip(whole, masks, strict=True)]  # fmt: skip
            split = _split(
                prompt, [i[:n] for i, n in zip(whole, stops, strict=True)],
                [m and m[:n] for m, n in zip(masks, stops, strict=True)],
            )  # fmt: skip
            if not all(m is None or any(m) for m in split.trained):
                raise Fault("no turn of the assistant to learn from")
            encoded.append(split)
        except Fault as fault:
            encoded.append(fault)
    return encoded


def _mask(
    tokenizer: PreTrainedTokenizerBase, row: Row, turns: _Turns, ids: Ids, ends: set[int], loss_on: LossOn | None
) -> list[bool] | None:
    """The mask of an answer; None where it is one turn of the assistant, or all its turns carry loss."""
    if loss_on == "completion" or [m["role"] for m in turns.said[turns.first :]] == ["assistant"]:
        return None
    return assistant_mask(tokenizer, row, turns, ids, ends)


def _continued(tokenizer: PreTrainedTokenizerBase, row: Row, side: list[Row]) -> _Turns:
    """The prompt with an answer; where both meet in a turn of the assistant, the answer continues it."""
    prompt = row["prompt"]
    if prompt[-1]["role"] == side[0]["role"] == "assistant":
        joined = {**prompt[-1], **side[0], "content": prompt[-1].get("content", "") + side[0].get("content", "")}
        prompt, side = prompt[:-1], [joined, *side[1:]]
    return _Turns([*prompt, *side], len(prompt), render(tokenizer, row, [*prompt, *side]))


def _dialogues(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], loss_on: LossOn | None
) -> list[Encoded | Fault]:
    """Whole dialogues: the turns of the assistant carry loss, or everything does."""
    ends = set(end_ids(tokenizer))
    encoded: list[Encoded | Fault] = []
    for row in rows:
        try:
            text = render(tokenizer, row, row["messages"])
            (ids,) = _plain_ids(tokenizer, [text])
            if loss_on == "all":
                ids = ids[: _to_last_end(tokenizer, ids, ends)]
                encoded.append(Encoded(ids[:1], [ids[1:]], [None]))
                continue
            mask = assistant_mask(tokenizer, row, _Turns(row["messages"], 0, text), ids, ends)
            if not any(mask):
                raise Fault("no turn of the assistant to learn from")
        except Fault as fault:
            encoded.append(fault)
            continue
        start, stop = max(mask.index(True), 1), _after_last(mask)
        inside = mask[start:stop]
        encoded.append(Encoded(ids[:start], [ids[start:stop]], [None if all(inside) else inside]))
    return encoded


def _after_last(mask: Sequence[bool]) -> int:
    return len(mask) - list(reversed(mask)).index(True) if any(mask) else len(mask)


def _to_last_end(tokenizer: PreTrainedTokenizerBase, ids: Ids, ends: set[int]) -> int:
    """Length without the white space that a template writes after the end of the last turn."""
    last = next((i for i in reversed(range(len(ids))) if ids[i] in ends), len(ids) - 1)
    return len(ids) if tokenizer.decode(ids[last + 1 :]).strip() else last + 1


# ---------------------------------------------------------------------------------------------- masks


def assistant_mask(tokenizer: PreTrainedTokenizerBase, row: Row, turns: _Turns, ids: Ids, ends: set[int]) -> list[bool]:
    """Which tokens the assistant says in these messages, the token that ends each turn included.

    From the template's ``{% generation %}`` marks where it has them. Otherwise from its own prefixes: a turn begins
    where the messages before it with the generation prompt end, and ends where the messages up to it end; or, where
    the template writes the last turn differently, at the next token that ends a turn.
    """
    if not tokenizer.is_fast:
        raise UsageError("loss on the assistant's turns only needs a fast tokenizer, which knows where tokens begin.")
    said, text = turns.said, turns.text
    arguments = {**row.get("chat_template_kwargs", {}), "tools": row.get("tools")}
    if re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.get_chat_template(tools=row.get("tools")))):
        marked = tokenizer.apply_chat_template(
            list(said), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments
        )
        return [bool(m) for m in marked["assistant_masks"]]
    seen = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = seen["offset_mapping"]
    mask = [False] * len(ids)
    for turn, message in enumerate(said):
        if turn < turns.first or message["role"] != "assistant":
            continue
        start = _turn_start(tokenizer, row, said[:turn], text, ids, offsets)
        until = render(tokenizer, row, said[: turn + 1])
        if start is not None and text.startswith(until):
            stop = next((t for t in range(start, len(ids)) if offsets[t][0] >= len(until)), len(ids))
            stop = start + _to_last_end(tokenizer, ids[start:stop], ends)
        elif start is not None:
            stop = next((t + 1 for t in range(start, len(ids)) if ids[t] in ends), 0)
        if start is None or stop <= start:
            raise UsageError(
                f"the chat template writes message {turn + 1} of {show(list(said))} differently once others follow, so "
                "it cannot be told which tokens are the assistant's. Put {% generation %} and {% endgeneration %} "
                "around them in tokenizer.chat_template, or train on the last answers only (prompt and completion)."
            )
        mask[start:stop] = [True] * (stop - start)
    return mask


def _turn_start(
    tokenizer: PreTrainedTokenizerBase, row: Row, before: Sequence[Row], text: str, ids: Ids, offsets: Any
) -> int | None:
    """The first token after the header of the assistant's turn."""
    if not before:  # no history to render: what two other answers share is the header
        x, y = (render(tokenizer, row, [{"role": "assistant", "content": word}]) for word in "xy")
        header = x[: _common_prefix(x, y)]
        history = ""
    else:
        history = render(tokenizer, row, before)
        header = render(tokenizer, row, before, add_generation_prompt=True)
    if not text.startswith(history):
        return None
    if text.startswith(header):
        return next((t for t, (_, stop) in enumerate(offsets) if stop > len(header)), None)
    (expected,) = _plain_ids(tokenizer, [header])  # such as <think>, which is not there in an earlier turn
    start = _common_prefix(expected, ids)
    return start if start < len(ids) and offsets[start][0] >= len(history) else None
