"""Conversations through chat templates of real shapes: what is learned is what the assistant says, and its end."""

from __future__ import annotations

import re
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, CHATS, SHAPES, bpe, shaped, spans, turn

from lorafit.data.ends import end_tokens, write_generation_config
from lorafit.data.formats import Example
from lorafit.data.last_turn import last_user_turn
from lorafit.data.rows import IGNORED
from lorafit.data.template import DEFAULT_TEMPLATE, ChatTemplate, parse_args
from lorafit.data.tokenize import Tokens
from lorafit.errors import RequestError

WHEN = datetime(2026, 1, 31)


def made(tokenizer, messages, tools=(), **more):
    """(the row, the counts) of a conversation."""
    maker = Tokens(tokenizer, "causal", 4096, 100_000, moment=WHEN, **more)
    (row,) = maker.rows([Example("f:1", messages=tuple(messages), tools=tuple(tools))], "messages")
    return row, maker.counts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chat", CHATS)
def test_the_learned_characters_are_the_answers_and_their_ends(shape, chat):
    tokenizer, end = shaped(shape)
    messages = CHATS[chat]
    row, counts = made(tokenizer, messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    found = spans(tokenizer, row)
    assert len(found) == len(answers)
    for number, (text, answer) in enumerate(zip(found, answers, strict=True)):
        last = number + 1 == len(answers)
        stop = end if last or shape != "gpt-oss" else "<|end|>"
        head = {"qwen3": r"(<think>\n\n</think>\n\n)?", "gpt-oss": r"(<\|channel\|>final<\|message\|>)?"}.get(
            shape, " ?"
        )
        assert re.fullmatch(head + re.escape(answer + stop), text), text
    assert not row.flags and not counts.left_out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chat", CHATS)
def test_the_ids_are_those_of_the_template(shape, chat):
    tokenizer, _ = shaped(shape)
    row, _ = made(tokenizer, CHATS[chat])
    text = ChatTemplate(tokenizer, moment=WHEN).text()
    ids = tokenizer.apply_chat_template(CHATS[chat], tokenize=True, chat_template=text)
    assert list(row.ids) == list(ids["input_ids"])
    begin = tokenizer.bos_token_id
    assert begin is None or row.ids.count(begin) == 1


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "r1"])
def test_a_prompt_is_what_the_model_is_asked_with(shape):
    tokenizer, _ = shaped(shape)
    chat = CHATS["two"]
    row, counts = made(tokenizer, chat, loss_on="last")
    asked = ChatTemplate(tokenizer, moment=WHEN).render(chat[:3], opened=True)
    before = tokenizer.decode(row.ids[: row.prompt])
    assert before.strip() == asked.strip()
    assert not counts.seams


@pytest.mark.parametrize("shape", SHAPES)
def test_the_end_of_a_turn_is_an_end_token(shape):
    tokenizer, end = shaped(shape)
    assert set(end_tokens(tokenizer)) >= {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    assert len(end_tokens(tokenizer)) <= 2


def test_end_tokens_that_stand_together_are_one_end_and_only_the_last_of_them_stops():
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + '<|say|>' + m.content + '<|/say|><|/turn|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant<|say|>' }}{% endif %}"
    )
    tokenizer = bpe(("<|eos|>", "<|turn|>", "<|say|>", "<|/say|>", "<|/turn|>"), "<|eos|>", template)
    names = tokenizer.convert_ids_to_tokens(end_tokens(tokenizer))
    assert sorted(names) == ["<|/turn|>", "<|eos|>"]
    row, _ = made(tokenizer, CHATS["two"])
    assert spans(tokenizer, row) == ["In the barn.<|/say|><|/turn|>", "At the market.<|/say|><|/turn|>"]


def test_what_ends_the_conversation_is_not_the_end_of_an_answer():
    template = CHATML + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    tokenizer = bpe(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", template)
    row, _ = made(tokenizer, CHATS["two"])
    assert spans(tokenizer, row) == ["In the barn.<|im_end|>", "At the market.<|im_end|>"]


def test_an_end_inside_an_answer_does_not_cut_it_off():
    tokenizer, _ = shaped("chatml")
    row, _ = made(tokenizer, [turn("user", "a"), turn("assistant", "Write <|im_end|> twice.")])
    assert spans(tokenizer, row) == ["Write <|im_end|> twice.<|im_end|>"]
    plain = bpe(
        ("<|eos|>",), "<|eos|>", "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    )
    row, _ = made(plain, [turn("user", "a"), turn("assistant", "Write <|eos|> twice.")])
    assert "Write <|eos|> twice." in spans(plain, row)[0]


def test_the_assistant_may_speak_first():
    for shape in ("chatml", "gemma", "llama3", "gpt-oss"):
        tokenizer, _ = shaped(shape)
        chat = [
            turn("assistant", "Hello there."),
            turn("user", "Where is Ada?"),
            turn("assistant", "In the barn."),
        ]
        row, _ = made(tokenizer, chat)
        assert ["Hello there." in text for text in spans(tokenizer, row)] == [True, False], shape


def test_a_template_that_moves_the_system_turn():
    tokenizer, _ = shaped("mistral3")
    chat = [turn("system", "Be brief, as ever."), *CHATS["two"]]
    row, counts = made(tokenizer, chat)
    assert spans(tokenizer, row) == [" In the barn.</s>", " At the market.</s>"] or spans(tokenizer, row) == [
        "In the barn.</s>",
        "At the market.</s>",
    ]
    assert "Be brief, as ever." in tokenizer.decode(row.ids) and not counts.left_out
    with pytest.raises(RequestError, match="System role not supported"):
        made(shaped("gemma")[0], chat)


CALL = {
    "id": "callabcde",
    "type": "function",
    "function": {"name": "find_person", "arguments": {"who": "Ada", "n": 2}},
}
TOOLS = [{"type": "function", "function": {"name": "find_person", "parameters": {"type": "object"}}}]
AGENT = [
    turn("user", "Where is Ada?"), turn("assistant", None, tool_calls=[CALL]), turn("tool", "barn", tool_call_id="callabcde"),
    turn("assistant", "In the barn."),
]  # fmt: skip


@pytest.mark.parametrize("shape", ["qwen3", "mistral3"])
@pytest.mark.parametrize("form", ["object", "text"])
def test_tool_calls_are_learned_once_encoded(shape, form):
    tokenizer, end = shaped(shape)
    chat = AGENT
    if form == "text":
        call = {**CALL, "function": {"name": "find_person", "arguments": '{"who": "Ada", "n": 2}'}}
        chat = [AGENT[0], {**AGENT[1], "tool_calls": [call]}, *AGENT[2:]]
    row, counts = made(tokenizer, chat, TOOLS)
    called, answered = spans(tokenizer, row)
    assert '"arguments": {"who": "Ada", "n": 2}' in called and called.endswith(end)
    assert answered.endswith("In the barn." + end) and "barn" not in called
    assert not counts.left_out


def test_a_template_that_wants_json_text():
    template = CHATML.replace(
        "m.content +",
        "(m.content or '') + (m.tool_calls[0].function.name + m.tool_calls[0].function.arguments if m.tool_calls else '') +",
    )
    tokenizer = bpe(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", template)
    row, _ = made(tokenizer, AGENT)
    assert spans(tokenizer, row)[0] == 'find_person{"who": "Ada", "n": 2}<|im_end|>'


def test_what_the_template_leaves_out_is_counted_with_an_example():
    chatml, _ = shaped("chatml")
    chat = [
        turn("user", "Where is Ada?"),
        turn("assistant", "In the barn.", reasoning_content="They ask for Ada."),
    ]
    _, counts = made(chatml, chat, TOOLS)
    assert counts.left_out["a thought"] == [1, "f:1", "They ask for Ada."]
    assert counts.left_out["the tools"] == [1, "f:1", "find_person"]
    r1, _ = shaped("r1")
    _, counts = made(r1, [turn("user", "a"), turn("assistant", "<think>\nSeventeen.\n</think>\n\n51")])
    assert counts.left_out == {"a thought": [1, "f:1", "Seventeen."]}
    silent = bpe(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|endoftext|>",
        CHATML.replace(
            "{{ '<|im_start|>' + m.role", "{% if m.role != 'developer' %}{{ '<|im_start|>' + m.role"
        ).replace("'<|im_end|>\n' }}{% endfor %}", "'<|im_end|>\n' }}{% endif %}{% endfor %}"),
    )
    _, counts = made(silent, [turn("developer", "Be kind."), *CHATS["one"]])
    assert counts.left_out == {"a `developer` turn": [1, "f:1", "Be kind."]}
    kept, _ = shaped("gpt-oss")
    row, counts = made(kept, [turn("user", "a"), turn("assistant", "51", thinking="Seventeen thrice.")])
    assert not counts.left_out and "Seventeen thrice." in spans(kept, row)[0]


def test_an_answer_that_would_be_learned_empty_stops_the_run():
    chatml, _ = shaped("chatml")
    with pytest.raises(RequestError, match=r"leaves out a tool call of message 2.*learned empty"):
        made(chatml, [AGENT[0], {**AGENT[1], "content": ""}, *AGENT[2:]], TOOLS)


def test_a_short_turn_is_not_found_in_a_header():
    skipping = "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    tokenizer = bpe(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", skipping)
    _, counts = made(tokenizer, [turn("system", "user"), *CHATS["one"]])
    assert list(counts.left_out) == ["a `system` turn"]


def test_turns_that_are_skipped_are_not_learned():
    tokenizer, _ = shaped("chatml")
    maker = Tokens(tokenizer, "causal", 512, 100_000)
    example = Example("f:1", messages=tuple(CHATS["two"]), skipped=frozenset({1}))
    (row,) = maker.rows([example], "messages")
    assert spans(tokenizer, row) == ["At the market.<|im_end|>"]


def test_what_cannot_be_told_from_the_rest_is_refused_with_a_way_out():
    template = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '...' }}{{ '<|eos|>' }}{% endfor %}"
    tokenizer = bpe(("<|eos|>",), "<|eos|>", template)
    with pytest.raises(RequestError, match="rewrites earlier turns") as error:
        made(tokenizer, CHATS["two"])
    assert "--loss-on last" in error.value.hint


def test_template_arguments_reach_the_template():
    tokenizer, _ = shaped("qwen3")
    asked = ChatTemplate(tokenizer, parse_args("enable_thinking=false")).render(CHATS["one"][:1], opened=True)
    assert asked.endswith("<think>\n\n</think>\n\n")
    assert not ChatTemplate(tokenizer).render(CHATS["one"][:1], opened=True).endswith("</think>\n\n")
    assert parse_args("a=1,b=x,c=True") == {"a": 1, "b": "x", "c": True}
    with pytest.raises(RequestError, match="NAME=VALUE"):
        parse_args("thinking")


def test_a_date_in_the_template_is_the_moment_that_is_given():
    tokenizer, _ = shaped("llama3")
    row, _ = made(tokenizer, CHATS["one"])
    assert "Today Date: 31 Jan 2026" in tokenizer.decode(row.ids)
    assert ChatTemplate(tokenizer).dated and not ChatTemplate(shaped("chatml")[0]).dated


def test_a_seam_is_counted_and_its_token_is_learned_with_the_answer():
    tokenizer, _ = shaped("chatml")
    row, counts = made(tokenizer, [turn("user", "Where is Ada?"), turn("assistant", "\nIn the barn.")])
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode([label for label in row.labels if label != IGNORED])
    if counts.seams:  # the two line breaks are one token here
        assert text == "\n\nIn the barn.<|im_end|>" and row.ids[row.prompt - 1] == header[-2]
    else:
        assert text == "\nIn the barn.<|im_end|>" and row.ids[row.prompt - 1] == header[-1]


def test_a_header_token_that_swallows_white_space_is_not_learned():
    from tokenizers import AddedToken

    template = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    tokenizer = bpe(("<|eos|>", "<|end|>"), "<|eos|>", template)
    tokenizer.add_tokens(
        [AddedToken(t, rstrip=True, special=True) for t in ("<|assistant|>", "<|user|>")], special_tokens=True
    )
    row, counts = made(tokenizer, [turn("user", "Where is Ada?"), turn("assistant", "\n\nIn the barn.")])
    assert spans(tokenizer, row) == ["In the barn.<|end|>"] and counts.seams == 1
    assert tokenizer.convert_ids_to_tokens(row.ids[row.prompt - 1]) == "<|assistant|>"


def test_generation_config_keeps_what_the_base_says(tmp_path):
    import json

    base, run, out = (tmp_path / name for name in ("base", "run", "out"))
    for folder in (base, run, out):
        folder.mkdir()
    (base / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": [5, 3]}')
    write_generation_config(run, ends=(7, 5))
    assert json.loads((run / "generation_config.json").read_text()) == {"eos_token_id": [7, 5]}
    write_generation_config(out, base, run)
    assert json.loads((out / "generation_config.json").read_text()) == {
        "temperature": 0.7,
        "eos_token_id": [5, 3, 7],
    }
    write_generation_config(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()


WORDS = st.text(st.sampled_from("ab AB.?[{\n<think>é"), min_size=1, max_size=12).filter(str.strip)
PLAIN = ("chatml", "gemma", "llama3", "marked", "gpt-oss")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PLAIN), st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_any_conversation_is_learned_in_its_answers_alone(shape, pairs):
    if "</think>" in "".join(answer for _, answer in pairs):
        return
    tokenizer, _ = shaped(shape)
    chat = [m for asked, said in pairs for m in (turn("user", asked), turn("assistant", said))]
    row, counts = made(tokenizer, chat)
    found = spans(tokenizer, row)
    assert len(found) == len(pairs) and not counts.left_out
    for text, (_, answer) in zip(found, pairs, strict=True):
        assert answer.strip() in text and len(text) <= len(answer) + 45


def test_a_template_in_a_file_may_have_the_tags_of_transformers(tmp_path):
    from lorafit.data.template_file import read_template

    text = (
        "{% for m in messages %}{%- generation -%}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    )
    (tmp_path / "t.jinja").write_text(text)
    assert read_template(str(tmp_path / "t.jinja")) == text


@pytest.mark.parametrize("shape", [*SHAPES, "default"])
def test_the_last_user_turn_of_a_prompt(shape):
    tokenizer, _ = shaped("chatml" if shape == "default" else shape)
    if shape == "default":
        tokenizer.chat_template = DEFAULT_TEMPLATE
    template = ChatTemplate(tokenizer, moment=WHEN)
    for chat in CHATS.values():
        rendered = template.render(chat[:-1], opened=True)
        prompt = tokenizer.decode(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        assert last_user_turn(prompt, template) == chat[-2]["content"]
    assert last_user_turn("Where is the user? In the barn.", template) == ""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("answer", ["end", "d", "e", "im", "_", "of", "turn", "eot", "s"])
def test_an_answer_that_is_part_of_its_end_token_ends_with_it(shape, answer):
    tokenizer, end = shaped(shape)
    row, _ = made(tokenizer, [turn("user", "Which one?"), turn("assistant", answer)])
    (text,) = spans(tokenizer, row)
    head = {"qwen3": r"(<think>\n\n</think>\n\n)?", "gpt-oss": r"(<\|channel\|>final<\|message\|>)?"}.get(
        shape, " ?"
    )
    assert re.fullmatch(head + re.escape(answer + end), text), text
