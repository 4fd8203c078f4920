"""The base model of an adapter: found by name, its weights compared with those it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lorafit.adapter.folder import CONFIG, base_of, check_base, check_values, read_config, run_of
from lorafit.errors import RequestError
from lorafit.model import HUB_ID, ModelMap, ModelSource, chart_of, find, hub_reached, split_revision


def common_base(adapters: Sequence[str], model: str | None = None) -> tuple[ModelSource, ModelMap]:
    """The base that all of these adapters were trained on, and its map; `model` names it where it is not
    the one they name; None or an empty text is no name.

    Raises RequestError when they name different bases, or the base is missing or has other weights.
    """
    first = adapters[0]
    read_config(first)
    name = model or base_of(first)
    try:
        source = find(name)
    except RequestError as error:
        if model:
            raise
        raise RequestError(
            f"the base of `{first}` was not found: {error.message}", "name it with --model"
        ) from None
    for other in adapters[1:]:
        if not model and base_of(other) != base_of(first):
            raise RequestError(
                f"`{other}` has another base than `{first}`", "take them one by one, or name it with --model"
            )
    for adapter in adapters:
        check_values(adapter)
        check_base(adapter, source.place)
    return source, chart_of(source)


def check_downloaded(adapters: Sequence[str], source: ModelSource) -> None:
    """Once the weights of a base of the Hub are here: compare them with those that these adapters were trained on, as
    `common_base` compares those that were here before. Raises RequestError when they differ."""
    if not source.local:
        for adapter in adapters:
            check_base(adapter, source.place)


def named_alone(name: str, base: str | None) -> bool:
    """Whether a person named a model where an adapter may stand. Raises RequestError when they named a `base` too."""
    alone = is_model(name)
    if base and alone:
        raise RequestError(
            f"`{name}` is a model, and --model `{base}` is the base of an adapter", "leave out --model"
        )
    return alone


def is_model(name: str) -> bool:
    """Whether a person named a model where an adapter may stand: `demo`, a model's folder or its hub id."""
    path = Path(name).expanduser()
    if name == "demo" or path.exists() or path.is_symlink():
        folder = (path / "config.json").is_file() and not (path / CONFIG).is_file()
        return folder if path.exists() else name == "demo"
    hub, revision = split_revision(name)
    if not HUB_ID.fullmatch(hub) or name.startswith((".", "/", "~")):
        return False
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    with suppress(Exception):  # a name that the hub does not take
        for file in (CONFIG, "config.json"):
            if isinstance(try_to_load_from_cache(hub, file, revision=revision or None), str):
                return file != CONFIG
    if "/" not in hub:  # a folder's name, misspelt
        return False
    if not hub_reached():
        return False
    try:
        hf_hub_download(hub, CONFIG, revision=revision or None)
    except Exception as error:  # whoever loads it says what else is wrong
        return type(error).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError")
    return False


def tokenizer_place(adapter: str, base: str) -> str:
    """The folder of an adapter's own tokenizer, where it has one, else `base`."""
    own = run_of(adapter)
    names = ("tokenizer.json", "tokenizer_config.json")
    return str(own) if any((own / name).is_file() for name in names) else base
