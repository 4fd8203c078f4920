"""Parameters of the base that are trained whole (`modules_to_save`, biases): float32, whatever the base's dtype.

In bfloat16 an update below 1/256 of a weight is rounded away, and most weights would never move. So the
weight that the optimizer sees is float32, and the module computes with a rounded copy of it, in the dtype it
had: as autocast does, and as the adapters do (lora_linear.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def train_in_float32(model: torch.nn.Module) -> None:
    """Make every trained parameter of a model float32, in place; its modules compute in the dtype they had."""
    for module in list(model.modules()):
        low = {
            name: p.dtype
            for name, p in module.named_parameters(recurse=False)
            if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
        }
        for name in low:
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.float()
        if low:
            module.__dict__["rounded_to"] = low
            module.__class__ = _rounding(type(module))  # the forward of an object's own would be a cycle


@cache
def _rounding(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The same kind of module, computing with its trained parameters rounded to the dtype they had."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if issubclass(kind, torch.nn.Embedding):  # rounded once looked up: not the whole table
            return kind.forward(self, *inputs, **named).to(self.rounded_to["weight"])
        own: dict[str, Any] = self._parameters
        trained = {name: own[name] for name in self.rounded_to}
        try:
            for name, dtype in self.rounded_to.items():
                own[name] = trained[name].to(dtype)
            return kind.forward(self, *inputs, **named)
        finally:
            own.update(trained)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
