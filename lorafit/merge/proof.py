"""The proof in weight space: each tensor of a merged model is the base's, or round(W + what the adapters add).

It is computed again from the adapters' files, by other code than the writer's, a few rows at a time. A matrix
must be right to the bit; where a sum was made in another order, each value must be the one that the exact
value in float64 rounds to, but for the error of that sum. What PEFT merged in the whole model (DoRA, experts,
trained biases) may have been rounded twice: two spacings of the dtype.

R rank, I inputs, O outputs, E experts
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorafit.adapter import BASE_LAYER, CONFIG, WEIGHTS, pattern_value
from lorafit.errors import LorafitError
from lorafit.model import (
    FLOATS,
    ModelMap,
    TensorEntry,
    TensorFile,
    open_file,
    read_range,
    read_tensor,
    shards,
    spans,
)
from lorafit.results import WeightProof

PIECE = 2**20  # bytes of a tensor that are read at a time

SPACINGS = 2  # of the dtype: what rounding twice may bring

TWICE_ROUNDED = 0.1  # the share of the values that had to move which rounding twice may leave one spacing off

SUFFIX = re.compile(
    r"\.(lora_A|lora_B)\.weight$|\.(lora_embedding_A|lora_embedding_B)$|\.(lora_magnitude_vector)(?:\.weight)?$"
)


class Differs(LorafitError):
    """A merged tensor is not what base and adapters make it."""


@dataclass(slots=True)
class Target:
    """What the adapters do to one parameter of the base, as their files say it."""

    pairs: list[tuple[torch.Tensor, torch.Tensor, float]] = field(default_factory=list)  # A, B, scaling
    kind: str = "linear"  # or conv1d, embedding, conv, experts
    magnitude: torch.Tensor | None = None  # DoRA's, (O,)
    base: torch.Tensor | None = None  # the base's weight, where the adapter has its own
    whole: torch.Tensor | None = None  # a weight that was trained whole

    @property
    def plain(self) -> bool:
        """Whether it is merged row by row, added in float32 and rounded once."""
        return self.magnitude is None and self.base is None and self.whole is None and self.kind in (
            "linear", "conv1d", "embedding",
        )  # fmt: skip

    @property
    def flipped(self) -> bool:
        """Whether the weight is stored as (I, O)."""
        return self.kind in ("conv1d", "embedding")

    def added(self, first: int, many: int, kind: torch.dtype) -> torch.Tensor:
        """What is added to `many` rows of the weight, computed in that dtype."""
        total = None
        for down_RI, up_OR, scaling in self.pairs:
            a, b = down_RI.to(kind), up_OR.to(kind)
            if self.flipped:
                part = (torch.matmul(b, a[:, first : first + many]) * scaling).T
            else:
                part = torch.matmul(b[first : first + many], a) * scaling
            total = part if total is None else total + part
        assert total is not None
        return total

    def size(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum of the magnitudes of what is added up, float64: what rounding in float32 is measured by."""
        pairs = [(a.abs(), b.abs(), abs(scaling)) for a, b, scaling in self.pairs]
        base = self.base if self.base is None else self.base.abs()
        found = replace(self, pairs=pairs, base=base, magnitude=None).exact(weight.abs())
        found = found.abs()
        if self.magnitude is not None:
            across = 0 if self.flipped else 1
            norm = replace(self, magnitude=None).exact(weight).norm(dim=across, keepdim=True)
            found = found * (self.magnitude.double().abs().view(norm.shape) / norm)
        return found

    def exact(self, weight: torch.Tensor) -> torch.Tensor:
        """The whole weight that base and adapters make, float64."""
        found = (weight if self.base is None else self.base).double()
        if self.whole is not None:
            return self.whole.double()
        if self.kind == "experts":
            for down_RI, up_OR, scaling in self.pairs:
                found = found + scaling * _experts(down_RI, up_OR, found.shape)
        elif self.kind == "conv":
            for down, up, scaling in self.pairs:
                found = found + scaling * (up.double().flatten(1) @ down.double().flatten(1)).view(
                    found.shape
                )
        elif self.pairs:
            found = found + self.added(0, len(found), torch.float64)
        if self.magnitude is not None:
            across = 0 if self.flipped else 1
            norm = found.norm(dim=across, keepdim=True)
            found = found * (self.magnitude.double().view(norm.shape) / norm)
        return found


def _experts(down: torch.Tensor, up: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What PEFT adds to a tensor of all experts: A is (E·R, I), B is (O, R·E)."""
    experts = shape[0]
    a = down.double().view(experts, -1, down.shape[1])  # E R I
    b = up.double().view(len(up), -1, experts)  # O R E
    product = torch.einsum("ore,eri->eoi", b, a)
    return product if product.shape == shape else product.transpose(1, 2)


def read_targets(folder: Path, weight: float, found: ModelMap) -> tuple[dict[str, Target], list[str]]:
    """(what an adapter does, by the base's parameters; names of its tensors that this proof cannot place)."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kinds = {s.path: s.kind for s in (*found.slots, *found.unplaced)}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    targets: dict[str, Target] = {}
    odd = []
    with safe_open(folder / WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name).clone()
            path = name.removeprefix("base_model.model.")
            if match := SUFFIX.search(path):
                part = next(filter(None, match.groups())).replace("embedding_", "")
                modules.setdefault(path[: match.start()], {})[part] = tensor
                if "embedding" in match[0]:
                    kinds[path[: match.start()]] = "embedding"
            elif path.endswith(BASE_LAYER):
                targets.setdefault(path.replace(BASE_LAYER, ".weight"), Target()).base = tensor
            elif "lora_" in path or "token_adapter" in path or ".original_module." in path:
                odd.append(name)
            else:
                target = targets.setdefault(
                    path.replace(".base_layer.", ".").replace(".modules_to_save.", "."), Target()
                )
                target.whole = tensor
    for module, parts in sorted(modules.items()):
        if "lora_A" not in parts or "lora_B" not in parts:
            odd.append(module)
            continue
        name, kind = f"{module}.weight", kinds.get(module, "linear")
        if config.get("target_parameters") and module not in kinds:
            name, kind = _experts_of(module, parts, found), "experts"
            if not name:
                odd.append(module)
                continue
        elif kind != "embedding" and parts["lora_A"].dim() != 2:
            kind = "conv"
        target = targets.setdefault(name, Target())
        target.kind = kind
        target.magnitude = parts.get("lora_magnitude_vector")
        rank = pattern_value(config.get("rank_pattern") or {}, module, config["r"])
        alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        target.pairs.append((parts["lora_A"].float(), parts["lora_B"].float(), scaling * weight))
    return targets, odd


def _experts_of(module: str, parts: Mapping[str, torch.Tensor], found: ModelMap) -> str:
    """The parameter of all experts that a pair is for, by its shapes: PEFT nests several of one module."""
    home = module.replace(".base_layer", "")
    sizes = parts["lora_A"].shape[1], len(parts["lora_B"])
    for slot in (*found.slots, *found.unplaced):
        fits = sizes in ((slot.in_features, slot.out_features), (slot.out_features, slot.in_features))
        if slot.kind == "parameter" and slot.path.rpartition(".")[0] == home and fits:
            return slot.path
    return ""


@dataclass(slots=True)
class _Seen:
    """What was compared: values, those that are not the base's, those that are not what they should be."""

    values: int = 0
    moved: int = 0
    wrong: int = 0
    should: int = 0

    def see(
        self, base: torch.Tensor, wanted: torch.Tensor, new: torch.Tensor, ok: torch.Tensor | None
    ) -> None:
        """Some values of a tensor, all of one dtype. `ok` tells of those that differ which are right."""
        differ = _bits(new) != _bits(wanted)
        if ok is not None:
            differ &= ~ok.reshape(differ.shape)
        self.values += new.numel()
        self.moved += int((_bits(new) != _bits(base)).sum())
        self.wrong += int(differ.sum())
        self.should += int((_bits(wanted) != _bits(base)).sum())


def prove_weights(
    base: Path,
    merged: Path,
    targets: Mapping[str, Target],
    homes: Mapping[str, str],
    copies: Mapping[str, str],
    dtype: str,
    streamed: bool,
    elsewhere: Container[str] = (),
) -> WeightProof:
    """Compare every tensor of a merged folder with what base and adapters make it.

    `homes` are the checkpoint's names of the targets, `copies` the tensors that were added, with the one each
    was copied from (a tied head), `dtype` what floating-point tensors were made (empty: as the base has them).
    The tensors in `elsewhere` are compared by `prove_parameters`. Raises Differs.
    """
    old = {e.name: (file, e) for file in map(open_file, shards(base)) for e in file.entries}
    new = {e.name: (file, e) for file in map(open_file, shards(merged)) for e in file.entries}
    for name in sorted(old.keys() - new.keys()):
        raise Differs(f"`{name}` is missing")
    for name in sorted(new.keys() - old.keys() - copies.keys()):
        raise Differs(f"`{name}` is in it, and not in the base")
    at_home = {homes[name]: target for name, target in targets.items() if name in homes}

    def one(name: str) -> tuple[str, _Seen]:
        was, now = old[copies.get(name, name)], new[name]
        kind = dtype if dtype and was[1].dtype in FLOATS else ""
        if now[1].shape != was[1].shape or now[1].dtype != (KINDS[kind] if kind else was[1].dtype):
            raise Differs(
                f"`{name}` is {now[1].dtype} {list(now[1].shape)}, not {was[1].dtype} {list(was[1].shape)}"
            )
        return name, _compare(was, now, at_home.get(name), streamed)

    cores = torch.get_num_threads()
    names = [n for n in new if n not in elsewhere]
    # as many threads as the writer had: with others a product may differ in its last bits
    workers = max(1, min(8, cores, len(shards(merged))))
    pool = ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(max(1, cores // workers),)
    )
    total, moved_tensors = _Seen(), 0
    try:
        for name, seen in pool.map(one, names):
            check_seen(name, seen, at_home.get(name), streamed)
            total.values += seen.values
            total.moved += seen.moved
            moved_tensors += seen.moved > 0
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
    return WeightProof(len(names), total.values, len(at_home), moved_tensors, total.moved)


KINDS = {name: kind for kind, name in FLOATS.items()}


def check_seen(name: str, seen: _Seen, target: Target | None, streamed: bool) -> None:
    """Raises Differs when a tensor is not what it should be."""
    few = 0 if target is None or (streamed and target.plain) else int(TWICE_ROUNDED * seen.should)
    if seen.wrong > few:
        what = "W plus what the adapters add to it, rounded once" if target is not None else "the base's"
        raise Differs(f"{seen.wrong:,} of {seen.values:,} values of `{name}` are not {what}")


Side = tuple[TensorFile, TensorEntry]


def _compare(was: Side, now: Side, target: Target | None, streamed: bool) -> _Seen:
    """One tensor of the merged model with the base's, a few rows at a time."""
    seen = _Seen()
    if target is not None and not (streamed and target.plain):
        base, new = read_tensor(*was), read_tensor(*now)
        see_whole(seen, base, new, target)
        return seen
    for base, new, first in _rows(was, now):
        if target is None:
            wanted, ok = base.to(new.dtype), None
        else:
            wide = torch.float64 if base.dtype == torch.float64 else torch.float32
            added = target.added(first, len(base), torch.float32)
            wanted, ok = (base.to(wide) + added.to(wide)).to(new.dtype), None
            if not torch.equal(_bits(wanted), _bits(new)):
                ok = _rounds_to(target, base, new, first)
        seen.see(base.to(new.dtype), wanted, new, ok)
    return seen


def see_whole(seen: _Seen, base: torch.Tensor, new: torch.Tensor, target: Target) -> None:
    """A tensor that was merged in the whole model: each value within two spacings of the exact one, and
    nearly all of those that should move as one rounding makes them. Raises Differs."""
    exact = target.exact(base)
    if exact.shape != new.shape:
        raise Differs(f"its shape is {list(new.shape)}, not {list(exact.shape)}")
    rank = max([0, *(len(down) for down, _, _ in target.pairs)])
    slack = (rank + 16) * 2.0**-24 * target.size(base)
    if not bool(((new.double() - exact).abs() <= SPACINGS * _spacing(exact, new.dtype) + slack).all()):
        seen.wrong = seen.values = new.numel()
        seen.should = 0
        return
    near = (new.double() - exact).abs() <= 0.5 * _spacing(exact, new.dtype) + slack
    seen.see(base.to(new.dtype), exact.to(new.dtype), new, near)


def _rows(was: Side, now: Side) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(rows of the base's tensor, the same of the merged one, the first one's number)."""
    shape = was[1].shape
    count = shape[0] if shape else 1
    old_width, new_width = ((e.stop - e.start) // max(1, count) for _, e in (was, now))
    with was[0].path.open("rb", buffering=0) as old, now[0].path.open("rb", buffering=0) as new:
        for first, many in spans(count if old_width else 0, PIECE // max(1, old_width)):
            part = (many, *shape[1:]) if shape else ()
            yield (
                read_range(old, was[0].data_at + was[1].start + first * old_width, part, was[1].dtype),
                read_range(new, now[0].data_at + now[1].start + first * new_width, part, now[1].dtype),
                first,
            )


def _rounds_to(target: Target, base: torch.Tensor, new: torch.Tensor, first: int) -> torch.Tensor:
    """Which values are the exact ones rounded, but for the error of a sum of R products in float32."""
    exact, size, rank = base.double(), base.double().abs(), 0
    exact = exact + target.added(first, len(base), torch.float64)
    for down_RI, up_OR, scaling in target.pairs:
        absolute = replace(target, pairs=[(down_RI.abs(), up_OR.abs(), abs(scaling))])
        size = size + absolute.added(first, len(base), torch.float64)
        rank = max(rank, len(down_RI))
    slack = (rank + 3) * 2.0**-24 * size
    return (new.double() - exact).abs() <= 0.5 * _spacing(exact.abs() + slack, new.dtype) + slack


def _spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between the numbers of a dtype that lie around these."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bytes of values, as numbers that are equal where the bits are: a NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(kinds[values.element_size()])


def prove_parameters(
    base: Callable[[], Any], merged: Callable[[], Any], targets: Mapping[str, Target], names: Sequence[str]
) -> WeightProof:
    """Compare the parameters of those names, which a checkpoint stores in another form (experts one by one):
    both models are loaded, one after the other. Raises Differs."""
    model = base()
    tensors = dict(model.named_parameters(remove_duplicate=False))
    before = {name: tensors[name].detach() for name in names}
    del model, tensors
    tensors = dict(merged().named_parameters(remove_duplicate=False))
    total, moved = _Seen(), 0
    for name in names:
        seen, target = _Seen(), targets.get(name)
        was, now = before.pop(name), tensors[name].detach()
        if target is not None:
            see_whole(seen, was, now, target)
        else:
            seen.see(was.to(now.dtype), was.to(now.dtype), now, None)
        check_seen(name, seen, target, streamed=False)
        total.values += seen.values
        total.moved += seen.moved
        moved += seen.moved > 0
    return WeightProof(len(names), total.values, len(targets), moved, total.moved)
