"""What a comparison was asked for, as it is kept in its folder: `--resume` goes on with exactly that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lorafit.compare.ahead import parse_duration
from lorafit.compare.candidates import Candidate, parse_count
from lorafit.compare.grid import VARIED, Wanted, from_file, from_lists
from lorafit.errors import RequestError
from lorafit.settings import BANDS, lasting, lasting_data, preset_names, read_yaml

PATHS = ("model", "chat_template")  # options that may name a file or a folder
MANY_PATHS = ("data", "eval_data")
LISTS = ("presets", "layers", "ranks", "learning_rates")


@dataclass(frozen=True, slots=True)
class Request:
    """The options of all candidates as typed, the lists of what differs, and how long it may take. `steps` is what
    --budget came to."""

    flags: Mapping[str, Any] = field(hash=False)
    presets: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    learning_rates: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()
    grid: str | None = None
    config: str | None = None
    budget: str | None = None
    trainable: str | None = None
    also: tuple[str, ...] = ()
    halving: bool = False
    hint: bool = False
    steps: int | None = None

    def checked(self) -> Request:
        """The same with lasting paths and the moment that chat templates write; everything is checked that needs no
        model. Raises RequestError."""
        if self.budget is not None:
            parse_duration(self.budget)
        if self.trainable is not None:
            parse_count(self.trainable)
            if self.ranks:
                raise RequestError(
                    "--trainable sets the ranks, and --ranks names them", "leave one of them out"
                )
        if self.grid is not None:
            for name in LISTS:
                if getattr(self, name):
                    flag = f"--{name.replace('_', '-')}"
                    raise RequestError(
                        f"--grid names the candidates, and {flag} too", f"put {flag} into the grid file"
                    )
        flags = {**self.flags}
        flags |= {name: lasting(flags[name]) for name in PATHS if flags.get(name)}
        flags |= {name: [lasting(spec) for spec in flags[name]] for name in MANY_PATHS if flags.get(name)}
        flags.setdefault("template_date", datetime.now().isoformat(timespec="minutes"))
        presets = (",".join(map(_lasting_preset, text.split(","))) for text in self.presets)
        return replace(
            self,
            flags=flags,
            presets=tuple(presets),
            grid=lasting(self.grid),
            config=lasting(self.config),
            also=tuple(str(lasting(spec)) for spec in self.also),
        )

    def wanted(self) -> tuple[dict[str, Any], list[Wanted]]:
        """(the options of all candidates, the candidates). Without a grid, every strategy on every band."""
        base: dict[str, Any] = {}
        if self.grid is not None:
            base, found = from_file(self.grid, self.seeds)
        else:
            file = read_yaml_names(self.config)
            presets = self.presets or (
                () if "preset" in file or "modules" in file else (",".join(preset_names()),)
            )
            layers = self.layers or (() if "layers" in file else (",".join(BANDS),))
            found = from_lists(presets, layers, self.ranks, self.learning_rates, self.seeds)
        return {**base, **self.flags}, found

    def differs(self, other: Request) -> str:
        """The first option in which another request differs; empty where they are the same."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if each.name == "flags":
                mine, theirs = (
                    {n: v for n, v in flags.items() if n not in ("template_date", "output")}
                    for flags in (mine, theirs)
                )
                odd = sorted(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
                if odd:
                    return f"--{odd[0].replace('_', '-')}"
            elif each.name != "steps" and mine != theirs:
                return f"--{each.name.replace('_', '-')}"
        return ""

    @staticmethod
    def of(data: Mapping[str, Any]) -> Request:
        """What was written as JSON. Raises RequestError for anything else."""
        names = {each.name for each in fields(Request)}
        try:
            values: dict[str, Any] = {
                name: tuple(v) if isinstance(v, list) else v for name, v in data.items() if name in names
            }
            return Request(**values)
        except TypeError:
            raise RequestError(
                "what the comparison was asked for is damaged", "another -o starts again"
            ) from None


def _lasting_preset(name: str) -> str:
    """A preset as it is found from any folder: only one of one's own is a file."""
    return name if name.strip() in preset_names() else lasting_data(name)


def read_yaml_names(path: str | None) -> set[str]:
    """The options that a run file sets. Raises RequestError when it cannot be read."""
    if path is None:
        return set()
    return {
        name
        for name, value in read_yaml(Path(path).expanduser(), "run file").items()
        if value not in (None, [])
    }


def full_settings(one: Candidate, common: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `train` that train a candidate in full: without what limited the comparison."""
    config = one.config
    own: dict[str, Any] = {"preset": config.preset, "layers": config.layers}
    for name in VARIED:
        if (
            name not in own
            and name not in ("epochs", "max_steps", "seed")
            and (config.origin.get(name) == "flag" or (name == "modules" and config.modules))
        ):  # --preset sets the modules of a run file aside
            own[name] = getattr(config, name)
    for name in ("rank", "alpha"):
        if config.origin.get(name, "").startswith("derived"):
            own[name] = getattr(config, name)
    left = ("output", "epochs", "max_steps", "template_date", *own)
    return {**{name: value for name, value in common.items() if name not in left}, **own}
