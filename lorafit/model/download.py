"""The weight files of a model of the Hub, brought into its cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lorafit.errors import RequestError
from lorafit.model.headers import INDEX, SINGLE, shards
from lorafit.model.identity import local_folder, weight_files
from lorafit.model.network import why_offline
from lorafit.model.source import ModelSource, not_downloaded, split_revision

FETCHED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.txt",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "additional_chat_templates/*",
)


def base_folder(source: ModelSource) -> Path:
    """The folder of a model's files; downloaded, or the rest of them, when it is one of the Hub. Raises RequestError."""
    if source.local:
        return Path(source.place)
    try:
        found = _fetched(source, FETCHED)
        return found if shards(found) else _fetched(source, (*FETCHED, "*.bin"))
    except NotReached:
        kept = local_folder(source.place)
        if kept is not None and weight_files(kept):
            return kept
        raise


def download_weights(source: ModelSource) -> None:
    """Bring the safetensors files of a model of the Hub into its cache, where they are not there: those that
    transformers loads, and no other copies of the weights. Raises RequestError where there are none, or they are not
    reached.
    """
    kept = None if source.local else local_folder(source.place)
    if source.local or (kept is not None and weight_files(kept)):
        return
    found = _fetched(source, ["config.json", SINGLE, INDEX])
    if not (found / SINGLE).is_file() and (found / INDEX).is_file():
        found = _fetched(source, [INDEX, *_named_in(found / INDEX)])
    if weight_files(found):
        return
    if why := why_offline():
        raise RequestError(
            f"the weights of `{source.place}` are not on this machine, and {why}", "check the network"
        )
    raise RequestError(
        f"`{source.place}` has no .safetensors files, and the layers of others cannot be read one by one",
        "--prefix-residency resident, and no --shard",
    )


class NotReached(RequestError):
    """Files of the Hub that could not be had."""


def _fetched(source: ModelSource, names: Sequence[str]) -> Path:
    """The folder of these files of a model of the Hub, as far as it has them. Raises NotReached."""
    from huggingface_hub import snapshot_download

    name, revision = split_revision(source.place)
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(names)))
    except Exception as error:  # each kind of network and hub error is named
        raise NotReached(f"the base `{source.place}`: {not_downloaded(error)}", "check the network") from None


def _named_in(index: Path) -> list[str]:
    """The files that an index names. Raises RequestError for a damaged one."""
    try:
        return sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RequestError(f"`{index}` is damaged: {error}", "download it again") from None
