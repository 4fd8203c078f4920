"""An adapter's folder, lorafit's or another tool's: read, written, and its base checked."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lorafit.digests import check
from lorafit.errors import RequestError
from lorafit.model import (
    DATA_FILES,
    HUB_ID,
    fingerprint,
    hub_reached,
    not_downloaded,
    sampled,
    split_revision,
)
from lorafit.outputs import PARTIAL, RUN_FILE, last_run
from lorafit.settings import takes_from_base

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE: str = "base.json"

PICKLED = "adapter_model.bin"

OLD_DIGITS = 32

MOST_NAMED = 5  # checkpoints of an unfinished run, in an error

BASE_LAYER = ".base_layer.weight"  # a weight of the base that PEFT writes beside its embedding's adapter

EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {}, ())  # values of a setting that change nothing

# Settings that change what an adapter does, and that lorafit's passes do not do.
NOT_HONOURED = {
    "alora_invocation_tokens": "activated LoRA: it is active behind these tokens alone",
    "layer_replication": "layers of the base are repeated",
    "arrow_config": "a router chooses among adapters",
    "use_qalora": "its input is pooled by groups",
    "use_bdlora": "its matrices are block-diagonal",
    "megatron_config": "its layers are Megatron's",
    "kasa_config": "its singular values are trained",
    "velora_config": "its inputs are compressed",
    "monteclora_config": "its weights are sampled",
}


@cache
def _known() -> frozenset[str]:
    """The settings that PEFT's LoraConfig has. PEFT is imported only where an adapter is read."""
    from peft import LoraConfig

    return frozenset(field.name for field in fields(LoraConfig))


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, its lists in a fixed order.

    An adapter whose start took a part out of the base (PiSSA, OLoRA) is written for the base as it was:
    of twice the rank, its start taken off (see start.py).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=False)
    path = folder / CONFIG
    data = json.loads(path.read_text(encoding="utf-8"))
    from lorafit.adapter.start import start_of, without_start

    if start := start_of(model):
        data = without_start(folder / WEIGHTS, data, start)
    for key in ("target_modules", "target_parameters", "layers_to_transform", "modules_to_save"):
        if isinstance(data.get(key), list):
            data[key] = sorted(data[key])
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / WEIGHTS).chmod(path.stat().st_mode & 0o777)  # safetensors 0.8 writes for the owner alone
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


def replaces_its_base(folder: str | Path) -> bool:
    """Whether the base is another one after an adapter was on it: by its settings, or since its file holds weights of
    the base, an embedding say, which PEFT loads over them."""
    return changes_its_base(read_config(folder)) or _holds_weights(folder)


def _holds_weights(folder: str | Path, but: Sequence[str] = ()) -> bool:
    """Whether an adapter's file holds weights of the base beside its own, `but` those of modules of these names."""
    own = ("lora_", "trainable_tokens", *(f".{name}." for name in but))
    return any(all(part not in name for part in own) for name in tensor_names(folder))


def left_in_base(folder: str | Path) -> str:
    """What stays in the base while an adapter is off, in words; empty for most."""
    config = read_config(folder)
    if takes_from_base(config.get("init_lora_weights")):
        return f"the adapter's `{config['init_lora_weights']}` start took a part out of it"
    if config.get("bias", "none") != "none":
        return "the adapter trains biases, which stay in it"
    whole = [*(config.get("modules_to_save") or ()), "base_layer"]  # of these PEFT keeps the base's own
    return "the adapter's file holds weights of it" if _holds_weights(folder, whole) else ""


def check_converted(*folders: str | Path) -> None:
    """Raises RequestError for an adapter as PiSSA, OLoRA or LoRA-GA leave it: its matrices belong to what their start left of
    the base, and mean something else on the whole base. lorafit saves such adapters for the base as it was."""
    for folder in folders:
        start = read_config(folder).get("init_lora_weights")
        if takes_from_base(start):
            raise RequestError(
                f"`{folder}` was saved as its `{start}` start needs it, not for the base as it is",
                "save it with PEFT's path_initial_model_for_weight_conversion",
            )


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter folder.

    Raises RequestError when the folder is not a LoRA adapter, or has a setting that lorafit does not honour.
    """
    path = Path(folder).expanduser()
    work = path.with_name(path.name + PARTIAL) if path.name else path
    if not path.exists() and _checkpoints(work):
        raise RequestError(*_unfinished(work, str(folder)))
    if path.is_symlink() and not path.exists():
        raise RequestError(f"`{folder}` is a link whose target is missing", f"it points to {path.readlink()}")
    if not path.exists() and work.is_dir():
        raise RequestError(*_just_begun(str(folder)))
    if not path.exists():
        last = last_run()
        raise RequestError(
            f"there is no folder `{folder}`",
            f"the last run is {shlex.quote(last)}" if last else "lorafit train makes one",
        )
    if not (path / CONFIG).is_file():
        raise RequestError(*_not_an_adapter(path, str(folder)))
    if not (path / WEIGHTS).is_file():
        if (path / PICKLED).is_file():
            raise RequestError(f"`{folder}` has its weights in {PICKLED}, an older format", _converting(path))
        raise RequestError(f"`{folder}` is not a whole adapter: there is no {WEIGHTS} in it")
    check(path)
    try:
        data = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"`{path / CONFIG}` cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        kind = data.get("peft_type") if isinstance(data, dict) else None
        raise RequestError(f"`{folder}` is an adapter of type `{kind}`; lorafit reads LoRA")
    for key, value in data.items():
        if key in NOT_HONOURED and value not in EMPTY:
            raise RequestError(
                f"`{folder}` sets `{key}` ({NOT_HONOURED[key]}), which lorafit does not honour",
                "use it with the tool that made it",
            )
        if key not in _known() and value not in EMPTY:
            raise RequestError(
                f"`{folder}` sets `{key}`, which this version of PEFT does not know: it may change the result",
                f"use it with the version of PEFT that made it, or remove `{key}` from {CONFIG} if it changes nothing",
            )
    return data


def check_values(folder: str | Path) -> None:
    """Check that every value of an adapter is a finite number. Raises RequestError naming a tensor that
    holds others, or when the file is damaged."""
    path = Path(folder).expanduser() / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            odd = next((n for n in file.keys() if not file.get_tensor(n).float().isfinite().all()), "")  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RequestError(f"`{path}` is damaged: {error}") from None
    if odd:
        raise RequestError(
            f"`{odd}` of the adapter `{folder}` holds values that are not finite numbers",
            "it is damaged, or its training diverged: take an earlier checkpoint",
        )


def locate(adapter: str) -> str:
    """The folder of an adapter that a person named: a folder as it is, or a hub id, `owner/name` or
    `owner/name@revision`, downloaded unless it is in the hub's cache.

    Raises RequestError when the hub does not have it or is not reached.
    """
    path = Path(adapter).expanduser()
    name, revision = split_revision(adapter)
    if adapter.startswith("~"):
        return str(path)
    if path.exists() or path.is_symlink() or name.count("/") != 1 or not HUB_ID.fullmatch(name):
        return adapter
    if name.startswith(("./", "../")) or Path(name.partition("/")[0]).is_dir():  # a folder's name, misspelt
        return adapter
    from huggingface_hub import snapshot_download

    hub_reached()
    try:
        return snapshot_download(
            name, revision=revision or None, ignore_patterns=["checkpoint-*", "*.pt", "*.pth"]
        )
    except Exception as error:  # each kind of network and hub error is named
        raise RequestError(
            f"there is no folder `{adapter}`, and as a hub id {not_downloaded(error)}",
            "check the name and the network; an adapter is a folder, or a hub id as `owner/name`",
        ) from None


def _not_an_adapter(path: Path, name: str) -> tuple[str, str]:
    """(what it is, what to do) for a folder or a file without an adapter's config."""
    quoted = shlex.quote(name)
    if path.suffix.lower() in DATA_FILES and path.is_file():
        return f"`{name}` is data, not an adapter", f"lorafit eval RUN --data {quoted}"
    if path.is_file():
        return (
            f"`{name}` is a file; an adapter is a folder",
            f"name its folder: {shlex.quote(str(path.parent))}",
        )
    if _checkpoints(path):
        return _unfinished(path, name)
    if path.name.endswith(PARTIAL) and (path / RUN_FILE).is_file():
        return _just_begun(name)
    if last := last_run(path):
        return f"`{name}` is a folder of runs, not an adapter", f"the last one is {shlex.quote(last)}"
    if (path / "config.json").is_file():
        return (
            f"`{name}` is a model, not an adapter",
            f"lorafit eval {quoted} --data FILE scores it; an adapter is a run's folder",
        )
    return (
        f"`{name}` is not an adapter: there is no {CONFIG} in it",
        "an adapter is a run's folder, or a hub id as `owner/name`",
    )


def _checkpoints(path: Path) -> list[str]:
    """The names of the checkpoints in a run's folder, the oldest first."""
    found = [p.name for p in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", p.name)]
    return sorted(found, key=lambda name: int(name.rpartition("-")[2]))


def _unfinished(work: Path, name: str) -> tuple[str, str]:
    """(what it is, what to do) for an unfinished run in the folder `work`."""
    points = _checkpoints(work)
    shown = ", ".join([*(["…"] if points[:-MOST_NAMED] else []), *points[-MOST_NAMED:]])
    target = str(work).removesuffix(PARTIAL)
    return (
        f"`{name}` is an unfinished run: its adapters are in {shown}",
        f"name one, e.g. {shlex.quote(str(work / points[-1]))}; "
        f"lorafit train --resume {shlex.quote(target)} finishes the run",
    )


def _just_begun(name: str) -> tuple[str, str]:
    """(what it is, what to do) for an unfinished run without a checkpoint."""
    target = shlex.quote(name.removesuffix(PARTIAL))
    return (
        f"`{name}` is an unfinished run, and has no checkpoint yet",
        f"lorafit train --resume {target} finishes it",
    )


def _converting(path: Path) -> str:
    """The command that writes an adapter's pickled weights as safetensors, without running what they hold."""
    program = (
        "import torch; from safetensors.torch import save_file; "
        f"w = torch.load({PICKLED!r}, map_location='cpu', weights_only=True); "
        f"save_file({{k: v.clone().contiguous() for k, v in w.items()}}, {WEIGHTS!r})"
    )
    return f'cd {shlex.quote(str(path))} && python -c "{program}"'


def write_base(
    folder: Path, name: str, fingerprint: str, quantize: str = "none", tokenizer: Sequence[str] = ()
) -> None:
    """Keep what an adapter was trained on beside it: `base.json`. `fingerprint` is the identity of the
    base's weights (model.identity), `quantize` how they were quantised when they were loaded, `tokenizer` the names of
    its files."""
    found = {"model": name, "fingerprint": fingerprint, "quantize": quantize, "tokenizer": [*tokenizer]}
    (folder / BASE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def recorded_tokenizer(folder: Path) -> list[str]:
    """The names of the files that a run's tokenizer is made of, as the run recorded them."""
    try:
        return [*map(str, json.loads((folder / BASE).read_text(encoding="utf-8"))["tokenizer"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def check_base(folder: str | Path, place: str) -> str:
    """Compare a base's weights with those that an adapter of lorafit's was trained on.

    Returns the identity of the base, where it was compared; empty where the adapter does not say what it was trained on.
    Raises RequestError when they differ.
    """
    wanted = _recorded(folder, "fingerprint")
    if not wanted:
        return ""
    # earlier versions kept 32 digits of samples
    found = sampled(place) if len(wanted) == OLD_DIGITS else fingerprint(place)
    if wanted and found and wanted != found:
        raise RequestError(
            f"`{folder}` was not trained on `{place}`: the weights differ, or have changed since",
            "--model names the base it was trained on",
        )
    return found


def recorded_quantize(folder: str | Path) -> str:
    """How the base was quantised that an adapter of lorafit's was trained on: `nf4`, `int8` or `none`."""
    return _recorded(folder, "quantize") or "none"


def _recorded(folder: str | Path, name: str) -> str:
    """A value of an adapter's `base.json`; empty where it is not of ours: what it was trained on is not known."""
    try:
        return str(json.loads((run_of(folder) / BASE).read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def run_of(folder: str | Path) -> Path:
    """The run that an adapter belongs to: its own folder, or that of the run whose checkpoint it is."""
    path = Path(folder).expanduser()
    inside = re.fullmatch(r"checkpoint-[0-9]+|last-good", path.name) and (path.parent / BASE).is_file()
    return path.parent if inside else path


def base_of(folder: str | Path) -> str:
    """The model an adapter names as its base, a hub id with `@revision` where the adapter names one.

    Raises RequestError when it names none.
    """
    config = read_config(folder)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise RequestError(f"the adapter `{folder}` names no base model", "name it with --model")
    named = isinstance(revision, str) and revision and HUB_ID.fullmatch(base) and not Path(base).exists()
    return f"{base}@{revision}" if named else base


def tensor_names(folder: str | Path) -> list[str]:
    """The names of the tensors in an adapter. Raises RequestError when the file is damaged."""
    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise RequestError(f"`{path}` is damaged: {error}") from None
