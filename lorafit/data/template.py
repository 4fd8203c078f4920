"""A conversation through the chat template: one text, and the characters in it that are learned.

The assistant's part comes from the best source there is: the template's own `{% generation %}` blocks; else
rendering turn by turn; else the place of each answer in the whole rendering, found by putting another text
in its place; else the answer's own words, where they stand there once. Where none of these tells an answer
from the rest, the row is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from lorafit.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a tokenizer that has no template of its own; saved with the adapter, so that it is used again.
DEFAULT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ message['role'].capitalize() + ':\\n' + (message['content'] or '') }}"
    "{{ (eos_token or '') if message['role'] == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)

SENTINEL = "XqSentinelXq"  # a text that no row holds

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE = re.compile(r"strftime_now\(\s*(?:\"([^\"]*)\"|'([^']*)')\s*\)")

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(slots=True)
class ChatTemplate:
    """A tokenizer's chat template, with arguments for it and the moment that it takes for now."""

    tokenizer: PreTrainedTokenizerBase
    args: dict[str, Any] = field(default_factory=dict)
    moment: datetime = field(default_factory=datetime.now)
    _texts: dict[bool, str] = field(default_factory=dict)
    _marks: re.Pattern[str] | None = None
    _known: dict[Any, Any] = field(default_factory=dict)

    # rendering

    def text(self, tools: bool = False) -> str:
        """The template's own text, with today's date put in: `strftime_now('%d %b %Y')` as a string."""
        if tools not in self._texts:
            source = self.tokenizer.get_chat_template(None, [{}] if tools else None)
            self._texts[tools] = DATE.sub(
                lambda m: json.dumps(self.moment.strftime(m[1] if m[1] is not None else m[2])), source
            )
        return self._texts[tools]

    @property
    def dated(self) -> bool:
        """Whether the template writes today's date."""
        found = self.tokenizer.chat_template
        return "strftime_now" in (found if isinstance(found, str) else str(found))

    @property
    def names_tools(self) -> bool:
        return "tool_calls" in self.text(True)

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = (), opened: bool = False) -> str:
        """The conversation as text; `opened` ends it with the words that open an answer.

        Raises whatever the template raises.
        """
        return str(
            self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=self.text(bool(tools)),
                tokenize=False,
                add_generation_prompt=opened,
                **self.args,
            )
        )

    def probe(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), opened: bool = False
    ) -> str | None:
        """The rendering, or None where the template refuses it."""
        try:
            return self.render(messages, tools, opened)
        except Exception:  # a template may raise anything; jinja has kinds of its own
            return None

    def render_row(self, messages: Sequence[Message], tools: Sequence[Any], where: str) -> str:
        """The whole conversation of a row. Raises RequestError where the template refuses it."""
        try:
            return self.render(messages, tools)
        except Exception as error:
            why = str(error).splitlines()
            raise RequestError(
                f"`{where}`: the chat template refuses it: {why[0] if why else type(error).__name__}",
                "--chat-template names another",
            ) from None

    # special tokens

    @property
    def marks(self) -> re.Pattern[str]:
        """One special token of the tokenizer, as a pattern; of its added tokens, not of a list in its files."""
        if self._marks is None:
            names = special_texts(self.tokenizer)
            every = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
            self._marks = re.compile(every or r"(?!)")
        return self._marks

    def end_behind(self, text: str, at: int, stop: int) -> int:
        """Where the special tokens end that come first behind `at`: those that stand together; 0 for none.

        A reserved order of end tokens (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`) is one end.
        """
        found = self.marks.search(text, at, stop)
        if found is None:
            return 0
        end = found.end()
        while (more := self.marks.match(text, end, stop)) and not more[0].startswith(self._opening):
            end = more.end()
        return end

    @property
    def _opening(self) -> str:
        """The first token of a turn, as `<|im_start|>`; it ends none."""
        if "opening" not in self._known:
            asked = [{"role": "user", "content": "a"}]
            head, opened = self.probe(asked), self.probe(asked, opened=True)
            said = opened[len(head) :] if head and opened and opened.startswith(head) else ""
            found = self.marks.match(said)
            self._known["opening"] = found[0] if found else "\0"
        return str(self._known["opening"])

    def last_special(self, text: str) -> str | None:
        """The special token that a text ends with."""
        every = list(self.marks.finditer(text))
        return every[-1][0] if every and every[-1].end() == len(text) else None

    # the assistant's part

    def spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any],
        whole: str,
        answers: Sequence[int],
        where: str,
    ) -> dict[int, Span]:
        """By the number of a message, the characters of `whole` that are learned: what the assistant says
        there, and its end.

        Raises RequestError where an answer cannot be told from the rest.
        """
        if GENERATION_BLOCK.search(self.text(bool(tools))):
            found = self._marked(messages, tools, whole, answers)
            if found is not None:
                return found
        spans: dict[int, Span] = {}
        low = 0
        for number in answers:
            span = (
                self._turn(messages, tools, whole, number)
                or self._replaced(messages, tools, whole, number, low)
                or self._verbatim(messages, whole, number, low)
            )
            if span is None:
                raise RequestError(
                    f"`{where}`: the chat template rewrites earlier turns, so what the "
                    f"assistant says in message {number + 1} cannot be told from the rest",
                    "--loss-on last learns the last answer alone, or split the rows into one answer each",
                )
            spans[number] = span
            low = span[1]
        return spans

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Any], whole: str, answers: Sequence[int]
    ) -> dict[int, Span] | None:
        """The template's own marks, where there is one for each of the assistant's turns; or, under numbers
        below 0, all of them where all turns are learned."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            [list(messages)],
            tools=list(tools) or None,
            chat_template=self.text(bool(tools)),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.args},
        )
        (text,), (marks,) = rendered
        every = [n for n, turn in enumerate(messages) if turn["role"] == "assistant"]
        if text != whole or not marks:
            return None
        if len(marks) == len(every):
            return {n: self._ended(whole, *marks[every.index(n)]) for n in answers}
        if list(answers) == every and len(marks) > len(every):  # several blocks in a turn
            return {-1 - at: self._ended(whole, *mark) for at, mark in enumerate(marks)}
        return None

    def _ended(self, whole: str, start: int, stop: int) -> Span:
        """A marked span with the end token that stands right behind it, if the mark leaves that out."""
        end = None if self.marks.search(whole, start, stop) else self.marks.match(whole, stop)
        return start, stop if end is None or end[0].startswith(self._opening) else end.end()

    def _turn(
        self, messages: Sequence[Message], tools: Sequence[Any], whole: str, number: int
    ) -> Span | None:
        """What the whole has more once the turn is there: where it begins with the rendering up to it."""
        last = number + 1 == len(messages)
        after = whole if last else self.probe(messages[: number + 1], tools)
        if after is None or not whole.startswith(after):
            return None
        start = self._start(messages, tools, after, number)
        if start is None:
            return None
        return start, self._stop(messages[number], whole, start, len(after))

    def _start(
        self, messages: Sequence[Message], tools: Sequence[Any], after: str, number: int
    ) -> int | None:
        """Where an answer begins in `after`, the text that ends with it; None where it cannot be told."""
        opened = self.probe(messages[:number], tools, opened=True)
        if opened is None:
            return None
        if after.startswith(opened):
            return len(opened)
        # the words that open an answer may hold more than stands there later, as an open <think>
        closed = self.probe(messages[:number], tools)
        if closed is None or not after.startswith(closed):
            return None
        shared = _alike(after, opened)
        said = (messages[number].get("content") or "").strip()
        at = after.find(said, len(closed)) if said else -1
        return shared if at < 0 else min(shared, at)

    def _stop(self, turn: Message, whole: str, start: int, stop: int) -> int:
        """Where an answer and its end token end, within the text of its turn: white space behind the end
        token is not the assistant's, nor is an end of the conversation."""
        at = max(start, _last_piece(turn, whole, start, self._before_marks(whole, start, stop)))
        if at > start or not (turn.get("content") or turn.get("tool_calls")):
            return self.end_behind(whole, at, stop) or stop
        found = stop  # rewritten: what ends with special tokens ends with the last of them
        for mark in self.marks.finditer(whole, start, stop):
            found = mark.end() if not whole[mark.end() : stop].strip() else found
        return found

    def _before_marks(self, whole: str, start: int, stop: int) -> int:
        """`stop`, or where the special tokens and white space begin that stand before it: an answer `end` is not
        in `<|im_end|>`."""
        for mark in reversed(list(self.marks.finditer(whole, start, stop))):
            if whole[mark.end() : stop].strip():
                break
            stop = mark.start()
        return stop

    def _replaced(
        self, messages: Sequence[Message], tools: Sequence[Any], whole: str, number: int, low: int
    ) -> Span | None:
        """The place of an answer: what changes in the whole when another text stands in its place."""
        turn = messages[number]
        calls = turn.get("tool_calls")
        if turn.get("content"):
            first = self._place(messages, tools, whole, number, {"content": SENTINEL})
        elif calls:
            first = self._place(messages, tools, whole, number, {"tool_calls": _named(calls, 0)})
        else:
            return None
        last = first
        if calls and first is not None:
            last = self._place(messages, tools, whole, number, {"tool_calls": _named(calls, len(calls) - 1)})
        if first is None or last is None or first[0] < low:
            return None
        start = self._behind_header(whole, first[0], low, exact=bool(turn.get("content")))
        if start is None:
            return None
        end = self._turn_end
        if not calls and end and whole.startswith(end, last[1]):
            return start, last[1] + len(end)
        found = self.marks.search(whole, last[1])
        return start, found.end() if found else (last[1] if not calls else len(whole))

    def _place(
        self, messages: Sequence[Message], tools: Sequence[Any], whole: str, number: int, change: Message
    ) -> Span | None:
        altered = [*messages]
        altered[number] = {**messages[number], **change}
        text = self.probe(altered, tools)
        if text is None or text.count(SENTINEL) != 1:
            return None
        before, _, behind = text.partition(SENTINEL)
        if len(before) + len(behind) > len(whole):
            return None
        if not (whole.startswith(before) and whole.endswith(behind)):
            return None
        return len(before), len(whole) - len(behind)

    def _verbatim(self, messages: Sequence[Message], whole: str, number: int, low: int) -> Span | None:
        """An answer whose words stand in the whole just once."""
        said = (messages[number].get("content") or "").strip()
        if not said or messages[number].get("tool_calls") or whole.count(said) != 1:
            return None
        at = whole.index(said)
        if at < low:
            return None
        start = self._behind_header(whole, at, low, exact=True)
        stop = at + len(said)
        end = self._turn_end
        if end and whole.startswith(end, stop):
            stop += len(end)
        elif (found := self.marks.match(whole, stop)) is not None:
            stop = found.end()
        return start if start is not None else at, stop

    def _behind_header(self, whole: str, at: int, low: int, exact: bool) -> int | None:
        """Where the words that open the answer at `at` end, so that a thought before it is learned with it."""
        header = self._header
        found = whole.rfind(header, low, at) if header.strip() else -1
        if found >= 0 and not (self._turn_end and self._turn_end in whole[found + len(header) : at]):
            return found + len(header)
        return at if exact else None

    @property
    def _header(self) -> str:
        """What opens an answer, both in the middle of a conversation and as a prompt for the next one."""
        if "header" not in self._known:
            asked = [{"role": "user", "content": "a"}]
            head, opened = self.probe(asked), self.probe(asked, opened=True)
            prompt = opened[len(head) :] if head and opened and opened.startswith(head) else ""
            past = self.probe([*asked, {"role": "assistant", "content": SENTINEL}, *asked])
            if past and head and past.startswith(head) and SENTINEL in past:
                written = past[len(head) : past.index(SENTINEL)]
                prompt = prompt[: _alike(prompt, written)]
            self._known["header"] = prompt
        return str(self._known["header"])

    @property
    def _turn_end(self) -> str:
        """What the template writes behind an answer, up to its end token; empty where there is none."""
        if "end" not in self._known:
            text = self.probe([{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}])
            self._known["end"] = ""
            if text and SENTINEL in text:
                at = text.rindex(SENTINEL) + len(SENTINEL)
                end = self.end_behind(text, at, len(text))
                self._known["end"] = text[at:end] if end else ""
        return str(self._known["end"])


def parse_args(text: str | None) -> dict[str, Any]:
    """`enable_thinking=false,tone=dry` as {"enable_thinking": False, "tone": "dry"}. Raises RequestError."""
    found: dict[str, Any] = {}
    for pair in (text or "").split(","):
        if not pair.strip():
            continue
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not name.isidentifier():
            raise RequestError(
                f"--template-args is `{text}`: it takes NAME=VALUE pairs", "as enable_thinking=false"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            words = {"True": True, "False": False, "None": None}
            found[name] = words.get(value, value)
    return found


def special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special tokens of a tokenizer: by its added tokens, whatever lists its files hold."""
    found = {str(token) for token in tokenizer.all_special_tokens}
    for token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).values():
        if getattr(token, "special", False):
            found.add(str(token.content))
    return {text for text in found if text}


def _named(calls: Sequence[Any], number: int) -> list[Any]:
    """The calls with another name for one of them."""
    made = [dict(call) if isinstance(call, dict) else call for call in calls]
    call = made[number]
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        made[number] = {**call, "function": {**call["function"], "name": SENTINEL}}
    elif isinstance(call, dict):
        made[number] = {**call, "name": SENTINEL}
    return made


def _last_piece(turn: Message, whole: str, start: int, stop: int) -> int:
    """Where the last thing that a turn says ends, between `start` and `stop`; -1 where it is not found."""
    said = (turn.get("content") or "").strip()
    at = whole.rfind(said, start, stop) if said else -1
    end = at + len(said) if at >= 0 else -1
    for call in turn.get("tool_calls") or ():
        for text in call_texts(call):
            at = whole.rfind(text, start, stop)
            end = max(end, at + len(text) if at >= 0 else -1)
    return end


def call_texts(call: Any) -> list[str]:
    """A tool call's name, and its arguments' texts as they stand in JSON."""
    inner = call.get("function", call) if isinstance(call, dict) else {}
    found = [str(inner.get("name") or "")]
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return [text for text in (*found, arguments) if text]
    return [text for text in (*found, *leaves(arguments)) if text]


def leaves(value: Any) -> list[str]:
    """All texts in a value of JSON, as they stand in it."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in leaves(item)]
    return [json.dumps(value, ensure_ascii=False)[1:-1]] if isinstance(value, str) else []


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
