"""`--compile`: the adapted blocks of a run compiled, and their gradient checked on its first micro-batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from lorafit.errors import RequestError, RunError
from lorafit.events import Compiling, Event
from lorafit.forward import CompiledBlocks
from lorafit.train.checkpoint import trainable
from lorafit.train.job import Job
from lorafit.train.step import Stepper

WITHOUT = "leave out --compile"


def compile_blocks(job: Job, step: Stepper) -> Iterator[Event]:
    """Have the steps run the adapted blocks compiled. What training draws at random is as if nothing had been run.

    Raises RequestError when no block is adapted or one cannot be compiled, or when the gradient is not that of the
    plain blocks: on all processes where it is so on one.
    """
    blocks = CompiledBlocks.of(job.model, [stack.path for stack in job.found.stacks], job.plan.modules)
    if not blocks.number:
        raise RequestError("--compile: what is adapted lies in no block of a stack", WITHOUT)
    yield Compiling(blocks.number)
    started, off = time.perf_counter(), 0.0
    with job.world.one_error():
        batch = job.first_batch()
        if batch is not None:  # of several processes one may have no row
            job.model.train()
            divisor = step.objective.weight(batch)
            # in float16 a scale at which nothing overflows: that of the first steps may
            scaler = torch.amp.GradScaler(
                job.device.type, init_scale=2.0**8, enabled=step.scaler.is_enabled()
            )
            trial = replace(step, scaler=scaler)
            try:
                reason, off = blocks.differs(
                    trainable(job.model), lambda used: trial.backward(batch, divisor, used)
                )
            except RunError as error:
                raise RequestError(f"--compile: {error.message}", WITHOUT) from error
            if reason:
                raise RequestError(f"--compile would not train the same: {reason}", WITHOUT)
    step.blocks = blocks
    yield Compiling(blocks.number, time.perf_counter() - started, off)
