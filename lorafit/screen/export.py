"""`lorafit export`: the file that was made, or the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lorafit.results import ExportReport
from lorafit.screen.console import Screen
from lorafit.units import bytes_text, count

CLONE = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"


def show_export(screen: Screen, report: ExportReport) -> None:
    """What the file holds, and how it is loaded."""
    if screen.as_json:
        screen.document(report)
        return
    scaled = f", alpha {report.alpha:g}" if report.alpha is not None else ""
    screen.line(
        "exported", f"{count(report.tensors)} tensors{scaled}, {bytes_text(report.bytes)}", answer=True
    )
    screen.command("saved", report.output)
    file = shlex.quote(report.output)
    screen.command(
        "llama.cpp", f"llama-cli -m BASE.gguf --lora {file}" if report.adapter else f"llama-cli -m {file}"
    )


def show_conversion(screen: Screen, download: Sequence[str], command: Sequence[str], here: bool) -> None:
    """The converter's command; before it what gets llama.cpp, where it is not on this machine, and the model's weights,
    where these are not."""
    lines = [*([] if here else [CLONE, "pip install gguf"])]
    lines += [shlex.join(each) for each in (download, command) if each]
    if screen.as_json:
        screen.document({"commands": lines})
    else:
        screen.commands("commands", lines)
