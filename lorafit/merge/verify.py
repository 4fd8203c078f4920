"""A merged model against base + adapter, on prompts: what they say to each token, held side by side.

Block by block where the model's code allows it: both are built without weights, and each module
reads its own from the files when it is run and lets go of them after. So the proof takes the memory
of the largest tensor, whatever the model's size. Where that cannot be, both are loaded whole, one
after the other, and it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lorafit.adapter import attach_all
from lorafit.data import Batch, Row, collate_rows, prepare
from lorafit.errors import LorafitError
from lorafit.estimate import MemoryTrace
from lorafit.forward import Forward, chunk_for
from lorafit.merge.deltas import named_in
from lorafit.model import (
    ModelMap,
    ModelSource,
    TensorEntry,
    TensorFile,
    config_of,
    load_model,
    model_class,
    on_meta,
    open_file,
    read_tensor,
    shards,
    stored_dtype,
)
from lorafit.results import Verified

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Once upon a time there was a small village by the sea. Every morning the boats went out.",
    "Question: what is 12 times 7? Answer: 84. EvalRequest: what is 9 times 8? Answer:",
    '{"name": "Ada", "city": "London", "year": 1843}',
)

PROMPTS, TOKENS = 8, 64  # so many rows are run, so many tokens of each

# Largest logit difference that rounding the merged weights may bring, by the coarser of the dtype that is
# stored and the one that is computed in, as a share of the largest logit: half the spacing of the dtype,
# times what the depth adds up.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}

LOADED = "the proof loaded both models whole: {}"


class _NotByBlocks(Exception):
    """The model's own code does not run with weights that come and go."""


@dataclass(frozen=True, slots=True)
class WeightedModel:
    """A folder of weights, and the adapters that go on it with their weights."""

    source: ModelSource
    adapters: tuple[tuple[Path, float], ...] = ()


@torch.no_grad()
def verify_merge(
    base: WeightedModel,
    merged: WeightedModel,
    model_map: ModelMap,
    rows: Sequence[Row],
    tokenizer: Any,
    by_blocks: bool,
) -> Verified:
    """Merged against base + adapters, over every place of every prompt, both in the base's dtype.

    `rows` are the prompts; without any, texts of lorafit's own are. Raises RequestError when an
    adapter does not fit its base.
    """
    prepare(tokenizer)
    prompts = [_every_token(row) for row in rows[:PROMPTS]] or [_prompt(t, tokenizer) for t in TEXTS]
    batch = collate_rows(prompts, tokenizer.pad_token_id or 0, model_map.task)
    dtype, stored = stored_dtype(base.source), stored_dtype(merged.source)
    why = "the checkpoint cannot be read tensor by tensor"
    if by_blocks:
        try:
            return _by_blocks(base, merged, model_map, batch, dtype, stored)
        except _NotByBlocks as error:
            why = str(error)
    forward, model = _loaded(base, model_map.task, dtype)
    wanted = list(forward.chunks(model, batch))
    with model.disable_adapter():
        bare = list(forward.chunks(model, batch))
    del model
    _, model = _loaded(merged, model_map.task, dtype)
    found = _Measured(batch, dtype, stored)
    for parts in zip(wanted, bare, forward.chunks(model, batch), strict=True):
        found.see(*parts)
    return found.verdict(f"the proof loaded both models whole: {why}")


class _Measured:
    """What three models say to the same places, as far as it was seen."""

    def __init__(self, batch: Batch, *dtypes: torch.dtype) -> None:
        """`dtypes` are all that the weights were rounded to."""
        self.targets = batch.targets
        self.rounding = max(TOLERANCE.get(dtype, 1e-2) for dtype in dtypes)
        self.worst = self.moved = self.loss = self.merged_loss = 0.0
        self.scale = 1.0
        self.agreed = self.places = 0

    def see(self, wanted_CV: torch.Tensor, bare_CV: torch.Tensor, merged_CV: torch.Tensor) -> None:
        """Logits of the next few places: base + adapters, the base alone, the merged model."""
        wanted, bare, merged = (t.float() for t in (wanted_CV, bare_CV, merged_CV))
        apart = float((merged - wanted).abs().max())
        self.worst = apart if not apart <= self.worst else self.worst  # what is no number stays
        self.moved = max(self.moved, float((wanted - bare).abs().max()))
        self.scale = max(self.scale, float(wanted.abs().max()))
        self.agreed += int((merged.argmax(-1) == wanted.argmax(-1)).sum())
        targets = self.targets[self.places : self.places + len(wanted)]
        self.loss += float(F.cross_entropy(wanted, targets, reduction="sum"))
        self.merged_loss += float(F.cross_entropy(merged, targets, reduction="sum"))
        self.places += len(wanted)

    def verdict(self, note: str = "") -> Verified:
        """What was seen, with what rounding allows."""
        return Verified(
            max_logit_diff=self.worst,
            argmax_agreement=self.agreed / self.places,
            tokens=self.places,
            tolerance=self.rounding * self.scale,
            adapter_logit_diff=self.moved,
            loss=self.loss / self.places,
            merged_loss=self.merged_loss / self.places,
            note=note,
        )


def _loaded(side: WeightedModel, task: str, dtype: torch.dtype) -> tuple[Forward, Any]:
    model: Any = load_model(side.source, dtype, torch.device("cpu"))
    if side.adapters:
        model = attach_all(model, side.adapters)
    return Forward.of(model, task), model


def _by_blocks(
    base: WeightedModel,
    merged: WeightedModel,
    found: ModelMap,
    batch: Batch,
    dtype: torch.dtype,
    stored: torch.dtype,
) -> Verified:
    """The three passes, each module's weights read when it is run. Raises _NotByBlocks."""
    passes = []
    for side in (base, WeightedModel(base.source), merged):
        model = _without_weights(side.source, dtype)
        homes = _homes(model, side.source)
        with MemoryTrace():  # it answers what the model asks of values: no weight is read for it
            forward = Forward.of(model, found.task, chunk_for("cpu", found.vocab_size))
        _make_buffers(model, homes)
        adapted = attach_all(model, side.adapters, on_meta=True) if side.adapters else model
        _feed(adapted, homes, dtype)
        passes.append(forward.chunks(adapted, batch))
    seen = _Measured(batch, dtype, stored)
    try:
        for parts in zip(*passes, strict=True):
            seen.see(*parts)
    except LorafitError:
        raise
    except Exception as error:  # a model's own code may reach for weights that are not there
        raise _NotByBlocks(f"its code wants its weights at another time ({type(error).__name__})") from None
    return seen.verdict()


def _without_weights(source: ModelSource, dtype: torch.dtype) -> Any:
    config = config_of(source)
    model = on_meta(model_class(config), config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a parameter's bytes lie. The parameter is kept: PEFT may put another in its place, and a tensor made
    after it was freed could have its id."""

    file: TensorFile
    entry: TensorEntry
    parameter: torch.Tensor

    def read(self) -> torch.Tensor:
        return read_tensor(self.file, self.entry)


def _homes(model: Any, source: ModelSource) -> dict[int, _Home]:
    """id of a parameter or a stored buffer -> its home. Raises _NotByBlocks when one has none."""
    there = {e.name: (file, e) for file in map(open_file, shards(Path(source.place))) for e in file.entries}
    prefix = model.base_model_prefix
    found: dict[int, _Home] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        home = named_in(there, name, prefix)
        if home is not None:
            file, entry = there[home]
            if entry.shape != tuple(tensor.shape):
                raise _NotByBlocks("the checkpoint's tensors have other shapes than the model's")
            found[id(tensor)] = _Home(file, entry, tensor)
    for name, tensor in model.named_parameters():
        if id(tensor) not in found:
            raise _NotByBlocks(f"the checkpoint has no `{name}`")
    return found


def _make_buffers(model: Any, homes: Mapping[int, _Home]) -> None:
    """The buffers: read where they are stored, else made by the model's own code, as loading does it."""
    stored = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) in homes:
                    stored.append((module, name, homes[id(buffer)]))
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        module._is_hf_initialized = False
    model.initialize_weights()  # parameters are on the meta device still: nothing is done to them
    for module, name, home in stored:  # after it, for it may have made these anew
        module._buffers[name] = home.read()


def _feed(model: torch.nn.Module, homes: Mapping[int, _Home], dtype: torch.dtype) -> None:
    """Have each module read its own weights before it runs, and let go of them after."""
    for module in model.modules():
        own = {n: homes[id(p)] for n, p in module._parameters.items() if p is not None and id(p) in homes}
        if own:
            module.register_forward_pre_hook(_reader(own, dtype))
            module.register_forward_hook(_dropper(dict(module._parameters)), always_call=True)


def _reader(own: Mapping[str, _Home], dtype: torch.dtype) -> Callable[..., None]:
    def read(module: torch.nn.Module, _: Any) -> None:
        for name, home in own.items():
            tensor = home.read()
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            module._parameters[name] = torch.nn.Parameter(tensor.to(kind), requires_grad=False)

    return read


def _dropper(empty: Mapping[str, Any]) -> Callable[..., None]:
    def drop(module: torch.nn.Module, _: Any, __: Any) -> None:
        module._parameters.update(empty)

    return drop


def _prompt(text: str, tokenizer: Any) -> Row:
    ids = tuple(tokenizer(text)["input_ids"])[:TOKENS]
    return Row(ids, ids, "a text of lorafit's own")


def _every_token(row: Row) -> Row:
    """The first tokens of a row, every place of which is compared."""
    ids = row.ids[:TOKENS]
    same = len(row.ids) == len(row.labels)
    return Row(ids, ids if same else tuple(t for t in row.labels if t >= 0)[:TOKENS], row.where)
