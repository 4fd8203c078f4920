"""A training step on the meta device: what it would hold at its peak and what it would compute.

The very code that trains (step.py) runs over the real PEFT model, whose tensors have a shape and no
bytes; a dispatch mode follows every storage from its making to its end. So any architecture,
attention, head and checkpointing comes out right with no formula of its own. Blocks that are alike
are simulated once and twice, and extended: what a second one adds, each further one adds.
"""

from __future__ import annotations

import copy
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lorafit import adapter
from lorafit.batch import Batch
from lorafit.cost import Profile, Shape, Timing, free_memory
from lorafit.errors import LorafitError
from lorafit.modelmap import ModelMap, Slot
from lorafit.plan import Plan, Target, lora_params
from lorafit.prefix import blocks_below, refusal, trained_in
from lorafit.step import Forward, base_of, checkpoint_activations, chunk_for, keep_freed_memory
from lorafit.survey import Source, config_of, model_class, on_meta
from lorafit.units import bytes_text

CUBLAS_WORKSPACE = 8_519_680  # bytes that PyTorch gives cuBLAS: 2 of 4 MiB and 8 of 16 KiB
# What configs call their depth.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers")
FEW = 64  # tokens that the probe begins with
ROOM = 0.5  # of the memory that is free: what the probe's blocks may take
aten = torch.ops.aten


class NotSimulated(LorafitError):
    """The model's own code does not run on tensors without bytes, or its blocks do not fit the probe;
    the message says which."""


# -- following storages ---------------------------------------------------------------------


class Tracker(TorchDispatchMode):
    """Every storage that is made while it is on, by the phase it was made in; and the FLOPs.

    Phases are `prefix`, `body`, `head` and `backward`. Works over real tensors too, which is how
    a simulation is held against a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "body"
        self.flops: Counter[str] = Counter()
        self.log: list[tuple[int, int, str]] = []  # (storage, bytes made or freed, phase)
        self._live: dict[int, int] = {}
        self._made = 0
        self._numbers: dict[int, int] = {}
        self._true: set[int] = set()  # results of `all`: masks that hide nothing
        self._sums: dict[int, int] = {}  # of masks, should they hide nothing
        self._experts = 1

    def know(self, *modules: torch.nn.Module) -> None:
        """These modules' tensors are there already: they are not counted."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._live[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._answer(func, args) if args and _is_meta(args[0]) else None
        if out is None:
            out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in FLOPS:
            self.flops[self.phase] += FLOPS[packet](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
                self._reason(packet, args, tensor)
        return out

    def _reason(self, packet: Any, args: Any, tensor: torch.Tensor) -> None:
        """Note which truths say that a mask hides nothing: its `all`, or its sum being its size."""
        key = tensor.untyped_storage()._cdata
        if packet is aten.all:
            self._true.add(key)
        elif packet is aten.sum and tensor.ndim == 0:
            self._sums[key] = args[0].numel()
        elif packet is aten.eq and not isinstance(args[1], torch.Tensor) and args[0].ndim == 0:
            whole = self._sums.get(args[0].untyped_storage()._cdata)
            if whole is not None and whole == args[1]:
                self._true.add(key)

    def _answer(self, func: Any, args: Any) -> Any:
        """What a question about a value is answered with where there are no values.

        A mask hides nothing, any other truth is false; each expert sees its share of the tokens.
        """
        tensor = args[0]
        if func is aten._local_scalar_dense.default:
            if tensor.dtype == torch.bool:
                return tensor.untyped_storage()._cdata in self._true
            return 0.0 if tensor.dtype.is_floating_point else 0
        if func is aten.nonzero.default:
            if tensor.ndim == 1:
                self._experts = max(1, tensor.shape[0])
                count = tensor.shape[0]
            else:
                count = math.ceil(tensor.numel() / self._experts)
            return tensor.new_empty((count, tensor.ndim), dtype=torch.long)
        if func is aten._grouped_mm.default:  # on meta it takes bfloat16 alone
            left, right, offsets = args[0], args[1], args[2] if len(args) > 2 else None
            if left.ndim == 2 and right.ndim == 2 and offsets is not None:
                return left.new_empty((offsets.shape[0], left.shape[0], right.shape[1]))
            return left.new_empty((*left.shape[:-1], right.shape[-1]))
        return None

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        self._made += 1
        number = self._made
        self._live[key], self._numbers[key] = size, number
        self.log.append((number, size, self.phase))
        weakref.finalize(storage, self._freed, key, number, size)

    def _freed(self, key: int, number: int, size: int) -> None:
        self._live.pop(key, None)
        self._true.discard(key)
        self._sums.pop(key, None)
        self.log.append((number, -size, self.phase))

    def number_of(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage in the log; 0 for one that was there before."""
        return self._numbers.get(tensor.untyped_storage()._cdata, 0)

    def peaks(self, without: set[int]) -> dict[str, dict[str, int]]:
        """For each phase, the bytes alive at its highest moment by the phase they were made in,
        without the storages of those numbers."""
        born: dict[int, str] = {}
        alive: Counter[str] = Counter()
        found: dict[str, dict[str, int]] = {}
        highest: Counter[str] = Counter()
        for number, size, phase in self.log:
            if number in without:
                continue
            if size >= 0:
                born[number] = phase
            alive[born[number]] += size
            total = sum(alive.values())
            if total >= highest[phase]:
                highest[phase], found[phase] = total, dict(alive)
        return found


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products over the whole square, as PyTorch's own counter has it."""
    *rows, length, width = query.shape
    return 2 * math.prod(rows) * length * key.shape[-2] * (width + value.shape[-1])


def _attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    return _attention_flops(query, key, value) * 5 // 2  # scores again, and four gradients' products


def _grouped_flops(tokens: Any, weights: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return 2 * out_val.numel() * tokens.shape[-1]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten._grouped_mm: _grouped_flops,
}


@contextmanager
def _as_on(device: str) -> Iterator[None]:
    """Attention on meta as the kernel of that device has it: PyTorch's own would take the plain way
    there, and keep the scores. Autocast, which knows no meta device, is that of the CPU."""
    plain, autocast = F.scaled_dot_product_attention, torch.autocast

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        width = query.shape[-1]
        fused = query.ndim == 4 and width == value.shape[-1] and (device == "cuda" or dropout_p == 0.0)
        fused = fused and (enable_gqa or query.shape[1] == key.shape[1])
        if not fused or width > 256 or not query.is_meta:
            return plain(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        if device != "cuda":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if attn_mask is None and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]

    def cast(device_type: str, *more: Any, **named: Any) -> Any:
        return autocast("cpu" if device_type == "meta" else device_type, *more, **named)

    F.scaled_dot_product_attention, torch.autocast = attention, cast
    try:
        yield
    finally:
        F.scaled_dot_product_attention, torch.autocast = plain, autocast


# -- the step -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """One simulated step: FLOPs and bytes by phase."""

    flops: dict[str, float]
    peaks: dict[str, dict[str, float]]

    def plus(self, other: _Run, times: float) -> _Run:
        """This and so many times what the other has more, term by term."""
        flops = {p: self.flops.get(p, 0) + times * other.flops.get(p, 0) for p in {*self.flops, *other.flops}}
        peaks = {
            p: {
                c: self.peaks.get(p, {}).get(c, 0) + times * other.peaks.get(p, {}).get(c, 0)
                for c in {*self.peaks.get(p, {}), *other.peaks.get(p, {})}
            }
            for p in {*self.peaks, *other.peaks}
        }
        return _Run(flops, peaks)

    def minus(self, other: _Run) -> _Run:
        return self.plus(other, -1)


def meta_batch(shape: Shape, task: str, device: str = "meta") -> Batch:
    """A micro-batch of that shape: `shape.supervised` of its tokens are supervised."""
    ids = torch.zeros(shape.batch, shape.length, dtype=torch.long, device=device)
    count = max(1, round(shape.tokens * shape.supervised))
    places = torch.zeros(count, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, ids, places, torch.zeros_like(places), (count,), shape.tokens)


def track(
    model: torch.nn.Module, forward: Forward, batch: Batch, below: Sequence[torch.nn.Module], device: str
) -> _Run:
    """Forward and backward of one micro-batch under a tracker; on a real model, a real step."""
    tracker = Tracker()
    tracker.know(model)

    def into(phase: str) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            tracker.phase = phase

        return mark

    with ExitStack() as stack:
        for block in below:
            stack.callback(block.register_forward_pre_hook(into("prefix")).remove)
            stack.callback(block.register_forward_hook(into("body")).remove)
        stack.enter_context(_as_on(device))
        stack.enter_context(tracker)
        loss = replace(forward, mark=into("head")).loss_sum(model, batch)
        tracker.phase = "backward"
        loss.backward()
        gradients = {tracker.number_of(p.grad) for p in model.parameters() if p.grad is not None}
        del loss
    return _Run(dict(tracker.flops), tracker.peaks(gradients))


def simulate(
    source: Source,
    found: ModelMap,
    plan: Plan,
    shape: Shape,
    device: str,
    *,
    head_chunk: int = 0,
    whole_depth: bool = False,
) -> Profile:
    """What a step of that plan holds and computes, at that shape, on a `cpu` or a `cuda` device.

    Raises NotSimulated when the model's code needs values. `whole_depth` simulates every block.
    """
    groups = _alike(source, found, plan) if not whole_depth else {}
    first = {key: layers[0] for key, layers in groups.items()}
    kept = sorted(first.values()) or None
    model, below, short = planned_model(source, found, plan, shape, kept)
    try:
        with Tracker(), _as_on(device):  # which answers what the model asks of values
            forward = Forward.of(model, found.task, head_chunk or chunk_for(device, found.vocab_size))
        base = track(model, forward, meta_batch(shape, found.task), below, device)
        run = base
        for layers in groups.values():
            if len(layers) > 1:
                more, below, _ = planned_model(
                    source, found, plan, shape, sorted([*first.values(), layers[1]])
                )
                second = track(more, forward, meta_batch(shape, found.task), below, device)
                run = run.plus(second.minus(base), len(layers) - 1)
    except Exception as error:  # the code of any model may ask for a value
        raise NotSimulated(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from error
    body = base_of(model)
    return _profile(run, shape, device, refusal(found, short.cut, trained_in(body), body, training=True))


def _profile(run: _Run, shape: Shape, device: str, reason: str) -> Profile:
    """The run's highest moment in named terms, and its FLOPs a token."""
    phase = max(run.peaks, key=lambda p: sum(run.peaks[p].values()))
    made = run.peaks[phase]
    head, backward = run.flops.get("head", 0), run.flops.get("backward", 0)
    forward = run.flops.get("prefix", 0) + run.flops.get("body", 0)
    # a head that is run apart makes its gradient with its loss: half of its products are backward's
    forward, backward = forward + head / 2, backward + head / 2
    return Profile(
        activations=round(made.get("prefix", 0) + made.get("body", 0)),
        logits=round(made.get("head", 0)),
        workspace=round(made.get("backward", 0)) + (CUBLAS_WORKSPACE if device == "cuda" else 0),
        forward=round(forward / shape.tokens),
        backward=round(backward / shape.tokens),
        prefix=round(run.flops.get("prefix", 0) / shape.tokens),
        simulated=True,
        refusal=reason,
    )


def planned_model(
    source: Source, found: ModelMap, plan: Plan, shape: Shape, kept: list[int] | None
) -> tuple[Any, tuple[torch.nn.Module, ...], Plan]:
    """The model on meta with the plan's adapter in it, as it trains; the blocks below the cut; the plan.

    With `kept`, its stack holds these of its layers only, and the plan is that of these.
    """
    config = copy.deepcopy(config_of(source))
    if kept is None:
        model = on_meta(model_class(config), config)
    else:
        ((path, _),) = plan.cut.items()
        depth = found.stack(path).depth
        if _uniform(found, path):  # then it need not be built in its whole depth
            _shorten_config(config, depth, kept)
            model = on_meta(model_class(config), config)
        else:
            model = on_meta(model_class(config), config)
            _shorten(model, path, kept)
        plan = _plan_of(plan, path, kept)
    model = model.to(getattr(torch, shape.dtype)).requires_grad_(False)
    bare = replace(plan, lora=replace(plan.lora, init_lora_weights=True))  # a start reads weights' values
    peft_model = adapter.inject(model, bare, found.task)
    below = blocks_below(model, plan)
    if shape.checkpointing:
        checkpoint_activations(peft_model, below)
    return peft_model.train(), below, plan


def _alike(source: Source, found: ModelMap, plan: Plan) -> dict[Any, list[int]]:
    """The layers of the one adapted stack, grouped by what they cost; empty where a model has
    several stacks or few layers: then all of it is simulated.

    Alike are layers of the same weights, kind and adapters, on the same side of the cut; the lowest
    adapted one is a group of its own, since backward ends in it.
    """
    if len(plan.cut) != 1 or len(found.text_stacks) != 1:
        return {}
    ((path, cut),) = plan.cut.items()
    stack = found.stack(path)
    if stack.shared or stack.depth < 6:
        return {}
    config = config_of(source).get_text_config(decoder=True)
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
    """Only these layers of a stack; the config's depth and its lists along the depth follow."""
    parent, _, name = path.rpartition(".")
    blocks = list(model.get_submodule(path).children())
    depth = len(blocks)
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList([blocks[layer] for layer in kept]))
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        _shorten_config(config, depth, kept)


def _shorten_config(config: Any, depth: int, kept: list[int]) -> None:
    """The depth of a config, and of those nested in it, and what runs along it as a list."""
    for key, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, key, type(value)(value[layer] for layer in kept))
        elif key in DEPTHS and value == depth:
            setattr(config, key, len(kept))
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _shorten_config(value, depth, kept)


def _uniform(found: ModelMap, path: str) -> bool:
    """Whether every layer of a stack has the same weights, and only text is to be read."""
    if len(found.stacks) > 1:
        return False
    layers: dict[int, list[Any]] = {}
    for slot in [*found.slots, *found.unplaced]:
        tail = slot.path.removeprefix(f"{path}.{slot.layer}.")
        layers.setdefault(slot.layer, []).append((tail, slot.in_features, slot.out_features, slot.copies))
    return len({tuple(sorted(weights)) for weights in layers.values()}) == 1


def _plan_of(plan: Plan, path: str, kept: list[int]) -> Plan:
    """The same plan over a stack that holds only these of its layers."""
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


# -- the probe ------------------------------------------------------------------------------


def probe(
    source: Source, found: ModelMap, plan: Plan, shape: Shape, device: torch.device, seconds: float = 5.0
) -> Timing:
    """Seconds of a step on that device, from its own blocks with random weights.

    One block of each kind is built and trained on a few rows; what each takes forward and backward is
    timed, and extended over the depth and the tokens. Raises NotSimulated where it does not fit.
    """
    groups = _alike(source, found, plan)
    kept = sorted(layers[0] for layers in groups.values()) if groups else None
    counts = {layers[0]: len(layers) for layers in groups.values()}
    model, below, _ = planned_model(source, found, plan, shape, kept)
    _check_room(model, device)
    model = model.to_empty(device=device)
    _fill(model)
    blocks: list[torch.nn.Module] = []
    if len(plan.cut) == 1:
        ((path, _),) = plan.cut.items()
        blocks = list(model.get_base_model().get_submodule(path).children())
    times = [counts[layer] for layer in kept] if kept is not None else [1] * len(blocks)
    forward = Forward.of(model, found.task, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type != "mps")

    def once(rows: int, length: int) -> tuple[float, float, float]:
        batch = meta_batch(replace(shape, batch=rows, length=length), found.task, str(device))
        return _timed(model, forward, batch, optimizer, blocks, len(below), times, device)

    if device.type == "cpu":
        keep_freed_memory()
    started = time.perf_counter()
    taken: list[tuple[float, float, float]] = []
    rows, length = 1, min(FEW, shape.length)
    try:
        once(rows, length)  # the first pays for what is made once
        began = time.perf_counter()
        once(rows, length)
        alone = (time.perf_counter() - began) / length
        # as many tokens as there is time for three times: small products run slower than large ones
        tokens = int((seconds - (began - started)) / (3 * alone))
        length = min(shape.length, max(length, tokens))
        rows = max(1, min(shape.batch, tokens // length))
        while len(taken) < 2 or (time.perf_counter() - started < seconds and len(taken) < 9):
            taken.append(once(rows, length))
    except Exception as error:  # any model's code may fail over random weights, as memory may run out
        raise NotSimulated(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from error
    token, replayed, step = sorted(taken)[len(taken) // 2]
    share = plan.trainable_params / max(1, sum(p.numel() for p in trained))
    return Timing(
        token / (rows * length),
        replayed / (rows * length),
        step * share,
        length,
        f"{rows} × {length} tokens through one block of each kind",
    )


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

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began: dict[int, float] = {}
    forwards = [0.0] * len(blocks)
    arrived: dict[int, float] = {}
    hooks = []
    for number, block in enumerate(blocks):

        def before(*_: Any, n: int = number) -> None:
            began[n] = now()

        def after(_: Any, __: Any, output: Any, n: int = number) -> None:
            forwards[n] += now() - began[n]
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
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
