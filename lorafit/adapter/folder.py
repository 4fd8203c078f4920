"""An adapter's folder, lorafit's or another tool's: read, written, and its base checked."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lorafit.digests import check
from lorafit.errors import RequestError
from lorafit.model import fingerprint

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"


def save_adapter(model: PeftModel, folder: Path) -> None:
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
    check(path)
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
