"""A stand-in for the Hub's cache on this machine."""

import hashlib
import os
import shutil

import pytest


def in_hub_cache(folder, cache, name="ada/tiny", revision="a" * 40, linked=True, ref="main"):
    """The files of a folder as huggingface_hub keeps a repository's."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / ref).write_text(revision)
    snapshot = home / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        if linked:
            blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, blob)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
        else:
            shutil.copyfile(path, snapshot / path.name)
    return home


@pytest.fixture
def hub(tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    return cache
