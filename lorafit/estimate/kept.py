"""Profiles, timings and reports on data, kept for the next time: a plan that was asked for before is instant."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit import __version__
from lorafit.cache import cache_folder, code_digest
from lorafit.events import DataReport
from lorafit.jsonio import jsonable, keep
from lorafit.system import installed

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(slots=True)
class Kept:
    """Profiles, timings and looks at data, as JSON under the cache folder."""

    folder: Path = field(default_factory=lambda: cache_folder() / "forecasts")

    def get(self, kind: Any, facts: Any) -> Any:
        """What was kept of that kind under these facts; None when nothing was, or it is damaged."""
        try:
            data = json.loads(self._path(kind, facts).read_text(encoding="utf-8"))
            return DataReport.of(data) if kind is DataReport else kind(**data)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, value: Any, facts: Any) -> None:
        """Keep a value under these facts."""
        keep(self._path(type(value), facts), value)

    def _path(self, kind: type, facts: Any) -> Path:
        versions = [__version__, code_digest("estimate.forecast"), *(installed(name) for name in PACKAGES)]
        text = json.dumps([versions, jsonable(facts)], sort_keys=True, default=str)
        return self.folder / f"{kind.__name__.lower()}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
