"""docs/options.md, made from the fields of `RunConfig`: `python -m lorafit.settings.options_page` writes it."""

from __future__ import annotations

from pathlib import Path

from lorafit.settings.options import DATA, OUTPUT, TRAINING, WHAT, Option
from lorafit.settings.run_config import OPTIONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"

HEAD = """# Options: every setting of a run

On the command line an option is `--batch-size 8`, in a run file (`--config run.yaml`) `batch_size: 8`. Options marked
with * can also be set in a preset's `training`. Flags override the run file, the run file overrides the preset, the
preset overrides the defaults. `[from …]` is derived if it is not set, and shown with its reason.

`lorafit train --help` lists the options of a command, with those that no run file holds.

The folder of each run holds its run file. One of your own, for `lorafit train --config mine.yaml`:

    model: ./my-model
    data: [chats.jsonl, general.jsonl=0.5]
    preset: ffn
    layers: high
    rank: 16
    epochs: 2
    max_length: 2048

## What is derived

| | from |
|---|---|
| `--learning-rate` | 5e-4 × (2000 / hidden size)^0.781, at most 1e-2; for Qwen the power is 0.0775 (*LoRA Without Regret*, 2025, and Tinker's cookbook). A small model gets a high rate: 0.0011 at 768, 0.0043 at the demo's 128. It is meant for AdamW: set your own for `sgd` (higher) and `lion` (lower); `lion` and `adamw_8bit` need bitsandbytes |
| `--batch-size` | a power of two from 1 to 32, for about 2,048 tokens in an optimizer step |
| `--epochs` | as many as make about 250 steps, at most 3; with `--max-steps`, as many as that needs |
| `--max-length` | the model's positions, at most 1,024 |
"""


def options_page() -> str:
    """The page as Markdown: a table for each panel of `--help`."""
    return HEAD + "".join(f"\n## {panel}\n\n{_table(panel)}" for panel in (WHAT, DATA, TRAINING, OUTPUT))


def _table(panel: str) -> str:
    rows = [_row(option) for option in OPTIONS.values() if option.panel == panel]
    lines = ["| option | value | default | what it does |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    name = "`MODEL`" if option.name == "model" else f"`{option.flag}`"
    short = f", `{option.short}`" if option.short else ""
    mark = " *" if option.training else ""
    value = ", ".join(f"`{c}`" for c in option.kind.choices) or option.kind.takes
    cells = (name + short + mark, value, _default(option), option.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(option: Option) -> str:
    if option.derived:
        return f"[from {option.derived}]"
    if option.default in (None, ()):
        return ""
    return f"`{str(option.default).lower()}`" if isinstance(option.default, bool) else f"`{option.default}`"


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8")
