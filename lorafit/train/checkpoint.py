"""Checkpoints: the adapter, the optimizer's state, random state and the loop's own, whole or not there.

Each is written beside its name, sealed with digests and renamed, and is an adapter that `lorafit eval` and
`lorafit merge` take. No pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from lorafit.adapter import save_adapter
from lorafit.digests import check, seal
from lorafit.errors import RequestError
from lorafit.outputs import put_in_place, sync
from lorafit.train.run_folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel


# What a checkpoint has beside the adapter.
STATE_FILES = ("parameters.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")

PARAMETERS, MOMENTS, RANDOM, STATE = STATE_FILES


def save_checkpoint(
    folder: Path,
    step: int,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write `checkpoint-STEP`: the adapter, the optimizer's state, random state, and the loop's own `state`.

    The adapter is there twice: as PEFT writes it, for everyone, and by the parameters' own names,
    from which it comes back to the bit. Raises OSError or SafetensorError where the disk is full.
    """
    beside = folder / f".checkpoint-{step}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    parameters = trainable(model)
    try:
        save_adapter(model, beside)
        save_file(
            {name: p.detach().contiguous() for name, p in parameters.items()},
            beside / PARAMETERS,
        )
        tensors, scalars = _optimizer_state(parameters, optimizer)
        save_file(tensors, beside / MOMENTS)
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random |= {f"cuda:{n}": s for n, s in enumerate(torch.cuda.get_rng_state_all())}
        save_file(random, beside / RANDOM)
        (beside / STATE).write_text(
            json.dumps({"step": step, "optimizer": scalars, **state}), encoding="utf-8"
        )
        seal(beside)
        permissions = (beside / STATE).stat().st_mode & 0o777
        for path in (*beside.iterdir(), beside):
            if path.suffix == ".safetensors":  # which safetensors 0.8 writes for the owner alone
                path.chmod(permissions)
            sync(path)
        target = folder / f"checkpoint-{step}"
        put_in_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _optimizer_state(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, plain numbers) of an optimizer's state, each as `PARAMETER/KEY`.

    A number stays one: as a tensor it would lose digits. A tensor that several parameters share (8-bit
    AdamW's table of values) is written for each, since a file holds no tensor twice.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    seen: set[int] = set()
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not torch.is_tensor(value):
                scalars[f"{name}/{key}"] = value
                continue
            value = value.detach().contiguous()
            shared = value.data_ptr() in seen
            seen.add(value.data_ptr())
            tensors[f"{name}/{key}"] = value.clone() if shared else value
    return tensors, scalars


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def last_whole(folder: RunFolder) -> tuple[Path | None, list[str]]:
    """The last checkpoint that is what was written, and what is wrong with those after it.

    Raises RequestError when there are some and all of them are damaged.
    """
    wrong = []
    for path in reversed(folder.checkpoints):
        try:
            check(path)
        except RequestError as error:
            wrong.append(error.message)
            continue
        return path, wrong
    if wrong:
        raise RequestError(f"no checkpoint is whole: {wrong[0]}", "--overwrite to start again")
    return None, []


def state_of(folder: Path) -> dict[str, Any]:
    """The loop's own state in a checkpoint."""
    found: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return found


def restore_parameters(folder: Path, model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Put a checkpoint back into the adapters; their parameters.

    Raises RequestError when it does not fit this run.
    """
    parameters = trainable(model)
    saved = load_file(folder / PARAMETERS)
    if saved.keys() != parameters.keys():
        raise RequestError(
            f"the parameters in `{folder}` are not those that this run trains",
            "resume with the options it began with",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if saved[name].shape != parameter.shape:
                raise RequestError(
                    f"`{folder}`: `{name}` has shape {tuple(saved[name].shape)}, not {tuple(parameter.shape)}",
                    "resume with the options it began with",
                )
            parameter.copy_(saved[name])
    return parameters


def restore(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint back into adapters and optimizer.

    Raises RequestError when it does not fit this run.
    """
    parameters = restore_parameters(folder, model)
    for key, value in load_file(folder / MOMENTS).items():
        owner, _, kind = key.rpartition("/")
        parameter = parameters[owner]
        # a copy: what is read from a file may be the file itself, which Windows does not remove while it is in use
        optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)
    for key, number in state_of(folder).get("optimizer", {}).items():
        owner, _, kind = key.rpartition("/")
        optimizer.state[parameters[owner]][kind] = number


def restore_random(folder: Path) -> None:
    """Put a checkpoint's random state back: the last thing before the run goes on."""
    random = load_file(folder / RANDOM)
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if f"cuda:{number}" in random:
                torch.cuda.set_rng_state(random[f"cuda:{number}"], number)
