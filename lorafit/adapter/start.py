"""A start that takes a part out of the base (PiSSA, OLoRA), and the adapter that means the same without it.

PEFT's PiSSA and OLoRA begin with W - s B0 A0 as the base and s B0 A0 as the adapter. What was trained is then
right on that base alone, which nobody has. s (B A - B0 A0) is right on W: an adapter of twice the rank,
A' = [A; A0] and B' = [B, -B0] (PEFT, `subtract_mutated_init`).

R rank, I inputs, O outputs
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorafit.settings import takes_from_base

Start = dict[str, torch.Tensor]


def keep_start(model: Any) -> None:
    """Keep the adapter's first values, where its start took them out of the base: saving needs them."""
    config = model.peft_config["default"]
    if takes_from_base(config.init_lora_weights):
        model.lorafit_start = {
            name.replace(".default.", "."): p.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, p in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }


def start_of(model: Any) -> Start:
    """The first values that were kept, by the names that PEFT saves them under; empty for a plain start."""
    return getattr(model, "lorafit_start", {})


def without_start(weights: Path, config: Mapping[str, Any], start: Start) -> dict[str, Any]:
    """Rewrite a saved adapter for the base as it was; the config that belongs to it."""
    tensors = load_file(weights)
    for name, first in start.items():
        now = tensors[name]
        first = first.to(now.dtype)
        tensors[name] = torch.cat([now, first], 0) if ".lora_A." in name else torch.cat([now, -first], 1)
    save_file({name: t.contiguous() for name, t in tensors.items()}, weights, {"format": "pt"})
    # the scaling stays: alpha / r, or alpha / sqrt(r)
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    default = {"r": config["r"], "lora_alpha": config["lora_alpha"]}
    alphas = {key: value * factor for key, value in (config.get("alpha_pattern") or {}).items()}
    ranks = {key: value * 2 for key, value in (config.get("rank_pattern") or {}).items()}
    return {
        **config,
        "r": default["r"] * 2,
        "lora_alpha": default["lora_alpha"] * factor,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "init_lora_weights": True,
    }
