"""Rows of token ids, as a tokenizer made them elsewhere."""

from __future__ import annotations

from lorafit.data.example import Blank
from lorafit.data.messages import Message, from_text
from lorafit.errors import RequestError


def tokens_of(row: Message, where: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """(ids, labels, weights of the labels) that are given as they are, without the places that `attention_mask` leaves
    out; without labels all are learned, and without weights each counts 1.

    Raises RequestError for what is not a list of ids, labels from -100 on, weights or a mask of their length.
    """
    ids = from_text(row.get("input_ids"), where, "input_ids")
    labels = from_text(row.get("labels"), where, "labels")
    labels = ids if labels is None else labels
    for name, value, least in (("input_ids", ids, 0), ("labels", labels, -100)):
        whole = isinstance(value, (list, tuple)) and all(type(i) is int and i >= least for i in value)
        if not whole or any(-100 < i < 0 for i in value):
            raise RequestError(f"`{where}`: `{name}` is not a list of token ids")
    weights = from_text(row.get("weights"), where, "weights") or ()
    if weights and not (
        isinstance(weights, (list, tuple))
        and len(weights) == len(labels)
        and all(type(w) in (int, float) and 0 <= w < float("inf") for w in weights)
    ):
        raise RequestError(f"`{where}`: `weights` is not a list of numbers from 0 on, one for each label")
    if weights:  # a label of weight 0 is read, not learned
        labels = [-100 if not weight else label for label, weight in zip(labels, weights, strict=True)]
    kept = _attended(row, where, len(ids))
    if len(kept) < len(ids):
        # labels of a decoder's own text have nothing to do with the mask, even where they are as many
        if len(labels) == len(ids) and all(labels[n] in (-100, ids[n]) for n in {*range(len(ids))} - {*kept}):
            labels = [labels[n] for n in kept]
            weights = [weights[n] for n in kept] if weights else ()
        ids = [ids[n] for n in kept]
    if not ids:
        raise Blank
    return tuple(ids), tuple(labels), tuple(map(float, weights))


def _attended(row: Message, where: str, length: int) -> list[int]:
    """The places of a row that its `attention_mask` does not leave out."""
    mask = from_text(row.get("attention_mask"), where, "attention_mask")
    if mask is None:
        return list(range(length))
    if (
        not isinstance(mask, (list, tuple))
        or len(mask) != length
        or any(type(each) not in (int, bool, float) for each in mask)
    ):
        raise RequestError(
            f"`{where}`: `attention_mask` is not a list of numbers, one for each id", "0 leaves an id out"
        )
    return [place for place, each in enumerate(mask) if each]
