"""What `lorafit eval` and `lorafit merge` find, as the screen, `--json` and the tests read it."""

from __future__ import annotations

from dataclasses import dataclass


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
    file; `ranked` are several adapters from the lowest loss on, each against the first: `delta` and its interval are
    the difference to it; `also` are texts that the adapters were not meant to change; `benchmarks` the figures of
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
    ranked: tuple[AdapterScore, ...] = ()


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


@dataclass(frozen=True, slots=True)
class ExportReport:
    """A file for another tool: of an adapter or a model, its tensors, and the alpha it names for an adapter."""

    source: str
    output: str
    adapter: bool
    tensors: int
    bytes: int
    alpha: float | None
