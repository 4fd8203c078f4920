"""What a plan costs: memory by named terms, FLOPs a token, seconds, and where the prefix is kept.

Weights, adapter, gradients and optimizer are exact. Activations, logits and FLOPs come from a
simulated step (simulate.py makes the `Profile`), or where a model's code cannot be simulated from
the formulas below; seconds from a probe (a `Timing`), or from a stated rate.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.modelmap import ModelMap, Slot, jsonable
from lorafit.plan import ADAPTER_ITEMSIZE, Plan
from lorafit.roles import Part
from lorafit.units import bytes_text, percent, short

SURE = 0.15  # how far apart, as a share, the fastest tries of a probe may lie
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a micro-batch is shaped like: its rows, tokens a row, the base's dtype; how many of them make
    a step, and the share of the tokens that is supervised."""

    batch: int
    length: int
    dtype: str = "float32"
    checkpointing: bool = False
    accumulate: int = 1
    supervised: float = 1.0

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at the peak of a training step, by what they hold; the terms sum to `peak`.

    `heap` is what the C library has taken from the system between the storages: holes that fit none.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    heap: int
    prefix_cache: int = 0

    @property
    def peak(self) -> int:
        return (
            self.weights
            + self.adapter
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.workspace
            + self.heap
            + self.prefix_cache
        )


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations a token, a multiply and an add counted as two; `prefix` is the part of
    `forward` below the cut, which a replay does not do."""

    forward: int
    backward: int
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Profile:
    """A step of one micro-batch: bytes at its highest moment, and FLOPs a token."""

    activations: int
    logits: int
    workspace: int
    heap: int  # that the C library's holes take besides; 0 on a GPU, and where it cannot be told
    forward: int
    backward: int
    prefix: int
    simulated: bool
    refusal: str = ""  # why the prefix cannot be replayed exactly; empty where it can


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a token of a micro-batch, with all layers and with the prefix replayed; of the optimizer
    a step; the tokens a row, in words what they were taken from, and how far the fastest tries lay apart,
    as a share."""

    token: float
    token_replayed: float
    step: float
    length: int
    source: str
    spread: float = 0.0

    @property
    def sure(self) -> bool:
        """Whether the fastest tries agreed."""
        return self.spread <= SURE


@dataclass(frozen=True, slots=True)
class Work:
    """What a run goes over: tokens and optimizer steps of an epoch, the steps of the whole run, which
    may end within an epoch, and the tokens held out."""

    tokens: int
    epoch_steps: int
    steps: int
    held_out_tokens: int = 0

    @property
    def passes(self) -> float:
        """How often the rows are gone over, a part of a pass counted as that."""
        return self.steps / self.epoch_steps


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the prefix's states are kept, `memory`, `disk` or `off`, and why."""

    where: str
    reason: str
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of a plan at a shape, and what was assumed.

    `seconds_per_epoch` is of a pass that runs every layer, `seconds_per_epoch_replayed` of one that
    replays the prefix (None where there is none to replay), `seconds` of the whole run as `train` would
    do it: `steps` optimizer steps, `epochs` passes over the rows, the last of which may be a part.
    """

    shape: Shape
    memory: Memory
    flops_per_token: Flops
    tokens_per_epoch: int | None
    steps: int | None
    epochs: float | None
    seconds_per_epoch: float | None
    seconds_per_epoch_replayed: float | None
    seconds: float | None
    tokens_per_second: float
    prefix_cache: Choice
    assumptions: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The `estimate` of `plan --json`; the memory's terms sum to its `peak`."""
        memory = {**jsonable(self.memory), "peak": self.memory.peak}
        return {**jsonable(self), "memory": memory}


# Bytes that PyTorch's libraries keep for themselves once a step has run: on CUDA cuBLAS is given 2 blocks of
# 4 MiB and 8 of 16 KiB. On the CPU they are there before a run's memory is counted (`train.load_kernels`).
LIBRARIES = {"cuda": 8_519_680}
# FLOPs a second that are assumed where nothing is timed.
ASSUMED_RATE = {"cpu": 1e11, "cuda": 1e14, "mps": 4e12}


def estimate(
    plan: Plan,
    model_map: ModelMap,
    shape: Shape,
    profile: Profile | None = None,
    timing: Timing | None = None,
    work: Work | None = None,
    *,
    device: str = "cpu",
    replay: bool = True,
    prefix_cache: str = "auto",
    free: int = 0,
    free_on_disk: int = 0,
    notes: Sequence[str] = (),
) -> Estimate:
    """Peak memory of a training step, in bytes, FLOPs a token, and seconds.

    Without a profile the formulas stand in; without a timing the ASSUMED_RATE of the device.
    `replay` says that the prefix may be replayed exactly; then `prefix_cache`, `free` memory and
    `free_on_disk` decide where it is kept.
    """
    item = ITEMSIZE.get(shape.dtype, 4)
    profile = profile or by_formula(plan, model_map, shape)
    adapter = plan.adapter_bytes
    size = 0
    cache = Choice("off", "nothing is frozen below the band" if not replay else "the rows are not known")
    if work and replay:
        size = model_map.hidden_size * item * (work.tokens + work.held_out_tokens)
        cache = choose(prefix_cache, work.passes, size, free, free_on_disk, False)
    rate = ASSUMED_RATE.get(device, 1e11)
    if timing is None:
        flops = profile.forward + profile.backward
        timing = Timing(flops / rate, (flops - profile.prefix) / rate, 0.0, shape.length, "")
    whole = replayed = total = None
    if work:
        steps = work.epoch_steps * timing.step
        whole = work.tokens * timing.token + steps
        replayed = work.tokens * timing.token_replayed + steps if replay else None
        later = replayed if replayed is not None and cache.where != "off" else whole
        total = min(1.0, work.passes) * whole + max(0.0, work.passes - 1) * later
    if timing.source and not timing.sure:
        notes = (
            *notes,
            f"the machine is busy: its timings differ by {percent(timing.spread, 1)}, and the seconds are too many",
        )
    source = (
        f"seconds: {timing.source}, best of several tries that agree to {percent(timing.spread, 1)}"
        if timing.source
        else f"seconds: {short(rate)} FLOP/s assumed"
    )
    return Estimate(
        shape=shape,
        memory=Memory(
            weights=model_map.total_params * item,
            adapter=adapter,
            gradients=adapter,
            optimizer=3 * adapter,  # AdamW's two moments, and the adapter as it last was sound, in float32
            activations=profile.activations,
            logits=profile.logits,
            workspace=profile.workspace + LIBRARIES.get(device, 0),
            heap=profile.heap,
            prefix_cache=size if cache.where == "memory" else 0,
        ),
        flops_per_token=Flops(profile.forward, profile.backward, profile.prefix),
        tokens_per_epoch=work.tokens if work else None,
        steps=work.steps if work else None,
        epochs=work.passes if work else None,
        seconds_per_epoch=whole,
        seconds_per_epoch_replayed=replayed,
        seconds=total,
        tokens_per_second=1 / timing.token if timing.token else 0.0,
        prefix_cache=replace(cache, bytes=size),
        assumptions=(
            f"micro-batch of {shape.batch} rows of {shape.length} tokens, "
            f"{percent(shape.supervised, 1)} supervised, {shape.dtype} base weights on {device}",
            "AdamW with float32 adapters, and a copy of them to fall back to",
            ("memory: a simulated step" if profile.simulated else "memory: formulas")
            + (", its storages asked of the C library that is here" if profile.heap else ""),
            source,
            *notes,
        ),
    )


def by_formula(plan: Plan, model_map: ModelMap, shape: Shape) -> Profile:
    """A profile without a simulation."""
    flops = flops_per_token(plan, model_map, shape, supervised=shape.supervised)
    replayed = flops_per_token(plan, model_map, shape, replayed=True, supervised=shape.supervised)
    item = ITEMSIZE.get(shape.dtype, 4)
    return Profile(
        activations=activation_bytes(plan, model_map, shape),
        logits=logit_bytes(model_map, shape),
        workspace=shape.tokens * widest(model_map) * item * 2,
        heap=0,
        forward=flops.forward,
        backward=flops.backward,
        prefix=flops.forward - replayed.forward,
        simulated=False,
        refusal="the model's code cannot be simulated",
    )


# -- where the prefix is kept ---------------------------------------------------------------

COMFORTABLE = 0.25  # of the memory that is free: what the cache may take of it
ROOM_LEFT = 1_000_000_000  # bytes that stay free on the disk


def choose(asked: str, passes: float, size: int, memory: int, disk: int, stored: bool) -> Choice:
    """Where to keep states of `size` bytes that may be kept exactly.

    `passes` over the rows are planned; `memory` and `disk` are what is free; `stored` says that a
    whole cache of them lies on the disk.
    """
    if asked == "off":
        return Choice("off", "--prefix-cache off")
    if asked in ("memory", "disk"):
        return Choice(asked, f"--prefix-cache {asked}", size)
    if stored:
        return Choice("disk", "filled by an earlier run", size)
    if passes <= 1:
        return Choice("off", "the rows are gone over once only")
    if size <= COMFORTABLE * memory:
        return Choice("memory", f"{bytes_text(size)} of {bytes_text(memory)} that are free", size)
    if size + ROOM_LEFT <= disk:
        return Choice("disk", f"{bytes_text(size)} are much for {bytes_text(memory)} of memory", size)
    return Choice(
        "off", f"{bytes_text(size)} fit neither in {bytes_text(memory)} of memory nor on the disk", size
    )


def free_memory() -> int:
    """Bytes of the host's memory that are free for use."""
    with suppress(OSError, IndexError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 0


def free_disk(place: Path) -> int:
    """Bytes that are free on the disk of a folder that need not be there yet."""
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return 0


# -- formulas -------------------------------------------------------------------------------


def widest(model_map: ModelMap) -> int:
    """The widest output of a block's weight, in features."""
    return max((s.out_features for s in model_map.slots if s.copies == 1), default=0)


def _blocks_kept(plan: Plan, model_map: ModelMap) -> list[tuple[str, int]]:
    """The blocks whose activations backward needs: those at and above the cut of each stack.

    Towers that are adapted are left out: text alone is trained on.
    """
    kept = []
    reached = False  # an adapted encoder's gradient comes through all of the decoder
    for stack in model_map.text_stacks:
        cut = plan.cut.get(stack.path, stack.depth)
        start = 0 if reached and model_map.task == "seq2seq" else cut
        kept += [(stack.path, layer) for layer in range(start, stack.depth)]
        reached = reached or stack.path in plan.cut
    return kept


def activation_bytes(plan: Plan, model_map: ModelMap, shape: Shape) -> int:
    """Bytes that autograd keeps from the forward pass, less the logits.

    A frozen linear keeps nothing (its weight gives the gradient of its input); what stays, per
    token and block (after Korthikanti et al., arXiv:2205.05198, sec. 4, for frozen weights):
    two norms with their float32 input and output, queries, keys, values and the attention's
    output, and three tensors of the inner width. An adapted linear keeps its input once more
    (shared by the adapters that read the same) and its rank-r product, in float32. Under
    checkpointing a block keeps its input only, and one block at a time is whole.
    """
    item = ITEMSIZE.get(shape.dtype, 4)
    hidden = model_map.hidden_size
    adapted = {(s.stack, s.layer, s.path): s for s in plan.slots}
    by_block: dict[tuple[str, int], list[Slot]] = {}
    for slot in model_map.slots:
        by_block.setdefault((slot.stack, slot.layer), []).append(slot)
    sizes = []
    for block in _blocks_kept(plan, model_map):
        kept = hidden * (2 * 4 + 4 * item)  # two norms, two residual sums
        inputs: set[tuple[Part, int]] = set()
        for slot in by_block.get(block, ()):
            if slot.part in (Part.SELF_ATTENTION, Part.CROSS_ATTENTION, Part.LINEAR_ATTENTION):
                kept += slot.out_features * item
            elif slot.part in (Part.FEED_FORWARD, Part.SHARED_EXPERTS):
                kept += int(slot.out_features * item * 1.5) if "down" not in slot.roles else 0
            if (slot.stack, slot.layer, slot.path) in adapted:
                inputs.add((slot.part, slot.in_features))
                kept += plan.lora.r * 4
        kept += sum(width * ADAPTER_ITEMSIZE for _, width in inputs)
        sizes.append(kept)
    if not sizes:
        return 0
    if shape.checkpointing:
        return shape.tokens * (len(sizes) * hidden * item + max(sizes))
    return shape.tokens * sum(sizes)


def logit_bytes(model_map: ModelMap, shape: Shape) -> int:
    """The head's output in the base's dtype, in float32 for the softmax, and its gradient."""
    item = ITEMSIZE.get(shape.dtype, 4)
    return shape.tokens * model_map.vocab_size * (item + 4 + 4)


def flops_per_token(
    plan: Plan, model_map: ModelMap, shape: Shape, *, replayed: bool = False, supervised: float = 1.0
) -> Flops:
    """FLOPs a token: two per weight forward (every block, and the head), two per weight backward for
    the gradient of the input at and above the cut, and the adapters' own two and four; attention
    adds 4 * length * width a block forward and twice that backward (causal halves it).

    `replayed`: blocks below the cut are not run. `supervised`: the share of the tokens that the
    head is run on.
    """
    head = int(2 * model_map.hidden_size * model_map.vocab_size * supervised)
    forward = backward = head
    kept = set(_blocks_kept(plan, model_map))
    for slot in model_map.slots:
        if slot.stack not in {stack.path for stack in model_map.text_stacks}:
            continue
        cost = 2 * slot.in_features * slot.out_features
        if slot.part is Part.EXPERTS and slot.copies > 1:
            cost *= 2  # routed: a few of the copies see a token; two is the common choice
        if slot.part is Part.SELF_ATTENTION and "q" in slot.roles:
            cost += 2 * shape.length * slot.out_features
        if (slot.stack, slot.layer) in kept:
            forward += cost
            backward += cost
        elif not replayed:
            forward += cost
    added = sum(plan.lora.r * (s.in_features + s.out_features) for s in plan.slots)
    return Flops(forward + 2 * added, backward + 4 * added)
