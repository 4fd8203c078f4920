"""JSON of the values that lorafit prints and keeps."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any


def jsonable(value: Any) -> Any:
    """Dataclasses, enums, tuples and paths as what JSON knows; a figure that is no number is null."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: jsonable(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(jsonable(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not isfinite(value):
        return None
    return value


def keep(path: Path, value: Any) -> None:
    """Write a value as JSON beside its file and rename it; a cache that cannot be written is no
    reason to stop."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(jsonable(value)), encoding="utf-8")
        beside.replace(path)
    except OSError:
        return
