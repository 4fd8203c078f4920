"""`--shard`: whether the base of a run is divided among its processes, and which runs cannot be."""

from __future__ import annotations

from lorafit.adapter import Plan, needs_whole_base
from lorafit.errors import RequestError
from lorafit.forward import not_streamed
from lorafit.model import ModelMap, held_as, shard_refusal
from lorafit.settings import RunConfig

WHOLE = "leave out --shard: then each process holds the whole base"


def settle_shard(settings: RunConfig, processes: int, hint: str) -> RunConfig:
    """The settings as they hold for that many processes: a run file's `shard` is for several, and means nothing to
    one. Raises RequestError, with this hint, where --shard was given to one."""
    if processes > 1 or not settings.shard:
        return settings
    if settings.origin.get("shard") == "flag":
        raise RequestError("--shard divides the base among processes, and there is one", hint)
    return settings.settled("shard", True, False, "there is one process")


def check_shard(settings: RunConfig, plan: Plan, found: ModelMap, place: str) -> None:
    """Raises RequestError where the base of that run cannot be sharded."""
    if not settings.shard:
        return
    if settings.prefix_residency == "stream":
        raise not_streamed("it runs in one process, and --shard in several")
    if (held := held_as(found, settings.quantize)) is not None:
        hint = WHOLE if held.stored else f"leave out --quantize; or {WHOLE}"
        raise RequestError(f"a base in {held.kind} is not sharded: its scales do not go by rows", hint)
    if needs := needs_whole_base(plan.lora):
        raise RequestError(
            f"{needs[0]} whole weights of the base, and --shard divides them",
            f"leave out {needs[1]}; or {WHOLE}",
        )
    if reason := shard_refusal(place):
        raise RequestError(f"the base cannot be sharded: {reason}", WHOLE)
