"""What is kept on disk while a run goes on, and how its folder comes to be: whole or not at all.

A run writes into `NAME.partial` beside its target and renames it at the end, so a folder of
the target's name is always a finished run. In it lie `checkpoint-N` folders, each written
beside its name and renamed. No pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorafit.errors import RequestError

PARTIAL, RUNS = ".partial", "runs"


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
        found = [
            p
            for p in self.work.glob("checkpoint-*")
            if re.fullmatch(r"checkpoint-[0-9]+", p.name) and (p / "state.json").is_file()
        ]
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))

    def open(self, overwrite: bool, resume: bool) -> None:
        """Make the working folder.

        Raises RequestError when the target is there and may not be replaced, or when an
        unfinished run lies there and is neither resumed nor replaced.
        """
        check_target(self.target, overwrite)
        try:
            if overwrite and not resume and self.work.exists():
                shutil.rmtree(self.work)
            self.work.mkdir(parents=True, exist_ok=resume)
        except FileExistsError:
            if not self.work.is_dir():
                raise RequestError(f"`{self.work}` is a file", "another -o") from None
            raise RequestError(
                f"an unfinished run lies in `{self.work}`, or one is being written",
                "--resume to go on with it, --overwrite to start anew",
            ) from None
        except OSError as error:
            raise RequestError(f"cannot write `{self.work}`: {error.strerror}") from None

    def finish(self) -> None:
        """Put the finished run in its place; what stood there goes only then."""
        put_in_place(self.work, self.target)
        for checkpoint in self.target.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def abandon(self) -> None:
        """Leave nothing behind of a run that kept nothing worth going on from."""
        if self.checkpoints or (self.work / "adapter_model.safetensors").is_file():
            return
        shutil.rmtree(self.work, ignore_errors=True)
        if self.work.parent.name == RUNS:
            with suppress(OSError):  # it holds other runs
                self.work.parent.rmdir()


def check_target(target: Path, overwrite: bool, kept: Sequence[Path] = ()) -> None:
    """Whether a folder may be made at `target`.

    Raises RequestError when something is there that may not be replaced: without `overwrite`
    anything, with it all but an empty folder, a run or a model; and ever what holds `kept`.
    """
    if target.name in ("", ".."):
        raise RequestError(f"`{target}` is no name for a new folder", "-o DIR names one")
    if target.is_symlink() and not target.exists():
        raise RequestError(f"`{target}` is a link to nothing", "another -o")
    if not target.exists():
        return
    if not target.is_dir():
        raise RequestError(f"`{target}` is a file", "another -o")
    if not overwrite:
        raise RequestError(f"`{target}` exists", "another -o, or --overwrite to replace it")
    held = [path for path in kept if path.resolve().is_relative_to(target.resolve())]
    if held:
        raise RequestError(f"`{target}` holds `{held[0]}`, which is needed", "another -o")
    ours = any((target / name).is_file() for name in ("adapter_config.json", "config.json"))
    if not ours and any(target.iterdir()):
        raise RequestError(f"`{target}` is neither a run nor a model: it is not replaced", "another -o")


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


def claim(stem: str) -> RunFolder:
    """`runs/STEM-1` opened, or the first number that neither a run nor an unfinished one has."""
    number = 1
    while True:
        folder = RunFolder(Path(RUNS) / f"{stem}-{number}")
        if not folder.target.exists() and not folder.work.exists():
            with suppress(RequestError):
                folder.open(overwrite=False, resume=False)
                return folder
            if not folder.work.exists():  # not taken by another run: it cannot be written
                folder.open(overwrite=False, resume=False)
        number += 1


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
                optimizer.state[parameter][kind] = value.to(parameter.device)
    random = load_file(folder / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if f"cuda:{number}" in random:
                torch.cuda.set_rng_state(random[f"cuda:{number}"], number)
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))
