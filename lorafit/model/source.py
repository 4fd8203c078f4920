"""A model's name to its config: `demo`, a folder, a `config.json`, or a hub id."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import demo
from lorafit.errors import RequestError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as it was named, and its config as it was found.

    `place` is what transformers' `from_pretrained` takes: a folder's absolute path or a hub id.
    """

    name: str
    place: str
    config: dict[str, Any]

    @property
    def local(self) -> bool:
        return Path(self.place).exists()


def find(model: str) -> ModelSource:
    """The model that a person named: `demo`, a folder, a `config.json`, or a hub id.

    The network is touched only for a hub id. Raises RequestError when there is no such model,
    when its config cannot be read, or when it names no type that transformers knows.
    """
    if model == "demo":
        folder = demo.MODEL
        return ModelSource("demo", str(folder), _read_config(folder / "config.json", "demo"))
    path = Path(model).expanduser()
    if path.is_file():
        return ModelSource(_display_name(path.parent), str(path.resolve()), _read_config(path, model))
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            if (path / "adapter_config.json").is_file():
                raise RequestError(
                    f"`{model}` is an adapter, not a model", f"lorafit eval {model}, or lorafit merge {model}"
                )
            raise RequestError(f"`{model}` is no model: there is no config.json in it")
        return ModelSource(_display_name(path), str(path.resolve()), _read_config(config, model))
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".json")
    if looks_local or not HUB_ID.fullmatch(model):
        raise RequestError(
            f"there is no model at `{model}`", "a model is a folder, a hub id as `owner/name`, or `demo`"
        )
    return ModelSource(model, model, _hub_config(model))


def _display_name(folder: Path) -> str:
    return "demo" if folder.resolve() == demo.MODEL else folder.resolve().name


def _read_config(path: Path, model: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read `{path}`: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"`{path}` is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise RequestError(f"`{path}` is no model's config: it holds no JSON object")
    return data


def _hub_config(model: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(model, "config.json")
    except Exception as error:  # every kind of network and hub error has the same next step
        kind = type(error).__name__
        raise RequestError(
            f"`{model}` is no folder here, and the hub did not give it ({kind})",
            "check the name and the network; a model is a folder, a hub id as `owner/name`, or `demo`",
        ) from None
    return _read_config(Path(path), model)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"[:240]
    return lines[0][:240] if lines else type(error).__name__
