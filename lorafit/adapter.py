"""A plan becomes an adapter, and is held against what PEFT made of it: injected == planned.

PEFT does much without a word (a misspelt name beside a good one is dropped, an index that is
not there too); the comparison after every injection and every load is what lorafit trusts.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors import SafetensorError, safe_open

from lorafit import lowrank, seals
from lorafit.errors import RequestError, RunError
from lorafit.plan import Plan
from lorafit.spelling import pattern_value
from lorafit.tensorfiles import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}  # a masked model has no task type in PEFT


def lora_config(plan: Plan, task: str) -> LoraConfig:
    """The plan in PEFT's words."""
    lora, target = plan.lora, plan.peft
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


def inject(model: PreTrainedModel, plan: Plan, task: str) -> PeftModel:
    """The model with the plan's adapter in it, everything else frozen; float32 adapters.

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
    compare(plan.modules, adapted(peft_model))
    trainable, _ = peft_model.get_nb_trainable_parameters()
    if trainable != plan.trainable_params:
        raise RunError(
            f"PEFT trains {trainable:,} parameters where {plan.trainable_params:,} were planned",
            "this is a fault of lorafit: please report it with the model's config",
        )
    lowrank.quicken(peft_model)
    return peft_model


def adapted(model: torch.nn.Module) -> tuple[str, ...]:
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


def save(model: PeftModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, its lists in a fixed order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / CONFIG
    data = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "target_parameters", "layers_to_transform", "modules_to_save"):
        if isinstance(data.get(key), list):
            data[key] = sorted(data[key])
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card: a form with nothing filled in


def changes_its_base(config: Mapping[str, Any]) -> bool:
    """Whether an adapter leaves its base another than it found it: PiSSA's and OLoRA's start take a
    part out of the weights, trained biases stay when the adapter is off, and modules that were trained
    whole when it is taken out."""
    return (
        config.get("init_lora_weights") not in (True, False, None, "gaussian", "orthogonal")
        or config.get("bias", "none") != "none"
        or bool(config.get("modules_to_save"))
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter folder.

    Raises RequestError when the folder is no LoRA adapter.
    """
    path = Path(folder).expanduser()
    if not path.exists():
        raise RequestError(f"there is no folder `{folder}`", "lorafit train makes one")
    if not (path / CONFIG).is_file():
        raise RequestError(f"`{folder}` is no adapter: there is no {CONFIG} in it")
    if not (path / WEIGHTS).is_file():
        raise RequestError(f"`{folder}` is no whole adapter: there is no {WEIGHTS} in it")
    seals.check(path)
    try:
        data = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"`{path / CONFIG}` cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        kind = data.get("peft_type") if isinstance(data, dict) else None
        raise RequestError(f"`{folder}` is an adapter of type `{kind}`; lorafit reads LoRA")
    return data


def write_base(folder: Path, name: str, fingerprint: str) -> None:
    """Keep what an adapter was trained on beside it: `base.json`."""
    text = json.dumps({"model": name, "fingerprint": fingerprint}, indent=1)
    (folder / BASE).write_text(text + "\n", encoding="utf-8")


def check_base(folder: str | Path, place: str) -> None:
    """Hold a base's weights against those that an adapter of ours was trained on.

    Raises RequestError when they are other ones.
    """
    try:
        wanted = json.loads((run_of(folder) / BASE).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):  # not of ours: what it was trained on is not known
        return
    found = fingerprint(place)
    if wanted and found and wanted != found:
        raise RequestError(
            f"`{folder}` was not trained on `{place}`: its weights are other ones, or have changed since",
            "--model names the base it was trained on",
        )


def run_of(folder: str | Path) -> Path:
    """The run that an adapter belongs to: its own folder, or that of the run whose checkpoint it is."""
    path = Path(folder).expanduser()
    inside = re.fullmatch(r"checkpoint-[0-9]+|last-good", path.name) and (path.parent / BASE).is_file()
    return path.parent if inside else path


def base_of(folder: str | Path) -> str:
    """The model an adapter names as its base. Raises RequestError when it names none."""
    base = read_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise RequestError(f"the adapter `{folder}` names no base model", "name it with --model")
    return base


def tensor_names(folder: str | Path) -> list[str]:
    """The names of the tensors in an adapter. Raises RequestError when the file is damaged."""
    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise RequestError(f"`{path}` is damaged: {error}") from None


def attach(
    model: PreTrainedModel | PeftModel, folder: str | Path, name: str = "default", on_meta: bool = False
) -> PeftModel:
    """The model with a saved adapter on it, checked: what was injected holds every tensor of the file.

    A model that has an adapter gets one more. `on_meta` is for a base whose weights are not there and
    an adapter of low-rank matrices alone: those are. Raises RequestError when the adapter belongs to another model.
    """
    read_config(folder)
    names = set(tensor_names(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, low_cpu_mem_usage=on_meta)
                peft_model = model
            else:
                peft_model = PeftModel.from_pretrained(model, str(folder), name, low_cpu_mem_usage=on_meta)
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = next((line for line in lines if "size mismatch" in line), lines[0] if lines else "")
        raise RequestError(
            f"the adapter `{folder}` does not fit its base: {detail[:220]}",
            "it was trained on another model, or the base has changed",
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = set(get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False))
    if there != names:
        odd = sorted(there ^ names)
        raise RequestError(
            f"the adapter `{folder}` does not fit its base: `{odd[0]}`"
            + (f" and {len(odd) - 1} more tensors" if len(odd) > 1 else "")
            + " have no counterpart",
            "it was trained on another model, or the base has changed",
        )
    if on_meta:  # PEFT has put the adapter where its base is
        with safe_open(Path(folder) / WEIGHTS, "pt") as file:
            for key in names:
                module = peft_model.get_submodule(f"{key.removesuffix('.weight')}.{name}")
                module.weight = torch.nn.Parameter(file.get_tensor(key), requires_grad=False)
    return peft_model


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
