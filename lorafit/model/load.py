"""The model with its weights, its tokenizer, and the device and dtype they are used in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import RequestError, RunError
from lorafit.model.chart import chart_of
from lorafit.model.checkpoint import check_tokenizer
from lorafit.model.classes import config_of, model_class, on_meta
from lorafit.model.quantised import NONE, held_as, stored_quantisation
from lorafit.model.source import ModelSource, first_line, split_revision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU when there is one. Raises RequestError."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise RequestError(f"there is no device `{name}` here", "--device cpu, or auto") from None
    if device.type == "meta":
        raise RequestError("the meta device holds no weights to train", "--device cpu, or auto")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the base weights; `auto` is bfloat16 on a GPU that computes in it, else float32."""
    import torch

    if name != "auto":
        asked: torch.dtype = getattr(torch, name)
        return asked
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _kind(source: ModelSource) -> str:
    return "quantised " if source.config.get("quantization_config") else ""


def load_model(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str = NONE,
    attention: str = "auto",
) -> PreTrainedModel:
    """The model with its weights, all of them frozen, in `eval` mode. `attention` is the implementation, by
    transformers' name; the linear layers are quantised where `quantize` or the checkpoint says so.

    Raises RequestError when there are no weights, they do not fill the model or it has no such attention,
    RunError when memory does not suffice.
    """
    import torch
    from transformers.utils import logging

    from lorafit.model.headers import open_file, shards

    config = config_of(source)
    cls = model_class(config)
    arguments, settled = _quantised(source, cls, dtype, device, quantize)
    place = source.place
    name, revision = split_revision(place)
    if Path(place).is_file():
        raise RequestError(
            f"`{place}` is a config without weights", "to train, name a folder that holds both"
        )
    if Path(place).is_dir():
        files = shards(Path(place))
        for path in files:
            open_file(path)  # a file that is cut short or damaged is named
        if not files and not any(path.suffix == ".bin" for path in Path(place).iterdir()):
            raise RequestError(f"there are no weights in `{source.name}`: no .safetensors file")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = cls.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, local_files_only=source.local,
            ignore_mismatched_sizes=True, revision=revision or "main",
            attn_implementation=None if attention == "auto" else attention, **arguments,
        )  # fmt: skip
        model, info = settled(loaded[0]), loaded[1]
    except torch.OutOfMemoryError:
        raise RunError(
            f"`{source.name}` does not fit on {device}", "a smaller dtype or model, or another --device"
        ) from None
    except RunError:
        raise
    except Exception as error:  # safetensors, the hub and the loader each have kinds of their own
        if attention != "auto" and "attention" in str(error).lower():
            said = f"--attention {attention}: {first_line(error)}"
            raise RequestError(said, "--attention sdpa, or auto") from error
        raise RequestError(
            f"the {_kind(source)}weights of `{source.name}` cannot be loaded: {first_line(error)}",
            "check that the files are whole",
        ) from error
    finally:
        logging.set_verbosity(level)
    for name, stored, wanted in sorted(info["mismatched_keys"])[:1]:
        raise RequestError(
            f"`{name}` of `{source.name}` is {tuple(stored)}, and its config makes it {tuple(wanted)}",
            "the weights belong to another config",
        )
    lost = sorted(info["missing_keys"])
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise RequestError(
            f"the weights of `{source.name}` do not fill a {cls.__name__}: `{lost[0]}`{more} missing",
            "a checkpoint of a bare encoder has no language-model head to train with",
        )
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def _quantised(
    source: ModelSource, cls: type[PreTrainedModel], dtype: torch.dtype, device: torch.device, quantize: str
) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """(more arguments for loading, what is done with a loaded model): how its linear layers are held in few
    bits, if at all, and how it comes to the device."""
    arguments: dict[str, Any] = {"device_map": {"": device}}  # each tensor goes there as it is read
    if quantize == NONE and stored_quantisation(source.config) is None:
        return arguments if device.type == "cuda" else {}, lambda model: model.to(device)
    from lorafit.model.quantised_linear import loading, settle_layers

    found = chart_of(source)
    held, names = held_as(found, quantize), set(found.quantisable)
    assert held is not None
    held.check(str(dtype).removeprefix("torch."), device.type)
    if not held.stored:
        arguments["quantization_config"] = loading(held, dtype, on_meta(cls, config_of(source)), names)

    def settled(model: Any) -> Any:
        settle_layers(model, held, dtype, names)
        return model

    return arguments, settled


def load_tokenizer(place: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises RequestError when there is none or it cannot be read."""
    check_tokenizer(name, Path(place))
    from transformers import AutoTokenizer

    try:
        owner, revision = split_revision(place)
        found = AutoTokenizer.from_pretrained(
            owner,
            trust_remote_code=False,
            local_files_only=Path(place).exists(),
            revision=revision or "main",
        )
    except Exception as error:  # tokenizers raise bare Exceptions
        raise RequestError(
            f"the tokenizer of `{name}` cannot be read: {first_line(error)}",
            "copy the tokenizer's files again from where the model came from; --debug shows more",
        ) from error
    found.name_or_path = place  # its revision too: a run's folder gets the files that lie there
    return found


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The dtype that most of a model's weights are stored in, by the headers of its files; by its config
    where those are not there, float32 where that does not say."""
    import torch

    from lorafit.model.headers import dtype_of, stored_tensors
    from lorafit.model.identity import PICKLED, local_folder

    folder = local_folder(source.place)
    found = dtype_of(stored_tensors(folder).values()) if folder is not None else ""
    if found:
        stored: torch.dtype = getattr(torch, found)
        return stored
    if folder is not None and (folder / PICKLED).is_file():
        with suppress(Exception):  # an old format that cannot be mapped, or a damaged file: loading names it
            tensors = torch.load(folder / PICKLED, map_location="cpu", mmap=True, weights_only=True).values()
            sizes: Counter[torch.dtype] = Counter()
            for tensor in tensors:
                if tensor.is_floating_point():
                    sizes[tensor.dtype] += tensor.nbytes
            return sizes.most_common(1)[0][0]
    text = source.config.get("text_config")
    name = source.config.get("dtype") or source.config.get("torch_dtype")
    if name is None and isinstance(text, dict):
        name = text.get("dtype") or text.get("torch_dtype")
    kind = getattr(torch, str(name).removeprefix("torch."), None)
    return kind if isinstance(kind, torch.dtype) and kind.is_floating_point else torch.float32
