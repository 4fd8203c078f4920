"""Where the hidden states that enter the cut are kept: in memory, on disk, or nowhere; and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.errors import RequestError
from lorafit.units import bytes_text

if TYPE_CHECKING:
    from lorafit.model import ModelMap


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the prefix's states are kept, `memory`, `disk` or `off`, and why."""

    where: str
    reason: str
    bytes: int = 0


COMFORTABLE = 0.25  # of the memory that is free: what the cache may take of it


FULL = 0.9  # of the memory that is free: what may be taken of it before layers are streamed


ROOM_LEFT = 1_000_000_000  # bytes that stay free on the disk


def refused_by_map(found: ModelMap, cut: Mapping[str, int], training: bool = True) -> str:
    """Why layers below that cut (the lowest adapted layer of each stack) cannot be replayed exactly, as far as
    the map of the model tells; empty when it tells nothing against it."""
    if training and found.task == "masked":
        return "a masked model hides other tokens in each epoch"
    if len(found.text_stacks) > 1:
        return f"`{found.model}` has several stacks"
    if len(cut) != 1:
        return "the adapted layers are not all in one stack"
    ((path, lowest),) = cut.items()
    if path not in {stack.path for stack in found.text_stacks} or found.stack(path).shared:
        return "the adapted layers are shared, or not of the text"
    return "" if lowest else "the band begins at layer 0: nothing is frozen below it"


def not_streamed(reason: str) -> RequestError:
    """The error where the frozen layers were to be streamed and cannot be."""
    return RequestError(f"--prefix-residency stream: {reason}", "--prefix-residency resident")


def fits_whole(size: int, free: int) -> bool:
    """Whether a run or a model that takes `size` bytes is held whole where `free` bytes are free."""
    return size <= FULL * free


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
        return Choice("off", "there is only one epoch")
    if size <= COMFORTABLE * memory:
        return Choice("memory", f"fits in {bytes_text(memory)} of free memory", size)
    if size + ROOM_LEFT <= disk:
        return Choice("disk", f"too large for {bytes_text(memory)} of free memory", size)
    return Choice(
        "off", f"{bytes_text(size)} fits neither in {bytes_text(memory)} of free memory nor on the disk", size
    )
