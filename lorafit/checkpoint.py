"""What is kept on disk while a run goes on, and how its folder comes to be: whole or not at all.

A run writes into `NAME.partial` beside its target and renames it at the end, so a folder of
the target's name is always a finished run. In it lie `checkpoint-N` folders, each written
beside its name and renamed. No pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorafit.errors import RequestError

PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run will stand, and where it is written until it is whole."""

    target: Path

    @property
    def work(self) -> Path:
        return self.target.with_name(self.target.name + PARTIAL)

    @property
    def checkpoints(self) -> list[Path]:
        """The whole checkpoints of an unfinished run, the oldest first."""
        found = [p for p in self.work.glob("checkpoint-*") if (p / "state.json").is_file()]
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))

    def open(self, overwrite: bool, resume: bool) -> None:
        """Make the working folder.

        Raises RequestError when the target is there and may not be replaced, or when an
        unfinished run lies there and is neither resumed nor replaced.
        """
        if self.target.exists() and not overwrite:
            raise RequestError(f"`{self.target}` exists", "another -o, or --overwrite to replace it")
        if resume:
            self.work.mkdir(parents=True, exist_ok=True)
            return
        if self.checkpoints and not overwrite:
            raise RequestError(
                f"an unfinished run lies in `{self.work}`", "--resume to go on, --overwrite to start anew"
            )
        try:
            if self.work.exists():
                shutil.rmtree(self.work)
            self.work.mkdir(parents=True)
        except OSError as error:
            raise RequestError(f"cannot write `{self.work}`: {error.strerror}") from None

    def finish(self) -> None:
        """Put the finished run in its place; what stood there goes only then."""
        for checkpoint in self.work.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        put_in_place(self.work, self.target)

    def abandon(self) -> None:
        """Leave nothing behind of a run that kept nothing worth going on from."""
        if not self.checkpoints:
            shutil.rmtree(self.work, ignore_errors=True)


def put_in_place(work: Path, target: Path) -> None:
    """Rename a finished folder to its target; an older one there is moved aside first, then removed."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
    work.rename(target)
    if old.exists():
        shutil.rmtree(old)


def free_name(folder: Path, stem: str) -> Path:
    """`folder/stem-1`, or the first number that neither a run nor an unfinished one has."""
    number = 1
    while (folder / f"{stem}-{number}").exists() or (folder / f"{stem}-{number}{PARTIAL}").exists():
        number += 1
    return folder / f"{stem}-{number}"


def save(
    folder: Path,
    step: int,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write `checkpoint-STEP`: adapters, AdamW's moments, random state, and the loop's own `state`."""
    beside = folder / f".checkpoint-{step}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(
        {name: p.detach().contiguous() for name, p in parameters.items()}, beside / "adapter.safetensors"
    )
    moments = {
        f"{name}/{key}": value.detach().contiguous() if torch.is_tensor(value) else torch.tensor(value)
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    save_file(moments, beside / "optimizer.safetensors")
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random |= {f"cuda:{n}": s for n, s in enumerate(torch.cuda.get_rng_state_all())}
    save_file(random, beside / "random.safetensors")
    (beside / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    target = folder / f"checkpoint-{step}"
    put_in_place(beside, target)
    return target


def restore(
    folder: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint back into adapters, optimizer and random state; returns the loop's state.

    Raises RequestError when it does not fit this run.
    """
    saved = load_file(folder / "adapter.safetensors")
    if saved.keys() != parameters.keys():
        raise RequestError(
            f"`{folder}` holds other adapters than this run plans", "resume with the options it began with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if saved[name].shape != parameter.shape:
                raise RequestError(
                    f"`{folder}`: `{name}` has shape {tuple(saved[name].shape)}, not {tuple(parameter.shape)}",
                    "resume with the options it began with",
                )
            parameter.copy_(saved[name])
    moments = load_file(folder / "optimizer.safetensors")
    for name, parameter in parameters.items():
        for key, value in moments.items():
            owner, _, kind = key.rpartition("/")
            if owner == name:
                place = parameter.device if kind != "step" else value.device
                optimizer.state[parameter][kind] = value.to(place)
    random = load_file(folder / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if f"cuda:{number}" in random:
                torch.cuda.set_rng_state(random[f"cuda:{number}"], number)
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))
