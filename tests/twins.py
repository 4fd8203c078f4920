"""Quantised models of the tests, their real bytes, and the same models with plain, dequantised weights."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from lorafit.adapter import inject_plan, resolve
from lorafit.model import chart_of, dequantised, find, is_quantised, load_model
from lorafit.settings import load_preset

CPU = torch.device("cpu")


def twin_of(model, folder, dtype=torch.float32):
    """The model in that folder, with the dequantised weights of `model`."""
    plain = load_model(find(str(folder)), dtype, CPU)
    for name, module in model.named_modules():
        if is_quantised(module):
            layer, weight = plain.get_submodule(name), dequantised(module, dtype)
            layer.weight.data = weight.t().contiguous() if isinstance(layer, Conv1D) else weight
    return plain


def adapted(model, folder, layers="last:2", preset="all"):
    """A PEFT model with adapters whose B is not zero."""
    found = chart_of(find(str(folder)))
    exclude = ("feed-forward", "shared-experts") if found.reinterpreted else ()
    plan = resolve(found, load_preset(preset), layers, exclude=exclude)
    torch.manual_seed(0)
    made = inject_plan(model, plan, found.task)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return made


def gradients(model):
    """(loss, the gradients by name) of one batch, after a pass in `eval` mode: as a run evaluates first."""
    ids = torch.randint(3, 800, (2, 24), generator=torch.Generator().manual_seed(2))
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def furthest(found, wanted):
    """The largest relative distance of two sets of gradients."""
    assert found.keys() == wanted.keys() and found
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp_min(1e-30)) for n in wanted)


def held_bytes(model):
    """The bytes of all that a model's weights hold: parameters, scales and tables, each once."""
    found = {}

    def add(*tensors):
        for tensor in tensors:
            if tensor is not None:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    add(*(p.data for p in model.parameters()))
    for module in filter(is_quantised, model.modules()):
        weight = module.weight
        if state := getattr(weight, "quant_state", None):
            add(state.absmax, state.code, state.offset)
            if state.nested:
                add(state.state2.absmax, state.state2.code)
        else:
            add(weight.CB, weight.SCB, module.state.CB, module.state.SCB)
    return sum(found.values())
