"""A band of a model larger than memory: lorafit with streamed layers against PEFT + Trainer, and under a limit.

    pip install -e '.[bench]'
    python tests/benchmarks/residency.py --output results.jsonl

A random Llama in bfloat16, the top quarter of its layers, 4 rows of 256 tokens, three epochs; each contender in a
process of its own, the page cache warm. `limit` is a cap on the memory that a process may allocate (RLIMIT_DATA):
lorafit trains under it, and the same run that holds all layers cannot start.
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
from typing import Any

LAYERS, HIDDEN, INNER, HEADS, KEY_HEADS, VOCABULARY = 32, 2560, 6912, 20, 20, 32000
ROWS, LENGTH, EPOCHS, RATE = 4, 256, 3, 1e-4
BAND = f"last:{LAYERS // 4}"


def make_model(folder: Path) -> Path:
    """A model with random weights in several files, the demo's tokenizer beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorafit.demo import MODEL
    from lorafit.model.load import load_tokenizer

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=2 * LENGTH,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
        load_tokenizer(str(MODEL), "demo").save_pretrained(folder)
    return folder


def make_rows(path: Path, rows: int = ROWS) -> Path:
    """Rows of at least LENGTH tokens of the demo's language."""
    from random import Random

    from lorafit.demo.world import records

    made = records(Random(11))
    with path.open("w") as file:
        for _ in range(rows):
            texts = [message["content"] for _ in range(60) for message in next(made)["messages"]]
            file.write(json.dumps({"text": " ".join(texts)}) + "\n")
    return path


def flags(model: Path, rows: Path, residency: str) -> list[str]:
    """The options of a run, for `plan` and `train`."""
    return [
        str(model), "--data", str(rows), "--preset", "ffn", "--layers", BAND, "--dtype", "bfloat16",
        "--max-length", str(LENGTH), "--overflow", "truncate", "--batch-size", str(ROWS), "--epochs", str(EPOCHS),
        "--holdout", "0", "--learning-rate", str(RATE), "--prefix-residency", residency,
    ]  # fmt: skip


def peft_trainer(model: Path, rows: Path) -> None:
    """The same run as people do it: the whole model loaded, PEFT, transformers' Trainer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    ids = [tokenizer(text)["input_ids"][:LENGTH] for text in texts]
    data = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    layers = list(range(LAYERS - LAYERS // 4, LAYERS))
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["gate_proj", "up_proj", "down_proj"], layers_to_transform=layers
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=ROWS, num_train_epochs=EPOCHS, learning_rate=RATE, bf16=False,
            report_to=[], save_strategy="no", logging_steps=1, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        Trainer(get_peft_model(base, config), arguments, train_dataset=data).train()


def measured(command: list[str], limit: int = 0) -> dict[str, Any]:
    """Seconds, peak resident bytes and exit code of a process; `limit` caps the memory that it may allocate."""

    def capped() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, preexec_fn=capped)
        _, status, usage = os.wait4(process.pid, 0)
        said.seek(0)
        text = said.read()
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "peak": usage.ru_maxrss * 1024,
        "code": os.waitstatus_to_exitcode(status),
        "said": text,
    }


def lorafit(folder: Path, model: Path, rows: Path, residency: str, limit: int = 0) -> dict[str, Any]:
    """`lorafit train`, with what `plan` said of it and what its run folder tells."""
    output = folder / f"run-{residency}-{limit}"
    command = [
        sys.executable,
        "-m",
        "lorafit",
        "train",
        *flags(model, rows, residency),
        "-o",
        str(output),
        "--overwrite",
    ]
    found = measured([*command, "--json"], limit)
    if found["code"]:
        return found
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    by_kind = {event["event"]: event for event in events}
    report = by_kind["report"]
    return {
        **{key: value for key, value in found.items() if key != "said"},
        "growth": report["memory_growth_bytes"],
        "predicted": report["predicted"]["peak_memory_bytes"],
        "bytes_read": by_kind.get("filling", {}).get("bytes_read", 0),
        "states": by_kind["prefix"]["bytes"],
        "losses": [event["loss"] for event in events if event["event"] == "step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("residency.jsonl"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lorafit-residency")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=5.0, help="GB that a process may allocate")
    parser.add_argument("--one", choices=["peft"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.folder.mkdir(exist_ok=True)
    model, rows = asked.folder / "model", asked.folder / "rows.jsonl"
    if asked.one:
        peft_trainer(model, rows)
        return
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
                    f"import residency; from pathlib import Path; residency.make_model(Path({str(model)!r}))"], check=True)  # fmt: skip
    make_rows(rows)
    plan = subprocess.run(
        [sys.executable, "-m", "lorafit", "plan", *flags(model, rows, "stream"), "--no-probe", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    estimate = json.loads(plan.stdout)["estimate"]
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    results: list[dict[str, Any]] = [
        {"what": "plan", "weights": size, "peak": estimate["memory"]["peak"], **estimate["prefix_residency"],
         "states": estimate["prefix_cache"]["bytes"]}
    ]  # fmt: skip
    peft = [sys.executable, __file__, "--one", "peft", "--folder", str(asked.folder)]
    cap = int(asked.limit * 1e9)
    for _ in range(asked.rounds):
        results.append({"what": "lorafit, streamed", **lorafit(asked.folder, model, rows, "stream")})
        results.append({"what": "PEFT + Trainer", **measured(peft), "said": ""})
        results.append({"what": "lorafit, resident", **lorafit(asked.folder, model, rows, "resident")})
    results.append(
        {"what": "limit, streamed", "limit": cap, **lorafit(asked.folder, model, rows, "stream", cap)}
    )
    failed = measured(peft, cap)
    results.append({"what": "limit, PEFT + Trainer", "limit": cap, **failed, "said": failed["said"][-300:]})
    with asked.output.open("a") as file:
        for row in results:
            file.write(json.dumps(row) + "\n")
            print({key: value for key, value in row.items() if key != "losses"})


if __name__ == "__main__":
    main()
