"""Which candidates a comparison has, as they were asked for: lists of options, or a grid file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from lorafit.errors import RequestError, closest
from lorafit.settings import OPTIONS, read_yaml

# What candidates may differ in: all else is one for all of them, so that they share base, rows and batches.
VARIED = (
    "preset", "layers", "modules", "include", "exclude", "stack", "rank", "alpha", "dropout", "learning_rate",
    "scheduler", "warmup", "optimizer", "weight_decay", "max_grad_norm", "accumulate", "epochs", "max_steps", "seed",
)  # fmt: skip
NAME = re.compile(r"[\w+-][\w.+-]{0,99}")
RESERVED = ("scores",)  # names of other things in a comparison's folder
MOST = 1000  # candidates

FORM = "a grid file has `candidates`, a list of settings, and may have `base`, the settings of all of them"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One candidate as it was asked for: its settings as they would stand on the command line of `train`.

    Candidates of one `choice` differ in their seed alone. `times` multiplies the derived learning rate.
    """

    name: str
    choice: str
    settings: Mapping[str, Any] = field(hash=False)
    times: float | None = None


def from_lists(
    presets: Sequence[str],
    layers: Sequence[str],
    ranks: Sequence[str],
    rates: Sequence[str],
    seeds: Sequence[str],
) -> list[Wanted]:
    """Every combination; each list is as on the command line, with commas. `low+high` are layers of both bands.

    Raises RequestError for an empty list, a value twice, or too many combinations.
    """
    every = {
        "preset": _listed("--presets", presets),
        "layers": [text.replace("+", ",") for text in _listed("--layers", layers)],
        "rank": _listed("--ranks", ranks),
        "learning_rate": _listed("--learning-rates", rates),
    }
    named = {name: len(values) > 1 for name, values in every.items()}
    named |= {"preset": True, "layers": True}
    lists = {name: values or [""] for name, values in every.items()}
    chosen: list[Wanted] = []
    for values in product(*lists.values()):
        settings = {name: value for name, value in zip(lists, values, strict=True) if value}
        parts = [_short(name, settings[name]) for name in settings if named[name]]
        chosen.append(_wanted("-".join(parts) or "candidate", settings))
    return with_seeds(chosen, parse_seeds(seeds))


def from_file(path: str, seeds: Sequence[str] = ()) -> tuple[dict[str, Any], list[Wanted]]:
    """(the settings of all candidates, the candidates) of a grid file.

    Raises RequestError with all that is wrong in it.
    """
    data = read_yaml(Path(path).expanduser(), "grid file")
    faults = [
        f"unknown key `{key}`: {closest(key, ('base', 'candidates'))}"
        for key in data
        if key not in ("base", "candidates")
    ]
    base, listed = data.get("base") or {}, data.get("candidates")
    if not isinstance(base, dict):
        faults.append("`base` is not a mapping of options to values")
        base = {}
    if not isinstance(listed, list) or not listed or not all(isinstance(row, dict) for row in listed):
        raise RequestError(f"grid file `{path}`: `candidates` is not a list of settings", FORM)
    faults += _faults(base, "base", [name for name, option in OPTIONS.items() if option.kept])
    chosen = []
    for number, row in enumerate(listed, 1):
        where = f"candidate {number}"
        faults += _faults(row, where, ["name", *VARIED])
        settings = {name: _text(name, value) for name, value in row.items() if name != "name"}
        name = row.get("name") or "-".join(
            _short(n, settings[n]) for n in VARIED if n in settings and n != "seed"
        )
        chosen.append(_wanted(str(name) or f"candidate-{number}", settings))
    if faults:
        lines = faults[0] if len(faults) == 1 else "".join(f"\n  {fault}" for fault in faults)
        raise RequestError(f"grid file `{path}`: {lines}", FORM)
    return dict(base), with_seeds(chosen, parse_seeds(seeds))


def with_seeds(chosen: Sequence[Wanted], seeds: Sequence[int]) -> list[Wanted]:
    """Each choice with each seed; without seeds, as they are. Raises RequestError for two of one name."""
    found = [
        Wanted(
            f"{one.name}-s{seed}" if len(seeds) > 1 else one.name,
            one.choice,
            {**one.settings, "seed": seed},
            one.times,
        )
        for one in chosen
        for seed in seeds
    ] or list(chosen)
    seen: set[str] = set()
    for one in found:
        if one.name.lower() in seen:
            raise RequestError(f"two candidates are named `{one.name}`", "give each a name of its own")
        seen.add(one.name.lower())
    if len(found) > MOST:
        raise RequestError(f"these are {len(found):,} candidates, more than {MOST:,}", "give shorter lists")
    return found


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """`3` are the seeds 0, 1 and 2; `1,5` are those. Raises RequestError for anything else."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    several = any("," in text for text in texts) or len(texts) > 1
    numbers = [int(part) for part in parts if re.fullmatch(r"\d{1,9}", part)]
    if len(numbers) != len([part for part in parts if part]) or (not several and numbers == [0]):
        raise RequestError(
            f"--seeds is `{','.join(texts)}`: it takes a number of seeds or a list", "e.g. --seeds 3, or 1,5"
        )
    if not several and numbers and numbers[0] > MOST:
        raise RequestError(
            f"--seeds {numbers[0]} is that many seeds of each candidate",
            f"--seeds {numbers[0]}, with a comma is that one seed",
        )
    if not several and numbers:
        return list(range(numbers[0]))
    return list(dict.fromkeys(numbers))


def rate_of(text: str) -> tuple[float | None, str]:
    """(factor of the derived rate, or None; the rate as typed) of `0.5x` or `1e-4`. Raises RequestError."""
    if not text.endswith(("x", "×")):
        return None, text
    try:
        factor = float(text[:-1])
    except ValueError:
        factor = 0.0
    if not 0 < factor <= 1000:
        raise RequestError(
            f"learning rate `{text}` is not a multiple", "e.g. 0.5x, 2x, or a rate such as 1e-4"
        )
    return factor, ""


def _wanted(name: str, settings: Mapping[str, Any]) -> Wanted:
    if not NAME.fullmatch(name) or name in RESERVED:
        raise RequestError(
            f"`{name}` is not a name for a candidate", "letters, digits and `.+-_`, as of a folder"
        )
    left = dict(settings)
    times = None
    if "learning_rate" in left:
        times, typed = rate_of(str(left.pop("learning_rate")))
        left |= {"learning_rate": typed} if times is None else {}
    return Wanted(name, name, left, times)


def _listed(flag: str, texts: Sequence[str]) -> list[str]:
    """The items of comma lists. Raises RequestError for an empty item or one that stands there twice."""
    items = [item.strip() for text in texts for item in text.split(",")]
    if "" in items:
        raise RequestError(f"{flag} has an empty item: `{','.join(texts)}`")
    for item in items:
        if items.count(item) > 1:
            raise RequestError(f"{flag} names `{item}` twice")
    return items


def _short(option: str, value: Any) -> str:
    """A setting as a part of a name."""
    text = str(value)
    if option == "preset":
        text = Path(text).stem if text.endswith((".yaml", ".yml")) else text
    elif option == "modules":
        text = "+".join(value) if isinstance(value, (list, tuple)) else text.replace(",", "+")
    elif option == "layers":
        text = text.replace(",", "+")
    else:
        text = {"rank": "r", "learning_rate": "lr", "alpha": "a"}.get(option, option.replace("_", "-")) + text
    return re.sub(r"[^\w.+-]+", "", text.replace("×", "x"))


def _text(option: str, value: Any) -> Any:
    """A value of a grid file as the command line would have it."""
    return str(value) if option in ("layers", "learning_rate") and not isinstance(value, str) else value


def _faults(row: Mapping[str, Any], where: str, known: Sequence[str]) -> list[str]:
    """What is wrong with the settings of a grid file."""
    faults = []
    for key, value in row.items():
        if key not in known:
            same = key in OPTIONS and where != "base"
            hint = "it is the same for all candidates, and belongs in `base`" if same else closest(key, known)
            faults.append(f"{where}: `{key}`: {hint}")
        elif isinstance(value, dict) or value is None:
            faults.append(f"{where}: `{key}` is {value!r}")
    return faults
