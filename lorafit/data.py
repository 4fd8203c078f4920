"""Examples become rows: token ids with a label mask, cut to length, some held out.

Formats, seen in the first example unless `--format` says otherwise:

    messages             {"messages": [{"role": "user", "content": ...}, ...]}
    prompt-completion    {"prompt": ..., "completion": ...}: two texts, or two lists of messages
    text                 {"text": ...}
    lines                each line of a text file is an example
    document             a text file is one document, cut into windows

The loss covers what the assistant says and the token that ends it, or the completion and the
end token, or all of a text. Two texts are joined as they are: what separates them is in them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafit import demo
from lorafit.config import MASKED_SHARE, RunConfig
from lorafit.errors import RequestError
from lorafit.packing import held_out
from lorafit.survey import HUB_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is read, not learned
# For a tokenizer that has no template of its own; saved with the adapter, so that it is used again.
DEFAULT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{{ (eos_token or '') if message['role'] == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One example as it was read, and where: `messages`, or `prompt` and `completion`, or `text`."""

    where: str
    messages: tuple[Message, ...] = ()
    asked: int = 0  # messages at the head that belong to the prompt: none of them is learned
    prompt: str = ""
    completion: str = ""
    text: str = ""

    @property
    def kind(self) -> str:
        if self.messages:
            return "messages"
        return "prompt-completion" if self.completion else "text"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `ids` enter the model; `labels` are the ids to be learned, IGNORED elsewhere.

    For causal and masked models both have one length, and labels stand at their own token; for
    sequence-to-sequence `ids` are the encoder's and `labels` the decoder's.
    `prompt` is the number of leading ids before the first that is learned.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    @property
    def prompt(self) -> int:
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows for training and rows held out, with what was done to get them."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    held_out_name: str = ""

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.train)

    @property
    def supervised(self) -> int:
        return sum(row.supervised for row in self.train)

    @property
    def mean_tokens(self) -> float:
        return self.tokens / len(self.train)

    @property
    def held_out_digest(self) -> str:
        return digest(self.held_out)

    @property
    def train_digest(self) -> str:
        return digest(self.train)


def digest(rows: Iterable[Row]) -> str:
    """A digest of tokens and labels: the same rows in the same order have the same one."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr((row.ids, row.labels)).encode())
    return found.hexdigest()[:32]


# -- reading --------------------------------------------------------------------------------


def read(spec: str, format: str) -> tuple[list[Example], str]:
    """The examples of a file or a hub set, and the format they were read in.

    Raises RequestError for what is not there or cannot be read, with file and line.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        raise RequestError(f"`{spec}` is a folder: name the file in it")
    if path.is_file():
        if path.suffix in (".txt", ".md"):
            return _read_text(path, format)
        if path.suffix in (".jsonl", ".json"):
            return _examples(_read_json(path), spec, format)
        raise RequestError(f"`{spec}` is no kind of file that is read here", "data are .jsonl, .json or .txt")
    name, *rest = spec.split(":")
    if "/" in name and HUB_ID.fullmatch(name) and not name.endswith((".jsonl", ".json", ".txt")):
        return _examples(_read_hub(spec, name, rest), spec, format)
    raise RequestError(f"there is no file `{spec}`", "data are .jsonl, .json or .txt files, or a hub set")


def _text_of(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read `{path}`: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"`{path}:{line}` is not UTF-8 (byte 0x{raw[error.start]:02x})", "save the file as UTF-8"
        ) from None
    if not text.strip():
        raise RequestError(f"`{path}` is empty")
    return text


def _read_text(path: Path, format: str) -> tuple[list[Example], str]:
    text = _text_of(path)
    if format == "lines":
        lines = [
            Example(f"{path}:{number}", text=line)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
        return lines, "lines"
    if format not in ("auto", "document", "text"):
        raise RequestError(f"--format {format}: `{path}` is plain text", "use `document` or `lines`")
    return [Example(str(path), text=text)], "document"


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    text = _text_of(path)
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"`{path}` is no JSON: {error}", "one object a line is .jsonl") from None
        if not isinstance(data, list):
            raise RequestError(f"`{path}` holds no list of examples")
        for number, row in enumerate(data, 1):
            yield f"{path}[{number}]", row
        return
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 is no line's end in JSON
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"`{path}:{number}` is no JSON: {error}") from None


def _read_hub(spec: str, name: str, rest: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """A hub set, `owner/name:config:split`; without a split `train`."""
    import datasets

    datasets.disable_progress_bars()
    config = rest[0] if len(rest) > 1 else None
    split = rest[-1] if rest else "train"
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub, the network and the builders each have kinds of their own
        text = str(error).splitlines()
        raise RequestError(
            f"`{spec}` is no file here, and the hub did not give it: {text[0][:200] if text else error}",
            "write it as owner/name, owner/name:split or owner/name:config:split",
        ) from None
    for number, row in enumerate(found):
        yield f"{spec}[{number}]", row


def _examples(rows: Iterable[tuple[str, Any]], spec: str, format: str) -> tuple[list[Example], str]:
    """The rows as examples, each checked against the format of the first."""
    found: list[Example] = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise RequestError(f"`{where}` is no JSON object but a {type(row).__name__}")
        if not found and format == "auto":
            format = _format_of(row, where)
        found.append(_example(row, where, format))
    if not found:
        raise RequestError(f"`{spec}` is empty")
    return found, format


def _format_of(row: Message, where: str) -> str:
    if "messages" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt-completion"
    if "text" in row:
        return "text"
    keys = ", ".join(f"`{key}`" for key in list(row)[:6]) or "nothing"
    raise RequestError(
        f"`{where}` holds {keys}: no shape that is known",
        "rows hold `messages`, or `prompt` and `completion`, or `text`",
    )


def _string(row: Message, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        kind = "missing" if key not in row else f"no string but {_kind(value)}"
        raise RequestError(f"`{where}`: `{key}` is {kind}")
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), "a number")


def _example(row: Message, where: str, format: str) -> Example:
    if format == "messages":
        return Example(where, messages=_messages(row.get("messages"), "messages", where))
    if format == "prompt-completion":
        if isinstance(row.get("prompt"), list):
            turns = _messages(row["prompt"], "prompt", where, ends=False)
            answer = _messages(row.get("completion"), "completion", where)
            return Example(where, messages=turns + answer, asked=len(turns))
        completion = _string(row, "completion", where)
        if not completion:
            raise RequestError(f"`{where}`: `completion` is empty: there is nothing to learn")
        return Example(where, prompt=_string(row, "prompt", where), completion=completion)
    if format in ("text", "lines"):
        text = _string(row, "text", where)
        if not text:
            raise RequestError(f"`{where}`: `text` is empty")
        return Example(where, text=text)
    raise RequestError(f"--format {format} is for text files, and `{where}` is JSON")


def _messages(value: Any, key: str, where: str, ends: bool = True) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RequestError(f"`{where}`: `{key}` is no list of messages")
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise RequestError(f"`{where}`: a message in `{key}` has no `role`")
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            raise RequestError(f"`{where}`: the `content` of a message in `{key}` is no string")
    if ends and not any(turn["role"] == "assistant" for turn in value):
        raise RequestError(f"`{where}`: no assistant speaks in `{key}`: there is nothing to learn")
    return tuple(value)


# -- tokens ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Tokens:
    """Examples to rows, with one tokenizer for one task; counts what it cut and dropped."""

    tokenizer: PreTrainedTokenizerBase
    task: str
    max_length: int
    vocab_size: int
    cut: int = 0
    dropped: int = 0
    notes: list[str] = field(default_factory=list)

    def rows(self, examples: Iterable[Example], format: str) -> list[Row]:
        """The rows of those examples, less those with nothing left to learn."""
        found: list[Row] = []
        for example in examples:
            made = self._windows(example) if format == "document" else [self._row(example)]
            for row in made:
                row = self._fit(row)
                if row.supervised:
                    found.append(row)
                else:
                    self.dropped += 1
        return found

    def _row(self, example: Example) -> Row:
        if self.task == "seq2seq":
            return self._pair(example)
        if example.kind == "messages":
            return self._conversation(example)
        if self.task == "masked":
            return self._maskable(example)
        ids = self._encode(example.prompt or example.text, start=True)
        labels = [IGNORED] * len(ids)
        if example.kind == "text":
            labels = list(ids)
            if self.tokenizer.bos_token_id is not None and ids and ids[0] == self.tokenizer.bos_token_id:
                labels[0] = IGNORED
        else:
            answer = self._encode(example.completion)
            ids, labels = ids + answer, labels + answer
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids, labels = [*ids, end], [*labels, end]
        return Row(tuple(ids), tuple(labels), example.where)

    def _encode(self, text: str, start: bool = False) -> list[int]:
        """Token ids; `start` lets the tokenizer put its begin token, never its end token."""
        ids = list(self.tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"])
        while start and ids and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
            ids.pop()
        return ids

    def _maskable(self, example: Example) -> Row:
        """A row for a masked model: its special tokens around it; only what may be masked is labelled."""
        first, second = (example.prompt, example.completion) if example.completion else (example.text, "")
        head, tail = self._encode(first), self._encode(second) if second else []
        frame = self.tokenizer("", verbose=False)["input_ids"]  # [CLS] [SEP], <s> </s>
        begin, end = frame[: (len(frame) + 1) // 2], frame[(len(frame) + 1) // 2 :]
        room = max(0, self.max_length - len(begin) - len(end))
        if len(head) + len(tail) > room:
            self.cut += 1
            head, tail = head[: max(0, room - len(tail))] if tail else head[:room], tail[:room]
        ids = [*begin, *head, *tail, *end]
        learned = tail or head
        labels = [IGNORED] * (len(ids) - len(learned) - len(end)) + learned + [IGNORED] * len(end)
        return Row(tuple(ids), tuple(labels), example.where)

    def _pair(self, example: Example) -> Row:
        """Prompt to the encoder, completion to the decoder."""
        if example.kind == "text":
            raise RequestError(
                f"`{example.where}` is plain text, and this model reads one text and writes another",
                "give it rows of `prompt` and `completion`",
            )
        if example.kind == "messages":
            *before, last = example.messages
            if last["role"] != "assistant":
                raise RequestError(f"`{example.where}`: the last message is not the assistant's")
            source = "\n".join(turn.get("content") or "" for turn in before)
            target = last.get("content") or ""
        else:
            source, target = example.prompt, example.completion
        ids = self.tokenizer(source, verbose=False)["input_ids"]
        labels = self.tokenizer(text_target=target, verbose=False)["input_ids"]
        return Row(tuple(ids), tuple(labels), example.where)

    def _conversation(self, example: Example) -> Row:
        """A conversation through the chat template; what the assistant says, to its end token, is learned."""
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = DEFAULT_TEMPLATE
            self.notes.append(
                "the tokenizer has no chat template: turns are written `User:` and `Assistant:` on lines of their own"
            )
        messages = list(example.messages)
        whole = self._render(messages, example.where)
        spans = []
        for number, turn in enumerate(messages):
            if turn["role"] != "assistant" or number < example.asked:
                continue
            before = self._render(messages[:number], example.where, opened=True)
            after = self._render(messages[: number + 1], example.where)
            if not (whole.startswith(after) and after.startswith(before)):
                raise RequestError(
                    f"`{example.where}`: the chat template rewrites earlier turns, so what the "
                    f"assistant says in message {number + 1} cannot be told from the rest",
                    "split the conversation into rows with one answer each",
                )
            spans.append((len(before), len(after)))
        ids, offsets = self._with_offsets(whole)
        labels = [IGNORED] * len(ids)
        ends = set(self.tokenizer.all_special_ids)
        for start, stop in spans:
            inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < stop and b > a]
            # a template may put a line break behind the end token: that is not the assistant's
            closing = [i for i in inside if ids[i] in ends]
            last = closing[-1] if closing else (inside[-1] if inside else -1)
            for i in inside:
                if i <= last:
                    labels[i] = ids[i]
        return Row(tuple(ids), tuple(labels), example.where)

    def _render(self, messages: list[Message], where: str, opened: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
            )
        except Exception as error:  # a template may raise anything; jinja has kinds of its own
            raise RequestError(f"`{where}`: the chat template refuses it: {error}") from None

    def _with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered text and the characters each stands for."""
        if self.tokenizer.is_fast:
            made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return list(made["input_ids"]), [tuple(pair) for pair in made["offset_mapping"]]
        raise RequestError(
            "this model has no fast tokenizer, which conversations need to mark the assistant's part",
            "give it rows of `prompt` and `completion`",
        )

    def _windows(self, example: Example) -> list[Row]:
        """A document as windows of `max_length` tokens, one after the other, all learned."""
        if self.task == "seq2seq":
            return [self._pair(example)]
        if self.task == "masked":
            frame = len(self.tokenizer("", verbose=False)["input_ids"])
            room = self.max_length - frame
            if room < 1:
                raise RequestError(
                    f"--max-length {self.max_length} leaves no room beside {frame} special tokens"
                )
            ids = self._encode(example.text)
            pieces = [ids[at : at + room] for at in range(0, len(ids), room)]
            begin_end = self.tokenizer("", verbose=False)["input_ids"]
            half = (frame + 1) // 2
            return [
                Row(
                    (*begin_end[:half], *piece, *begin_end[half:]),
                    (*[IGNORED] * half, *piece, *[IGNORED] * (frame - half)),
                    example.where,
                )
                for piece in pieces
            ]
        ids = self._encode(example.text)
        size = self.max_length
        pieces = [tuple(ids[at : at + size]) for at in range(0, len(ids), size)]
        return [Row(piece, piece, example.where) for piece in pieces if len(piece) > 1]

    def _fit(self, row: Row) -> Row:
        """Cut to length, and checked against the embedding."""
        top = max((*row.ids, *row.labels), default=0)
        if self.vocab_size and top >= self.vocab_size:
            raise RequestError(
                f"`{row.where}`: token id {top} is beyond the model's {self.vocab_size:,} embeddings",
                "the tokenizer belongs to another model",
            )
        if len(row.ids) > self.max_length or len(row.labels) > self.max_length:
            self.cut += 1
            row = replace(row, ids=row.ids[: self.max_length], labels=row.labels[: self.max_length])
        # a causal model predicts the next token: the first has nothing before it
        if self.task == "causal" and row.labels and row.labels[0] != IGNORED:
            row = replace(row, labels=(IGNORED, *row.labels[1:]))
        return row


def load(config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: str, vocab_size: int) -> Rows:
    """The rows of a run: read, tokenised, some held out. Without `data`, the demo's.

    Raises RequestError for anything wrong with the data, and when nothing is left to learn.
    """
    assert config.max_length is not None
    prepare(tokenizer)
    maker = Tokens(tokenizer, task, config.max_length, vocab_size)
    if not config.data and config.model != "demo":
        raise RequestError(f"`{config.model}` needs data to train on", "name a file with --data")
    data = config.data or (str(demo.TRAIN),)
    apart = config.eval_data or (() if config.data else (str(demo.HELD_OUT),))

    train: list[Row] = []
    kept: list[Row] = []
    sources = []
    for spec in data:
        examples, format = read(spec, config.format)
        sources.append(f"{Path(spec).name} ({format})")
        if apart:
            train += maker.rows(examples, format)
        elif format == "document":  # its end is held out, since a window knows its neighbours
            rows = maker.rows(examples, format)
            most = max(1, round(len(rows) * config.holdout))
            if len(rows) < 2:
                raise RequestError(
                    f"`{spec}` is one window of {config.max_length} tokens: none can be held out",
                    "a longer text, a smaller --max-length, or --eval-data",
                )
            train += rows[:-most]
            kept += rows[-most:]
        else:
            if len(examples) < 2:
                raise RequestError(
                    f"`{spec}` holds one example: none can be held out", "more examples, or --eval-data"
                )
            out = set(held_out(len(examples), config.holdout, config.seed))
            train += maker.rows((e for i, e in enumerate(examples) if i not in out), format)
            kept += maker.rows((e for i, e in enumerate(examples) if i in out), format)
    for spec in apart:
        examples, format = read(spec, config.format)
        kept += maker.rows(examples, format)
    if not train or not kept:
        which = "training" if not train else "held-out"
        raise RequestError(
            f"no {which} row is left: {maker.dropped} had nothing to learn within {config.max_length} tokens",
            "raise --max-length, or look at the data",
        )
    notes = list(maker.notes)
    if maker.cut:
        notes.append(f"{maker.cut:,} rows cut to {config.max_length} tokens")
    if maker.dropped:
        notes.append(f"{maker.dropped:,} rows dropped: nothing to learn within {config.max_length} tokens")
    name = ", ".join(Path(spec).name for spec in apart) or f"{config.holdout:.0%} of the data, at most 200"
    return Rows(tuple(train), tuple(kept), tuple(notes), tuple(sources), name)


def read_eval_rows(
    specs: Sequence[str],
    format: str,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    max_length: int,
    vocab_size: int,
) -> list[Row]:
    """All rows of those files, for evaluation. Raises RequestError as `load` does."""
    prepare(tokenizer)
    maker = Tokens(tokenizer, task, max_length, vocab_size)
    rows: list[Row] = []
    for spec in specs:
        examples, found = read(spec, format)
        rows += maker.rows(examples, found)
    if not rows:
        raise RequestError(f"no row of {', '.join(specs)} has anything to predict")
    return rows


def prepare(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a pad token one; padding is masked, so which one means nothing."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"


# -- batches --------------------------------------------------------------------------------


# B rows, T tokens of the longest row, S tokens of the longest target
@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as tensors: `inputs` go to the model by name.

    `labels` are (B, T), for sequence-to-sequence the decoder's (B, S). The loss is taken at
    `places_N`, the positions in the flattened (B * T) whose next or own token is supervised, against
    `targets_N`: known before the device is asked anything.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    counts: tuple[int, ...]  # supervised tokens of each row
    tokens: int
    key: str = ""  # names a micro-batch that comes again as it is; empty for one that does not

    @property
    def supervised(self) -> int:
        return sum(self.counts)

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if device.type != "cuda":
                return tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            inputs={name: moved(tensor) for name, tensor in self.inputs.items()},
            labels=moved(self.labels),
            places=moved(self.places),
            targets=moved(self.targets),
        )


def collate(rows: Sequence[Row], pad: int, task: str, key: str = "") -> Batch:
    """The rows padded on the right to the longest of them: int64 (B, T)."""
    ids_BT = _padded([row.ids for row in rows], pad)
    mask_BT = _padded([(1,) * len(row.ids) for row in rows], 0)
    labels = _padded([row.labels for row in rows], IGNORED)
    tokens = int(mask_BT.sum()) + (sum(len(r.labels) for r in rows) if task == "seq2seq" else 0)
    return Batch({"input_ids": ids_BT, "attention_mask": mask_BT}, labels, *_aim(labels, task), tokens, key)


def _aim(labels: torch.Tensor, task: str) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """(places, targets, counts): a causal model's logits stand one place before what they predict."""
    wanted = labels
    if task == "causal":
        wanted = torch.full_like(labels, IGNORED)
        wanted[:, :-1] = labels[:, 1:]
    chosen = wanted != IGNORED
    places = chosen.flatten().nonzero().squeeze(1)
    return places, wanted.flatten()[places], tuple(chosen.sum(1).tolist())


def _padded(sequences: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    width = max(len(s) for s in sequences)
    out = torch.full((len(sequences), width), pad, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        out[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    return out


def mask_tokens(
    batch: Batch, mask_id: int, vocab_size: int, generator: torch.Generator, share: float = MASKED_SHARE
) -> Batch:
    """A batch with tokens hidden for a masked model: of those that may be learned 15 %, at least one
    a row; 80 % become the mask token, 10 % a random one, 10 % stay (arXiv:1810.04805, sec. 3.1).
    """
    labels_BT = batch.labels
    free_BT = labels_BT != IGNORED
    draw_BT = torch.rand(labels_BT.shape, generator=generator)
    first = torch.where(free_BT, draw_BT, 2.0).argmin(dim=1)  # the one a row always hides
    chosen_BT = free_BT & (draw_BT < share)
    rows = torch.arange(len(first))
    chosen_BT[rows, first] |= free_BT[rows, first]
    fate_BT = torch.rand(labels_BT.shape, generator=generator)
    random_BT = torch.randint(vocab_size, labels_BT.shape, generator=generator)
    ids_BT = batch.inputs["input_ids"]
    ids_BT = torch.where(chosen_BT & (fate_BT < 0.8), mask_id, ids_BT)
    ids_BT = torch.where(chosen_BT & (fate_BT >= 0.9), random_BT, ids_BT)
    labels_BT = torch.where(chosen_BT, labels_BT, IGNORED)
    inputs = {**batch.inputs, "input_ids": ids_BT}
    places, targets, counts = _aim(labels_BT, "masked")
    return replace(
        batch, inputs=inputs, labels=labels_BT, places=places, targets=targets, counts=counts, key=""
    )


def plain(text: str) -> str:
    """A text on one line, for a table."""
    return re.sub(r"\s+", " ", text).strip()
