"""What a run will cost, before it starts: one estimate, the settings that fit, the whole matrix.

torch is imported only where something must be simulated, timed or read. Results are cached: the same
plan a second time does not need torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from lorafit.adapter import Plan, needs_whole_base, planned
from lorafit.cache import cache_folder
from lorafit.data import MASKED_SHARE
from lorafit.errors import LorafitError, RequestError
from lorafit.estimate.changes import changes
from lorafit.estimate.cost import estimate
from lorafit.estimate.device import (
    device_of,
    dtype_of,
    free_on,
    give_back,
    gpu_of,
    machine_of,
    memory_of,
    torch_device,
)
from lorafit.estimate.formulas import by_formula
from lorafit.estimate.glibc_heap import library
from lorafit.estimate.kept import Kept
from lorafit.estimate.sharding import divided
from lorafit.estimate.terms import ITEMSIZE, Estimate, Profile, Shape, Timing, Work
from lorafit.events import DataReport, Predicted
from lorafit.model import (
    ModelMap,
    ModelSource,
    held_as,
    unreadable,
    weight_bytes,
)
from lorafit.settings import DATA, OPTIONS, Preset, RunConfig, derive_from_rows, weighted
from lorafit.system import free_disk, without_collecting

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


Tick = Callable[[float, float], None]  # (bytes read, total)


@dataclass(frozen=True, slots=True)
class Alternative:
    """Other settings, and what they cost: peak in bytes, seconds per epoch, tokens per second."""

    flags: str
    peak: int
    seconds_per_epoch: float | None
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a plan fits in the free memory (bytes) of a device, and if not, the nearest settings that do."""

    device: str
    free: int
    fits: bool
    alternatives: tuple[Alternative, ...] = ()


@dataclass(slots=True)
class Forecast:
    """One model, one run's settings, one device: what plans on it cost.

    `probing` times the device; `work` is the amount of data, where it is known. `shape` is that of one of the
    `processes`.
    """

    source: ModelSource
    found: ModelMap
    config: RunConfig
    device: str
    probing: bool = True
    work: Work | None = None
    shape: Shape = field(default_factory=lambda: Shape(1, 1))
    typical: int = 0  # tokens of a row in an average batch; 0: as the longest
    seconds: float = 5.0  # the probe's time limit
    kept: Kept = field(default_factory=Kept)
    notes: list[str] = field(default_factory=list)
    look: DataReport | None = None
    fresh: bool = False  # times the device again, even if a timing is kept
    processes: int = 1
    room: int = 0  # bytes that a run may take of the device
    gpu: int | None = None  # its number, where it is not torch's own choice
    threads: int = 0  # that torch was told to use; 0: its own choice
    elsewhere: bool = False  # the device is another machine's

    @property
    def free(self) -> int:
        """Bytes that are free now for a process of the run, on the device of this machine."""
        return free_on(self.device, self.processes, self.gpu)

    def profile(self, plan: Plan, shape: Shape) -> Profile:
        """The simulated step, or the formulas where the model's code cannot be simulated."""
        facts = [*self._facts(plan, shape), self.device, library()]
        found: Profile | None = self.kept.get(Profile, facts)
        if found is None:
            with without_collecting():
                from lorafit.estimate import simulate
            try:
                found = simulate.simulate_step(
                    self.source,
                    self.found,
                    plan,
                    shape,
                    self.device,
                    head_chunk=self.config.head_chunk or 0,
                )
            except RequestError:  # `train` would refuse it too
                raise
            except LorafitError as error:
                self.notes.append(f"the step could not be simulated, so formulas are used: {error.message}")
                return by_formula(plan, self.found, shape)
            self.kept.put(found, facts)
        return found

    def timing(self, plan: Plan) -> Timing | None:
        """The probe's timing of this plan on this device; None without a probe or where it fails."""
        if not self.probing:
            return None
        shape = self._typical(self.shape)
        facts = [*self._facts(plan, shape), machine_of(self.device, self.gpu, self.threads)]
        found = None if self.fresh else self.kept.get(Timing, facts)
        if found is None:
            with without_collecting():
                from lorafit.estimate.timing import probe
            device = torch_device(self.device, self.gpu)
            try:
                found = probe(self.source, self.found, plan, shape, device, self.seconds)
            except LorafitError as error:
                self.notes.append(f"the device could not be timed: {error.message}")
                return None
            finally:
                give_back(device)
            if found.sure:  # a busy machine's timing is not kept
                self.kept.put(found, facts)
        if found.length < shape.length:  # longer rows cost more per token
            found = self._scaled(found, plan, replace(shape, length=found.length), plan, shape)
        return found

    def estimate(self, plan: Plan, timing: Timing | None = None) -> Estimate:
        """What a plan costs at this forecast's shape, with a timing of this plan."""
        profile = self.profile(plan, self.shape)
        typical = self.profile(plan, self._typical(self.shape))
        profile = replace(profile, forward=typical.forward, backward=typical.backward, prefix=typical.prefix)
        free = self.room if self.elsewhere and self.device == "cpu" else memory_of(self.processes)
        return estimate(
            plan,
            self.found,
            self.shape,
            profile,
            timing,
            self.work,
            device=self.device,
            replay=not profile.refusal,
            prefix_cache=self.config.prefix_cache,
            optimizer=self.config.optimizer,
            processes=self.processes,
            free=min(free, self.room or free) if self.device == "cpu" else free,
            room=self.room,
            unreadable=unreadable(self.source.place),
            free_on_disk=free_disk(cache_folder()),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def scaled(self, timing: Timing | None, of: Plan, to: Plan, shape: Shape) -> Timing | None:
        """The timing of one plan scaled to another plan or shape by the FLOPs of both."""
        if timing is None:
            return None
        return self._scaled(timing, of, self._typical(self.shape), to, self._typical(shape))

    def _scaled(self, timing: Timing, of: Plan, was_of: Shape, to: Plan, shape: Shape) -> Timing:
        was, now = self.profile(of, was_of), self.profile(to, shape)
        rate = timing.token / max(1, was.forward + was.backward)
        return replace(
            timing,
            token=rate * (now.forward + now.backward),
            token_replayed=rate * (now.forward + now.backward - now.prefix),
            step=timing.step * to.trainable_params / max(1, of.trainable_params),
        )

    def fit(self, plan: Plan, preset: Preset, found: Estimate, timing: Timing | None, free: int) -> Fit:
        """Whether the plan fits in `free` bytes; if not, the nearest settings that do."""
        if found.memory.peak <= free:
            return Fit(self.device, free, True)
        options: list[Alternative] = []
        whole = needs_whole_base(plan.lora) is not None
        of_rows = bool(self.config.why("batch_size"))
        for single in changes(self.shape, self.config.layers, self.processes, self.found, not whole, of_rows):
            single = [change for change in single if self._fixed(plan, change[1]) < free]
            for flags, shape, layers in single:  # from the smallest change on
                other = self._alternative(plan, preset, timing, flags, shape, layers)
                if other is not None and other.peak <= free:
                    options.append(other)
                    break
        return Fit(self.device, free, False, tuple(sorted(options, key=lambda o: -o.tokens_per_second)))

    def _fixed(self, plan: Plan, shape: Shape) -> int:
        """Bytes that every step needs, whatever its shape."""
        if shape.residency != "resident":  # how much of the weights is held is seen only in the estimate
            return 3 * plan.adapter_bytes
        if shape.sharded:
            profile = Profile(0, 0, 0, 0, 0, 0, 0, False)
            return divided(self.found, plan, shape, profile, self.processes).held + 3 * plan.adapter_bytes
        held = held_as(self.found, shape.quantize)
        return weight_bytes(self.found, ITEMSIZE.get(shape.dtype, 4), held) + 3 * plan.adapter_bytes

    def _alternative(
        self,
        plan: Plan,
        preset: Preset,
        timing: Timing | None,
        flags: str,
        shape: Shape,
        layers: str | None,
    ) -> Alternative | None:
        other = replace(self, shape=shape, typical=min(self.typical, shape.length), notes=[])
        try:
            made = planned(self.found, preset, replace(self.config, quantize=shape.quantize), layers)
            cost = other.estimate(made, self.scaled(timing, plan, made, shape))
        except RequestError:
            return None
        return Alternative(flags, cost.memory.peak, cost.seconds_per_epoch, cost.tokens_per_second)

    def matrix(self, presets: Sequence[Preset], bands: Sequence[str]) -> list[dict[str, Any]]:
        """Every strategy × band with its parameters and cost, or with an error."""
        cells: list[dict[str, Any]] = []
        timed: tuple[Plan, Timing | None] | None = None
        for preset in presets:
            for band in bands:
                cell: dict[str, Any] = {"preset": preset.name, "layers": band}
                try:
                    made = planned(self.found, preset, self.config, band)
                    timed = timed or (made, self.timing(made))
                    cost = self.estimate(made, self.scaled(timed[1], timed[0], made, self.shape))
                except RequestError as error:
                    cells.append({**cell, "error": error.message})
                    continue
                cells.append(
                    {
                        **cell,
                        "modules": len(made.slots),
                        "trainable_params": made.trainable_params,
                        "adapter_bytes": made.adapter_bytes,
                        "peak_memory": cost.memory.peak,
                        "flops_per_token": cost.flops_per_token,
                        "tokens_per_second": cost.tokens_per_second,
                        "seconds_per_epoch": cost.seconds_per_epoch,
                        "seconds_per_epoch_replayed": cost.seconds_per_epoch_replayed,
                    }
                )
        return cells

    def _typical(self, shape: Shape) -> Shape:
        return replace(shape, length=min(shape.length, self.typical or shape.length))

    def _facts(self, plan: Plan, shape: Shape) -> list[Any]:
        plain = replace(
            shape, accumulate=1, supervised=round(shape.supervised, 2), residency="auto", sharded=False
        )
        return [self.source.config, plan.modules, plan.lora, plain, self.config.head_chunk]


def look_at(
    source: ModelSource, found: ModelMap, config: RunConfig, kept: Kept, tick: Tick = lambda done, total: None
) -> DataReport | None:
    """The report on the rows that `train` would use; None if no data are named.

    Files are read again when their size or modification time differs. Raises RequestError, as `train`
    does, for data that cannot be read.
    """
    if not config.data and config.model != "demo":
        return None
    names = [*(name for name, option in OPTIONS.items() if option.panel == DATA), "seed"]
    facts = [
        source.place,
        *(getattr(config, name) for name in names),
        *map(_stamp, [*config.data, *config.eval_data, config.chat_template or ""]),
        *(_stamp(str(Path(source.place) / name)) for name in TOKENIZER_FILES),
    ]
    if known := kept.get(DataReport, facts):
        return known if isinstance(known, DataReport) else None
    with without_collecting():
        from lorafit.data import load
        from lorafit.model import load_tokenizer
    tokenizer = load_tokenizer(source.place, source.name)
    look = load(config, tokenizer, found.task, found.vocab_size, tick).look
    kept.put(look, facts)
    return look


def _stamp(spec: str) -> list[Any]:
    """Names, sizes and modification times of a file or of a folder's files."""
    path = Path(weighted(spec)[0]).expanduser()
    if not spec or not (path.exists() or path.parent.is_dir()):
        return [spec]
    files = (
        [path]
        if path.is_file()
        else sorted(path.rglob("*") if path.is_dir() else path.parent.glob(path.name))
    )
    stamps = []
    for file in files:
        with suppress(OSError):  # removed meanwhile; reading the data will report it
            found = file.stat()
            stamps.append([str(file), found.st_size, found.st_mtime_ns])
    return [spec, stamps]


def prepare(
    config: RunConfig,
    source: ModelSource,
    found: ModelMap,
    *,
    probing: bool = True,
    elsewhere: bool = False,
    look: DataReport | None = None,
    seconds: float = 5.0,
    fresh: bool = False,
    processes: int = 1,
    room: int | None = None,
    threads: int = 0,
    tick: Tick = lambda done, total: None,
) -> tuple[Forecast, RunConfig]:
    """The forecast of a run, and its settings completed from its rows.

    `config` is completed from the model. `look` is the report on rows that are read already; `fresh`
    times the device again, even if a timing is kept. `processes` share each micro-batch. `room` is what a run may
    take of the device, by default what is free there. `threads` are those that torch was told to use, if it was.
    """
    device = device_of(config.device, elsewhere)
    kept = Kept()
    look = look or look_at(source, found, config, kept, tick)
    length = config.max_length or 1
    notes: list[str] = []
    if look is None:
        config = derive_from_rows(config, length)
        batch = config.batch_size or 1
        work, longest, typical, supervised = None, length, length, 1.0
    else:
        config = derive_from_rows(config, look.mean, look.rows)
        batch = config.batch_size or 1
        if batch > look.rows:
            notes.append(
                f"a batch of {batch:,} rows is more than the {look.rows:,} there are: all of them are one batch"
            )
            batch = look.rows
        steps = ceil(ceil(look.rows / batch) / config.accumulate)
        work = Work(look.tokens, steps, config.steps(steps), look.held_out_tokens)
        notes += _cut_warmup(config, work.steps)
        longest, typical, supervised = look.lengths["max"], look.typical, look.share
    if config.compile:
        notes.append(
            "--compile: time and memory are those of blocks that are not compiled; compiling comes on top"
        )
    if found.task == "masked":
        supervised *= MASKED_SHARE  # the share of these tokens that is masked, and so in the loss
    shape = Shape(
        ceil(batch / processes),
        longest,
        dtype_of(config, device),
        config.gradient_checkpointing,
        config.accumulate,
        supervised,
        config.attention,
        config.quantize,
        config.prefix_residency,
        config.shard and processes > 1,
    )
    made = Forecast(
        source,
        found,
        config,
        device,
        probing and not elsewhere,
        work,
        shape,
        typical,
        seconds,
        kept,
        notes,
        look,
        fresh,
        processes,
        room or 0,
        gpu_of(config.device) if device == "cuda" and not elsewhere else None,
        threads,
        elsewhere,
    )
    return replace(made, room=made.free) if room is None else made, config


def _cut_warmup(config: RunConfig, steps: int) -> list[str]:
    """A note where the warm-up is longer than the run."""
    if config.warmup < max(1, steps):
        return []
    return [
        f"--warmup {config.warmup:g} is cut to {steps - 1}: the run has {steps:,} "
        f"step{'s' * (steps > 1)}, and the last is at the full rate"
    ]


def predicted(cost: Estimate, plan: Plan) -> Predicted:
    """An estimate as a run records it, to compare with what it measures."""
    return Predicted(cost.memory.peak, cost.seconds or 0.0, plan.trainable_params, cost.busy)
