"""Merging: adapters into the base as a stream, and the verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.merge.merge import MergeSettings as MergeSettings
    from lorafit.merge.merge import merge_adapters as merge_adapters

__getattr__ = door(
    __name__,
    {
        "merge": "MergeSettings merge_adapters",
    },
)
