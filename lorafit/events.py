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
            yield f"{count(self.cut)} examples are longer than a row and cut; --overflow split keeps all of them"
        if self.split:
            yield f"{count(self.split)} examples are longer than a row and split into several"
        if self.too_long:
            yield f"{count(self.too_long)} examples are longer than a row and dropped"
        if self.unsupervised:
            yield f"{count(self.unsupervised)} examples hold nothing to learn and are dropped, as {self.unsupervised_at}"
        if self.cut_away:
            yield f"{count(self.cut_away)} examples are dropped: nothing to learn is left of them once cut"
        if self.duplicates:
            yield f"{rows_text(self.duplicates)} {'is' if self.duplicates == 1 else 'are'} the same as another"
        if self.overlap:
            yield (
                f"{count(self.overlap)} of the {rows_text(self.held_out_rows)} held out "
                f"{'is' if self.overlap == 1 else 'are'} in the training data too: the held-out loss is optimistic"
            )
        if self.no_end:
            yield (
                f"what is learned of {rows_text(self.no_end)} ends with no end token: the model is not taught where to stop"
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
    damaged: tuple[str, ...] = ()  # what was wrong with the checkpoints after that step


@dataclass(frozen=True, slots=True)
class Predicted:
    """What was said of a run before it: bytes at the peak (weights and all, without what Python and
    the libraries hold), seconds in its training steps."""

    peak_memory_bytes: int
    seconds: float
    trainable_params: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something that a person should know of the run."""

    text: str


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """What becomes of the `layers` below the cut: kept in `memory` or on `disk` after the first pass,
    or run every time (`off`); why; and the bytes of it."""

    where: str
    reason: str
    layers: int = 0
    bytes: int = 0


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
    memory_growth_bytes: int = 0  # the peak less what the process held before the model was loaded
    predicted: Predicted | None = None
    best: Evaluated | None = None  # where on the way the held-out rows lost less than at the end
    sample: Said | None = None
    adapter_step: int = 0
    task: str = "causal"
    settings: dict[str, Any] = field(default_factory=dict)  # model, data, preset, layers, … as in run.yaml
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Score:
    """One model over the rows: loss and perplexity per supervised token, and top-1 accuracy.

    `exact` is the share of the rows with a short answer that it says word for word; None where no
    row has one.
    """

    loss: float
    perplexity: float
    accuracy: float
    exact: float | None = None


@dataclass(frozen=True, slots=True)
class RowChange:
    """A row that gained or lost much: its loss per supervised token, in nats, under both."""

    where: str
    text: str
    tokens: int
    base: float
    adapter: float


@dataclass(frozen=True, slots=True)
class AdapterScore(Score):
    """An adapter over the same rows. `delta` is its loss less the base's; `stderr` its standard
    error and `low`, `high` the ends of its 95 % interval, from the paired differences of the rows.

    `best` are the rows that gained the most, `worst` those that gained the least or lost.
    """

    path: str = ""
    delta: float = 0.0
    stderr: float = 0.0
    low: float = 0.0
    high: float = 0.0
    best: tuple[RowChange, ...] = ()
    worst: tuple[RowChange, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Some of the rows, or other ones, under one name: base and adapters over them."""

    name: str
    rows: int
    tokens: int
    base: Score
    adapters: tuple[AdapterScore, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, what was wanted (empty where nobody said), and what each model says to it."""

    prompt: str
    reference: str
    base: str
    adapters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What a model reaches in a task of lm-eval, by one of its metrics; `stderr` as lm-eval states it."""

    task: str
    metric: str
    model: str
    value: float
    stderr: float | None = None


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Base and adapters over the same rows; without rows, what they say alone.

    `paths` are the adapters', in the order of all that is said of them; `exact_rows` is how many rows
    have a short answer. `groups` are the rows by `by`, a column or their
    file; `also` are texts that the adapters were not meant to change; `benchmarks` the figures of
    lm-eval's tasks, by model; `page` where all of it is drawn.
    """

    rows: int
    tokens: int
    base: Score | None
    adapters: tuple[AdapterScore, ...]
    samples: tuple[Sample, ...]
    paths: tuple[str, ...] = ()
    exact_rows: int = 0
    by: str = ""
    groups: tuple[Group, ...] = ()
    also: tuple[Group, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    page: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightProof:
    """Every tensor of a merged model compared with what base and adapters make it: `tensors` of `values`, of
    which `adapted` have an adapter. `moved_tensors` and `moved_values` are not what the base has."""

    tensors: int
    values: int
    adapted: int
    moved_tensors: int
    moved_values: int


@dataclass(frozen=True, slots=True)
class Verified:
    """Merged model against base and adapter, on real prompts, over every place of them.

    `adapter_logit_diff` is how far the adapter moves the base's logits: what the difference stands
    against. Losses are in nats per token of the prompts. `note` says why it was not done block by block.
    """

    max_logit_diff: float
    argmax_agreement: float
    tokens: int
    tolerance: float
    adapter_logit_diff: float
    loss: float
    merged_loss: float
    note: str = ""
    weights: WeightProof | None = None


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was merged and where to; `adapted` tensors of `tensors`. `left_out` are files of base and adapters
    that are not part of the merged model."""

    output: str
    tensors: int
    adapted: int
    bytes: int
    seconds: float
    verify: Verified | None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


Event = (
    DataReport
    | Started
    | Predicted
    | Note
    | PrefixCache
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
