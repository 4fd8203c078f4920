"""Training throughput against what people use: the same model, rows, modules, layers, dtype and batch.

    pip install -e '.[bench]'
    python tests/benchmarks/throughput.py --output results.jsonl

LLaMA-Factory wants other versions of nearly everything: it goes along where `--llama-factory` names the Python
of an environment that holds it. Each contender trains each cell in a process of its own, one after another, round by round, so that
what else the machine does falls on all alike. The results are appended to a file; a second call
goes on where the first ended. The table shows medians over the rounds.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

EPOCHS, RATE = 3, 1e-4


@dataclass(frozen=True)
class Shape:
    """A model of Llama's shape with random weights, and the rows it trains on."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    rows: int = 16
    length: int = 512
    batch: int = 4


SHAPES = {
    "12x768": Shape(12, 768, 2048, 12, 12, 30522),
    "24x768-little-head": Shape(24, 768, 2048, 12, 12, 4096),
    # for a GPU: as Llama 3.2 1B, and as one of 3 B
    "1b": Shape(16, 2048, 8192, 32, 8, 128256, 128, 1024, 8),
    "3b": Shape(28, 3072, 8192, 24, 8, 128256, 64, 1024, 4),
}
MAIN = [("ffn", "low"), ("ffn", "mid"), ("ffn", "high"), ("all", "all")]
OTHER = [
    (preset, band)
    for preset in ("basic", "attention", "extended", "ffn", "all")
    for band in ("low", "mid", "high", "all")
    if (preset, band) not in MAIN
]
PEERS = ["peft-trainer", "trl-default", "trl-best"]
FACTORY = "llama-factory"
OURS: dict[str, dict[str, Any]] = {
    "lorafit": {},
    "lorafit-no-cache": {"prefix_cache": "off"},
    "lorafit-compiled": {"compile": True},
}


@dataclass(frozen=True)
class Cell:
    shape: str
    preset: str
    band: str
    dtype: str = "bfloat16"
    epochs: int = EPOCHS

    @property
    def name(self) -> str:
        return f"{self.shape} {self.preset} × {self.band} {self.dtype}"


def make_shape(shape: str, folder: Path) -> Path:
    """A model with random weights, the demo's tokenizer beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorafit.demo import MODEL
    from lorafit.model.load import load_tokenizer

    path = folder / shape
    if not (path / "model.safetensors").exists():
        made = SHAPES[shape]
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=made.vocabulary, hidden_size=made.hidden, intermediate_size=made.inner,
            num_hidden_layers=made.layers, num_attention_heads=made.heads, num_key_value_heads=made.key_heads,
            max_position_embeddings=2 * made.length, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=made.key_heads < made.heads,
        )  # fmt: skip
        with torch.device(device()):
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
        load_tokenizer(str(MODEL), "demo").save_pretrained(path)
    return path


def token_rows(shape: Shape) -> list[list[int]]:
    """Rows that can be learned a little: a walk over few of the vocabulary."""
    from random import Random

    random = Random(7)
    few = min(shape.vocabulary, 400)
    return [[random.randrange(3, few) for _ in range(shape.length)] for _ in range(shape.rows)]


def setting(cell: Cell, folder: Path) -> tuple[Any, Any, Any]:
    """(source, map, plan) of a cell."""
    from lorafit.adapter.plan import resolve
    from lorafit.model.chart import chart_of
    from lorafit.model.source import find
    from lorafit.settings.preset import load_preset

    source = find(str(folder / cell.shape))
    found = chart_of(source)
    return source, found, resolve(found, load_preset(cell.preset), cell.band)


def ours(cell: Cell, folder: Path, **options: Any) -> dict[str, Any]:
    """lorafit's own loop, as `lorafit train` runs it with these options."""
    from lorafit.data.dataset import Rows
    from lorafit.data.rows import IGNORED, Row
    from lorafit.events import EpochDone, TrainReport
    from lorafit.model.load import load_tokenizer
    from lorafit.settings.precedence import derive_from_model, settle
    from lorafit.train import loop
    from lorafit.train.job import assemble
    from lorafit.train.loggers import recorded
    from lorafit.train.run_folder import RunFolder

    source, found, plan = setting(cell, folder)
    shape = SHAPES[cell.shape]
    half = shape.length // 2
    rows = tuple(Row(tuple(ids), (IGNORED,) * half + tuple(ids[half:]), "") for ids in token_rows(shape))
    config, _ = settle(
        {
            "model": source.place, "preset": cell.preset, "layers": cell.band, "epochs": cell.epochs,
            "batch_size": shape.batch, "learning_rate": RATE, "warmup": 0.0, "dtype": cell.dtype,
            "device": device(), **options,
        }
    )  # fmt: skip
    config = derive_from_model(config, found)
    run = RunFolder(Path(tempfile.mkdtemp()) / "run")
    run.open(False, False)
    tokenizer = load_tokenizer(source.place, "")
    given = Rows.of(rows, rows[:1], tokenizer, found.task)
    job = assemble(source, found, config, plan, given, tokenizer, run)
    start_alike(job.model, cell, folder)
    events = list(recorded(job, loop.run(job)))
    report = events[-1]
    assert isinstance(report, TrainReport)
    cache = report.prefix_cache
    return {
        "epochs": [e.seconds for e in events if isinstance(e, EpochDone)],
        "loss": [e.loss for e in events if isinstance(e, EpochDone)],
        "mfu": [e.mfu for e in events if isinstance(e, EpochDone)],
        "cache_bytes": cache.bytes if cache and cache.where == "memory" else 0,
    }


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def start_alike(model: Any, cell: Cell, folder: Path) -> None:
    """The same first adapter for every contender: the one that was there first is kept in a file."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    path = folder / f"start-{cell.shape}-{cell.preset}-{cell.band}.safetensors"
    if not path.exists():
        state = get_peft_model_state_dict(model)
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, path)
    set_peft_model_state_dict(model, load_file(path))


def theirs(cell: Cell, folder: Path, contender: str) -> dict[str, Any]:
    """transformers' Trainer, or TRL's SFTTrainer, over PEFT's model, in the order of our batches."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from lorafit.data.batching import batches, in_epoch

    source, _, plan = setting(cell, folder)
    shape = SHAPES[cell.shape]
    half = shape.length // 2
    rows = token_rows(shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source.place, dtype=getattr(torch, cell.dtype))
    target = plan.peft
    model = get_peft_model(
        model,
        LoraConfig(
            r=plan.lora.r, lora_alpha=plan.lora.alpha, lora_dropout=plan.lora.dropout,
            target_modules=list(target.target_modules),
            layers_to_transform=list(target.layers_to_transform) if target.layers_to_transform else None,
            layers_pattern=list(target.layers_pattern) if target.layers_pattern else None,
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    start_alike(model, cell, folder)
    made = batches([shape.length] * shape.rows, shape.batch, 0)

    class Order(torch.utils.data.Sampler):
        epoch = 0

        def __len__(self) -> int:
            return shape.rows

        def __iter__(self) -> Any:
            self.epoch += 1
            return iter([r for n in in_epoch(len(made), 0, self.epoch) for part in made[n] for r in part])

    common, clock = trainers_own(cell), a_clock()
    if contender == "peft-trainer":

        class Ordered(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return Order()

        data = [
            {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100] * half + ids[half:])}
            for ids in rows
        ]
        trainer = Ordered(model, TrainingArguments(**common), train_dataset=data, callbacks=[clock])
    else:
        from trl import SFTConfig, SFTTrainer

        from lorafit.model.load import load_tokenizer

        class OrderedSFT(SFTTrainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return Order()

        data = Dataset.from_list(
            [{"input_ids": ids, "completion_mask": [0] * half + [1] * half} for ids in rows]
        )
        more: dict[str, Any] = {"gradient_checkpointing": False} if contender == "trl-best" else {}
        if cell.dtype == "float32":
            more["bf16"] = False
        trainer = OrderedSFT(
            model,
            SFTConfig(**common, max_length=shape.length, completion_only_loss=True, **more),
            train_dataset=data,
            processing_class=load_tokenizer(source.place, ""),
            callbacks=[clock],
        )
    trainer.train()
    return {"epochs": clock.seconds, "loss": clock.losses[: cell.epochs], "mfu": [], "cache_bytes": 0}


def trainers_own(cell: Cell) -> dict[str, Any]:
    """What all that build on transformers' Trainer are told."""
    return {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": SHAPES[cell.shape].batch,
        "num_train_epochs": cell.epochs, "learning_rate": RATE, "lr_scheduler_type": "linear",
        "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_strategy": "epoch",
        "save_strategy": "no", "report_to": [], "seed": 0, "use_cpu": device() == "cpu",
        "disable_tqdm": True,
    }  # fmt: skip


def a_clock() -> Any:
    """Seconds and losses of a Trainer's epochs."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds: list[float] = []
        losses: list[float] = []

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock()


def factory(cell: Cell, folder: Path) -> dict[str, Any]:
    """LLaMA-Factory at its defaults, in its own environment: the same modules by their full names, rows
    that are tokens already; its first adapter is its own, since it takes none."""
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    shape = SHAPES[cell.shape]
    half = shape.length // 2
    rows = [
        {"input_ids": ids, "attention_mask": [1] * shape.length, "labels": [-100] * half + ids[half:]}
        for ids in token_rows(shape)
    ]
    tokens = folder / f"tokens-{cell.shape}"
    if not tokens.exists():
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tokens)
    clock = a_clock()
    told = json.loads(modules_file(cell, folder).read_text())
    run_exp(
        {
            **trainers_own(cell), "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "model_name_or_path": str(folder / cell.shape), "template": "default", "cutoff_len": shape.length,
            "dataset": "rows", "tokenized_path": str(tokens), "lora_target": ",".join(told["modules"]), "lora_rank": told["r"],
            "lora_alpha": told["alpha"], "bf16": cell.dtype == "bfloat16", "report_to": "none",
        },
        callbacks=[clock],
    )  # fmt: skip
    return {"epochs": clock.seconds, "loss": clock.losses[: cell.epochs], "mfu": [], "cache_bytes": 0}


def modules_file(cell: Cell, folder: Path) -> Path:
    """Where what a cell adapts is written down for who cannot ask lorafit."""
    return folder / f"modules-{cell.shape}-{cell.preset}-{cell.band}.json"


def one(contender: str, cell: Cell, folder: Path) -> dict[str, Any]:
    if contender in OURS:
        found = ours(cell, folder, **OURS[contender])
    elif contender == FACTORY:
        found = factory(cell, folder)
    else:
        found = theirs(cell, folder, contender)
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {**found, "peak": peak, "device": device()}


def drive(
    cells: list[tuple[Cell, list[str]]], rounds: int, output: Path, folder: Path, pythons: dict[str, str]
) -> None:
    """Run what the file does not hold yet; `pythons` are those of contenders that need one of their own."""
    from lorafit.estimate.glibc_heap import environment

    done = {(r["contender"], r["cell"], r["round"]) for r in results(output)}
    for shape in {cell.shape for cell, _ in cells}:
        make_shape(shape, folder)
    for number in range(rounds):
        for cell, contenders in cells:
            turn = contenders[number % len(contenders) :] + contenders[: number % len(contenders)]
            for contender in turn:
                if (contender, cell.name, number) in done:
                    continue
                if contender == FACTORY:
                    _, _, plan = setting(cell, folder)
                    told = {"modules": plan.modules, "r": plan.lora.r, "alpha": int(plan.lora.alpha)}
                    modules_file(cell, folder).write_text(json.dumps(told))
                python = pythons.get(contender, sys.executable)
                command = [python, __file__, "--one", contender, "--folder", str(folder)]
                started = time.perf_counter()
                made = subprocess.run(
                    [*command, "--cell", json.dumps(asdict(cell))],
                    capture_output=True,
                    text=True,
                    check=False,
                    env=environment() if contender in OURS else None,  # as `lorafit` starts itself
                )
                seconds = time.perf_counter() - started
                line = next((x for x in made.stdout.splitlines() if x.startswith('{"epochs"')), None)
                if line is None:
                    print(f"{contender} failed on {cell.name}: {made.stderr[-800:]}", file=sys.stderr)
                    continue
                row = {
                    "contender": contender, "cell": cell.name, "round": number, "job": seconds, **json.loads(line)
                }  # fmt: skip
                with output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{cell.name:<42}{contender:<18}{seconds:7.1f} s", file=sys.stderr, flush=True)


def results(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def show(output: Path) -> None:
    """Medians over the rounds, and lorafit's later epochs against each peer's."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in results(output):
        groups.setdefault(row["cell"], {}).setdefault(row["contender"], []).append(row)
    print(
        f"{'tokens/s by epoch':>50}{'job':>9}{'peak':>9}{'less cache':>12}{'last loss':>11}{'MFU':>6}  later epochs"
    )
    for cell, contenders in groups.items():
        print(cell)
        shape = SHAPES[cell.split()[0]]
        tokens, speed = shape.rows * shape.length, {}
        for name, rows in contenders.items():
            epochs = [tokens / median(r["epochs"][e] for r in rows) for e in range(len(rows[0]["epochs"]))]
            speed[name] = tokens / median(s for r in rows for s in r["epochs"][1:])
            peak = median(r["peak"] for r in rows) / 1e6
            own = median(r["peak"] - r["cache_bytes"] for r in rows) / 1e6
            mfu = f"{median(r['mfu'][-1] for r in rows):.0%}" if rows[0]["mfu"] else ""
            ratio = f"{speed['lorafit'] / speed[name]:5.2f}×" if "lorafit" in speed else ""
            print(
                f"  {name:<18}" + "".join(f"{e:>10,.0f}" for e in epochs).rjust(30)
                + f"{median(r['job'] for r in rows):>7.1f} s{peak:>6,.0f} MB{own:>9,.0f} MB"
                f"{median(r['loss'][-1] for r in rows):>11.5f}{mfu:>6}  {ratio}"
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("throughput.jsonl"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lorafit-throughput")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", choices=["main", "other", "losses", "gpu", "all"], default="main")
    parser.add_argument("--cell-name", help="only this cell, as 1b-ffn-high")
    parser.add_argument("--contenders", help="only these, with commas between them")
    parser.add_argument("--show", action="store_true", help="only print the table")
    parser.add_argument("--llama-factory", help="the Python of an environment with LLaMA-Factory in it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.one:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        print(json.dumps(one(options.one, Cell(**json.loads(options.cell)), options.folder)))
        return
    pythons = {FACTORY: options.llama_factory} if options.llama_factory else {}
    main_cells = [
        (Cell("12x768", *c), ["lorafit", "lorafit-no-cache", *PEERS, *pythons]) for c in reversed(MAIN)
    ]
    main_cells.append(
        (Cell("24x768-little-head", "ffn", "high"), ["lorafit", "lorafit-no-cache", "peft-trainer"])
    )
    other_cells = [(Cell("12x768", *c, epochs=2), ["lorafit", "peft-trainer"]) for c in OTHER]
    loss_cells = [
        (Cell("12x768", *c, dtype="float32"), ["lorafit", "peft-trainer", "trl-best"]) for c in MAIN
    ]
    gpu_cells = [(Cell("1b", *c), [*OURS, *PEERS]) for c in [("ffn", "high"), ("all", "all")]]
    gpu_cells.append((Cell("3b", "ffn", "high"), ["lorafit", "lorafit-no-cache", "peft-trainer"]))
    cells = {"main": main_cells, "other": other_cells, "losses": loss_cells, "gpu": gpu_cells}
    chosen = [*main_cells, *loss_cells, *other_cells] if options.cells == "all" else cells[options.cells]
    if options.cell_name:
        chosen = [(c, who) for c, who in chosen if f"{c.shape}-{c.preset}-{c.band}" == options.cell_name]
    if options.contenders:
        named = options.contenders.split(",")
        chosen = [
            (c, [w for w in (*who, *(o for o in OURS if o not in who)) if w in named]) for c, who in chosen
        ]
    if not options.show:
        drive(chosen, options.rounds, options.output, options.folder, pythons)
    show(options.output)


if __name__ == "__main__":
    main()
