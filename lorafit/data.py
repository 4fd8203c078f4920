"""Examples become rows: token ids with a label mask, cut to length, some held out, and a look at them.

The loss covers what the assistant says and the token that ends it, or the completion and the end
token, or all of a text. Two texts are joined as they are: what separates them is in them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafit import __version__, caches, demo
from lorafit.config import RunConfig
from lorafit.errors import RequestError, RunError, closest
from lorafit.events import Look, ReadSource, Rendered
from lorafit.examples import Example, Message, Source, parse_map, read, records, sources
from lorafit.options import weighted
from lorafit.packing import held_out
from lorafit.rows import CUT, FORMAT, IGNORED, NO_END, Row, RowSet, Store, Writer, opened

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
STORED_FROM = 64_000_000  # bytes of a file from which on its rows are kept on disk for the next run
LARGEST_TEMPLATE = 1_000_000  # bytes
# A change in these makes stored rows stale.
DECIDING = ("examples.py", "data.py", "rows.py")
Span = tuple[int, int]
Tick = Callable[[float, float], None]  # (done, in all)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows for training and rows held out, and the look at them."""

    train: RowSet
    held_out: RowSet
    look: Look

    @staticmethod
    def of(
        train: Iterable[Row], held_out: Iterable[Row], tokenizer: PreTrainedTokenizerBase, task: str
    ) -> Rows:
        """Rows that are at hand, looked at."""
        sets = RowSet.of(train), RowSet.of(held_out)
        return Rows(*sets, _look(*sets, (), (), "", tokenizer, task))


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


# -- tokens ---------------------------------------------------------------------------------


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


# -- a run's rows -----------------------------------------------------------------------------


def load(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    vocab_size: int,
    tick: Tick = lambda done, total: None,
) -> Rows:
    """The rows of a run: read, tokenised, some held out, looked at. Without `data`, the demo's.

    `tick` hears of the bytes read. Raises RequestError for anything wrong with the data, and when
    nothing is left to learn.
    """
    if not config.data and config.model != "demo":
        raise RequestError(f"`{config.model}` needs data to train on", "name a file with --data")
    specs, apart = files(config)
    for name, weight in map(weighted, apart):
        if weight != 1:
            raise RequestError(
                f"--eval-data {name}={weight:g}: held-out rows have no weight", f"--eval-data {name}"
            )
    made = _read_all([*specs, *apart], config, tokenizer, task, vocab_size, tick)
    own, others = made[: len(specs)], made[len(specs) :]

    stores: list[Store] = []
    train: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    chosen = iter(() if apart else _held_out(own, config))
    for data in own:
        keeping = []
        for part in data.parts:
            numbers = np.arange(len(part.store)) + sum(map(len, stores))
            stores.append(part.store)
            out = np.zeros(len(numbers), dtype=bool) if apart else next(chosen)
            kept.append(numbers[out])
            keeping.append(numbers[~out])
        train.append(_as_often(np.concatenate(keeping), data.weight, config.seed))
    for data in others:
        for part in data.parts:
            kept.append(np.arange(len(part.store)) + sum(map(len, stores)))
            stores.append(part.store)

    whole = tuple(stores)
    counts = [part.counts for data in made for part in data.parts]
    sets = RowSet(whole, np.concatenate(train)), RowSet(whole, np.concatenate(kept))
    if not len(sets[0]) or not len(sets[1]):
        raise RequestError(*_nothing_left("training" if not len(sets[0]) else "held-out", counts, config))
    name = ", ".join(Path(spec).name for spec in apart) or f"{config.holdout:.0%} of the data, at most 200"
    return Rows(*sets, _look(*sets, own, counts, name, tokenizer, task))


def files(config: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a run trains on, and what it holds out that lies apart; without `data`, the demo's."""
    apart = config.eval_data or (() if config.data else (str(demo.HELD_OUT),))
    return config.data or (str(demo.TRAIN),), apart


def read_eval_rows(
    specs: Sequence[str], config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: str, vocab_size: int
) -> RowSet:
    """All rows of those files, for evaluation. Raises RequestError as `load` does."""
    made = _read_all(specs, config, tokenizer, task, vocab_size, lambda done, total: None)
    stores = tuple(part.store for data in made for part in data.parts)
    rows = RowSet(stores, np.arange(sum(map(len, stores))))
    if not len(rows):
        raise RequestError(f"no row of {', '.join(specs)} has anything to predict")
    return rows


def labelled(rows: RowSet, by: str, specs: Sequence[str]) -> list[str]:
    """For each row what a column of its file says, or by `file` the file's name, with its folders where
    two files have the same.

    `specs` are the files that the rows come from. Raises RequestError where there is no such column.
    """
    origins = list(rows.origins())
    if by == "file":
        files = dict.fromkeys(name for name, _ in origins)
        short = Counter(Path(name).name for name in files)
        return [Path(name).name if short[Path(name).name] == 1 else name for name, _ in origins]
    wanted = set(origins)
    said: dict[tuple[str, int], str] = {}
    for source in {s.name: s for spec in specs for s in sources(weighted(spec)[0])}.values():
        numbers = {number for name, number in wanted if name == source.name}
        if numbers and source.kind == "text":
            raise RequestError(f"--by {by}: `{source.name}` is plain text and has no columns", "--by file")
        for number, row in records(source) if numbers else ():
            if number in numbers:
                if not isinstance(row, dict) or by not in row:
                    columns = [str(column) for column in row] if isinstance(row, dict) else []
                    raise RequestError(
                        f"`{source.where(number)}` has no column `{by}`, which --by names",
                        closest(by, columns) or f"its columns: {', '.join(columns)}; or --by file",
                    )
                said[source.name, number] = " ".join(str(row[by]).split())
    return [said[origin] for origin in origins]


@dataclass(frozen=True, slots=True)
class _Part:
    """One source, read."""

    store: Store
    format: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class _Data:
    """One `--data`, read."""

    spec: str
    weight: float
    parts: tuple[_Part, ...]

    @property
    def examples(self) -> int:
        return sum(part.counts.examples for part in self.parts)


def _read_all(
    specs: Sequence[str],
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    vocab_size: int,
    tick: Tick,
) -> list[_Data]:
    """The rows of each spec; a spec that stands there twice is read twice."""
    assert config.max_length is not None
    if config.chat_template:
        tokenizer.chat_template = _template(config.chat_template)
    prepare(tokenizer)
    named = [weighted(spec) for spec in specs]
    found = [sources(name) for name, _ in named]
    total = sum(source.bytes for several in found for source in several)
    made, before = [], 0
    for (name, weight), several in zip(named, found, strict=True):
        parts = []
        for source in several:
            done = before

            def heard(bytes_read: int, done: int = done) -> None:
                tick(done + bytes_read, total)

            maker = Tokens(tokenizer, task, config.max_length, vocab_size, config.overflow, config.loss_on)
            parts.append(_stored(source, config, maker, heard))
            before += source.bytes
            tick(before, total)
        made.append(_Data(name, weight, tuple(parts)))
    return made


def _template(path: str) -> str:
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > LARGEST_TEMPLATE:
            raise RequestError(f"--chat-template `{path}` is larger than {LARGEST_TEMPLATE:,} bytes")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot read --chat-template `{path}`: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"--chat-template `{path}` is not UTF-8", "save the file as UTF-8") from None
    if not text.strip():
        raise RequestError(f"--chat-template `{path}` is empty")
    return text


def _stored(source: Source, config: RunConfig, maker: Tokens, tick: Callable[[int], None]) -> _Part:
    """The rows of a source: from the cache where a large one was read before, else made, and then kept."""
    by_line = source.where(0).endswith(":0")
    entry = None
    if source.bytes >= STORED_FROM:
        entry = caches.folder("rows") / _key(source, config, maker)
        if found := opened(entry):
            arrays, index = found
            tick(source.bytes)
            return _Part(Store(source.name, by_line, arrays), index["format_read"], Counts(**index["counts"]))
    format, examples = read(source, config.format, parse_map(config.map), tick)
    writer = Writer(caches.filling(entry) if entry else None)
    try:
        for row in maker.rows(examples, format):
            writer.add(row)
        made = writer.finish()
    except BaseException as error:  # whatever it was, nothing stays half filled
        writer.close()
        if writer.folder is not None:
            shutil.rmtree(writer.folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise RunError(
            f"the rows of `{source.name}` cannot be kept below `{caches.folder('rows')}`: {error.strerror}",
            "lorafit cache --remove all makes room; XDG_CACHE_HOME names another place",
        ) from None
    if entry is None:
        return _Part(Store(source.name, by_line, made), format, maker.counts)  # type: ignore[arg-type]
    tokens = writer.at[0]
    index = {
        "about": source.name, "tokens": tokens, "format": FORMAT, "digests": made, "format_read": format,
        "counts": asdict(maker.counts),
    }  # fmt: skip
    assert writer.folder is not None
    caches.finish(writer.folder, entry, index)
    again = opened(entry)
    if again is None:
        raise RunError(f"what was written to `{entry}` is not what is there", "is the disk sound?")
    return _Part(Store(source.name, by_line, again[0]), format, maker.counts)


def _key(source: Source, config: RunConfig, maker: Tokens) -> str:
    """A digest of all that decides the rows of a file: its content, its tokenizer, the settings, this code."""
    found = hashlib.sha256()
    assert source.path is not None
    with source.path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    tokenizer = maker.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    here = Path(__file__).parent
    facts = [
        FORMAT, __version__, source.kind, source.packed, config.format, config.map, maker.task, maker.max_length,
        maker.vocab_size, maker.overflow, maker.loss_on, type(tokenizer).__name__, tokenizer.chat_template,
        tokenizer.special_tokens_map, backend.to_str() if backend is not None else tokenizer.get_vocab(),
        *(hashlib.sha256((here / name).read_bytes()).hexdigest() for name in DECIDING),
    ]  # fmt: skip
    found.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return found.hexdigest()[:32]


def _held_out(data: Sequence[_Data], config: RunConfig) -> list[np.ndarray]:
    """For each source whether a row is held out: a seeded share of all examples, but of a document its
    end, since a window knows its neighbours. Raises RequestError where there is nothing to part."""
    parts = [part for several in data for part in several.parts]
    several = sum(part.counts.examples for part in parts if part.format != "document")
    documents = [part for part in parts if part.format == "document"]
    for part in documents:
        if len(part.store) < 2:
            raise RequestError(
                f"`{part.store.name}` is one window of {config.max_length} tokens: none can be held out",
                "a longer text, a smaller --max-length, or --eval-data",
            )
    if not documents and several < 2:
        names = ", ".join(f"`{each.spec}`" for each in data)
        raise RequestError(
            f"{names} holds one example: none can be held out", "more examples, or --eval-data"
        )
    out = np.array(held_out(several, config.holdout, config.seed) if several > 1 else [], dtype=np.int64)
    found, before = [], 0
    for part in parts:
        rows = len(part.store)
        if part.format == "document":
            most = max(1, round(rows * config.holdout))
            found.append(np.arange(rows) >= rows - most)
        else:
            found.append(np.isin(part.store.arrays["examples"] + before, out))
            before += part.counts.examples
    return found


def _as_often(numbers: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Each row as often as its weight says; of what is left of a weight, a seeded share once more."""
    whole, part = int(weight), weight - int(weight)
    more = sorted(Random(f"{seed}/weight").sample(range(len(numbers)), round(part * len(numbers))))
    return np.concatenate([*[numbers] * whole, numbers[more]]).astype(np.int64)


def _nothing_left(which: str, counts: Sequence[Counts], config: RunConfig) -> tuple[str, str]:
    why = [
        f"{sum(c.unsupervised for c in counts):,} had nothing to learn",
        f"{sum(c.cut_away for c in counts):,} nothing within {config.max_length} tokens",
        f"{sum(c.too_long for c in counts):,} were longer than that",
    ]
    said = ", ".join(text for text in why if not text.startswith("0 ")) or "there was none"
    return f"no {which} row is left: {said}", "raise --max-length, or look at the data"


def _look(
    train: RowSet,
    kept: RowSet,
    own: Sequence[_Data],
    counts: Sequence[Counts],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
) -> Look:
    lengths = train.lengths
    quantiles = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    once = np.unique(train.index)  # a row that a weight repeats is no duplicate
    contents = RowSet(train.stores, once).contents
    tokens = int(lengths.sum())
    sums = {
        field: sum(getattr(c, field) for c in counts)
        for field in ("cut", "split", "too_long", "unsupervised", "cut_away")
    }
    return Look(
        sources=tuple(
            ReadSource(
                Path(d.spec).name, ", ".join(dict.fromkeys(p.format for p in d.parts)), d.examples, d.weight
            )
            for d in own
        ),
        rows=len(train),
        tokens=tokens,
        supervised_tokens=train.supervised,
        held_out_rows=len(kept),
        held_out_tokens=int(kept.lengths.sum()),
        held_out_name=name,
        lengths={k: int(np.quantile(lengths, q, method="nearest")) for k, q in quantiles.items()},
        typical=round(float((lengths.astype(float) ** 2).sum() / tokens)),
        **sums,
        unsupervised_at=next((c.unsupervised_at for c in counts if c.unsupervised_at), ""),
        duplicates=len(contents) - len(np.unique(contents)),
        overlap=int(np.isin(kept.contents, contents).sum()),
        no_end=int((train.flags & NO_END > 0).sum()),
        samples=tuple(rendered(train[n], tokenizer, task) for n in _spread(len(train))),
        notes=tuple(dict.fromkeys(note for c in counts for note in c.notes)),
    )


def _spread(rows: int) -> list[int]:
    """Three rows to look at: the first, and two further on."""
    return sorted({0, rows // 3, 2 * rows // 3})


def rendered(row: Row, tokenizer: PreTrainedTokenizerBase, task: str) -> Rendered:
    """A row as the model sees it, what is learned apart from what is read."""
    ids, learned = list(row.ids), [label != IGNORED for label in row.labels]
    if task == "seq2seq":
        ids, learned = ids + list(row.labels), [False] * len(ids) + learned
    pieces, start = [], 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or learned[at] != learned[start]:
            pieces.append((str(tokenizer.decode(ids[start:at])), learned[start]))
            start = at
    return Rendered(row.where.rpartition("/")[2], len(ids), sum(learned), tuple(pieces))


def prepare(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a pad token one; padding is masked, so which one means nothing."""
    if tokenizer.pad_token_id is None:
        with suppress(IndexError):  # an empty vocabulary, which no model has
            tokenizer.pad_token = (
                tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
            )
    tokenizer.padding_side = "right"
