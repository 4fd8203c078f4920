"""Training: a job set up, run step by step, recorded into its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.train.checkpoint import STATE_FILES as STATE_FILES
    from lorafit.train.job import Base as Base
    from lorafit.train.job import Job as Job
    from lorafit.train.job import SharedStates as SharedStates
    from lorafit.train.job import assemble as assemble
    from lorafit.train.job import composed as composed
    from lorafit.train.job import load_base as load_base
    from lorafit.train.job import micro_batches_of as micro_batches_of
    from lorafit.train.job import put_on as put_on
    from lorafit.train.loggers import Listener as Listener
    from lorafit.train.loggers import recorded as recorded
    from lorafit.train.loggers import records as records
    from lorafit.train.loop import run as run
    from lorafit.train.measure import memory_before as memory_before
    from lorafit.train.measure import peak_memory as peak_memory
    from lorafit.train.run_folder import RunFolder as RunFolder
    from lorafit.train.run_folder import claim as claim
    from lorafit.train.run_folder import is_written as is_written
    from lorafit.train.run_folder import lock_folder as lock_folder
    from lorafit.train.trackers import trackers_of as trackers_of

__getattr__ = door(
    __name__,
    {
        "checkpoint": "STATE_FILES",
        "job": "Base Job SharedStates assemble composed micro_batches_of load_base put_on",
        "loggers": "Listener recorded records",
        "loop": "run",
        "measure": "memory_before peak_memory",
        "run_folder": "RunFolder claim is_written lock_folder",
        "trackers": "trackers_of",
    },
)
