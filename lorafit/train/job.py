"""A run, set up: the model loaded, the planned adapter in it, the batches composed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from random import Random
from typing import TYPE_CHECKING

import torch

from lorafit.adapter import Plan, check_downloaded, inject_plan, locate, put_in
from lorafit.data import Batch, MicroBatch, Row, Rows, batches, collate_rows, in_epoch, mask_row, run_along
from lorafit.distributed import ALONE, World
from lorafit.estimate import give_back_freed, keep_freed
from lorafit.evaluate import mask_id
from lorafit.events import Predicted
from lorafit.forward import (
    Forward,
    StateStore,
    base_of,
    blocks_below,
    checkpoint_activations,
    not_streamed,
    refused_by_map,
)
from lorafit.model import (
    ModelMap,
    ModelSource,
    Sharded,
    Streamed,
    download_weights,
    fingerprint,
    held_as,
    load_model,
    load_sharded,
    load_streamed,
    pick_device,
    pick_dtype,
)
from lorafit.settings import RunConfig
from lorafit.system import environment
from lorafit.train.checkpoint import trainable
from lorafit.train.measure import load_kernels, matrix_rate, memory_before
from lorafit.train.run_folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class SharedStates:
    """The states below a cut that several jobs share: their store, where it is (`memory` or `disk`), and the form of
    each lower block's output. Of streamed layers `forward` is how the model is called: it was tried while a whole
    pass could be."""

    store: StateStore
    where: str
    forms: dict[int, int] = field(default_factory=dict)
    forward: Forward | None = None


def composed(rows: Rows, config: RunConfig, task: str) -> list[tuple[MicroBatch, ...]]:
    """The batches of a run, each in the parts it is run in: the same for every seed with one seed of the data."""
    lengths = rows.train.lengths
    if task == "seq2seq":
        lengths = lengths + rows.train.target_lengths
    return batches(lengths.tolist(), config.batch_size or 1, config.seed_of_data)


def micro_batches_of(
    rows: Rows,
    config: RunConfig,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    numbers: Iterable[int],
    vocab_size: int,
) -> Iterator[Batch]:
    """Each micro-batch of these batches of a run once, in one process; of a masked model with the masks of the first
    epoch."""
    made, pad = composed(rows, config, task), tokenizer.pad_token_id or 0
    for number in numbers:
        for part, chosen in enumerate(made[number]):
            if task == "masked":
                yield collate_rows(masked_rows(rows, config, tokenizer, vocab_size, chosen, 1), pad, task)
            else:
                yield collate_rows([rows.train[n] for n in chosen], pad, task, _key(number, part))


def masked_rows(
    rows: Rows,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    numbers: Iterable[int],
    epoch: int,
) -> list[Row]:
    """Rows of a masked model with the masks of an epoch: each by a seed of its own, whichever process has it."""
    pad, mask = tokenizer.pad_token_id or 0, mask_id(tokenizer)
    seeds = {n: Random(f"{config.seed}/{epoch}/{n}").getrandbits(32) for n in numbers}  # torch uses 32 bits
    return [mask_row(rows.train[n], pad, mask, vocab_size, seed) for n, seed in seeds.items()]


def _key(number: int, part: int) -> str:
    """The key of a micro-batch of training."""
    return f"train {number}.{part}"


@dataclass(slots=True)
class Job:
    """A run, set up: everything the loop needs, nothing it must look for."""

    model: PeftModel
    task: str
    config: RunConfig
    plan: Plan
    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    found: ModelMap
    device: torch.device
    folder: RunFolder
    stop: Callable[[], int] = lambda: 0  # the signal that asks for an end, or 0
    predicted: Predicted | None = None
    fingerprint: str = ""  # of the base's weights
    memory_before: int = 0  # bytes that the process held before the model was loaded
    world: World = ALONE
    streamed: Streamed | None = None  # the base, where the layers below the cut are read as they run
    sharded: Sharded | None = None  # the base, where each process holds its rows
    environment: dict[str, str] = field(
        default_factory=dict
    )  # versions, machine, command, date, git state of data
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    batches: list[tuple[MicroBatch, ...]] = field(default_factory=list)
    states: Mapping[tuple[str, int], SharedStates] = field(default_factory=dict)  # by stack and cut

    def __post_init__(self) -> None:
        self.environment = {
            **environment(),
            "device": _device_name(self.device),
            "attention": str(getattr(base_of(self.model).config, "_attn_implementation", "")),
            **self.config.data_state(),
        }
        self.parameters = list(trainable(self.model).values())
        self.batches = composed(self.rows, self.config, self.task)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size or 1

    @property
    def generates(self) -> bool:
        """Whether this process has the model say something: the first, where it holds all of it."""
        return self.world.first and self.streamed is None and self.sharded is None

    @property
    def epochs(self) -> float:
        return self.config.epochs or 1

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.batches) / self.config.accumulate)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.steps(self.steps_per_epoch)

    def optimizer_steps(self, done: int) -> Iterator[tuple[int, int, list[Batch]]]:
        """(number, epoch, micro-batches) of each optimizer step after the first `done`; numbers begin at 1."""
        for epoch in range(done // self.steps_per_epoch, math.ceil(self.epochs)):
            first = epoch * self.steps_per_epoch
            for at, group in enumerate(self.micro_batches(epoch + 1), first + 1):
                if at > self.steps:
                    return
                if at > done:
                    yield at, epoch + 1, group

    def ends_epoch(self, number: int) -> bool:
        """Whether an epoch ends with that optimizer step, or the run."""
        return number % self.steps_per_epoch == 0 or number == self.steps

    def micro_batches(self, epoch: int) -> Iterator[list[Batch]]:
        """The optimizer steps of one epoch, each as its micro-batches."""
        order = in_epoch(len(self.batches), self.config.seed, epoch)
        for at in range(0, len(order), self.config.accumulate):
            group = []
            for number in order[at : at + self.config.accumulate]:
                for part in range(len(self.batches[number])):
                    group.append(self.micro_batch(number, part, epoch))
            yield group

    def anybody(self, flag: bool) -> bool:
        """Whether any process says so, where all run the same passes at once: a sharded base needs them all.
        Elsewhere each goes its own way."""
        return flag if self.sharded is None else self.world.agreed(flag)

    def share(self, number: int, part: int) -> MicroBatch:
        """The rows of one part of one batch that this process runs: there may be none. Where the base is
        sharded a process without a row of its own runs the first of the others' along."""
        rows = self.batches[number][part]
        return tuple(self.world.share(rows)) or (() if self.sharded is None else rows[:1])

    def micro_batch(self, number: int, part: int, epoch: int = 1) -> Batch:
        """This process's share of one part of one batch: the same rows whenever it is asked for, those of a
        masked model with the masks of that epoch. A row that is run along counts nothing."""
        found = self._micro_batch(number, part, epoch)
        own = self.sharded is None or self.world.share(self.batches[number][part])
        return found if own else run_along(found)

    def _micro_batch(self, number: int, part: int, epoch: int) -> Batch:
        numbers = self.share(number, part)
        pad = self.tokenizer.pad_token_id or 0
        if self.task == "masked":
            vocab = self.found.vocab_size
            rows = masked_rows(self.rows, self.config, self.tokenizer, vocab, numbers, epoch)
            return collate_rows(rows, pad, self.task)
        return collate_rows([self.rows.train[n] for n in numbers], pad, self.task, _key(number, part))

    def ahead(self, done: int) -> list[tuple[int, int]]:
        """(batch, part) of each micro-batch that comes after the first `done` steps and in which this process
        has rows, once."""
        numbers: set[int] = set()
        for epoch in range(done // self.steps_per_epoch, math.ceil(self.epochs)):
            first = epoch * self.steps_per_epoch
            start, end = max(0, done - first), self.steps - first
            if end <= 0 or len(numbers) == len(self.batches):
                break
            order = in_epoch(len(self.batches), self.config.seed, epoch + 1)
            numbers.update(order[start * self.config.accumulate : end * self.config.accumulate])
        parts = ((n, part) for n in sorted(numbers) for part in range(len(self.batches[n])))
        return [(n, part) for n, part in parts if self.share(n, part)]

    def first_batch(self) -> Batch | None:
        """The first micro-batch in which this process has a row; None where it never has one."""
        parts = ((n, part) for n, batch in enumerate(self.batches) for part in range(len(batch)))
        found = (self.micro_batch(n, part) for n, part in parts if self.share(n, part))
        return next(found, None)

    def matrix_rate(self, seconds: float = 0.15) -> float:
        """FLOPs a second of the devices' matrix products at the model's own shapes, measured now on this one."""
        dtype = next(self.model.parameters()).dtype
        hidden, inner = self.found.hidden_size, self.found.intermediate_size
        return self.world.size * matrix_rate(hidden, inner, dtype, self.device, seconds)

    @property
    def keys(self) -> list[str]:
        """The keys of all micro-batches of training in which this process has rows."""
        return [
            _key(n, part)
            for n, batch in enumerate(self.batches)
            for part in range(len(batch))
            if self.share(n, part)
        ]


def _device_name(device: torch.device) -> str:
    """`cpu`, or a GPU by its name."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return str(device)


@dataclass(frozen=True, slots=True)
class Base:
    """A model, loaded, for one job after another; `streamed` where the layers below a cut are read as they run,
    `sharded` where it is divided among processes. `before` is what the process held before, in bytes."""

    model: PreTrainedModel
    found: ModelMap
    device: torch.device
    fingerprint: str
    before: int
    streamed: Streamed | None = None
    sharded: Sharded | None = None


def load_base(
    source: ModelSource, found: ModelMap, config: RunConfig, plan: Plan | None = None, world: World = ALONE
) -> Base:
    """Load the model of a run; `plan` says below which cut its layers are streamed, where they are to be.

    Raises RequestError and RunError as `load_model` does, and where streaming would not be exact.
    """
    device, divides = pick_device(config.device), config.shard and not world.alone
    if device.type == "cuda" and not world.alone:
        device = torch.device("cuda", world.local_rank)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        (give_back_freed if divides else keep_freed)()
    dtype = pick_dtype(config.dtype, device)
    held = held_as(found, config.quantize)
    if held is not None:
        import bitsandbytes  # noqa: F401  # its code is there before memory is counted
    if divides:
        import_module("torch.distributed.fsdp")  # likewise
    streams = config.prefix_residency == "stream" and plan is not None and not divides
    if streams and plan is not None:
        if reason := refused_by_map(found, plan.cut):
            raise not_streamed(reason)
        if held is not None:
            raise not_streamed(f"the base is in {held.kind}")
    if divides or streams:
        download_weights(source)  # likewise: memory that downloading takes is not the run's
    load_kernels(device, dtype)
    before = memory_before(device)
    streamed = sharded = None
    if divides:
        stacks = [stack.path for stack in found.text_stacks]
        sharded = load_sharded(source, stacks, dtype, device, world, config.attention)
        model = sharded.model
    elif streams and plan is not None:
        ((stack, cut),) = plan.cut.items()
        streamed = load_streamed(source, dtype, device, stack, cut, config.attention)
        model = streamed.model
    else:
        model = load_model(source, dtype, device, config.quantize, config.attention)
    if held is not None or (device.type == "cpu" and streamed is None and sharded is None):
        # the peak is counted from here: above the weights, loading held pages of mapped files, which the system takes
        # back where it needs them
        memory_before(device)
    return Base(model, found, device, fingerprint(source.place), before, streamed, sharded)


def put_on(
    base: Base,
    config: RunConfig,
    plan: Plan,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    stop: Callable[[], int] = lambda: 0,
    predicted: Predicted | None = None,
    world: World = ALONE,
) -> Job:
    """Put the planned adapter into a base, checked to be what was planned; what it starts with follows from the
    seed alone.

    `predicted` is the forecast of the run; it is reported beside what is measured.
    """
    torch.manual_seed(config.seed)  # not before the model is loaded: loading some draws
    peft_model = inject_plan(base.model, plan, base.found.task)
    if config.from_adapter:
        put_in(peft_model, locate(config.from_adapter))
    if config.gradient_checkpointing:
        checkpoint_activations(peft_model, blocks_below(base.model, plan))
    return Job(
        peft_model,
        base.found.task,
        config,
        plan,
        rows,
        tokenizer,
        base.found,
        base.device,
        folder,
        stop,
        predicted,
        base.fingerprint,
        base.before,
        world,
        base.streamed,
        base.sharded,
    )


def assemble(
    source: ModelSource,
    found: ModelMap,
    config: RunConfig,
    plan: Plan,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    stop: Callable[[], int] = lambda: 0,
    predicted: Predicted | None = None,
    world: World = ALONE,
) -> Job:
    """Load the model and put the planned adapter in. Raises RequestError, too, where an adapter to go on from turns out
    to be of another base once that is downloaded."""
    base = load_base(source, found, config, plan, world)
    if config.from_adapter:
        check_downloaded([locate(config.from_adapter)], source)
    return put_on(base, config, plan, rows, tokenizer, folder, stop, predicted, world)
