"""A model's name to its config: `demo`, a folder, a `config.json`, or a hub id."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import demo
from lorafit.errors import RequestError
from lorafit.model.checkpoint import check_trainable, misnamed_file, not_a_model
from lorafit.model.network import hub_reached, why_offline

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

REVISION = re.compile(r"([\w.-]+(?:/[\w.-]+)?)@([\w.][\w./-]*)")  # a branch, a tag or a commit behind an id


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as it was named, and its config as it was found.

    `place` is a folder's absolute path, or a hub id: `owner/name`, with `@revision` where one was named.
    """

    name: str
    place: str
    config: dict[str, Any]

    @property
    def local(self) -> bool:
        return Path(self.place).exists()

    def at(self, folder: Path) -> ModelSource:
        """Another folder of the same kind of model, with its own config."""
        return ModelSource(
            folder.name, str(folder.resolve()), _read_config(folder / "config.json", folder.name)
        )


def find(model: str, revision: str | None = None) -> ModelSource:
    """The model that a person named: `demo`, a folder, a `config.json`, or a hub id. `revision` is a branch,
    a tag or a commit of a hub id, which may also stand behind it: `owner/name@revision`.

    The network is touched only for a hub id. Raises RequestError when there is no such model, when its
    config cannot be read, or when it is something that lorafit cannot train (see checkpoint.py).
    """
    found = _found(model, revision)
    check_trainable(found.name, found.config, Path(found.place) if found.local else None)
    return found


def _found(model: str, revision: str | None) -> ModelSource:
    if model == "demo":
        folder = demo.MODEL
        return ModelSource("demo", str(folder), _read_config(folder / "config.json", "demo"))
    path = Path(model).expanduser()
    if revision and path.exists():
        raise RequestError(f"--revision is about a hub id, and `{model}` is on this machine", "leave it out")
    if path.is_file():
        if what := misnamed_file(path):
            raise RequestError(*what)
        return ModelSource(_display_name(path.parent), str(path.resolve()), _read_config(path, model))
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise RequestError(*not_a_model(path, model))
        return ModelSource(_display_name(path), str(path.resolve()), _read_config(config, model))
    if path.is_symlink():
        raise RequestError(f"`{model}` is a link whose target is missing", "a model is a folder or a hub id")
    name, behind = split_revision(model)
    if revision and behind and revision != behind:
        raise RequestError(
            f"`{model}` names a revision, and --revision another: `{revision}`", "leave one out"
        )
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".json")
    if looks_local or not HUB_ID.fullmatch(name):
        raise RequestError(
            f"there is no model at `{model}`", "a model is a folder, a hub id as `owner/name`, or `demo`"
        )
    chosen = revision or behind
    return ModelSource(name, f"{name}@{chosen}" if chosen else name, _hub_config(name, chosen))


def split_revision(place: str) -> tuple[str, str]:
    """(hub id, revision or empty) of `owner/name@revision`; a folder is left whole."""
    found = REVISION.fullmatch(place)
    return (found[1], found[2]) if found and not Path(place).exists() else (place, "")


def _display_name(folder: Path) -> str:
    return "demo" if folder.resolve() == demo.MODEL else folder.resolve().name


def _read_config(path: Path, model: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read `{path}`: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"`{path}` is not a config: {error}", "a model is a folder with a config.json, or a hub id"
        ) from None
    if not isinstance(data, dict):
        raise RequestError(f"`{path}` is not a model's config: it does not hold a JSON object")
    return data


def _hub_config(model: str, revision: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    hub_reached()
    try:
        path = hf_hub_download(model, "config.json", revision=revision or None)
    except Exception as error:  # each kind of network and hub error has its own next step
        named = f"{model}@{revision}" if revision else model
        raise RequestError(
            f"`{named}` is not a folder here, and {not_downloaded(error)}",
            "accept its terms on its Hub page, then `hf auth login` or set HF_TOKEN"
            if type(error).__name__ == "GatedRepoError"
            else "check the name and the network; a model is a folder, a hub id as `owner/name`, or `demo`",
        ) from None
    return _read_config(Path(path), model)


def not_downloaded(error: BaseException) -> str:
    """Why the hub gave nothing, in words."""
    kind = type(error).__name__
    if kind in ("LocalEntryNotFoundError", "IncompleteSnapshotError", "OfflineModeIsEnabled"):
        return f"it is not in the local cache, and {why_offline() or 'the Hub was not reached'}"
    known = {
        "RepositoryNotFoundError": "there is no such repository on the Hub, or it is private",
        "RevisionNotFoundError": "there is no such revision on the Hub",
        "GatedRepoError": "access to it must be granted on the Hub first",
        "RemoteEntryNotFoundError": "its repository on the Hub has no such file",
        "EntryNotFoundError": "its repository on the Hub has no such file",
    }
    return known.get(kind, f"it could not be downloaded from the Hub ({kind}: {first_line(error)})")


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"[:240]
    return lines[0][:240] if lines else type(error).__name__
