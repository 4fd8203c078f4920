"""An adapted linear layer, y = W x + b + s B A x, in as few passes over memory as it takes.

PEFT casts the layer's input to float32 for the adapter, makes the adapter's output whole, scales it, adds
it, and casts the sum back: five passes over tensors of float32, and an input kept for backward by each
of the layers that read it. Here the adapter is computed in the base's dtype, as autocast does it, from
float32 weights; its product is added where the base's output lies, and what is kept is the input itself.

Over a weight in 4 or 8 bits it is the same, with the weight dequantised for each product and not kept.

N tokens, I inputs, O outputs, R rank
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, LoraLayer
from transformers.pytorch_utils import Conv1D

from lorafit.model import dequantised, is_quantised

DTYPES = (torch.float32, torch.bfloat16)  # float16 would lose small gradients of the adapter


def quicken(model: torch.nn.Module) -> None:
    """Have each adapted linear layer of a model that trains take the short way, where it has plain LoRA
    over a plain weight; what else PEFT can do stays PEFT's."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) in (torch.nn.Linear, Conv1D):
            module.__class__ = Quick  # its forward as an attribute would be a cycle: never freed in time
        elif isinstance(module, LoraLayer) and is_quantised(module.base_layer):
            module.__class__ = _quick(type(module))


class _Short:
    """A short way through one of PEFT's adapted linear layers."""

    def forward(self: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        base: Any = self.base_layer
        if more or named or not self._is_plain(name, base, x.dtype):
            found: torch.Tensor = super().forward(x, *more, **named)  # type: ignore[misc]
            return found
        weight_OI = base.weight.t() if isinstance(base, Conv1D) else base.weight
        y_NO = _LowRank.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]),
            base if is_quantised(base) else weight_OI,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        # shaped out here: of a view that a Function returns nothing may be changed in place (OLMo clamps it)
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])  # type: ignore[no-any-return]

    def _is_plain(self: Any, name: str, base: Any, dtype: torch.dtype) -> bool:
        """Whether the one active adapter is W x + b + s B A x, over a frozen W and b of that dtype."""
        return not (
            name not in self.lora_A
            or name in self.lora_variant  # DoRA and its like
            or self.lora_bias.get(name)
            or self.disable_adapters
            or self.merged
            or (self.training and not isinstance(self.lora_dropout[name], torch.nn.Identity))
            or dtype not in DTYPES
            or (dtype != base.weight.dtype and not is_quantised(base))
            or base.weight.requires_grad
            or (base.bias is not None and base.bias.requires_grad)
            or base._forward_pre_hooks  # somebody wants the base layer to be called
            or base._forward_hooks
            or "forward" in vars(base)
        )


class Quick(_Short, Linear):
    """PEFT's adapted linear layer, with a short way."""


@functools.cache
def _quick(kind: Any) -> Any:
    """PEFT's layer over a quantised weight, with a short way."""
    return type(kind.__name__, (_Short, kind), {"__module__": __name__})


class _LowRank(torch.autograd.Function):
    """The layer's output and the gradients of its input and of both low-rank weights; W and b are frozen. A
    quantised layer stands for its W."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: torch.Tensor,
        weight_OI: torch.Tensor | torch.nn.Module,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        a, sb = a_RI.to(x_NI.dtype), (b_OR * scaling).to(x_NI.dtype)
        h_NR = x_NI @ a.t()
        if isinstance(weight_OI, torch.nn.Module):
            ctx.layer, kept = weight_OI, None
            bias_O = bias_O if bias_O is None else bias_O.to(x_NI.dtype)
            weight_OI = dequantised(weight_OI, x_NI.dtype)
        else:
            ctx.layer, kept = None, weight_OI
        y_NO: torch.Tensor = F.linear(x_NI, weight_OI, bias_O).addmm_(h_NR, sb.t())
        ctx.save_for_backward(x_NI, kept, a, sb, h_NR)
        ctx.scaling = scaling
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x_NI, weight_OI, a, sb, h_NR = ctx.saved_tensors
        (dy_NO,) = gradients
        u_NR = dy_NO @ sb
        da_RI = (u_NR.t() @ x_NI).float()
        db_OR = (h_NR.t() @ dy_NO).t().float().mul_(ctx.scaling)
        dx_NI = None
        if ctx.needs_input_grad[0]:
            weight_OI = weight_OI if ctx.layer is None else dequantised(ctx.layer, dy_NO.dtype)
            dx_NI = (dy_NO @ weight_OI).addmm_(u_NR, a)
        return dx_NI, None, None, da_RI, db_OR, None
