"""What a run will cost, before it starts: memory, FLOPs, seconds, what fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.estimate.device import parse_room as parse_room
    from lorafit.estimate.forecast import Fit as Fit
    from lorafit.estimate.forecast import Forecast as Forecast
    from lorafit.estimate.forecast import predicted as predicted
    from lorafit.estimate.forecast import prepare as prepare
    from lorafit.estimate.formulas import flops_per_token as flops_per_token
    from lorafit.estimate.glibc_heap import give_back_freed as give_back_freed
    from lorafit.estimate.glibc_heap import keep_freed as keep_freed
    from lorafit.estimate.glibc_heap import start_over as start_over
    from lorafit.estimate.memory_trace import MemoryTrace as MemoryTrace
    from lorafit.estimate.terms import ITEMSIZE as ITEMSIZE
    from lorafit.estimate.terms import TOO_MUCH as TOO_MUCH
    from lorafit.estimate.terms import Estimate as Estimate
    from lorafit.estimate.terms import Shape as Shape
    from lorafit.estimate.terms import Timing as Timing

__getattr__ = door(
    __name__,
    {
        "device": "parse_room",
        "forecast": "Fit Forecast predicted prepare",
        "formulas": "flops_per_token",
        "glibc_heap": "give_back_freed keep_freed start_over",
        "memory_trace": "MemoryTrace",
        "terms": "Estimate ITEMSIZE Shape TOO_MUCH Timing",
    },
)
