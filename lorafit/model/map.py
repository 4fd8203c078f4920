"""What is in a model: its stacks, its adaptable weights, and everything else, to the last parameter.

A `ModelMap` is a value: it is made once from a model on the meta device (chart.py), printed
as JSON, kept in a cache, and is all that a plan needs to know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorafit import __version__
from lorafit.cache import code_digest
from lorafit.jsonio import keep
from lorafit.model.quantised import Quantised
from lorafit.model.roles import Part, Role
from lorafit.system import installed

FORMAT = 1  # of the JSON below: a cached map of another format is not read


@dataclass(frozen=True, slots=True)
class Stack:
    """A repeated run of blocks: `model.layers`, `depth` of them.

    `part` is `text`, or the tower it stands in. A `shared` stack runs one block many times
    (ALBERT), so a band of it means nothing.
    """

    name: str
    path: str
    depth: int
    part: str = "text"
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Slot:
    """One adaptable weight.

    `in_features` and `out_features` are those of the map it computes, also where the tensor is
    stored the other way round (`kind` `conv1d`). `params` counts its weight and bias. `kind`:
    `linear`, `conv1d` (GPT-2's transposed linear), `conv`, or `parameter` (a bare tensor, such
    as `copies` experts in one). `shared_with` names the slot whose tensor it is, if any.
    """

    path: str
    roles: tuple[Role, ...]
    part: Part
    stack: str
    layer: int
    in_features: int
    out_features: int
    kind: str
    params: int
    copies: int = 1
    shared_with: str = ""

    @property
    def tail(self) -> str:
        """Its name from within its block: `self_attn.q_proj`."""
        return self.path.removeprefix(f"{self.stack}.{self.layer}.")


@dataclass(frozen=True, slots=True)
class Uncovered:
    """Parameters that no role covers: what they are, and why."""

    path: str
    params: int
    reason: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelMap:
    """Every parameter of a model, placed. `total_params` counts a shared tensor once.

    The sizes are the config's own words, 0 where it says nothing. `modules` are the names of
    all modules, for PEFT's matching rule. `unplaced` are the weights in blocks that could be
    adapted but play no role: `uncovered` counts them, and a literal module name reaches them.
    `reinterpreted` are names that PEFT takes for expert parameters in this family. `quantised` says how the
    checkpoint holds its `quantisable` weights; without it, those are the ones that `--quantize` is for.
    """

    model: str
    family: str
    architecture: str
    task: str  # causal, masked or seq2seq
    stacks: tuple[Stack, ...]
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    activation: str
    positions: str  # learned, rotary, relative, alibi, or unknown
    tied_head: bool
    dtype: str
    total_params: int
    slots: tuple[Slot, ...]
    uncovered: tuple[Uncovered, ...]
    unplaced: tuple[Slot, ...]
    modules: tuple[str, ...]
    reinterpreted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    quantisable: tuple[str, ...] = ()
    quantised: Quantised | None = None

    def stack(self, path: str) -> Stack:
        return next(stack for stack in self.stacks if stack.path == path)

    @property
    def text_stacks(self) -> tuple[Stack, ...]:
        return tuple(stack for stack in self.stacks if stack.part == "text")


def from_json(data: dict[str, Any]) -> ModelMap:
    """The map that `jsonable` wrote. Raises KeyError, TypeError or ValueError for anything else."""

    def slot(row: dict[str, Any]) -> Slot:
        roles = tuple(Role(role) for role in row["roles"])
        return Slot(**{**row, "roles": roles, "part": Part(row["part"])})

    known = {f.name for f in fields(ModelMap)}
    if set(data) != known:
        raise ValueError("not a map of this format")
    return ModelMap(
        **{
            **data,
            "stacks": tuple(Stack(**row) for row in data["stacks"]),
            "slots": tuple(slot(row) for row in data["slots"]),
            "uncovered": tuple(
                Uncovered(**{**row, "shape": tuple(row["shape"])}) for row in data["uncovered"]
            ),
            "unplaced": tuple(slot(row) for row in data["unplaced"]),
            "modules": tuple(data["modules"]),
            "reinterpreted": tuple(data["reinterpreted"]),
            "notes": tuple(data["notes"]),
            "quantisable": tuple(data["quantisable"]),
            "quantised": Quantised(**data["quantised"]) if data["quantised"] else None,
        }
    )


@dataclass(frozen=True, slots=True)
class MapCache:
    """Maps seen before, by the content of their config and the versions that read it."""

    folder: Path

    @staticmethod
    def key(config: dict[str, Any]) -> str:
        """A digest of the config, of this program, of transformers and PEFT."""
        packages = installed("transformers"), installed("peft")
        versions = (FORMAT, __version__, *packages, code_digest("model.chart"))
        text = json.dumps([versions, config], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, key: str, model: str) -> ModelMap | None:
        """The map under that key, under this name; None when there is none or it is damaged."""
        try:
            data = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            return from_json({**data, "model": model})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, found: ModelMap) -> None:
        """Keep a map."""
        keep(self.folder / f"{key}.json", found)


def sum_params(rows: Iterable[Slot | Uncovered]) -> int:
    """The parameters of those rows together."""
    return sum(row.params for row in rows)
