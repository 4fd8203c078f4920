"""Adapter into base, one tensor at a time, and the proof: merged against base + adapter on real text.

`W + s * B A` is added in float32 and rounded once to W's dtype, as PEFT does for linear layers.
What cannot be streamed (experts in one tensor, DoRA, trained biases, files that are no
safetensors) goes through the whole model, with a note that says so.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit import adapter
from lorafit.batch import collate
from lorafit.checkpoint import check_target, put_in_place
from lorafit.data import prepare
from lorafit.errors import RequestError, RunError
from lorafit.events import MergeReport, Verified
from lorafit.modelmap import ModelMap
from lorafit.rows import Row
from lorafit.spelling import pattern_value
from lorafit.step import Forward
from lorafit.survey import Source, load_model
from lorafit.tensorfiles import INDEX, TensorFile, open_file, rewrite, shards

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Once upon a time there was a small village by the sea. Every morning the boats went out.",
    "Question: what is 12 times 7? Answer: 84. Question: what is 9 times 8? Answer:",
    '{"name": "Ada", "city": "London", "year": 1843}',
)
# Largest logit difference that rounding the merged weights may bring, by the dtype of the base,
# as a share of the largest logit: half the spacing of the dtype, times what the depth adds up.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")
NOT_CARRIED = ("adapter_config.json", INDEX, "README.md")
MERGING = ".merging"


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one weight: `scaling * B @ A`, both float32; `flip` for a Conv1D."""

    down_RI: torch.Tensor
    up_OR: torch.Tensor
    scaling: float
    flip: bool

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """W + s * B A, in float32, rounded once to W's dtype."""
        delta = (self.up_OR @ self.down_RI) * self.scaling
        if self.flip:
            delta = delta.T
        if delta.shape != weight.shape:
            raise RequestError(
                f"the adapter adds {tuple(delta.shape)} to a weight of shape {tuple(weight.shape)}",
                "it was trained on another model",
            )
        return (weight.float() + delta).to(weight.dtype)


def why_not_streamed(config: dict[str, Any], names: Sequence[str], base: Path) -> str:
    """Why an adapter cannot be merged tensor by tensor; empty when it can."""
    if config.get("target_parameters"):
        return "it adapts experts that lie in one tensor"
    if config.get("use_dora"):
        return "it is a DoRA adapter"
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        return "it trained more than low-rank weights"
    if adapter.changes_its_base(config):
        return "its start took a part out of the base's weights"
    if any(not n.endswith((".lora_A.weight", ".lora_B.weight")) for n in names):
        return "it holds tensors beside low-rank weights"
    if not shards(base):
        return "the base is no safetensors checkpoint"
    return ""


def deltas(folder: Path, config: dict[str, Any], model_map: ModelMap) -> dict[str, Delta]:
    """What the adapter adds, by the base parameter's name."""
    file = open_file(folder / adapter.WEIGHTS)
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
        found[f"{module}.weight"] = Delta(down, up, scaling, kinds.get(module) == "conv1d")
    return found


def _homes(wanted: Sequence[str], files: Sequence[TensorFile], prefix: str) -> dict[str, str] | None:
    """Base parameter -> its name in the checkpoint, with the base model's prefix put on or taken
    off where the file has it so; None when one has no home (the names were converted)."""
    there = {entry.name for file in files for entry in file.entries}
    homes = {}
    for name in wanted:
        choices = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        home = next((c for c in choices if c in there), None)
        if home is None:
            return None
        homes[name] = home
    return homes


def base_folder(source: Source) -> Path:
    """The folder of the base's files; fetched when it is a hub model. Raises RequestError."""
    if source.local:
        return Path(source.place)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.place, allow_patterns=["*.safetensors", *CARRIED]))
    except Exception as error:  # every kind of network and hub error has the same next step
        raise RequestError(f"the hub did not give `{source.place}`: {error}", "check the network") from None


def merge(
    folder: Path,
    source: Source,
    model_map: ModelMap,
    output: Path,
    overwrite: bool,
    rows: Sequence[Row],
    tokenizer: Any,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Merge the adapter in `folder` into its base, into a model folder at `output`, verified.

    `rows` are the prompts of the proof (few tokens of each are used); without any, texts of our
    own are. `tick` hears (bytes written, bytes in all).

    Raises RequestError when output exists or the adapter does not belong to the base; RunError
    when the merged model differs from base + adapter by more than rounding: then nothing is
    put in place.
    """
    check_target(output, overwrite, kept=(folder, *([Path(source.place)] if source.local else [])))
    started = time.perf_counter()
    config = adapter.read_config(folder)
    names = adapter.tensor_names(folder)
    base = base_folder(source)
    notes = []
    work = output.with_name(output.name + MERGING)
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise RequestError(f"cannot write `{work}`: {error.strerror}") from None
    try:
        why = why_not_streamed(config, names, base)
        streamed = None if why else _stream(folder, config, base, model_map, work, tick)
        if streamed is None:
            reason = why or "the checkpoint's names are not the model's"
            notes.append(f"merged through the whole model: {reason}")
            adapted = _through_the_model(folder, source, work)
        else:
            adapted = streamed
        _carry(base, folder, work)
        files = [open_file(path) for path in shards(work)]
        verified = verify(folder, source, model_map, work, rows, tokenizer)
        if not verified.max_logit_diff <= verified.tolerance:  # so that what is no number fails too
            raise RunError(
                f"the merged model differs from base + adapter: logits by {verified.max_logit_diff:.3g}, "
                f"where {verified.tolerance:.3g} is rounding",
                f"nothing was put at `{output}`; merge with the base the adapter was trained on",
            )
        size = sum(path.stat().st_size for path in work.iterdir())
        put_in_place(work, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return MergeReport(
        output=str(output),
        tensors=sum(len(file.entries) for file in files),
        adapted=adapted,
        bytes=size,
        seconds=time.perf_counter() - started,
        verify=verified,
        notes=tuple(notes),
    )


def _stream(
    folder: Path,
    config: dict[str, Any],
    base: Path,
    model_map: ModelMap,
    work: Path,
    tick: Callable[[int, int], None],
) -> int | None:
    """Write the merged shards; the number of tensors changed, or None when a name has no home."""
    added = deltas(folder, config, model_map)
    if not added:
        return None
    files = [open_file(path) for path in shards(base)]
    prefix = model_map.stacks[0].path.split(".")[0] if model_map.stacks else ""
    homes = _homes(list(added), files, prefix)
    if homes is None:
        return None
    changes = {home: added[name].added_to for name, home in homes.items()}
    total = sum(entry.stop - entry.start for file in files for entry in file.entries)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        tick(done, total)

    for file in files:
        rewrite(file, work / file.path.name, changes, count)
    index = base / INDEX
    if index.is_file():
        shutil.copyfile(index, work / index.name)
    return len(changes)


def _through_the_model(folder: Path, source: Source, work: Path) -> int:
    """Merge with PEFT, the whole model in memory; the number of weights that carried an adapter."""
    model = adapter.attach(load_model(source, stored_dtype(source), torch.device("cpu")), folder)
    count = len(adapter.adapted(model))
    merged = model.merge_and_unload()
    merged.save_pretrained(work)
    return count


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype that a model is stored in, by its config; float32 where it says nothing."""
    text = source.config.get("text_config")
    name = source.config.get("dtype") or source.config.get("torch_dtype")
    if name is None and isinstance(text, dict):
        name = text.get("dtype") or text.get("torch_dtype")
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32


def _carry(base: Path, folder: Path, work: Path) -> None:
    """The files that make a folder of weights a model: config, generation config, tokenizer, template.

    The adapter's own come last: its tokenizer is the one it was trained with.
    """
    written = {path.name for path in work.iterdir()}
    for place in (base, folder):
        for pattern in CARRIED:
            for path in place.glob(pattern):
                if path.is_file() and path.name not in written and path.name not in NOT_CARRIED:
                    shutil.copyfile(path, work / path.name)


@torch.no_grad()
def verify(
    folder: Path, source: Source, model_map: ModelMap, merged: Path, rows: Sequence[Row], tokenizer: Any
) -> Verified:
    """Merged against base + adapter, on prompts: the worst logit difference, and how often the most
    likely token agrees, over every place of every prompt. Both in the dtype that is stored."""
    dtype, device = stored_dtype(source), torch.device("cpu")
    task = model_map.task
    prepare(tokenizer)
    prompts = list(rows)[:8] or [_prompt(text, tokenizer) for text in TEXTS]
    batches = [collate([_every_token(row)], tokenizer.pad_token_id or 0, task) for row in prompts]
    model = adapter.attach(load_model(source, dtype, device), folder)
    forward = Forward.of(model, task)
    wanted = [forward.logits(model, batch).float() for batch in batches]
    del model
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    whole = load_model(Source(merged.name, str(merged.resolve()), config), dtype, device)
    worst, agreed, places, scale = 0.0, 0, 0, 1.0
    for batch, logits_SV in zip(batches, wanted, strict=True):
        got_SV = forward.logits(whole, batch).float()
        apart = float((got_SV - logits_SV).abs().max())
        worst = apart if not apart <= worst else worst
        scale = max(scale, float(logits_SV.abs().max()))
        agreed += int((got_SV.argmax(-1) == logits_SV.argmax(-1)).sum())
        places += len(got_SV)
    return Verified(worst, agreed / places, places, TOLERANCE.get(dtype, 1e-2) * scale)


def _prompt(text: str, tokenizer: Any) -> Row:
    ids = tuple(tokenizer(text)["input_ids"])
    return Row(ids, ids, "a text of lorafit's own")


def _every_token(row: Row) -> Row:
    """A row of at most 256 tokens whose every place is compared."""
    ids = row.ids[:256]
    same = len(row.ids) == len(row.labels)
    return Row(ids, ids if same else tuple(t for t in row.labels if t >= 0)[:256], row.where)
