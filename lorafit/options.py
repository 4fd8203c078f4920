"""Every option of a run, declared once: what it takes, its bounds, its default, its help.

The command line, the run file, and a preset's `training` are three ways to set the same options,
and all three are checked here. A default of None is derived later, from the model or the data
(config.py says from what, and prints the reason).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.errors import RequestError

Check = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Option:
    """One option: `check` holds for its good values, `takes` says which those are.

    A `training` option may stand in a preset; one that is not `kept` is never read back from
    a run file; a `many` option may be given several times.
    """

    name: str
    check: Check
    takes: str
    help: str
    default: Any = None
    training: bool = False
    kept: bool = True
    many: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def checked(self, value: Any, source: str) -> Any:
        """The value, or RequestError naming it, what is taken, and where it came from."""
        if self.many:
            items = value if isinstance(value, (list, tuple)) else (value,)
            return tuple(replace(self, many=False).checked(item, source) for item in items)
        if self.check(value):
            return value
        shown = f"`{value}`" if isinstance(value, str) else repr(value)
        raise RequestError(f"{self.flag} is {shown}{source}: it takes {self.takes}")


def _is(kind: type | tuple[type, ...]) -> Check:
    return lambda v: isinstance(v, kind) and not (isinstance(v, bool) and kind is not bool)


def whole(least: int) -> Check:
    """Whole numbers from `least` on."""
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v < 2**31


def number(least: float, most: float = 1e12, *, above: bool = False) -> Check:
    """Finite numbers between the two, without the lower one where it says `above`."""

    def holds(v: Any) -> bool:
        if not isinstance(v, (int, float)) or isinstance(v, bool) or not math.isfinite(v):
            return False
        return (v > least if above else v >= least) and v <= most

    return holds


def one_of(*words: str) -> Check:
    """Just these words."""
    return lambda v: v in words


def filled(v: Any) -> bool:
    """A text with something in it."""
    return isinstance(v, str) and bool(v.strip())


SCHEDULERS = ("linear", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PREFIX_CACHES = ("auto", "memory", "disk", "off")
FORMATS = (
    "auto", "messages", "conversations", "prompt-completion", "instruction", "text", "lines", "document",
)  # fmt: skip
OVERFLOWS = ("truncate", "split", "drop", "error")
LEARNED = ("completion", "last", "all")
PARTS = "self-attention, feed-forward, shared-experts, experts, cross-attention, router, …"

_TABLE: tuple[Option, ...] = (
    Option("model", filled, "a hub id, a folder, or `demo`", "Hub id, folder, or `demo`.", "demo"),
    Option(
        "preset", filled, "a preset's name or path", "Strategy: a preset's name, or a path to one.", "basic"
    ),
    Option(
        "modules",
        filled,
        "module names",
        "Module names instead of a preset's roles, as `q_proj,v_proj`.",
        (),
        many=True,
    ),
    Option(
        "layers",
        _is(str),
        "a choice of layers",
        "Layers: `low`, `mid`, `high`, `all`, `0-3`, `0,2,5`, `8-`, `first:4`, `last:4`.",
    ),
    Option(
        "include",
        filled,
        "parts of the model",
        "Parts to adapt beside the usual ones, as `cross-attention`.",
        (),
        many=True,
    ),
    Option("exclude", filled, "parts of the model", "Parts to leave alone, as `experts`.", (), many=True),
    Option(
        "stack",
        filled,
        "a stack's name or path",
        "Only this stack of a model that has several, as `decoder`.",
    ),
    Option(
        "strict",
        _is(bool),
        "true or false",
        "Refuse a fused weight that holds more than was asked for.",
        False,
    ),
    Option("rank", whole(1), "a whole number from 1 on", "LoRA rank; overrides the preset."),
    Option("alpha", number(0, 1e9, above=True), "a number above 0", "LoRA alpha; overrides the preset."),
    Option("dropout", number(0, 0.999), "a number from 0 up to 1", "LoRA dropout; overrides the preset."),
    Option(
        "data",
        filled,
        "a file, a folder or a hub set",
        "A file, a folder, or a hub set as `owner/name:config:split`; `=2` behind it: twice an epoch. Repeats.",
        (),
        many=True,
    ),
    Option(
        "eval_data",
        filled,
        "a file, a folder or a hub set",
        "Held-out data, instead of a share of the training data. Repeats.",
        (),
        many=True,
    ),
    Option(
        "holdout",
        number(0, 0.5, above=True),
        "a share above 0, at most 0.5",
        "Share of the examples held out.",
        0.05,
    ),
    Option(
        "format",
        one_of(*FORMATS),
        "one of " + ", ".join(FORMATS),
        "What a row looks like; `auto` looks.",
        "auto",
    ),
    Option(
        "map",
        filled,
        "NAME=COLUMN pairs",
        "Columns under other names, as `prompt=question,completion=answer`.",
    ),
    Option(
        "chat_template",
        filled,
        "a file",
        "A chat template to use instead of the tokenizer's; saved with the adapter.",
    ),
    Option(
        "loss_on",
        one_of(*LEARNED),
        "one of " + ", ".join(LEARNED),
        "What is learned: what the assistant says, only its last answer, or every token.",
        "completion",
        training=True,
    ),
    Option(
        "overflow",
        one_of(*OVERFLOWS),
        "one of " + ", ".join(OVERFLOWS),
        "What becomes of a row longer than --max-length.",
        "truncate",
        training=True,
    ),
    Option("epochs", whole(1), "a whole number from 1 on", "Passes over the data.", training=True),
    Option(
        "max_steps",
        whole(1),
        "a whole number from 1 on",
        "Stop after so many optimizer steps.",
        training=True,
    ),
    Option(
        "save_steps",
        whole(1),
        "a whole number from 1 on",
        "Save a checkpoint every so many steps.",
        training=True,
    ),
    Option(
        "save_minutes",
        number(0, 1e6, above=True),
        "a number above 0",
        "Save a checkpoint every so many minutes.",
        10.0,
        training=True,
    ),
    Option(
        "keep",
        whole(1),
        "a whole number from 1 on",
        "Checkpoints to keep beside the best, in the finished run too; without it one, until it is finished.",
        training=True,
    ),
    Option(
        "eval_steps",
        whole(1),
        "a whole number from 1 on",
        "Evaluate on the held-out rows every so many steps.",
        training=True,
    ),
    Option(
        "batch_size",
        whole(1),
        "a whole number from 1 on",
        "Rows in a micro-batch, as they enter the model.",
        training=True,
    ),
    Option(
        "accumulate",
        whole(1),
        "a whole number from 1 on",
        "Micro-batches in an optimizer step.",
        1,
        training=True,
    ),
    Option(
        "max_length",
        whole(2),
        "a whole number from 2 on",
        "Longest row in tokens.",
        training=True,
    ),
    Option(
        "learning_rate",
        number(0, 10, above=True),
        "a number above 0, at most 10",
        "Peak learning rate.",
        training=True,
    ),
    Option(
        "scheduler",
        one_of(*SCHEDULERS),
        "one of " + ", ".join(SCHEDULERS),
        "How the rate falls after the warm-up.",
        "linear",
        training=True,
    ),
    Option(
        "warmup",
        number(0, 1e9),
        "a share of the steps below 1, or a number of steps",
        "Warm-up: a share of the steps, or so many.",
        0.05,
        training=True,
    ),
    Option(
        "weight_decay",
        number(0, 10),
        "a number from 0 on",
        "AdamW's weight decay, on the adapters.",
        0.0,
        training=True,
    ),
    Option(
        "max_grad_norm",
        number(0, 1e9, above=True),
        "a number above 0",
        "Gradients are scaled down to this norm.",
        1.0,
        training=True,
    ),
    Option(
        "seed",
        whole(0),
        "a whole number from 0 on",
        "Decides the held-out rows, the order and the adapters' start.",
        0,
        training=True,
    ),
    Option(
        "dtype",
        one_of(*DTYPES),
        "one of " + ", ".join(DTYPES),
        "Of the base weights; `auto` is bfloat16 on a GPU that has it, else float32.",
        "auto",
        training=True,
    ),
    Option("device", filled, "`auto`, `cpu`, `cuda`, `cuda:1` or `mps`", "Where to compute.", "auto"),
    Option(
        "gradient_checkpointing",
        _is(bool),
        "true or false",
        "Recompute activations in the backward pass: less memory, more time.",
        False,
        training=True,
    ),
    Option(
        "prefix_cache",
        one_of(*PREFIX_CACHES),
        "one of " + ", ".join(PREFIX_CACHES),
        "Where the frozen layers' output is kept after the first epoch; `auto` where it is exact and pays.",
        "auto",
        training=True,
    ),
    Option(
        "head_chunk",
        whole(1),
        "a whole number from 1 on",
        "Tokens the head is run on at once; without it, as many as the device does well.",
        training=True,
    ),
    Option("output", filled, "a folder", "Folder to write; without it, a new one below `runs/`.", kept=False),
    Option(
        "overwrite",
        _is(bool),
        "true or false",
        "Replace the output folder, once the new one is whole.",
        False,
        kept=False,
    ),
    Option(
        "resume",
        _is(bool),
        "true or false",
        "Go on from the last checkpoint of the run with this output.",
        False,
        kept=False,
    ),
)
OPTIONS: dict[str, Option] = {option.name: option for option in _TABLE}


def weighted(spec: str) -> tuple[str, float]:
    """A `--data` and how often it comes in an epoch: `a.jsonl=2` is ("a.jsonl", 2.0).

    Raises RequestError for a weight that is not above 0 or beyond 1,000.
    """
    name, equals, text = spec.rpartition("=")
    if not equals or Path(spec).expanduser().exists():
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError:
        return spec, 1.0
    if not number(0, 1000, above=True)(weight):
        raise RequestError(f"--data {spec}: a weight is above 0 and at most 1,000", f"as {name}=2")
    return name, weight


# What a preset's `training` may say, in the shape that presets.py checks.
TRAINING: dict[str, tuple[Check, str]] = {
    option.name: (option.check, option.takes) for option in _TABLE if option.training
}
