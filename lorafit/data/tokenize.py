"""Examples to rows of token ids with a label mask, cut to length.

The loss covers what the assistant says and the token that ends it, or the completion and the end token, or
all of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from lorafit.data.formats import Example, Message
from lorafit.data.rows import CUT, IGNORED, NO_END, Row
from lorafit.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# For a tokenizer that has no template of its own; saved with the adapter, so that it is used again.
DEFAULT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{{ (eos_token or '') if message['role'] == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)

TOGETHER = 256  # examples that the tokenizer is given at once

Span = tuple[int, int]


@dataclass(slots=True)
class Counts:
    """What became of a source's examples."""

    examples: int = 0
    cut: int = 0
    split: int = 0
    too_long: int = 0
    unsupervised: int = 0
    unsupervised_at: str = ""
    cut_away: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Text:
    """A text to be tokenised: `special` lets the tokenizer put its own tokens around it, `spans` are
    the characters that are learned, `target` marks what a sequence-to-sequence decoder is to say."""

    text: str
    special: bool = False
    spans: tuple[Span, ...] = ()
    offsets: bool = False
    target: bool = False


@dataclass(slots=True)
class Tokens:
    """Examples to rows, with one tokenizer for one task; counts what became of them."""

    tokenizer: PreTrainedTokenizerBase
    task: str
    max_length: int
    vocab_size: int
    overflow: str = "truncate"
    loss_on: str = "completion"
    counts: Counts = field(default_factory=Counts)
    ends: frozenset[int] = frozenset()
    frame: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # what stands around a masked model's row

    def __post_init__(self) -> None:
        end = self.tokenizer.eos_token_id
        self.ends = frozenset(self.tokenizer.all_special_ids) | ({end} if end is not None else set())
        if self.task == "masked":
            around = tuple(self.tokenizer("", verbose=False)["input_ids"])  # [CLS] [SEP], <s> </s>
            half = (len(around) + 1) // 2
            self.frame = around[:half], around[half:]
            if self.room < 1:
                raise RequestError(
                    f"--max-length {self.max_length} leaves no room beside {len(around)} special tokens"
                )

    @property
    def room(self) -> int:
        """Tokens of a row beside its frame."""
        return self.max_length - len(self.frame[0]) - len(self.frame[1])

    def rows(self, examples: Iterable[Example], format: str) -> Iterator[Row]:
        """The rows of those examples, less those with nothing to learn.

        Raises RequestError for an example that cannot be a row, with its file and line.
        """
        examples = iter(examples)
        if format == "document" and self.task != "seq2seq":
            yield from self._windows(examples)
            return
        while group := list(islice(examples, TOGETHER)):
            texts = [self._texts(example) for example in group]
            encoded = iter(self._encode([text for several in texts for text in several]))
            for example, several in zip(group, texts, strict=True):
                pieces = [next(encoded) for _ in several]
                yield from self._fitted(*self._joined(example, pieces), example)
                self.counts.examples += 1

    # an example's texts, and what is learned of them

    def _texts(self, example: Example) -> list[_Text]:
        kind = example.kind
        if self.task == "seq2seq":
            source, target = self._pair(example)
            return [_Text(source, special=True), _Text(target, target=True)]
        if kind == "messages":
            whole, spans = self._conversation(example)
            return [_Text(whole, spans=tuple(spans), offsets=self.loss_on != "all")]
        start = self.task == "causal"
        if kind == "text":
            return [_Text(example.text, start)]
        return [_Text(example.prompt, start), _Text(example.completion)]

    def _pair(self, example: Example) -> tuple[str, str]:
        """Prompt to the encoder, completion to the decoder."""
        if example.kind == "text":
            raise RequestError(
                f"`{example.where}` is plain text, and this model reads one text and writes another",
                "give it rows of `prompt` and `completion`",
            )
        if example.kind == "prompt-completion":
            return example.prompt, example.completion
        *before, last = example.messages
        if last["role"] != "assistant":
            raise RequestError(f"`{example.where}`: the last message is not the assistant's")
        return "\n".join(turn.get("content") or "" for turn in before), last.get("content") or ""

    def _conversation(self, example: Example) -> tuple[str, list[Span]]:
        """A conversation through the chat template, and the characters that the assistant says, its
        end token with them.

        No template says which those are. They are what stands between the conversation rendered up to
        a turn, with the words that open an answer, and rendered with that turn: so long as each of these
        is how the whole begins.
        """
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = DEFAULT_TEMPLATE
            self.counts.notes.append(
                "the tokenizer has no chat template: turns are written `User:` and `Assistant:` on lines of their own"
            )
        messages, where, tools = list(example.messages), example.where, list(example.tools)
        whole = self._render(messages, where, tools)
        if self.loss_on == "all":
            return whole, []
        answers = [n for n, turn in enumerate(messages) if turn["role"] == "assistant" and n >= example.asked]
        if self.loss_on == "last":
            answers = answers[-1:]
        spans = []
        for number in answers:
            last = number + 1 == len(messages)
            after = whole if last else self._render(messages[: number + 1], where, tools)
            start = (
                self._answer_at(messages, number, after, where, tools) if whole.startswith(after) else None
            )
            if start is None:
                raise RequestError(
                    f"`{where}`: the chat template rewrites earlier turns, so what the "
                    f"assistant says in message {number + 1} cannot be told from the rest",
                    "--loss-on last learns the last answer alone, or split the rows into one answer each",
                )
            spans.append((start, len(after)))
        return whole, spans

    def _answer_at(
        self, messages: list[Message], number: int, after: str, where: str, tools: list[Any]
    ) -> int | None:
        """Where an answer begins in `after`, the text that ends with it; None where it cannot be told."""
        opened = self._render(messages[:number], where, tools, opened=True)
        if after.startswith(opened):
            return len(opened)
        # the words that open an answer may hold more than stands there later, as an open <think>
        closed = self._render(messages[:number], where, tools)
        if not after.startswith(closed):
            return None
        shared = _alike(after, opened)
        said = (messages[number].get("content") or "").strip()
        at = after.find(said, len(closed)) if said else -1
        return shared if at < 0 else min(shared, at)

    def _render(self, messages: list[Message], where: str, tools: list[Any], opened: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools or None, tokenize=False, add_generation_prompt=opened
                )
            )
        except Exception as error:  # a template may raise anything; jinja has kinds of its own
            hint = "the first turn is the assistant's" if not messages else "--chat-template names another"
            why = str(error).splitlines()
            raise RequestError(
                f"`{where}`: the chat template refuses it: {why[0] if why else type(error).__name__}", hint
            ) from None

    # ids

    def _encode(self, texts: Sequence[_Text]) -> list[tuple[list[int], list[int]]]:
        """(ids, labels) of each text; the like of them are given to the tokenizer at once."""
        made: list[tuple[list[int], list[int]]] = [([], [])] * len(texts)
        for kind in dict.fromkeys((t.special, t.offsets, t.target) for t in texts):
            numbers = [n for n, t in enumerate(texts) if (t.special, t.offsets, t.target) == kind]
            special, offsets, target = kind
            if offsets and not self.tokenizer.is_fast:
                raise RequestError(
                    "this model has no fast tokenizer, which conversations need to mark the assistant's part",
                    "give it rows of `prompt` and `completion`",
                )
            given = [texts[n].text for n in numbers]
            if target:
                found = self.tokenizer(text_target=given, verbose=False)
            else:
                more = {"return_offsets_mapping": True} if offsets else {}
                found = self.tokenizer(given, add_special_tokens=special, verbose=False, **more)
            for at, number in enumerate(numbers):
                ids = list(found["input_ids"][at])
                labels = (
                    self._marked(ids, found["offset_mapping"][at], texts[number].spans) if offsets else ids
                )
                made[number] = ids, labels
        return made

    def _marked(self, ids: list[int], places: Sequence[Span], spans: Sequence[Span]) -> list[int]:
        """The ids that stand for learned characters, IGNORED elsewhere."""
        labels = [IGNORED] * len(ids)
        at = 0
        for start, stop in spans:
            inside = []
            while at < len(ids) and places[at][0] < stop:
                a, b = places[at]
                if b > start and b > a:
                    inside.append(at)
                at += 1
            # a template may put a line break behind the end token: that is not the assistant's
            closing = [i for i in inside if ids[i] in self.ends]
            last = closing[-1] if closing else (inside[-1] if inside else -1)
            for i in inside:
                if i <= last:
                    labels[i] = ids[i]
        return labels

    def _joined(
        self, example: Example, pieces: list[tuple[list[int], list[int]]]
    ) -> tuple[list[int], list[int]]:
        """(ids, labels) of an example, as long as it is."""
        if self.task == "seq2seq":
            return pieces[0][0], pieces[1][0]
        if example.kind == "messages":
            return pieces[0]
        ids = list(pieces[0][0])
        end = self.tokenizer.eos_token_id
        if self.task == "causal":  # the tokenizer may put its begin token, never its end token
            while ids and ids[-1] in (end, self.tokenizer.sep_token_id):
                ids.pop()
        if example.kind == "text":
            labels = list(ids)
        else:
            prompt = ids if self.loss_on == "all" else [IGNORED] * len(ids)
            ids, labels = ids + pieces[1][0], prompt + pieces[1][0]
        if self.task == "masked":
            return ids, labels
        begin = self.tokenizer.bos_token_id
        if begin is not None and ids and ids[0] == begin:
            labels[0] = IGNORED
        if end is not None and (not ids or ids[-1] != end):
            ids, labels = [*ids, end], [*labels, end]
        return ids, labels

    def _windows(self, blocks: Iterable[Example]) -> Iterator[Row]:
        """A document as windows that fill a row, one after the other, all learned."""
        ids: list[int] = []
        start: Example | None = None
        for block in blocks:
            start = start or block
            ids += self.tokenizer(block.text, add_special_tokens=False, verbose=False)["input_ids"]
            whole = len(ids) - len(ids) % self.room
            for at in range(0, whole, self.room):
                yield from self._row(ids[at : at + self.room], ids[at : at + self.room], start, 0)
            ids, start = ids[whole:], block
        if start is not None and len(ids) > 1:
            yield from self._row(ids, ids, start, 0)
        self.counts.examples = 1

    # length

    def _fitted(self, ids: list[int], labels: list[int], example: Example) -> Iterator[Row]:
        """The rows that an example is: itself, cut, split, or none."""
        counts = self.counts
        if not _any_learned(labels):
            counts.unsupervised += 1
            counts.unsupervised_at = counts.unsupervised_at or example.where
            return
        room = self.room
        longest = max(len(ids), len(labels))
        if longest <= room:
            yield from self._row(ids, labels, example, 0 if self._ended(labels) else NO_END)
            return
        if self.overflow == "error":
            raise RequestError(
                f"`{example.where}` is {longest:,} tokens long, and a row takes {room:,}",
                "--overflow truncate, split or drop, or a larger --max-length",
            )
        if self.overflow == "drop":
            counts.too_long += 1
            return
        if self.overflow == "split":
            if self.task == "seq2seq":
                raise RequestError(
                    f"`{example.where}` is {longest:,} tokens long: a text and its answer cannot be split",
                    "--overflow truncate or drop",
                )
            counts.split += 1
            parts = [(ids[at : at + room], labels[at : at + room]) for at in range(0, len(ids), room)]
        else:
            counts.cut += 1
            if self.task == "masked" and labels[0] == IGNORED:  # what is learned goes before what is read
                learned = next(n for n, label in enumerate(labels) if label != IGNORED)
                spare = max(0, room - (len(ids) - learned))
                ids, labels = ids[:spare] + ids[learned:], labels[:spare] + labels[learned:]
            parts = [(ids[:room], labels[:room])]
        kept = 0
        for some_ids, some_labels in parts:
            if _any_learned(some_labels[1:] if self.task == "causal" else some_labels):
                kept += 1
                yield from self._row(some_ids, some_labels, example, CUT)
        counts.cut_away += not kept

    def _ended(self, labels: list[int]) -> bool:
        """Whether what is learned ends with an end token; a masked model knows none."""
        last = next((label for label in reversed(labels) if label != IGNORED), IGNORED)
        return self.task == "masked" or last in self.ends

    def _row(self, ids: list[int], labels: list[int], example: Example, flags: int) -> Iterator[Row]:
        """A row in its frame, checked against the embedding; none when its one label has nothing before it."""
        before, behind = self.frame
        ids, labels = [*before, *ids, *behind], [*[IGNORED] * len(before), *labels, *[IGNORED] * len(behind)]
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
                self.counts.unsupervised += 1
                self.counts.unsupervised_at = self.counts.unsupervised_at or example.where
                return
        yield Row(tuple(ids), tuple(labels), example.where, example.number, self.counts.examples, flags)


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _any_learned(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels)
