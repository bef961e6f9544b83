"""Which tokens carry loss: what the assistant says, and no other, whatever the chat template does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from prefzoo.data.chat import encode_prompts
from prefzoo.data.samples import Samples, loss_mask
from prefzoo.data.tokens import segments, tokenise
from prefzoo.models.load import learn_tokenizer
from prefzoo.models.tokenizer import end_ids
from prefzoo.registry import UsageError

Row = dict[str, Any]
CHATML = """{%- if tools %}<eos>system: {{ tools | length }} tools, {{ tools[0].function.name }}
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is defined %}{{ m.content }}{% endif -%}
{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if think %}<think>
{% endif %}{% endif %}"""
# As Qwen3: the last turn gets an empty thought, earlier ones lose theirs.
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}<think>

</think>

{% endif %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED = """{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>
{%- endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
LLAMA = """{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
CHANGING = """{% for m in messages %}[{{ m.role }}{{ ', at last' if loop.last }}]{{ m.content }}<eos>{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
BARE = """{% for m in messages %}
{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}
assistant: {% endif %}"""
STRICT = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif -%}
[{{ m.role }}]{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


def speaker(template: str) -> Any:
    tokenizer = learn_tokenizer(["user assistant system tool one two three four five six"], 320)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]})
    tokenizer.chat_template = template
    return tokenizer


WORDS = {name: speaker(t) for name, t in {
    "chatml": CHATML, "thinking": THINKING, "marked": MARKED, "llama": LLAMA, "changing": CHANGING, "bare": BARE,
    "strict": STRICT,
}.items()}  # fmt: skip
ENDS = {"chatml": "<|im_end|>", "thinking": "<|im_end|>", "marked": "<eos>", "llama": "<|im_end|>", "changing": "<eos>"}


def said(*turns: str) -> list[Row]:
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def learned(samples: Samples, words: Any, row: int = 0) -> list[str]:
    """The runs of tokens that carry loss, as the losses see them."""
    mask = loss_mask(samples, samples.mask_BT())[row][: len(samples.completions[row])]
    return [text for text, on in segments(words, samples.completions[row].tolist(), mask.tolist()) if on]


def whole(samples: Samples, words: Any, row: int = 0) -> str:
    ids = [*samples.prompts[samples.prompt_B[row]], *samples.completions[row]]
    return words.decode([int(i) for i in ids])


TALK = said("system: be", "user: one", "assistant: two", "user: three", "assistant: four", "user: five")


@pytest.mark.parametrize("name", ["chatml", "thinking", "marked", "llama"])
def test_of_a_dialogue_the_assistants_turns_carry_loss(name: str) -> None:
    """Each with the token that ends it, and nothing else; a last question of the user is cut off."""
    words = WORDS[name]
    samples, report = tokenise([{"messages": TALK}], words, "completions")
    assert learned(samples, words) == [f"two{ENDS[name]}", f"four{ENDS[name]}"]
    assert samples.tokens["trainable"].dtype == torch.bool and "five" not in whole(samples, words)
    assert not [n for n in report.notes if "ends the turn" in n]
    closed, _ = tokenise([{"messages": TALK[:5]}], words, "completions")
    thought = "<think>\n\n</think>\n\n" if name == "thinking" else ""
    assert learned(closed, words) == [f"two{ENDS[name]}", f"{thought}four{ENDS[name]}"]


@pytest.mark.parametrize("name", ["chatml", "thinking", "marked", "llama"])
def test_a_single_answer_is_the_same_in_all_types(name: str) -> None:
    """messages, prompt and completion, both in one pair: the same ids carry loss."""
    words, prompt, answer = WORDS[name], TALK[:4], said("assistant: four")
    done, _ = tokenise([{"prompt": prompt, "completion": answer}], words, "completions")
    assert "trainable" not in done.tokens and learned(done, words) == [words.decode(done.completions[0])]
    assert done.prompts[0].tolist() == encode_prompts(words, [prompt])[0]
    pair, _ = tokenise([{"prompt": prompt, "chosen": answer, "rejected": said("assistant: six")}], words, "pairs")
    assert pair.completions[0].tolist() == done.completions[0].tolist()
    dialogue, _ = tokenise([{"messages": [prompt[1], *answer]}], words, "completions")
    alone, _ = tokenise([{"prompt": prompt[1:2], "completion": answer}], words, "completions")
    assert dialogue.completions[0].tolist() == alone.completions[0].tolist()
    assert dialogue.prompts[0].tolist() == alone.prompts[0].tolist() and "trainable" not in dialogue.tokens


def test_marks_and_prefixes_agree() -> None:
    """The same template with and without its {% generation %} marks gives the same mask."""
    bare = speaker(MARKED.replace("{% generation %}", "").replace("{%- endgeneration %}", "{#- -#}"))
    found = [tokenise([{"messages": TALK}], w, "completions")[0] for w in (WORDS["marked"], bare)]
    assert found[0].completions.flat.tolist() == found[1].completions.flat.tolist()
    assert found[0].tokens["trainable"].tolist() == found[1].tokens["trainable"].tolist()


def test_marks_are_found_under_the_rows_template_arguments() -> None:
    """What they write before a turn moves its tokens, and so its marks."""
    words = speaker(MARKED.replace("[{{ m.role }}]", "{% if think %}three four{% endif %}[{{ m.role }}]"))
    for arguments in ({}, {"think": True}, {"add_generation_prompt": True}):
        samples, _ = tokenise([{"messages": TALK, "chat_template_kwargs": arguments}], words, "completions")
        assert learned(samples, words) == ["two<eos>", "four<eos>"], arguments


@pytest.mark.parametrize("name", ["chatml", "marked", "llama"])
def test_an_answer_is_not_followed_by_the_next_prompt(name: str) -> None:
    """A row that asks for the generation prompt gets it where a prompt ends, and nowhere else."""
    words = WORDS[name]
    rows: list[tuple[Row, Any]] = [({"prompt": TALK[:2], "completion": TALK[2:3]}, None), ({"messages": TALK}, None),
                                   ({"messages": TALK[:3]}, "all")]  # fmt: skip
    for row, loss_on in rows:
        asked = {**row, "chat_template_kwargs": {"add_generation_prompt": True}}
        plain, same = (tokenise([r], words, "completions", loss_on=loss_on)[0] for r in (row, asked))
        assert whole(plain, words) == whole(same, words) and learned(plain, words) == learned(same, words)


def test_a_generation_prompt_that_answers_do_not_have_is_told() -> None:
    """As in templates that open a thought: what rollouts begin with is not what the answers begin with."""
    words = speaker(CHATML)
    row = {"prompt": said("user: one"), "completion": said("assistant: two")}
    note = "prompts whose end is tokenised otherwise when they stand alone, as in rollouts"
    for think in (False, True):
        samples, report = tokenise([{**row, "chat_template_kwargs": {"think": think}}] * 2, words, "completions")
        assert report.notes[note] == 2 * think and learned(samples, words) == ["two<|im_end|>"]
    thought = said("assistant: <think>\nfive</think>two")
    _, report = tokenise(
        [{**row, "completion": thought, "chat_template_kwargs": {"think": True}}], words, "completions"
    )
    assert not report.notes[note]


def test_a_dialogue_may_begin_with_the_assistant() -> None:
    samples, _ = tokenise([{"messages": said("assistant: one", "user: two", "assistant: three")}], WORDS["llama"],
                          "completions")  # fmt: skip
    assert learned(samples, WORDS["llama"]) == ["one<|im_end|>", "three<|im_end|>"]


def test_a_template_that_hides_the_turns_is_told_in_words() -> None:
    with pytest.raises(UsageError, match=r"writes message 3 of .* differently once others follow.*% generation %"):
        tokenise([{"messages": TALK}], WORDS["changing"], "completions")
    pairs = [{"prompt": TALK[:2], "chosen": said("assistant: two"), "rejected": said("assistant: six")}]
    assert len(tokenise(pairs, WORDS["changing"], "pairs")[0]) == 1, "one answer needs no mask"


@pytest.mark.parametrize("name", ["chatml", "thinking", "marked", "llama"])
@pytest.mark.parametrize("kind", ["pairs", "completions", "unpaired"])
def test_of_answers_with_several_turns_the_assistants_carry_loss(name: str, kind: Any) -> None:
    words, prompt, answer = WORDS[name], TALK[:2], TALK[2:5]
    row = {"prompt": prompt, "chosen": answer, "rejected": said("assistant: six")}
    samples, _ = tokenise([row], words, kind)
    last = "<think>\n\n</think>\n\n" if name == "thinking" else ""
    assert learned(samples, words) == [f"two{ENDS[name]}", f"{last}four{ENDS[name]}"]
    if kind != "completions":
        assert learned(samples, words, 1) == [words.decode(samples.completions[1])]
    full, _ = tokenise([row], words, kind, loss_on="completion")
    assert "trainable" not in full.tokens and learned(full, words) == [words.decode(full.completions[0])]


def test_tools_and_template_arguments_reach_the_template() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "one"}}]}
    tools = [{"type": "function", "function": {"name": "clock"}}]
    row = {"prompt": said("user: one"), "tools": tools, "chat_template_kwargs": {"think": True},
           "completion": [call, *said("tool: two", "assistant: three")]}  # fmt: skip
    words = WORDS["chatml"]
    samples, _ = tokenise([row], words, "completions")
    assert learned(samples, words) == ["<call>one</call><|im_end|>", "three<|im_end|>"]
    assert "1 tools, clock" in whole(samples, words)
    prompts, _ = tokenise([row], words, "prompts")
    assert words.decode(prompts.prompts[0]).endswith("<|im_start|>assistant\n<think>\n")
    assert prompts.extra["tools"] == [tools]


def test_what_a_prompt_ends_with_decides_how_it_goes_on() -> None:
    words = WORDS["chatml"]
    ask, begun, tool = said("user: one"), said("user: one", "assistant: two"), said("user: one", "tool: two")
    ends = [words.decode(ids)[-22:] for ids in encode_prompts(words, [ask, begun, tool])]
    assert ends[0].endswith("<|im_start|>assistant\n") and ends[2].endswith("<|im_start|>assistant\n")
    assert ends[1].endswith("assistant\ntwo"), "the answer goes on in the same turn"
    row = {"prompt": begun, "completion": said("assistant:  three")}
    samples, _ = tokenise([row], words, "completions")
    assert learned(samples, words) == [" three<|im_end|>"] and "two three" in whole(samples, words)
    asked, _ = tokenise([{"prompt": begun, "completion": said("user: x", "assistant: three")}], words, "completions")
    assert learned(asked, words) == ["three<|im_end|>"]


# ------------------------------------------------------------------------------------------------ loss_on


def test_plain_text_carries_loss_everywhere_but_its_first_token() -> None:
    words = WORDS["chatml"]
    samples, _ = tokenise([{"text": "one two"}, {"text": "three<eos>"}], words, "completions")
    assert [words.decode(samples.completions[i]) for i in (0, 1)] == ["one two<eos>", "three<eos>"]
    assert [words.decode(samples.prompts[i]) for i in range(len(samples.prompts))] == ["<bos>"]
    assert "trainable" not in samples.tokens


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_loss_on_all_is_that_of_the_whole_text(kind: str) -> None:
    words = WORDS["llama"]
    ask, answer = ("one two", " three") if kind == "text" else (said("user: one two"), said("assistant: three"))
    everything = [tokenise([row], words, "completions", loss_on="all")[0] for row in
                  ({"prompt": ask, "completion": answer}, {kind: ask + answer},
                   {"prompt": ask, "chosen": answer, "rejected": answer[:-1] + answer[-1:] * 2})]  # fmt: skip
    for samples in everything:
        assert samples.completions[0].tolist() == everything[0].completions[0].tolist()
        assert [words.decode(samples.prompts[0])] == ["<bos>"] and "trainable" not in samples.tokens
    assert "one two" in words.decode(everything[0].completions[0])


def test_loss_on_the_assistant_includes_its_turns_in_the_prompt() -> None:
    words = WORDS["llama"]
    row = {"prompt": TALK[:4], "completion": TALK[4:5]}
    assert learned(tokenise([row], words, "completions")[0], words) == ["four<|im_end|>"]
    both, _ = tokenise([row], words, "completions", loss_on="assistant")
    assert learned(both, words) == ["two<|im_end|>", "four<|im_end|>"]


PAIR = {"prompt": "one", "chosen": " two", "rejected": " three"}


@pytest.mark.parametrize(("row", "kind", "loss_on", "message"), [
    ({"prompt": "one"}, "prompts", "all", "no effect on prompts"),
    (PAIR, "pairs", "assistant", "plain text, in which nobody has turns"),
    (PAIR, "pairs", "all", "no meaning for pairs"), (PAIR, "unpaired", "all", "no meaning for unpaired"),
    ({"text": "one"}, "completions", "completion", "has no completions"),
    ({"text": "one"}, "completions", "assistant", "plain text, in which nobody has turns"),
    ({"messages": TALK}, "completions", "completion", "has no completions"),
    (PAIR, "completions", "al", "expected 'completion', 'assistant' or 'all'"),
    ({"text": "one"}, "pairs", None, "cannot become preference"),
], ids=str)  # fmt: skip
def test_a_choice_without_effect_is_refused(row: Row, kind: Any, loss_on: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tokenise([row], WORDS["llama"], kind, loss_on=loss_on)


# ------------------------------------------------------------------------------------------------ limits, stores


def test_masks_are_cut_with_their_completions() -> None:
    words = WORDS["llama"]
    full, _ = tokenise([{"messages": TALK}], words, "completions")
    ids, mask = full.completions[0].tolist(), full.tokens["trainable"].tolist()
    prompt, second = len(full.prompts[0]), mask.index(False)
    for room in range(1, len(ids) + 1):
        cut, report = tokenise([{"messages": TALK}], words, "completions", max_length=prompt + room)
        assert cut.completions[0].tolist() == ids[:room] and bool(report.cut) == (room < len(ids))
        if room > second:
            assert cut.tokens["trainable"].tolist() == mask[:room]
        else:
            assert "trainable" not in cut.tokens
    late = {"prompt": TALK[:2], "completion": [*said("user: one two three"), *said("assistant: four")]}
    whole_row, _ = tokenise([late], words, "completions")
    with pytest.raises(UsageError, match=r"no usable row is left(?s:.)*no token that carries loss within the limit of"):
        tokenise([late], words, "completions", max_length=len(whole_row.prompts[0]) + 3)


@pytest.mark.parametrize("kind", ["completions", "pairs"])
def test_masks_are_stored_and_taken_with_their_rows(kind: Any, tmp_path: Path) -> None:
    words = WORDS["chatml"]
    rows = [{"prompt": TALK[:2], "chosen": TALK[2:5], "rejected": said("assistant: six")},
            {"prompt": TALK[1:2], "chosen": said("assistant: one"), "rejected": TALK[2:5]}]  # fmt: skip
    plain, _ = tokenise(rows, words, kind)
    for _ in range(2):
        stored, _ = tokenise(rows, words, kind, cache=tmp_path)
        assert stored.tokens["trainable"].tolist() == plain.tokens["trainable"].tolist()
    back = stored.take([1, 0])
    order = range(len(plain.completions))
    order = [*order][len(order) // 2 :] + [*order][: len(order) // 2]
    assert [learned(back, words, i) for i in range(len(order))] == [learned(plain, words, i) for i in order]


# ------------------------------------------------------------------------------------------------ notes


def test_ends_of_turns_are_known() -> None:
    for name, end in ENDS.items():
        words = WORDS[name]
        assert set(end_ids(words)) == {words.eos_token_id, words.convert_tokens_to_ids(end)}
    assert set(end_ids(WORDS["bare"])) == {WORDS["bare"].eos_token_id}


def test_a_template_that_ends_no_turn_is_reported() -> None:
    rows = [{"prompt": said("user: one"), "completion": said("assistant: two")}]
    _, report = tokenise(rows, WORDS["bare"], "completions")
    assert report.notes["completions whose loss holds no token that ends the turn: nothing there teaches to stop"] == 1
    assert "teaches to stop" in "\n".join(report.lines())


def test_bos_is_never_doubled_and_its_absence_is_told() -> None:
    words = WORDS["llama"]
    bos = words.bos_token_id
    assert words("one")["input_ids"][0] == bos
    chat, report = tokenise([{"prompt": said("user: one")}], words, "prompts")
    assert chat.prompts[0].tolist().count(bos) == 1 and not report.notes
    begun: list[tuple[Row, Any]] = [
        ({"prompt": "<bos>one", "completion": " two"}, "completions"), ({"prompt": "<bos>one"}, "prompts"),
        ({"text": "<bos>one two"}, "completions"),
    ]  # fmt: skip
    for row, kind in begun:
        samples, report = tokenise([row], words, kind)
        ids = itertools.chain(samples.prompts.flat.tolist(), samples.completions.flat.tolist())
        assert list(ids).count(bos) == 1 and not report.notes
    _, report = tokenise([{"prompt": said("user: one")}], WORDS["chatml"], "prompts")
    (note,) = report.notes
    assert "without the BOS token that plain text gets" in note
    twice = speaker("{{ bos_token }}" + LLAMA)
    _, report = tokenise([{"prompt": said("user: one")}], twice, "prompts")
    (note,) = report.notes
    assert "several BOS tokens" in note


def test_what_a_template_refuses_is_a_fault_of_the_row() -> None:
    rows = [{"prompt": TALK[:2]}, {"prompt": TALK[1:2]}]
    samples, report = tokenise(rows, WORDS["strict"], "prompts")
    assert len(samples) == 1 and report.dropped == {"the chat template refuses it: no system role": 1}
    with pytest.raises(UsageError, match="data list: the chat template refuses it: no system role; it starts"):
        tokenise(rows, WORDS["strict"], "prompts", strict=True)


def test_a_history_that_a_template_refuses_is_a_fault_of_the_row() -> None:
    """The whole is rendered, the turns before the second answer are not."""
    words = speaker("{% if messages | length == 3 %}{{ raise_exception('odd') }}{% endif %}" + LLAMA)
    good = {"messages": TALK[1:3]}
    samples, report = tokenise([good, {"messages": TALK[1:5]}], words, "completions")
    assert len(samples) == 1 and report.dropped == {"the chat template refuses it: odd": 1}
    row = {"prompt": TALK[1:2], "completion": TALK[2:5]}
    with pytest.raises(UsageError, match=r"no usable row is left(?s:.)*refuses it: odd"):
        tokenise([row], words, "completions")


def test_the_report_shows_where_the_loss_lies() -> None:
    _, report = tokenise([{"messages": TALK[1:]}], WORDS["llama"], "completions")
    assert report.masked == (
        "<bos>[user]one<|im_end|>[assistant] [[two<|im_end|>]][user]three<|im_end|>[assistant][[four<|im_end|>]]"
    )


def test_a_tokenizer_without_an_end_is_told_in_words() -> None:
    words = speaker(BARE)
    words.eos_token = None
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        tokenise([PAIR], words, "pairs")


def test_a_prompt_that_cannot_be_rendered_is_told_in_words() -> None:
    with pytest.raises(UsageError, match=r"^the chat template refuses it: no system role\.$"):
        encode_prompts(WORDS["strict"], [TALK[1:2], TALK[:2]])
    assert encode_prompts(WORDS["strict"], []) == []
