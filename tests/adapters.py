"""Adapters made without training, and their merges."""

import torch
from families import FAMILIES, build_model

from lorafit.adapter.folder import save_adapter
from lorafit.adapter.inject import inject_plan
from lorafit.adapter.plan import resolve
from lorafit.merge import merge
from lorafit.merge.merge import MergeSettings
from lorafit.model.chart import chart_of
from lorafit.model.load import load_tokenizer
from lorafit.model.source import find
from lorafit.settings.preset import load_preset


def make_adapter(folder, base, preset="all", layers="last:2", lora=None, exclude=(), size=0.1):
    """An adapter on disk whose B is not zero, as training leaves it."""
    from dataclasses import replace

    source = find(str(base))
    found = chart_of(source)
    chosen = load_preset(preset)
    if found.reinterpreted:
        exclude = ("feed-forward", "shared-experts")
    plan = resolve(found, replace(chosen, lora=lora or chosen.lora), layers, exclude=exclude)
    cls = type(build_model(found.family if found.family in FAMILIES else "llama"))
    model = inject_plan(cls.from_pretrained(base), plan, found.task)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, size)
    save_adapter(model, folder)
    return source, found, model


def do_merge(folder, source, found, output, **more):
    tokenizer = load_tokenizer(source.place, "base")
    folders = folder if isinstance(folder, list) else [(folder, 1.0)]
    return merge.merge_adapters(folders, source, found, MergeSettings(output, **more), [], tokenizer)
