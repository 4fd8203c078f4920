"""What `lorafit plan` says against what `lorafit train` measures: peak memory and seconds an epoch.

    python tests/benchmarks/prediction.py --output prediction.jsonl

Each cell is a process of its own, as `lorafit` starts one, that first predicts, then trains two epochs of
the same rows with the prefix cache off. A second call goes on where the first ended. On a machine with a GPU the peak is held
against `torch.cuda.max_memory_allocated`, on a CPU against what the process grew by, and there against
the same tracker over a real step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from lorafit.estimate.glibc_heap import environment


@dataclass(frozen=True)
class Cell:
    family: str
    preset: str
    band: str
    batch: int
    length: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        extra = " checkpointing" if self.checkpointing else ""
        return f"{self.family:<8}{self.preset} × {self.band:<5}{self.batch} × {self.length}{extra}"


# (config class, arguments): 40 to 130 M parameters; `wide` has 270 M, and activations that malloc maps on their own
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12,
         "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024},
    ),
    "gpt2": ("GPT2Config", {"vocab_size": 16000, "n_embd": 512, "n_layer": 12, "n_head": 8, "n_positions": 1024,
                            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "gemma2": (
        "Gemma2Config",
        {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024},
    ),
    "wide": (
        "LlamaConfig",
        {"vocab_size": 16000, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 4,
         "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 1024},
    ),
    "neox": (
        "GPTNeoXConfig",
        {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
         "num_attention_heads": 8, "max_position_embeddings": 1024},
    ),
}  # fmt: skip
CELLS = [
    *(Cell("llama", preset, band, 4, 256) for preset, band in [
        ("ffn", "low"), ("ffn", "mid"), ("ffn", "high"), ("all", "all"), ("basic", "all"), ("attention", "high")]),
    Cell("llama", "all", "all", 2, 256), Cell("llama", "all", "all", 8, 256), Cell("llama", "all", "all", 4, 512),
    Cell("llama", "all", "all", 4, 256, True), Cell("llama", "ffn", "high", 4, 512, True),
    Cell("llama", "ffn", "high", 16, 128),
    *(Cell(family, preset, band, 4, 256) for family in ("gpt2", "gemma2", "neox") for preset, band in [
        ("all", "high"), ("all", "all"), ("basic", "mid")]),
    Cell("gpt2", "all", "all", 4, 256, True), Cell("gemma2", "all", "all", 4, 256, True),
    Cell("wide", "all", "all", 8, 512),
]  # fmt: skip
ROWS, EPOCHS = 32, 2


def one(cell: Cell) -> dict[str, Any]:
    """Predict, then train; in this process."""
    import torch
    import transformers

    from lorafit.adapter.plan import resolve
    from lorafit.data.dataset import Rows
    from lorafit.data.rows import IGNORED, Row
    from lorafit.demo import MODEL
    from lorafit.estimate.forecast import prepare
    from lorafit.estimate.simulate import _profile, track
    from lorafit.events import EpochDone, TrainReport
    from lorafit.forward.head import Forward
    from lorafit.model.chart import chart_of
    from lorafit.model.load import load_tokenizer
    from lorafit.model.source import find
    from lorafit.settings.precedence import derive_from_model, settle
    from lorafit.settings.preset import load_preset
    from lorafit.train import loop
    from lorafit.train.job import assemble
    from lorafit.train.loggers import recorded
    from lorafit.train.run_folder import RunFolder

    folder = Path(tempfile.mkdtemp())
    name, arguments = SHAPES[cell.family]
    config = getattr(transformers, name)(**arguments, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer = load_tokenizer(str(MODEL), "demo")
    source = find(str(folder / "model"))
    found = chart_of(source)
    plan = resolve(found, load_preset(cell.preset), cell.band)
    ids = torch.randint(3, 16000, (ROWS, cell.length), generator=torch.Generator().manual_seed(0)).tolist()
    half = cell.length // 2
    rows = tuple(Row(tuple(i), (IGNORED,) * half + tuple(i[half:]), "") for i in ids)
    given = Rows.of(rows, rows[:1], tokenizer, found.task)
    settings, _ = settle(
        {
            "model": source.place, "preset": cell.preset, "layers": cell.band, "epochs": EPOCHS,
            "batch_size": cell.batch, "max_length": cell.length, "prefix_cache": "off",
            "gradient_checkpointing": cell.checkpointing, "learning_rate": 1e-4,
        }
    )  # fmt: skip
    settings = derive_from_model(settings, found)
    ahead, settings = prepare(settings, source, found, look=given.look)
    cost = ahead.estimate(plan, ahead.timing(plan))
    result: dict[str, Any] = {
        "predicted_peak": cost.memory.peak,
        "predicted_seconds": cost.seconds_per_epoch,
        "predicted_params": plan.trainable_params,
    }

    run = RunFolder(folder / "run")
    run.open(False, False)
    job = assemble(source, found, settings, plan, given, tokenizer, run)
    events = list(recorded(job, loop.run(job)))
    report = events[-1]
    assert isinstance(report, TrainReport)
    result["growth"] = report.memory_growth_bytes
    result["seconds"] = [e.seconds for e in events if isinstance(e, EpochDone)]
    result["params"] = report.trainable_params
    result["device"] = job.device.type
    if job.device.type == "cpu":  # the tracker over a real step of a model of its own
        batch = job.micro_batch(0, 0)
        forward = Forward.of(job.model, found.task)
        job.model.train()
        tracked = _profile(track(job.model, plan, forward, batch, "cpu"), ahead.shape, "")
        fixed = cost.memory.weights + cost.memory.adapter + cost.memory.gradients + cost.memory.optimizer
        result["tracked_peak"] = fixed + tracked.activations + tracked.logits + tracked.workspace
        result["simulated_peak"] = cost.memory.peak - cost.memory.heap
    return result


def show(output: Path) -> None:
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    print(f"{'':<42}{'predicted':>11}{'to tracked':>12}{'to measured':>13}{'s/epoch':>10}{'to measured':>13}")
    tracked, peaks, times = [], [], []
    for row in rows:
        measured = row["seconds"][-1]
        peak, seconds = row["predicted_peak"] / row["growth"], row["predicted_seconds"] / measured
        same = row["simulated_peak"] / row["tracked_peak"] if "tracked_peak" in row else None
        exact = "" if row["params"] == row["predicted_params"] else "  PARAMETERS DIFFER"
        print(
            f"{row['cell']:<42}{row['predicted_peak'] / 1e6:>8,.0f} MB"
            f"{'' if same is None else f'{same:.3f}':>12}{peak:>13.3f}{measured:>10.2f}{seconds:>13.3f}{exact}"
        )
        peaks.append(abs(peak - 1))
        times.append(abs(seconds - 1))
        if same is not None:
            tracked.append(abs(same - 1))
    for label, errors in (("tracked peak", tracked), ("measured peak", peaks), ("seconds", times)):
        if len(errors) > 1:
            ninth = quantiles(errors, n=10)[-1]
            print(f"{label:<16} off by {median(errors):.1%} at the median, {ninth:.1%} at the 90th percentile, "
                  f"{max(errors):.1%} at the most")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("prediction.jsonl"))
    parser.add_argument("--show", action="store_true", help="only print the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(Cell(**json.loads(options.one)))))
        return
    done = set()
    if options.output.exists():
        done = {json.loads(line)["cell"] for line in options.output.read_text().splitlines()}
    for cell in [] if options.show else CELLS:
        if cell.name in done:
            continue
        command = [sys.executable, __file__, "--one", json.dumps(asdict(cell))]
        made = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
        line = next((x for x in made.stdout.splitlines() if x.startswith('{"predicted')), None)
        if line is None:
            print(f"{cell.name} failed: {made.stderr[-600:]}", file=sys.stderr)
            continue
        with options.output.open("a") as file:
            file.write(json.dumps({"cell": cell.name, **json.loads(line)}) + "\n")
        print(cell.name, file=sys.stderr, flush=True)
    show(options.output)


if __name__ == "__main__":
    main()
