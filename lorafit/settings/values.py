"""What options take: the names to choose from, and the kinds of text that only one option has."""

from __future__ import annotations

import re
from datetime import datetime
from importlib.util import find_spec
from typing import Any

from lorafit.errors import RequestError
from lorafit.settings.options import Kind


def check_attention(name: str) -> None:
    """Raises RequestError when neither the package of an attention implementation is installed nor `kernels`, which
    downloads it."""
    package = ATTENTION_PACKAGES.get(name)
    if package and find_spec(package) is None and find_spec("kernels") is None:
        raise RequestError(
            f"--attention {name} needs the package `{package.replace('_', '-')}`, which is not installed",
            "--attention sdpa, or auto",
        )


def _is_date(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


def _passes(text: str) -> float:
    """`3` and `3.0` as 3, `0.5` as it is."""
    value = float(text)
    return int(value) if value.is_integer() else value


SCHEDULERS = (
    "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "inverse_sqrt", "polynomial",
)  # fmt: skip
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3")
ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
PREFIX_CACHES = ("auto", "memory", "disk", "off")
RESIDENCIES = ("auto", "resident", "stream")
FORMATS = (
    "auto", "messages", "conversations", "prompt-completion", "instruction", "text", "lines", "document", "tokens",
)  # fmt: skip
BAD_ROWS = ("stop", "skip")
OVERFLOWS = ("truncate", "split", "drop", "error")
LOSS_ON = ("completion", "last", "all")
DATE = Kind("a date, e.g. `2026-01-31` or `2026-01-31T12:00`", "DATE", str, lambda v: _is_date(v))
DELIMITER = Kind(
    "one character, or `tab`", "CHAR", str, lambda v: isinstance(v, str) and (len(v) == 1 or v == "tab")
)
QUOTE = Kind(
    "one character, or `none`", "CHAR", str, lambda v: isinstance(v, str) and (len(v) == 1 or v == "none")
)
EPOCHS = Kind(
    "a number above 0, e.g. `3` or `0.5`",
    "X",
    _passes,
    lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 2**31,
)
LAYERS = Kind("a choice of layers, e.g. `high` or `0-3`", "CHOICE", str, lambda v: isinstance(v, str))
DEVICE = Kind(
    "`auto`, `cpu`, `cuda`, `cuda:1` or `mps`",
    "DEVICE",
    str,
    lambda v: isinstance(v, str) and re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v) is not None,
)
