"""The base that adapters are put on, one after another: the layers below all of them run once over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorafit.adapter import changes_its_base, check_downloaded, read_config, tensor_names
from lorafit.evaluate.score import Evaluator
from lorafit.forward import (
    COMFORTABLE,
    Forward,
    MemoryStore,
    Prefix,
    Sweep,
    cut_of,
    fill,
    first_pass,
    fits_whole,
    not_streamed,
    refusal,
    refused_by_map,
    settle,
    sweep_of,
)
from lorafit.model import (
    ModelMap,
    ModelSource,
    Streamed,
    held_as,
    load_model,
    load_streamed,
    stream_refusal,
    weight_bytes,
)
from lorafit.system import free_memory


@dataclass(slots=True)
class EvaluatedBase:
    """A base, whole or with streamed layers below all `adapters`, and what is kept of its lower layers' output."""

    source: ModelSource
    found: ModelMap
    adapters: Sequence[str]
    dtype: torch.dtype
    device: torch.device
    quantize: str
    model: Any = None
    streamed: Streamed | None = None
    cuts: dict[str, int] = field(default_factory=dict)
    prefixes: dict[int, Prefix] = field(default_factory=dict)

    def open(self, residency: str, whole_passes: bool) -> Forward:
        """Load the base; how it is called. `whole_passes` are needed where text is generated.

        Raises RequestError when layers that were to be streamed cannot be.
        """
        cut = self._streamed_below(residency, whole_passes)
        if cut:
            stack = self.found.text_stacks[0].path
            self.streamed = load_streamed(self.source, self.dtype, self.device, stack, cut)
            self.model = self.streamed.model
        else:
            self.model = load_model(self.source, self.dtype, self.device, self.quantize)
        check_downloaded(self.adapters, self.source)
        self.cuts = {path: cut or self._cut(path) for path in self.adapters}
        make = Forward.plain if cut else Forward.of
        return make(self.model, self.found.task)

    def fill(self, evaluators: list[Evaluator]) -> list[Evaluator]:
        """Run the layers below each adapter over the rows, as far as there is room for their output; the
        evaluators, which call the model as it is called best.

        Raises RunError where streamed layers would not be exact.
        """
        sweep, trials = Sweep(), None
        if self.streamed is not None:
            _, first = next(evaluators[0].batches())
            forward, trials = first_pass(self.streamed, self.model, self.found.task, first)
            evaluators = [replace(each, forward=forward) for each in evaluators]
            trials[0].prefix.store = MemoryStore(self._state_bytes(evaluators))
            self.prefixes = {self.streamed.cut: trials[0].prefix}
            count = sum(len(each.keys) for each in evaluators)
            sweep = sweep_of(self.streamed, self._largest_state(evaluators), self.device, count)
        else:
            self.prefixes = self._prefixes(evaluators)
        run = partial(evaluators[0].forward.run, self.model) if evaluators else lambda batch: None
        batches = (batch for each in evaluators for _, batch in each.batches())
        for _ in (
            fill(list(self.prefixes.values()), batches, run, self.device, sweep) if self.prefixes else ()
        ):
            pass
        if trials is not None and self.streamed is not None:
            settle(self.streamed, self.model, trials)
        return evaluators

    def around(self, path: str | None, model: torch.nn.Module, evaluators: Sequence[Evaluator]) -> Prefix:
        """The replay for a model with that adapter, or for the base: one that gives the losses of a whole pass
        over the first rows, else one that runs every pass whole."""
        cut = max(self.cuts.values(), default=0) if path is None else self.cuts[path]
        prefix = self.prefixes.get(cut)
        if prefix is None or self.streamed is not None:
            return prefix or Prefix()
        _, first = next(evaluators[0].batches())
        forward = evaluators[0].forward
        reason, _ = prefix.differs(first, lambda batch: forward.scores(model, batch)[0])
        return Prefix() if reason else prefix

    def renew(self) -> None:
        """Load the base again: an adapter has changed it. The states are those of its files still."""
        self.model = load_model(self.source, self.dtype, self.device, self.quantize)
        for cut, prefix in self.prefixes.items():
            self.prefixes[cut] = Prefix.below(self.model, self.found.text_stacks[0].path, cut)
            self.prefixes[cut].store, self.prefixes[cut].forms = prefix.store, prefix.forms

    def _streamed_below(self, residency: str, whole_passes: bool) -> int:
        """The lowest layer that an adapter changes, where the layers below it are streamed; else 0."""
        if residency == "resident" or not self.adapters:
            return 0
        held = held_as(self.found, self.quantize)
        cuts = [cut_of(self.found, _changed(path)) for path in self.adapters]
        reasons = [refused_by_map(self.found, cut, training=False) for cut in cuts]
        reasons.append("the base is quantised" if held is not None else stream_refusal(self.source.place))
        reasons.append("text is generated by whole passes" if whole_passes else "")
        if any(changes_its_base(read_config(path)) for path in self.adapters):
            reasons.append("an adapter changes the base itself")
        reason = next(filter(None, reasons), "")
        if residency == "stream" and reason:
            raise not_streamed(reason)
        size = weight_bytes(self.found, self.dtype.itemsize, held)
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else free_memory()
        if reason or (residency == "auto" and fits_whole(size, free)):
            return 0
        return min(next(iter(cut.values())) for cut in cuts)

    def _cut(self, path: str) -> int:
        """The layer under which that adapter leaves the model as it is, and the replay may be exact; 0
        where there is none."""
        names = _changed(path)
        cut = cut_of(self.found, names)
        return 0 if refusal(self.found, cut, names, self.model, training=False) else next(iter(cut.values()))

    def _state_bytes(self, evaluators: Sequence[Evaluator]) -> int:
        return self.found.hidden_size * self.dtype.itemsize * sum(each.processed for each in evaluators)

    def _largest_state(self, evaluators: Sequence[Evaluator]) -> int:
        """Bytes of the states of the largest micro-batch."""
        tokens = (len(p) * int(each.rows.lengths[list(p)].max()) for each in evaluators for p in each.parts)
        return self.found.hidden_size * self.dtype.itemsize * max(tokens, default=1)

    def _prefixes(self, evaluators: Sequence[Evaluator]) -> dict[int, Prefix]:
        """A prefix for each cut, so far as their states have room in memory, the highest cuts first."""
        size = self._state_bytes(evaluators)
        room, made = COMFORTABLE * free_memory(), {}
        for cut in sorted(set(self.cuts.values()) - {0}, reverse=True):
            if 0 < size <= room:
                room -= size
                made[cut] = Prefix.below(self.model, self.found.text_stacks[0].path, cut)
                made[cut].store = MemoryStore(size)
        return made


def _changed(path: str) -> list[str]:
    """The names of the parameters that an adapter changes or adds."""
    return [name.removeprefix("base_model.model.") for name in tensor_names(Path(path).expanduser())]
