"""Which strategy in which band? Measured: the 5 × 4 grid at equal trainable parameters and at equal time, on several tasks,
with forgetting measured on the others at equal parameters.

    python tests/benchmarks/evidence/run.py --model MODEL --work DIR \\
        --task gsm8k=gsm8k_train.jsonl --task stories=text:stories.jsonl --task records=demo
    python tests/benchmarks/evidence/run.py --model demo --work DIR --task demo=demo

`records=demo` is the demo's task, a sentence to a JSON record; `text:` before a file takes its answers alone, as plain
text. Rows of at most --longest characters are used where there are enough of them. Of each task --rows rows are trained on, and --held-out
others are scored; the first --also of these are the other tasks' text that should not change. Each comparison leaves a
file of rows in ../results/evidence/, a line a run, and is skipped where that file is there; one that was stopped goes on.
`--plan` says how long all of it takes. tables.py makes the tables of the docs' page from these files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

SEED = 20260101
SCALE = 2  # alpha over rank, as in the presets: --trainable keeps it, a grid names it
RESULTS = Path(__file__).parent.parent / "results" / "evidence"
GRID = ("--presets", "basic,attention,extended,ffn,all", "--layers", "low,mid,high,all")


def lorafit(*words: str) -> Any:
    """Run a command that answers with JSON; its progress is shown."""
    done = subprocess.run(
        [sys.executable, "-m", "lorafit", *words, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def rows_of(source: str, longest: int, wanted: int) -> list[str]:
    """The rows of a task as lines of JSON, in a seeded order, the short ones where they are enough."""
    kind, _, path = source.rpartition(":")
    if source == "demo":
        from lorafit.demo.world import records

        return [json.dumps(row) for row in islice(records(Random(SEED)), 5000)]
    lines = [
        json.dumps(row_of(json.loads(line), kind == "text"), ensure_ascii=False)
        for line in Path(path).read_text(encoding="utf-8").split("\n")
        if line
    ]
    short = [line for line in lines if len(line) <= longest]
    lines = short if len(short) >= wanted else lines
    Random(SEED).shuffle(lines)
    return lines


def row_of(row: Any, as_text: bool) -> Any:
    """A row as it is, with a line break after a prompt, or its answer alone as text."""
    if as_text:
        return {"text": row["messages"][-1]["content"]}
    return {**row, "prompt": row["prompt"] + "\n"} if "prompt" in row else row


def equal_time(plan: Any, steps: int, path: Path) -> None:
    """A grid in which each candidate takes as many steps as `all` on `all` has time for in `steps`."""
    most = max(one["seconds"] / one["steps"] for one in plan["candidates"])
    rows = []
    for one in plan["candidates"]:
        fit = round(steps * most / (one["seconds"] / one["steps"]))
        rows.append(
            f"- {{name: {one['choice']}, preset: {one['preset']}, layers: {one['layers']}, rank: {one['rank']}, "
            f"alpha: {SCALE * one['rank']}, max_steps: {fit}}}"
        )
    path.write_text("candidates:\n" + "\n".join(rows) + "\n", encoding="utf-8")


def kept(folder: Path, answer: Any, about: dict[str, Any], path: Path) -> None:
    """Write what a comparison found: a line about all of it, then a line a run, with the loss of each held-out row."""
    by_choice = {row["choice"]: row for row in answer["choices"]}
    lines = [{**about, "base_loss": answer["base_loss"], "held_out_tokens": answer["tokens"]}]
    base = json.loads((folder / "scores" / ".base.json").read_text())
    lines.append({"run": "base", "rows": losses(base["rows"]), "also": also_of(base)})
    for choice, row in by_choice.items():
        for name, seed in zip(row["runs"], row["seeds"], strict=True):
            found = json.loads((folder / "scores" / f"{name}.json").read_text())
            lines.append(
                {
                    "run": name,
                    "choice": choice,
                    **{
                        key: row[key]
                        for key in ("preset", "layers", "rank", "learning_rate", "trainable_params")
                    },
                    "seed": seed,
                    "steps": found["steps"],
                    "seconds": round(found["seconds"], 2),
                    "rows": losses(found["scores"]["rows"]),
                    "also": also_of(found["scores"]),
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def losses(rows: list[list[float]]) -> list[list[float]]:
    """[the loss summed over its tokens, their number] of each row."""
    return [[round(row[0], 4), row[1]] for row in rows]


def also_of(scores: dict[str, Any]) -> dict[str, list[list[float]]]:
    return {Path(name).name.partition(".")[0]: losses(rows) for name, rows in scores["also"].items()}


def compared(words: list[str], folder: Path) -> Any:
    """A comparison, gone on with where it was begun."""
    if (folder / "compare.json").is_file():
        return json.loads((folder / "compare.json").read_text())
    if (folder / "request.json").is_file():
        return lorafit("compare", "--resume", str(folder))
    return lorafit("compare", *words, "-o", str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--work", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--also", type=int, default=12)
    parser.add_argument("--longest", type=int, default=300, help="characters of a row")
    parser.add_argument("--steps", type=int, default=20, help="of all candidates; at equal time of all × all")
    parser.add_argument("--batch-size", default="4")
    parser.add_argument("--trainable", default="500k")
    parser.add_argument("--seeds", default="3", help="at equal parameters")
    parser.add_argument("--seeds-in-time", default="2", help="at equal time")
    parser.add_argument("--max-length", default="128")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workers", default="1")
    parser.add_argument("--part", choices=("parameters", "time", "both"), default="both")
    parser.add_argument("--only", default="", help="of the tasks, those that are trained on")
    parser.add_argument("--plan", action="store_true", help="say how long it takes, and stop")
    asked = parser.parse_args()
    tasks = dict(text.split("=", 1) for text in asked.task)
    asked.work.mkdir(parents=True, exist_ok=True)
    for name, source in tasks.items():
        rows = rows_of(source, asked.longest, asked.rows + asked.held_out)
        held_out = rows[asked.rows : asked.rows + asked.held_out]
        parts = {"train": rows[: asked.rows], "held-out": held_out, "also": held_out[: asked.also]}
        for part, chosen in parts.items():
            (asked.work / f"{name}.{part}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    for name in [name for name in tasks if name in (asked.only or name).split(",")]:
        common = [asked.model, "--data", str(asked.work / f"{name}.train.jsonl"), "--eval-data"]
        common += [str(asked.work / f"{name}.held-out.jsonl"), "--max-length", asked.max_length]
        common += ["--overflow", "truncate", "--batch-size", asked.batch_size, "--workers", asked.workers]
        common += ["--dtype", asked.dtype]
        texts = [asked.work / f"{other}.also.jsonl" for other in tasks if other != name]
        also = [word for text in texts for word in ("--also", str(text))]
        equal = [*common, *also, *GRID, "--trainable", asked.trainable, "--max-steps", str(asked.steps)]
        stored = asked.work / f"{name}.plan.json"
        if not stored.is_file():
            stored.write_text(json.dumps(lorafit("compare", *equal, "--plan")))
        plan, grid = json.loads(stored.read_text()), asked.work / f"{name}.time.yaml"
        hours = plan["seconds"] * int(asked.seeds) / 3600
        print(f"{name}: about {hours:.1f} h at equal parameters, longer at equal time", file=sys.stderr)
        equal_time(plan, asked.steps, grid)
        in_time = [*common, "--grid", str(grid)]
        for part, words, seeds in (
            ("parameters", equal, asked.seeds),
            ("time", in_time, asked.seeds_in_time),
        ):
            path, folder = RESULTS / f"{name}-{part}.jsonl", asked.work / f"{name}-{part}"
            if asked.plan or path.is_file() or asked.part not in (part, "both"):
                continue
            answer = compared([*words, "--seeds", seeds], folder)
            about = {
                "task": name, "equal": part, "model": Path(asked.model).name, "steps": asked.steps, "rows": asked.rows,
                "batch_size": int(asked.batch_size), "max_length": int(asked.max_length), "dtype": asked.dtype,
                "command": f"lorafit compare {' '.join(Path(w).name if '/' in w else w for w in words)} --seeds {seeds}",
                "environment": lorafit("env"),
            }  # fmt: skip
            kept(folder, answer, about, path)


if __name__ == "__main__":
    main()
