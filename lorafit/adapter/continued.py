"""An adapter that training goes on from: compared with the plan, then put into the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from lorafit.adapter.folder import (
    WEIGHTS,
    check_base,
    check_converted,
    check_values,
    read_config,
    tensor_names,
)
from lorafit.adapter.peft_names import pattern_value
from lorafit.adapter.plan import Plan
from lorafit.errors import RequestError
from lorafit.units import index_ranges

if TYPE_CHECKING:
    from peft import PeftModel

MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(embedding_)?A(\.weight)?")
SAME = ("use_rslora", "use_dora", "bias")  # settings that change what the matrices mean

HINT = "--preset, --layers, --modules, --rank and --alpha come from the adapter: leave them out"


def settings_of(folder: str) -> dict[str, Any]:
    """Rank, alpha and dropout of an adapter, and its modules and layers by name."""
    config = read_config(folder)
    modules = list(_ranks(folder))
    layers = sorted({int(n) for name in modules for n in re.findall(r"\.(\d+)\.", name)[:1]})
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout") or 0.0,
        "modules": tuple(sorted({name.rpartition(".")[2] for name in modules})),
        **({"layers": index_ranges(tuple(layers)).replace("–", "-").replace(" ", "")} if layers else {}),
    }


def _ranks(folder: str) -> dict[str, int]:
    """The rank of each module that an adapter's file has matrices for."""
    found = {name: match["module"] for name in tensor_names(folder) if (match := MATRIX.fullmatch(name))}
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        return {module: file.get_slice(name).get_shape()[0] for name, module in found.items()}


def modules_of(folder: str) -> list[str]:
    """The full names of the modules that an adapter's file has matrices for."""
    return list(_ranks(folder))


def check_continues(plan: Plan, folder: str, place: str) -> None:
    """Check that an adapter is one of this plan's modules, ranks and scaling, and of the base in `place`.

    Raises RequestError naming the difference.
    """
    config, lora = read_config(folder), plan.lora
    check_base(folder, place)
    check_converted(folder)
    check_values(folder)
    ranks, wanted = _ranks(folder), set(plan.modules)
    if plan.peft.target_parameters is None and ranks.keys() != wanted:  # PEFT names experts by other rules
        theirs, ours = sorted(ranks.keys() - wanted), sorted(wanted - ranks.keys())
        parts = [
            f"{who}: {_few(names)}"
            for who, names in (("only the adapter has", theirs), ("only the plan has", ours))
            if names
        ]
        raise RequestError(f"`{folder}` adapts other modules than the plan; {'; '.join(parts)}", HINT)
    for name, rank in ranks.items():
        planned = pattern_value(lora.rank_pattern, name, lora.r)
        if name in wanted and rank != planned:
            raise RequestError(f"`{folder}` has rank {rank} in `{name}`, the plan has {planned}", HINT)
        alphas = pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        planned = pattern_value(lora.alpha_pattern, name, lora.alpha)
        if name in wanted and alphas != planned:
            raise RequestError(f"`{folder}` has alpha {alphas:g} in `{name}`, the plan has {planned:g}", HINT)
    for key in SAME:
        was, now = config.get(key) or False, getattr(lora, key) or False
        if (was or "none") != (now or "none"):
            raise RequestError(
                f"`{folder}` has {key} = {was}, the plan has {now}", "a preset with the same setting"
            )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(f"`{name}`" for name in names[:2]) + more


def put_in(model: PeftModel, folder: str) -> None:
    """The adapter's values in place of the ones that were injected. Raises RequestError when they are not for
    the same parameters."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    values = load_file(Path(folder) / WEIGHTS)
    theirs: Mapping[str, Any] = get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(values.keys() ^ theirs.keys()) or [n for n in values if values[n].shape != theirs[n].shape]
    if odd:
        raise RequestError(f"`{folder}` does not fit the plan: {_few(odd)} differ", HINT)
    set_peft_model_state_dict(model, values)
