"""Every option of a run, declared once: its values, default and help. A `RunConfig` holds one value of each.

A default of None is derived later, from the model or the data (see precedence.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from lorafit.model import KINDS
from lorafit.settings.optimizers import OPTIMIZERS
from lorafit.settings.options import (
    DATA,
    FLAG,
    OUTPUT,
    TRAINING,
    WHAT,
    Option,
    number,
    one_of,
    option,
    options_of,
    text,
    whole,
)
from lorafit.settings.places import lasting, lasting_data, there, weighted
from lorafit.settings.trackers import TRACKERS
from lorafit.settings.values import (
    ATTENTIONS,
    BAD_ROWS,
    DATE,
    DELIMITER,
    DEVICE,
    DTYPES,
    EPOCHS,
    FORMATS,
    LAYERS,
    LOSS_ON,
    OVERFLOWS,
    PREFIX_CACHES,
    QUOTE,
    RESIDENCIES,
    SCHEDULERS,
)
from lorafit.system import git_state

# what the rows of a run follow from
SHAPE = ("model", "data", "format", "map", "chat_template", "template_args", "as_chat")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One value for each option of a run, by name; None where a value is not derived yet.

    `origin` has the source of each value: `flag`, `file`, `preset NAME`, `default`, or
    `derived: REASON`.
    """

    model: str = option(
        "demo", text("a hub id, a folder, or `demo`", "MODEL"), "Hub id, folder, or `demo`.", WHAT
    )
    revision: str | None = option(
        None, text("a branch, a tag or a commit"), "Branch, tag or commit of a hub model.", WHAT
    )
    preset: str = option(
        "basic",
        text("a preset's name or path"),
        "Strategy: a preset's name, or the path of a YAML file.",
        WHAT,
    )
    layers: str | None = option(
        None,
        LAYERS,
        "Layers: `low`, `mid`, `high`, `all`, `0-3`, `0,2,5`, `8-`, `first:4`, `last:4`.",
        WHAT,
        derived="the preset",
    )
    modules: tuple[str, ...] = option(
        (),
        text("module names"),
        "Module names instead of a preset's roles, e.g. `q_proj,v_proj`. Repeatable.",
        WHAT,
        many=True,
    )
    include: tuple[str, ...] = option(
        (),
        text("parts of the model"),
        "Also adapt these parts of the model, e.g. `cross-attention`. Repeatable.",
        WHAT,
        many=True,
    )
    exclude: tuple[str, ...] = option(
        (),
        text("parts of the model"),
        "Do not adapt these parts of the model, e.g. `experts`. Repeatable.",
        WHAT,
        many=True,
    )
    stack: str | None = option(
        None,
        text("a stack's name or path"),
        "Adapt only this stack of a model that has several, e.g. `decoder`.",
        WHAT,
    )
    strict: bool = option(
        False, FLAG, "Refuse a fused weight that holds more roles than the preset names.", WHAT
    )
    rank: int | None = option(None, whole(1), "LoRA rank.", WHAT, derived="the preset")
    alpha: float | None = option(None, number(0, 1e9, above=True), "LoRA alpha.", WHAT, derived="the preset")
    dropout: float | None = option(
        None, number(0, 0.999, "a number from 0 up to 1"), "LoRA dropout.", WHAT, derived="the preset"
    )
    from_adapter: str | None = option(
        None,
        text("a run's folder, an adapter or a hub id", "ADAPTER"),
        "Continue training this adapter: a run's folder or a PEFT LoRA adapter, with its model, modules, rank and alpha.",
        WHAT,
    )
    data: tuple[str, ...] = option(
        (),
        text("a file, a folder or a hub data set"),
        "File, folder, or hub data set `owner/name:config:split`; with `=2` at the end, twice per epoch. Repeatable.",
        DATA,
        many=True,
    )
    eval_data: tuple[str, ...] = option(
        (),
        text("a file, a folder or a hub data set"),
        "Held-out data, instead of a share of the training data. Repeatable.",
        DATA,
        many=True,
    )
    holdout: float = option(
        0.05,
        number(0, 0.5, "a share from 0 to 0.5; 0 holds nothing out"),
        "Share of the training data to hold out, at most 200 examples; 0 holds nothing out.",
        DATA,
    )
    format: str = option("auto", one_of(*FORMATS), "Data format; `auto` detects it", DATA)
    map: str | None = option(
        None, text("NAME=COLUMN pairs"), "Rename columns, e.g. `prompt=question,completion=answer`.", DATA
    )
    chat_template: str | None = option(
        None,
        text("a file", "FILE"),
        "Chat template to use instead of the tokenizer's; saved with the adapter.",
        DATA,
    )
    template_args: str | None = option(
        None,
        text("NAME=VALUE pairs"),
        "Arguments for the chat template, e.g. `enable_thinking=false`.",
        DATA,
    )
    template_date: str | None = option(
        None,
        DATE,
        "Date for chat templates that write today's, e.g. `2026-01-31`.",
        DATA,
        derived="the start of the run",
    )
    end_token: str | None = option(
        None,
        text("a token"),
        "End token to use instead of the tokenizer's, e.g. `<|im_end|>`; saved with the adapter.",
        DATA,
    )
    as_chat: bool = option(
        False, FLAG, "Prompt and completion as a user and an assistant turn of the chat template.", DATA
    )
    on_bad_row: str = option("stop", one_of(*BAD_ROWS), "What to do with rows that cannot be used", DATA)
    group_by: str | None = option(
        None,
        text("a column", "COLUMN"),
        "Hold out whole groups: rows with the same value in this column stay together.",
        DATA,
    )
    csv_delimiter: str | None = option(
        None,
        DELIMITER,
        "Column separator of .csv and .tsv files, e.g. `;` or `tab`.",
        DATA,
        derived="the first line",
    )
    csv_quote: str = option(
        '"', QUOTE, "Quote character of .csv and .tsv files; `none` reads quotes as text.", DATA
    )
    loss_on: str = option(
        "completion",
        one_of(*LOSS_ON),
        "Tokens in the loss: the assistant's (or the completion's), the last answer's, or all",
        DATA,
        training=True,
    )
    overflow: str = option(
        "truncate", one_of(*OVERFLOWS), "What to do with a row longer than --max-length", DATA, training=True
    )
    data_seed: int | None = option(
        None, whole(0), "Seed of the held-out rows and of which rows share a batch.", DATA, training=True, derived="--seed"
    )  # fmt: skip
    max_length: int | None = option(
        None,
        whole(2),
        "Maximum row length, in tokens.",
        DATA,
        training=True,
        derived="the model's positions, at most 1,024",
        depends_on=SHAPE,
    )
    epochs: float | None = option(
        None,
        EPOCHS,
        "Passes over the training data, e.g. `3` or `0.5`.",
        TRAINING,
        training=True,
        derived="the number of rows",
        depends_on=(*SHAPE, "overflow", "max_length", "batch_size", "accumulate", "max_steps"),
    )
    max_steps: int | None = option(
        None, whole(1), "Stop after this many optimizer steps.", TRAINING, training=True
    )
    batch_size: int | None = option(
        None,
        whole(1),
        "Rows of a micro-batch, of all processes together.",
        TRAINING,
        training=True,
        derived="the row length",
        depends_on=(*SHAPE, "eval_data", "holdout", "overflow", "max_length", "accumulate"),
    )
    accumulate: int = option(1, whole(1), "Micro-batches per optimizer step.", TRAINING, training=True)
    learning_rate: float | None = option(
        None,
        number(0, 10, above=True),
        "Peak learning rate.",
        TRAINING,
        training=True,
        derived="the hidden size",
        depends_on=("model",),
    )
    scheduler: str = option(
        "linear", one_of(*SCHEDULERS), "Learning-rate schedule, as in transformers", TRAINING, training=True
    )
    warmup: float = option(
        0.05,
        number(0, 1e9, "a share of the steps below 1, or a number of steps"),
        "Warm-up: a share of the steps, or a number of steps.",
        TRAINING,
        training=True,
    )
    optimizer: str = option("adamw", one_of(*OPTIMIZERS), "Optimizer", TRAINING, training=True)
    weight_decay: float = option(
        0.0, number(0, 10), "Weight decay of the optimizer, on the adapters.", TRAINING, training=True
    )
    max_grad_norm: float = option(
        1.0, number(0, 1e9, above=True), "Clip gradients to this norm.", TRAINING, training=True
    )
    seed: int = option(
        0, whole(0), "Seed of the batch order, the adapter's initialization and, without --data-seed, the held-out rows and batches.",
        TRAINING, training=True,
    )  # fmt: skip
    dtype: str = option(
        "auto",
        one_of(*DTYPES),
        "Dtype of the base weights; `auto` is bfloat16 on a GPU that supports it, else float32",
        TRAINING,
        training=True,
    )
    quantize: str = option(
        "none",
        one_of(*KINDS),
        "Hold the base's linear layers in 4 or 8 bits, through bitsandbytes",
        TRAINING,
        training=True,
    )
    shard: bool = option(
        False, FLAG, "Shard the base across the processes of a run with FSDP2; otherwise each holds all of it.", TRAINING,
        training=True,
    )  # fmt: skip
    device: str = option("auto", DEVICE, "Device to compute on: `cpu`, `cuda`, `cuda:1` or `mps`.", TRAINING)
    gradient_checkpointing: bool = option(
        False,
        FLAG,
        "Recompute activations in the backward pass: less memory, more time.",
        TRAINING,
        training=True,
    )
    compile: bool = option(
        False, FLAG, "Run the adapted blocks through torch.compile in training, once their gradient is checked.",
        TRAINING, training=True,
    )  # fmt: skip
    attention: str = option(
        "auto",
        one_of(*ATTENTIONS),
        "Attention implementation, as in transformers; `auto` is the model's default there",
        TRAINING,
        training=True,
    )
    prefix_cache: str = option(
        "auto",
        one_of(*PREFIX_CACHES),
        "Where to keep the output of the frozen layers for later epochs; `auto` where it is exact and pays",
        TRAINING,
        training=True,
    )
    prefix_residency: str = option(
        "auto",
        one_of(*RESIDENCIES),
        "Keep the frozen layers below the band in memory, or read each from disk when it runs; `auto` if they do not fit",
        TRAINING,
        training=True,
    )
    head_chunk: int | None = option(
        None,
        whole(1),
        "Tokens to run through the head at once.",
        TRAINING,
        training=True,
        derived="the device",
    )
    save_steps: int | None = option(
        None, whole(1), "Save a checkpoint every N optimizer steps.", TRAINING, training=True
    )
    save_minutes: float = option(
        10.0, number(0, 1e6, above=True), "Save a checkpoint every X minutes.", TRAINING, training=True
    )
    keep: int | None = option(
        None,
        whole(1),
        "Recent checkpoints to keep, also after the run, beside the best; without it the latest, until the run ends.",
        TRAINING,
        training=True,
    )
    eval_steps: int | None = option(
        None, whole(1), "Evaluate on the held-out rows every N optimizer steps.", TRAINING, training=True
    )
    patience: int | None = option(
        None,
        whole(1),
        "Stop after N evaluations in a row without an improvement; needs --eval-steps.",
        TRAINING,
        training=True,
    )
    min_delta: float = option(
        0.0,
        number(0, 100),
        "Improvements of the held-out loss up to this size do not count for --patience.",
        TRAINING,
        training=True,
    )
    keep_last: bool = option(
        False,
        FLAG,
        "Save the last adapter, not the one with the lowest held-out loss.",
        TRAINING,
        training=True,
    )
    sample: bool = option(
        True, FLAG, "Show the model's answer to a held-out prompt, before and after.", OUTPUT, training=True
    )
    output: str | None = option(
        None,
        text("a folder", "DIR"),
        "Output folder.",
        OUTPUT,
        kept=False,
        short="-o",
        derived="model, preset and layers: a new folder in runs/",
    )
    overwrite: bool = option(
        False, FLAG, "Replace the output folder once the new one is complete.", OUTPUT, kept=False
    )
    resume: bool = option(
        False,
        FLAG,
        "Continue an unfinished run from its last checkpoint: `--resume RUN`, or with -o; its folder has the settings.",
        OUTPUT,
        kept=False,
    )
    track: tuple[str, ...] = option(
        (), one_of(*TRACKERS), "Tracker to log to, repeatable", OUTPUT, many=True, short="--report-to"
    )
    track_project: str = option("lorafit", text("a name"), "Project or experiment of the tracker.", OUTPUT)
    track_name: str | None = option(
        None, text("a name"), "Name of the run in the tracker.", OUTPUT, derived="the output folder"
    )
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def seed_of_data(self) -> int:
        """The seed of the held-out split and of the batches."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def holds_out(self) -> bool:
        """Whether some rows are held out: a share of the data, or files of their own."""
        return bool(self.eval_data) or self.holdout > 0

    def steps(self, per_epoch: int) -> int:
        """Optimizer steps of the whole run; an epoch has `per_epoch` of them."""
        passes = ceil(round(per_epoch * (self.epochs or 1), 6))  # 1.1 × 50 is 55.00000000000001
        return min(passes, self.max_steps or sys.maxsize)

    def derived(self, name: str, value: Any, reason: str) -> RunConfig:
        """The settings with this derived value, unless one is set."""
        if getattr(self, name) is not None:
            return self
        return replace(self, **{name: value}, origin={**self.origin, name: f"derived: {reason}"})

    def settled(self, name: str, open: Any, value: Any, reason: str) -> RunConfig:
        """The settings with this value in place of the `open` one, e.g. `auto`, where that is set."""
        if getattr(self, name) != open:
            return self
        return replace(self, **{name: value}, origin={**self.origin, name: f"derived: {reason or open}"})

    def why(self, name: str) -> str:
        """The reason of a derived value, e.g. `from hidden size 128`; empty for other values."""
        came = self.origin.get(name, "")
        return came.removeprefix("derived: ") if came.startswith("derived") else ""

    def reads(self, *others: str | None) -> tuple[Path, ...]:
        """The files and folders on this machine that a run with these settings reads, and `others`."""
        return there((*self.data, *self.eval_data), (self.chat_template, self.from_adapter, *others))

    def data_state(self) -> dict[str, str]:
        """The git commit of each file or folder of data that is in a repository, by name."""
        paths = [Path(weighted(spec)[0]).expanduser() for spec in (*self.data, *self.eval_data)]
        found = {f"commit of {path.name}": git_state(path) for path in paths if path.exists()}
        return {name: state for name, state in found.items() if state}

    def as_file(self) -> dict[str, Any]:
        """The content of `run.yaml`: the values, then their origins. Files and folders are absolute paths."""
        kept = [name for name, option in OPTIONS.items() if option.kept]
        values = {name: getattr(self, name) for name in kept}
        values |= {name: lasting(values[name]) for name in ("model", "from_adapter")}
        for name in ("data", "eval_data"):
            values[name] = [lasting_data(spec) for spec in values[name]]
        if self.chat_template:
            values["chat_template"] = lasting_data(self.chat_template)
        plain = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
        derived = {n: f"derived ({plain[n]}): {self.why(n)}" for n in kept if self.why(n)}
        return {**plain, "origin": {n: derived.get(n, self.origin[n]) for n in kept if n in self.origin}}


OPTIONS: dict[str, Option] = options_of(RunConfig)
