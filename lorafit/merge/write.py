"""The merged weights, written: as a stream of the base's files, or by PEFT in the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from lorafit.adapter import adapted_names, attach_all, read_config, tensor_names
from lorafit.errors import RequestError
from lorafit.merge.deltas import Delta, deltas, named_in, own_base, why_not_streamed
from lorafit.model import (
    INDEX,
    Change,
    ModelMap,
    ModelSource,
    ShardLayout,
    TensorFile,
    config_of,
    lay_out,
    load_model,
    model_class,
    on_meta,
    open_file,
    read_rows,
    read_tensor,
    shards,
    stored_dtype,
    write,
)

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # a dtype as a safetensors header names it

Added = Callable[[Sequence[Delta], torch.Tensor, int], torch.Tensor]


@dataclass(slots=True)
class Work:
    """A merge as it was laid out: the files, the changed tensors, by the checkpoint's names."""

    sheets: list[ShardLayout] = field(default_factory=list)
    changes: dict[str, Change] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)  # tensors that were added -> what they are copies of
    stored_twice: bool = False  # the checkpoint has a tensor for each of a tied head and embedding
    adapted: int = 0
    streamed: bool = True
    named_alike: bool = True  # the files have the base's names of tensors
    notes: list[str] = field(default_factory=list)

    @property
    def untied(self) -> bool:
        """Whether the head has a weight of its own now."""
        return bool(self.copies) or self.stored_twice

    def stream(self, base: Path, work: Path, tick: Callable[[int, int], None]) -> None:
        """Write the merged shards, and their index with the bytes they truly have."""
        total, done = sum(sheet.bytes for sheet in self.sheets), 0
        lock = Lock()

        def written(size: int) -> None:
            nonlocal done
            with lock:
                done += size
                tick(done, total)

        write(self.sheets, work, self.changes, written)
        if len(self.sheets) > 1 or (base / INDEX).is_file():
            table = {entry.name: sheet.name for sheet in self.sheets for _, entry, _ in sheet.pieces}
            index: dict[str, Any] = {}
            if (base / INDEX).is_file():
                index = json.loads((base / INDEX).read_text(encoding="utf-8"))
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
            index["weight_map"] = dict(sorted(table.items()))
            (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def streamed_work(
    adapters: Sequence[tuple[Path, float]],
    base: Path,
    source: ModelSource,
    model_map: ModelMap,
    dtype: str,
    max_shard: int,
    added: Added,
) -> tuple[str, Work | None]:
    """(why it cannot be streamed, None), or (empty, the work laid out).

    Raises RequestError when an adapter's tensor has another shape than its weight, or when several
    adapters hold what cannot be summed.
    """
    files = [open_file(path) for path in shards(base)]
    homes = {entry.name: file for file in files for entry in file.entries}
    there = {entry.name: entry for file in files for entry in file.entries}
    prefix = model_map.stacks[0].path.split(".")[0] if model_map.stacks else ""
    together: dict[str, list[Delta]] = {}
    alone = len(adapters) == 1 and adapters[0][1] == 1
    for folder, weight in adapters:
        config = read_config(folder)
        why = why_not_streamed(config, tensor_names(folder), base)
        if not why and (own := own_base(folder, homes, prefix)):
            why = f"it has a `{own}` of its own"
        one = {} if why else deltas(folder, config, model_map, weight)
        if not one:
            why = why or "it adapts a convolution"
            if not alone:
                raise RequestError(
                    f"`{folder}` cannot be weighed or summed with another: {why}", "merge it alone"
                )
            return why, None
        for name, delta in one.items():
            together.setdefault(name, []).append(delta)
    made = Work()
    tied = tied_names(source, model_map)
    for name, parts in together.items():
        home = named_in(there, name, prefix)
        if name in tied:  # one tensor, two roles: the head gets one of its own, where it is not stored twice
            head, embedding = tied
            stored = [h for n in tied if (h := named_in(there, n, prefix))]
            made.stored_twice = len(stored) == 2
            home = home if made.stored_twice else next(iter(stored), None)
            if len(stored) == 1 and home is not None:
                made.copies[head if home != head else embedding] = home
                home = home if named_in(there, name, prefix) == home else name
        if home is None:
            if not alone:
                raise RequestError(f"the checkpoint has no `{name}`: its names are not the model's")
            return "the checkpoint's names are not the model's", None
        shape = there[made.copies.get(home, home)].shape
        for part in parts:
            if part.shape != shape:
                raise RequestError(
                    f"the adapter adds {part.shape} to `{name}`, which is {shape}",
                    "it was trained on another model",
                )
        made.changes[home] = partial(added, parts)
    if made.copies:
        files = _with_copies(files, made.copies)
    if made.untied:
        made.notes.append(
            "head and embedding were one tensor; the adapter makes them two: `tie_word_embeddings` is false"
        )
    made.sheets = lay_out(files, STORED.get(dtype, ""), max_shard, bool(made.copies))
    made.adapted = len(made.changes)
    return "", made


def tied_names(source: ModelSource, model_map: ModelMap) -> tuple[str, ...]:
    """(the head's weight, the embedding's) of a model whose two are one tensor; empty for the others."""
    if not model_map.tied_head:
        return ()
    config = config_of(source)
    model = on_meta(model_class(config), config)
    model.tie_weights()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or getattr(head, "weight", None) is None:
        return ()
    names = {id(module): name for name, module in model.named_modules()}
    if head.weight is not embedding.weight or id(head) not in names:
        return ()
    return f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"


def _with_copies(files: Sequence[TensorFile], copies: Mapping[str, str]) -> list[TensorFile]:
    """The files with entries for the tensors that are added, each read from where its original lies."""
    found = []
    for file in files:
        more = [
            replace(entry, name=name)
            for name, original in copies.items()
            for entry in file.entries
            if entry.name == original
        ]
        found.append(replace(file, entries=(*file.entries, *more)))
    return found


def through_the_model(
    adapters: Sequence[tuple[Path, float]],
    source: ModelSource,
    base: Path,
    work: Path,
    dtype: str,
    max_shard: int,
) -> Work:
    """Merge with PEFT, the whole model in memory; written under the base's names and in its tensors' dtypes,
    where those are the model's."""
    model: Any = load_model(source, stored_dtype(source), torch.device("cpu"))
    made = Work(streamed=False)
    touched = {n for folder, _ in adapters for n in tensor_names(folder)}
    # PEFT adapts the head along with the embedding only while the two are one
    together = any(read_config(folder).get("ensure_weight_tying") for folder, _ in adapters) and any(
        ".lora_embedding_" in name for name in touched
    )
    adapted: Any = attach_all(model, adapters) if together else None
    untied = _untie(model, touched)
    adapted = adapted or attach_all(model, adapters)
    made.adapted = len(adapted_names(adapted))
    try:
        merged: Any = adapted.merge_and_unload()
    except RuntimeError as error:  # PEFT's, e.g. of a trained bias where the layer has none
        raise RequestError(
            f"PEFT cannot merge `{adapters[0][0]}`: {str(error).splitlines()[0]}", "serve it beside its base"
        ) from None
    whole = work / ".whole"
    merged.save_pretrained(whole)
    del model, adapted, merged
    files = [open_file(path) for path in shards(base)]
    old = {entry.name: (file, entry) for file in files for entry in file.entries}
    new = {e.name: (file, e) for file in map(open_file, shards(whole)) for e in file.entries}
    made.copies = _copied(new, old, untied)
    alike = old.keys() == new.keys() - made.copies.keys() and all(
        e.shape == new[n][1].shape for n, (_, e) in old.items()
    )
    if alike:
        for name, (file, entry) in new.items():
            origin_file, origin = old[made.copies.get(name, name)]
            if not _same(read_tensor(origin_file, origin), read_tensor(file, entry)):
                made.changes[name] = (
                    partial(_replaced, read_tensor(file, entry))
                    if entry.stop < 2**20
                    else _Reread(file, name)
                )
        if made.copies:
            files = _with_copies(files, made.copies)
    else:
        made.named_alike = False
        files = [open_file(path) for path in shards(whole)]
        made.copies = {}
    made.sheets = lay_out(files, STORED.get(dtype, ""), max_shard, bool(made.copies))
    made.stream(base if alike else whole, work, lambda done, total: None)
    if untied and not made.copies:
        made.copies = {untied[0]: untied[1]}
    shutil.rmtree(whole)
    return made


def _copied(
    new: Mapping[str, Any], old: Mapping[str, Any], untied: tuple[str, str] | tuple[()]
) -> dict[str, str]:
    """The tensor that untying has added, with the one it was a copy of."""
    if not untied:
        return {}
    more, there = sorted(new.keys() - old.keys()), [n for n in untied if n in old]
    return {more[0]: there[0]} if len(more) == 1 and there else {}


def _untie(model: Any, touched: set[str]) -> tuple[str, str] | tuple[()]:
    """Give the head a weight of its own, where it is the embedding's and an adapter adapts one of the two;
    the names of both."""
    ends = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = (getattr(end, "base_layer", end) for end in ends)  # where an adapter is on them already
    if head is None or embedding is None or getattr(head, "weight", 0) is not getattr(embedding, "weight", 1):
        return ()
    pair = names[id(ends[0])], names[id(ends[1])]
    # trained tokens: PEFT replaces the same rows of both, which stay one
    touched = {tensor for tensor in touched if "token_adapter" not in tensor}
    if not any(f".{name}." in f".{tensor}" for name in pair for tensor in touched):
        return ()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    for part in ("text_config", "decoder"):
        if hasattr(getattr(model.config, part, None), "tie_word_embeddings"):
            getattr(model.config, part).tie_word_embeddings = False
    return f"{pair[0]}.weight", f"{pair[1]}.weight"


def _same(stored: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether a tensor is as it was loaded."""
    return torch.equal(stored.to(now.dtype), now) if stored.shape == now.shape else False


def _replaced(now: torch.Tensor, rows: torch.Tensor, first: int) -> torch.Tensor:
    return now[first : first + len(rows)] if rows.dim() else now


@dataclass(frozen=True, slots=True)
class _Reread:
    """Rows of a tensor as the whole model has them, read from where it was saved."""

    file: TensorFile
    name: str

    def __call__(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        return read_rows(self.file, self.name, first, len(rows))
