"""The values of an estimate: the shape of a step, its memory by named terms, FLOPs, seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.forward import Choice
from lorafit.jsonio import jsonable
from lorafit.units import percent

SURE = 0.15  # largest relative spread of a probe's fastest tries

TOO_MUCH = 2  # times the free memory: above it, a run starts only with --force

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True, slots=True)
class Shape:
    """A micro-batch: its rows, tokens per row, the base's dtype and how it is quantised; how many of them make
    an optimizer step, the share (0 to 1) of the tokens in the loss, and the attention implementation."""

    batch: int
    length: int
    dtype: str = "float32"
    checkpointing: bool = False
    accumulate: int = 1
    supervised: float = 1.0
    attention: str = "auto"
    quantize: str = "none"
    residency: str = "auto"  # of the layers below the band: held, or streamed
    sharded: bool = False  # the base is divided among the processes

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at the peak of a training step, by what they hold; the terms sum to `peak`.

    `heap` is the allocator's overhead: holes between the tensors that malloc cannot give back. `gathered` is what
    of a sharded base is whole while it runs. `filling` is what running streamed layers over the rows, before the
    first step, takes above the peak of a step.
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
    filling: int = 0
    gathered: int = 0

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
            + self.filling
            + self.gathered
        )


DISK_RATE = 1e9  # bytes a second at which weights are assumed to be read


@dataclass(frozen=True, slots=True)
class Residency:
    """Whether the layers below the band are held (`resident`), or read as they run (`stream`); why; and of
    streamed ones the bytes of weights that are read, by all reads together, and how many times each layer is."""

    where: str
    reason: str
    bytes_read: int = 0
    reads: int = 0

    @property
    def seconds(self) -> float:
        """What the reading takes."""
        return self.bytes_read / DISK_RATE


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations per token, a multiply-add counted as two; `prefix` is the part of
    `forward` below the cut, which the frozen-layer cache saves."""

    forward: int
    backward: int
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Profile:
    """A step of one micro-batch: bytes at its peak, and FLOPs per token."""

    activations: int
    logits: int
    workspace: int
    heap: int  # the allocator's overhead; 0 on a GPU, and where it cannot be measured
    forward: int
    backward: int
    prefix: int
    simulated: bool
    refusal: str = ""  # why the frozen layers cannot be cached exactly; empty where they can


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per token of a micro-batch, with all layers (`token`) and with the frozen layers cached
    (`token_replayed`); seconds of the optimizer per step; tokens per row; the source in words; the
    relative spread of the fastest tries; and the share of `token` that dequantising takes."""

    token: float
    token_replayed: float
    step: float
    length: int
    source: str
    spread: float = 0.0
    dequantising: float = 0.0

    @property
    def sure(self) -> bool:
        """Whether the fastest tries agreed."""
        return self.spread <= SURE

    @property
    def busy(self) -> str:
        """That other work on the machine disturbed the timing; empty where none did."""
        if not self.source or self.sure:
            return ""
        apart = percent(self.spread, 1)
        return f"the machine is busy: timings differ by {apart}, so the predicted time is too high"


@dataclass(frozen=True, slots=True)
class Work:
    """The amount of data: tokens and optimizer steps of an epoch, the steps of the whole run, which
    may end within an epoch, and the held-out tokens."""

    tokens: int
    epoch_steps: int
    steps: int
    held_out_tokens: int = 0

    @property
    def passes(self) -> float:
        """Epochs, with fractions."""
        return self.steps / self.epoch_steps


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of a plan at a shape, and the assumptions.

    `seconds_per_epoch` is for a pass that runs every layer, `seconds_per_epoch_replayed` for one that
    reads the frozen layers' output from the cache (None where it cannot be cached), `seconds` for the
    whole run: `steps` optimizer steps, `epochs` passes over the rows, the last of which may be partial.
    `shape` and `memory` are those of one of the `processes`, the rest is of all together; `busy` is `Timing.busy`.
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
    prefix_residency: Residency
    assumptions: tuple[str, ...]
    processes: int = 1
    busy: str = ""

    @property
    def residency(self) -> tuple[str, str]:
        """(where the layers below the band are, why): a value of --prefix-residency that is settled."""
        return self.prefix_residency.where, self.prefix_residency.reason

    def as_json(self) -> dict[str, Any]:
        """The `estimate` of `plan --json`; the memory's terms sum to its `peak`."""
        memory = {**jsonable(self.memory), "peak": self.memory.peak}
        return {**jsonable(self), "memory": memory}
