"""Which layers: a band of the depth or any other choice, as text and as indices.

A choice is one or more terms with commas between them:

    low  mid  high  all      a band, which scales with the depth
    3   0-3   8-             one layer, a range (both ends included), all from one on
    first:4   last:4         that many layers at either end

For `L` layers let `a = floor(L/3 + 1/2)` and `b = floor(3L/4 + 1/2)`: `low` is `0..a-1`, `mid` is
`a..b-1`, `high` is `b..L-1`. At 12: 0-3, 4-8, 9-11; at 32: 0-10, 11-23, 24-31. From three
layers on the bands tile the depth: no gap, no overlap, none empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor

from lorafit.errors import RequestError, closest

WAYS = "write it as `low`, `high`, `all`, `0-3`, `0,2,5`, `8-`, `first:4` or `last:4`"


@dataclass(frozen=True, slots=True)
class Band:
    """A part of the depth between two fractions of it, 0 at the embedding and 1 at the head."""

    name: str
    start: Fraction
    stop: Fraction
    about: str = ""

    def indices(self, depth: int) -> tuple[int, ...]:
        """The layers of a stack `depth` deep that lie in the band; may be empty."""
        half = Fraction(1, 2)
        return tuple(range(floor(self.start * depth + half), floor(self.stop * depth + half)))


LOW = Band("low", Fraction(0), Fraction(1, 3), "the lower third, next to the embedding")

MID = Band("mid", Fraction(1, 3), Fraction(3, 4), "the middle")

HIGH = Band("high", Fraction(3, 4), Fraction(1), "the upper quarter, next to the head: the cheapest to train")

ALL = Band("all", Fraction(0), Fraction(1), "every layer")

BANDS: dict[str, Band] = {band.name: band for band in (LOW, MID, HIGH, ALL)}

# What comes nearest to a band in a stack that is too small for it.
NEAREST = {"low": "first:1", "mid": "all", "high": "last:1"}
TILED_FROM = 3  # the least depth at which low, mid and high are all there


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """A choice of layers as it was written, independent of any depth.

    `bands` are a preset's own, by name: a pair of fractions, or another choice as text.
    Raises RequestError when the text is not a choice of layers.
    """

    text: str
    bands: Mapping[str, Band | str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise RequestError("the choice of layers is empty", WAYS)
        for term in self.terms:
            self._check(term)

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(term.strip() for term in self.text.split(","))

    def _check(self, term: str) -> None:
        if term in BANDS or term in self.bands:
            return
        if found := re.fullmatch(r"([0-9]+)(?:-([0-9]*))?", term):
            first, last = found.groups()
            if last and int(last) < int(first):
                raise RequestError(f"layers `{term}` run backwards", f"write it as `{last}-{first}`")
            return
        if re.fullmatch(r"(first|last):[1-9][0-9]*", term):
            return
        if not term:
            raise RequestError(f"an empty term in layers `{self.text}`", WAYS)
        word = re.fullmatch(r"[A-Za-z_]\w*", term)
        hint = closest(term, [*BANDS, *self.bands]) if word else WAYS
        raise RequestError(f"`{term}` is not a choice of layers", hint)

    def indices(self, depth: int) -> tuple[int, ...]:
        """The chosen layers of a stack `depth` deep, ascending, each once.

        Raises RequestError for a layer that is not there, and for a band at a depth
        too small to have one.
        """
        chosen: set[int] = set()
        for term in self.terms:
            chosen.update(self._indices(term, depth))
        return tuple(sorted(chosen))

    def _indices(self, term: str, depth: int) -> tuple[int, ...]:
        band = self.bands.get(term) or BANDS.get(term)
        if isinstance(band, str):
            return LayerChoice(band).indices(depth)
        if band is not None:
            layers = band.indices(depth)
            if not layers or (term in ("low", "mid", "high") and depth < TILED_FROM):
                raise RequestError(
                    f"a stack of {depth} layers has no band `{term}`: bands need {TILED_FROM} layers",
                    f"--layers {NEAREST[term]}"
                    if term in NEAREST
                    else f"--layers all, or layers out of {layer_span(depth)}",
                )
            return layers
        if term.startswith(("first:", "last:")):
            wanted = int(term.partition(":")[2])
            if wanted > depth:
                raise RequestError(
                    f"`{term}` is more than the {depth} layers of the stack",
                    f"the layers are {layer_span(depth)}",
                )
            return tuple(range(depth))[:wanted] if term[0] == "f" else tuple(range(depth))[-wanted:]
        first, dash, last = term.partition("-")
        low = int(first)
        high = int(last) if last else (depth - 1 if dash else low)
        if max(low, high) >= depth:
            raise RequestError(
                f"there is no layer {max(low, high)} in a stack of {depth} layers",
                f"the layers are {layer_span(depth)}",
            )
        return tuple(range(low, high + 1))


def layer_span(depth: int) -> str:
    """`0-11`, or `0` for a single layer."""
    return f"0-{depth - 1}" if depth > 1 else "0"
