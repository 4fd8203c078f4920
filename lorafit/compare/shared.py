"""What the candidates share: one base, in which one adapter stands after another, and the states below each cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorafit.adapter import Plan, changes_its_base
from lorafit.data import Rows
from lorafit.estimate import keep_freed
from lorafit.events import Predicted
from lorafit.forward import Forward, Prefix, StateStore, base_of
from lorafit.settings import RunConfig
from lorafit.train import Base, Job, RunFolder, SharedStates, memory_before, put_on

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Lasting:
    """A store of states that outlasts the runs which read it."""

    store: StateStore

    @property
    def proved(self) -> bool:
        return self.store.proved

    def has(self, key: str) -> bool:
        return self.store.has(key)

    def get(self, key: str) -> torch.Tensor | None:
        return self.store.get(key)

    def put(self, key: str, state: torch.Tensor) -> None:
        self.store.put(key, state)

    def filled(self) -> None:
        """Nothing: another run may add to it."""

    def close(self) -> None:
        """Nothing: other runs read it."""


class SharedBase:
    """One base for all candidates. It is checked to be the same, to the bit, after each; where a candidate must
    change it (trained biases, modules trained whole, PiSSA), the next one gets a base that is loaded again."""

    def __init__(self, load: Callable[[], Base]) -> None:
        self.load = load
        self.loaded = 0  # times
        self.states: dict[tuple[str, int], SharedStates] = {}
        self.forward: Forward | None = None  # of a base with streamed layers: how it is called
        self._base: Base | None = None
        self._sum = ""

    @property
    def base(self) -> Base:
        """The base, loaded where there is none."""
        if self._base is None:
            self._base = self.load()
            self._sum = checksum(self._base.model)
            self.loaded += 1
        return self._base

    def close(self) -> None:
        """Let go of the states."""
        for shared in self.states.values():
            assert isinstance(shared.store, Lasting)
            shared.store.store.close()
        self.states.clear()

    def changed(self) -> None:
        """The base was changed on purpose: what it is now is what it is to be after each candidate."""
        self._sum = checksum(self.base.model)

    def drop(self) -> None:
        """Let go of the base: the next candidate gets one that is loaded again."""
        self._base = None

    def replaying(self, model: torch.nn.Module, stack: str, cut: int) -> Prefix | None:
        """The prefix that hands on the shared states of that cut, in the base or with an adapter on it; None where
        there are none."""
        states, streamed = self.states.get((stack, cut)), self.base.streamed
        if states is None:
            return None
        held = streamed.held if streamed is not None else None
        prefix = Prefix(base_of(model).get_submodule(stack), cut, held)
        prefix.store, prefix.forms = states.store, states.forms
        return prefix

    @contextmanager
    def carrying(
        self,
        config: RunConfig,
        plan: Plan,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        folder: RunFolder,
        stop: Callable[[], int],
        expected: Predicted,
    ) -> Iterator[Job]:
        """A candidate's job on the base, and the base as it was afterwards."""
        base = self.base
        keep_freed()  # what the last candidate left is given back
        memory_before(base.device)
        try:
            job = put_on(base, config, plan, rows, tokenizer, folder, stop, expected)
        except BaseException:
            self._base = None  # it may be left half adapted
            raise
        job.states = self.states
        try:
            yield job
        finally:
            self.take_out(job.model, plan)

    def take_out(self, adapted: PeftModel, plan: Plan) -> None:
        """Remove an adapter from the base. If the base has changed, it is reloaded for the next candidate."""
        model: Any = adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.requires_grad_(False).eval()
        lora = plan.lora
        changed = changes_its_base(
            {
                "init_lora_weights": lora.init_lora_weights,
                "bias": lora.bias,
                "modules_to_save": lora.modules_to_save,
            }
        )
        if changed or checksum(model) != self._sum:
            self._base = None


def checksum(model: torch.nn.Module) -> str:
    """A checksum of all weights and buffers that are held, by name: any value that changes, changes it. It sums the
    bits as whole numbers on the device where they lie, each block of 8 kB times its number."""
    found = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:  # of a layer that is streamed
            continue
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
        whole = len(bits) // 8192 * 8192
        blocks = bits[:whole].view(torch.int64).view(-1, 1024).sum(1)
        numbers = torch.arange(1, len(blocks) + 1, device=bits.device)
        rest = hashlib.sha256(bytes(bits[whole:].cpu().numpy().data)).hexdigest()
        found.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {int((blocks * numbers).sum())} {rest}\n".encode()
        )
    return found.hexdigest()
