"""The files beside the weights of a merged folder, each from where its role says, and what is left out.

| from | files |
|---|---|
| the base | config, generation config, processors, licences |
| the run's tokenizer, else the base | tokenizer, vocabulary, chat templates |
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lorafit.adapter import BASE, TEMPLATES, TOKENIZER, is_one
from lorafit.digests import SEAL
from lorafit.model import VOCABULARY
from lorafit.outputs import EDITABLE

OF_THE_BASE = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip

GENERATION = "generation_config.json"

RECORD = (BASE, SEAL, *EDITABLE)  # what a run of lorafit has beside its adapter


def carry(base: Path, adapter: Path, tokenizer: Path, work: Path) -> tuple[str, ...]:
    """Copy the files that make a folder of weights a model; the names of those left out, sorted.

    `tokenizer` is the folder that the run's tokenizer is in: the adapter's or the base's. A generation
    config that a run of lorafit wrote is taken: it holds what the model was trained to end with.
    """
    taken: dict[str, Path] = {}
    for path in _files(base):
        if is_one(path, OF_THE_BASE):
            taken[path.name] = path
    if (adapter / BASE).is_file() and (adapter / GENERATION).is_file():
        taken[GENERATION] = adapter / GENERATION
    for path in _files(tokenizer):
        if is_one(path, (*TOKENIZER, *TEMPLATES)):
            taken[path.name] = path
    if tokenizer != base:
        for path in _files(base):  # what slow tokenizers and converters read, where the run has none
            if is_one(path, VOCABULARY):
                taken.setdefault(path.name, path)
    for name, path in taken.items():
        if (work / name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, work / name)
        else:
            shutil.copyfile(path, work / name)
    return tuple(_left_out(base, adapter, set(taken.values())))


def _left_out(base: Path, adapter: Path, taken: set[Path]) -> list[str]:
    """The names of files that are not part of the merged model; weights that were rewritten apart."""
    found = []
    written = {
        p.name for p in _files(base) if is_one(p, ("model*.safetensors", "model.safetensors.index.json"))
    }
    for path in _files(base):
        replaced = any(other.name == path.name for other in taken)
        if path not in taken and path.name not in written and not replaced:
            found.append(f"base: {path.name}")
    ours = (adapter / BASE).is_file()
    for path in _files(adapter):
        recorded = path.name.startswith(("adapter_model", "adapter_config")) or (
            ours and is_one(path, RECORD)
        )
        if path not in taken and not recorded and not path.name.startswith("checkpoint-"):
            found.append(f"adapter: {path.name}")
    return sorted(found)


def _files(folder: Path) -> list[Path]:
    """What is in a folder, hidden files and their like apart."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__")))


def change_config(path: Path, dtype: str, untied: bool) -> None:
    """Name the dtype of the weights in a config, where it was chosen, and that the head is no longer tied."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    parts = [config, *(v for v in config.values() if isinstance(v, dict))]
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            if dtype and key in part:
                part[key] = dtype
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if dtype:
        config.setdefault("dtype", dtype)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
