"""One of several processes that a launcher started: it trains the jobs of a JSON file, one after the other.

`torchrun --nproc-per-node 2 tests/ranks.py JOBS RESULTS`; JOBS holds {name: {"model", "output", flags...}}.
Each process writes {name: {"losses", "norms", "tokens", "cache", "same", "held", "read"}}: whether all hold the same
adapter, the bytes of a sharded base that it holds, those that it read from files until the job was set up.
"""

import hashlib
import json
import resource
import signal
import sys
from pathlib import Path

import torch
from jobs import job_for, losses

from lorafit.distributed import connect
from lorafit.errors import LorafitError
from lorafit.events import PrefixCache, Stepped
from lorafit.train.checkpoint import trainable
from lorafit.train.loggers import recorded
from lorafit.train.loop import run


def stop_after(job, step, events):
    """A signal that the last process alone gets, while that step is done."""

    def asked():
        done = sum(isinstance(event, Stepped) for event in events)
        return signal.SIGTERM if job.world.rank == job.world.size - 1 and done >= step - 1 else 0

    return asked


def bytes_read():
    """What this process has read so far."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def train(world, given):
    flags = {name: tuple(value) if name == "data" else value for name, value in given.items()}
    stop_at, other_data = flags.pop("stop_at", 0), flags.pop("data_of_the_last", None)
    most, last = flags.pop("longest_file_of_the_last", 0), world.rank == world.size - 1
    if other_data and last:
        flags["data"] = (other_data,)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most and last:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    before = bytes_read()
    try:
        with world.one_error():
            job = job_for(flags.pop("model"), Path(flags.pop("output")), world=world, **flags)
        events, read = [], bytes_read() - before
        if stop_at:
            job.stop = stop_after(job, stop_at, events)
        events.extend(recorded(job, run(job)) if world.first else run(job))
    except LorafitError as error:
        return {"error": error.message, "code": error.exit_code}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    whole = hashlib.sha256(
        b"".join(p.detach().numpy().tobytes() for p in trainable(job.model).values())
    ).hexdigest()
    same = world.told(whole) == whole
    return {
        "losses": losses(events),
        "norms": [e.grad_norm for e in events if isinstance(e, Stepped)],
        "tokens": [e.tokens for e in events if isinstance(e, Stepped)],
        "cache": next((e.where for e in reversed(events) if isinstance(e, PrefixCache)), ""),
        "same": not world.agreed(not same),
        "read": read,
        "held": job.sharded.held_bytes if job.sharded is not None else 0,
    }


def main():
    torch.set_num_threads(1)
    world = connect()
    jobs = json.loads(Path(sys.argv[1]).read_text())
    found = {name: train(world, given) for name, given in jobs.items()}
    Path(f"{sys.argv[2]}.{world.rank}").write_text(json.dumps(found))
    world.close()


main()
