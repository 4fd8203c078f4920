"""Examples to rows of token ids with labels, cut to length: one text, one encoding.

The loss covers what the assistant says and the token that ends it, or the completion and the end token, or
all of a text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from lorafit.data.counts import Counts
from lorafit.data.encode import Encoded, Encoder, Text
from lorafit.data.example import Example
from lorafit.data.left_out import LeftOut, fit_arguments
from lorafit.data.messages import REASONING, check_roles
from lorafit.data.rows import CUT, IGNORED, NO_END, Row
from lorafit.data.source import Fault, refuse
from lorafit.data.template import DEFAULT_TEMPLATE, ChatTemplate
from lorafit.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOGETHER = 256  # examples that the tokenizer is given at once
FIRST = 8  # the first ones of a file


@dataclass(slots=True)
class Tokens:
    """Examples to rows, with one tokenizer for one task; counts what became of them.

    `fault` is called with the error of an example that cannot be a row; it raises it unless told otherwise.
    """

    tokenizer: PreTrainedTokenizerBase
    task: str
    max_length: int
    vocab_size: int
    overflow: str = "truncate"
    loss_on: str = "completion"
    template_args: Mapping[str, Any] = field(default_factory=dict)
    moment: datetime | None = None
    counts: Counts = field(default_factory=Counts)
    fault: Fault = refuse
    ends: frozenset[int] = frozenset()
    frame: tuple[tuple[int, ...], tuple[int, ...]] = (
        (),
        (),
    )  # what stands around a row: begin and end tokens
    encoder: Encoder = field(init=False)
    _left_out: LeftOut | None = None

    def __post_init__(self) -> None:
        self.encoder = Encoder.of(self.tokenizer)
        end = self.tokenizer.eos_token_id
        self.ends = self.encoder.special | ({end} if end is not None else set())
        if self.task == "seq2seq" and self.loss_on == "all":
            raise RequestError(
                "--loss-on all: this model reads one text and writes another, which alone is learned",
                "leave it out",
            )
        if self.task == "masked":
            self.frame = self.encoder.begin, self.encoder.behind  # [CLS] [SEP], <s> </s>
            if self.room < 1:
                around = len(self.encoder.begin + self.encoder.behind)
                raise RequestError(
                    f"--max-length {self.max_length} leaves no room beside {around} special tokens"
                )

    @property
    def room(self) -> int:
        """Tokens of a row beside its frame."""
        return self.max_length - len(self.frame[0]) - len(self.frame[1])

    @property
    def dated(self) -> bool:
        """Whether the chat template writes today's date."""
        return self.tokenizer.chat_template is not None and ChatTemplate(self.tokenizer).dated

    def reads(self, key: str) -> bool:
        """Whether the chat template reads this key of a message; what it leaves out of a thought is found
        otherwise."""
        template = self.tokenizer.chat_template
        if self.task == "seq2seq" or template is None:
            return False
        return key in REASONING or re.search(rf"\b{re.escape(key)}\b", str(template)) is not None

    @property
    def left_out(self) -> LeftOut:
        """The chat template, and what it leaves out; a default one where the tokenizer has none."""
        if self._left_out is None:
            if self.tokenizer.chat_template is None:
                self.tokenizer.chat_template = DEFAULT_TEMPLATE
                self.counts.note(
                    "the tokenizer has no chat template: turns are written `User:` and `Assistant:` on lines of their own"
                )
            template = ChatTemplate(self.tokenizer, dict(self.template_args), self.moment or datetime.now())
            self._left_out = LeftOut(template)
        return self._left_out

    def rows(self, examples: Iterable[Example], format: str) -> Iterator[Row]:
        """The rows of those examples, less those with nothing to learn.

        An example that cannot be a row goes to `fault`, as a RequestError with its file and line.
        """
        examples = iter(examples)
        if format == "document" and self.task != "seq2seq":
            yield from self._windows(examples)
            return
        # few at first, so that it is soon known that a file has good rows
        while group := list(islice(examples, TOGETHER if self.counts.examples else FIRST)):
            if self.task == "seq2seq":
                made = [(example, pair) for example in group if (pair := self._safely(self._pair, example))]
                encoded = self._encoded_pairs([pair for _, pair in made])
            else:
                made = [(example, text) for example in group if (text := self._safely(self._text, example))]
                encoded = self._encoded(made)
            for (example, _), found in zip(made, encoded, strict=True):
                try:
                    rows = list(self._fitted(found, example))
                except _TooLong as error:
                    self.fault(error.error)
                    continue
                yield from rows
                self.counts.examples += 1

    def _safely(self, make: Any, example: Example) -> Any:
        """What `make` makes of an example; None where it cannot, and `fault` knows."""
        try:
            return make(example)
        except RequestError as error:
            self.fault(error)
            return None

    # an example's text, and what is learned of it

    def _text(self, example: Example) -> Text:
        if example.kind == "tokens":
            if len(example.ids) != len(example.labels):
                raise RequestError(
                    f"`{example.where}` has {len(example.ids):,} input_ids and {len(example.labels):,} labels"
                )
            return Text("", whole=True)
        if example.kind == "messages":
            return self._conversation(example)
        if example.kind == "text" or self.loss_on == "all":
            exact = example.kind != "text"
            return Text(example.prompt + (example.completion or example.text), whole=True, exact=exact)
        self.counts.join(example.prompt, example.completion)
        text = example.prompt + example.completion
        return Text(text, ((len(example.prompt), len(text)),), exact=True)

    def _pair(self, example: Example) -> tuple[Any, Any] | None:
        """Prompt to the encoder, completion to the decoder; None where the answer's weight is 0."""
        if example.kind == "text":
            raise RequestError(
                f"`{example.where}` is plain text, and this model reads one text and writes another",
                "give it rows of `prompt` and `completion`",
            )
        if example.kind == "tokens":
            return example.ids, example.labels
        if example.kind == "prompt-completion":
            return example.prompt, example.completion
        check_roles(example.messages, str(self.tokenizer.chat_template), example.where)
        *before, last = example.messages
        if any(turn["role"] == "assistant" for turn in before):
            self.counts.note(
                "of a conversation this model learns the last answer: what was said before it is one text, without roles"
            )
        if last["role"] != "assistant":
            raise RequestError(f"`{example.where}`: the last message is not the assistant's")
        if len(before) in example.skipped:
            return None
        if not (last.get("content") or "").strip():
            raise RequestError(f"`{example.where}`: the last message has no text")
        for turn in (*before, last):
            if turn.get("tool_calls"):
                self.counts.leave_out("a tool call", example.where, str(turn["tool_calls"]))
        if example.tools:
            self.counts.leave_out("the tools", example.where, str(example.tools))
        return "\n".join(turn.get("content") or "" for turn in before), last["content"]

    def _conversation(self, example: Example) -> Text:
        """A conversation through the chat template, and the characters that the assistant says, with the end
        token behind them."""
        where, tools = example.where, list(example.tools)
        template = self.left_out.template
        check_roles(example.messages, str(self.tokenizer.chat_template), where)
        messages = fit_arguments(template, [dict(turn) for turn in example.messages], tools)
        whole = template.render_row(messages, tools, where)
        answers = [
            n for n, turn in enumerate(messages)
            if turn["role"] == "assistant" and n >= example.asked and n not in example.skipped
        ]  # fmt: skip
        if self.loss_on == "last":
            every = [
                n for n, turn in enumerate(messages) if turn["role"] == "assistant" and n >= example.asked
            ]
            answers = [n for n in answers if n == every[-1]]
        spans = {} if self.loss_on == "all" else template.spans(messages, tools, whole, answers, where)
        for kind, text in self.left_out.find(messages, tools, whole, spans, where):
            self.counts.leave_out(kind, where, text)
        if self.loss_on == "all":
            if example.skipped or example.weights:
                self.counts.note("--loss-on all learns every token: weights of turns are not used")
            return Text(whole, whole=True)
        marked = sorted((span, example.weights.get(n, 1.0)) for n, span in spans.items())
        weights = tuple(weight for _, weight in marked) if example.weights else ()
        return Text(whole, tuple(span for span, _ in marked), weights=weights)

    # ids

    def _encoded(self, made: Sequence[tuple[Example, Text]]) -> list[Encoded]:
        found = self.encoder.encode([text for _, text in made])
        for number, (example, _) in enumerate(made):
            if example.kind == "tokens":
                found[number] = Encoded(list(example.ids), list(example.labels), weights=list(example.each))
            elif example.kind != "messages":
                if found[number].seam == 0 and not self.encoder.begin and self.task == "causal":
                    found[number] = self._apart(example)  # nothing would predict a first token
                found[number] = self._closed(found[number])
            if found[number].seam is not None:
                self._count_seam(found[number], example)
        return found

    def _encoded_pairs(self, pairs: Sequence[tuple[Any, Any]]) -> list[Encoded]:
        """Each text as the tokenizer writes it for the encoder and for the decoder."""
        texts = [pair for pair in pairs if isinstance(pair[0], str)]
        if not texts:
            return [Encoded(list(ids), list(labels)) for ids, labels in pairs]
        self._check_languages()
        sources = iter(self.tokenizer([source for source, _ in texts], verbose=False)["input_ids"])
        targets = iter(
            self.tokenizer(text_target=[target for _, target in texts], verbose=False)["input_ids"]
        )
        return [
            Encoded(list(next(sources)), list(next(targets))) if isinstance(source, str)
            else Encoded(list(source), list(target))
            for source, target in pairs
        ]  # fmt: skip

    def _check_languages(self) -> None:
        """A note where the tokenizer of a translation model takes the source's language for the answers' too.

        Raises RequestError where it takes none.
        """
        tokenizer: Any = self.tokenizer
        if getattr(tokenizer, "tgt_lang", "") is not None or not hasattr(tokenizer, "_switch_to_target_mode"):
            return
        try:
            tokenizer._switch_to_target_mode()
        except KeyError:
            raise RequestError(
                f"this tokenizer ({type(tokenizer).__name__}) marks the language of an answer, and none is set",
                "`tgt_lang` in the model's tokenizer_config.json sets it",
            ) from None
        tokenizer._switch_to_input_mode()
        if tokenizer.tgt_lang is not None:
            self.counts.note(
                f"the tokenizer marks prompts and completions alike as `{tokenizer.tgt_lang}`: `src_lang` and `tgt_lang` in "
                "the model's tokenizer_config.json set other languages"
            )

    def _apart(self, example: Example) -> Encoded:
        """Prompt and completion each encoded alone, where together they begin with one token of both."""
        prompt, completion = self.encoder.encode(
            [Text(example.prompt, whole=True), Text(example.completion, whole=True)]
        )
        return Encoded(prompt.ids + completion.ids, [IGNORED] * len(prompt.ids) + completion.ids)

    def _closed(self, found: Encoded) -> Encoded:
        """A text between its begin token and its end token, each there once."""
        if self.task == "masked":
            return found
        ids, labels, seam = found.ids, found.labels, found.seam
        begin, end = self.encoder.begin, self.tokenizer.eos_token_id
        if begin and tuple(ids[: len(begin)]) != begin:
            ids, labels = [*begin, *ids], [*[IGNORED] * len(begin), *labels]
            seam = None if seam is None else seam + len(begin)
        first = self.tokenizer.bos_token_id
        if first is not None and ids and ids[0] == first:
            labels[0] = IGNORED
        if end is not None and (not ids or ids[-1] != end):
            ids, labels = [*ids, end], [*labels, end]
        return Encoded(ids, labels, seam)

    def _count_seam(self, found: Encoded, example: Example) -> None:
        assert found.seam is not None
        counts = self.counts
        counts.seams += 1
        if not counts.seam_at:
            counts.seam_at = example.where
            counts.seam = str(self.tokenizer.decode([found.ids[found.seam]])).replace("\n", "⏎")

    def _windows(self, blocks: Iterable[Example]) -> Iterator[Row]:
        """A document as windows that fill a row, one after the other, all learned. Each begins as the
        tokenizer begins a text."""
        begin = list(self.encoder.begin) if self.task == "causal" else []
        room = self.room - len(begin)
        if room < 1:
            raise RequestError(f"--max-length {self.max_length} leaves no room beside the begin token")
        ids: list[int] = []
        start: Example | None = None

        def window(part: list[int], at: Example) -> Iterator[Row]:
            if begin and part[: len(begin)] == begin:  # the document has it
                part = part[len(begin) :]
            return self._row(Encoded(begin + part, [IGNORED] * len(begin) + part), at, 0)

        for block in blocks:
            start = start or block
            ids += self.encoder.encode([Text(block.text, whole=True)])[0].ids
            whole = len(ids) - len(ids) % room
            for at in range(0, whole, room):
                yield from window(ids[at : at + room], start)
            ids, start = ids[whole:], block
        if start is not None and len(ids) > 1:
            yield from window(ids, start)
        self.counts.examples = 1

    # length

    def _fitted(self, found: Encoded, example: Example) -> Iterator[Row]:
        """The rows that an example is: itself, cut, split, or none."""
        found, counts, room = self._weighted(found, example), self.counts, self.room
        if not _any_learned(found.labels):
            counts.skip_unsupervised(example.where)
            return
        longest = max(len(found.ids), len(found.labels))
        if longest <= room:
            yield from self._row(found, example, 0 if self._ended(found.labels) else NO_END)
            return
        if self.overflow == "error":
            raise _TooLong(
                f"`{example.where}` is {longest:,} tokens long, and a row takes {room:,}",
                "--overflow truncate, split or drop, or a larger --max-length",
            )
        if self.overflow == "drop":
            counts.too_long += 1
            return
        if self.overflow == "split":
            if self.task == "seq2seq":
                raise _TooLong(
                    f"`{example.where}` is {longest:,} tokens long: a text and its answer cannot be split",
                    "--overflow truncate or drop",
                )
            counts.split += 1
            parts = [found.part(at, at + room) for at in range(0, len(found.ids), room)]
        else:
            counts.cut += 1
            # for a masked model, what is in the loss is kept before what is context only
            if self.task == "masked" and found.labels[0] == IGNORED:
                learned = next(n for n, label in enumerate(found.labels) if label != IGNORED)
                spare = max(0, room - (len(found.ids) - learned))
                found = found.part(0, spare) + found.part(learned, longest)
            parts = [found.part(0, room)]
        kept = 0
        for part in parts:
            if _any_learned(part.labels[1:] if self.task == "causal" else part.labels):
                kept += 1
                yield from self._row(part, example, CUT)
        counts.cut_away += not kept

    def _weighted(self, found: Encoded, example: Example) -> Encoded:
        """With the weights that the row, and for sequence-to-sequence its one answer, has in the loss."""
        weights, factor = found.weights, example.weight
        if self.task == "seq2seq":
            weights = list(example.each)
            factor *= example.weights.get(len(example.messages) - 1, 1.0)
        if factor != 1:
            weights = [factor * weight for weight in weights or [1.0] * len(found.labels)]
        return replace(found, weights=weights)

    def _ended(self, labels: list[int]) -> bool:
        """Whether what is learned ends with an end token; a masked model knows none."""
        last = next((label for label in reversed(labels) if label != IGNORED), IGNORED)
        return self.task == "masked" or last in self.ends

    def _row(self, found: Encoded, example: Example, flags: int) -> Iterator[Row]:
        """A row in its frame, checked against the embedding; none when its one label has nothing before it."""
        ids, labels, weights = found.ids, found.labels, found.weights
        before, behind = self.frame
        if before and tuple(ids[: len(before)]) == before:  # it is there already
            before = ()
        if behind and tuple(ids[-len(behind) :]) == behind:
            behind = ()
        ids, labels = [*before, *ids, *behind], [*[IGNORED] * len(before), *labels, *[IGNORED] * len(behind)]
        if weights:
            weights = [*[1.0] * len(before), *weights, *[1.0] * len(behind)]
        top = max((*ids, *labels), default=0)
        if self.vocab_size and top >= self.vocab_size:
            raise RequestError(
                f"`{example.where}`: token id {top} is beyond the model's {self.vocab_size:,} embeddings",
                "the tokenizer belongs to another model",
            )
        # a causal model predicts the next token: the first has nothing before it
        if self.task == "causal" and labels and labels[0] != IGNORED:
            labels[0] = IGNORED
            if not _any_learned(labels):
                self.counts.skip_unsupervised(example.where)
                return
        number, group = self.counts.examples, group_key(example.group)
        where, line = example.where, example.number
        yield Row(tuple(ids), tuple(labels), where, line, number, flags, group, tuple(weights))


def _any_learned(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels)


class _TooLong(Exception):
    """An example that is longer than a row, where that is not to be."""

    def __init__(self, message: str, hint: str) -> None:
        self.error = RequestError(message, hint)


def group_key(group: str) -> int:
    """A number for a group's name; 0 for none."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "little") if group else 0
