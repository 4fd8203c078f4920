"""The frozen prefix, run once a micro-batch: the hidden state that enters the cut is kept and handed on.

Everything under the lowest adapted layer is frozen, so what it makes of the same tokens is the same
in every epoch. In the first the state that enters the cut is captured as it goes by; afterwards the
blocks below are stood in for (stand_in.py), while the model still builds its own masks and positions. It is exact,
and tried on a real micro-batch before it is used, or it is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from lorafit.adapter import Plan
from lorafit.data import Batch
from lorafit.forward.head import routes_for_loss
from lorafit.forward.prefix_store import MemoryStore, StateStore
from lorafit.forward.stand_in import HandOn, Tap, in_place
from lorafit.model import ModelMap


def refusal(
    found: ModelMap, cut: Mapping[str, int], trained: Iterable[str], model: torch.nn.Module, training: bool
) -> str:
    """Why the prefix below that cut cannot be replayed exactly; empty when nothing speaks against it.

    `cut` is the lowest adapted layer of each stack, `trained` the names of what differs from the
    base, `model` the base with an adapter in it. What is random in training alone speaks against it
    in `training` alone.
    """
    if training and found.task == "masked":
        return "a masked model hides other tokens in each epoch"
    if len(found.text_stacks) > 1:
        return f"`{found.model}` has several stacks"
    if len(cut) != 1:
        return "adapters stand outside the text's one stack"
    ((path, lowest),) = cut.items()
    if path not in {stack.path for stack in found.text_stacks} or found.stack(path).shared:
        return "the adapted layers are shared, or not of the text"
    if lowest == 0:
        return "the band begins at layer 0: nothing is frozen below it"
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
            return f"dropout of {module.p} is active below the cut, in `{name}`"
        for key, value in vars(module).items():
            noisy = re.search(r"dropout|layerdrop|jitter", key)
            if noisy and isinstance(value, float) and value > 0 and not key.startswith("_"):
                return f"{key} of {value} is active below the cut, in `{name or type(module).__name__}`"
    return ""


class Prefix:
    """The blocks of a stack below the cut, and what is known of their output."""

    def __init__(self, stack: torch.nn.Module | None = None, cut: int = 0) -> None:
        """Without a stack: every pass is a whole one."""
        self.stack = stack
        self.blocks: dict[str, torch.nn.Module] = dict(stack.named_children()) if stack is not None else {}
        self.cut = cut
        self.store: StateStore = MemoryStore()
        self.replayed = self.captured = 0  # micro-batches
        self.given_up = ""  # why there is a cache no longer
        self.forms: dict[int, int] = {}  # the members of each lower block's output; 0 for a bare tensor

    @classmethod
    def below(cls, base: torch.nn.Module, stack: str, cut: int) -> Prefix:
        """The blocks of that stack below the cut."""
        return cls(base.get_submodule(stack), cut)

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """Around a forward pass: replayed where the micro-batch was seen before, else captured."""
        if not self.cut or not batch.key:
            yield
            return
        state = self.store.get(batch.key)
        if state is not None:
            with self._replayed(state.to(batch.places.device, non_blocking=True)):
                yield
            self.replayed += 1
        else:
            with self._captured() as tap:
                yield
            self.captured += 1
            try:
                self.store.put(batch.key, tap.state)
            except OSError as error:  # nothing is lost but time: every pass is a whole one from here on
                self.store.close()
                self.cut, self.given_up = 0, f"its file could not be written: {error.strerror}"

    def prove(self, batch: Batch, losses: Callable[[Batch], Any]) -> None:
        """Compare one state of a store that was found with a fresh pass over that micro-batch: where they
        differ, nothing that was stored is used. `losses` runs the pass."""
        if not getattr(self.store, "proved", True):
            with self.around(batch):
                losses(batch)
            self.captured = 0

    def close(self) -> None:
        """Let go of the states; a file that is not whole is removed."""
        self.store.close()

    @torch.no_grad()
    def differs(self, batch: Batch, losses: Callable[[Batch], torch.Tensor]) -> str:
        """Why a replay of that micro-batch is not what a whole pass is; empty when it is.

        `losses` runs one pass and says what each supervised token lost, (N,). Another text goes through
        in between, so that what a layer left behind for those above it is another's. Equal to the bit,
        or where two whole passes differ themselves (atomic sums on a GPU), within four times what they
        differ by.
        """
        ids = batch.inputs["input_ids"]
        other = replace(batch, inputs={**batch.inputs, "input_ids": ids.flip(1)})
        try:
            with self._captured() as tap:
                whole = losses(batch)
            state = tap.state.clone()
            losses(other)
            with self._replayed(tap.state):
                replayed = losses(batch)
        except Exception as error:  # a model's own code may fail on blocks that only pass on
            return f"the model does not take it: {type(error).__name__}"
        if not torch.equal(state, tap.state):
            return "a block changes its input in place"
        off = (whole - replayed).abs().max().item()
        if off and off > 4 * (whole - losses(batch)).abs().max().item():
            return "something above the cut reads the layers below it"
        return ""

    @contextmanager
    def _captured(self) -> Iterator[Tap]:
        """While here, what stands at the cut keeps the state that enters it."""
        assert self.stack is not None

        def note(number: int) -> Callable[[torch.nn.Module, Any, Any], None]:
            def seen(_: torch.nn.Module, __: Any, output: Any) -> None:
                self.forms[number] = len(output) if isinstance(output, tuple) else 0

            return seen

        (name, block), below = list(self.blocks.items())[self.cut], list(self.blocks.values())[: self.cut]
        tap, hooks = Tap(block), []
        if not self.forms:
            hooks = [lower.register_forward_hook(note(n)) for n, lower in enumerate(below)]
        try:
            with in_place(self.stack, {name: tap}):
                yield tap
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _replayed(self, state: torch.Tensor) -> Iterator[None]:
        """While here, the blocks below the cut hand on what they are given, the first one the state."""
        assert self.stack is not None
        below = list(self.blocks.items())[: self.cut]
        stand_ins = {name: HandOn(block, self.forms.get(n, 0)) for n, (name, block) in enumerate(below)}
        next(iter(stand_ins.values())).state = state
        with in_place(self.stack, stand_ins):
            yield
