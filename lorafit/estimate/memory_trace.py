"""Every storage from allocation to release, and the FLOPs, on real tensors and on meta tensors.

Whatever runs while a MemoryTrace is on is recorded, with its phase and its block. On the meta device the
trace answers a model's questions about values, and attention allocates what a device's kernel would.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten


class Allocation(NamedTuple):
    """A storage was allocated (`bytes` above 0) or freed (below 0). `block` is the number of the block
    that ran, forward or backward; -1 outside the blocks."""

    storage: int
    bytes: int
    phase: str
    block: int


class MemoryTrace(TorchDispatchMode):
    """Every storage that is allocated while it is on, by phase and block; and the FLOPs.

    Phases are `prefix`, `body`, `head` and `backward`. It works on real tensors too, so a simulation can
    be compared with a real step.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase, self.block = "body", -1
        self.flops: Counter[tuple[str, int]] = Counter()
        self.log: list[Allocation] = []
        self.passed: dict[int, tuple[int, int]] = {}  # block -> storages of the states it was given and made
        self._live: dict[int, int] = {}
        self._made = 0
        self._numbers: dict[int, int] = {}
        self._true: set[int] = set()  # results of `all`: masks that hide nothing
        self._sums: dict[int, int] = {}  # of masks, should they hide nothing
        self._experts = 1

    def know(self, *modules: torch.nn.Module) -> None:
        """These modules' tensors exist already: they are not counted."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._live[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._answer(func, args) if args and _is_meta(args[0]) else None
        if out is None:
            out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in FLOPS:
            self.flops[self.phase, self.block] += FLOPS[packet](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
                self._reason(packet, args, tensor)
        return out

    def _reason(self, packet: Any, args: Any, tensor: torch.Tensor) -> None:
        """Note which results mean that a mask hides nothing: its `all`, or its sum being its size."""
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
        """The answer to a question about a value where there are no values.

        A mask hides nothing, any other condition is false; each expert gets its share of the tokens.
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
        self.log.append(Allocation(number, size, self.phase, self.block))
        weakref.finalize(storage, self._freed, key, number, size)

    def _freed(self, key: int, number: int, size: int) -> None:
        self._live.pop(key, None)
        self._true.discard(key)
        self._sums.pop(key, None)
        self.log.append(Allocation(number, -size, self.phase, self.block))

    def number_of(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage in the log; 0 for one that existed before."""
        return self._numbers.get(tensor.untyped_storage()._cdata, 0)


def peaks(log: Sequence[Allocation], without: set[int]) -> dict[str, dict[str, int]]:
    """For each phase, the live bytes at its peak by the phase they were allocated in, without the storages
    numbered in `without`."""
    born: dict[int, str] = {}
    alive: Counter[str] = Counter()
    found: dict[str, dict[str, int]] = {}
    highest: Counter[str] = Counter()
    for number, size, phase, _ in log:
        if number in without:
            continue
        if size >= 0:
            born[number] = phase
        alive[born[number]] += size
        total = sum(alive.values())
        if total >= highest[phase]:
            highest[phase], found[phase] = total, dict(alive)
    return found


def repeated(tracker: MemoryTrace, times: Sequence[int], some: set[int]) -> tuple[list[Allocation], set[int]]:
    """The log of a deeper model, in which each block is repeated `times[block]` times.

    Returns it with the numbers of all copies of the storages in `some`.
    """
    deeper = _Repeated(tracker.log, times, tracker.passed)
    return deeper.entries(), {deeper.number(n, copy) for n in some for copy in range(max(times))}


@dataclass(slots=True)
class _Repeated:
    """A log in which blocks are repeated: copy 0 is the lowest, and the last in backward.

    What a block allocates and frees itself, each copy does too. What another block frees is freed by the
    next copy, and for the last copy by that block. A copy's input is kept as long as the block's was.
    """

    log: Sequence[Allocation]
    times: Sequence[int]
    passed: Mapping[int, tuple[int, int]]
    made: list[Allocation] = field(default_factory=list)
    home: dict[int, int] = field(default_factory=dict)  # storage -> the block that allocated it
    turned: dict[int, int] = field(default_factory=dict)  # block -> the run of entries that is its backward
    left: dict[tuple[int, str], list[Allocation]] = field(
        default_factory=dict
    )  # by block, and when it is freed
    live: set[int] = field(default_factory=set)

    def entries(self) -> list[Allocation]:
        """The log of the deeper model."""
        runs = [
            (*key, list(run)) for key, run in groupby(self.log, lambda e: (e.block, e.phase == "backward"))
        ]
        self.turned = {block: at for at, (block, backward, _) in enumerate(runs) if backward}
        self._find_what_is_left(runs)
        for at, (block, backward, run) in enumerate(runs):
            copies = range(self._times(block))
            first = copies[-1] if backward else 0
            for copy in reversed(copies) if backward else copies:
                for entry in run:
                    if entry.bytes >= 0 or self.home[entry.storage] == block:
                        self._put(entry, copy)
                    elif copy == first:
                        self._free_of_another(entry, at)
                for entry in self.left.get((block, "before" if backward else "forward"), ()):
                    self._put(entry, copy - 1)
                for entry in self.left.get((block, "after"), ()) if backward else ():
                    self._put(entry, copy + 1)
        return self.made

    def number(self, storage: int, copy: int) -> int:
        """The number of a copy's storage."""
        return storage + copy * (len(self.log) + 1)

    def _find_what_is_left(self, runs: Sequence[tuple[int, bool, list[Allocation]]]) -> None:
        """What others free of each block's storages, by when they do: in `forward`, in backward `before` the
        block's own, or `after` it."""
        kept = {entry.storage for entry in self.log if entry.bytes < 0 and entry.phase == "backward"}
        for at, (block, backward, run) in enumerate(runs):
            for entry in run:
                if entry.bytes >= 0:
                    self.home[entry.storage] = block
                    continue
                home = self.home[entry.storage]
                given, handed_on = self.passed.get(home, (0, 0))
                when = "forward" if not backward else "before" if at < self.turned.get(home, 0) else "after"
                if entry.storage == handed_on:
                    when = "before" if given in kept else "forward"
                if home != block:
                    self.left.setdefault((home, when), []).append(entry)

    def _times(self, block: int) -> int:
        return self.times[block] if block >= 0 else 1

    def _free_of_another(self, entry: Allocation, at: int) -> None:
        """Free what another block allocated: its last copy's, or every copy's once its backward is over."""
        home = self.home[entry.storage]
        last = self._times(home) - 1
        for copy in [last] if at < self.turned.get(home, 0) else range(last + 1):
            self._put(entry, copy)

    def _put(self, entry: Allocation, copy: int) -> None:
        """Add the entry for that copy's storage, unless it frees a storage that is not live."""
        storage = self.number(entry.storage, copy)
        if entry.bytes >= 0:
            self.live.add(storage)
        elif storage in self.live:
            self.live.remove(storage)
        else:
            return
        self.made.append(entry._replace(storage=storage))


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products over the whole length × length square, as in PyTorch's own counter."""
    *rows, length, width = query.shape
    return int(2 * math.prod(rows) * length * key.shape[-2] * (width + value.shape[-1]))


def _attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    return (
        _attention_flops(query, key, value) * 5 // 2
    )  # the scores again, and four products for the gradients


def _added_flops(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    return int(2 * left.shape[0] * left.shape[1] * right.shape[1])


def _grouped_flops(tokens: Any, weights: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return int(2 * out_val.numel() * tokens.shape[-1])


# PyTorch's own counter has no flash attention for the CPU, and before 2.12 refuses fewer heads of keys
ATTENTIONS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{getattr(aten, f"_scaled_dot_product_{name}"): _attention_flops for name in ATTENTIONS},
    **{
        getattr(aten, f"_scaled_dot_product_{name}_backward"): _attention_backward_flops
        for name in ATTENTIONS
    },
    aten._grouped_mm: _grouped_flops,
    aten.addmm_: _added_flops,  # missing in PyTorch's own counter
}


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """On the meta device, use the attention kernel of that device: PyTorch would fall back to the math
    path there and keep the scores. Autocast, which does not support meta, is the CPU's."""
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
            made = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        elif attn_mask is None and query.dtype != torch.float32:
            made = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )
        else:
            made = aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
            )
        found: torch.Tensor = made[0]
        return found

    def cast(device_type: str, *more: Any, **named: Any) -> Any:
        return autocast("cpu" if device_type == "meta" else device_type, *more, **named)

    F.scaled_dot_product_attention = attention
    setattr(torch, "autocast", cast)  # noqa: B010  # for the type checker it is a class
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
        setattr(torch, "autocast", autocast)  # noqa: B010
