"""The names of the trackers, and the packages that each needs. `train/trackers.py` starts them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

from lorafit.errors import RequestError

# What each imports. Without a server of its own, mlflow keeps its runs in a database: sqlalchemy writes it.
PACKAGES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy"),
    "trackio": ("trackio",),
}

TRACKERS = tuple(PACKAGES)


def check_trackers(names: Sequence[str]) -> None:
    """Raises RequestError when a package that a tracker needs is not installed: Accelerate would leave the
    tracker out."""
    missing = {
        name: lacking for name in names if (lacking := [p for p in _needed(name) if not _installed(p)])
    }
    if missing:
        needs = "; ".join(
            f"--track {name} needs `{'`, `'.join(lacking)}`" for name, lacking in missing.items()
        )
        extras = ",".join(missing)
        raise RequestError(f"{needs}: not installed", f"pip install 'lorafit[{extras}]'")


def _needed(name: str) -> tuple[str, ...]:
    packages = PACKAGES[name]
    return packages[:1] if name == "mlflow" and os.environ.get("MLFLOW_TRACKING_URI") else packages


def _installed(package: str) -> bool:
    """Whether it can be imported. A folder `wandb` in the working directory is not the package: it has no origin."""
    found = find_spec(package)
    return found is not None and found.origin is not None
