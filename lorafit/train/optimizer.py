"""The optimizers by their names: a table, with what makes each and the bytes it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorafit.settings import OPTIMIZERS, STATE_BYTES, RunConfig, check_optimizer

Parameters = Sequence[torch.nn.Parameter]


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """An optimizer: how it is made over trained parameters, and the bytes of its state for that many of them."""

    name: str
    make: Callable[[Parameters, RunConfig], torch.optim.Optimizer]
    state_bytes: Callable[[int], int]


def _adamw(parameters: Parameters, config: RunConfig) -> torch.optim.Optimizer:
    """Decoupled weight decay (arXiv:1711.05101), one fused kernel where the device has it."""
    fused = parameters[0].device.type != "mps"
    return torch.optim.AdamW(parameters, weight_decay=config.weight_decay, fused=fused)


def _adamw_8bit(parameters: Parameters, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW whose two moments are kept in 8 bits, in blocks (arXiv:2110.02861)."""
    import bitsandbytes

    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, weight_decay=config.weight_decay)
    return made


def _adafactor(parameters: Parameters, config: RunConfig) -> torch.optim.Optimizer:
    """Second moments by rows and columns (arXiv:1804.04235); the rate is the schedule's, not its own."""
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters, lr=1e-3, scale_parameter=False, relative_step=False, weight_decay=config.weight_decay
    )  # fmt: skip


def _sgd(parameters: Parameters, config: RunConfig) -> torch.optim.Optimizer:
    """Without momentum; weight decay is added to the gradient."""
    return torch.optim.SGD(parameters, lr=1e-3, weight_decay=config.weight_decay)


def _lion(parameters: Parameters, config: RunConfig) -> torch.optim.Optimizer:
    """The sign of a momentum (arXiv:2302.06675), with decoupled weight decay."""
    import bitsandbytes

    made: torch.optim.Optimizer = bitsandbytes.optim.Lion(parameters, weight_decay=config.weight_decay)
    return made


_MAKERS: dict[str, Callable[[Parameters, RunConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "lion": _lion,
}

KINDS = {name: OptimizerKind(name, _MAKERS[name], STATE_BYTES[name]) for name in OPTIMIZERS}


def make_optimizer(config: RunConfig, parameters: Parameters) -> torch.optim.Optimizer:
    """The optimizer that the settings name. Its rate is set by each step.

    Raises RequestError when the package that brings it is not installed.
    """
    check_optimizer(config.optimizer)
    return KINDS[config.optimizer].make(parameters, config)
