"""What a run's rows are like, and how a row looks to the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorafit.data.counts import Counts, remarks
from lorafit.data.rows import IGNORED, NO_END, Row, RowSet
from lorafit.events import DataReport, ReadSource, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.data.split import ReadData


def look_of(
    train: RowSet,
    kept: RowSet,
    own: Sequence[ReadData],
    counts: Sequence[Counts],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
) -> DataReport:
    lengths = train.lengths
    quantiles = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    once = np.unique(train.index)  # a row that a weight repeats is no duplicate
    contents = RowSet(train.stores, once).contents
    tokens = int(lengths.sum())
    sums = {
        field: sum(getattr(c, field) for c in counts)
        for field in ("cut", "split", "too_long", "unsupervised", "cut_away", "blank", "bad", "seams")
    }
    return DataReport(
        sources=tuple(
            ReadSource(
                Path(d.spec).name,
                ", ".join(dict.fromkeys(p.format for p in d.parts)),
                d.examples,
                d.weight,
                sum(len(p.store) for p in d.parts),
                tuple(remarks([p.counts for p in d.parts])),
            )
            for d in own
        ),
        rows=len(train),
        tokens=tokens,
        supervised_tokens=train.supervised,
        weight=round(train.weight, 3),
        held_out_rows=len(kept),
        held_out_tokens=int(kept.lengths.sum()),
        held_out_name=name,
        lengths={k: int(np.quantile(lengths, q, method="nearest")) for k, q in quantiles.items()},
        typical=round(float((lengths.astype(float) ** 2).sum() / tokens)),
        **sums,
        unsupervised_at=next((c.unsupervised_at for c in counts if c.unsupervised_at), ""),
        duplicates=len(contents) - len(np.unique(contents)),
        overlap=int(np.isin(kept.contents, contents).sum()),
        no_end=int((train.flags & NO_END > 0).sum()),
        samples=tuple(rendered(train[n], tokenizer, task) for n in _spread(len(train))),
        notes=tuple(remarks(list(counts))),
    )


def _spread(rows: int) -> list[int]:
    """Three rows to look at: the first, and two further on."""
    return sorted({0, rows // 3, 2 * rows // 3})


def rendered(row: Row, tokenizer: PreTrainedTokenizerBase, task: str) -> Rendered:
    """A row as the model sees it, what is learned apart from what is read."""
    ids, learned = list(row.ids), [label != IGNORED for label in row.labels]
    if task == "seq2seq":
        ids, learned = ids + list(row.labels), [False] * len(ids) + learned
    pieces, start = [], 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or learned[at] != learned[start]:
            pieces.append((str(tokenizer.decode(ids[start:at])), learned[start]))
            start = at
    return Rendered(row.where.rpartition("/")[2], len(ids), sum(learned), tuple(pieces))
