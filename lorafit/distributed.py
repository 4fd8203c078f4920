"""The processes that share a run: one, or several that `torchrun` or `accelerate launch` started.

Each holds the whole adapter and the base, whole or its rows of it, and runs its share of the rows of every
micro-batch. One reduction a step sums gradients, losses and counts, so that all take the same step. The first
process decides and writes; the others print nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from lorafit.errors import LorafitError, RequestError, RunError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

FSDP2 = "accelerate launch --use_fsdp --fsdp_version 2 --num_processes N -m lorafit train …"

# What `accelerate launch` can ask for, as its environment names it, why it is not done, and what is.
UNSUPPORTED = {
    ("DEEPSPEED",): ("DeepSpeed is not used: FSDP2 divides the base as its ZeRO 3 does", FSDP2),
    ("MEGATRON_LM", "PARALLELISM_CONFIG"): ("tensor and pipeline parallelism are not supported", FSDP2),
}
# Of its FSDP plugin: the setting, what it stands at where nothing else is asked for, what it is, what does it here.
FSDP_SETTINGS = {
    "VERSION": ("2", "FSDP1 is not used: it wraps weights that are trained with those that are not", FSDP2),
    "OFFLOAD_PARAMS": ("false", "FSDP's offloading to the CPU is not supported", "more processes, or --quantize nf4"),
    "ACTIVATION_CHECKPOINTING": ("false", "FSDP's activation checkpointing is not used", "--gradient-checkpointing"),
    "RESHARD_AFTER_FORWARD": ("true", "a block is always let go after its forward pass", "--multi_gpu holds all of it"),
}  # fmt: skip
PATIENCE = timedelta(hours=2)  # that a process waits for the others: one may read data or time the device


ENDED = (
    "another process of the run ended",
    "what it printed says why; --resume goes on from the last checkpoint",
)


class OtherProcessEnded(RunError):
    """Another process of the run is gone, and what was sent to it was lost."""


class Agreed(LorafitError):
    """An error of the run that the first process shows: the others end with its exit code."""

    def __init__(self, message: str, hint: str, code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = code


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of a run: `rank` of `size`, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process decides, writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of the items that is this process's: each `size`-th. There may be none."""
        return items if self.alone else items[self.rank :: self.size]

    def sums(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make each tensor its sum over all processes, in place: tensors of one dtype and device in one
        reduction, the same bits on every process. Raises OtherProcessEnded."""
        if self.alone or not tensors:
            return
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        with _connected():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def told(self, value: T) -> T:
        """What the first process has decided: JSON. Raises what a process raised instead (see `one_error`)."""
        return value if self.alone else self._exchange({"value": value})[0]

    def agreed(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self.alone else any(self._exchange({"value": flag}))

    def first_of(self, name: str) -> str:
        """The first process's that is not empty."""
        return name if self.alone else next(filter(None, self._exchange({"value": name})), "")

    @contextmanager
    def one_error(self) -> Iterator[None]:
        """A part of the work that all processes do, or none: an error of one is an error of all, shown once.

        Within it processes may wait for one another by `told`, `agreed` and `sent` alone. Raises the error
        of the first process that has one, as Agreed; as it was where it is the first process's own.
        """
        if self.alone:
            yield
            return
        try:
            yield
        except (Agreed, OtherProcessEnded):
            raise
        except Exception as error:
            said = error if isinstance(error, LorafitError) else RunError(f"{type(error).__name__}: {error}")
            self._exchange({"error": [said.message, said.hint, said.exit_code]}, error)
            raise
        self._exchange({"value": None})

    @contextmanager
    def sent(self, folder: Path | None) -> Iterator[Path]:
        """The first process's folder of files, on every process: itself there, a copy for the others while
        the block lasts. Raises what a process raised instead (see `one_error`)."""
        if self.alone:
            assert folder is not None
            yield folder
            return
        with TemporaryDirectory() as copies:
            names = sorted(path.name for path in folder.iterdir()) if folder is not None else []
            for name in self.told(names):
                raw = self._bytes((folder / name).read_bytes() if folder is not None else b"")
                if not self.first:
                    (Path(copies) / name).write_bytes(raw)
            yield folder if self.first and folder is not None else Path(copies)

    def seed(self, seed: int, step: int) -> None:
        """Draw what is random in a step from the seed, the step and the process, so that a resumed run draws
        the same; a process that is alone draws on."""
        if not self.alone:
            import torch

            torch.manual_seed(Random(f"{seed}/{step}/{self.rank}").getrandbits(32))

    def close(self) -> None:
        """Leave the others."""
        if not self.alone:
            import torch.distributed as dist

            dist.destroy_process_group()

    def _exchange(self, message: Mapping[str, Any], own: Exception | None = None) -> list[Any]:
        """Each process's value, by rank. Raises the first error instead (see `one_error`); `own` is this
        process's."""
        import torch
        import torch.distributed as dist

        raw = json.dumps(message).encode()
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with _connected():
            dist.all_gather(sizes, torch.tensor([len(raw)]))
            longest = max(int(size) for size in sizes)
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, torch.frombuffer(bytearray(raw.ljust(longest)), dtype=torch.uint8))
        found = [json.loads(bytes(part.numpy())) for part in parts]
        for rank, said in enumerate(found):
            if "error" not in said:
                continue
            if own is not None and self.rank == rank == 0:
                raise own
            text, hint, code = said["error"]
            raise Agreed(f"process {rank} of {self.size}: {text}", hint, code)
        return [said["value"] for said in found]

    def _bytes(self, raw: bytes) -> bytes:
        """The first process's bytes."""
        import torch
        import torch.distributed as dist

        size = torch.tensor([len(raw)])
        with _connected():
            dist.broadcast(size, 0)
            data = torch.frombuffer(bytearray(raw) or bytearray(1), dtype=torch.uint8)
            data = data if self.first else torch.empty(max(1, int(size)), dtype=torch.uint8)
            dist.broadcast(data, 0)
        return bytes(data.numpy())[: int(size)]


ALONE = World()


@contextmanager
def _connected() -> Iterator[None]:
    """Around what needs the other processes. Raises OtherProcessEnded when one is gone."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessEnded(*ENDED) from error


def lost(error: RuntimeError) -> OtherProcessEnded | None:
    """The error to show for one of a pass over a sharded base, where another process is gone; None for any other."""
    import torch.distributed as dist

    gone = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed" in str(error)
    return OtherProcessEnded(*ENDED) if gone else None


def launched() -> World:
    """This process as a launcher's environment names it, not connected with the others: for the parts of
    the program that must know whether they are the first. ALONE without a launcher; some clusters set
    WORLD_SIZE alone."""
    size = _number("WORLD_SIZE", 1)
    if size < 2 or "RANK" not in os.environ:
        return ALONE
    return World(_number("RANK", 0), size, _number("LOCAL_RANK", 0))


def is_first() -> bool:
    """Whether this process shows what all do; so does one whose launcher's variables cannot be read, which is an error
    to show."""
    try:
        return launched().first
    except RequestError:
        return True


def connect() -> World:
    """This process, connected with the others of its run, once. Raises OtherProcessEnded when another process
    ended before."""
    world = launched()
    if world.alone:
        return world
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with _connected():
            dist.init_process_group(backend, timeout=PATIENCE)
    return world


def outlast_first() -> None:
    """Wait until the first process has ended: a launcher ends all processes as soon as one has failed, and the
    first has an error to show."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        with suppress(RuntimeError):  # which is its end: it does not take part
            dist.all_reduce(torch.zeros(1))


def asked_to_shard(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` was told to shard the base. Raises RequestError for what it was told that would
    not be done."""

    def asked(name: str) -> bool:
        return environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes")

    for plugins, (reason, hint) in UNSUPPORTED.items():
        if any(asked(plugin) for plugin in plugins):
            raise RequestError(reason, hint)
    for name, (value, reason, hint) in FSDP_SETTINGS.items() if asked("FSDP") else ():
        default = "1" if name == "VERSION" else value
        if environment.get(f"FSDP_{name}", default).lower() not in (value, "full_shard"):
            raise RequestError(reason, hint)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", ""):
        raise RequestError(
            f"accelerate's mixed precision `{precision}` is not used",
            "--dtype sets the precision of the base weights",
        )
    return asked("FSDP")


def _number(name: str, default: int) -> int:
    """A number of the environment. Raises RequestError for what is not one."""
    try:
        return int(os.environ.get(name) or default)
    except ValueError:
        raise RequestError(f"the environment's {name} is `{os.environ[name]}`, not a number") from None


def only_train(arguments: Sequence[str] | None = None) -> None:
    """Raises RequestError when several processes were launched for another command than `train`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in words if not word.startswith("-")), "train")
    if command != "train" and (size := launched().size) > 1:
        raise RequestError(
            f"`lorafit {command}` runs in one process, and {size} were launched",
            f"lorafit {command} without a launcher",
        )
