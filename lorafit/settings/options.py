"""How an option is declared: one dataclass field with its values, its help and where it is shown.

The command line, the run file, a preset's `training`, `--help` and the documentation are all made from the
fields of `RunConfig` (run_config.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorafit.errors import RequestError

WHAT, DATA, TRAINING, OUTPUT = "What to adapt", "Data", "Training", "Output"  # panels of `--help`


@dataclass(frozen=True, slots=True)
class Kind:
    """The values an option takes: in words, how text is parsed, and which values are valid.

    `parse` raises ValueError for text that is not a value of this kind.
    """

    takes: str
    metavar: str
    parse: Callable[[str], Any]
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def text(takes: str, metavar: str = "TEXT") -> Kind:
    """A text that is not blank."""
    return Kind(takes, metavar, str, lambda v: isinstance(v, str) and bool(v.strip()))


def whole(least: int) -> Kind:
    """Whole numbers from `least` on."""

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31

    return Kind(f"a whole number from {least} on", "N", int, holds)


def number(least: float, most: float = 1e12, takes: str = "", *, above: bool = False) -> Kind:
    """Finite numbers from `least` to `most`; with `above`, `least` itself is excluded."""

    def holds(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return (value > least if above else value >= least) and value <= most

    bounds = f"a number above {least:g}" if above else f"a number from {least:g} on"
    if most < 1e6:
        bounds += f", at most {most:g}"
    return Kind(takes or bounds, "X", _number, holds)


def _number(text: str) -> float | int:
    """`3` as 3, `0.5` and `1e-4` as they are."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def one_of(*words: str) -> Kind:
    """One of these words."""
    return Kind("one of " + ", ".join(words), "NAME", str, lambda v: v in words, words)


FLAG = Kind(
    "true or false", "", lambda text: {"true": True, "false": False}[text], lambda v: isinstance(v, bool)
)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a run.

    `training`: a preset may set it. `kept`: a run file holds it. `many`: it may be given several times.
    `derived`: what the value is derived from if it is not set, and `depends_on`: the options that this depends
    on; a flag that sets one of them derives the value again.
    """

    name: str
    kind: Kind
    help: str
    panel: str
    default: Any = None
    training: bool = False
    kept: bool = True
    many: bool = False
    short: str = ""
    derived: str = ""
    depends_on: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """Its name on the command line: `--batch-size`."""
        return "--" + self.name.replace("_", "-")

    def checked(self, value: Any, source: str = "") -> Any:
        """The value. Raises RequestError naming it, what is taken, and where it came from."""
        if self.many:
            items = value if isinstance(value, (list, tuple)) else (value,)
            return tuple(self._one(item, source) for item in items)
        return self._one(value, source)

    def parsed(self, text: Any) -> Any:
        """The value of what was typed on the command line. Raises RequestError as `checked` does."""
        if self.many or not isinstance(text, str):
            return self.checked(tuple(text) if isinstance(text, list) else text)
        try:
            value = self.kind.parse(text)
        except (ValueError, KeyError):
            value = text
        return self.checked(value)

    def _one(self, value: Any, source: str) -> Any:
        if self.kind.holds(value):
            return value
        shown = f"`{value}`" if isinstance(value, str) else repr(value)
        raise RequestError(f"{self.flag} is {shown}{source}: it takes {self.kind.takes}")


def option(default: Any, kind: Kind, help: str, panel: str, **more: Any) -> Any:
    """A dataclass field that is an option; `more` are the other fields of `Option`."""
    return dataclasses.field(
        default=default, metadata={"option": {"kind": kind, "help": help, "panel": panel, **more}}
    )


def options_of(config: type) -> dict[str, Option]:
    """The options that a dataclass declares, by name."""
    return {
        field.name: Option(field.name, default=field.default, **field.metadata["option"])
        for field in dataclasses.fields(config)
        if "option" in field.metadata
    }
