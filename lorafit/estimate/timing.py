"""Seconds of a step on a device: one block of each kind, with random weights, is timed there and scaled up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lorafit.adapter import Plan
from lorafit.data import Batch
from lorafit.estimate.glibc_heap import keep_freed
from lorafit.estimate.simulate import NotSimulated, alike, blocks_of, first_tensor, meta_batch, planned_model
from lorafit.estimate.terms import SURE, Shape, Timing
from lorafit.forward import Forward, base_of, blocks_below
from lorafit.model import (
    ModelMap,
    ModelSource,
    dequantised,
    first_line,
    held_as,
    is_quantised,
    quantise_pretended,
)
from lorafit.system import free_memory
from lorafit.units import bytes_text

FEW = 64  # tokens of the probe's first try

# seconds of the micro-batch over the whole depth, of the same with the frozen layers cached, of the optimizer
Taken = tuple[float, float, float]

ROOM = 0.5  # share of the free memory that the probe's blocks may take


def probe(
    source: ModelSource, found: ModelMap, plan: Plan, shape: Shape, device: torch.device, seconds: float = 5.0
) -> Timing:
    """Seconds of a step on that device, from the model's own blocks with random weights.

    One block of each kind is built and trained on a few rows; its forward and backward are timed and
    scaled up to the depth and the number of tokens. Takes about `seconds`, and as long again while the
    fastest tries disagree. Raises NotSimulated where the blocks do not fit in memory.
    """
    groups = alike(source, found, plan)
    kept = sorted(layers[0] for layers in groups.values()) if groups else None
    counts = {layers[0]: len(layers) for layers in groups.values()}
    model, short = planned_model(source, found, plan, shape, kept)
    _check_room(model, device)
    model = model.to_empty(device=device)
    _fill(model)
    held, dtype = held_as(found, shape.quantize), getattr(torch, shape.dtype)
    if held is not None:
        quantise_pretended(model, held, dtype)
    blocks, below = blocks_of(model, short), len(blocks_below(base_of(model), short))
    times = [counts[layer] for layer in kept] if kept is not None else [1] * len(blocks)
    forward = Forward.of(model, found.task, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type != "mps")

    def once(rows: int, length: int) -> Taken:
        batch = meta_batch(replace(shape, batch=rows, length=length), found.task, str(device))
        return _timed(model, forward, batch, optimizer, blocks, below, times, device)

    if device.type == "cpu":
        keep_freed()
    if device.type == "cuda":  # backward's own thread: its first product would warn of a missing context
        torch.ones(1, device=device, requires_grad=True).mul(2).backward()
    try:
        taken, rows, length = _tries(once, shape, seconds, device)
    except Exception as error:  # a model's code may fail on random weights, and memory may run out
        raise NotSimulated(f"{type(error).__name__}: {first_line(error)[:160]}") from error
    # other work on the machine only adds time, so the fastest try is the best estimate
    whole, replayed, step = min(taken)
    spent = _dequantising(blocks, below, times, dtype, device)  # of a micro-batch, however many tokens it has
    token, token_replayed = (
        max(0.0, taking - part) / (rows * length) + part / shape.tokens
        for taking, part in zip((whole, replayed), spent, strict=True)
    )
    spread = taken_apart(taken)
    share = plan.trainable_params / max(1, sum(p.numel() for p in trained))
    return Timing(
        token,
        token_replayed,
        step * share,
        length,
        f"one block of each kind timed on {rows} row{'s' * (rows > 1)} of {length} tokens",
        round(spread, 3),
        spent[0] / shape.tokens / token,
    )


def _dequantising(
    blocks: list[torch.nn.Module], below: int, times: list[int], dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """(seconds that dequantising takes of a micro-batch, and of one with the prefix replayed): once forward,
    and once more backward at and above the cut."""
    whole = replayed = 0.0
    for number, (block, many) in enumerate(zip(blocks, times, strict=True)):
        layers = [module for module in block.modules() if is_quantised(module)]
        if not layers:
            continue
        tries = []
        for _ in range(2):
            began = _now(device)
            for layer in layers:
                dequantised(layer, dtype)
            tries.append(many * (_now(device) - began))
        whole += min(tries) * (1 if number < below else 2)
        replayed += min(tries) * (0 if number < below else 2)
    return whole, replayed


def _now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _tries(
    once: Callable[[int, int], Taken], shape: Shape, seconds: float, device: torch.device
) -> tuple[list[Taken], int, int]:
    """(what several tries took, their rows, their tokens per row), at the most tokens there is time for."""
    rows, length = 1, min(FEW, shape.length)
    once(rows, length)  # warm-up: on a GPU it reads libraries and kernels from the disk
    started = time.perf_counter()
    while True:
        if device.type == "cuda":
            once(rows, length)  # loads the kernels of that shape
        began = time.perf_counter()
        taken = [once(rows, length)]
        alone = (time.perf_counter() - began) / (rows * length)
        # the most tokens that fit three times into what is left of the time: small products run slower
        # than large ones, on a GPU by so much that a second look finds room for more
        tokens = int((seconds - (time.perf_counter() - started)) / (3 * alone))
        longer = min(shape.length, max(length, tokens))
        more = max(1, min(shape.batch, tokens // longer))
        if more * longer < 2 * rows * length:
            break
        rows, length = more, longer
    while len(taken) < 3 or (time.perf_counter() - started < seconds and len(taken) < 9):
        taken.append(once(rows, length))
    again = time.perf_counter() + max(1.0, seconds)
    while taken_apart(taken) > SURE and time.perf_counter() < again and len(taken) < 40:
        taken.append(once(rows, length))
    return taken, rows, length


def taken_apart(taken: list[Taken]) -> float:
    """How much slower the third fastest try is than the fastest, as a share: near 0 on a quiet machine."""
    fastest = sorted(whole for whole, _, _ in taken)
    return fastest[min(2, len(fastest) - 1)] / fastest[0] - 1


def _check_room(model: torch.nn.Module, device: torch.device) -> None:
    """Raises NotSimulated when the probe's blocks would take more than half of the memory that is free."""
    if device.type not in ("cpu", "cuda"):
        return
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    room = free_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if size > ROOM * room:
        raise NotSimulated(f"a block of each kind takes {bytes_text(size)}, and {bytes_text(room)} are free")


def _fill(model: torch.nn.Module) -> None:
    """Random weights of the usual size; anything else would make products of another speed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.fill_(1) if buffer.dtype.is_floating_point else buffer.zero_()


def _timed(
    model: torch.nn.Module,
    forward: Forward,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    blocks: list[torch.nn.Module],
    below: int,
    times: list[int],
    device: torch.device,
) -> tuple[float, float, float]:
    """(seconds of the micro-batch over the whole depth, the same with the prefix replayed, of the
    optimizer) after one step of the short model."""

    now = partial(_now, device)
    began: dict[int, float] = {}
    forwards = [0.0] * len(blocks)
    arrived: dict[int, float] = {}
    hooks = []
    for number, block in enumerate(blocks):

        def before(*_: Any, n: int = number) -> None:
            began[n] = now()

        def after(_: Any, __: Any, output: Any, n: int = number) -> None:
            forwards[n] += now() - began[n]
            hidden = first_tensor(output)
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(lambda _: arrived.setdefault(n, now()) and None)

        hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        start = now()
        loss = forward.loss_sum(model, batch)
        loss.backward()
        end = now()
    finally:
        for hook in hooks:
            hook.remove()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    stepped = now() - end
    backwards = [0.0] * len(blocks)
    last = end
    for number in sorted(arrived):  # from the lowest adapted block up: backward ends in it
        backwards[number] = last - arrived[number]
        last = arrived[number]
    rest = (end - start) - sum(forwards) - sum(backwards)
    whole = rest + sum(n * (f + b) for n, f, b in zip(times, forwards, backwards, strict=True))
    prefix = sum(n * f for n, f in zip(times[:below], forwards[:below], strict=True))
    return whole, whole - prefix, stepped
