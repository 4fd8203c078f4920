"""A base divided among two processes: peak resident memory of each against one process that holds all of it.

    python tests/benchmarks/sharding.py --output results.jsonl

A random Llama of about 0.5 B, gate, up and down of every layer adapted, batches of 4 rows of 128 tokens, 2 steps.
The peaks are those of the process (VmHWM): of loading, each weight read once (one process maps a float32 file, whose
pages are resident only then), and of training, the mark set back between; `growth` is without what Python and the
libraries held before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from residency import make_rows

LAYERS, HIDDEN, INNER, HEADS, VOCABULARY = 32, 1152, 3072, 18, 16000
ROWS, LENGTH, STEPS, BATCH = 24, 128, 2, 4


def make_model(folder: Path) -> Path:
    """A model with random weights, the demo's tokenizer beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorafit.demo import MODEL
    from lorafit.model.load import load_tokenizer

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=2 * LENGTH,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
        load_tokenizer(str(MODEL), "demo").save_pretrained(folder)
    return folder


def measure(folder: Path, dtype: str, band: str, shard: bool) -> None:
    """One of the processes: its peaks in JSON, into `FOLDER/peaks.RANK`."""
    from unittest.mock import patch

    from lorafit.distributed import connect
    from lorafit.model import local
    from lorafit.operations import prepare_run, resolve_run, train_events
    from lorafit.train import job, memory_before, peak_memory

    found: dict[str, Any] = {}
    load = job.load_base

    def load_and_measure(*arguments: Any) -> Any:
        base = load(*arguments)
        for parameter in base.model.parameters():
            float(local(parameter).sum())
        found.update(before=base.before, load=peak_memory(base.device))
        memory_before(base.device)  # the mark is set back
        return base

    world = connect()
    flags = {
        "model": str(folder / "model"), "data": (str(folder / "rows.jsonl"),), "preset": "ffn", "layers": band,
        "dtype": dtype, "max_length": LENGTH, "overflow": "truncate", "batch_size": BATCH, "epochs": 9,
        "max_steps": STEPS, "holdout": 0.0, "output": str(folder / "run"), "overwrite": True, "prefix_cache": "off",
        "shard": shard,
    }  # fmt: skip
    resolved = resolve_run(world, {name: value for name, value in flags.items() if value is not False}, None)
    prepared = prepare_run(world, resolved)  # type: ignore[arg-type]
    found["predicted"] = prepared.cost.memory.peak
    with patch("lorafit.train.job.load_base", load_and_measure):
        events = list(train_events(world, prepared, lambda: 0))
    report = events[-1]
    found.update(
        train=report.peak_memory_bytes, losses=[e.loss for e in events if type(e).__name__ == "Stepped"]
    )
    found["seconds"] = report.seconds
    (folder / f"peaks.{world.rank}").write_text(json.dumps(found))
    world.close()


def measured(folder: Path, processes: int, dtype: str, band: str) -> list[dict[str, Any]]:
    """What each process found."""
    one = [__file__, "--folder", str(folder), "--one", dtype, band, str(processes)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), *one]
    tunables = {
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
        "OMP_NUM_THREADS": "1",
    }  # as `lorafit train` starts
    subprocess.run(command, check=True, env={**os.environ, **tunables})
    return [json.loads((folder / f"peaks.{rank}").read_text()) for rank in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("sharding.jsonl"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lorafit-sharding")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--band", default="all")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        dtype, band, processes = asked.one
        measure(asked.folder, dtype, band, int(processes) > 1)
        return
    asked.folder.mkdir(exist_ok=True)
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; import sharding; "
    make = f"sharding.make_model(Path({str(asked.folder / 'model')!r}))"
    subprocess.run([sys.executable, "-c", path + make], check=True)
    make_rows(asked.folder / "rows.jsonl", ROWS)
    for dtype in asked.dtypes:
        began = time.perf_counter()
        (alone,) = measured(asked.folder, 1, dtype, asked.band)
        two = measured(asked.folder, 2, dtype, asked.band)
        row: dict[str, Any] = {"device": f"{os.cpu_count()} CPU cores", "dtype": dtype, "band": asked.band}
        for part in ("load", "train"):
            most = max(each[part] for each in two)
            growth = max(each[part] - each["before"] for each in two)
            row[part] = {
                "one": alone[part], "each of two": most, "ratio": round(most / alone[part], 3),
                "growth of one": alone[part] - alone["before"], "growth of each": growth,
                "ratio of growth": round(growth / (alone[part] - alone["before"]), 3),
            }  # fmt: skip
        row["predicted"] = {"one": alone["predicted"], "each of two": two[0]["predicted"]}
        row["largest difference of a loss"] = max(
            abs(a / b - 1) for a, b in zip(alone["losses"], two[0]["losses"], strict=True)
        )
        row["seconds"] = {
            "one": alone["seconds"],
            "two": two[0]["seconds"],
            "all": time.perf_counter() - began,
        }
        with asked.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
