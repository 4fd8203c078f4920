"""Whether a run's seconds, and its cache on the disk, grow with its tokens and no faster.

    python tests/benchmarks/growth.py

Trains the demo's high band on 10^4, 10^5 and 10^6 tokens of the demo's kind, two epochs in bfloat16 with the
prefix cache on the disk: the first fills it, the second replays it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

from lorafit.demo.world import records

SIZES = (10**4, 10**5, 10**6)
HIDDEN, TOKENS_A_ROW = 128, 44


def one(tokens: int, folder: Path) -> dict[str, float]:
    """`lorafit train` on so many tokens, and what `lorafit cache` lists afterwards."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    made = records(Random(tokens))
    with data.open("w") as file:
        for _ in range(tokens // TOKENS_A_ROW):
            file.write(json.dumps(next(made)) + "\n")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}

    def lorafit(*arguments: str) -> dict[str, list[dict[str, float]]]:
        command = [sys.executable, "-m", "lorafit", *arguments, "--json"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)

    run = lorafit(
        "train", "--data", str(data), "--preset", "ffn", "--layers", "high", "--epochs", "2", "--dtype", "bfloat16",
        "--prefix-cache", "disk", "--batch-size", "32", "-o", str(folder / "run"), "-q",
    )  # fmt: skip
    first, second = run["epochs"]
    events = map(json.loads, (folder / "run" / "events.jsonl").read_text().splitlines())
    look = next(event for event in events if event["event"] == "data")
    states = [entry for entry in lorafit("cache")["caches"] if entry["kind"] == "prefix"]
    return {
        "tokens": first["tokens"], "first": first["seconds"], "second": second["seconds"],
        "cache": sum(entry["bytes"] for entry in states), "kept": look["tokens"] + look["held_out_tokens"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="tokens")
    options = parser.parse_args()
    print(
        f"{'tokens':>10}{'filling':>11}{'replaying':>11}{'µs a token':>20}{'cache':>12}{'bytes / (hidden × token)':>27}"
    )
    with tempfile.TemporaryDirectory() as place:
        for size in options.sizes:
            found = one(size, Path(place) / str(size))
            tokens = found["tokens"]
            micro = [1e6 * found[epoch] / tokens for epoch in ("first", "second")]
            print(
                f"{tokens:>10,.0f}{found['first']:>9.2f} s{found['second']:>9.2f} s{micro[0]:>10.1f}{micro[1]:>10.1f}"
                f"{found['cache'] / 1e6:>9.1f} MB{found['cache'] / (HIDDEN * found['kept']):>27.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
