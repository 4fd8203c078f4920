"""Which strategy in which band? Measured: the 5 × 4 grid at equal trainable parameters and at equal time, on several tasks,
with forgetting measured on the others. One task after another, each gone on with where it was stopped.

    python tests/benchmarks/evidence/run.py --model MODEL --out DIR \\
        --task gsm8k=gsm8k_train.jsonl --task stories=stories.jsonl --task records=demo --rows 400 --steps 60

`records=demo` is the demo's task, a sentence to a JSON record, made with more rows. Of each task the first --rows rows
are trained on, and --held-out others are scored. `DIR/evidence.json` has the table of each comparison, `DIR/NAME/` its
runs; `DIR/evidence.md` is for people. On two cores a model of 135 M parameters does about 450 tokens a second in full
passes: `--plan` says how long all of it takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

SEED = 20260101
LISTS = ("--presets", "basic,attention,extended,ffn,all", "--layers", "low,mid,high,all")


def lorafit(*words: str) -> Any:
    """Run a command that answers with JSON; its progress is shown."""
    done = subprocess.run(
        [sys.executable, "-m", "lorafit", *words, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def rows_of(source: str) -> list[str]:
    """The rows of a task as lines of JSON, in a seeded order."""
    if source == "demo":
        from lorafit.demo.world import records

        return [json.dumps(row) for row in islice(records(Random(SEED)), 5000)]
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    Random(SEED).shuffle(lines)
    return lines


def equal_time(plan: Any, steps: int, path: Path) -> None:
    """A grid in which each candidate takes as many steps as `all` on `all` takes time for; never less than half."""
    most = max(one["seconds"] / one["steps"] for one in plan["candidates"])
    rows = []
    for one in plan["candidates"]:
        each = one["seconds"] / one["steps"]
        rows.append(
            f"- {{name: {one['choice']}, preset: {one['preset']}, layers: {one['layers']}, rank: {one['rank']}, "
            f"max_steps: {max(steps // 2, round(steps * most / each / 2))}}}"
        )
    path.write_text("candidates:\n" + "\n".join(rows) + "\n", encoding="utf-8")


def compared(words: Sequence[str], folder: Path) -> Any:
    """A comparison, gone on with where it was begun."""
    if (folder / "request.json").is_file():
        return lorafit("compare", "--resume", str(folder))
    return lorafit("compare", *words, "-o", str(folder))


def page(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    parts = []
    for name, answer in found.items():
        files = [each["file"] for each in answer["choices"][0]["also"]]
        head = ["choice", "loss", "seeds ±", "to the lowest", "verdict", "trained", "seconds", *files]
        lines = [
            f"## {name}",
            "",
            *answer["words"],
            "",
            "| " + " | ".join(head) + " |",
            "|---" * len(head) + "|",
        ]
        for row in answer["choices"]:
            cells = [row["choice"], f"{row['loss']:.4f}", f"{row['spread'] or 0:.4f}"]
            cells += [
                f"{row['delta']:+.4f} ± {row['error']:.4f}",
                row["verdict"],
                str(row["trainable_params"]),
            ]
            cells += [
                f"{row['seconds']:.0f}",
                *(f"{a['delta']:+.4f} ± {a['stderr']:.4f}" for a in row["also"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trainable", default="500k")
    parser.add_argument("--seeds", default="3")
    parser.add_argument("--max-length", default="512")
    parser.add_argument("--workers", default="1")
    parser.add_argument("--plan", action="store_true", help="say how long it takes, and stop")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    tasks = dict(text.split("=", 1) for text in asked.task)
    for name, source in tasks.items():
        rows = rows_of(source)
        for part, chosen in (
            ("train", rows[: asked.rows]),
            ("held-out", rows[asked.rows :][: asked.held_out]),
        ):
            (asked.out / f"{name}.{part}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    found: dict[str, Any] = {}
    for name in tasks:
        also = [
            w
            for other in tasks
            if other != name
            for w in ("--also", str(asked.out / f"{other}.held-out.jsonl"))
        ]
        common = [asked.model, "--data", str(asked.out / f"{name}.train.jsonl"), "--eval-data"]
        common += [str(asked.out / f"{name}.held-out.jsonl"), "--max-length", asked.max_length, *also]
        common += ["--workers", asked.workers]
        equal = [*common, *LISTS, "--trainable", asked.trainable, "--max-steps", str(asked.steps)]
        plan = lorafit("compare", *equal, "--plan")
        hours = plan["seconds"] * int(asked.seeds) / 3600
        print(
            f"{name}: about {hours:.1f} h at equal parameters, as long again at equal time", file=sys.stderr
        )
        if asked.plan:
            continue
        found[f"{name}, equal parameters"] = compared(
            [*equal, "--seeds", asked.seeds], asked.out / f"{name}-parameters"
        )
        grid = asked.out / f"{name}-time.yaml"
        if not grid.is_file():
            equal_time(plan, asked.steps, grid)
        found[f"{name}, equal time"] = compared(
            [*common, "--grid", str(grid), "--seeds", asked.seeds], asked.out / f"{name}-time"
        )
        (asked.out / "evidence.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        (asked.out / "evidence.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
