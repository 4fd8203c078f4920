"""Where the time of a step goes on a GPU: kernels by their time, and each wait for the device by its place.

python tests/benchmarks/cuda_steps.py FOLDER      # where throughput.py keeps its models
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import throughput
import torch


def main(folder: Path) -> None:
    throughput.SHAPES["1b"] = replace(throughput.SHAPES["1b"], rows=32)
    cell = throughput.Cell("1b", "ffn", "high", epochs=2)
    throughput.make_shape("1b", folder)
    throughput.ours(cell, folder)  # loads the kernels
    with torch.profiler.profile() as profile:
        throughput.ours(cell, folder)
    print(
        profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=60)
    )
    waits: Counter[str] = Counter()

    def seen(message: Any, *rest: Any, **_: Any) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and "/lorafit/" not in frame.f_code.co_filename:
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else str(rest[1:3])
        waits[place] += 1

    warnings.showwarning = seen
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    throughput.ours(cell, folder)
    for place, count in waits.most_common(12):
        print(f"{count:6} waits at {place}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
