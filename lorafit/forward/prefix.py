"""The frozen prefix, replayed: the hidden state that enters the cut is handed on in place of the blocks below.

Everything under the lowest adapted layer is frozen, so what it makes of the same tokens is the same
in every epoch. prefix_fill.py runs it once over every micro-batch, before the first step; afterwards the blocks
below are stood in for (stand_in.py), while the model still builds its own masks and positions. It is exact,
and tried on a real micro-batch before it is used, or it is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lorafit.adapter import Plan
from lorafit.data import Batch
from lorafit.errors import OneProcess
from lorafit.forward.head import routes_for_loss
from lorafit.forward.placement import refused_by_map
from lorafit.forward.prefix_store import MemoryStore, StateStore
from lorafit.forward.stand_in import Fetched, HandOn, StandIn, Tap, in_place
from lorafit.model import ModelMap

Anybody = Callable[[bool], bool]  # whether any of the processes that run the same passes says so

# Entered with the first of some blocks and the one after the last: while in it, they hold their weights.
Held = Callable[[int, int], AbstractContextManager[None]]

READS_BELOW = "a layer of the band or above reads the output of layers below it"


def refusal(
    found: ModelMap, cut: Mapping[str, int], trained: Iterable[str], model: torch.nn.Module, training: bool
) -> str:
    """Why the prefix below that cut cannot be replayed exactly; empty when nothing speaks against it.

    `cut` is the lowest adapted layer of each stack, `trained` the names of what differs from the
    base, `model` the base with an adapter in it. What is random in training alone speaks against it
    in `training` alone.
    """
    if reason := refused_by_map(found, cut, training):
        return reason
    ((path, lowest),) = cut.items()
    depth = len(list(model.get_submodule(path).children()))
    above = tuple(f"{path}.{layer}." for layer in range(lowest, depth))
    for name in trained:
        if not name.startswith(above):
            return f"`{name}` is trained, and does not lie in the adapted layers"
    if training and (noise := _noise_below(model, above)):
        return noise
    if routes_for_loss(model):
        return "the router's auxiliary loss reads the lower layers"
    return ""


def trained_in(model: torch.nn.Module) -> list[str]:
    """The names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def cut_of(found: ModelMap, names: Iterable[str]) -> dict[str, int]:
    """The lowest layer of each stack that parameters of those names lie in; what lies in none counts
    as a stack of its own, at layer 0."""
    cut: dict[str, int] = {}
    for name in names:
        homes = [s.path for s in found.stacks if re.match(re.escape(s.path) + r"\.[0-9]+\.", name)]
        path = max(homes, key=len, default="")
        layer = int(name.removeprefix(f"{path}.").partition(".")[0]) if path else 0
        cut[path] = min(layer, cut.get(path, layer))
    return cut


def blocks_below(model: torch.nn.Module, plan: Plan) -> tuple[torch.nn.Module, ...]:
    """The blocks of a base model below the cut of the one stack that is adapted; none where several are."""
    if len(plan.cut) != 1:
        return ()
    ((path, cut),) = plan.cut.items()
    return tuple(model.get_submodule(path).children())[:cut]


def _noise_below(model: torch.nn.Module, above: tuple[str, ...]) -> str:
    """A dropout or jitter that is active in training below the cut, as a reason."""
    for name, module in model.named_modules():
        if f"{name}.".startswith(above):
            continue
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"dropout of {module.p} is active below the band, in `{name}`"
        for key, value in vars(module).items():
            noisy = re.search(r"dropout|layerdrop|jitter", key)
            if noisy and isinstance(value, float) and value > 0 and not key.startswith("_"):
                return f"{key} of {value} is active below the band, in `{name or type(module).__name__}`"
    return ""


class Prefix:
    """The blocks of a stack below the cut, and what is known of their output."""

    def __init__(self, stack: torch.nn.Module | None = None, cut: int = 0, held: Held | None = None) -> None:
        """Without a stack: every pass is a whole one. Blocks below the cut that hold no weights do in `held`."""
        self.stack = stack
        self.blocks: dict[str, torch.nn.Module] = dict(stack.named_children()) if stack is not None else {}
        self.cut = cut
        self.held = held
        self.always = held is not None  # every micro-batch is replayed: no other pass is possible
        self.store: StateStore = MemoryStore()
        self.forms: dict[int, int] = {}  # the members of each lower block's output; 0 for a bare tensor

    @classmethod
    def below(cls, base: torch.nn.Module, stack: str, cut: int) -> Prefix:
        """The blocks of that stack below the cut."""
        return cls(base.get_submodule(stack), cut)

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """Around a forward pass: replayed where the state of the micro-batch is stored, else a whole one."""
        state = self.store.get(batch.key) if self.cut and batch.key else None
        if state is None and self.always and self.cut:
            self.store.close()  # which removes what is damaged
            raise OneProcess("a stored state of the frozen layers is damaged", "run the command again")
        if state is None:
            yield
            return
        with self.replayed(state.to(batch.places.device, non_blocking=True)):
            yield

    def give_up(self) -> None:
        """Run every pass whole from here on."""
        self.store.filled()
        self.store.close()
        self.cut = 0

    def close(self) -> None:
        """Let go of the states."""
        self.store.close()

    @torch.no_grad()
    def differs(
        self, batch: Batch, losses: Callable[[Batch], torch.Tensor], anybody: Anybody = bool
    ) -> tuple[str, torch.Tensor]:
        """(why a replay of that micro-batch is not what a whole pass is, empty when it is; the state of it).

        `losses` runs one pass and says what each supervised token lost, (N,). Another text goes through
        in between, so that what a layer left behind for those above it is another's. Equal to the bit,
        or where two whole passes differ themselves (atomic sums on a GPU), within four times what they
        differ by. Where `anybody` sees a difference all processes run the second one.
        """
        ids = batch.inputs["input_ids"]
        other = replace(batch, inputs={**batch.inputs, "input_ids": ids.flip(1)})
        try:
            whole, state = self.run_whole(batch, losses)
            kept = state.clone()
            losses(other)
            with self.replayed(state):
                replayed = losses(batch)
        except Exception as error:  # a model's own code may fail on blocks that only pass on
            return f"the model does not take it: {type(error).__name__}", torch.empty(0)
        if not torch.equal(kept, state):
            return "a block changes its input in place", kept
        off = (whole - replayed).abs().max().item()
        if anybody(off != 0) and off > 4 * (whole - losses(batch)).abs().max().item():
            return READS_BELOW, kept
        return "", kept

    def run_whole(
        self, batch: Batch, losses: Callable[[Batch], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what each supervised token lost in a whole pass, (N,); the state that entered the cut, (B, T, D))."""
        assert self.stack is not None
        blocks = list(self.blocks.items())
        name, block = blocks[self.cut]
        tap = Tap(block)
        stand_ins: dict[str, StandIn] = {name: tap}
        if self.held is not None:
            for number, (below, module) in enumerate(blocks[: self.cut]):
                stand_ins[below] = Fetched(module, partial(self.held, number, number + 1))
        with self.noting(0, self.cut), in_place(self.stack, stand_ins):
            whole = losses(batch)
        return whole, tap.state

    @contextmanager
    def noting(self, first: int, last: int) -> Iterator[None]:
        """While here, the blocks from `first` to before `last` note the form of their output."""

        def note(number: int) -> Callable[[torch.nn.Module, Any, Any], None]:
            def seen(_: torch.nn.Module, __: Any, output: Any) -> None:
                self.forms[number] = len(output) if isinstance(output, tuple) else 0

            return seen

        numbers = [number for number in range(first, last) if number not in self.forms]
        blocks = list(self.blocks.values())
        hooks = [blocks[number].register_forward_hook(note(number)) for number in numbers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def replayed(self, state: torch.Tensor | None, cut: int | None = None) -> Iterator[None]:
        """While here, the blocks below the cut, or below another one, hand on what they are given, the first of
        them the state."""
        assert self.stack is not None
        below = list(self.blocks.items())[: self.cut if cut is None else cut]
        stand_ins = {name: HandOn(block, self.forms.get(n, 0)) for n, (name, block) in enumerate(below)}
        if stand_ins:
            next(iter(stand_ins.values())).state = state
        with in_place(self.stack, stand_ins):
            yield
