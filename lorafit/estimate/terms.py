"""The values of an estimate: the shape of a step, its memory by named terms, FLOPs, seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.forward import Choice
from lorafit.jsonio import jsonable

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
