"""The training loop: a page that says what it does, as a stream of events."""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from signal import SIGTERM

import torch

from lorafit.adapter import adapted_names, compare, save_adapter
from lorafit.digests import check
from lorafit.distributed import lost
from lorafit.errors import Interrupted, OutOfMemory, RequestError, RunError
from lorafit.evaluate import Evaluator
from lorafit.events import (
    Evaluated,
    Event,
    Loss,
    Note,
    PrefixCache,
    Said,
    Saved,
    Started,
    Stepped,
    TrainReport,
)
from lorafit.forward import Forward, Prefix, base_of, routes_for_loss
from lorafit.model import local
from lorafit.train import sample, schedule
from lorafit.train.checkpoint import (
    last_whole,
    restore,
    restore_parameters,
    restore_random,
    save_checkpoint,
    state_of,
)
from lorafit.train.compiled import compile_blocks
from lorafit.train.divergence import Divergence
from lorafit.train.frozen import fill_prefix, first_look, prepare
from lorafit.train.job import Job
from lorafit.train.measure import peak_memory
from lorafit.train.objective import TokenLoss
from lorafit.train.optimizer import make_optimizer
from lorafit.train.state import State
from lorafit.train.step import Stepper


def run(job: Job) -> Iterator[Event]:
    """Train, as a stream of events that ends with the report.

    Raises RunError when the loss is not finite or diverges (the last good adapter is saved), OutOfMemory
    when memory runs out, Interrupted when `job.stop` asks for an end: the state is saved first. What was
    saved stays.
    """
    try:
        yield from _run(job)
    except (RuntimeError, MemoryError) as error:
        if job.sharded is not None and isinstance(error, RuntimeError) and (ended := lost(error)):
            raise ended from error
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
    """Set up from the settings, or from the last checkpoint; then the steps."""
    config, model = job.config, job.model
    optimizer = make_optimizer(config, job.parameters)
    scaler = torch.amp.GradScaler(job.device.type, enabled=next(model.parameters()).dtype == torch.float16)
    forward, trial = first_look(job)
    held_out = Evaluator(
        job.rows.held_out,
        forward,
        job.batch_size,
        job.tokenizer,
        job.found.vocab_size,
        job.device,
        world=job.world,
        at_once=job.sharded is not None,
    )
    state = State(rate=job.matrix_rate())
    with job.world.one_error():
        last, damaged = _resumed(job, state, optimizer, scaler)
    frozen = prepare(job, forward, held_out, trial)
    prefix, caching = frozen.prefix, frozen.caching
    held_out = replace(held_out, prefix=prefix)
    stepper = Stepper(
        model,
        job.parameters,
        TokenLoss(forward, prefix),
        optimizer,
        scaler,
        job.device,
        config.max_grad_norm,
        world=job.world,
        stop=job.stop,
    )
    if last is not None:
        restore_random(last)
    with closing(prefix):
        yield from _start(job, state, forward, caching, tuple(damaged))
        if prefix.cut:
            caching = yield from fill_prefix(job, state, forward, held_out, frozen)
        if config.compile:
            yield from compile_blocks(job, stepper)
        yield from _steps(job, state, stepper, held_out, prefix, caching)


def _resumed(
    job: Job, state: State, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> tuple[Path | None, list[str]]:
    """(the checkpoint that was taken over, what was wrong with later ones). Those after it go: what they held
    is done again. The first process reads it and sends it to the others.

    Raises RequestError when it is of another run; then nothing is touched.
    """
    if not job.config.resume:
        return None, []
    last, damaged = last_whole(job.folder) if job.world.first else (None, [])
    if not job.world.agreed(last is not None):
        return None, damaged
    with job.world.sent(last) as folder:
        state.load(state_of(folder), job)
        restore(folder, job.model, optimizer)
    scaler.load_state_dict(state.scaler)
    for path in job.folder.checkpoints if job.world.first else ():
        if int(path.name.rpartition("-")[2]) > state.step:
            shutil.rmtree(path)
    return last, damaged


def _start(
    job: Job, state: State, forward: Forward, caching: PrefixCache, damaged: tuple[str, ...]
) -> Iterator[Event]:
    """What is known before the first step; `damaged` says what was wrong with later checkpoints."""
    yield Started(
        steps=job.steps,
        epochs=job.steps / job.steps_per_epoch,
        rows=len(job.rows.train),
        held_out_rows=len(job.rows.held_out),
        held_out_digest=job.rows.held_out.digest,
        tokens=job.rows.look.tokens,
        supervised_tokens=job.rows.look.supervised_tokens,
        resumed_at=state.step,
        damaged=damaged,
        processes=job.world.size,
        sharded=job.sharded is not None,
        environment=job.environment,
    )
    if not state.step:
        yield job.rows.look
        yield from (Note(text) for text in job.plan.notes)
        if job.config.from_adapter:
            yield Note(
                f"goes on from the adapter `{job.config.from_adapter}`: the loss before training already includes it"
            )
    if job.predicted is not None:
        yield job.predicted
    if job.config.optimizer in ("sgd", "lion") and job.config.why("learning_rate"):
        yield Note(
            f"learning rate {job.config.learning_rate:g} is derived for AdamW; {job.config.optimizer} needs "
            f"{'a higher' if job.config.optimizer == 'sgd' else 'a lower'} one: set --learning-rate"
        )
    if routes_for_loss(base_of(job.model)):
        yield Note(_router_note(forward))
    yield caching


def _router_note(forward: Forward) -> str:
    if forward.router:
        return (
            f"the config sets `output_router_logits`: the router's auxiliary loss, times {forward.router:g}, is "
            "in the training loss, as in transformers; held-out losses are without it"
        )
    return (
        "the config sets `output_router_logits`, and the model returns no auxiliary loss without labels: it is "
        "not in the training loss"
    )


def _steps(
    job: Job, state: State, step: Stepper, held_out: Evaluator, prefix: Prefix, caching: PrefixCache
) -> Iterator[Event]:
    """The run itself, from the state it is in."""
    config = job.config
    if state.before is None and held_out.rows:
        state.before = _held_out_loss(job, held_out)
        if config.sample and job.generates:
            with suppress(Exception):  # of the model's own code; at the end it is told
                state.said = sample.answer(job, held_out)
    if state.before is not None:
        yield Evaluated(0, state.before.loss, state.before.tokens)

    rates = schedule.rates(config, job.steps)
    step.check = Divergence(job, state.before.loss if state.before else None).judge
    job.model.train()
    if state.step % job.steps_per_epoch == 0 and state.epoch_supervised:  # resumed just where an epoch ends
        yield state.close_epoch(state.step // job.steps_per_epoch, job, prefix)
    ended: Loss | None = None  # the held-out loss where --patience ends the run
    saved_at = started = time.perf_counter()
    for number, epoch, batches in job.optimizer_steps(state.step):
        rate, last = rates(number), number == job.steps
        job.world.seed(config.seed, number)
        result = step(batches, number, rate)
        stepped = Stepped(
            step=number,
            epoch=epoch,
            loss=result.loss,
            tokens=result.tokens,
            supervised_tokens=result.supervised_tokens,
            seconds=time.perf_counter() - started,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            weight=result.weight,
        )
        state.add(stepped)
        started = time.perf_counter()
        yield stepped
        best = False
        if config.eval_steps and number % config.eval_steps == 0 and not last:
            found = _held_out_loss(job, held_out)
            best, started = state.is_best(found), time.perf_counter()
            yield Evaluated(number, found.loss, found.tokens, best)
            if state.waits(found, config.min_delta) >= (config.patience or math.inf):
                last, ended = True, found
        signal = job.stop() if job.world.alone else result.stop and (job.stop() or SIGTERM)
        stop = bool(signal) and not last
        due = bool(config.save_steps and number % config.save_steps == 0)
        due = due or time.perf_counter() - saved_at >= 60 * config.save_minutes
        if (due or best or stop) and not last and job.world.first:
            yield _save(job, state, step, best)
            saved_at = started = time.perf_counter()
        if stop:
            raise Interrupted(
                f"interrupted after step {number} of {job.steps}; it is saved in `{job.folder.work}`",
                f"lorafit train --resume {shlex.quote(str(job.folder.target))} continues from there",
                signal,
            )
        if job.ends_epoch(number) or ended is not None:
            yield state.close_epoch(epoch, job, prefix)
            started = time.perf_counter()
        if ended is not None:
            yield Note(_early(state, job))
            break
    yield from _end(job, state, held_out, caching, ended)


def _early(state: State, job: Job) -> str:
    gain = f" by more than {job.config.min_delta:g}" if job.config.min_delta else ""
    times = f"{state.waited} evaluation{'s' if state.waited > 1 else ''}"
    return (
        f"stopped after step {state.step} of {job.steps}: the held-out loss has not fallen{gain} in {times}"
    )


def _save(job: Job, state: State, step: Stepper, best: bool) -> Saved:
    """A checkpoint of where the run is; older ones go."""
    state.scaler = step.scaler.state_dict()
    path = save_checkpoint(job.folder.work, state.step, job.model, step.optimizer, state.as_json(job))
    job.folder.prune(job.config.keep or 1, state.best_step)
    return Saved(state.step, str(path), best)


def _end(
    job: Job, state: State, held_out: Evaluator, caching: PrefixCache, last: Loss | None
) -> Iterator[Event]:
    """The adapter saved, before anything else can fail; the `last` held-out loss, unless it is known; the best
    adapter in its place; the report."""
    if job.world.first:
        save_adapter(job.model, job.folder.work)
    if last is None and held_out.rows:
        last = _held_out_loss(job, held_out)
        yield Evaluated(
            state.step, last.loss, last.tokens, state.best is not None and last.loss <= state.best.loss
        )
    if state.best is not None and last is not None and last.loss <= state.best.loss:
        state.best = state.best_step = None  # the end is the best there was
    report = replace(_report(job, state, last), prefix_cache=caching)
    if report.best is not None and not job.config.keep_last:
        try:
            _take_best(job, report.best.step)
            after = Loss(report.best.loss, report.best.tokens)
            losses = {**report.eval, "after": after, "last": report.eval["after"]}
            report = replace(report, adapter_step=report.best.step, eval=losses)
        except RequestError as error:
            yield Note(f"the last adapter is saved, not the best: {error.message}")
    if job.config.sample and job.generates and held_out.rows:
        try:
            prompt, said = sample.prompt_of(held_out), sample.answer(job, held_out)
            report = replace(report, sample=Said(prompt.text, prompt.wanted, state.said or "", said))
        except Exception as error:  # the adapter is saved: a sample must not lose the run
            yield Note(f"no sample of what the model says: {type(error).__name__}: {error}")
    yield report


def _take_best(job: Job, step: int) -> None:
    """Save the adapter of the checkpoint of that step as the run's. Raises RequestError when it is damaged."""
    if job.world.first:
        best = job.folder.work / f"checkpoint-{step}"
        check(best)
        restore_parameters(best, job.model)
        save_adapter(job.model, job.folder.work)


def _held_out_loss(job: Job, held_out: Evaluator) -> Loss:
    """The held-out loss. Raises RunError when it is not finite, naming a weight of the base that is not."""
    found = held_out.loss(job.model)
    if not math.isfinite(found.loss):
        odd = next((n for n, p in job.model.named_parameters() if not local(p).isfinite().all()), "")
        odd = job.world.first_of(odd)
        if odd and "lora_" not in odd:
            name = odd.removeprefix("base_model.model.").replace(".base_layer", "")
            raise RunError(
                f"`{name}` of the base holds values that are not finite",
                "the checkpoint is damaged, or --dtype cannot hold its values",
            )
        raise RunError(
            f"the held-out loss is {found.loss} in {job.config.dtype}",
            "--dtype float32, or a lower --learning-rate",
        )
    return found


def _report(job: Job, state: State, after: Loss | None) -> TrainReport:
    """What the run did. Raises RunError when what is adapted is no longer what was planned."""
    compare(job.plan.modules, adapted_names(job.model))
    return TrainReport(
        output=str(job.folder.target),
        trainable_params=job.plan.trainable_params,
        steps=state.step,
        tokens=state.tokens,
        supervised_tokens=state.supervised,
        seconds=state.seconds,
        tokens_per_second=state.tokens / max(1e-9, state.seconds),
        epochs=tuple(state.epochs),
        fill_seconds=state.fill_seconds,
        peak_memory_bytes=peak_memory(job.device),
        memory_growth_bytes=peak_memory(job.device) - job.memory_before,
        predicted=job.predicted,
        eval={} if state.before is None or after is None else {"before": state.before, "after": after},
        adapter_step=state.step,
        task=job.task,
        settings={name: value for name, value in job.config.as_file().items() if name != "origin"},
        environment=job.environment,
        best=None
        if state.best is None
        else Evaluated(state.best_step or 0, state.best.loss, state.best.tokens),
    )
