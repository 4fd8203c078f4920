"""A training step on the meta device: its peak memory and its FLOPs.

The code that trains runs over the real PEFT model on meta tensors, which have a shape and no data, and
every storage is traced. So architectures, attention kinds, the head and checkpointing need no formula of
their own. Identical blocks are simulated once, and the trace is repeated for each.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorafit.adapter import Plan, Target, inject_plan, lora_params
from lorafit.data import Batch
from lorafit.errors import LorafitError
from lorafit.estimate.glibc_heap import extent
from lorafit.estimate.memory_trace import MemoryTrace, as_on, peaks, repeated
from lorafit.estimate.terms import Profile, Shape
from lorafit.forward import (
    Forward,
    base_of,
    blocks_below,
    checkpoint_activations,
    chunk_for,
    refusal,
    trained_in,
)
from lorafit.model import (
    ModelMap,
    ModelSource,
    Slot,
    config_of,
    first_line,
    held_as,
    model_class,
    on_meta,
    pretend,
)

# The names of the depth in configs.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers")


class NotSimulated(LorafitError):
    """The model's code does not run on meta tensors, or its blocks do not fit in memory for the probe;
    the message says which."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One step: FLOPs and bytes by phase; the bytes that malloc's heap reaches, if requested and
    measurable."""

    flops: dict[str, int]
    peaks: dict[str, dict[str, int]]
    reach: int | None = None


def meta_batch(shape: Shape, task: str, device: str = "meta") -> Batch:
    """A micro-batch of that shape: the share `shape.supervised` of its tokens is in the loss."""
    ids = torch.zeros(shape.batch, shape.length, dtype=torch.long, device=device)
    count = max(1, round(shape.tokens * shape.supervised))
    places = torch.zeros(count, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, ids, places, torch.zeros_like(places), (count,), shape.tokens)


def track(
    model: torch.nn.Module,
    plan: Plan,
    forward: Forward,
    batch: Batch,
    device: str,
    times: Sequence[int] = (),
    reach: bool = False,
) -> _Run:
    """Forward and backward of one micro-batch under a trace; on a real model, a real step.

    `times` says how often each block of the adapted stack is repeated. `reach` replays the allocations
    through this machine's malloc.
    """
    tracker = MemoryTrace()
    tracker.know(model)
    blocks, below = blocks_of(model, plan), len(blocks_below(base_of(model), plan))
    given: dict[int, int] = {}

    def enter(number: int) -> Callable[..., None]:
        def begun(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if tracker.phase != "backward":  # checkpointing runs it again in backward
                tracker.block, tracker.phase = number, "prefix" if number < below else "body"
                hidden = first_tensor([*inputs, *named.values()])
                given[number] = 0 if hidden is None else tracker.number_of(hidden)

        return begun

    def leave(number: int) -> Callable[..., None]:
        def turned(_: torch.Tensor) -> None:
            tracker.block = number

        def done(_: torch.nn.Module, __: Any, output: Any) -> None:
            if tracker.phase != "backward":
                tracker.block, tracker.phase = -1, "body"
                hidden = first_tensor(output)
                if hidden is None:
                    raise TypeError(f"block {number} returns no hidden states")
                tracker.passed[number] = given[number], tracker.number_of(hidden)
                if hidden.requires_grad:
                    hidden.register_hook(turned)

        return done

    def head(phase: str) -> None:
        tracker.phase = phase

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(enter(number), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave(number)).remove)
        stack.enter_context(as_on(device))
        stack.enter_context(tracker)
        loss = replace(forward, mark=head).loss_sum(model, batch)
        tracker.phase = "backward"
        loss.backward()
        gradients = {tracker.number_of(p.grad) for p in model.parameters() if p.grad is not None}
        del loss
    log, times = tracker.log, list(times) or [1] * len(blocks)
    if any(count > 1 for count in times):
        log, gradients = repeated(tracker, times, gradients)
    flops: Counter[str] = Counter()
    for (phase, number), count in tracker.flops.items():
        flops[phase] += count * (times[number] if number >= 0 else 1)
    extended = extent((entry.storage, entry.bytes) for entry in log) if reach else None
    return _Run(dict(flops), peaks(log, gradients), extended)


def blocks_of(model: torch.nn.Module, plan: Plan) -> list[torch.nn.Module]:
    """The blocks of the adapted stack; none where several stacks are adapted."""
    if len(plan.cut) != 1:
        return []
    ((path, _),) = plan.cut.items()
    return list(base_of(model).get_submodule(path).children())


def first_tensor(found: Any) -> torch.Tensor | None:
    """The hidden states: the first tensor of a block's input or output."""
    members = found.values() if isinstance(found, Mapping) else found
    members = [found] if isinstance(found, torch.Tensor) else members
    return next((member for member in members if isinstance(member, torch.Tensor)), None)


def simulate_step(
    source: ModelSource,
    found: ModelMap,
    plan: Plan,
    shape: Shape,
    device: str,
    *,
    head_chunk: int = 0,
    whole_depth: bool = False,
) -> Profile:
    """Memory and FLOPs of a step of that plan, at that shape, on a `cpu` or a `cuda` device.

    Raises NotSimulated when the model's code needs values. `whole_depth` simulates every block.
    """
    counts = {layers[0]: len(layers) for layers in alike(source, found, plan).values()}
    kept = sorted(counts) if counts and not whole_depth else None
    model, short = planned_model(source, found, plan, shape, kept)
    try:
        forward = _way(model, short, found.task, head_chunk or chunk_for(device, found.vocab_size), device)
        times = [counts[layer] for layer in kept or ()]
        run = track(
            model, short, forward, meta_batch(shape, found.task), device, times, reach=device == "cpu"
        )
    except Exception as error:  # the code of some models needs values
        raise NotSimulated(f"{type(error).__name__}: {first_line(error)[:160]}") from error
    body = base_of(model)
    return _profile(run, shape, refusal(found, short.cut, trained_in(body), body, training=True))


_WAYS: dict[tuple[object, ...], Forward] = {}  # what `_way` found in this process


def _way(model: torch.nn.Module, plan: Plan, task: str, chunk: int, device: str) -> Forward:
    """How the model is called. It is tried once for a config: which blocks are adapted makes no difference, what is
    trained outside of them does."""
    config: Any = base_of(model).config
    inside = tuple(f"{path}." for path in plan.cut)
    outside = [
        name
        for name, p in base_of(model).named_parameters()
        if p.requires_grad and not name.startswith(inside)
    ]
    key = (config.to_json_string(False), config._attn_implementation, task, chunk, device, *outside)
    if key not in _WAYS:
        with MemoryTrace(), as_on(device):  # it answers the model's questions about values
            _WAYS[key] = Forward.of(model, task, chunk)
    return _WAYS[key]


def _profile(run: _Run, shape: Shape, reason: str) -> Profile:
    """The step's peak in named terms, and its FLOPs per token."""
    phase = max(run.peaks, key=lambda p: sum(run.peaks[p].values()))
    made = run.peaks[phase]
    held = sum(made.values())
    head, backward = run.flops.get("head", 0), run.flops.get("backward", 0)
    forward = run.flops.get("prefix", 0) + run.flops.get("body", 0)
    return Profile(
        activations=round(made.get("prefix", 0) + made.get("body", 0)),
        logits=round(made.get("head", 0)),
        workspace=round(made.get("backward", 0)),
        heap=max(0, run.reach - held) if run.reach is not None else 0,
        # a head that is run apart makes its gradient with its loss: half of its products are backward's
        forward=round((forward + head / 2) / shape.tokens),
        backward=round((backward + head / 2) / shape.tokens),
        prefix=round(run.flops.get("prefix", 0) / shape.tokens),
        simulated=True,
        refusal=reason,
    )


def planned_model(
    source: ModelSource, found: ModelMap, plan: Plan, shape: Shape, kept: list[int] | None
) -> tuple[Any, Plan]:
    """The model on the meta device with the plan's adapter in it; the plan.

    With `kept`, the stack has only these layers, and so has the plan.
    """
    config: Any = copy.deepcopy(config_of(source))
    if shape.attention != "auto":  # flash attention keeps what SDPA's fused kernels keep, and needs no GPU so
        config._attn_implementation = "sdpa" if "flash" in shape.attention else shape.attention
    model: Any
    if kept is None:
        model = on_meta(model_class(config), config)
    else:
        ((path, _),) = plan.cut.items()
        depth = found.stack(path).depth
        model = None
        if _uniform(found, path):  # then the full depth need not be built
            short = copy.deepcopy(config)
            _shorten_config(short, depth, kept)
            model = on_meta(model_class(short), short)
        # e.g. xLSTM, whose config has another name for the depth and is not shortened
        if model is None or len(model.get_submodule(path)) != len(kept):
            model = on_meta(model_class(config), config)
            _shorten(model, path, kept)
        plan = _plan_of(plan, path, kept)
    model = model.to(getattr(torch, shape.dtype)).requires_grad_(False)
    if held_as(found, shape.quantize) is not None:
        ((path, _), *_) = plan.cut.items()
        pretend(model, found.quantisable if kept is None else _kept_names(found, path, kept))
    bare = replace(
        plan, lora=replace(plan.lora, init_lora_weights=True)
    )  # other initialisations read the weights
    peft_model = inject_plan(model, bare, found.task)
    if shape.checkpointing:
        checkpoint_activations(peft_model, blocks_below(model, plan))
    return peft_model.train(), plan


def _kept_names(found: ModelMap, path: str, kept: list[int]) -> list[str]:
    """The names that quantised weights have in a stack that has only these layers."""
    number = {f"{layer}": str(at) for at, layer in enumerate(kept)}
    names = []
    for name in found.quantisable:
        layer, _, tail = name.removeprefix(f"{path}.").partition(".")
        if not name.startswith(f"{path}."):
            names.append(name)
        elif layer in number:
            names.append(f"{path}.{number[layer]}.{tail}")
    return names


def alike(source: ModelSource, found: ModelMap, plan: Plan) -> dict[Any, list[int]]:
    """The layers of the adapted stack, grouped by cost; empty if the model has several stacks or few
    layers: then all of it is simulated.

    A group has the same weights, kind and adapters, on the same side of the cut. The lowest adapted
    layer is a group of its own, since backward ends in it.
    """
    if len(plan.cut) != 1 or len(found.text_stacks) != 1:
        return {}
    ((path, cut),) = plan.cut.items()
    stack = found.stack(path)
    if stack.shared or stack.depth < 6:
        return {}
    config = config_of(source).get_text_config(decoder=True)
    if getattr(config, "hidden_size_per_layer_input", 0):  # an embedding has a part for each layer
        return {}
    kinds = getattr(config, "layer_types", None)
    kinds = kinds if isinstance(kinds, list) and len(kinds) == stack.depth else [""] * stack.depth
    adapted = {slot.path for slot in plan.slots}
    weights: dict[int, list[Any]] = {layer: [] for layer in range(stack.depth)}
    for slot in [*found.slots, *found.unplaced]:
        if slot.stack == path:
            tail = slot.path.removeprefix(f"{path}.{slot.layer}.")
            shape = (tail, slot.in_features, slot.out_features, slot.copies, slot.path in adapted)
            weights[slot.layer].append(shape)
    groups: dict[Any, list[int]] = {}
    for layer in range(stack.depth):
        side = (layer > cut) - (layer < cut)
        groups.setdefault((side, kinds[layer], tuple(sorted(weights[layer]))), []).append(layer)
    return groups if len(groups) + 1 < stack.depth // 2 else {}


def _shorten(model: torch.nn.Module, path: str, kept: list[int]) -> None:
    """Keep only these layers of a stack, and adjust the depth and the per-layer lists of the config."""
    parent, _, name = path.rpartition(".")
    blocks = list(model.get_submodule(path).children())
    depth = len(blocks)
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList([blocks[layer] for layer in kept]))
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        _shorten_config(config, depth, kept)


def _shorten_config(config: Any, depth: int, kept: list[int]) -> None:
    """Adjust the depth and the per-layer lists of a config, and of the configs nested in it."""
    for key, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, key, type(value)(value[layer] for layer in kept))
        elif key in DEPTHS and value == depth:
            setattr(config, key, len(kept))
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _shorten_config(value, depth, kept)


def _uniform(found: ModelMap, path: str) -> bool:
    """Whether every layer of a stack has the same weights, and the model has no other stack."""
    if len(found.stacks) > 1:
        return False
    layers: dict[int, list[Any]] = {}
    for slot in [*found.slots, *found.unplaced]:
        tail = slot.path.removeprefix(f"{path}.{slot.layer}.")
        layers.setdefault(slot.layer, []).append((tail, slot.in_features, slot.out_features, slot.copies))
    return len({tuple(sorted(weights)) for weights in layers.values()}) == 1


def _plan_of(plan: Plan, path: str, kept: list[int]) -> Plan:
    """The same plan on a stack that has only these layers."""
    number = {layer: at for at, layer in enumerate(kept)}
    slots = tuple(_moved(slot, path, number[slot.layer]) for slot in plan.slots if slot.layer in number)
    modules = tuple(sorted(slot.path for slot in slots if slot.kind != "parameter"))
    parameters = tuple(sorted(slot.path for slot in slots if slot.kind == "parameter"))
    return replace(
        plan,
        slots=slots,
        cut={path: min(slot.layer for slot in slots)},
        peft=Target(modules, None, None, parameters or None),
        trainable_params=sum(lora_params(slot, plan.lora) for slot in slots),
    )


def _moved(slot: Slot, path: str, layer: int) -> Slot:
    tail = slot.path.removeprefix(f"{path}.{slot.layer}.")
    return replace(slot, path=f"{path}.{layer}.{tail}", layer=layer)
