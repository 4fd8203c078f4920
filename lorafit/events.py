"""What a run says while it runs, and the reports it ends with. The screen, `--json`,
`events.jsonl` and the tests all read this one stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import exp
from typing import Any

from lorafit.jsonio import jsonable
from lorafit.units import count, rows_text


@dataclass(frozen=True, slots=True)
class Loss:
    """A mean loss in nats per supervised token, over so many of them."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return exp(self.loss) if self.loss < 700 else float("inf")


@dataclass(frozen=True, slots=True)
class ReadSource:
    """One `--data`: its name, the format it was read in, its examples, how often it comes in an epoch; its
    rows, and what a person should know of them."""

    name: str
    format: str
    examples: int
    weight: float = 1.0
    rows: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as the model sees it: its text in pieces, each learned or only read."""

    where: str
    tokens: int
    supervised_tokens: int
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a run's rows are like, and what was done to get them.

    `lengths` are quantiles in tokens (min, p50, p90, p99, max); `typical` is the length that a token
    of them finds itself in, sum of n^2 / sum of n. Of the examples, `cut` were cut to length, `split`
    into several rows, `too_long` dropped for their length, `unsupervised` for having nothing to learn
    (`unsupervised_at` is the first such), `cut_away` for having nothing left to learn once cut. Of the
    training rows, `duplicates` are the same as another, `no_end` end with no end token; `overlap` of
    the held-out rows are training rows too. Of the rows read, `blank` hold no text and `bad` cannot be used:
    both are skipped. In `seams` rows a token holds the end of the prompt and the start of the answer.
    `weight` is what the supervised tokens count in the loss: their number where the data gives no weights.
    """

    sources: tuple[ReadSource, ...]
    rows: int
    tokens: int
    supervised_tokens: int
    held_out_rows: int
    held_out_tokens: int
    held_out_name: str
    lengths: dict[str, int]
    typical: int
    cut: int = 0
    split: int = 0
    too_long: int = 0
    unsupervised: int = 0
    unsupervised_at: str = ""
    cut_away: int = 0
    duplicates: int = 0
    overlap: int = 0
    no_end: int = 0
    blank: int = 0
    bad: int = 0
    seams: int = 0
    weight: float = 0.0
    samples: tuple[Rendered, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Tokens of a row."""
        return self.tokens / self.rows

    @property
    def share(self) -> float:
        """The part of the tokens that is learned."""
        return self.supervised_tokens / self.tokens

    def findings(self) -> Iterator[str]:
        """What a person should know of the data before training on them."""
        yield from self.notes
        if self.cut:
            yield f"{count(self.cut)} examples are longer than --max-length and lose their end; a higher one or --overflow split keeps it"
        if self.split:
            yield f"{count(self.split)} examples are longer than --max-length and split into several"
        if self.too_long:
            yield f"{count(self.too_long)} examples are longer than --max-length and dropped"
        if self.unsupervised:
            yield f"{count(self.unsupervised)} examples hold nothing to learn and are dropped, as {self.unsupervised_at}"
        if self.cut_away:
            yield f"{count(self.cut_away)} examples are dropped: nothing to learn is left of them once cut"
        if self.duplicates:
            yield f"{rows_text(self.duplicates)} {'is a duplicate' if self.duplicates == 1 else 'are duplicates'}"
        if self.overlap:
            yield (
                f"{count(self.overlap)} of the {rows_text(self.held_out_rows)} held out "
                f"{'is' if self.overlap == 1 else 'are'} in the training data too: the held-out loss is optimistic"
            )
        if self.no_end:
            yield (
                f"{rows_text(self.no_end)} {'ends' if self.no_end == 1 else 'end'} without an end token in the loss: where to stop is not learned from them"
            )

    @staticmethod
    def of(data: dict[str, Any]) -> DataReport:
        """The look that was written as that JSON. Raises TypeError or KeyError for what is none."""
        samples = (
            Rendered(**{**row, "pieces": tuple((str(t), bool(b)) for t, b in row["pieces"])})
            for row in data["samples"]
        )
        rows = (ReadSource(**{**row, "notes": tuple(row.get("notes", ()))}) for row in data["sources"])
        return DataReport(
            **{**data, "sources": tuple(rows), "samples": tuple(samples), "notes": tuple(data["notes"])}
        )


@dataclass(frozen=True, slots=True)
class Started:
    """The run is set up: how many steps, rows and tokens there are to do."""

    steps: int
    epochs: float
    rows: int
    held_out_rows: int
    tokens: int
    supervised_tokens: int
    held_out_digest: str = ""
    resumed_at: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    sharded: bool = False  # the base is divided among the processes
    damaged: tuple[str, ...] = ()  # what was wrong with the checkpoints after that step


@dataclass(frozen=True, slots=True)
class Predicted:
    """What was said of a run before it: bytes at the peak (weights and all, without what Python and
    the libraries hold), seconds in its training steps; and that other work disturbed their timing, if so."""

    peak_memory_bytes: int
    seconds: float
    trainable_params: int
    busy: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """Something that a person should know of the run."""

    text: str


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """What becomes of the `layers` below the cut: run once over all rows before the first step, their output
    kept in `memory` or on `disk`; or run every time (`off`). Why; and the bytes of it. `streamed` layers are
    held only while they run."""

    where: str
    reason: str
    layers: int = 0
    bytes: int = 0
    streamed: bool = False


@dataclass(frozen=True, slots=True)
class Filling:
    """The layers below the cut have run over `done` of `tokens` tokens, held-out ones with them, in `seconds`.
    Only the last one, where all are done, is recorded: with the bytes of streamed weights that were read."""

    done: int
    tokens: int
    seconds: float
    bytes_read: int = 0


@dataclass(frozen=True, slots=True)
class Compiling:
    """That many adapted blocks are being compiled; once more when they are, after `seconds`: that one is recorded, with how
    far `off` their gradient is from that of the plain blocks, as a share of its length."""

    blocks: int
    seconds: float = 0.0
    off: float = 0.0

    @property
    def done(self) -> bool:
        return self.seconds > 0


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The held-out loss, in nats per supervised token, after `step` optimizer steps; step 0 is before training.
    `best` says that it is the lowest so far."""

    step: int
    loss: float
    tokens: int
    best: bool = False


@dataclass(frozen=True, slots=True)
class Stepped:
    """One optimizer step: its loss per supervised token, its tokens, its seconds. `weight` is what its
    supervised tokens count in the loss: their number where the data gives no weights."""

    step: int
    epoch: int
    loss: float
    tokens: int
    supervised_tokens: int
    seconds: float
    learning_rate: float
    grad_norm: float
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class EpochDone:
    """One pass over the rows, or what of it was done.

    `mfu` is the share of the device's measured matrix rate that went into what LoRA on this band
    must compute; None where the rate was not measured. `replayed` says whether the layers below
    the cut were replayed rather than run.
    """

    epoch: int
    loss: float
    tokens: int
    seconds: float
    tokens_per_second: float
    supervised_tokens: int = 0
    mfu: float | None = None
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is whole on disk; `best` has the lowest held-out loss so far."""

    step: int
    path: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class Said:
    """A prompt of the held-out rows, what was wanted, and what the model says to it before and after training."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a finished run amounts to. `tokens_per_second` counts time in training steps only. `adapter_step` is
    the step of the saved adapter, whose held-out loss is `eval["after"]`; `eval["last"]` is that of the last step.
    `eval` is empty where no rows are held out.
    """

    output: str
    trainable_params: int
    steps: int
    tokens: int
    supervised_tokens: int
    seconds: float
    tokens_per_second: float
    epochs: tuple[EpochDone, ...]
    peak_memory_bytes: int
    eval: dict[str, Loss] = field(default_factory=dict)
    prefix_cache: PrefixCache | None = None
    fill_seconds: float = 0.0  # of the layers below the cut, over the training rows: part of `seconds`
    memory_growth_bytes: int = 0  # the peak less what the process held before the model was loaded
    predicted: Predicted | None = None
    best: Evaluated | None = None  # where on the way the held-out rows lost less than at the end
    sample: Said | None = None
    adapter_step: int = 0
    task: str = "causal"
    settings: dict[str, Any] = field(default_factory=dict)  # model, data, preset, layers, … as in run.yaml
    environment: dict[str, str] = field(default_factory=dict)


Event = (
    DataReport
    | Started
    | Predicted
    | Note
    | PrefixCache
    | Filling
    | Compiling
    | Evaluated
    | Stepped
    | EpochDone
    | Saved
    | TrainReport
)


def record(event: Event) -> dict[str, Any]:
    """An event as a line of `events.jsonl`: its kind and its fields."""
    names = {
        "TrainReport": "report",
        "EpochDone": "epoch",
        "Stepped": "step",
        "PrefixCache": "prefix",
        "DataReport": "data",
    }
    kind = type(event).__name__
    return {"event": names.get(kind, kind.lower()), **jsonable(event)}
