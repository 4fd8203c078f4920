"""A model of which only a part is held: the blocks below the cut are read from the checkpoint while they run.

Names and layouts of a checkpoint are turned into the model's by transformers' own conversion
(transformers.core_model_loading), on the tensors of a few blocks at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from lorafit.errors import RequestError, RunError
from lorafit.model.classes import config_of, model_class
from lorafit.model.download import download_weights
from lorafit.model.headers import TensorEntry, TensorFile, open_file, shards
from lorafit.model.identity import local_folder, stream_refusal
from lorafit.model.safetensors_io import read_tensor
from lorafit.model.source import ModelSource, first_line, split_revision

Stored = tuple[TensorFile, TensorEntry]


@dataclass(slots=True)
class Streamed:
    """A frozen model whose first `cut` blocks of `stack` hold no weights except in `held`.

    `homes` are the checkpoint's tensors of each block, by number, and under -1 all others. `read` counts the
    bytes that were read.
    """

    model: Any
    stack: str
    cut: int
    homes: dict[int, list[Stored]]
    settings: Any  # transformers' LoadStateDictConfig
    marks: dict[Path, tuple[int, int]] = field(default_factory=dict)  # size and time of change of each file
    read: int = 0
    blocks: dict[str, torch.nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        children = list(self.model.get_submodule(self.stack).named_children())
        self.blocks = dict(children[: self.cut])

    def bytes_of(self, first: int, last: int) -> int:
        """The bytes of these blocks in the checkpoint."""
        return sum(entry.stop - entry.start for n in range(first, last) for _, entry in self.homes.get(n, ()))

    @contextmanager
    def held(self, first: int, last: int) -> Iterator[None]:
        """While here, the blocks from `first` to before `last` hold their weights.

        Raises RunError where a file became shorter or cannot be read, or the tensors do not fill the blocks.
        """
        last = min(last, self.cut)  # those above are held
        with self._all_in_place():
            self._load([stored for number in range(first, last) for stored in self.homes.get(number, ())])
            for number in range(first, last):
                check_filled(self.model, f"{self.stack}.{number}")
        try:
            yield
        finally:
            for number in range(first, last):
                let_go(self.blocks[str(number)])

    @contextmanager
    def _all_in_place(self) -> Iterator[None]:
        """While here, the streamed blocks stand in the stack, and not what stands in for them."""
        stack = self.model.get_submodule(self.stack)
        before = {name: getattr(stack, name) for name in self.blocks}
        try:
            for name, block in self.blocks.items():
                setattr(stack, name, block)
            yield
        finally:
            for name, module in before.items():
                setattr(stack, name, module)

    def load_rest(self) -> None:
        """Read all but the streamed blocks."""
        self._load(self.homes.get(-1, ()))
        self.model.tie_weights()
        below = tuple(f"{self.stack}.{number}." for number in range(self.cut))
        check_filled(self.model, "", but=below)

    def check_unchanged(self) -> None:
        """Raises RunError where a file of the checkpoint was changed since it was opened."""
        for path, mark in self.marks.items():
            if _mark(path) != mark:
                raise RunError(f"`{path}` changed while it was read", "run the command again")

    def _load(self, stored: Sequence[Stored]) -> None:
        """Read these tensors into the model."""
        load_tensors(self.model, stored, self.settings)
        self.read += sum(entry.stop - entry.start for _, entry in stored)


def load_tensors(
    model: Any,
    stored: Sequence[Stored],
    settings: Any,
    read: Callable[[TensorFile, TensorEntry], Any] = read_tensor,
) -> None:
    """Put these tensors of a checkpoint into a model, under its names and in its layout: what `read` makes of
    each is a tensor, or what transformers takes for one.

    Raises RunError where a file became shorter or cannot be read, or a tensor does not fit the model.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model as convert

    try:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        tensors = {entry.name: read(file, entry) for file, entry in stored}
        with _silently():
            info, _ = convert(model, tensors, settings)
    except OSError as error:
        raise RunError(f"cannot read the weights: {error.strerror}", "check the checkpoint's files") from None
    if info.mismatched_keys or info.conversion_errors or info.error_msgs:
        odd = [name for name, *_ in info.mismatched_keys] + list(info.conversion_errors) + info.error_msgs
        raise RunError(
            f"the checkpoint does not fit the model at `{odd[0]}`", "check that the files are whole"
        )
    for name, parameter in model.named_parameters():
        if name not in trained and parameter.requires_grad:  # the loader makes new ones
            parameter.requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Unfilled:
    """A frozen model whose weights are not read yet, and the tensors of its checkpoint."""

    model: Any
    files: Sequence[TensorFile]
    settings: Any  # transformers' LoadStateDictConfig

    def homes(self, of: Callable[[str], int]) -> dict[int, list[Stored]]:
        """The checkpoint's tensors by the number that `of` gives the name each has in the model."""
        found: dict[int, list[Stored]] = {}
        renamed = self.names()
        for file in self.files:
            for entry in file.entries:
                found.setdefault(of(renamed(entry.name)[0]), []).append((file, entry))
        return found

    def names(self) -> Callable[[str], tuple[str, bool]]:
        """(its name in the model, as transformers' loader finds it; whether some rows of it become some rows
        there) of a tensor of the checkpoint. The name of one that is turned into several is that of the first."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        names, prefix = self.model.state_dict(), self.model.base_model_prefix
        mapping = self.settings.weight_mapping or []
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        by_rows = {name: _by_rows(each) for each in converters for name in each.source_patterns}

        def renamed(name: str) -> tuple[str, bool]:
            found, pattern = rename_source_key(name, renamings, converters, prefix, names)
            if found not in names and name in names:
                found, pattern = rename_source_key(name, [], [], prefix, names)
            return found, by_rows.get(pattern or "", True)

        return renamed


def _by_rows(converter: Any) -> bool:
    """Whether a conversion of transformers' stacks tensors, experts of a mixture, and leaves each as it is: then
    those that a process holds are made of those alone. Others mix the rows."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *others = converter.operations or [None]
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(each, Concatenate) and each.dim > 0 for each in others)


def build(source: ModelSource, dtype: torch.dtype, device: torch.device, attention: str) -> Unfilled:
    """The model in `eval` mode, frozen, on the meta device but for its buffers.

    Raises RequestError where it cannot be built.
    """
    from accelerate import init_empty_weights
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    folder = local_folder(source.place)
    assert folder is not None
    config = config_of(source)
    config.name_or_path = split_revision(source.place)[0]  # adapters name it as their base
    named = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        with _silently(), init_empty_weights(include_buffers=False):
            model: Any = model_class(config)._from_config(config, dtype=dtype, **named)
    except Exception as error:  # a model class may raise anything on a config it does not expect
        raise RequestError(f"`{source.name}` cannot be built: {first_line(error)}") from error
    model = model.requires_grad_(False).eval()
    for name, buffer in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer.to(device)
    settings = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": device},
        weight_mapping=cast(Any, get_model_conversion_mapping(model)),
        ignore_mismatched_sizes=True,
    )
    return Unfilled(model, [open_file(path) for path in shards(folder)], settings)


def load_streamed(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    stack: str,
    cut: int,
    attention: str = "auto",
) -> Streamed:
    """The model in `eval` mode, frozen, with the weights of all but the first `cut` blocks of `stack`.

    Raises RequestError where the checkpoint cannot be read so or does not fill the model.
    """
    download_weights(source)
    if reason := stream_refusal(source.place):
        raise RequestError(f"the layers cannot be streamed: {reason}", "--prefix-residency resident")
    made, block = build(source, dtype, device, attention), re.compile(re.escape(stack) + r"\.(\d+)\.")

    def home(name: str) -> int:
        found = block.match(name)
        return int(found[1]) if found and int(found[1]) < cut else -1

    marks = {file.path: _mark(file.path) for file in made.files}
    streamed = Streamed(made.model, stack, cut, made.homes(home), made.settings, marks)
    try:
        streamed.load_rest()
    except RunError as error:
        raise RequestError(f"the weights of `{source.name}`: {error.message}", error.hint) from None
    return streamed


def let_go(module: torch.nn.Module) -> None:
    """Give back the memory of a module's parameters: they keep their shape and hold no values."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                owner._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)


def check_filled(model: Any, name: str, but: tuple[str, ...] = ()) -> None:
    """Raises RunError when a parameter of a module has no values, except under the names in `but`."""
    prefix = f"{name}." if name else ""
    for own, parameter in model.get_submodule(name).named_parameters():
        if parameter.is_meta and not f"{prefix}{own}".startswith(but or ("\0",)):
            raise RunError(f"`{prefix}{own}` is not in the checkpoint", "check that the files are whole")


def _mark(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextmanager
def _silently() -> Iterator[None]:
    """Without transformers' progress bars and notes."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
