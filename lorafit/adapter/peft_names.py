"""PEFT's matching rule for `target_modules`, and the shortest exact way to write a set of names.

PEFT drops a misspelt name beside a good one, ignores the layer filter for full paths, and lets
one number mean a block of every stack (FACTS in the tests). So nothing is written that was not
first read back here: a spelling is used when it denotes exactly the wanted modules among all
the modules of the model, towers and heads included; else the full names are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

# PEFT 0.21, tuners_utils.check_target_module_exists: the first numbered segment is the layer.
FIRST_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


@dataclass(frozen=True, slots=True)
class Spelling:
    """`target_modules`, `layers_to_transform` and `layers_pattern`, as LoraConfig takes them."""

    target_modules: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None

    def matches(self, name: str) -> bool:
        """Whether PEFT would adapt the module of that name."""
        if name in self.target_modules:  # a full path: the layer filter is not asked
            return True
        if not any(name.endswith("." + target) for target in self.target_modules):
            return False
        if not self.layers_to_transform:  # None and [] both mean: everywhere
            return True
        index = self._layer(name)
        return index is not None and index in self.layers_to_transform

    def _layer(self, name: str) -> int | None:
        if not self.layers_pattern:
            found = FIRST_INDEX.match(name)
            return int(found["index"]) if found else None
        for pattern in self.layers_pattern:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name):
                return int(found["index"])
        return None

    def denotes(self, modules: Iterable[str]) -> frozenset[str]:
        """The modules, out of all those of a model, that PEFT would adapt."""
        return frozenset(name for name in modules if self.matches(name))


def spell(
    wanted: Collection[str],
    tails: Iterable[str],
    layers: Sequence[int],
    lists: Collection[str],
    modules: Collection[str],
) -> Spelling:
    """The shortest spelling that denotes exactly `wanted` among `modules`.

    `tails` are the wanted names from within their block (`self_attn.q_proj`), `layers` the
    chosen indices, `lists` the names of the lists that hold the blocks (`layers`). Falls
    back on the full names, which PEFT takes literally.
    """
    goal = frozenset(wanted)
    if not goal:
        return Spelling(())
    ends = tuple(sorted(tails))
    leaves = tuple(sorted({end.rpartition(".")[2] for end in ends}))
    indices = tuple(layers)
    # none of the candidates can match a name that does not end in one of the leaves
    rivals = [name for name in modules if name.rpartition(".")[2] in leaves]
    for pattern in (None, tuple(sorted(lists))):
        for targets in (leaves, ends):
            candidate = Spelling(targets, indices, pattern)
            if indices and candidate.denotes(rivals) == goal:
                return candidate
    return Spelling(tuple(sorted(goal)))


def pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value that PEFT's `rank_pattern` or `alpha_pattern` has for a module of that name."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def matches(pattern: str, name: str) -> bool:
    """Whether PEFT takes a key of `rank_pattern` or `alpha_pattern` for a module of that name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
