"""One run's settings, resolved: a flag over a file over the preset over a default, and why.

What no one set is derived: the learning rate from the hidden size, the longest row from the
model's positions, the batch from the rows. Every value keeps its origin, so that `run.yaml`
repeats a run, and a flag that changes what a value was derived from derives it anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from lorafit.errors import RequestError, closest
from lorafit.modelmap import ModelMap
from lorafit.options import OPTIONS, weighted
from lorafit.presets import Preset, load, read_yaml
from lorafit.units import figures

# What each derived value was derived from: a flag that sets one of these derives it anew.
SOURCES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("model",),
    "max_length": ("model", "data", "format", "map", "chat_template"),
    "batch_size": (
        "model", "data", "eval_data", "holdout", "format", "map", "chat_template", "overflow", "max_length",
        "accumulate",
    ),
    "epochs": (
        "model", "data", "format", "map", "chat_template", "overflow", "max_length", "batch_size", "accumulate",
        "max_steps",
    ),
}  # fmt: skip
TOKENS_PER_STEP = 2048
ENOUGH_STEPS, MOST_EPOCHS = 250, 3
LONGEST_ROW = 1024
MASKED_SHARE = 0.15  # of the tokens that a masked model may learn, those that are hidden


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Every option of a run by its name; None where a value is not derived yet.

    `origin` says of each where it came from: `flag`, `file`, `preset NAME`, `default`, or
    `derived: REASON`.
    """

    model: str
    preset: str
    modules: tuple[str, ...]
    layers: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    stack: str | None
    strict: bool
    rank: int | None
    alpha: float | None
    dropout: float | None
    data: tuple[str, ...]
    eval_data: tuple[str, ...]
    holdout: float
    format: str
    map: str | None
    chat_template: str | None
    loss_on: str
    overflow: str
    epochs: int | None
    max_steps: int | None
    save_steps: int | None
    save_minutes: float
    keep: int | None
    eval_steps: int | None
    batch_size: int | None
    accumulate: int
    max_length: int | None
    learning_rate: float | None
    scheduler: str
    warmup: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    dtype: str
    device: str
    gradient_checkpointing: bool
    prefix_cache: str
    head_chunk: int | None
    output: str | None
    overwrite: bool
    resume: bool
    origin: Mapping[str, str] = field(default_factory=dict)

    def derived(self, name: str, value: Any, reason: str) -> RunConfig:
        """With a derived value where none is set."""
        if getattr(self, name) is not None:
            return self
        return replace(self, **{name: value}, origin={**self.origin, name: f"derived: {reason}"})

    def why(self, name: str) -> str:
        """The reason of a derived value in words: `from hidden size 128`; empty for what was set."""
        came = self.origin.get(name, "")
        return came.removeprefix("derived: ") if came.startswith("derived") else ""

    def reads(self, *others: str | None) -> tuple[Path, ...]:
        """The files and folders on this machine that a run with these settings reads, and `others`."""
        specs = [weighted(spec)[0] for spec in (*self.data, *self.eval_data)]
        found = [Path(name).expanduser() for name in (*specs, self.chat_template, *others) if name]
        # a pattern reads files of its folder; a config.json stands for the model's folder
        found = [p.parent if any(c in p.name for c in "*?[") or p.name == "config.json" else p for p in found]
        return tuple(path for path in found if path.exists())

    def as_file(self) -> dict[str, Any]:
        """What `run.yaml` holds: the values that may be read back, then their origins.

        Files and folders stand there by their full path, to be found from anywhere.
        """
        kept = [name for name, option in OPTIONS.items() if option.kept]
        values = {name: getattr(self, name) for name in kept}
        values["model"] = _lasting(self.model) if self.model != "demo" else "demo"
        for name in ("data", "eval_data"):
            values[name] = [_lasting(spec) for spec in values[name]]
        if self.chat_template:
            values["chat_template"] = _lasting(self.chat_template)
        plain = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
        return {**plain, "origin": {n: self.origin[n] for n in kept if n in self.origin}}


def _lasting(name: str) -> str:
    plain, weight = weighted(name)
    path = Path(plain).expanduser()
    if not path.parent.exists() or not (path.exists() or any(c in path.name for c in "*?[")):
        return name
    return str(path.parent.resolve() / path.name) + (f"={weight:g}" if weight != 1 else "")


def read_run_file(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The values in a run file, checked, and the origins it states.

    Raises RequestError for a key that is unknown (with the closest one) or a value of the
    wrong type or out of bounds.
    """
    data = read_yaml(Path(path).expanduser(), "run file")
    origin = data.pop("origin", {}) or {}
    if not isinstance(origin, dict) or not all(isinstance(v, str) for v in origin.values()):
        raise RequestError(f"run file `{path}`: `origin` is no mapping of options to texts")
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in OPTIONS:
            raise RequestError(f"run file `{path}`: unknown key `{name}`", closest(name, OPTIONS))
        option = OPTIONS[name]
        if value is None or not option.kept or (option.many and value == []):
            continue
        if name == "layers" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        values[name] = option.checked(value, f" in `{path}`")
    return values, {str(name): text for name, text in origin.items()}


def settle(flags: Mapping[str, Any], file: str | None = None) -> tuple[RunConfig, Preset]:
    """The settings of a run, and its preset with `modules`, rank, alpha and dropout in force.

    `flags` are the options given on the command line (None: not given). Raises RequestError
    for anything wrong in the flags, the file or the preset.
    """
    given = {
        name: OPTIONS[name].checked(value, "")
        for name, value in flags.items()
        if value is not None and value != ()
    }
    stored, stored_origin = read_run_file(file) if file else ({}, {})
    kept = _still_holds(stored, stored_origin, given)

    preset = load(given.get("preset") or kept.get("preset") or OPTIONS["preset"].default)
    if "preset" in given:  # what was derived gives way to what the new preset says
        kept = {
            name: value
            for name, value in kept.items()
            if name not in preset.training or not stored_origin.get(name, "").startswith("derived")
        }
    # a preset of one's own is kept by its full path, so that the run file finds it again
    if preset.path:
        given = {**given, "preset": preset.path} if "preset" in given else given
        kept = {**kept, "preset": preset.path} if "preset" in kept else kept

    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, option in OPTIONS.items():
        if name in given:
            values[name], origin[name] = given[name], "flag"
        elif name in kept:
            values[name] = kept[name]
            stated = stored_origin.get(name, "file")
            origin[name] = "file" if stated == "flag" else stated
        elif name in preset.training:
            values[name], origin[name] = preset.training[name], f"preset {preset.name}"
        else:
            values[name] = option.default
            if option.default is not None:
                origin[name] = "default"
    if values["modules"]:
        names = [n.strip() for text in values["modules"] for n in text.split(",") if n.strip()]
        values["modules"] = tuple(names)
        preset = preset.with_modules(names)
    for name in ("include", "exclude"):
        values[name] = tuple(p.strip() for text in values[name] for p in text.split(",") if p.strip())
    if values["layers"] is None:
        values["layers"], origin["layers"] = preset.layers, f"preset {preset.name}"
    for name, setting in (("rank", "r"), ("alpha", "alpha"), ("dropout", "dropout")):
        if values[name] is None:
            values[name] = getattr(preset.lora, setting)
            origin[name] = f"preset {preset.name}"
    lora = replace(preset.lora, r=values["rank"], alpha=values["alpha"], dropout=values["dropout"])
    config = RunConfig(**values, origin=origin)
    return config, replace(preset, lora=lora)


def as_recorded(file: str) -> RunConfig:
    """The settings in a run file and nothing else: its preset is not looked up.

    For what a finished run did with its data. Raises RequestError as `read_run_file` does.
    """
    stored, origin = read_run_file(file)
    values = {name: stored.get(name, option.default) for name, option in OPTIONS.items()}
    return RunConfig(**values, origin=origin)


def _still_holds(
    stored: Mapping[str, Any], origin: Mapping[str, str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The stored values, less those that came from what a flag now changes."""
    kept = {}
    for name, value in stored.items():
        came = origin.get(name, "file")
        if name == "modules" and "preset" in given:
            continue
        if came.startswith("preset ") and ("preset" in given or "modules" in given):
            continue
        if came.startswith("derived") and any(s in given for s in SOURCES.get(name, ())):
            continue
        if came == "default" and "preset" in given:  # the new preset may say otherwise
            continue
        kept[name] = value
    return kept


def derive_from_model(config: RunConfig, model: ModelMap) -> RunConfig:
    """With what follows from the model: learning rate and longest row.

    The rate is 5e-5 * 10 * (2000 / hidden)^p with p = 0.781, and 0.0775 for Qwen: LoRA wants
    about ten times the rate of full fine-tuning whatever the rank ("LoRA Without Regret",
    Schulman et al., Thinking Machines 2025, and Tinker's `get_lora_lr_over_full_finetune_lr`).

    Raises RequestError for a length beyond the model's positions.
    """
    hidden = model.hidden_size
    power = 0.0775 if model.family.startswith("qwen") else 0.781
    rate = min(5e-4 * (2000 / hidden) ** power, 1e-2) if hidden else 2e-4
    reason = f"from hidden size {hidden}" if hidden else "the model names no hidden size"
    config = config.derived("learning_rate", float(figures(rate, 2)), reason)
    room = model.max_positions
    if room and config.max_length and config.max_length > room:
        raise RequestError(
            f"--max-length {config.max_length} is beyond the {room} positions of `{model.model}`",
            f"the longest row it takes is --max-length {room}",
        )
    if room and room < LONGEST_ROW:
        return config.derived("max_length", room, f"the model's {room} positions")
    return config.derived("max_length", LONGEST_ROW, "the longest row unless asked otherwise")


def derive_from_rows(config: RunConfig, mean_tokens: float, rows: int = 0) -> RunConfig:
    """With what follows from the rows: the batch, and from how many there are, the epochs.

    The batch makes an optimizer step about 2,048 tokens: 1 to 32 rows, a power of two. LoRA loses
    to full fine-tuning at large batches ("LoRA Without Regret", sec. on batch size), and a
    small data set needs steps more than it needs large ones. The epochs are as many as make about
    250 steps, at most 3; as many as `max_steps` needs where that is set.
    """
    wanted = max(1.0, TOKENS_PER_STEP / max(1.0, mean_tokens) / config.accumulate)
    size = 1
    while size * 2 <= min(32, wanted * 1.42):  # 1.42: to the nearest power of two
        size *= 2
    config = config.derived(
        "batch_size", size, f"about {TOKENS_PER_STEP:,} tokens a step at {mean_tokens:.0f} a row"
    )
    if not rows or not config.batch_size:
        return config
    steps = ceil(ceil(rows / config.batch_size) / config.accumulate)
    if config.max_steps:
        return config.derived("epochs", ceil(config.max_steps / steps), "as many as --max-steps needs")
    epochs = min(MOST_EPOCHS, ceil(ENOUGH_STEPS / steps))
    return config.derived("epochs", epochs, f"{steps:,} steps each")
