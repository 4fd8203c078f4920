"""Linear layers over weights in 4 or 8 bits: loaded, multiplied and dequantised.

A layer's output is x W^T + b with W dequantised into the dtype of x, and its gradient is that of the same W: in
training and in evaluation, on every device. bitsandbytes does other things on its own, without a word:

- On CPUs with AVX512-BF16 the first pass in `eval()` repacks 4-bit weights into a form without autograd: every
  gradient after it is wrong.
- 8-bit layers round their input to float16 and then to 8 bits; on a CPU, in `eval()` alone.
- Weights that were stored from bfloat16 are dequantised into it for backward, whatever the dtype of the pass.

O outputs, I inputs
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from lorafit.errors import RunError
from lorafit.model.quantised import Quantised


class Pretended(torch.nn.Linear):
    """A linear layer with a plain weight, that computes and allocates as a quantised one does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self)


def is_quantised(layer: torch.nn.Module) -> bool:
    """Whether a layer's weight is dequantised before it is used."""
    weight = getattr(layer, "weight", None)
    return isinstance(layer, Pretended) or type(weight).__name__ in ("Params4bit", "Int8Params")


def dequantised(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """A quantised layer's weight, (O, I), in that dtype."""
    if isinstance(layer, Pretended):
        plain: torch.Tensor = layer.weight.to(dtype, copy=True)
        return plain
    if state := getattr(layer.weight, "quant_state", None):
        from bitsandbytes.functional import dequantize_4bit

        state.dtype = dtype
        found: torch.Tensor = dequantize_4bit(layer.weight.data, state)
        return found
    scales_O = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    whole: torch.Tensor = layer.weight.data.to(dtype)
    return whole.mul_((scales_O / 127).unsqueeze(1))


def _product(x: torch.Tensor, layer: Any) -> torch.Tensor:
    found: torch.Tensor = _Product.apply(x, layer.bias, layer)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """x W^T + b; W is dequantised for each product, and nothing is kept for backward but the layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias_O: torch.Tensor | None, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        bias_O = bias_O if bias_O is None else bias_O.to(x.dtype)
        return F.linear(x, dequantised(layer, x.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (dy,) = gradients
        dx = dy @ dequantised(ctx.layer, dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None


@functools.cache
def _exact(kind: Any) -> Any:
    """The same kind of layer, with the product above in the place of bitsandbytes' own."""
    return type(
        kind.__name__, (kind,), {"forward": lambda self, x: _product(x, self), "__module__": __name__}
    )


def loading(held: Quantised, dtype: torch.dtype, model: torch.nn.Module, quantisable: set[str]) -> Any:
    """What `from_pretrained` is told to quantise those layers of such a model, and no others."""
    from transformers import BitsAndBytesConfig

    skipped = [
        name for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name not in quantisable
    ]  # fmt: skip
    if held.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=held.kind,
        bnb_4bit_use_double_quant=held.double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def settle_layers(model: torch.nn.Module, held: Quantised, dtype: torch.dtype, quantisable: set[str]) -> None:
    """Have the quantised layers of a loaded model compute as said above.

    Raises RunError when other layers are quantised than were planned.
    """
    there = {name: module for name, module in model.named_modules() if is_quantised(module)}
    if odd := sorted(there.keys() ^ quantisable):
        did = "quantised" if odd[0] in there else "did not quantise"
        raise RunError(
            f"bitsandbytes {did} `{odd[0]}`, unlike what was planned",
            "this is a fault of lorafit: please report it with the model's config",
        )
    for layer in there.values():
        kind: Any = type(layer)
        layer.__class__ = _exact(kind)
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32):
            # a checkpoint that is quantised already ignores the dtype that is asked for; and as copies, these do
            # not hold on to the pages of the files, which are of no more use
            parameter.data = parameter.data.to(dtype if held.stored else parameter.dtype, copy=True)


def pretend(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Put layers that compute and allocate as quantised ones into a model on the meta device, in the place of
    the linear layers of those names."""
    for name in names:
        old: Any = model.get_submodule(name)
        out, into = old.weight.shape[::-1] if isinstance(old, Conv1D) else old.weight.shape
        new = Pretended(into, out, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        model.set_submodule(name, new.requires_grad_(False))


def quantise_pretended(model: torch.nn.Module, held: Quantised, dtype: torch.dtype) -> None:
    """Put really quantised layers in the place of those that pretended to be."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name, old in list(model.named_modules()):
        if not isinstance(old, Pretended):
            continue
        shape, weight = (old.in_features, old.out_features, old.bias is not None), old.weight
        made: Any
        if held.kind == "int8":
            made = Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
            made.weight = Int8Params(weight.data.cpu(), False, has_fp16_weights=False).to(weight.device)
        else:
            made = Linear4bit(*shape, dtype, held.double, held.kind, device="meta")
            made.weight = Params4bit(
                weight.data.cpu(), compress_statistics=held.double, quant_type=held.kind, module=made
            ).to(weight.device)
        made.bias = old.bias
        kind: Any = type(made)
        made.__class__ = _exact(kind)
        model.set_submodule(name, made)
