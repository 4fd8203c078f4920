"""`lorafit compare` against one `lorafit train --prefix-cache off` after another: time, and that the results are equal.

    python tests/benchmarks/compare_speed.py                                   # the whole 5 × 4 grid on the demo
    python tests/benchmarks/compare_speed.py --presets basic,ffn --layers low,high --workers 2

Each `train` gets the run file of the candidate, so seed, batches and rate are the same. It prints JSON: seconds of both,
on the clock and of the processors, how many times as fast, and the largest difference of a held-out loss.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Took:
    """Seconds of commands: on the clock, and of the processors, which other work on the machine changes less."""

    def __init__(self) -> None:
        self.clock = self.processor = 0.0

    def lorafit(self, *words: str) -> float:
        """Run a command and add what it took; its seconds on the clock."""
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "lorafit", *words], check=True, capture_output=True)
        after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
        self.clock += seconds
        self.processor += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", default="basic,attention,extended,ffn,all")
    parser.add_argument("--layers", default="low,mid,high,all")
    parser.add_argument("--max-steps", default="")
    parser.add_argument("--workers", default="1")
    parser.add_argument(
        "--halving", action="store_true", help="also: whether the best of the grid survives --halving"
    )
    asked = parser.parse_args()
    grid = ["--presets", asked.presets, "--layers", asked.layers]
    grid += ["--max-steps", asked.max_steps] if asked.max_steps else []
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"  # nothing is known before
        folder = Path(place) / "compared"
        together, alone_each = Took(), Took()
        together.lorafit("compare", *grid, "--workers", asked.workers, "-o", str(folder))
        found = json.loads((folder / "compare.json").read_text())
        apart = 0.0
        for row in found["choices"]:
            alone = Path(place) / "alone" / row["choice"]
            seconds = alone_each.lorafit(
                "train",
                "--config",
                str(folder / row["choice"] / "run.yaml"),
                "--prefix-cache",
                "off",
                "-o",
                str(alone),
            )
            lines = [json.loads(line) for line in (alone / "events.jsonl").read_text().splitlines()]
            loss = next(line for line in lines if line["event"] == "report")["eval"]["after"]["loss"]
            apart = max(apart, abs(loss - row["loss"]))
            print(f"{row['choice']:<16}{seconds:7.1f} s alone, loss {loss:.4f}", file=sys.stderr)
        answer = {
            "candidates": len(found["choices"]),
            "workers": int(asked.workers),
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "compare_seconds": round(together.clock, 1),
            "train_seconds": round(alone_each.clock, 1),
            "times_as_fast": round(alone_each.clock / together.clock, 2),
            "compare_processor_seconds": round(together.processor, 1),
            "train_processor_seconds": round(alone_each.processor, 1),
            "largest_difference": apart,
        }
        if asked.halving:
            halved = Path(place) / "halved"
            answer["halving_seconds"] = round(
                Took().lorafit("compare", *grid, "--halving", "-o", str(halved)), 1
            )
            dropped = json.loads((halved / "compare.json").read_text())
            answer["halving_kept_the_best"] = dropped["choices"][0]["choice"] == found["choices"][0]["choice"]
        print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
