"""A plan becomes an adapter, and is held against what PEFT made of it: injected == planned.

PEFT does much without a word (a misspelt name beside a good one is dropped, an index that is
not there too); the comparison after every injection and every load is what lorafit trusts.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors import safe_open

from lorafit.adapter.folder import BASE_LAYER, WEIGHTS, read_config, tensor_names
from lorafit.adapter.lora_linear import quicken
from lorafit.adapter.peft_names import pattern_value
from lorafit.adapter.plan import Plan
from lorafit.adapter.start import keep_start
from lorafit.adapter.trained_whole import train_in_float32
from lorafit.errors import RequestError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}  # a masked model has no task type in PEFT


def lora_config(plan: Plan, task: str) -> LoraConfig:
    """The plan in PEFT's words."""
    lora: Any = plan.lora  # whose alpha may be a fraction: PEFT's annotations are narrower than what it takes
    target = plan.peft
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(target.target_modules),
        layers_to_transform=list(target.layers_to_transform) if target.layers_to_transform else None,
        layers_pattern=list(target.layers_pattern) if target.layers_pattern else None,
        target_parameters=list(target.target_parameters) if target.target_parameters else None,
        bias=lora.bias,
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,
        # by full name: PEFT takes the first pattern that matches, and saves them in another order
        rank_pattern=_by_name(plan, lora.rank_pattern),
        alpha_pattern=_by_name(plan, lora.alpha_pattern),
        fan_in_fan_out=bool(plan.slots) and all(s.kind == "conv1d" for s in plan.slots),
        task_type=TASKS.get(task),
    )


def _by_name(plan: Plan, patterns: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for slot in plan.slots:
        value = pattern_value(patterns, slot.path, 0)
        if value:
            found[re.escape(slot.path)] = type(next(iter(patterns.values())))(value)
    return found


def inject_plan(model: PreTrainedModel, plan: Plan, task: str) -> PeftModel:
    """The model with the plan's adapter in it, everything else frozen; all that is trained is float32.

    Raises RunError with the difference when PEFT adapted anything else than the plan, or
    counts other trainable parameters.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # PEFT's causal and seq2seq wrappers ask for generation, which not every class has (PI0)
            kind = task if hasattr(model, "prepare_inputs_for_generation") else ""
            peft_model = get_peft_model(model, lora_config(plan, kind))
        except ValueError as error:
            raise RunError(f"PEFT refuses the plan: {str(error).splitlines()[0]}") from error
    compare(plan.modules, adapted_names(peft_model))
    trainable, _ = peft_model.get_nb_trainable_parameters()
    if trainable != plan.trainable_params:
        raise RunError(
            f"PEFT trains {trainable:,} parameters where {plan.trainable_params:,} were planned",
            "this is a fault of lorafit: please report it with the model's config",
        )
    train_in_float32(peft_model, peft_model.get_base_model())
    keep_start(peft_model)
    quicken(peft_model)
    return peft_model


def adapted_names(model: torch.nn.Module) -> tuple[str, ...]:
    """The full names, in the base model's terms, of all that carries an adapter."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = path.removeprefix("base_model.model.")
        if isinstance(module, ParamWrapper):  # wrappers of several tensors of a module are nested
            name = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        found.append(name)
    return tuple(found)


def compare(planned: Iterable[str], injected: Iterable[str]) -> None:
    """Raises RunError naming what is missing and what is too much; silent when the sets agree."""
    wanted, got = set(planned), set(injected)
    if wanted == got:
        return
    parts = []
    for word, names in (("not adapted", wanted - got), ("adapted unasked", got - wanted)):
        if names:
            first = ", ".join(f"`{n}`" for n in sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{word}: {first}{more}")
    raise RunError(
        f"PEFT did not adapt what was planned: {'; '.join(parts)}",
        "nothing was trained; name the modules with --modules, or leave a part out with --exclude",
    )


def attach(
    model: PreTrainedModel | PeftModel, folder: str | Path, name: str = "default", on_meta: bool = False
) -> PeftModel:
    """The model with a saved adapter on it, checked: what was injected holds every tensor of the file.

    A model that has an adapter gets one more. `on_meta` is for a base whose weights are not there and
    an adapter of low-rank matrices alone: those are. Raises RequestError when the adapter belongs to another model.
    """
    config = read_config(folder)
    names = set(tensor_names(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, low_cpu_mem_usage=on_meta)
                peft_model = model
            else:
                peft_model = PeftModel.from_pretrained(model, str(folder), name, low_cpu_mem_usage=on_meta)
            # again, for what PEFT says of it: names are compared after its own conversions
            loaded = peft_model.load_adapter(str(folder), name, low_cpu_mem_usage=on_meta)
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = next((line for line in lines if "size mismatch" in line), lines[0] if lines else "")
        raise RequestError(
            f"the adapter `{folder}` does not fit its base: {detail[:220]}", _why_not(detail, model)
        ) from None
    missing = loaded.missing_keys
    if not config.get("target_parameters"):  # it names experts as earlier versions did
        missing = _really_missing(peft_model, missing)
    odd = sorted({*missing, *loaded.unexpected_keys})
    if odd:
        raise RequestError(
            f"the adapter `{folder}` does not fit its base: `{odd[0]}`"
            + (f" and {len(odd) - 1} more tensors" if len(odd) > 1 else "")
            + " have no counterpart",
            "it was trained on another model, or the base has changed",
        )
    if on_meta:  # PEFT has put the adapter where its base is
        with safe_open(Path(folder) / WEIGHTS, "pt") as file:
            for key in names:
                if key.endswith(BASE_LAYER):
                    continue
                value = torch.nn.Parameter(file.get_tensor(key), requires_grad=False)
                if ".lora_embedding_" in key:
                    peft_model.get_submodule(key)[name] = value  # type: ignore[operator]
                else:
                    peft_model.get_submodule(f"{key.removesuffix('.weight')}.{name}").weight = value
    return peft_model


def _really_missing(model: PeftModel, names: Sequence[str]) -> list[str]:
    """Names of an adapter's parameters that its file lacks, less pairs of experts' tensors that it has
    neither half of: PEFT adapts those of every layer, and without values they add nothing."""
    missing = set(names)

    def unused(name: str) -> bool:
        both = {name, name.replace(".lora_A.", ".lora_B."), name.replace(".lora_B.", ".lora_A.")}
        module = model.get_submodule(re.split(r"\.lora_[AB]\.", name)[0])
        return isinstance(module, ParamWrapper) and both <= missing

    return [name for name in names if not unused(name)]


def _why_not(mismatch: str, model: Any) -> str:
    """What may be the matter with an adapter, by what torch says of a tensor whose shape is another."""
    shapes = [list(map(int, found.split(","))) for found in re.findall(r"Size\(\[([\d, ]+)\]\)", mismatch)]
    if len(shapes) == 2 and [len(shape) for shape in shapes] == [2, 2]:
        (theirs, inner), (ours, other) = shapes
        tables = {
            tuple(module.weight.shape) for module in model.modules() if isinstance(module, torch.nn.Embedding)
        }
        if inner == other and theirs > ours and (ours, other) in tables:
            return (
                f"its base's vocabulary was enlarged from {ours:,} to {theirs:,}: call resize_token_embeddings({theirs}) on "
                "the base, save it, and name it with --model"
            )
    return "it was trained on another model, or the base has changed"


def attach_all(
    model: PreTrainedModel, adapters: Sequence[tuple[Path, float]], on_meta: bool = False
) -> PeftModel:
    """The model with several adapters on it at once, each multiplied by its weight.

    Raises RequestError as `attach` does.
    """
    names = ["default", *(f"adapter-{n}" for n in range(1, len(adapters)))]
    found: Any = model
    for name, (folder, _) in zip(names, adapters, strict=True):
        found = attach(found, folder, name, on_meta)
    if len(names) > 1:
        found.base_model.set_adapter(names)
    for module in found.modules():
        if isinstance(module, LoraLayer):
            for name, (_, weight) in zip(names, adapters, strict=True):
                if weight != 1 and name in module.scaling:
                    module.scaling[name] *= weight
    attached: PeftModel = found.requires_grad_(False).eval()
    return attached
