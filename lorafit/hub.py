"""A finished folder to the hub, through huggingface_hub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lorafit.digests import SEAL
from lorafit.errors import RequestError, RunError
from lorafit.outputs import EVENTS, HELD_OUT, RUN_FILE, TRACKING

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

# What holds rows of the data, or where they lie, stays here, and so do checkpoints.
KEPT_BACK = (EVENTS, RUN_FILE, HELD_OUT, TRACKING, "*.html", "*.jsonl", ".*")
TEMPLATES = "additional_chat_templates"  # the one folder that goes


def check(name: str) -> None:
    """Raises RequestError for what is no name of the hub's, or where nobody is logged in: before hours
    of work, not after."""
    import huggingface_hub

    if not NAME.fullmatch(name):
        raise RequestError(f"`{name}` is not a valid name on the Hub", "write it as owner/name")
    if huggingface_hub.get_token() is None:
        raise RequestError("not logged in to the Hub", "hf auth login, or set HF_TOKEN")
    if huggingface_hub.is_offline_mode():
        raise RequestError("HF_HUB_OFFLINE is set: nothing can be sent", "unset HF_HUB_OFFLINE")


def push(folder: Path, name: str) -> str:
    """Send an adapter's or a model's folder; its address there. A repository that is made is private.

    Raises RequestError when the folder is neither, RunError when the hub does not take it: what lies
    here is as it was.
    """
    import huggingface_hub

    from lorafit.train import STATE_FILES

    if not folder.is_dir():
        raise RequestError(f"there is no folder `{folder}`", "lorafit runs lists the runs that are here")
    if not any((folder / file).is_file() for file in ("adapter_config.json", "config.json")):
        raise RequestError(
            f"`{folder}` is neither an adapter nor a model: nothing is sent",
            "name a run's or a merged model's folder",
        )
    check(name)
    kept_back = [
        *KEPT_BACK, *(f"{path.name}/*" for path in folder.iterdir() if path.is_dir() and path.name != TEMPLATES)
    ]  # fmt: skip
    if all((folder / file).is_file() for file in STATE_FILES):  # a checkpoint: its adapter alone
        kept_back += [*STATE_FILES, SEAL]
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, ignore_patterns=kept_back, commit_message="lorafit"
        )
    except Exception as error:  # every kind of network, hub and upload error has the same next step
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        raise RunError(
            f"the hub did not take `{folder}` as `{name}`: {why}",
            f"nothing is lost: lorafit push {shlex.quote(str(folder))} {name} tries again",
        ) from None
    return str(url)
