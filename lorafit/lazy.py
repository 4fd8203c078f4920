"""Packages whose names are imported when they are first used: torch is loaded only where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def door(package: str, exports: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`: `exports` says which of its files holds each name, one file a line.

    __getattr__ = door(__name__, {"plan": "Plan planned resolve"})
    """
    homes = {name: file for file, names in exports.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get
