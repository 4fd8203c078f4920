"""`lorafit plan`: what would be adapted, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape

from lorafit import __version__
from lorafit.adapter import Plan, lora_params
from lorafit.estimate import TOO_MUCH, Estimate, Fit
from lorafit.events import DataReport
from lorafit.jsonio import jsonable
from lorafit.model import ModelMap, Role, Slot
from lorafit.screen.console import Screen, Table, table_of
from lorafit.screen.data import show_look
from lorafit.settings import RunConfig
from lorafit.units import (
    bytes_text,
    count,
    epochs_text,
    figures,
    index_ranges,
    layers_text,
    percent,
    seconds_text,
    short,
)


def show_plan(
    screen: Screen,
    plan: Plan,
    found: ModelMap,
    estimate: Estimate | None,
    fit: Fit | None,
    look: DataReport | None,
    command: str,
    config: RunConfig,
) -> None:
    """What would be adapted, its names in PEFT, the data, and the cost; `command` is the command that trains it; empty
    where there is none."""
    screen.answer(f"[bold]{escape(plan.model)}[/]  {escape(_title(plan))}")
    screen.answer()
    for label, text in _plan_lines(plan, found):
        screen.line(label, text, answer=True)
        if label == "adapts":
            screen.line("LoRA", _lora_text(plan, config), answer=True)
    screen.answer()
    screen.answer(_plan_table(plan))
    screen.answer()
    if look is not None:
        show_look(screen, look, answer=True)
        screen.answer()
    if estimate is not None:
        screen.section("memory at the peak of a step", _memory_table(estimate))
        if fit is not None:
            screen.line("fits" if fit.fits else "too big", _fit_text(fit, estimate), answer=True)
        if estimate.prefix_residency.where == "stream":
            screen.line("streams", _streams_text(plan, estimate), answer=True)
        screen.line("time", _time_text(estimate), answer=True)
        for assumption in estimate.assumptions:
            screen.note(assumption, answer=True)
        if fit is not None and not fit.fits:
            screen.answer()
            _show_alternatives(screen, fit, estimate)
    for note in plan.notes:
        screen.note(note, answer=True)
    if command and (fit is None or fit.fits):
        screen.command("next", command)


def _lora_text(plan: Plan, config: RunConfig) -> str:
    """`rank 16, alpha 32, learning rate 0.0043 (from the hidden size)`."""
    dropout = f", dropout {plan.lora.dropout:g}" if plan.lora.dropout else ""
    rate = ""
    if config.learning_rate is not None:
        why = config.why("learning_rate")
        rate = f", learning rate {figures(config.learning_rate, 2)}{f' ({why})' if why else ''}"
    return f"rank {plan.lora.r}, alpha {plan.lora.alpha:g}{dropout}{rate}"


def _title(plan: Plan) -> str:
    return f"{plan.preset} · {plan.spec} = {_layers_text(plan)}"


def _layers_text(plan: Plan) -> str:
    different = set(plan.layers.values())
    if len(different) == 1:
        return layers_text(next(iter(different)))
    return "; ".join(f"{layers_text(v)} of {k}" for k, v in plan.layers.items())


def _plan_lines(plan: Plan, found: ModelMap) -> Iterator[tuple[str, str]]:
    depth = sum(found.stack(path).depth for path in plan.layers)
    layers = len({(s.stack, s.layer) for s in plan.slots})
    roles = ", ".join(r.value for r in Role if any(r in s.roles for s in plan.slots)) or plan.preset
    yield (
        "adapts",
        f"{roles} in {layers} of {depth} layers: {count(len(plan.slots))} modules, "
        f"{count(plan.trainable_params)} parameters "
        f"({percent(plan.trainable_params, plan.total_params)} of {short(plan.total_params)}), "
        f"{bytes_text(plan.adapter_bytes)} on disk",
    )
    cuts = [(path, cut) for path, cut in plan.cut.items() if cut > 0]
    if cuts:
        frozen = ", ".join(f"{layers_text(tuple(range(cut)))} of {path}" for path, cut in cuts)
        yield "frozen", f"{frozen}: no adapter in or below them; backward stops above them"
    target = plan.peft
    names = list(target.target_modules)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if names:
        yield "PEFT", f"target_modules = [{shown}]"
    if target.layers_to_transform:
        yield "", f"layers_to_transform = [{', '.join(map(str, target.layers_to_transform))}]"
    if target.layers_pattern:
        yield "", f"layers_pattern = [{', '.join(target.layers_pattern)}]"
    if target.target_parameters:
        first = target.target_parameters[0]
        more = len(target.target_parameters) - 1
        yield "", f"target_parameters = [{first}{f' and {more} more' if more else ''}]"


def _plan_table(plan: Plan) -> Table:
    table = table_of("role", "module", "shape", "layers", "trainable", right=1)
    groups: dict[tuple[str, str, str], list[Slot]] = {}
    for slot in plan.slots:
        roles = "+".join(r.value for r in slot.roles) or slot.part.value
        copies = f" × {slot.copies}" if slot.copies > 1 else ""
        shape = f"{count(slot.in_features)} → {count(slot.out_features)}{copies}"
        groups.setdefault((roles, slot.tail, shape), []).append(slot)
    for (roles, tail, shape), slots in groups.items():
        layers = index_ranges(tuple(sorted({s.layer for s in slots})))
        params = sum(lora_params(s, plan.lora) for s in slots)
        table.add_row(f"  {roles}", tail, shape, layers, count(params))
    return table


def _fit_text(fit: Fit, estimate: Estimate) -> str:
    each = f" in each of {estimate.processes} processes" if estimate.processes > 1 else ""
    peak = estimate.memory.peak
    forced = ": `lorafit train` starts only with --force" if peak > TOO_MUCH * fit.free else ""
    return f"{bytes_text(peak)} at the peak{each}, {bytes_text(fit.free)} free on {fit.device}{forced}"


def _streams_text(plan: Plan, estimate: Estimate) -> str:
    """`layers 0–59 are read as they run, twice (240 GB), and not held; their output takes 1.20 GB on disk`."""
    (cut,) = plan.cut.values()
    residency, states = estimate.prefix_residency, estimate.prefix_cache
    layers = f"{layers_text(tuple(range(cut)))} {'are' if cut > 1 else 'is'}"
    times = "twice" if residency.reads == 2 else f"{residency.reads} times"
    kept = f"; their output takes {bytes_text(states.bytes)} {'on disk' if states.where == 'disk' else 'of memory'}"
    return (
        f"{layers} read as they run, {times} ({bytes_text(residency.bytes_read)} in all), and not held"
        f"{kept if states.bytes else ''} ({residency.reason})"
    )


def _time_text(estimate: Estimate) -> str:
    """`3 epochs, 4.10 M tokens: about 31 min with the frozen-layer cache, 52 min without`."""
    speed = f"{short(estimate.tokens_per_second)} tok/s"
    if estimate.tokens_per_epoch is None or estimate.seconds_per_epoch is None or estimate.epochs is None:
        return f"{speed}; add --data to get the time of an epoch"
    text = (
        f"{epochs_text(estimate.epochs)}, {short(estimate.tokens_per_epoch * estimate.epochs)} tokens: about "
    )
    plain = seconds_text(estimate.seconds_per_epoch * estimate.epochs)
    if estimate.prefix_cache.where == "off" or estimate.seconds is None:
        return f"{text}{plain} at {speed}"
    if estimate.prefix_residency.where == "stream":
        return f"{text}{seconds_text(estimate.seconds)} with the reading"
    return f"{text}{seconds_text(estimate.seconds)} with the frozen-layer cache, {plain} without"


def _show_alternatives(screen: Screen, fit: Fit, estimate: Estimate) -> None:
    """The nearest settings that fit, fastest first."""
    if not fit.alternatives:
        screen.note(
            "no setting of `lorafit train` makes it fit: use a smaller model or a larger device",
            answer=True,
        )
        return
    table = table_of("what fits", "peak", "tok/s", right=2, fold=0)
    for option in fit.alternatives:
        table.add_row(f"  {option.flags}", bytes_text(option.peak), short(option.tokens_per_second))
    screen.answer(table)
    screen.answer()


def _memory_table(estimate: Estimate) -> Table:
    table = table_of("what", "bytes", right=1)
    names = {
        "heap": "allocator overhead",
        "prefix_cache": "frozen-layer cache",
        "gathered": "gathered layers",
    }
    memory = jsonable(estimate.memory)
    for name, size in memory.items():
        if size:
            table.add_row(f"  {names.get(name, name)}", bytes_text(size))
    table.add_row("  [bold]peak[/]", f"[bold]{bytes_text(estimate.memory.peak)}[/]")
    return table


def show_matrix(screen: Screen, model: str, cells: Sequence[dict[str, Any]], free: int) -> None:
    """Strategy × band: parameters, memory and time of each; what does not fit is marked."""
    timed = any(cell.get("seconds_per_epoch") for cell in cells)
    last = "epoch" if timed else "tok/s"
    table = table_of(
        "preset", "layers", "trainable", "adapter", "peak", last, "cached" if timed else "", right=5
    )
    not_all = any("error" not in cell and cell["peak_memory"] > free for cell in cells)
    errors = []
    before = ""
    for cell in cells:
        name = cell["preset"] if cell["preset"] != before else ""
        before = cell["preset"]
        if "error" in cell:
            errors.append(cell["error"])
            table.add_row(f"  {name}", cell["layers"], "—")
            continue
        whole, replayed = cell["seconds_per_epoch"], cell["seconds_per_epoch_replayed"]
        row = [
            cell["layers"],
            short(cell["trainable_params"]),
            bytes_text(cell["adapter_bytes"]),
            bytes_text(cell["peak_memory"]),
            seconds_text(whole) if whole else short(cell["tokens_per_second"]),
            seconds_text(replayed) if replayed else "",
        ]
        if cell["peak_memory"] > free:
            row[3] = f"[red]{row[3]} *[/]"
        elif not_all:
            row[3] += "  "
        table.add_row(f"  {name}", *row)
    screen.answer(f"[bold]{escape(model)}[/]  every strategy in every band; {bytes_text(free)} free")
    screen.answer()
    screen.answer(table)
    if timed:
        screen.note(
            "epoch: every layer runs; cached: the frozen layers are read from the cache",
            answer=True,
        )
    if not_all:
        screen.note(f"*: more than the {bytes_text(free)} that are free", answer=True)
    for error in sorted(set(errors)):
        screen.note(error, answer=True)


def show_header(screen: Screen, plan: Plan, found: ModelMap, config: RunConfig) -> None:
    """The plan, before a weight is read; its notes come with those of the run."""
    size = f"{found.stacks[0].depth} layers × {found.hidden_size}" if found.stacks else found.family
    screen.say(
        f"[bold]lorafit {__version__}[/]  {escape(found.model)} ({size}, {short(found.total_params)})  "
        f"{escape(_title(plan))}"
    )
    for label, text in _plan_lines(plan, found):
        if label == "adapts" or (label == "frozen" and screen.verbose):
            screen.line(label, text)
