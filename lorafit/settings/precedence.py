"""The settings of a run: flags override the run file, which overrides the preset, then the defaults.

Options that are not set are derived: the learning rate from the hidden size, the row length from the
model's positions, the batch from the rows. Every value keeps its origin, so that `run.yaml` repeats a run,
and a value is derived again when a flag changes what it was derived from.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from math import ceil
from pathlib import Path
from typing import Any

from lorafit.errors import RequestError, closest
from lorafit.model import DATA_FILES, ModelMap
from lorafit.outputs import RUN_FILE
from lorafit.settings.optimizers import check_optimizer
from lorafit.settings.preset import LORA, TOP, Preset, load_preset, read_yaml
from lorafit.settings.run_config import OPTIONS, RunConfig
from lorafit.settings.trackers import check_trackers
from lorafit.settings.values import check_attention
from lorafit.units import figures

PRESETS_OWN = {*TOP, *LORA, "roles"} - {*OPTIONS}  # keys that no run file has

TOKENS_PER_STEP = 2048
ENOUGH_STEPS, MOST_EPOCHS = 250, 3
LONGEST_ROW = 1024


def read_run_file(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The values in a run file, checked, and the origins it states.

    Raises RequestError for a key that is unknown (with the closest one) or a value of the
    wrong type or out of bounds.
    """
    if Path(path).suffix.lower() in DATA_FILES:
        raise RequestError(f"`{path}` is data, not a run file", f"--data {shlex.quote(path)}")
    if Path(path).expanduser().is_dir() and (Path(path).expanduser() / RUN_FILE).is_file():
        raise RequestError(f"`{path}` is a run's folder", f"--config {shlex.quote(f'{path}/{RUN_FILE}')}")
    data = read_yaml(Path(path).expanduser(), "run file")
    if PRESETS_OWN & data.keys():
        raise RequestError(f"`{path}` is a preset, not a run file", f"--preset {shlex.quote(path)}")
    origin = data.pop("origin", {}) or {}
    data.pop("environment", None)  # of the run that wrote it
    if not isinstance(origin, dict) or not all(isinstance(v, str) for v in origin.values()):
        raise RequestError(f"run file `{path}`: `origin` is not a mapping of options to texts")
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in OPTIONS:
            hint = closest(name, OPTIONS, "lorafit help options lists the keys")
            raise RequestError(f"run file `{path}`: unknown key `{name}`", hint)
        option = OPTIONS[name]
        if value is None or not option.kept or (option.many and value == []):
            continue
        if name == "layers" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        values[name] = option.checked(value, f" in `{path}`")
    return values, {str(name): _stated(text, values.get(name)) for name, text in origin.items()}


def _stated(text: str, value: Any) -> str:
    """Where a value came from; a derived one that somebody has edited is the file's."""
    found = re.fullmatch(r"derived \((.*?)\): (.*)", text, re.DOTALL)
    if found is None:
        return text
    return f"derived: {found[2]}" if str(value) == found[1] else "file"


def dated(settings: RunConfig, date: str = "") -> RunConfig:
    """The settings with the date that chat templates write: `date`, or that of the run that is resumed, else
    now."""
    if date:
        return settings.derived("template_date", date, "the start of the run")
    if settings.resume and settings.output is not None:
        target = Path(settings.output).expanduser()
        path = target.with_name(f"{target.name}.partial") / "run.yaml"
        stored = read_run_file(str(path))[0].get("template_date") if path.is_file() else None
        settings = settings.derived("template_date", stored, "the start of the run") if stored else settings
    now = datetime.now().isoformat(timespec="minutes")
    return settings.derived("template_date", now, "the start of the run")


def settle(flags: Mapping[str, Any], file: str | None = None) -> tuple[RunConfig, Preset]:
    """The settings of a run, and its preset with `modules`, rank, alpha and dropout in force.

    `flags` are the options given on the command line, as text or as values (None: not given). Raises
    RequestError for anything wrong in the flags, the file or the preset.
    """
    given = {
        name: OPTIONS[name].parsed(value)
        for name, value in flags.items()
        if value is not None and value not in ((), [])
    }
    stored, stored_origin = read_run_file(file) if file else ({}, {})
    kept = _still_holds(stored, stored_origin, given)

    preset = load_preset(given.get("preset") or kept.get("preset") or OPTIONS["preset"].default)
    if "preset" in given:  # the new preset's values replace derived ones
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
    check_optimizer(values["optimizer"])
    check_trackers(values["track"])
    check_attention(values["attention"])
    _check_together(values, origin)
    preset.choice(values["layers"])  # a wrong choice is refused before any library is loaded
    lora = replace(preset.lora, r=values["rank"], alpha=values["alpha"], dropout=values["dropout"])
    if values["from_adapter"]:  # it has values; a start such as PiSSA's would change the base
        lora = replace(lora, init_lora_weights=True)
    config = RunConfig(**values, origin=origin)
    return config, replace(preset, lora=lora)


def _check_together(values: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    """Raises RequestError for options that need another one, or rule it out."""
    if values["prefix_residency"] == "stream" and values["prefix_cache"] == "off":
        raise RequestError(
            "--prefix-residency stream: the output of these layers has to be kept, and --prefix-cache is off",
            "--prefix-cache auto, or --prefix-residency resident",
        )
    if values["scheduler"] == "constant" and values["warmup"] and origin["warmup"] in ("flag", "file"):
        raise RequestError(
            "--scheduler constant has no warm-up, and --warmup asks for one",
            "--scheduler constant_with_warmup",
        )
    if values["warmup"] > 1 and values["warmup"] % 1:
        raise RequestError(
            f"--warmup is {values['warmup']:g}: it takes a share of the run below 1, or whole steps",
            f"--warmup {ceil(values['warmup'])}",
        )
    if values["patience"] and not values["eval_steps"]:
        raise RequestError("--patience counts evaluations, and there are none", "e.g. --eval-steps 50")
    if values["min_delta"] and not values["patience"]:
        raise RequestError("--min-delta is the gain that --patience waits for", "e.g. --patience 3")
    if not (values["holdout"] or values["eval_data"]):
        for name in ("eval_steps", "patience", "group_by"):
            if values[name]:
                raise RequestError(
                    f"{OPTIONS[name].flag} needs held-out rows, and --holdout 0 holds none out",
                    "a share such as --holdout 0.05, or --eval-data FILE",
                )


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
    """The stored values without those that follow from something that a flag now changes."""
    kept = {}
    for name, value in stored.items():
        came = origin.get(name, "file")
        if name == "modules" and "preset" in given:
            continue
        if came.startswith("preset ") and ("preset" in given or "modules" in given):
            continue
        if came.startswith("derived") and any(s in given for s in OPTIONS[name].depends_on):
            continue
        if came == "default" and "preset" in given:  # the new preset may set it
            continue
        kept[name] = value
    return kept


def derive_from_model(config: RunConfig, model: ModelMap) -> RunConfig:
    """Complete the settings from the model: learning rate and row length.

    The rate is 5e-5 * 10 * (2000 / hidden)^p with p = 0.781, and 0.0775 for Qwen: LoRA wants
    about ten times the rate of full fine-tuning whatever the rank ("LoRA Without Regret",
    Schulman et al., Thinking Machines 2025, and Tinker's `get_lora_lr_over_full_finetune_lr`).

    Raises RequestError for a length beyond the model's positions.
    """
    hidden = model.hidden_size
    power = 0.0775 if model.family.startswith("qwen") else 0.781
    rate = min(5e-4 * (2000 / hidden) ** power, 1e-2) if hidden else 2e-4
    reason = f"from hidden size {hidden}" if hidden else "the model's config has no hidden size"
    config = config.derived("learning_rate", float(figures(rate, 2)), reason)
    room = model.max_positions
    if room and config.max_length and config.max_length > room:
        raise RequestError(
            f"--max-length {config.max_length} is beyond the {room} positions of `{model.model}`",
            f"use --max-length {room} at most",
        )
    if room and room < LONGEST_ROW:
        return config.derived("max_length", room, f"the model's {room} positions")
    return config.derived("max_length", LONGEST_ROW, "default row length")


def derive_from_rows(config: RunConfig, mean_tokens: float, rows: int = 0) -> RunConfig:
    """Complete the settings from the rows: batch size, and epochs from the number of rows.

    An optimizer step has about 2,048 tokens: 1 to 32 rows, a power of two. LoRA falls behind full
    fine-tuning at large batches ("LoRA Without Regret", section on batch size), and a small data set
    needs many steps rather than large ones. The epochs make about 250 steps, at most 3 epochs; with
    `max_steps`, as many as that needs.
    """
    wanted = max(1.0, TOKENS_PER_STEP / max(1.0, mean_tokens) / config.accumulate)
    size = 1
    while size * 2 <= min(32, wanted * 1.42):  # 1.42: to the nearest power of two
        size *= 2
    config = config.derived(
        "batch_size", size, f"about {TOKENS_PER_STEP:,} tokens per step, {mean_tokens:.0f} per row"
    )
    if not rows or not config.batch_size:
        return config
    steps = ceil(ceil(rows / config.batch_size) / config.accumulate)
    if config.max_steps:
        return config.derived("epochs", ceil(config.max_steps / steps), "to reach --max-steps")
    epochs = min(MOST_EPOCHS, ceil(ENOUGH_STEPS / steps))
    return config.derived("epochs", epochs, f"{steps:,} steps each")
