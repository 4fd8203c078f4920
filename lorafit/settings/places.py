"""Files and folders as options name them: with a weight, and as absolute paths in a run file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lorafit.errors import RequestError


def weighted(spec: str) -> tuple[str, float]:
    """A `--data` and how often it is used per epoch: `a.jsonl=2` is ("a.jsonl", 2.0).

    Raises RequestError for a weight that is not above 0 or is above 1,000.
    """
    name, equals, text = spec.rpartition("=")
    if not equals or Path(spec).expanduser().exists():
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError:
        return spec, 1.0
    if not 0 < weight <= 1000:
        raise RequestError(f"--data {spec}: a weight is above 0 and at most 1,000", f"e.g. {name}=2")
    return name, weight


def there(data: Iterable[str], others: Iterable[str | None]) -> tuple[Path, ...]:
    """The files and folders that data and other options name, those that are on this machine."""
    names = [*(weighted(spec)[0] for spec in data), *others]
    found = [Path(name).expanduser() for name in names if name]
    # a pattern reads files of its folder, a config.json those of the model's folder
    found = [p.parent if any(c in p.name for c in "*?[") or p.name == "config.json" else p for p in found]
    return tuple(path for path in found if path.exists())


def lasting(name: str | None) -> str | None:
    """A model or an adapter as a run file names it: a folder by its absolute path."""
    return name if name in (None, "demo") else lasting_data(str(name))


def lasting_data(name: str) -> str:
    """A file or folder as an absolute path with its weight; anything else unchanged."""
    plain, weight = weighted(name)
    path = Path(plain).expanduser()
    if not path.parent.exists() or not (path.exists() or any(c in path.name for c in "*?[")):
        return name
    return str(path.parent.resolve() / path.name) + (f"={weight:g}" if weight != 1 else "")
