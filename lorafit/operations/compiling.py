"""`--compile`: which runs can have their adapted blocks compiled."""

from __future__ import annotations

from lorafit.errors import RequestError
from lorafit.model import ModelMap, held_as
from lorafit.settings import RunConfig

WITHOUT = "leave out --compile"


def check_compile(settings: RunConfig, found: ModelMap) -> None:
    """Raises RequestError where the blocks of that run cannot be compiled."""
    if not settings.compile:
        return
    if settings.shard:
        raise RequestError("--compile: a sharded block is gathered while it runs, and not compiled", WITHOUT)
    if (held := held_as(found, settings.quantize)) is not None:
        raise RequestError(f"--compile: layers in {held.kind} are not compiled", WITHOUT)
