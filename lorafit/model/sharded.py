"""A model of which each process holds its rows: FSDP2 gathers a block from all of them while it runs.

Blocks are units of `fully_shard`, and so is an input embedding that nothing else uses; norms and the output layer
are whole on each process. A process reads its own rows of the checkpoint's tensors and no others. What is trained
is put in afterwards: it is no part of a unit, and whole on each process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from lorafit.distributed import World
from lorafit.errors import RequestError, RunError
from lorafit.model.download import download_weights
from lorafit.model.headers import TensorEntry, TensorFile
from lorafit.model.identity import shard_refusal, stream_refusal
from lorafit.model.safetensors_io import read_tensor, rows_of
from lorafit.model.source import ModelSource, first_line
from lorafit.model.streamed import Stored, Unfilled, build, check_filled, load_tensors


@dataclass(frozen=True, slots=True)
class Sharded:
    """A frozen model, sharded; `roots` are the modules that hold its blocks."""

    model: Any
    roots: tuple[Any, ...]

    def after_end(self) -> None:
        """Make it ready for the next pass where one was ended within the model."""
        for root in self.roots:
            root.reset_iter_state()

    @property
    def held_bytes(self) -> int:
        """The bytes of its weights that this process holds."""
        return sum(local(p).nbytes for p in self.model.parameters() if not p.requires_grad)


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor of a checkpoint as transformers' loader takes one: what is read is what is indexed."""

    file: TensorFile
    entry: TensorEntry

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is Ellipsis or not index:
            return read_tensor(self.file, self.entry)
        first, *others = index
        start, stop, _ = first.indices(self.entry.shape[0])
        within = (slice(None), *others)
        return rows_of(self.file, self.entry, start, stop - start)[within]


def load_sharded(
    source: ModelSource,
    stacks: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    world: World,
    attention: str = "auto",
) -> Sharded:
    """The model in `eval` mode, frozen, the blocks of these stacks divided among all processes.

    Raises RequestError where the checkpoint cannot be read so or does not fill the model, or the model cannot be
    sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    download_weights(source)
    elsewhere = "" if device.type in ("cpu", "cuda") else f"it would be on {device.type}"
    if reason := shard_refusal(source.place) or stream_refusal(source.place) or elsewhere:
        raise RequestError(f"the base cannot be sharded: {reason}", "leave out --shard")
    made = build(source, dtype, device, attention)
    model = made.model
    model.tie_weights()
    mesh = init_device_mesh(device.type, (world.size,))
    units = _units(model, stacks)
    stored, by_rows = _homes(made, list(units))
    try:
        for name, unit in units.items():
            if not by_rows[name]:  # its tensors are made of whole ones
                load_tensors(model, stored[name], made.settings)
            scalars = {p for p in unit.parameters() if p.ndim == 0}
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
            if by_rows[name]:
                load_tensors(model, stored[name], made.settings, Rows)
        load_tensors(model, stored[""], made.settings)
        model.tie_weights()
        check_filled(model, "")
        roots = [model.get_submodule(name) for name in _parents(stacks)]
        for root in roots:
            fully_shard(root, mesh=mesh, reshard_after_forward=True, ignored_params=set(root.parameters()))
    except RunError as error:
        raise RequestError(f"the weights of `{source.name}`: {error.message}", error.hint) from None
    # torch's fully_shard raises these for layouts that it does not take; the error is shown, with what to do
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise RequestError(
            f"`{source.name}` cannot be sharded: {first_line(error)}", "leave out --shard"
        ) from error
    return Sharded(model, tuple(roots))


def _units(model: Any, stacks: Sequence[str]) -> dict[str, torch.nn.Module]:
    """What is gathered at once, by name: each block, and the input embedding where its weight is used there alone."""
    units = {
        f"{path}.{n}": block for path in stacks for n, block in model.get_submodule(path).named_children()
    }
    embedding: Any = None
    # transformers raises it where a class names no input embedding: then each process holds all of it
    with suppress(NotImplementedError):
        embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    users = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(users) == 1 and not any(users[0].startswith(f"{name}.") for name in units):
        units[users[0].rpartition(".")[0]] = embedding
    return units


def _parents(stacks: Sequence[str]) -> list[str]:
    """The modules that run the stacks, each once; what the model itself runs has none."""
    return list(dict.fromkeys(parent for path in stacks if (parent := path.rpartition(".")[0])))


def _homes(made: Unfilled, units: Sequence[str]) -> tuple[dict[str, list[Stored]], dict[str, bool]]:
    """(the checkpoint's tensors of each unit, by its name, and under "" all others; whether each process can read
    its rows of them alone)."""
    stored: dict[str, list[Stored]] = {name: [] for name in ("", *units)}
    by_rows = dict.fromkeys(units, True)
    one = re.compile("|".join(re.escape(f"{name}.") for name in units))
    renamed = made.names()
    for file in made.files:
        for entry in file.entries:
            name, stays = renamed(entry.name)
            found = one.match(name)
            home = found[0][:-1] if found else ""
            stored[home].append((file, entry))
            if home and not stays:
                by_rows[home] = False
    return stored, by_rows


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor that this process holds: all of one that is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
