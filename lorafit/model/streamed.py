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
                _check_filled(self.model, f"{self.stack}.{number}")
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
        _check_filled(self.model, "", but=below)

    def check_unchanged(self) -> None:
        """Raises RunError where a file of the checkpoint was changed since it was opened."""
        for path, mark in self.marks.items():
            if _mark(path) != mark:
                raise RunError(f"`{path}` changed while it was read", "run the command again")

    def _load(self, stored: Sequence[Stored]) -> None:
        """Read these tensors into the model, under its names and in its layout."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model as convert

        try:
            tensors = {entry.name: read_tensor(file, entry) for file, entry in stored}
        except OSError as error:
            raise RunError(
                f"cannot read the weights: {error.strerror}", "check the checkpoint's files"
            ) from None
        self.read += sum(entry.stop - entry.start for _, entry in stored)
        with _silently():
            info, _ = convert(self.model, tensors, self.settings)
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            odd = [name for name, *_ in info.mismatched_keys] + list(info.conversion_errors) + info.error_msgs
            raise RunError(
                f"the checkpoint does not fit the model at `{odd[0]}`", "check that the files are whole"
            )
        for name, parameter in self.model.named_parameters():
            if "lora_" not in name and parameter.requires_grad:
                parameter.requires_grad_(False)


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
    from accelerate import init_empty_weights
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    if reason := stream_refusal(source.place):
        raise RequestError(f"the layers cannot be streamed: {reason}", "--prefix-residency resident")
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
    files = [open_file(path) for path in shards(folder)]
    settings = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": device},
        weight_mapping=cast(Any, get_model_conversion_mapping(model)),
        ignore_mismatched_sizes=True,
    )
    homes: dict[int, list[Stored]] = {}
    block = re.compile(re.escape(stack) + r"\.(\d+)\.")
    renamed = _renamer(model, settings.weight_mapping or [])
    for file in files:
        for entry in file.entries:
            found = block.match(renamed(entry.name))
            number = int(found[1]) if found and int(found[1]) < cut else -1
            homes.setdefault(number, []).append((file, entry))
    streamed = Streamed(model, stack, cut, homes, settings, {file.path: _mark(file.path) for file in files})
    try:
        streamed.load_rest()
    except RunError as error:
        raise RequestError(f"the weights of `{source.name}`: {error.message}", error.hint) from None
    return streamed


def _renamer(model: Any, mapping: Sequence[Any]) -> Callable[[str], str]:
    """The name in the model of a tensor of the checkpoint, as transformers' loader finds it; of one that is
    turned into several, that of the first."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    names = model.state_dict()
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]

    def renamed(name: str) -> str:
        found: str = rename_source_key(name, renamings, converters, model.base_model_prefix, names)[0]
        if found not in names and name in names:
            found = rename_source_key(name, [], [], model.base_model_prefix, names)[0]
        return found

    return renamed


def let_go(module: torch.nn.Module) -> None:
    """Give back the memory of a module's parameters: they keep their shape and hold no values."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                owner._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)


def _check_filled(model: Any, name: str, but: tuple[str, ...] = ()) -> None:
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
