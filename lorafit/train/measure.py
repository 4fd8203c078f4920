"""What a run takes of the machine: peak memory, and the rate of its matrix products."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import psutil
import torch


def efficiency(achieved: float, *measured: float) -> float | None:
    """The share of the device's matrix rate that `achieved` FLOPs a second are; None where none was measured.

    The rate is the highest of those measured before and after: other work on the machine can only lower
    one. What was achieved was within reach too, so the share is never above 1.
    """
    best = max(measured)
    return achieved / max(best, achieved) if best else None


ENOUGH = 8  # tries on a CPU: more of them find no better one. A GPU first raises its clock.


def matrix_rate(
    hidden: int, inner: int, dtype: torch.dtype, device: torch.device, seconds: float = 0.15
) -> float:
    """FLOPs a second of a device's matrix products in a dtype: the best of several tries of 2,048 tokens
    through a weight (hidden, inner), in at most that many seconds. 0 stands for sizes that are not known."""
    hidden, inner = hidden or 1024, inner or 4096
    rows = torch.ones(2048, hidden, dtype=dtype, device=device)
    weight = torch.ones(inner, hidden, dtype=dtype, device=device)
    best, until = float("inf"), time.perf_counter() + seconds
    for number in count():
        started = time.perf_counter()
        if number and (started > until or (number >= ENOUGH and device.type == "cpu")):
            break
        product = torch.nn.functional.linear(rows, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        float(product[0, 0])  # waits until the product is there
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * hidden * inner / best


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest mark: of the device's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if found := _status("VmHWM"):
        return found
    try:
        import resource
    except ImportError:  # Windows has no such module
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit  # type: ignore[attr-defined]  # on Windows


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
    """Bytes held now, before a model is loaded; on Linux the peak is reset."""
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
