"""The weight files of a model of the Hub, brought into its cache."""

from __future__ import annotations

from pathlib import Path

from lorafit.errors import RequestError
from lorafit.model.headers import shards
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
    from huggingface_hub import snapshot_download

    name, revision = split_revision(source.place)
    try:
        found = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FETCHED)))
        if not shards(found):
            found = Path(
                snapshot_download(name, revision=revision or None, allow_patterns=[*FETCHED, "*.bin"])
            )
    except RequestError:
        raise
    except Exception as error:  # each kind of network and hub error is named
        kept = local_folder(source.place)
        if kept is not None and weight_files(kept):
            return kept
        raise RequestError(
            f"the base `{source.place}`: {not_downloaded(error)}", "check the network"
        ) from None
    return found


def download_weights(source: ModelSource) -> None:
    """Bring the safetensors files of a model of the Hub into its cache, where they are not there: those of the model
    itself, nothing that lies in folders beside it. Raises RequestError where there are none, or they are not reached.
    """
    kept = None if source.local else local_folder(source.place)
    if source.local or (kept is not None and weight_files(kept)):
        return
    from huggingface_hub import snapshot_download

    name, revision = split_revision(source.place)
    try:
        found = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=["model*.safetensors", "*.safetensors.index.json", "config.json"],
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # each kind of network and hub error is named
        raise RequestError(
            f"the weights of `{source.place}`: {not_downloaded(error)}", "check the network"
        ) from None
    if not weight_files(found):
        why = why_offline() or "it has no .safetensors files"
        raise RequestError(
            f"the weights of `{source.place}` are not on this machine, and {why}",
            "the layers of other files cannot be read one by one: --prefix-residency resident, and no --shard",
        )
