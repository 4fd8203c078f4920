"""The device that is planned for: which it is, what is free there, what a timing on it belongs to."""

from __future__ import annotations

import gc
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from lorafit.distributed import launched
from lorafit.errors import RequestError
from lorafit.model import pick_device
from lorafit.settings import RunConfig
from lorafit.system import free_memory, on_apple_gpu, without_collecting
from lorafit.units import parse_bytes

# Where systems show a GPU that torch calls cuda: NVIDIA's driver, WSL 2, ROCm.
GPUS = ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")


def device_of(name: str, elsewhere: bool) -> str:
    """The kind of device to plan for: `cpu`, `cuda` or `mps`.

    `elsewhere` plans for another machine's device. Raises RequestError for an unknown device, or one
    that this machine does not have.
    """
    kind = name.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda", "mps"):
        raise RequestError(f"there is no device `{name}`", "--device cpu, cuda or mps")
    if elsewhere:
        return "cuda" if kind == "auto" else kind
    if kind == "auto":
        if sys.platform == "win32" or any(Path(place).exists() for place in GPUS):
            return str(torch_device(name).type)
        return "mps" if on_apple_gpu() else "cpu"
    return kind if kind == "cpu" else str(torch_device(name).type)


def torch_device(name: str, gpu: int | None = None) -> Any:
    """The device of that name, the GPU of that number."""
    with without_collecting():
        return pick_device(name if gpu is None else f"{name}:{gpu}")


def gpu_of(name: str) -> int | None:
    """The number of the GPU that a run on that device, a GPU, uses on this machine: the one that is named or, of
    several processes, this one's; None is torch's own choice."""
    world, number = launched(), name.partition(":")[2]
    if not world.alone:
        return world.local_rank
    return int(number) if number.isdecimal() else None


def give_back(device: Any) -> None:
    """Give the memory of a GPU back that nothing holds any more: torch keeps it for this process."""
    if device.type == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()


def dtype_of(config: RunConfig, device: str) -> str:
    """The dtype that `train` computes in: `auto` is bfloat16 on a GPU, else float32."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if device == "cuda" else "float32"


def free_on(device: str, processes: int = 1, gpu: int | None = None) -> int:
    """Free bytes for each of that many processes on a device of this machine; each has a GPU of its own."""
    if device != "cuda":
        return memory_of(processes)
    import torch

    return int(torch.cuda.mem_get_info(gpu)[0])


def memory_of(processes: int) -> int:
    """Free bytes of the host's memory for each of the processes that are planned, or that a launcher started."""
    return free_memory() // (1 if "LOCAL_WORLD_SIZE" in os.environ else processes)


def machine_of(device: str, gpu: int | None = None, threads: int = 0) -> list[Any]:
    """What a timing is of: this host, its device, and as much of its processor as there is for this process; `threads`
    are those that torch was told to use, 0 where it chooses."""
    found = [platform.node(), platform.processor(), os.cpu_count(), device, threads]
    found += [os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    if hasattr(os, "sched_getaffinity"):
        found.append(len(os.sched_getaffinity(0)))
    if device == "cuda":
        import torch

        found.append(torch.cuda.get_device_name(gpu))
    return found


def parse_room(text: str) -> tuple[int | None, int]:
    """(processes, bytes of each) of `4x24GB`; of `24GB` the processes are None. Raises RequestError for
    anything else."""
    several = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(.+)", text)
    try:
        if several is None:
            return None, parse_bytes(text)
        return max(1, int(several[1])), parse_bytes(several[2])
    except ValueError:
        raise RequestError(
            f"--fit is `{text}`: it takes a size",
            "with a unit, e.g. 24GB, 24GiB or 800MB; 4x24GB is four processes with 24 GB each",
        ) from None
