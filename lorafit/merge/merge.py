"""Adapters into their base, a few rows at a time, and the proof that the result says what they say.

`W + sum of w * s * B A` is added in float32 and rounded once to W's dtype, as PEFT does for one
adapter on linear layers. What cannot be streamed (experts in one tensor, DoRA, trained biases,
files that are no safetensors) goes through the whole model, with a note that says so.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from lorafit.adapter import (
    BASE,
    CONFIG,
    WEIGHTS,
    adapted_names,
    attach_all,
    changes_its_base,
    pattern_value,
    read_config,
    tensor_names,
)
from lorafit.data import Row, write_generation_config
from lorafit.digests import SEAL, seal
from lorafit.errors import RequestError, RunError
from lorafit.events import MergeReport, Verified
from lorafit.merge.verify import WeightedModel, named_in, stored_dtype, verify_merge
from lorafit.model import (
    INDEX,
    Change,
    ModelMap,
    ModelSource,
    ShardLayout,
    lay_out,
    load_model,
    open_file,
    shards,
    write,
)
from lorafit.outputs import CARD, EDITABLE, check_target, put_in_place, work_folder, writing
from lorafit.report import merged_card, read_back

CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")

NOT_CARRIED = (CONFIG, BASE, SEAL, INDEX, CARD)

UNVERIFIED = ".unverified"

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # a dtype as a safetensors header names it


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """What a merge is to make: where, whether it may replace what is there, the `dtype` of its
    floating-point tensors and the most bytes of a file (empty and 0: as the base has them), and
    whether it is verified."""

    output: Path
    overwrite: bool = False
    dtype: str = ""
    max_shard: int = 0
    verify: bool = True


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one weight: `scaling * B @ A`, both float32; `flip` for a Conv1D."""

    down_RI: torch.Tensor
    up_OR: torch.Tensor
    scaling: float
    flip: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight it is for."""
        out, into = len(self.up_OR), self.down_RI.shape[1]
        return (into, out) if self.flip else (out, into)

    def rows(self, first: int, many: int) -> torch.Tensor:
        """What is added to so many rows of the weight, from the first on; float32."""
        last = first + many
        if self.flip:
            return ((self.up_OR @ self.down_RI[:, first:last]) * self.scaling).T
        return (self.up_OR[first:last] @ self.down_RI).mul_(self.scaling)


def added(deltas: Sequence[Delta], rows: torch.Tensor, first: int) -> torch.Tensor:
    """Some rows of a weight with what the adapters add to them, in float32 (a wider weight in its own)."""
    total = deltas[0].rows(first, len(rows))
    for delta in deltas[1:]:
        total = total + delta.rows(first, len(rows))
    return total.add_(rows) if rows.dtype != torch.float64 else rows + total


def why_not_streamed(config: dict[str, Any], names: Sequence[str], base: Path) -> str:
    """Why an adapter cannot be merged tensor by tensor; empty when it can."""
    if config.get("target_parameters"):
        return "it adapts experts that lie in one tensor"
    if config.get("use_dora"):
        return "it is a DoRA adapter"
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        return "it trained more than low-rank weights"
    if changes_its_base(config):
        return "its start took a part out of the base's weights"
    if any(not n.endswith((".lora_A.weight", ".lora_B.weight")) for n in names):
        return "it holds tensors beside low-rank weights"
    if not shards(base):
        return "the base is no safetensors checkpoint"
    return ""


def deltas(folder: Path, config: dict[str, Any], model_map: ModelMap, weight: float) -> dict[str, Delta]:
    """What the adapter adds, times its weight, by the base parameter's name; empty where it holds
    other than matrices.

    Raises RequestError when half of a pair is missing.
    """
    file = open_file(folder / WEIGHTS)
    by_name = {entry.name: entry for entry in file.entries}
    kinds = {s.path: s.kind for s in (*model_map.slots, *model_map.unplaced)}
    found = {}
    for name, entry in by_name.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        partner = by_name.get(name.replace(".lora_A.", ".lora_B."))
        if partner is None:
            raise RequestError(f"the adapter has no B for `{module}`", "the file is not whole")
        if len(entry.shape) != 2:  # a convolution's: merged through the model
            return {}
        down, up = file.read(entry).float(), file.read(partner).float()
        rank = down.shape[0]
        alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        found[f"{module}.weight"] = Delta(down, up, scaling * weight, kinds.get(module) == "conv1d")
    return found


def base_folder(source: ModelSource) -> Path:
    """The folder of the base's files; fetched when it is a hub model. Raises RequestError."""
    if source.local:
        return Path(source.place)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.place, allow_patterns=["*.safetensors", *CARRIED]))
    except Exception as error:  # every kind of network and hub error has the same next step
        raise RequestError(f"the hub did not give `{source.place}`: {error}", "check the network") from None


def merge_adapters(
    adapters: Sequence[tuple[Path, float]],
    source: ModelSource,
    model_map: ModelMap,
    settings: MergeSettings,
    rows: Sequence[Row],
    tokenizer: Any,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Merge adapters, each times its weight, into their base: a model folder, verified.

    `rows` are the prompts of the proof (few tokens of each are used); without any, texts of our
    own are. `tick` hears (bytes written, bytes in all).

    Raises RequestError when the output exists or an adapter does not belong to the base; RunError
    when the merged model differs from base + adapters by more than rounding: then it lies beside
    the output, and what was there is as it was.
    """
    output = settings.output
    local = [Path(source.place)] if source.local else []
    check_target(output, settings.overwrite, (*(folder for folder, _ in adapters), *local))
    started = time.perf_counter()
    base = base_folder(source)
    notes = []
    with writing(output, "merge again"):
        work = work_folder(output, "merging")
    try:
        with writing(work, "merge again"):
            why, sheets, changes = _streamable(adapters, base, model_map, settings)
            if why:
                notes.append(f"merged through the whole model: {why}")
                adapted = _through_the_model(adapters, source, work, settings)
            else:
                adapted = len(changes)
                _stream(sheets, changes, base, work, tick)
            _carry(base, adapters[0][0], work, settings.dtype)
        seconds = time.perf_counter() - started
        files = [open_file(path) for path in shards(work)]
        verified = None
        if settings.verify:
            config = json.loads((work / "config.json").read_text(encoding="utf-8"))
            merged = WeightedModel(ModelSource(work.name, str(work.resolve()), config))
            held = WeightedModel(ModelSource(source.name, str(base), source.config), tuple(adapters))
            verified = verify_merge(held, merged, model_map, rows, tokenizer, by_blocks=not why)
            _judge(verified, work, output)
            if verified.note:
                notes.append(verified.note)
        report = MergeReport(
            output=str(output),
            tensors=sum(len(file.entries) for file in files),
            adapted=adapted,
            bytes=sum(path.stat().st_size for path in work.iterdir()),
            seconds=seconds,
            verify=verified,
            notes=tuple(notes),
        )
        with writing(work, "merge again"):
            parts = [(read_back(folder), weight) for folder, weight in adapters]
            card = merged_card(report, source.name, parts, model_map.task)
            (work / CARD).write_text(card, encoding="utf-8")
            seal(work, but=EDITABLE)
            put_in_place(work, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _judge(verified: Verified, work: Path, output: Path) -> None:
    """Raises RunError, the work moved out of harm's way, when the merged model says something else."""
    if verified.max_logit_diff <= verified.tolerance:  # false for NaN too
        return
    names = (f"{output.name}{UNVERIFIED}{f'-{n}' if n > 1 else ''}" for n in count(1))
    aside = next(path for path in map(output.with_name, names) if not path.exists() and not path.is_symlink())
    work.rename(aside)
    raise RunError(
        f"the merged model differs from base + adapter: logits by {verified.max_logit_diff:.3g}, "
        f"where {verified.tolerance:.3g} is rounding",
        f"it is kept as `{aside}` to look at, and nothing was put at `{output}`; "
        "merge with the base the adapter was trained on",
    )


def _streamable(
    adapters: Sequence[tuple[Path, float]], base: Path, model_map: ModelMap, settings: MergeSettings
) -> tuple[str, list[ShardLayout], dict[str, Change]]:
    """(why not, or empty; the files to write; the changes, by the checkpoint's names).

    Raises RequestError when an adapter's tensor has another shape than its weight, or when several
    adapters hold what no sum can hold.
    """
    together: dict[str, list[Delta]] = {}
    for folder, weight in adapters:
        config = read_config(folder)
        why = why_not_streamed(config, tensor_names(folder), base)
        one = {} if why else deltas(folder, config, model_map, weight)
        if not one:
            why = why or "it adapts a convolution"
            if len(adapters) > 1 or weight != 1:
                raise RequestError(
                    f"`{folder}` cannot be weighed or summed with another: {why}", "merge it alone"
                )
            return why, [], {}
        for name, delta in one.items():
            together.setdefault(name, []).append(delta)
    files = [open_file(path) for path in shards(base)]
    there = {entry.name: entry for file in files for entry in file.entries}
    prefix = model_map.stacks[0].path.split(".")[0] if model_map.stacks else ""
    changes: dict[str, Change] = {}
    for name, parts in together.items():
        home = named_in(there, name, prefix)
        if home is None:
            if len(adapters) > 1 or adapters[0][1] != 1:
                raise RequestError(f"the checkpoint has no `{name}`: its names are not the model's")
            return "the checkpoint's names are not the model's", [], {}
        for part in parts:
            if part.shape != there[home].shape:
                raise RequestError(
                    f"the adapter adds {part.shape} to `{name}`, which is {there[home].shape}",
                    "it was trained on another model",
                )
        changes[home] = partial(added, parts)
    return "", lay_out(files, STORED.get(settings.dtype, ""), settings.max_shard), changes


def _stream(
    sheets: Sequence[ShardLayout],
    changes: Mapping[str, Change],
    base: Path,
    work: Path,
    tick: Callable[[int, int], None],
) -> None:
    """Write the merged shards, and their index with the bytes they truly have."""
    total, done = sum(sheet.bytes for sheet in sheets), 0

    lock = Lock()

    def written(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            tick(done, total)

    write(sheets, work, changes, written)
    if len(sheets) > 1 or (base / INDEX).is_file():
        table = {entry.name: sheet.name for sheet in sheets for _, entry, _ in sheet.pieces}
        index: dict[str, Any] = {}
        if (base / INDEX).is_file():
            index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        index["weight_map"] = dict(sorted(table.items()))
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _through_the_model(
    adapters: Sequence[tuple[Path, float]], source: ModelSource, work: Path, settings: MergeSettings
) -> int:
    """Merge with PEFT, the whole model in memory; the number of weights that carried an adapter."""
    model = load_model(source, stored_dtype(source), torch.device("cpu"))
    adapted = attach_all(model, adapters)
    count = len(adapted_names(adapted))
    merged = adapted.merge_and_unload()
    if settings.dtype:
        merged = merged.to(getattr(torch, settings.dtype))
    limit = {"max_shard_size": settings.max_shard} if settings.max_shard else {}
    merged.save_pretrained(work, **limit)
    return count


def _carry(base: Path, folder: Path, work: Path, dtype: str) -> None:
    """The files that make a folder of weights a model: config, generation config, tokenizer, template.

    The adapter's own come last: its tokenizer is the one it was trained with.
    """
    written = {path.name for path in work.iterdir()}
    for place in (base, folder):
        for pattern in CARRIED:
            for path in place.glob(pattern):
                if path.is_file() and path.name not in written and path.name not in NOT_CARRIED:
                    shutil.copyfile(path, work / path.name)
    write_generation_config(work, base, work, folder)  # with the ends of the adapter's answers
    if dtype:
        path = work / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for part in (config, *(v for v in config.values() if isinstance(v, dict))):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = dtype
        config.setdefault("dtype", dtype)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
