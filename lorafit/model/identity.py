"""The identity of a base: SHA-256 of its whole weight files, the same for a folder and for its hub id.

A folder's digests are kept by path, size and time of change, so that each file is read once. In a snapshot
of the hub's cache a large file is a link to a blob whose name is its SHA-256: it is not read at all.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from lorafit.digests import file_digest
from lorafit.errors import RequestError
from lorafit.model.headers import NotThere, open_file, shards
from lorafit.model.source import split_revision
from lorafit.system import installed

PICKLED_INDEX, PICKLED = "pytorch_model.bin.index.json", "pytorch_model.bin"

SHARDS = (2, 13)  # the torch whose FSDP2 goes on after a pass that was ended within the model

SAMPLE = 64  # bytes of a tensor that earlier versions read at its start, its middle and its end


def fingerprint(place: str) -> str:
    """The identity of a model's weights, 64 hexadecimal digits: the SHA-256 of its one weight file, or of
    the lines `DIGEST  NAME` of several, sorted by name, as `sha256sum` prints them.

    `place` is a folder or a hub id, `owner/name` or `owner/name@revision`, whose files are in the hub's
    cache. Empty where no weights are there. Raises RequestError for a file that cannot be read.
    """
    folder = local_folder(place)
    files = weight_files(folder) if folder is not None else []
    if not files:
        return ""
    found = digests_of(files)
    if len(files) == 1:
        return found[0]
    named = sorted((path.name, digest) for path, digest in zip(files, found, strict=True))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in named).encode()).hexdigest()


def digests_of(files: Sequence[Path]) -> list[str]:
    """The SHA-256 of each file, several read at once. Raises RequestError for one that cannot be read."""
    with ThreadPoolExecutor(max(1, min(4, len(files)))) as pool:
        try:
            return list(pool.map(file_digest, files))
        except OSError as error:
            raise RequestError(
                f"cannot read `{error.filename}`: {error.strerror}", "check the file's permissions"
            ) from None


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder: safetensors files, else PyTorch's; empty when it has none, and for a
    snapshot of the hub's cache whose download was interrupted: loading the model by its id goes on with it.

    Raises RequestError for an index of another folder that names files which are not there.
    """
    try:
        files = shards(folder)
    except NotThere:
        if not hub_name(folder):
            raise
        return []
    if files:
        return files
    if (folder / PICKLED_INDEX).is_file():
        return sorted(folder.glob("pytorch_model*.bin"))
    return [folder / PICKLED] if (folder / PICKLED).is_file() else []


def hub_name(folder: Path) -> str:
    """The hub id of a snapshot in the Hub's cache, `owner/name` or `name`; empty for any other folder."""
    kind, *parts = folder.parent.parent.name.split("--")
    return "/".join(parts) if folder.parent.name == "snapshots" and kind == "models" else ""


def called(place: str | Path) -> str:
    """What a person calls a folder: a snapshot in the Hub's cache by its hub id, any other by its own name."""
    path = Path(os.path.abspath(Path(place).expanduser()))  # `.` has a name too, and a link keeps its own
    return hub_name(path) or path.name


def local_folder(place: str) -> Path | None:
    """The folder of a model's files on this machine, or its snapshot in the hub's cache; None where it is
    not there. Nothing is downloaded."""
    path = Path(place)
    if path.exists():
        return path if path.is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    name, revision = split_revision(place)
    with suppress(Exception):  # a name that the hub does not take is not in its cache
        found = try_to_load_from_cache(name, "config.json", revision=revision or None)
        return Path(found).parent if isinstance(found, str) else None
    return None


def stream_refusal(place: str) -> str:
    """Why blocks of that checkpoint cannot be read one at a time; empty where they can, or where a model of the hub is
    not downloaded yet."""
    if int(installed("transformers").partition(".")[0] or 0) < 5:
        return "it needs transformers 5"
    folder = local_folder(place)
    files = weight_files(folder) if folder is not None else []
    if not files and not Path(place).exists():
        return ""
    return "" if files and files[0].suffix == ".safetensors" else "there are no .safetensors files"


def shard_refusal(place: str) -> str:
    """Why processes cannot each read their rows of that checkpoint; empty where they can, or where no weights are
    there yet."""
    if tuple(map(int, re.findall(r"\d+", installed("torch"))[:2])) < SHARDS:
        return "it needs torch {}.{}".format(*SHARDS)
    return unreadable(place)


def unreadable(place: str) -> str:
    """Why the layers of a checkpoint that is on this machine cannot be read one by one; empty where they can, or where
    no weights are there."""
    folder = local_folder(place)
    return stream_refusal(place) if folder is not None and weight_files(folder) else ""


def sampled(place: str) -> str:
    """What earlier versions kept for an identity, 32 digits: headers, sizes, and samples of every tensor.

    Empty for what is not a folder of safetensors files. Raises RequestError for a damaged file.
    """
    folder = local_folder(place)
    files = weight_files(folder) if folder is not None else []
    if not files or files[0].suffix != ".safetensors":
        return ""
    found = hashlib.sha256()
    for path in files:
        opened = open_file(path)
        found.update(opened.raw_header)
        with path.open("rb") as file:
            for entry in opened.entries:
                size = entry.stop - entry.start
                for at in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
                    file.seek(opened.data_at + entry.start + at)
                    found.update(file.read(min(SAMPLE, size)))
    return found.hexdigest()[:32]
