"""What a plan costs: memory by named terms, FLOPs a token, seconds, and where the prefix is kept.

Weights, adapter, gradients and optimizer are exact. Activations, logits and FLOPs come from a
simulated step (simulate.py makes the `Profile`), or where a model's code cannot be simulated from
the formulas below; seconds from a probe (a `Timing`), or from a stated rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorafit.adapter import Plan
from lorafit.estimate.formulas import by_formula
from lorafit.estimate.terms import ITEMSIZE, Estimate, Flops, Memory, Profile, Shape, Timing, Work
from lorafit.forward import Choice, choose
from lorafit.model import ModelMap
from lorafit.settings import STATE_BYTES
from lorafit.units import percent, short

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
    optimizer: str = "adamw",
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
    whole, replayed, total = _seconds(timing, work, replay, cache.where != "off")
    return Estimate(
        shape=shape,
        memory=Memory(
            weights=model_map.total_params * item,
            adapter=adapter,
            gradients=adapter,
            # its state, and the adapter as it last was sound, in float32
            optimizer=STATE_BYTES[optimizer](plan.trainable_params) + adapter,
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
        assumptions=(*_assumptions(shape, profile, timing, device, rate, optimizer), *notes),
    )


def _seconds(
    timing: Timing, work: Work | None, replay: bool, cached: bool
) -> tuple[float | None, float | None, float | None]:
    """Seconds of an epoch, of one with the prefix replayed, and of the whole run; None where unknown."""
    if work is None:
        return None, None, None
    steps = work.epoch_steps * timing.step
    whole = work.tokens * timing.token + steps
    replayed = work.tokens * timing.token_replayed + steps if replay else None
    later = replayed if replayed is not None and cached else whole
    return whole, replayed, min(1.0, work.passes) * whole + max(0.0, work.passes - 1) * later


def _assumptions(
    shape: Shape, profile: Profile, timing: Timing, device: str, rate: float, optimizer: str
) -> tuple[str, ...]:
    """What an estimate rests on, in words."""
    memory = "memory: a simulated step" if profile.simulated else "memory: formulas"
    if profile.heap:
        memory += ", replayed through this machine's malloc"
    seconds = f"seconds: {short(rate)} FLOP/s assumed"
    if timing.source:
        agree = percent(timing.spread, 1)
        seconds = f"seconds: {timing.source}, the fastest of several tries that agree to {agree}"
    if timing.source and not timing.sure:
        seconds = f"the machine is busy: its timings differ by {agree}, so the seconds may be too many"
    return (
        f"micro-batch of {shape.batch} rows of {shape.length} tokens, "
        f"{percent(shape.supervised, 1)} supervised, {shape.dtype} base weights on {device}",
        f"{'AdamW' if optimizer == 'adamw' else optimizer} with float32 adapters, and a copy of the last good ones",
        memory,
        seconds,
    )
