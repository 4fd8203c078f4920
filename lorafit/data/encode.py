"""A text to ids and labels: encoded once, whole; what is learned is marked by the characters it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorafit.data.rows import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Text:
    """A text to be encoded, and the characters of it that are learned; `whole` learns all of it. `weights`
    are what the spans count in the loss; empty where each counts 1. `exact` keeps
    the white space that a tokenizer's normalizer would drop."""

    text: str
    spans: tuple[Span, ...] = ()
    whole: bool = False
    exact: bool = False
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids, the labels (IGNORED where nothing is learned), and the token, if there is one, that holds the end
    of what is read and the start of what is learned. `weights` are what the labels count in the loss; empty
    where each counts 1."""

    ids: list[int]
    labels: list[int]
    seam: int | None = None
    weights: list[float] = field(default_factory=list)

    def part(self, start: int, stop: int) -> Encoded:
        """The tokens from `start` to before `stop`."""
        return Encoded(self.ids[start:stop], self.labels[start:stop], None, self.weights[start:stop])

    def __add__(self, other: Encoded) -> Encoded:
        """One behind the other, both with weights or both without."""
        return Encoded(self.ids + other.ids, self.labels + other.labels, None, self.weights + other.weights)


@dataclass(slots=True)
class Encoder:
    """A tokenizer without its own tokens around a text: `begin` and `behind` are those."""

    tokenizer: PreTrainedTokenizerBase
    begin: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    special: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Its own tokens are those before and behind a letter; none where it puts them elsewhere."""
        plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
        framed = list(tokenizer("a", verbose=False)["input_ids"])
        begin: tuple[int, ...] = ()
        behind: tuple[int, ...] = ()
        places = [n for n in range(len(framed)) if plain and framed[n : n + len(plain)] == plain]
        if places:
            begin, behind = tuple(framed[: places[0]]), tuple(framed[places[0] + len(plain) :])
        elif not plain:  # a vocabulary that does not know the letter
            half = (len(framed) + 1) // 2
            begin, behind = tuple(framed[:half]), tuple(framed[half:])
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        special = frozenset(tokenizer.all_special_ids) | {
            number for number, token in added.items() if getattr(token, "special", False)
        }
        return cls(tokenizer, begin, behind, special)

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Each text encoded once, without the tokenizer's own tokens around it."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return [self._by_prefixes(text) for text in texts]
        made = self._together(texts)
        plainer = _keeping_white_space(self.tokenizer)
        if plainer is not None:
            for number, text in enumerate(texts):
                if text.exact and _has_loose_space(text.text):
                    with _normalizer(self.tokenizer, plainer):
                        (found,) = self._together([text])
                    if self._spelt(found.ids) == text.text.strip():
                        made[number] = found
        return made

    def _together(self, texts: Sequence[Text]) -> list[Encoded]:
        with _exact_offsets(self.tokenizer):
            found = self.tokenizer(
                [text.text for text in texts],
                add_special_tokens=False,
                verbose=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
        every = found["input_ids"]
        return [
            self._marked(list(ids), found, n, text)
            for n, (ids, text) in enumerate(zip(every, texts, strict=True))
        ]

    def _marked(self, ids: list[int], found: Any, number: int, text: Text) -> Encoded:
        if text.whole:
            return Encoded(ids, list(ids))
        labels, seam = [IGNORED] * len(ids), None
        end = len(text.text)
        if len(text.spans) == 1 and text.spans[0][1] == end:  # an answer at the end, as most rows are
            start = text.spans[0][0]
            if start == 0:
                return Encoded(ids, list(ids))
            first = found.char_to_token(number, start)
            if first is not None:
                encoding = found.encodings[number]
                while (
                    first
                    and encoding.token_to_chars(first - 1)
                    and encoding.token_to_chars(first - 1)[1] > start
                ):
                    first -= 1
                places = [encoding.token_to_chars(first)]
                head, seam = self._head(ids, places, first, start)
                labels[head:] = ids[head:]
                return Encoded(ids, labels, seam, [w for w in text.weights for _ in ids])
        offsets = found.encodings[number].offsets
        weights = [1.0] * len(ids) if text.weights else []
        at = 0
        for n, (start, stop) in enumerate(text.spans):
            while at < len(ids) and offsets[at][1] <= start and offsets[at][0] < start:
                at += 1
            first = at
            while at < len(ids) and offsets[at][0] < stop:
                if offsets[at][1] > start:
                    labels[at] = ids[at]
                    if weights:
                        weights[at] = text.weights[n]
                at += 1
            if first < len(ids) and labels[first] != IGNORED:
                head, crossing = self._head(ids, [offsets[first]], first, start)
                seam = crossing if seam is None else seam
                labels[first:head] = [IGNORED] * (head - first)
        return Encoded(ids, labels, seam, weights)

    def _head(self, ids: list[int], places: Sequence[Span], first: int, start: int) -> tuple[int, int | None]:
        """(the first token that is learned, the token across the seam): a special token that swallows the
        white space behind it is still the prompt's."""
        if places[0] is None or places[0][0] >= start:
            return first, None
        return (first + 1 if ids[first] in self.special else first), first

    def _by_prefixes(self, text: Text) -> Encoded:
        """Without offsets: a span begins behind the tokens that the text before it is encoded to, so far as
        the whole begins with those, and so far as they spell it."""

        def ids_of(part: str) -> list[int]:
            return list(self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

        ids = ids_of(text.text)
        if text.whole:
            return Encoded(ids, list(ids))
        labels, seam = [IGNORED] * len(ids), None
        weights = [1.0] * len(ids) if text.weights else []
        for n, (start, stop) in enumerate(text.spans):
            head, exact = self._boundary(ids, text.text[:start], ids_of)
            tail, closed = (
                self._boundary(ids, text.text[:stop], ids_of) if stop < len(text.text) else (len(ids), True)
            )
            if not exact and head < len(ids):
                if ids[head] in self.special:
                    head += 1
                seam = head if seam is None else seam
            tail += not closed
            labels[head:tail] = ids[head:tail]
            if weights:
                weights[head:tail] = [text.weights[n]] * len(ids[head:tail])
        return Encoded(ids, labels, seam, weights)

    def _boundary(self, ids: list[int], before: str, ids_of: Any) -> tuple[int, bool]:
        """(how many tokens of the whole lie before the end of this text, whether they are just this text)."""
        apart = ids_of(before)
        if ids[: len(apart)] == apart:
            return len(apart), True
        shared = next((n for n, (a, b) in enumerate(zip(ids, apart, strict=False)) if a != b), 0)
        written = self._spelt(ids[:shared])
        while shared < len(ids) and len(self._spelt(ids[: shared + 1])) <= len(before.strip()):
            shared += 1
            written = self._spelt(ids[:shared])
        return shared, written.strip() == before.strip()

    def _spelt(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip()


def _has_loose_space(text: str) -> bool:
    return text != text.strip() or "  " in text


def _keeping_white_space(tokenizer: Any) -> Any:
    """The tokenizer's normalizer without the steps that strip a text and collapse its spaces; None where it
    has no such steps."""
    from tokenizers import normalizers

    found = tokenizer.backend_tokenizer.normalizer
    if not isinstance(found, normalizers.Sequence):
        return None
    steps = (
        json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]["normalizers"] if _drops(found) else []
    )
    kept = [
        found[n] for n, step in enumerate(steps)
        if step["type"] != "Strip" and not (step["type"] == "Replace" and "Regex" in step["pattern"] and step["content"] == " ")
    ]  # fmt: skip
    return normalizers.Sequence(kept) if len(kept) < len(steps) else None


def _drops(normalizer: Any) -> bool:
    """Whether a normalizer drops white space."""
    return bool(normalizer.normalize_str("a  b\n").count("\n") == 0)


@contextmanager
def _normalizer(tokenizer: Any, other: Any) -> Iterator[None]:
    """With another normalizer."""
    backend = tokenizer.backend_tokenizer
    kept = backend.normalizer
    backend.normalizer = other
    try:
        yield
    finally:
        backend.normalizer = kept


@contextmanager
def _exact_offsets(tokenizer: Any) -> Iterator[None]:
    """Without the post-processor, which takes white space off the tokens' places in the text."""
    backend = tokenizer.backend_tokenizer
    kept = backend.post_processor
    backend.post_processor = None
    try:
        yield
    finally:
        backend.post_processor = kept
