"""The frozen prefix, run once a micro-batch: the hidden state that enters the cut is kept and handed on.

Everything under the lowest adapted layer is frozen, so what it makes of the same tokens is the same
in every epoch. In the first the state that enters the cut is captured as it goes by; afterwards the
blocks below only pass it on, while the model still builds its own masks and positions. It is exact,
and tried on a real micro-batch before it is used, or it is refused with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from lorafit import __version__, caches
from lorafit.batch import Batch
from lorafit.modelmap import ModelMap, installed
from lorafit.plan import Plan

FORMAT = 1


# -- is it exact? ---------------------------------------------------------------------------


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
    if getattr(model.config, "output_router_logits", False):
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

    def __init__(self, blocks: Sequence[torch.nn.Module] = (), cut: int = 0) -> None:
        """Without blocks: every pass is a whole one."""
        self.blocks: list[Any] = list(blocks)
        self.cut = cut
        self.store: Store = MemoryStore()
        self.replayed = self.captured = 0  # micro-batches
        self.given_up = ""  # why there is a cache no longer
        self.forms: dict[int, int] = {}  # the members of each lower block's output; 0 for a bare tensor

    @classmethod
    def below(cls, base: torch.nn.Module, stack: str, cut: int) -> Prefix:
        """The blocks of that stack below the cut."""
        return cls(list(base.get_submodule(stack).children()), cut)

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
            with self._captured() as states:
                yield
            self.captured += 1
            try:
                self.store.put(batch.key, states[0])
            except OSError as error:  # nothing is lost but time: every pass is a whole one from here on
                self.store.close()
                self.cut, self.given_up = 0, f"its file could not be written: {error.strerror}"

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
            with self._captured() as states:
                whole = losses(batch)
            state = states[0].clone()
            losses(other)
            with self._replayed(states[0]):
                replayed = losses(batch)
        except Exception as error:  # a model's own code may fail on blocks that only pass on
            return f"the model does not take it: {type(error).__name__}"
        if not torch.equal(state, states[0]):
            return "a block changes its input in place"
        off = (whole - replayed).abs().max().item()
        if off and off > 4 * (whole - losses(batch)).abs().max().item():
            return "something above the cut reads the layers below it"
        return ""

    @contextmanager
    def _captured(self) -> Iterator[list[torch.Tensor]]:
        """While here, the state that enters the cut is put in the list."""
        states: list[torch.Tensor] = []

        def capture(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not states:
                states.append(_hidden(inputs, named).detach().clone())

        def note(number: int) -> Callable[[torch.nn.Module, Any, Any], None]:
            def seen(_: torch.nn.Module, __: Any, output: Any) -> None:
                self.forms[number] = len(output) if isinstance(output, tuple) else 0

            return seen

        hooks = [self.blocks[self.cut].register_forward_pre_hook(capture, with_kwargs=True)]
        if not self.forms:
            hooks += [self.blocks[n].register_forward_hook(note(n)) for n in range(self.cut)]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _replayed(self, state: torch.Tensor) -> Iterator[None]:
        """While here, the blocks below the cut pass on what they are given, the first one the state."""

        def passing(number: int) -> Callable[..., Any]:
            members = self.forms.get(number, 0)

            def forward(*inputs: Any, **named: Any) -> Any:
                hidden = state if number == 0 else _hidden(inputs, named)
                return (hidden, *[None] * (members - 1)) if members else hidden

            return forward

        below = self.blocks[: self.cut]
        for number, block in enumerate(below):
            block.forward = passing(number)
        try:
            yield
        finally:
            for block in below:
                del block.forward


def _hidden(inputs: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = inputs[0] if inputs else named["hidden_states"]
    return hidden


# -- where the states lie -------------------------------------------------------------------


class Store(Protocol):
    """Hidden states by the key of their micro-batch."""

    def get(self, key: str) -> torch.Tensor | None: ...

    def put(self, key: str, state: torch.Tensor) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class MemoryStore:
    """In the host's memory; pinned where a GPU reads it."""

    states: dict[str, torch.Tensor] = field(default_factory=dict)

    def get(self, key: str) -> torch.Tensor | None:
        return self.states.get(key)

    def put(self, key: str, state: torch.Tensor) -> None:
        self.states[key] = state.cpu().pin_memory() if state.is_cuda else state

    def close(self) -> None:
        self.states.clear()


@dataclass(slots=True)
class DiskStore:
    """In a folder: `states.bin`, one state after another, and `index.json` that says where each lies.

    While it is filled it has a name of its own, and takes the one it is found by once all
    `expected` states are there: a folder of that name is whole. Each state is held against its
    digest when it is first read; one that differs counts as not there, and is made again.
    """

    folder: Path
    expected: frozenset[str]
    about: dict[str, Any]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    known_good: set[str] = field(default_factory=set)
    made_again: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: bool = False
    filling: Path | None = None
    file: Any = None

    def __post_init__(self) -> None:
        found = _index(self.folder)
        if found is not None and set(found["entries"]) == self.expected:
            self.entries, self.whole = found["entries"], True
            self.file = (self.folder / "states.bin").open("rb")
            return
        if self.folder.exists():  # of that name, and not whole: damaged
            shutil.rmtree(self.folder, ignore_errors=True)
        self.filling = caches.filling(self.folder)
        self.file = (self.filling / "states.bin").open("w+b")

    def get(self, key: str) -> torch.Tensor | None:
        entry = self.entries.get(key)
        if key in self.made_again:
            return self.made_again[key]
        if entry is None:
            return None
        raw = os.pread(self.file.fileno(), entry["bytes"], entry["offset"])
        if key not in self.known_good:
            if caches.digest(raw) != entry["digest"]:
                return None
            self.known_good.add(key)
        dtype = getattr(torch, entry["dtype"])
        return torch.frombuffer(bytearray(raw), dtype=dtype).view(entry["shape"])

    def put(self, key: str, state: torch.Tensor) -> None:
        """Raises OSError where the disk is full."""
        if self.whole:  # the stored one was damaged
            self.made_again[key] = state.cpu()
            return
        raw = bytes(state.cpu().contiguous().view(torch.uint8).numpy().data)
        offset = self.file.seek(0, os.SEEK_END)
        self.file.write(raw)
        self.file.flush()
        self.entries[key] = {
            "offset": offset,
            "bytes": len(raw),
            "shape": list(state.shape),
            "dtype": str(state.dtype).removeprefix("torch."),
            "digest": caches.digest(raw),
        }
        self.known_good.add(key)
        if set(self.entries) == self.expected:
            self._finish()

    def _finish(self) -> None:
        os.fsync(self.file.fileno())
        size = self.file.seek(0, os.SEEK_END)
        index = {**self.about, "format": FORMAT, "bytes": size, "entries": self.entries}
        assert self.filling is not None
        caches.finish(self.filling, self.folder, index)
        self.whole = True

    def close(self) -> None:
        """A cache that is not whole, or in which a state was damaged, is removed."""
        self.file.close()
        if self.filling is not None:
            shutil.rmtree(self.filling, ignore_errors=True)
        if self.made_again:
            shutil.rmtree(self.folder, ignore_errors=True)


def _index(entry: Path) -> dict[str, Any] | None:
    """What a cache says of itself; None where there is none or its file is not as long as it says."""
    found = caches.index_of(entry) or {}
    try:
        size = (entry / "states.bin").stat().st_size
    except OSError:
        return None
    good = (
        found.get("format") == FORMAT
        and found.get("bytes") == size
        and isinstance(found.get("entries"), dict)
    )
    return found if good else None


def folder() -> Path:
    """Where the caches lie."""
    return caches.folder("prefix")


def key_of(base: torch.nn.Module, stack: str, cut: int, rows: Iterable[str]) -> str:
    """A digest of all that decides the states: the weights below the cut, the micro-batches'
    tokens, the cut, dtype, device, attention, and the versions of what computes them.

    Of each weight the name, shape, dtype and up to 1,024 values spread over it are taken.
    """
    found = hashlib.sha256()
    first = next(base.parameters())
    config: Any = base.config
    facts = [
        FORMAT, __version__, installed("torch"), installed("transformers"), stack, cut, str(first.dtype),
        first.device.type, getattr(config, "_attn_implementation", ""), type(base).__name__,
    ]  # fmt: skip
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    found.update(json.dumps([*facts, settings], sort_keys=True, default=str).encode())
    depth = len(list(base.get_submodule(stack).children()))
    above = tuple(f"{stack}.{layer}." for layer in range(cut, depth))
    for name, parameter in base.named_parameters():
        if name.startswith(above) or "lora_" in name:
            continue
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // 1024)][:1025].float().cpu()
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(values.numpy().tobytes())
    for row in rows:
        found.update(row.encode())
    return found.hexdigest()[:32]
