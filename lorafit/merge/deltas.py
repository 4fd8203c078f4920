"""What adapters add to the weights of their base, read from their files."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.adapter import BASE_LAYER, WEIGHTS, changes_its_base, pattern_value
from lorafit.errors import RequestError
from lorafit.model import ModelMap, TensorFile, open_file, read_tensor, shards

LOW_RANK = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one weight: `scaling * B @ A`, both float32; `flip` for a Conv1D."""

    down_RI: torch.Tensor
    up_OR: torch.Tensor
    scaling: float
    flip: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight it is for."""
        out, into = len(self.up_OR), self.down_RI.shape[1]
        return (into, out) if self.flip else (out, into)

    def rows(self, first: int, many: int) -> torch.Tensor:
        """What is added to `many` rows of the weight, from row `first` on; float32."""
        last = first + many
        if self.flip:
            return ((self.up_OR @ self.down_RI[:, first:last]) * self.scaling).T
        return (self.up_OR[first:last] @ self.down_RI).mul_(self.scaling)


def added(deltas: Sequence[Delta], rows: torch.Tensor, first: int) -> torch.Tensor:
    """Some rows of a weight with what the adapters add to them, in float32 (a wider weight in its own)."""
    total = deltas[0].rows(first, len(rows))
    for delta in deltas[1:]:
        total = total + delta.rows(first, len(rows))
    return total.add_(rows) if rows.dtype != torch.float64 else rows + total


def why_not_streamed(config: dict[str, Any], names: Sequence[str], base: Path) -> str:
    """Why an adapter cannot be merged tensor by tensor; empty when it can."""
    if config.get("target_parameters"):
        return "it adapts experts that lie in one tensor"
    if config.get("use_dora"):
        return "it is a DoRA adapter"
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        return "it trained more than low-rank weights"
    if changes_its_base(config):
        return "its start took a part out of the base's weights"
    if any(not n.endswith((*LOW_RANK, BASE_LAYER)) for n in names):
        return "it holds tensors beside low-rank weights"
    if config.get("ensure_weight_tying"):
        return "it keeps embedding and head tied"
    if not shards(base):
        return "the base is no safetensors checkpoint"
    return ""


def deltas(folder: Path, config: dict[str, Any], model_map: ModelMap, weight: float) -> dict[str, Delta]:
    """What the adapter adds, times its weight, by the base parameter's name; empty where it holds
    other than matrices.

    Raises RequestError when half of a pair is missing.
    """
    file = open_file(folder / WEIGHTS)
    by_name = {entry.name: entry for entry in file.entries}
    kinds = {s.path: s.kind for s in (*model_map.slots, *model_map.unplaced)}
    found = {}
    for name, entry in by_name.items():
        end = next((end for end in LOW_RANK if "A" in end and name.endswith(end)), "")
        if not end:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(end)
        partner = by_name.get(name.removesuffix(end) + end.replace("A", "B"))
        if partner is None:
            raise RequestError(f"the adapter has no B for `{module}`", "the file is not whole")
        if len(entry.shape) != 2:  # a convolution's: merged through the model
            return {}
        down, up = read_tensor(file, entry).float(), read_tensor(file, partner).float()
        rank = down.shape[0]
        alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        flip = "embedding" in end or kinds.get(module) == "conv1d"
        found[f"{module}.weight"] = Delta(down, up, scaling * weight, flip)
    return found


def own_base(folder: Path, there: Mapping[str, TensorFile], prefix: str) -> str:
    """A weight of the base that the adapter's file holds and that differs from the base's; empty where
    PEFT wrote those that the base has.

    `there` are the base's files by the names of the tensors in them.
    """
    file = open_file(folder / WEIGHTS)
    for entry in file.entries:
        if not entry.name.endswith(BASE_LAYER):
            continue
        name = entry.name.removeprefix("base_model.model.").replace(BASE_LAYER, ".weight")
        home = named_in(there, name, prefix)
        if home is None:
            continue
        old = next(e for e in there[home].entries if e.name == home)
        if old.shape != entry.shape:
            return name
        kept, base = read_tensor(file, entry), read_tensor(there[home], old)
        if not torch.equal(kept.float(), base.float()):  # a rounded one is what PEFT computes with
            return name
    return ""


def named_in(there: Container[str], name: str, prefix: str) -> str | None:
    """A parameter's name in a checkpoint, which may have its body's prefix or lack it; None without one."""
    choices = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((choice for choice in choices if choice in there), None)
