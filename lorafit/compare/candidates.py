"""Candidates resolved on a model: their settings and plans, and what is impossible, with the reason."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lorafit.adapter import Plan, planned
from lorafit.compare.grid import VARIED, Wanted
from lorafit.errors import RequestError
from lorafit.forward import not_streamed, refused_by_map
from lorafit.jsonio import jsonable
from lorafit.model import ModelMap
from lorafit.settings import MAY_CHANGE, OPTIONS, Lora, Preset, RunConfig, derive_from_model, settle
from lorafit.units import count

OWN = (*VARIED, "output", "overwrite", "resume")  # options in which candidates may differ
OF_ONE_RUN = ("from_adapter", "compile", "track", "shard")  # options that mean nothing for candidates
MAX_RANK = 4096


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run of the comparison: its settings and its plan. Those of one `choice` differ in their seed alone."""

    name: str
    choice: str
    config: RunConfig
    preset: Preset
    plan: Plan

    @property
    def streams(self) -> bool:
        """Whether the layers below the lowest band of all candidates are read as they run, and not held."""
        return self.config.prefix_residency == "stream"

    @property
    def digest(self) -> str:
        """Of all that decides its result but the base's weights and the rows."""
        given = {name: getattr(self.config, name) for name in OPTIONS if name not in MAY_CHANGE}
        # an option that a later version adds has its default then
        settings = {name: value for name, value in given.items() if value != OPTIONS[name].default}
        usual = Lora()
        lora = {
            f.name: v
            for f in fields(Lora)
            if (v := getattr(self.plan.lora, f.name)) != getattr(usual, f.name)
        }
        decides = [jsonable(settings), jsonable(lora), self.plan.modules]
        return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def cut(self) -> tuple[tuple[str, int], ...]:
        """The lowest adapted layer of each stack: candidates with the same one share the states below it."""
        return tuple(sorted(self.plan.cut.items()))


@dataclass(frozen=True, slots=True)
class Impossible:
    """A choice that the model cannot have, and why."""

    choice: str
    reason: str


def resolve_all(
    found: ModelMap,
    wanted: Sequence[Wanted],
    common: Mapping[str, Any],
    file: str | None,
    trainable: int | None,
) -> tuple[list[Candidate], list[Impossible]]:
    """(the candidates that the model can have, the choices that it cannot).

    `common` are options of all candidates, as typed; with `trainable`, each candidate's rank is the one that comes
    nearest to as many trainable parameters. Raises RequestError for options that are wrong whatever the model, and
    where candidates differ in what they share.
    """
    candidates: list[Candidate] = []
    impossible: dict[str, Impossible] = {}
    for one in wanted:
        config, preset = settle({**common, **one.settings}, file)
        config = derive_from_model(config, found).derived("data_seed", 0, "one split for all candidates")
        config = replace(config, sample=False)
        if own := next((name for name in OF_ONE_RUN if getattr(config, name)), ""):
            raise RequestError(
                f"{OPTIONS[own].flag} is for one run, not for candidates",
                "take it out of the run file, the grid or the preset",
            )
        if one.times is not None:
            rate = (config.learning_rate or 0.0) * one.times
            config = replace(config, learning_rate=rate, origin={**config.origin, "learning_rate": "flag"})
        try:
            if trainable is not None:
                config, preset = _sized(found, config, preset, trainable)
            plan = planned(found, preset, config)
            if config.prefix_residency == "stream" and (reason := refused_by_map(found, plan.cut)):
                raise not_streamed(reason)
        except RequestError as error:
            impossible.setdefault(one.choice, Impossible(one.choice, error.message))
            continue
        candidates.append(Candidate(one.name, one.choice, config, preset, plan))
    check_shared(candidates)
    return candidates, list(impossible.values())


def _sized(found: ModelMap, config: RunConfig, preset: Preset, wanted: int) -> tuple[RunConfig, Preset]:
    """Settings and preset with the rank that comes nearest to as many trainable parameters, and unless --alpha is given
    an alpha that keeps alpha / rank: else large ranks would be scaled down, and small ones up.

    Parameters grow by the same number with each rank: rank * (inputs + outputs) in each weight.
    """

    def at(rank: int) -> tuple[RunConfig, Preset]:
        origin, alpha = {**config.origin, "rank": "derived: to --trainable"}, preset.lora.alpha
        if origin.get("alpha") != "flag":
            origin["alpha"], alpha = "derived: to keep alpha / rank", alpha / preset.lora.r * rank
        sized = replace(preset, lora=replace(preset.lora, r=rank, alpha=alpha))
        return replace(config, rank=rank, alpha=alpha, origin=origin), sized

    def params(rank: int) -> int:
        return planned(found, at(rank)[1], config).trainable_params

    one = params(1)
    step = params(2) - one
    if step <= 0:
        raise RequestError("its parameters do not follow from the rank alone")
    near = max(1, min(MAX_RANK, round((wanted - one) / step) + 1))
    return at(near)


def check_shared(candidates: Sequence[Candidate]) -> None:
    """Raises RequestError where two candidates differ in an option that all of them share, as presets of one's own
    may make them."""
    for one in candidates[1:]:
        first = candidates[0]
        for name, option in OPTIONS.items():
            was, now = getattr(first.config, name), getattr(one.config, name)
            if name not in OWN and was != now:
                raise RequestError(
                    f"{option.flag} is {was} for `{first.name}` and {now} for `{one.name}`: candidates share their "
                    "base, rows and batches",
                    f"{option.flag} sets it for all of them",
                )


def parse_count(text: str) -> int:
    """`1M`, `500k` or `65,536` as a number of parameters. Raises RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:[.,]\d+)*)\s*([kKmMbB]?)\s*", text)
    scale = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()] if match else 0
    number = int(float(match[1].replace(",", "")) * scale) if match and match[1].count(".") < 2 else 0
    if not number:
        raise RequestError(
            f"--trainable is `{text}`: it takes a number of parameters", "e.g. 1M, 500k or 65536"
        )
    return number


def scale_note(candidates: Sequence[Candidate]) -> str:
    """That candidates of several ranks have one alpha, and so several scales; empty where they have not."""
    scales = {one.plan.lora.r: one.plan.lora.alpha / one.plan.lora.r for one in candidates}
    alphas = {one.plan.lora.alpha for one in candidates}
    if len(scales) < 2 or len(alphas) > 1:
        return ""
    each = ", ".join(f"{scales[rank]:.3g} at rank {rank}" for rank in sorted(scales)[:4])
    more = ", …" if len(scales) > 4 else ""
    return f"alpha is {alphas.pop():g} for all ranks, so adapters are scaled by {each}{more}; a grid file sets both"


def sized_note(candidates: Sequence[Candidate], wanted: int) -> str:
    """How near the candidates come to as many trainable parameters."""
    found = [one.plan.trainable_params for one in candidates]
    return f"{count(wanted)} parameters wanted: candidates train {count(min(found))} to {count(max(found))}"
