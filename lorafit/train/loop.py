"""The training loop: a page that says what it does, as a stream of events."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lorafit.adapter import adapted_names, compare, save_adapter, save_tokenizer
from lorafit.data import Batch
from lorafit.errors import Interrupted, OutOfMemory, RequestError, RunError
from lorafit.estimate import Shape, flops_per_token
from lorafit.evaluate import Evaluator
from lorafit.events import (
    EpochDone,
    Evaluated,
    Event,
    Loss,
    PrefixCache,
    Saved,
    Started,
    Stepped,
    TrainReport,
)
from lorafit.forward import Forward, Prefix
from lorafit.jsonio import jsonable
from lorafit.train import schedule
from lorafit.train.checkpoint import last_whole, restore, restore_random, save_checkpoint, state_of
from lorafit.train.divergence import Divergence
from lorafit.train.job import Job, prepare_prefix
from lorafit.train.measure import efficiency, peak_memory


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
    state = _State(rate=job.matrix_rate())
    last, damaged = last_whole(job.folder) if config.resume else (None, [])
    if last is not None:
        state.load(state_of(last), job)  # the same run, or nothing of it is touched
        restore(last, model, optimizer)
        scaler.load_state_dict(state.scaler)
        for path in job.folder.checkpoints:  # those after it are damaged: what they held is done again
            if int(path.name.rpartition("-")[2]) > state.step:
                shutil.rmtree(path)
    prefix, caching = prepare_prefix(job, forward, held_out)
    held_out = replace(held_out, prefix=prefix)
    if last is not None:
        restore_random(last)
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
    good = Divergence(job, state.before.loss)
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
                path = save_checkpoint(job.folder.work, state.step, model, optimizer, state.as_json(job))
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

    save_adapter(model, job.folder.work)  # before anything else can fail
    save_tokenizer(job.tokenizer, job.folder.work)
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


def _optimizer_step(
    job: Job,
    forward: Forward,
    prefix: Prefix,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    group: list[Batch],
    step: int,
    rate: float,
    good: Divergence,
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
            efficiency(speed * (flops.forward + flops.backward), self.rate, job.matrix_rate(0.05)),
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
    compare(job.plan.modules, adapted_names(job.model))
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
