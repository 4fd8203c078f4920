"""What a plan costs: memory by named terms, FLOPs per token, seconds, and where the frozen-layer cache is kept.

Weights, adapter, gradients and optimizer are exact. Activations, logits and FLOPs come from a
simulated step (simulate.py makes the `Profile`), or from formulas.py where a model's code cannot be
simulated; seconds from a probe (a `Timing`), or from an assumed rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lorafit.adapter import Plan
from lorafit.estimate.formulas import by_formula
from lorafit.estimate.sharding import Divided, divided, on_each
from lorafit.estimate.streaming import not_streamable, streamed
from lorafit.estimate.terms import (
    DISK_RATE,
    ITEMSIZE,
    Estimate,
    Flops,
    Memory,
    Profile,
    Residency,
    Shape,
    Timing,
    Work,
)
from lorafit.forward import Choice, choose, fits_whole, not_streamed
from lorafit.model import ModelMap, held_as, weight_bytes
from lorafit.settings import STATE_BYTES
from lorafit.units import bytes_text, percent, scaled

# Bytes a second at which processes are assumed to exchange gradients: two thirds of PCIe 4.0 with 16 lanes; on
# a CPU what gloo reached between two processes of one machine (12.8 MB in 42 ms).
LINK_RATE = {"cuda": 2e10, "cpu": 3e8}

# FLOP/s that are assumed where nothing is timed.
ASSUMED_RATE = {"cpu": 1e11, "cuda": 1e14, "mps": 4e12}


NOT_EXACT = "no frozen layers below the band that can be cached exactly"


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
    processes: int = 1,
    free: int = 0,
    free_on_disk: int = 0,
    room: int = 0,
    unreadable: str = "",
    notes: Sequence[str] = (),
) -> Estimate:
    """Peak memory of a training step in bytes, FLOPs per token, and seconds.

    Without a profile the formulas are used, without a timing the device's ASSUMED_RATE. `replay` says that
    the frozen layers' output can be reused exactly; then `prefix_cache`, `free` memory (bytes) and
    `free_on_disk` (bytes) decide where it is kept; `room` (bytes) is what is free on the device, 0 where that does
    not matter. Of several `processes`, `shape` and `free` are those of one; they share the work, and a ring sends
    2 (W - 1) / W of the gradients' bytes a step (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009).
    `unreadable` is why the checkpoint's layers cannot be read one by one. Raises RequestError where layers that were to
    be streamed cannot be.
    """
    profile = profile or by_formula(plan, model_map, shape)

    def states(passes: float) -> Choice:
        """Where the frozen layers' output is kept, for a run of `passes` epochs."""
        if not (work and replay):
            return Choice("off", "the number of rows is unknown" if replay else NOT_EXACT)
        item = ITEMSIZE.get(shape.dtype, 4)
        size = model_map.hidden_size * item * (work.tokens + work.held_out_tokens) // processes
        return replace(choose(prefix_cache, passes, size, free, free_on_disk, False), bytes=size)

    cache = states(work.passes if work else 0.0)
    timing = timing or _assumed(profile, shape, ASSUMED_RATE.get(device, 1e11))
    sent, link = 2 * (processes - 1) / processes * plan.adapter_bytes, LINK_RATE.get(device, 3e8)
    timing = replace(timing, step=timing.step + sent / link)
    memory = _memory(plan, model_map, shape, profile, optimizer, cache, device)
    base = divided(model_map, plan, shape, profile, processes) if shape.sharded else None
    if base is not None:
        memory, timing = on_each(base, memory, timing, shape, work, processes, link)
    residency = Residency("resident", "")
    reason = not_streamable(model_map, plan, shape, processes, profile.refusal or unreadable)
    if shape.residency != "resident" and not reason:
        # streamed layers run once, however short the run
        once = states(max(2.0, work.passes if work else 0.0))
        whole_peak, less = memory.peak, _memory(plan, model_map, shape, profile, optimizer, once, device)
        less, streaming = streamed(less, plan, model_map, shape, work, once, free)
        why = f"holding all layers takes {bytes_text(whole_peak)} of {bytes_text(room)} free"
        if shape.residency == "stream":
            memory, residency, cache = less, replace(streaming, reason="--prefix-residency stream"), once
        elif room and not fits_whole(whole_peak, room) and less.peak < whole_peak:
            memory, residency, cache = less, replace(streaming, reason=why), once
    elif shape.residency == "stream":
        raise not_streamed(reason)
    whole, replayed, total = _seconds(timing, work, processes, replay, cache.where != "off", residency)
    return Estimate(
        shape=shape,
        memory=memory,
        flops_per_token=Flops(profile.forward, profile.backward, profile.prefix),
        tokens_per_epoch=work.tokens if work else None,
        steps=work.steps if work else None,
        epochs=work.passes if work else None,
        seconds_per_epoch=whole,
        seconds_per_epoch_replayed=replayed,
        seconds=total,
        tokens_per_second=processes / timing.token if timing.token else 0.0,
        prefix_cache=cache,
        prefix_residency=residency,
        assumptions=(
            *_assumptions(shape, profile, timing, device, optimizer),
            *_dequantising(model_map, shape, timing),
            *(_shared(processes, sent, link, base, cache) if processes > 1 else ()),
            *_streaming(residency),
            *notes,
        ),
        processes=processes,
        busy=timing.busy,
    )


def _assumed(profile: Profile, shape: Shape, rate: float) -> Timing:
    """The timing at `rate` FLOPs a second."""
    flops = profile.forward + profile.backward
    return Timing(flops / rate, (flops - profile.prefix) / rate, 0.0, shape.length, "")


def _memory(
    plan: Plan,
    model_map: ModelMap,
    shape: Shape,
    profile: Profile,
    optimizer: str,
    cache: Choice,
    device: str,
) -> Memory:
    """The memory of a step that holds all layers."""
    adapter = plan.adapter_bytes
    return Memory(
        weights=weight_bytes(model_map, ITEMSIZE.get(shape.dtype, 4), held_as(model_map, shape.quantize)),
        adapter=adapter,
        gradients=adapter,
        # its state, and the adapter as it last was sound, in float32
        optimizer=STATE_BYTES[optimizer](plan.trainable_params) + adapter,
        activations=profile.activations,
        logits=profile.logits,
        workspace=profile.workspace,
        heap=profile.heap,
        # a GPU's lies in the host's memory
        prefix_cache=cache.bytes if cache.where == "memory" and device != "cuda" else 0,
    )


def _dequantising(model_map: ModelMap, shape: Shape, timing: Timing) -> Iterator[str]:
    """What a quantised base costs in time, in words."""
    held = held_as(model_map, shape.quantize)
    if held is None:
        return
    if timing.source:
        yield f"{percent(timing.dequantising, 1)} of the time is spent on dequantising {held.kind} weights: longer micro-batches spend less"
    else:
        yield f"dequantising {held.kind} weights takes time that is not counted: once or twice for each micro-batch"


def _streaming(residency: Residency) -> Iterator[str]:
    """What is assumed of streamed layers, in words."""
    if residency.where == "stream":
        yield f"streamed layers are read at {bytes_text(round(DISK_RATE))}/s, assumed"


def _shared(processes: int, sent: float, link: float, base: Divided | None, cache: Choice) -> Iterator[str]:
    """What is assumed of several processes, in words."""
    yield f"{processes} processes, each with its share of every micro-batch; memory is that of one"
    yield f"a process sends {bytes_text(round(sent))} of gradients a step, at {bytes_text(round(link))}/s assumed"
    if base is not None:
        received = base.received if cache.where == "off" else base.received_replayed
        yield (
            f"a process receives {bytes_text(received)} of the base for each micro-batch, at the same rate and "
            "while nothing is computed"
        )


def _seconds(
    timing: Timing, work: Work | None, processes: int, replay: bool, cached: bool, residency: Residency
) -> tuple[float | None, float | None, float | None]:
    """Seconds of an epoch, of one with the prefix replayed, and of the whole run; None where unknown."""
    if work is None:
        return None, None, None
    steps = work.epoch_steps * timing.step
    tokens = work.tokens / processes
    whole = tokens * timing.token + steps
    replayed = tokens * timing.token_replayed + steps if replay else None
    later = replayed if replayed is not None and cached else whole
    if residency.where == "stream":  # the layers below run once, also where the run is shorter than an epoch
        once = tokens * (timing.token - timing.token_replayed) * min(1.0, work.passes)
        return whole, replayed, once + work.passes * later + residency.seconds
    return whole, replayed, min(1.0, work.passes) * whole + max(0.0, work.passes - 1) * later


def _assumptions(
    shape: Shape, profile: Profile, timing: Timing, device: str, optimizer: str
) -> tuple[str, ...]:
    """What an estimate rests on, in words."""
    memory = "memory: a simulated step" if profile.simulated else "memory: formulas"
    if profile.heap and not shape.sharded:
        memory += ", its allocations replayed through this machine's malloc"
    seconds = "time: {} {}FLOP/s assumed".format(*scaled(ASSUMED_RATE.get(device, 1e11)))
    if timing.source:
        agree = percent(timing.spread, 1)
        seconds = f"time: {timing.source}, the fastest of several tries, which agree within {agree}"
    return (
        f"micro-batch of {shape.batch} row{'s' * (shape.batch > 1)} of {shape.length} tokens, "
        f"{percent(shape.supervised, 1)} in the loss, {_weights(shape)} on {device}",
        f"{'AdamW' if optimizer == 'adamw' else optimizer} with float32 adapters, and a copy of the last good ones",
        memory,
        timing.busy or seconds,
    )


def _weights(shape: Shape) -> str:
    return (
        f"a base in {shape.quantize} and {shape.dtype}"
        if shape.quantize != "none"
        else f"{shape.dtype} base weights"
    )
