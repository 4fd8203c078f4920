"""The training loop: a page that says what it does, as a stream of events."""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from lorafit import adapter, cards, checkpoint, heap, page, schedule, seals
from lorafit import prefix as prefixes
from lorafit.batch import Batch, collate, mask_tokens
from lorafit.checkpoint import RunFolder
from lorafit.config import RunConfig
from lorafit.cost import Shape, choose, flops_per_token, free_disk, free_memory
from lorafit.data import Rows
from lorafit.errors import Interrupted, OutOfMemory, RequestError, RunError
from lorafit.evaluate import Evaluator, mask_id
from lorafit.events import (
    EpochDone,
    Evaluated,
    Event,
    Loss,
    Predicted,
    PrefixCache,
    Saved,
    Started,
    Stepped,
    TrainReport,
    record,
)
from lorafit.modelmap import ModelMap, jsonable
from lorafit.outputs import CARD, EVENTS, PAGE, RUN_FILE, writing
from lorafit.packing import Part, batches, in_epoch
from lorafit.plan import Plan
from lorafit.prefix import DiskStore, Prefix, blocks_below, refusal, trained_in
from lorafit.runs import read_back
from lorafit.step import Forward, base_of, checkpoint_activations
from lorafit.survey import Source, load_model, pick_device, pick_dtype
from lorafit.tensorfiles import fingerprint

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Job:
    """A run, set up: everything the loop needs, nothing it must look for."""

    model: PeftModel
    task: str
    config: RunConfig
    plan: Plan
    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    found: ModelMap
    device: torch.device
    folder: RunFolder
    stop: Callable[[], int] = lambda: 0  # the signal that asks for an end, or 0
    predicted: Predicted | None = None
    fingerprint: str = ""  # of the base's weights
    memory_before: int = 0  # bytes that the process held before the model was loaded
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    batches: list[tuple[Part, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = list(checkpoint.trainable(self.model).values())
        lengths = self.rows.train.lengths
        if self.task == "seq2seq":
            lengths = lengths + self.rows.train.target_lengths
        self.batches = batches(lengths.tolist(), self.batch_size, self.config.seed)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size or 1

    @property
    def epochs(self) -> int:
        return self.config.epochs or 1

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.batches) / self.config.accumulate)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return min(self.steps_per_epoch * self.epochs, self.config.max_steps or sys.maxsize)

    def micro_batches(self, epoch: int) -> Iterator[list[Batch]]:
        """The optimizer steps of one epoch, each as its micro-batches."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = in_epoch(len(self.batches), self.config.seed, epoch)
        for at in range(0, len(order), self.config.accumulate):
            group = []
            for number in order[at : at + self.config.accumulate]:
                for part in range(len(self.batches[number])):
                    batch = self.micro_batch(number, part)
                    if self.task == "masked":
                        batch = mask_tokens(batch, mask_id(self.tokenizer), self.found.vocab_size, generator)
                    group.append(batch)
            yield group

    def micro_batch(self, number: int, part: int) -> Batch:
        """One part of one batch: the same rows whenever it is asked for."""
        rows = [self.rows.train[row] for row in self.batches[number][part]]
        return collate(rows, self.tokenizer.pad_token_id or 0, self.task, f"train {number}.{part}")

    @property
    def keys(self) -> list[str]:
        """The keys of all micro-batches of training."""
        return [f"train {n}.{part}" for n, batch in enumerate(self.batches) for part in range(len(batch))]


def assemble(
    source: Source,
    found: ModelMap,
    config: RunConfig,
    plan: Plan,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    stop: Callable[[], int] = lambda: 0,
    predicted: Predicted | None = None,
) -> Job:
    """Load the model, put the planned adapter in, and hold the two against each other.

    `predicted` is what was said of the run before; it is reported beside what is measured.
    """
    device = pick_device(config.device)
    if device.type == "cpu":
        heap.keep_freed()
    dtype = pick_dtype(config.dtype, device)
    load_kernels(device, dtype)
    before = memory_before(device)
    torch.manual_seed(config.seed)
    model = load_model(source, dtype, device)
    peft_model = adapter.inject(model, plan, found.task)
    if config.gradient_checkpointing:
        checkpoint_activations(peft_model, blocks_below(model, plan))
    return Job(
        peft_model,
        found.task,
        config,
        plan,
        rows,
        tokenizer,
        found,
        device,
        folder,
        stop,
        predicted,
        fingerprint(source.place),
        before,
    )


def prepare_prefix(job: Job, forward: Forward, held_out: Evaluator) -> tuple[Prefix, PrefixCache]:
    """What is done with the layers below the cut, tried on the run's first micro-batch.

    Raises RequestError when the cache was asked for by name and would not be exact.
    """
    asked, base = job.config.prefix_cache, base_of(job.model)

    def refused(reason: str) -> tuple[Prefix, PrefixCache]:
        if asked != "auto":
            raise RequestError(
                f"--prefix-cache {asked} would not be exact: {reason}", "--prefix-cache auto, or off"
            )
        return Prefix(), PrefixCache("off", reason)

    if asked == "off":
        return Prefix(), PrefixCache("off", "--prefix-cache off")
    if reason := refusal(job.found, job.plan.cut, trained_in(base), base, training=True):
        return refused(reason)
    ((stack, cut),) = job.plan.cut.items()
    lengths = job.rows.train.lengths
    processed = sum(len(part) * int(lengths[list(part)].max()) for b in job.batches for part in b)
    dtype = next(job.model.parameters()).dtype
    size = job.found.hidden_size * dtype.itemsize * (processed + held_out.processed)
    composition = [job.rows.train.digest, job.rows.held_out.digest, json.dumps([job.batches, held_out.parts])]
    place = prefixes.folder() / prefixes.key_of(base, stack, cut, composition)
    choice = choose(
        asked,
        job.steps / job.steps_per_epoch,
        size,
        free_memory(),
        free_disk(prefixes.folder()),
        place.exists(),
    )
    if choice.where == "off":
        return Prefix(), PrefixCache("off", choice.reason)
    prefix = Prefix.below(base, stack, cut)
    first = job.micro_batch(0, 0).to(job.device)
    job.model.eval()
    if reason := prefix.differs(first, lambda batch: forward.scores(job.model, batch)[0]):
        return refused(reason)
    if choice.where == "disk":
        layers = f"layers 0–{cut - 1}" if cut > 1 else "layer 0"
        about = {"about": f"{job.found.model}, {layers}", "tokens": job.rows.look.tokens}
        prefix.store = DiskStore(place, frozenset([*job.keys, *held_out.keys]), about)
    return prefix, PrefixCache(choice.where, choice.reason, cut, size)


def efficiency(achieved: float, *measured: float) -> float | None:
    """The share of the device's matrix rate that `achieved` FLOPs a second are; None where none was measured.

    The rate is the highest of those measured before and after: other work on the machine can only lower
    one. What was achieved was within reach too, so the share is never above 1.
    """
    best = max(measured)
    return achieved / max(best, achieved) if best else None


def matrix_rate(job: Job, seconds: float = 0.15) -> float:
    """FLOPs a second of this device's matrix products in the base's dtype, at the model's own shapes:
    the best of several tries of 2,048 tokens through a weight (hidden, inner), for so many seconds."""
    hidden, inner = job.found.hidden_size or 1024, job.found.intermediate_size or 4096
    dtype = next(job.model.parameters()).dtype
    rows = torch.ones(2048, hidden, dtype=dtype, device=job.device)
    weight = torch.ones(inner, hidden, dtype=dtype, device=job.device)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        started = time.perf_counter()
        product = torch.nn.functional.linear(rows, weight)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        float(product[0, 0])  # the product is there
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * hidden * inner / best


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest mark: of the device's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if found := _status("VmHWM"):
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Take a small training step, so that PyTorch's libraries hold their code and scratch memory already
    when a run's own memory begins to be counted: 45 MB on a CPU, whatever the model."""
    weight = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    optimizer = torch.optim.AdamW([weight], fused=device.type != "mps")
    rows = torch.ones(1, 64, 64, device=device, dtype=dtype)
    rows = torch.nn.functional.linear(rows, weight.to(dtype))
    heads = rows.view(1, 64, 4, 16).transpose(1, 2)
    rows = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    scores = torch.nn.functional.silu(torch.nn.functional.layer_norm(rows, (16,))).float()
    torch.nn.functional.cross_entropy(
        scores.flatten(0, 2), torch.zeros(256, dtype=torch.long, device=device)
    ).backward()
    optimizer.step()


def memory_before(device: torch.device) -> int:
    """Bytes held now, before a model is loaded; on Linux the highest mark begins anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS") or peak_memory(device)


def _status(name: str) -> int:
    """A size in Linux's `/proc/self/status`, in bytes; 0 where there is none."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def run(job: Job) -> Iterator[Event]:
    """Train, saying what happens as it does; ends with the report.

    Raises RunError when the loss is no number or grows without end (the adapter as it was before is
    kept), OutOfMemory when memory runs out, Interrupted when `job.stop` asks for an end: the state is
    saved first. What was saved stays.
    """
    try:
        yield from _run(job)
    except (RuntimeError, MemoryError) as error:
        if not _of_memory(error):
            raise
        raise OutOfMemory(
            f"{job.device} ran out of memory at micro-batches of {job.batch_size} rows",
            f"--batch-size {max(1, job.batch_size // 2)} --accumulate {job.config.accumulate * 2}, "
            "or --gradient-checkpointing",
        ) from None


def _of_memory(error: BaseException) -> bool:
    """Whether memory ran out: an error of torch's own on a GPU, a plain one on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))


def _run(job: Job) -> Iterator[Event]:
    config, model = job.config, job.model
    optimizer = torch.optim.AdamW(
        job.parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=job.device.type != "mps",
    )
    scaler = torch.amp.GradScaler(job.device.type, enabled=next(model.parameters()).dtype == torch.float16)
    forward = Forward.of(model, job.task, config.head_chunk or 0)
    held_out = Evaluator(
        job.rows.held_out, forward, job.batch_size, job.tokenizer, job.found.vocab_size, job.device
    )
    state = _State(rate=matrix_rate(job))
    last, damaged = checkpoint.last_whole(job.folder) if config.resume else (None, [])
    if last is not None:
        state.load(checkpoint.state_of(last), job)  # the same run, or nothing of it is touched
        checkpoint.restore(last, model, optimizer)
        scaler.load_state_dict(state.scaler)
        for path in job.folder.checkpoints:  # those after it are damaged: what they held is done again
            if int(path.name.rpartition("-")[2]) > state.step:
                shutil.rmtree(path)
    prefix, caching = prepare_prefix(job, forward, held_out)
    held_out = replace(held_out, prefix=prefix)
    if last is not None:
        checkpoint.restore_random(last)
    with closing(prefix):
        yield from _steps(job, state, optimizer, scaler, forward, held_out, caching, tuple(damaged))


def _steps(
    job: Job,
    state: _State,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    forward: Forward,
    held_out: Evaluator,
    caching: PrefixCache,
    damaged: tuple[str, ...],
) -> Iterator[Event]:
    """The run itself, from the state it is in; `damaged` is what was wrong with later checkpoints."""
    config, model, prefix = job.config, job.model, held_out.prefix
    yield Started(
        steps=job.steps,
        epochs=job.epochs,
        rows=len(job.rows.train),
        held_out_rows=len(job.rows.held_out),
        held_out_digest=job.rows.held_out.digest,
        tokens=job.rows.look.tokens,
        supervised_tokens=job.rows.look.supervised_tokens,
        resumed_at=state.step,
        damaged=damaged,
    )
    if not state.step:
        yield job.rows.look
    if job.predicted is not None:
        yield job.predicted
    yield caching
    if state.before is None:
        state.before = _held_out_loss(job, held_out)
    yield Evaluated(0, state.before.loss, state.before.tokens)

    rates = schedule.rates(config, job.steps)
    model.train()
    good = _Good(job, state.before.loss)
    saved_at = started = time.perf_counter()
    while state.step < job.steps:
        epoch = state.step // job.steps_per_epoch + 1
        done = state.step % job.steps_per_epoch
        if done == 0 and state.epoch_supervised:  # resumed just where an epoch ends
            yield state.close_epoch(epoch - 1, job, prefix)
        for number, group in enumerate(job.micro_batches(epoch)):
            if number < done:  # done before the run was resumed
                continue
            rate = rates(state.step + 1)
            loss, norm = _optimizer_step(
                job, forward, prefix, optimizer, scaler, group, state.step + 1, rate, good
            )
            stepped = Stepped(
                step=state.step + 1,
                epoch=epoch,
                loss=loss,
                tokens=sum(b.tokens for b in group),
                supervised_tokens=sum(b.supervised for b in group),
                seconds=time.perf_counter() - started,
                learning_rate=rate,
                grad_norm=norm,
            )
            state.add(stepped)
            started = time.perf_counter()
            yield stepped
            if prefix.given_up and caching.where != "off":
                caching = PrefixCache("off", prefix.given_up)
                yield caching
            best = False
            if config.eval_steps and state.step % config.eval_steps == 0 and state.step < job.steps:
                found = _held_out_loss(job, held_out)
                yield Evaluated(state.step, found.loss, found.tokens)
                if best := state.best is None or found.loss < state.best.loss:
                    state.best, state.best_step = found, state.step
                started = time.perf_counter()
            asked_to_stop = job.stop()
            due = config.save_steps and state.step % config.save_steps == 0
            due = due or time.perf_counter() - saved_at >= 60 * config.save_minutes
            if (due or best or asked_to_stop) and state.step < job.steps:
                state.scaler = scaler.state_dict()
                path = checkpoint.save(job.folder.work, state.step, model, optimizer, state.as_json(job))
                job.folder.prune(config.keep or 1, state.best_step)
                yield Saved(state.step, str(path), best)
                saved_at = started = time.perf_counter()
            if asked_to_stop and state.step < job.steps:
                raise Interrupted(
                    f"interrupted after step {state.step} of {job.steps}; it is kept in `{job.folder.work}`",
                    f"the same command with --resume -o {job.folder.target} goes on from there",
                    asked_to_stop,
                )
            if state.step >= job.steps:
                break
        yield state.close_epoch(epoch, job, prefix)
        started = time.perf_counter()

    adapter.save(model, job.folder.work)  # before anything else can fail
    job.tokenizer.save_pretrained(job.folder.work)
    after = _held_out_loss(job, held_out)
    yield Evaluated(state.step, after.loss, after.tokens)
    if state.best is not None and after.loss <= state.best.loss:
        state.best = state.best_step = None  # the end is the best there was
    yield replace(_report(job, state, after), prefix_cache=caching)


def _held_out_loss(job: Job, held_out: Evaluator) -> Loss:
    """The held-out loss. Raises RunError when it is no number, naming a weight of the base that is none."""
    found = held_out.loss(job.model)
    if not math.isfinite(found.loss):
        odd = next((n for n, p in job.model.named_parameters() if not p.isfinite().all()), "")
        if odd and "lora_" not in odd:
            name = odd.removeprefix("base_model.model.").replace(".base_layer", "")
            raise RunError(
                f"`{name}` of the base holds values that are no finite numbers",
                "the checkpoint is damaged, or --dtype does not hold its values",
            )
        raise RunError(
            f"the held-out loss is {found.loss} in {job.config.dtype}",
            "--dtype float32, or a lower --learning-rate",
        )
    return found


RECENT = 10  # steps over which a loss that grows without end is told from a bad batch


class _Good:
    """The adapter as it was when the loss was last sound, and what is sound: up to one and a half times
    the loss of guessing at random, or twice what the held-out rows lost before."""

    def __init__(self, job: Job, before: float) -> None:
        self.job = job
        self.most = max(1.5 * math.log(max(2, job.found.vocab_size)), 2 * before)
        self.copies = [p.detach().clone() for p in job.parameters]
        self.recent = before
        self.step = 0

    @torch.no_grad()  # a copy is a value: it remembers no graph
    def judge(self, loss: float, sound_gradient: bool, step: int, rate: float) -> None:
        """Called before the update of `step`. Raises RunError when the run has left the good ground."""
        if math.isfinite(loss):
            self.recent += (loss - self.recent) / RECENT
        if math.isfinite(loss) and sound_gradient and self.recent <= self.most:
            if loss <= self.most:
                torch._foreach_copy_(self.copies, self.job.parameters)
                self.step = step - 1
            return
        what = f"the loss rose to {loss:.3g}" if math.isfinite(loss) else f"the loss is {loss}"
        if math.isfinite(loss) and not sound_gradient:
            what = "the gradient is no finite number"
        kept = ""
        if self.step:
            torch._foreach_copy_(self.job.parameters, self.copies)
            folder = self.job.folder.work / checkpoint.LAST_GOOD
            adapter.save(self.job.model, folder)
            seals.seal(folder)
            kept = f"; the adapter after step {self.step} is kept in `{folder}`"
        raise RunError(
            f"{what} at step {step}, learning rate {rate:.2g}{kept}",
            f"a lower --learning-rate, as {rate / 4:.1g}, with --overwrite; or --dtype float32",
        )


def _optimizer_step(
    job: Job,
    forward: Forward,
    prefix: Prefix,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    group: list[Batch],
    step: int,
    rate: float,
    good: _Good,
) -> tuple[float, float]:
    """One optimizer step over its micro-batches: (loss per supervised token, gradient norm).

    Each micro-batch's loss is divided by the supervised tokens of the whole step, so the step does
    not depend on how it was split.
    """
    for settings in optimizer.param_groups:
        settings["lr"] = rate
    supervised = sum(batch.supervised for batch in group)
    losses = []
    for batch in group:
        batch = batch.to(job.device)
        with prefix.around(batch):
            loss = forward.loss_sum(job.model, batch) / supervised
        scaler.scale(loss).backward()
        losses.append(loss.detach())
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(job.parameters, job.config.max_grad_norm)
    total = float(torch.stack(losses).sum())  # the one wait for the device in a step
    # under float16 a step whose gradients overflow is skipped by the scaler; elsewhere it is the end
    good.judge(total, scaler.is_enabled() or bool(norm.isfinite()), step, rate)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, float(norm)


DIGESTS = ("training rows", "held-out rows", "base weights")
OF_THE_PROCESS = ("rate", "captured_before")  # what a resumed run finds out anew


@dataclass(slots=True)
class _State:
    """What the loop has done so far: all of it goes into a checkpoint."""

    step: int = 0
    before: Loss | None = None
    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0
    epochs: list[EpochDone] = field(default_factory=list)
    epoch_loss: float = 0.0
    epoch_supervised: int = 0
    epoch_tokens: int = 0
    epoch_seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    best: Loss | None = None  # the lowest held-out loss on the way, and where
    best_step: int | None = None
    rate: float = 0.0  # FLOPs a second of this device's matrix products
    captured_before: int = 0  # micro-batches that ran whole before this epoch

    def add(self, done: Stepped) -> None:
        self.step = done.step
        self.tokens += done.tokens
        self.supervised += done.supervised_tokens
        self.seconds += done.seconds
        self.epoch_loss += done.loss * done.supervised_tokens
        self.epoch_supervised += done.supervised_tokens
        self.epoch_tokens += done.tokens
        self.epoch_seconds += done.seconds

    def close_epoch(self, epoch: int, job: Job, prefix: Prefix) -> EpochDone:
        replayed = bool(prefix.cut and prefix.replayed and prefix.captured == self.captured_before)
        self.captured_before = prefix.captured
        speed = self.epoch_tokens / max(1e-9, self.epoch_seconds)
        length = self.epoch_tokens / max(1, len(job.rows.train))
        flops = flops_per_token(
            job.plan,
            job.found,
            Shape(1, round(length)),
            replayed=replayed,
            supervised=self.epoch_supervised / max(1, self.epoch_tokens),
        )
        done = EpochDone(
            epoch,
            self.epoch_loss / max(1, self.epoch_supervised),
            self.epoch_tokens,
            self.epoch_seconds,
            speed,
            self.epoch_supervised,
            efficiency(speed * (flops.forward + flops.backward), self.rate, matrix_rate(job, 0.05)),
            replayed,
        )
        self.epochs.append(done)
        self.epoch_loss = self.epoch_seconds = 0.0
        self.epoch_supervised = self.epoch_tokens = 0
        return done

    def as_json(self, job: Job) -> dict[str, Any]:
        own = {name: jsonable(getattr(self, name)) for name in self.__slots__ if name not in OF_THE_PROCESS}
        return {**own, "run": _fingerprint(job)}

    def load(self, saved: dict[str, Any], job: Job) -> None:
        """Take over a checkpoint's state. Raises RequestError when the run is another one."""
        was, now = saved.pop("run"), _fingerprint(job)
        changed = [name for name in now if was.get(name) != now[name]]
        if changed:
            name = changed[0]
            what = (
                f"its {name} are other ones"
                if name in DIGESTS
                else f"{name} was {was.get(name)!r}, is {now[name]!r}"
            )
            raise RequestError(
                f"this is not the run that was saved: {what}",
                "resume with the data, the model and the options it began with, or --overwrite to start anew",
            )
        for name, value in saved.items():
            setattr(self, name, value)
        self.before, self.best = (Loss(**v) if v else None for v in (saved["before"], saved["best"]))
        self.epochs = [EpochDone(**row) for row in saved["epochs"]]


def _fingerprint(job: Job) -> dict[str, Any]:
    """What a resumed run must have in common with the one that was saved."""
    config = job.config
    names = [
        "model",
        "preset",
        "layers",
        "rank",
        "alpha",
        "dropout",
        "epochs",
        "max_steps",
        "batch_size",
        "accumulate",
        "max_length",
        "learning_rate",
        "scheduler",
        "warmup",
        "weight_decay",
        "max_grad_norm",
        "seed",
        "dtype",
    ]
    found = {name: getattr(config, name) for name in names}
    return {
        **found,
        "modules": len(job.plan.modules),
        "lora": jsonable(job.plan.lora),
        "base weights": job.fingerprint,
        "training rows": job.rows.train.digest,
        "held-out rows": job.rows.held_out.digest,
    }


def _report(job: Job, state: _State, after: Loss) -> TrainReport:
    """What the run did. Raises RunError when what is adapted is no longer what was planned."""
    adapter.compare(job.plan.modules, adapter.adapted(job.model))
    assert state.before is not None
    return TrainReport(
        output=str(job.folder.target),
        trainable_params=job.plan.trainable_params,
        steps=state.step,
        tokens=state.tokens,
        supervised_tokens=state.supervised,
        seconds=state.seconds,
        tokens_per_second=state.tokens / max(1e-9, state.seconds),
        epochs=tuple(state.epochs),
        peak_memory_bytes=peak_memory(job.device),
        memory_growth_bytes=peak_memory(job.device) - job.memory_before,
        predicted=job.predicted,
        eval={"before": state.before, "after": after},
        best=None
        if state.best is None
        else Evaluated(state.best_step or 0, state.best.loss, state.best.tokens),
    )


def recorded(job: Job, events: Iterator[Event]) -> Iterator[Event]:
    """The same events, each written to `events.jsonl`; after the last, the folder is put in its place.

    A run that fails before its first checkpoint leaves nothing behind. Raises RunError where the
    disk is full.
    """
    folder = job.folder
    log_file = folder.work / EVENTS
    try:
        with writing(folder.work):
            first = next(events)  # Started: by then a resumed run is known to be the same
            checkpoint.rewind(log_file, first.resumed_at if isinstance(first, Started) else 0)
            run_file = yaml.safe_dump(job.config.as_file(), sort_keys=False, allow_unicode=True)
            (folder.work / RUN_FILE).write_text(run_file, encoding="utf-8")
            adapter.write_base(folder.work, job.found.model, job.fingerprint)
            with closing(log_file.open("a", encoding="utf-8", buffering=1)) as log:
                for event in chain([first], events):
                    log.write(json.dumps(record(event)) + "\n")
                    if isinstance(event, TrainReport):
                        log.close()
                        _tell(job)
                        folder.finish(job.config.keep or 0, event.best.step if event.best else None)
                    yield event
    finally:
        folder.abandon()


def _tell(job: Job) -> None:
    """The finished run for people: its card and its page."""
    run = replace(read_back(job.folder.work), folder=job.folder.target)
    card = cards.adapter_card(job.plan, run, job.found.family, job.task)
    (job.folder.work / CARD).write_text(card, encoding="utf-8")
    name = job.folder.target.name
    shown = page.make(name, job.found, {str(job.folder.target): job.plan.modules}, [run])
    (job.folder.work / PAGE).write_text(shown, encoding="utf-8")
