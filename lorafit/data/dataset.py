"""A run's data: files to rows for training and rows held out; large files' rows are kept for later runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorafit import __version__, demo
from lorafit.cache import code_digest, filling, finish, folder
from lorafit.data.counts import Counts, faults
from lorafit.data.example import Reading
from lorafit.data.files import find_sources, records, resembles_json, sources
from lorafit.data.formats import parse_map, read
from lorafit.data.report import look_of
from lorafit.data.rows import FORMAT, Row, RowSet, RowStore, Writer, opened
from lorafit.data.source import DataSource
from lorafit.data.split import ReadData, ReadFile, as_often, held_out_rows, nothing_left
from lorafit.data.template import DEFAULT_TEMPLATE, ChatTemplate, parse_args, special_texts
from lorafit.data.template_file import read_template
from lorafit.data.tokenize import Tokens
from lorafit.errors import RequestError, RunError, closest
from lorafit.events import DataReport
from lorafit.settings import RunConfig, weighted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


STORED_FROM = 64_000_000  # bytes of a file from which on its rows are kept on disk for the next run

Tick = Callable[[float, float], None]  # (done, in all)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows for training and rows held out, and the look at them."""

    train: RowSet
    held_out: RowSet
    look: DataReport

    @staticmethod
    def of(
        train: Iterable[Row], held_out: Iterable[Row], tokenizer: PreTrainedTokenizerBase, task: str
    ) -> Rows:
        """Rows that are at hand, looked at."""
        sets = RowSet.of(train), RowSet.of(held_out)
        return Rows(*sets, look_of(*sets, (), (), "", tokenizer, task))


def load(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    vocab_size: int,
    tick: Tick = lambda done, total: None,
) -> Rows:
    """The rows of a run: read, tokenised, some held out, looked at. Without `data`, the demo's.

    `tick` is called with (bytes read, bytes in all). Raises RequestError for anything wrong with the data, and when
    nothing is left to learn.
    """
    find_sources(config)
    specs, apart = files_of(config)
    if apart and config.group_by and config.data:
        raise RequestError(
            "--group-by is about the share that is held out, and --eval-data names other rows",
            "leave one of them out",
        )
    for name, weight in map(weighted, apart):
        if weight != 1:
            raise RequestError(
                f"--eval-data {name}={weight:g}: held-out rows have no weight", f"--eval-data {name}"
            )
    made = _read_all([*specs, *apart], config, tokenizer, task, vocab_size, tick)
    own, others = made[: len(specs)], made[len(specs) :]

    stores: list[RowStore] = []
    train: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    chosen = iter(() if apart or not config.holds_out else held_out_rows(own, config))
    for data in own:
        keeping = []
        for part in data.parts:
            numbers = np.arange(len(part.store)) + sum(map(len, stores))
            stores.append(part.store)
            out = next(chosen, np.zeros(len(numbers), dtype=bool))
            kept.append(numbers[out])
            keeping.append(numbers[~out])
        train.append(as_often(np.concatenate(keeping), data.weight, config.seed_of_data))
    for data in others:
        for part in data.parts:
            kept.append(np.arange(len(part.store)) + sum(map(len, stores)))
            stores.append(part.store)

    whole = tuple(stores)
    counts = [part.counts for data in made for part in data.parts]
    sets = RowSet(whole, np.concatenate(train)), RowSet(whole, np.concatenate(kept))
    if not len(sets[0]) or (config.holds_out and not len(sets[1])):
        raise RequestError(*nothing_left("training" if not len(sets[0]) else "held-out", counts, config))
    name = ", ".join(Path(spec).name for spec in apart)
    if config.holds_out and not apart:
        name = f"{config.holdout:.0%} of the data, at most 200"
    return Rows(*sets, look_of(*sets, own, counts, name, tokenizer, task))


def files_of(config: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a run trains on, and what it holds out that lies apart; without `data`, the demo's."""
    apart = config.eval_data or (() if config.data or not config.holds_out else (str(demo.HELD_OUT),))
    return config.data or (str(demo.TRAIN),), apart


def read_eval_rows(
    specs: Sequence[str], config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: str, vocab_size: int
) -> RowSet:
    """All rows of those files, for evaluation. Raises RequestError as `load` does."""
    config = replace(config, group_by=None)
    made = _read_all(specs, config, tokenizer, task, vocab_size, lambda done, total: None)
    stores = tuple(part.store for data in made for part in data.parts)
    rows = RowSet(stores, np.arange(sum(map(len, stores))))
    if not len(rows):
        raise RequestError(f"no row of {', '.join(specs)} has anything to predict")
    return rows


def labelled(rows: RowSet, by: str, specs: Sequence[str], config: RunConfig | None = None) -> list[str]:
    """For each row what a column of its file says, or by `file` the file's name, with its folders where
    two files have the same.

    `specs` are the files that the rows come from, read as `config` says. Raises RequestError where there is no such column.
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
        if config is not None:
            source = _as_told(source, config)
        if source.kind == "text" and resembles_json(source):
            source = source.as_kind("jsonl")
        if numbers and source.kind == "text":
            raise RequestError(f"--by {by}: `{source.name}` is plain text and has no columns", "--by file")
        for number, row in records(source, fault=lambda error: None) if numbers else ():
            if number in numbers:
                if not isinstance(row, dict) or by not in row:
                    columns = [str(column) for column in row] if isinstance(row, dict) else []
                    raise RequestError(
                        f"`{source.where(number)}` has no column `{by}`, which --by names",
                        closest(by, columns) or f"its columns: {', '.join(columns)}; or --by file",
                    )
                said[source.name, number] = " ".join(str(row[by]).split())
    return [said[origin] for origin in origins]


def _read_all(
    specs: Sequence[str],
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    vocab_size: int,
    tick: Tick,
) -> list[ReadData]:
    """The rows of each spec; a spec that stands there twice is read twice."""
    assert config.max_length is not None
    prepare(tokenizer, config)
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

            parts.append(
                _stored(_as_told(source, config), config, _maker(config, tokenizer, task, vocab_size), heard)
            )
            before += source.bytes
            tick(before, total)
        made.append(ReadData(name, weight, tuple(parts)))
    counts = [part.counts for data in made for part in data.parts]
    if config.on_bad_row == "stop" and any(c.bad for c in counts):
        raise faults(counts)
    pairs = [c for c in counts if c.pair]
    if pairs and task == "causal" and tokenizer.chat_template is not None:
        note = _plain_or_chat(pairs[0].pair, tokenizer, config)
        if note:
            pairs[0].note(note)
    return made


def _plain_or_chat(pair: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> str:
    """What a row of plain prompt and completion is, and what it would be as a chat; empty where the template
    refuses it."""
    prompt, completion = (text if len(text) <= 40 else text[:39] + "…" for text in pair)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    text = chat_template_of(tokenizer, config).probe(turns)
    if text is None:
        return ""
    plain, chat = (t.replace("\n", "⏎") for t in (prompt + completion, text))
    return (
        f"prompts and completions are learned as plain text, without the model's chat template: `{plain}`; "
        f"--as-chat makes turns of them: `{chat}`"
    )


def _maker(config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: str, vocab_size: int) -> Tokens:
    """What makes a source's rows, with counts of its own: bad rows are counted there."""
    counts = Counts()
    assert config.max_length is not None
    return Tokens(
        tokenizer,
        task,
        config.max_length,
        vocab_size,
        config.overflow,
        config.loss_on,
        parse_args(config.template_args),
        moment_of(config),
        counts,
        counts.fault,
    )


def chat_template_of(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> ChatTemplate:
    """The tokenizer's chat template as a run's rows go through it: with its arguments and its date."""
    return ChatTemplate(tokenizer, parse_args(config.template_args), moment_of(config))


def moment_of(config: RunConfig) -> datetime:
    """What a chat template takes for now."""
    return datetime.fromisoformat(config.template_date) if config.template_date else datetime.now()


def _as_told(source: DataSource, config: RunConfig) -> DataSource:
    """A table with the separator and the quotes that the options name."""
    if source.kind not in ("csv", "tsv"):
        return source
    delimiter = "\t" if config.csv_delimiter == "tab" else config.csv_delimiter or ""
    return replace(source, delimiter=delimiter, quote="" if config.csv_quote == "none" else config.csv_quote)


def _not_kept(source: DataSource, error: OSError) -> RunError:
    return RunError(
        f"the rows of `{source.name}` cannot be kept below `{folder('rows')}`: {error.strerror}",
        "lorafit cache --remove all makes room; XDG_CACHE_HOME names another place",
    )


def _stored(source: DataSource, config: RunConfig, maker: Tokens, tick: Callable[[int], None]) -> ReadFile:
    """The rows of a source: from the cache where a large one was read before, else made, and then kept."""
    by_line = source.where(0).endswith(":0")
    entry = None
    if source.bytes >= STORED_FROM:
        entry = folder("rows") / _key(source, config, maker)
        if found := opened(entry):
            arrays, index = found
            if index["default_template"]:  # an adapter is saved with the template it was trained on
                maker.tokenizer.chat_template = DEFAULT_TEMPLATE
            tick(source.bytes)
            return ReadFile(
                RowStore(source.name, by_line, arrays), index["format_read"], Counts(**index["counts"])
            )
    counts = maker.counts
    reading = Reading(
        config.format, parse_map(config.map), config.group_by or "", config.as_chat, counts, counts.fault
    )
    format, examples = read(source, tick=tick, reading=reading)
    try:
        writer = Writer(filling(entry) if entry else None)
    except OSError as error:
        raise _not_kept(source, error) from None
    try:
        for row in maker.rows(examples, format):
            writer.add(row)
        made = writer.finish()
        counts.forget_keys(maker.reads)
    except BaseException as error:  # whatever it was, nothing stays half filled
        writer.close()
        if writer.folder is not None:
            shutil.rmtree(writer.folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise _not_kept(source, error) from None
    if entry is None:
        return ReadFile(RowStore(source.name, by_line, made), format, counts)  # type: ignore[arg-type]
    tokens = writer.at["ids"]
    index = {
        "about": source.name, "tokens": tokens, "format": FORMAT, "digests": made, "format_read": format,
        "counts": asdict(counts), "default_template": maker.tokenizer.chat_template == DEFAULT_TEMPLATE,
    }  # fmt: skip
    assert writer.folder is not None
    if finish(writer.folder, entry, index) != entry:
        shutil.rmtree(writer.folder, ignore_errors=True)
    again = opened(entry)
    if again is None:
        raise RunError(f"what was written to `{entry}` is not what is there", "check the disk")
    return ReadFile(RowStore(source.name, by_line, again[0]), format, counts)


def _key(source: DataSource, config: RunConfig, maker: Tokens) -> str:
    """A digest of all that decides the rows of a file: its content, its tokenizer, the settings, this code."""
    found = hashlib.sha256()
    assert source.path is not None
    with source.path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    tokenizer = maker.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = [
        FORMAT, __version__, source.kind, source.packed, source.delimiter, source.quote, config.format, config.map,
        config.group_by, config.as_chat, maker.task, maker.max_length, maker.vocab_size, maker.overflow, maker.loss_on,
        type(tokenizer).__name__, tokenizer.chat_template, maker.template_args, str(maker.moment) if maker.dated else "",
        tokenizer.special_tokens_map, backend.to_str() if backend is not None else tokenizer.get_vocab(),
        sorted(maker.ends), code_digest("data.dataset"),
    ]  # fmt: skip
    found.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return found.hexdigest()[:32]


def prepare(tokenizer: PreTrainedTokenizerBase, config: RunConfig | None = None) -> None:
    """Give a tokenizer the chat template and the end token of a run, and a pad token where it has none:
    padding is masked, so which one means nothing.

    Raises RequestError for a template that cannot be read, or an end token that is not one token.
    """
    if config is not None and config.chat_template:
        tokenizer.chat_template = read_template(config.chat_template)
    if config is not None and config.end_token:
        known = tokenizer.get_vocab()
        if config.end_token not in known:
            marked = [t for t in special_texts(tokenizer) if t in known]
            raise RequestError(
                f"--end-token `{config.end_token}` is not a token of this tokenizer",
                closest(config.end_token, marked) or f"its special tokens: {', '.join(sorted(marked)[:8])}",
            )
        tokenizer.eos_token = config.end_token
    if tokenizer.pad_token_id is None:
        with suppress(IndexError):  # an empty vocabulary, which no model has
            tokenizer.pad_token = (
                tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
            )
    tokenizer.padding_side = "right"
