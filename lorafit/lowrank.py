"""An adapted linear layer, y = W x + b + s B A x, in as few passes over memory as it takes.

PEFT casts the layer's input to float32 for the adapter, makes the adapter's output whole, scales it, adds
it, and casts the sum back: five passes over tensors of float32, and an input kept for backward by each
of the layers that read it. Here the adapter is computed in the base's dtype, as autocast does it, from
float32 weights; its product is added where the base's output lies, and what is kept is the input itself.

N tokens, I inputs, O outputs, R rank
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from transformers.pytorch_utils import Conv1D

DTYPES = (torch.float32, torch.bfloat16)  # float16 would lose small gradients of the adapter


def quicken(model: torch.nn.Module) -> None:
    """Have each adapted linear layer of a model that trains take the short way, where it has plain LoRA
    over a plain weight; what else PEFT can do stays PEFT's."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) in (torch.nn.Linear, Conv1D):
            module.forward = partial(_forward, module)


def _forward(layer: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else ""
    base = layer.base_layer
    if (
        more
        or named
        or name not in layer.lora_A
        or name in layer.lora_variant  # DoRA and its like
        or layer.lora_bias.get(name)
        or layer.disable_adapters
        or layer.merged
        or (layer.training and not isinstance(layer.lora_dropout[name], torch.nn.Identity))
        or x.dtype not in DTYPES
        or x.dtype != base.weight.dtype
        or base.weight.requires_grad
        or (base.bias is not None and base.bias.requires_grad)
    ):
        return Linear.forward(layer, x, *more, **named)
    weight_OI = base.weight.t() if isinstance(base, Conv1D) else base.weight
    found: torch.Tensor = _LowRank.apply(
        x, weight_OI, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    )
    return found


class _LowRank(torch.autograd.Function):
    """The layer's output and the gradients of its input and of both low-rank weights; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        a, sb = a_RI.to(x.dtype), (b_OR * scaling).to(x.dtype)
        h_NR = x_NI @ a.t()
        y_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(h_NR, sb.t())
        ctx.save_for_backward(x_NI, weight_OI, a, sb, h_NR)
        ctx.scaling = scaling
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x_NI, weight_OI, a, sb, h_NR = ctx.saved_tensors
        (dy,) = gradients
        dy_NO = dy.reshape(-1, dy.shape[-1])
        u_NR = dy_NO @ sb
        da_RI = (u_NR.t() @ x_NI).float()
        db_OR = (h_NR.t() @ dy_NO).t().float().mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_NO @ weight_OI).addmm_(u_NR, a).view(*dy.shape[:-1], x_NI.shape[-1])
        return dx, None, None, da_RI, db_OR, None
