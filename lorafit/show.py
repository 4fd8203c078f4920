"""What a person sees: the only file that draws. stdout carries the answer, stderr the talk.

Colour never carries meaning alone; without a terminal there are no bars.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from lorafit import __version__
from lorafit.bands import BANDS, TILED_FROM
from lorafit.config import RunConfig
from lorafit.cost import ITEMSIZE, Estimate
from lorafit.errors import LorafitError
from lorafit.events import (
    AdapterScore,
    EpochDone,
    EvalReport,
    Evaluated,
    Event,
    Group,
    Look,
    Loss,
    MergeReport,
    Predicted,
    PrefixCache,
    Saved,
    Score,
    Started,
    Stepped,
    TrainReport,
)
from lorafit.forecast import Fit
from lorafit.modelmap import ModelMap, Slot, Stack, jsonable, sum_params
from lorafit.outputs import PAGE
from lorafit.plan import Plan, lora_params
from lorafit.presets import Preset
from lorafit.roles import MEANING, Part, Role
from lorafit.units import bytes_text, count, figures, index_ranges, percent, seconds_text, short

# A row's text is data: what would move the cursor or ring is shown as a picture of itself.
CONTROLS = {n: chr(0x2400 + n) for n in range(32) if chr(n) != "\n"} | {0x7F: "\u2421", 0x9B: "�"}
LABEL = 11  # columns of the word at the head of a line


class Screen:
    """The two streams, and how much is said on them."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.out = _console(sys.stdout)
        self.talk = _console(sys.stderr)

    def document(self, data: Any) -> None:
        """One JSON document on stdout."""
        sys.stdout.write(json.dumps(jsonable(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def answer(self, text: str | Text | Table = "") -> None:
        """A line or a table of the answer; not under `--json`, where the document is the answer."""
        if not self.as_json:
            self.out.print(text, highlight=False)

    def say(self, text: str | Text | Table = "") -> None:
        """Talk: on stderr, not under `--quiet`."""
        if not self.quiet:
            self.talk.print(text, highlight=False)

    def section(self, title: str, table: Table) -> None:
        """A table of the answer under its title, a blank line behind it."""
        self.answer(f"[bold]{escape(title)}[/]")
        self.answer(table)
        self.answer()

    def line(self, label: str, text: str, answer: bool = False) -> None:
        """`  label      text`, the text wrapped under itself."""
        table = Table.grid(padding=(0, 0))
        table.add_column(width=LABEL + 2, no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(f"  [bold]{label}[/]", escape(text))
        (self.answer if answer else self.say)(table)

    def note(self, text: str, answer: bool = False) -> None:
        self.line("note", text, answer)

    def error(self, error: LorafitError) -> None:
        """`error: …` and `hint: …`."""
        self.talk.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
        if error.hint:
            self.talk.print(f"[bold]hint:[/] {escape(error.hint)}", highlight=False, soft_wrap=True)

    @contextmanager
    def bar(
        self, what: str, unit: Callable[[float], str] = lambda n: f"{n:,.0f}"
    ) -> Iterator[Callable[[float, float], None]]:
        """A bar on stderr for as long as the block lasts: call it with (done, total)."""
        if self.quiet or not self.talk.is_terminal:
            yield lambda done, total: None
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[said]}"),
        )
        with Progress(*columns, console=self.talk, transient=True) as progress:
            task = progress.add_task(what, total=None, said="")

            def tick(done: float, total: float) -> None:
                progress.update(task, completed=done, total=total, said=f"{unit(done)} of {unit(total)}")

            yield tick


def _console(stream: Any) -> Console:
    width = None
    if not stream.isatty():
        width = int(os.environ.get("COLUMNS", "0") or 0) or 100
    return Console(file=stream, width=width, soft_wrap=False)


def _table(*columns: str, right: int = 0, fold: int = 1) -> Table:
    """A table without lines, indented: `right` columns at the end are figures, column `fold` may wrap."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        figure = number >= len(columns) - right
        title = f"  {name}" if number == 0 else name
        least = 12 if number == fold else None
        side = "right" if figure else "left"
        table.add_column(title, justify=side, no_wrap=number != fold, overflow="fold", min_width=least)
    return table


def _times(*sizes: int) -> str:
    return " × ".join(count(size) for size in sizes)


# -- inspect --------------------------------------------------------------------------------


def show_map(screen: Screen, found: ModelMap, named: str) -> None:
    """The way of a text through a model, then its weights by layer and by role, to the last parameter.

    `named` is the model as it was asked for, for the next command.
    """
    size = found.total_params * ITEMSIZE.get(found.dtype, 4)
    screen.answer(
        f"[bold]{escape(found.model)}[/]  {found.architecture}  "
        f"{short(found.total_params)} parameters, {bytes_text(size)} in {found.dtype}"
    )
    screen.answer()
    for line in _drawing(found, screen.out.width):
        screen.answer(line)
    screen.answer()
    for stack in found.text_stacks:
        screen.section(f"layers of {stack.path}", _layer_table(found, stack))
    screen.section("roles", _role_table(found))
    screen.section("what no role covers", _uncovered_table(found))
    covered = sum_params(s for s in found.slots if s.roles)
    total = _table("", "parameters", right=1)
    total.add_row("  in the seven roles", count(covered))
    total.add_row("  in none", count(found.total_params - covered))
    total.add_row("  [bold]in all[/]", f"[bold]{count(found.total_params)}[/]")
    screen.section("total", total)
    for note in found.notes:
        screen.note(note, answer=True)
    screen.line("next", f"lorafit plan {named} --preset ffn --layers high", answer=True)


def _drawing(found: ModelMap, width: int) -> Iterator[Text]:
    """The way of a text: tokens, embedding, positions, blocks, head; one line each."""

    def row(label: str, shape: str = "", size: str = "", more: str = "") -> Text:
        return Text.assemble(
            "  ", (f"{label:<14}", "bold"), f"{shape:<22}{size:>9}", f"   {more}" if more else ""
        )

    arrow = Text("    │", style="dim")
    yield Text(f"  text → tokens → ids ({count(found.vocab_size)})")
    yield arrow
    tables = [u for u in found.uncovered if u.reason == "embedding" and "tower" not in u.path]
    main = max(tables, key=lambda u: u.params, default=None)
    if main is not None:
        yield row("embedding", _times(*main.shape), short(main.params))
    learned = [u for u in found.uncovered if u.reason == "positions" and found.positions == "learned"]
    if learned and found.positions == "learned":
        yield row("positions", _times(*learned[0].shape), short(learned[0].params), "learned")
    elif found.positions != "unknown":
        reach = f"up to {count(found.max_positions)}" if found.max_positions else ""
        yield row("positions", reach, "", found.positions)
    yield arrow
    for number, stack in enumerate(found.text_stacks):
        if number:
            yield arrow
        yield from _block(found, stack, width)
    if not found.text_stacks:
        yield Text("  no repeated blocks")
    yield arrow
    lists = tuple(f"{stack.path}." for stack in found.stacks)
    other = re.compile(r"embed|cls|predictions|head|tower|vision|audio")
    final = [
        u for u in found.uncovered
        if u.reason == "norm" and not u.path.startswith(lists) and not other.search(u.path)
    ]  # fmt: skip
    if final:
        yield row("norm", f"{count(found.hidden_size)}", "", "the final one")
    head = [u for u in found.uncovered if u.reason == "head" and len(u.shape) == 2]
    size = "" if found.tied_head or not head else short(max(u.params for u in head))
    tied = "tied with the embedding" if found.tied_head else ""
    yield row("head", f"{count(found.hidden_size)} → {count(found.vocab_size)}", size, tied)
    yield Text("    │", style="dim")
    yield Text("  logits")


def _block(found: ModelMap, stack: Stack, width: int) -> Iterator[Text]:
    """One block of a stack in a box, its bands beside it, or under it where the width asks for that."""
    layers = _by_layer(found, stack)
    common = Counter(_signature(slots) for slots in layers.values()).most_common(1)
    if not common:
        return
    slots = next(slots for slots in layers.values() if _signature(slots) == common[0][0])
    lines: list[tuple[str, str, str, str]] = []
    for part in dict.fromkeys(s.part for s in slots):
        rows = [s for s in slots if s.part is part]
        groups: dict[tuple[int, int], list[Slot]] = {}
        for slot in rows:
            groups.setdefault((slot.in_features, slot.out_features), []).append(slot)
        for number, ((i, o), same) in enumerate(groups.items()):
            roles = " ".join("+".join(r.value for r in s.roles) or s.tail.rpartition(".")[2] for s in same)
            each = " each" if len(same) > 1 else ""
            copies = f" × {same[0].copies}" if same[0].copies > 1 else ""
            more = ""
            if number == 0 and part is Part.SELF_ATTENTION and found.heads:
                more = f"{found.heads} heads of {found.head_dim}"
                if found.kv_heads and found.kv_heads != found.heads:
                    more += f", {found.kv_heads} for k v"
            if number == 0 and part in (Part.FEED_FORWARD, Part.EXPERTS):
                more = found.activation
            lines.append(
                (part.value if number == 0 else "", roles, f"{count(i)} → {count(o)}{each}{copies}", more)
            )
    inside = sum(u.params for u in found.uncovered if u.path.startswith(f"{stack.path}.{slots[0].layer}."))
    size = sum(s.params for s in slots) + inside
    norms = len(
        {
            u.path.rpartition(".")[0]
            for u in found.uncovered
            if u.reason == "norm" and u.path.startswith(f"{stack.path}.{slots[0].layer}.")
        }
    )
    lines.append((f"{norms} norms" if norms else "", "", "", f"{short(size)} a block"))
    widths = [max(len(line[c]) for line in lines) for c in range(4)]
    inner = sum(widths) + 8
    kinds = len(set(map(_signature, layers.values())))
    title = f" block × {stack.depth}" + (f", {stack.name}" if len(found.text_stacks) > 1 else "")
    title += f", the commonest of {kinds} kinds " if kinds > 1 else " "
    beside = _bands_beside(stack)
    under = ""
    if inner + 18 > width:
        beside, under = [], "   ".join(" ".join(band.split()) for band in beside)
    if inner + 5 > width:  # a narrow terminal: what each part is, and its shape
        widths[3], inner = 0, inner - widths[3]
        lines = [(*line[:3], "") for line in lines]
    yield Text(f"  ┌─{title}{'─' * max(0, inner - len(title) - 1)}┐")
    for number in range(max(len(lines), len(beside))):
        cells = lines[number] if number < len(lines) else ("", "", "", "")
        text = "  ".join(f"{cell:<{widths[c]}}" for c, cell in enumerate(cells))
        band = f"  {beside[number]}" if number < len(beside) else ""
        yield Text.assemble("  │ ", text, " " * (inner - len(text) - 2), " │", (band, "cyan"))
    yield Text(f"  └{'─' * inner}┘")
    if under:
        yield Text.assemble("    ", (under, "cyan"))


def _bands_beside(stack: Stack) -> list[str]:
    if stack.shared:
        return ["one block, shared"]
    if stack.depth < TILED_FROM:
        return []
    return [f"{n:<5}{index_ranges(BANDS[n].indices(stack.depth))}" for n in ("low", "mid", "high")]


def _by_layer(found: ModelMap, stack: Stack) -> dict[int, list[Slot]]:
    layers: dict[int, list[Slot]] = {}
    for slot in found.slots:
        if slot.stack == stack.path:
            layers.setdefault(slot.layer, []).append(slot)
    return layers


def _signature(slots: Sequence[Slot]) -> tuple[Any, ...]:
    return tuple((s.tail, s.roles, s.in_features, s.out_features, s.copies) for s in slots)


def _layer_table(found: ModelMap, stack: Stack) -> Table:
    """Layers that are alike in a row: what they hold, and their parameters."""
    table = _table("layers", "holds", "a layer", "in all", right=2)
    groups: dict[tuple[Any, ...], list[int]] = {}
    layers = _by_layer(found, stack)
    for layer in range(stack.depth if not stack.shared else max(layers, default=0) + 1):
        groups.setdefault(_signature(layers.get(layer, [])), []).append(layer)
    inside: Counter[int] = Counter()
    for row in found.uncovered:
        if row.path.startswith(stack.path + "."):
            first = row.path[len(stack.path) + 1 :].split(".")[0]
            if first.isdigit():
                inside[int(first)] += row.params
    for indices in groups.values():
        slots = layers.get(indices[0], [])
        holds = "; ".join(_holding(slots)) or "nothing that plays a role"
        sizes = [sum_params(layers.get(i, [])) + inside[i] for i in indices]
        each = count(sizes[0]) if len(set(sizes)) == 1 else f"about {short(sizes[0])}"
        table.add_row(f"  {index_ranges(tuple(indices))}", holds, each, count(sum(sizes)))
    return table


def _holding(slots: Sequence[Slot]) -> Iterator[str]:
    for part in dict.fromkeys(s.part for s in slots):
        roles = [r.value for r in Role if any(r in s.roles for s in slots if s.part is part)]
        yield f"{part.value} {' '.join(roles)}".strip()


def _role_table(found: ModelMap) -> Table:
    """Each role's weights: their spelling, shapes, and parameters over the whole model."""
    table = _table("role", "spelled", "shape", "weights", "parameters", right=2)
    groups: dict[tuple[Part, str, str, str], list[Slot]] = {}
    for slot in found.slots:
        roles = "+".join(r.value for r in slot.roles) or "no role"
        copies = f" × {slot.copies}" if slot.copies > 1 else ""
        shape = f"{count(slot.in_features)} → {count(slot.out_features)}{copies}"
        groups.setdefault((slot.part, roles, slot.tail, shape), []).append(slot)
    merged: dict[tuple[Part, str, str, str], list[Slot]] = {}
    for (part, roles, tail, shape), slots in groups.items():
        # the shortest name that is no other weight's: `q_proj`, but `mlp.c_proj`
        words = tail.split(".")
        endings = [".".join(words[-n:]) for n in range(1, len(words) + 1)]
        name = next(
            e for e in endings
            if e == tail or len({(p, r) for p, r, t, _ in groups if f".{t}".endswith(f".{e}")}) == 1
        )  # fmt: skip
        merged.setdefault((part, roles, name, shape), []).extend(slots)
    places = list(Part)
    for (part, roles, name, shape), slots in sorted(merged.items(), key=lambda g: places.index(g[0][0])):
        usual = part in (Part.SELF_ATTENTION, Part.FEED_FORWARD)
        where = roles if usual else f"{roles} [dim]{part.value}[/]"
        table.add_row(f"  {where}", name, shape, count(len(slots)), count(sum_params(slots)))
    return table


def _uncovered_table(found: ModelMap) -> Table:
    table = _table("what", "for example", "tensors", "parameters", right=2)
    groups: dict[str, list[Any]] = {}
    for row in found.uncovered:
        groups.setdefault(row.reason, []).append(row)
    for reason, rows in sorted(groups.items(), key=lambda g: -sum_params(g[1])):
        table.add_row(f"  {reason}", rows[0].path, count(len(rows)), count(sum_params(rows)))
    return table


# -- plan -----------------------------------------------------------------------------------


def show_plan(
    screen: Screen,
    plan: Plan,
    found: ModelMap,
    estimate: Estimate | None,
    fit: Fit | None,
    look: Look | None,
    command: str,
) -> None:
    """What would be adapted, in PEFT's words, what on, and what it costs; `command` does it."""
    screen.answer(f"[bold]{escape(plan.model)}[/]  {escape(_title(plan))}")
    screen.answer()
    for label, text in _plan_lines(plan, found):
        screen.line(label, text, answer=True)
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
        screen.line("time", _time_text(estimate), answer=True)
        for assumption in estimate.assumptions:
            screen.note(assumption, answer=True)
        if fit is not None and not fit.fits:
            screen.answer()
            _show_alternatives(screen, fit, estimate)
    for note in plan.notes:
        screen.note(note, answer=True)
    screen.line("next", command, answer=True)


def _title(plan: Plan) -> str:
    return f"{plan.preset} · {plan.spec} = layers {_layers_text(plan)}"


def _layers_text(plan: Plan) -> str:
    different = set(plan.layers.values())
    if len(different) == 1:
        return index_ranges(next(iter(different)))
    return "; ".join(f"{index_ranges(v)} of {k}" for k, v in plan.layers.items())


def _plan_lines(plan: Plan, found: ModelMap) -> Iterator[tuple[str, str]]:
    depth = sum(found.stack(path).depth for path in plan.layers)
    layers = len({(s.stack, s.layer) for s in plan.slots})
    roles = ", ".join(r.value for r in Role if any(r in s.roles for s in plan.slots)) or plan.preset
    yield (
        "adapts",
        f"{roles} in {layers} of {depth} layers: {count(len(plan.slots))} modules, "
        f"{count(plan.trainable_params)} parameters "
        f"({percent(plan.trainable_params, plan.total_params)} of {short(plan.total_params)}), "
        f"{bytes_text(plan.adapter_bytes)} saved",
    )
    cuts = [(path, cut) for path, cut in plan.cut.items() if cut > 0]
    if cuts:
        frozen = ", ".join(f"0–{cut - 1} of {path}" if cut > 1 else f"0 of {path}" for path, cut in cuts)
        yield "cut", f"layers {frozen} are frozen with nothing adapted under them: backward stops above"
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
    table = _table("role", "module", "shape", "layers", "trainable", right=1)
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
    return f"{bytes_text(estimate.memory.peak)} of the {bytes_text(fit.free)} that are free on {fit.device}"


def _time_text(estimate: Estimate) -> str:
    """`3 epochs, 4.1 M tokens, about 52 min on this machine, 31 min with the prefix cache`."""
    speed = f"{short(estimate.tokens_per_second)} tok/s"
    if estimate.tokens_per_epoch is None or estimate.seconds_per_epoch is None or estimate.epochs is None:
        return f"{speed}; name --data to have the time of an epoch"
    passes = f"{round(estimate.epochs, 2):g}"
    text = f"{passes} epoch{'s' if estimate.epochs != 1 else ''}, "
    text += f"{short(estimate.tokens_per_epoch * estimate.epochs)} tokens, about "
    plain = seconds_text(estimate.seconds_per_epoch * estimate.epochs)
    if estimate.prefix_cache.where == "off" or estimate.seconds is None:
        return f"{text}{plain} at {speed}"
    return f"{text}{seconds_text(estimate.seconds)} with the prefix replayed, {plain} without"


def _show_alternatives(screen: Screen, fit: Fit, estimate: Estimate) -> None:
    """The nearest settings that fit, the fastest first."""
    if not fit.alternatives:
        screen.note(
            "nothing that `lorafit train` can do today makes it fit: a smaller model, or a larger device",
            answer=True,
        )
        return
    table = _table("what fits", "peak", "tok/s", right=2)
    for option in fit.alternatives:
        table.add_row(f"  {option.flags}", bytes_text(option.peak), short(option.tokens_per_second))
    screen.answer(table)
    screen.answer()


def _memory_table(estimate: Estimate) -> Table:
    table = _table("what", "bytes", right=1, fold=9)
    memory = jsonable(estimate.memory)
    for name, size in memory.items():
        if size:
            table.add_row(f"  {name.replace('_', ' ')}", bytes_text(size))
    table.add_row("  [bold]peak[/]", f"[bold]{bytes_text(estimate.memory.peak)}[/]")
    return table


def show_matrix(screen: Screen, model: str, cells: Sequence[dict[str, Any]], free: int) -> None:
    """Strategy × band: what each trains, holds and takes; what does not fit is dim."""
    timed = any(cell.get("seconds_per_epoch") for cell in cells)
    last = "epoch" if timed else "tok/s"
    table = _table(
        "preset", "layers", "trainable", "adapter", "peak", last, "replayed" if timed else "", right=5
    )
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
            row = [f"[dim]{text}[/]" for text in row]
        table.add_row(f"  {name}", *row)
    screen.answer(f"[bold]{escape(model)}[/]  every strategy in every band, against {bytes_text(free)} free")
    screen.answer()
    screen.answer(table)
    if any("error" not in cell and cell["peak_memory"] > free for cell in cells):
        screen.note(f"dim: more than the {bytes_text(free)} that are free", answer=True)
    for error in sorted(set(errors)):
        screen.note(error, answer=True)


def show_presets(screen: Screen, presets: Iterable[Preset]) -> None:
    """What there is to choose from: the strategies, the roles, the bands."""
    table = _table("preset", "adapts", "for", fold=2)
    for preset in presets:
        adapts = ", ".join(r.value for r in preset.roles)
        table.add_row(
            f"  {preset.name}", adapts if len(preset.roles) < 7 else "all seven", preset.description
        )
    screen.answer(table)
    screen.answer()
    roles = _table("role", "what it does")
    for role, meaning in MEANING.items():
        roles.add_row(f"  {role.value}", meaning)
    screen.answer(roles)
    screen.answer()
    bands = _table("band", "of 12", "of 32", "said to hold", fold=3)
    for name in ("low", "mid", "high"):
        band = BANDS[name]
        bands.add_row(f"  {name}", index_ranges(band.indices(12)), index_ranges(band.indices(32)), band.about)
    screen.answer(bands)
    screen.note("what the bands hold is folklore, disputed in print: measure on your own data", answer=True)


# -- train ----------------------------------------------------------------------------------


def show_header(screen: Screen, plan: Plan, found: ModelMap, config: RunConfig) -> None:
    """The plan, before a weight is read."""
    size = f"{found.stacks[0].depth} layers × {found.hidden_size}" if found.stacks else found.family
    screen.say(
        f"[bold]lorafit {__version__}[/]  {escape(found.model)} ({size}, {short(found.total_params)})  "
        f"{escape(_title(plan))}"
    )
    for label, text in _plan_lines(plan, found):
        if label in ("adapts", "cut"):
            screen.line(label, text)
    for note in plan.notes:
        screen.note(note)


def show_data(screen: Screen, config: RunConfig, look: Look) -> None:
    """The rows, and the settings derived from them."""
    show_look(screen, look, answer=False)
    reason = config.why("learning_rate")
    why = f" ({reason})" if config.origin.get("learning_rate", "").startswith("derived") else ""
    batch = (
        f" ({config.why('batch_size')})" if config.origin.get("batch_size", "").startswith("derived") else ""
    )
    screen.line("rate", f"learning rate {figures(config.learning_rate or 0, 2)}{why}, {config.scheduler}")
    rows_text = f"{config.batch_size} rows"
    if config.accumulate > 1:
        rows_text += f" × {config.accumulate} micro-batches"
    screen.line("step", f"{rows_text}{batch}, rows of up to {config.max_length} tokens")


def show_look(screen: Screen, look: Look, answer: bool) -> None:
    """What the rows are like, what was done to get them, and three of them."""
    named = ", ".join(
        f"{s.name} ({s.format}{f', {s.weight:g} times' if s.weight != 1 else ''})" for s in look.sources
    )
    screen.line(
        "data",
        f"{named}: {_rows(look.rows)}, {count(look.tokens)} tokens, "
        f"{percent(look.supervised_tokens, look.tokens)} supervised; "
        f"{_rows(look.held_out_rows)} held out ({look.held_out_name})",
        answer,
    )
    at = look.lengths
    screen.line(
        "lengths",
        f"{count(at['min'])} to {count(at['max'])} tokens; half of the rows up to {count(at['p50'])}, "
        f"90 % up to {count(at['p90'])}, 99 % up to {count(at['p99'])}",
        answer,
    )
    for text in _findings(look):
        screen.note(text, answer)
    for row in look.samples:
        screen.line(
            "row",
            f"{row.where}: {count(row.tokens)} tokens, {count(row.supervised_tokens)} learned (┃)",
            answer,
        )
        for text, learned in row.pieces:
            _show_piece(screen, text, learned, answer)


def _rows(number: int) -> str:
    return f"{count(number)} row{'' if number == 1 else 's'}"


def _findings(look: Look) -> Iterator[str]:
    """What a person should know of the data before training on them."""
    yield from look.notes
    if look.cut:
        yield f"{count(look.cut)} examples are longer than a row and cut; --overflow split keeps all of them"
    if look.split:
        yield f"{count(look.split)} examples are longer than a row and split into several"
    if look.too_long:
        yield f"{count(look.too_long)} examples are longer than a row and dropped"
    if look.unsupervised:
        yield f"{count(look.unsupervised)} examples hold nothing to learn and are dropped, as {look.unsupervised_at}"
    if look.cut_away:
        yield f"{count(look.cut_away)} examples are dropped: nothing to learn is left of them once cut"
    if look.duplicates:
        yield f"{_rows(look.duplicates)} {'is' if look.duplicates == 1 else 'are'} the same as another"
    if look.overlap:
        yield (
            f"{count(look.overlap)} of the {_rows(look.held_out_rows)} held out "
            f"{'is' if look.overlap == 1 else 'are'} trained on too: the held-out loss flatters"
        )
    if look.no_end:
        yield (
            f"what is learned of {_rows(look.no_end)} ends with no end token: the model is not taught where to stop"
        )


PIECE_LINES = 3  # of a piece of a row that are shown


def _show_piece(screen: Screen, text: str, learned: bool, answer: bool) -> None:
    """A piece of a row behind a bar, a heavy one where it is learned; a long piece without its middle."""
    console = screen.out if answer else screen.talk
    bar, style = ("┃ ", "bold") if learned else ("│ ", "dim")
    room = max(20, console.width - LABEL - 4)
    shown = text.translate(CONTROLS).replace("\n", "⏎")
    lines = [shown[at : at + room] for at in range(0, len(shown), room)] or [""]
    if len(lines) > PIECE_LINES:
        lines = [*lines[: PIECE_LINES - 1], "…" + shown[-(room - 1) :]]
    for line in lines:
        row = Text.assemble(" " * (LABEL + 2), (bar, "" if learned else "dim"), (line, style))
        row.no_wrap, row.overflow = True, "crop"
        (screen.answer if answer else screen.say)(row)


class TrainView:
    """A run as it is watched: a live bar on a terminal, a line an epoch elsewhere."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.live = not screen.quiet and screen.talk.is_terminal
        self.progress: Progress | None = None
        self.task: Any = None
        self.epochs = 1
        self.loss = 0.0
        self.recent: list[Stepped] = []
        self.headed = False  # the epochs' table has its head

    def on(self, event: Event) -> None:
        match event:
            case Started():
                self._started(event)
            case Predicted():
                self.screen.line(
                    "predicted",
                    f"about {seconds_text(event.seconds)} of training steps, "
                    f"{bytes_text(event.peak_memory_bytes)} at the peak",
                )
            case PrefixCache():
                self.screen.line("prefix", _prefix_text(event))
            case Evaluated(step=0):
                loss = Loss(event.loss, event.tokens)
                self.screen.line(
                    "before", f"held-out loss {event.loss:.3f}, perplexity {figures(loss.perplexity)}"
                )
                self._open()
            case Evaluated() if self.progress is not None:
                self.screen.line("held out", f"step {event.step}: loss {event.loss:.3f}")
            case Stepped():
                self._stepped(event)
            case EpochDone() if not self.screen.quiet:
                self._epoch(event)
            case Saved():
                self.screen.line("saved", f"{event.path}{', the best so far' if event.best else ''}")
            case TrainReport():
                self.close()
            case _:
                pass

    def _started(self, event: Started) -> None:
        self.epochs, self.steps, self.at = event.epochs, event.steps, event.resumed_at
        plan = f"{event.epochs} epoch{'s' if event.epochs > 1 else ''}, {count(event.steps)} steps"
        if event.resumed_at:
            plan += f", going on from step {count(event.resumed_at)}"
        self.screen.line("plan", plan)
        for text in event.damaged:
            self.screen.note(f"passed over: {text}")

    def _open(self) -> None:
        self.screen.say()
        if not self.live:
            return
        self.progress = Progress(
            TextColumn("  epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=self.screen.talk,
            transient=True,
        )
        self.progress.start()
        self.task = self.progress.add_task(
            "", total=self.steps, completed=self.at, epoch=1, epochs=self.epochs, loss=0.0, speed="–"
        )

    def _stepped(self, event: Stepped) -> None:
        self.loss = event.loss if not self.loss else 0.9 * self.loss + 0.1 * event.loss
        self.recent = [*self.recent[-19:], event]
        if self.progress is not None:
            seconds = max(1e-9, sum(e.seconds for e in self.recent))
            speed = short(sum(e.tokens for e in self.recent) / seconds)
            learned = short(sum(e.supervised_tokens for e in self.recent) / seconds)
            speed = f"{speed} tok/s, {learned} learned"
            self.progress.update(
                self.task, completed=event.step, epoch=event.epoch, loss=self.loss, speed=speed
            )

    def _epoch(self, event: EpochDone) -> None:
        if not self.headed:
            self.headed = True
            self.screen.say(f"  {'epoch':<{LABEL}}{'loss':>7}{'tok/s':>9}{'learned/s':>11}{'MFU':>7}")
        share = f"{event.mfu:.0%}" if event.mfu is not None else ""
        note = "   prefix replayed" if event.replayed else ""
        learned = short(event.supervised_tokens / max(1e-9, event.seconds))
        self.screen.say(
            f"  {event.epoch:<{LABEL}}{event.loss:>7.3f}{short(event.tokens_per_second):>9}{learned:>11}"
            f"{share:>7}{note}"
        )

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _prefix_text(event: PrefixCache) -> str:
    if event.where == "off":
        return f"every pass runs all layers: {event.reason}"
    layers = f"layers 0–{event.layers - 1} run" if event.layers > 1 else "layer 0 runs"
    return (
        f"{layers} once a row, then {'are' if event.layers > 1 else 'is'} replayed "
        f"from {event.where} ({bytes_text(event.bytes)}): {event.reason}"
    )


def show_train_report(screen: Screen, report: TrainReport) -> None:
    """What came of the run, and what to do with it."""
    before, after = report.eval["before"], report.eval["after"]
    screen.line(
        "after",
        f"held-out loss {after.loss:.3f} ({after.loss - before.loss:+.3f}), perplexity {figures(after.perplexity)}",
        answer=True,
    )
    screen.line(
        "measured",
        f"{seconds_text(report.seconds)} in {count(report.steps)} steps, {short(report.tokens_per_second)} tok/s, "
        f"{count(report.trainable_params)} trainable parameters, peak {bytes_text(report.peak_memory_bytes)}",
        answer=True,
    )
    if report.predicted is not None:
        said = report.predicted
        screen.line(
            "predicted",
            f"{seconds_text(said.seconds)}: {_ratio(said.seconds, report.seconds)} of what it took; "
            f"{bytes_text(said.peak_memory_bytes)}: {_ratio(said.peak_memory_bytes, report.memory_growth_bytes)} "
            f"of the {bytes_text(report.memory_growth_bytes)} that the process grew by",
            answer=True,
        )
    if report.best is not None:
        screen.line(
            "best",
            f"held-out loss {report.best.loss:.3f} after step {report.best.step}: "
            f"{report.output}/checkpoint-{report.best.step}",
            answer=True,
        )
    screen.line("saved", report.output, answer=True)
    screen.line("page", f"{report.output}/{PAGE}", answer=True)
    name = report.output.rstrip("/").rpartition("/")[2]
    screen.line("next", f"lorafit eval {report.output}", answer=True)
    screen.line("", f"lorafit merge {report.output} -o {name}-merged", answer=True)


def show_caches(screen: Screen, folder: str, caches: Sequence[Any]) -> None:
    """What is kept on disk: a row each, and what they take together."""
    if not caches:
        screen.answer(f"no cache in {escape(folder)}")
        screen.note("lorafit train --prefix-cache disk makes one", answer=True)
        return
    table = _table("key", "of", "what", "tokens", "bytes", "made", right=3, fold=2)
    for kept in caches:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.made))
        table.add_row(
            f"  {kept.key[:8]}",
            kept.kind,
            escape(kept.about),
            count(kept.tokens),
            bytes_text(kept.bytes),
            made,
        )
    screen.answer(table)
    screen.line("together", f"{bytes_text(sum(kept.bytes for kept in caches))} in {folder}", answer=True)
    screen.line("next", f"lorafit cache --remove {caches[0].key[:8]}, or --remove all", answer=True)


def show_removed(screen: Screen, number: int, freed: int) -> None:
    """What was removed."""
    screen.line("removed", f"{number} cache{'' if number == 1 else 's'}, {bytes_text(freed)}", answer=True)


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "–"


# -- eval, merge ----------------------------------------------------------------------------


def show_eval(screen: Screen, report: EvalReport) -> None:
    """Base and adapters over the same rows, what changed the most, and what each says."""
    named = _short_names(report.paths)
    if report.base is not None:
        screen.answer(f"{count(report.rows)} rows, {count(report.tokens)} supervised tokens")
        screen.answer()
        screen.answer(_scores_table(report.base, report.adapters, exact=report.exact_rows > 0))
        screen.answer()
        for a, name in zip(report.adapters, named, strict=True):
            screen.line(name, _surely(a, report.rows), answer=True)
        if report.exact_rows:
            of = "all rows" if report.exact_rows == report.rows else _rows(report.exact_rows)
            screen.line("exact", f"said word for word, of {of} with one short answer", answer=True)
    if report.groups:
        screen.answer()
        screen.answer(_groups_table(report.by, report.groups, named))
    for group in report.also:
        screen.answer()
        screen.line("also", f"{group.name}: {_rows(group.rows)}, {count(group.tokens)} tokens", answer=True)
        screen.answer()
        screen.answer(_scores_table(group.base, group.adapters, exact=False))
        screen.answer()
        for a, name in zip(group.adapters, named, strict=True):
            screen.line(name, _surely(a, group.rows), answer=True)
    if report.benchmarks:
        names = {"base": "base", **dict(zip(report.paths, named, strict=True))}
        table = _table("task", "metric", "model", "value", "", right=2, fold=0)
        for b in report.benchmarks:
            error = "" if b.stderr is None else f"± {b.stderr:.4f}"
            table.add_row(f"  {escape(b.task)}", escape(b.metric), names[b.model], f"{b.value:.4f}", error)
        screen.answer()
        screen.answer(table)
    for a, name in zip(report.adapters, named, strict=bool(report.adapters)):
        for most, rows in ((True, a.best), (False, a.worst)):
            for row in rows:
                gained = row.adapter < row.base
                whose = f", {name}" if len(named) > 1 else ""
                screen.answer()
                screen.line(
                    "lost" if not gained else "gained" if most else "least",
                    f"{row.where}: loss {row.base:.3f} → {row.adapter:.3f} over {count(row.tokens)} tokens{whose}",
                    answer=True,
                )
                screen.line("", _clip(row.text, 200), answer=True)
    for number, sample in enumerate(report.samples, 1):
        screen.answer()
        screen.line(f"sample {number}", _clip(sample.prompt), answer=True)
        said = [("wanted", sample.reference)] if sample.reference else []
        for label, text in (*said, ("base", sample.base), *zip(named, sample.adapters, strict=True)):
            screen.line(label, _clip(text) or "(nothing)", answer=True)
    if report.page:
        screen.answer()
        screen.line("page", report.page, answer=True)
    for note in report.notes:
        screen.note(note, answer=True)


def _short_names(paths: Sequence[str]) -> list[str]:
    """What the adapters are called in the margin: by their place in the table where there are several."""
    return ["adapter"] if len(paths) == 1 else [f"adapter {n}" for n in range(1, len(paths) + 1)]


def _scores_table(base: Score, adapters: Sequence[AdapterScore], exact: bool) -> Table:
    """A line a model."""
    columns = ["model", "loss", "perplexity", "accuracy", *(["exact"] if exact else []), "difference"]
    table = _table(*columns, right=len(columns) - 1, fold=0)
    for label, score in (("base", base), *((a.path, a) for a in adapters)):
        said = [f"{score.loss:.4f}", figures(score.perplexity), f"{score.accuracy:.1%}"]
        if exact:
            said.append("" if score.exact is None else f"{score.exact:.1%}")
        differs = f"{score.delta:+.4f} ± {score.stderr:.4f}" if isinstance(score, AdapterScore) else ""
        table.add_row(f"  {escape(label)}", *said, differs)
    return table


def _surely(score: AdapterScore, rows: int) -> str:
    """How sure the difference is, by so many rows."""
    if rows < 2:
        return "one row says nothing of how sure the difference is"
    between = f"{score.low:+.4f} and {score.high:+.4f}"
    if score.low <= 0 <= score.high:
        return f"no difference that these rows show: with 95 % between {between}"
    better = "better" if score.high < 0 else "worse"
    return f"{better} than the base: with 95 % between {between}"


def _groups_table(by: str, groups: Sequence[Group], named: Sequence[str]) -> Table:
    """A line for each group and adapter."""
    table = _table(by, "rows", "tokens", "model", "loss", "accuracy", "difference", right=3, fold=0)
    for group in groups:
        base = group.base
        sizes = (count(group.rows), count(group.tokens))
        table.add_row(
            f"  {escape(_clip(group.name, 40)) or '(empty)'}",
            *sizes,
            "base",
            f"{base.loss:.4f}",
            f"{base.accuracy:.1%}",
            "",
        )
        for a, name in zip(group.adapters, named, strict=True):
            table.add_row(
                "", "", "", name, f"{a.loss:.4f}", f"{a.accuracy:.1%}", f"{a.delta:+.4f} ± {a.stderr:.4f}"
            )
    return table


def _clip(text: str, most: int = 400) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def show_merge(screen: Screen, report: MergeReport) -> None:
    """What was merged, and the proof."""
    screen.line(
        "merged",
        f"{count(report.adapted)} of {count(report.tensors)} tensors, {bytes_text(report.bytes)} "
        f"in {seconds_text(report.seconds)}",
        answer=True,
    )
    if report.verify is None:
        screen.note("not verified: --no-verify", answer=True)
    else:
        v = report.verify
        screen.line(
            "verified",
            f"against base + adapter over {count(v.tokens)} tokens: largest logit difference "
            f"{v.max_logit_diff:.2g} (rounding allows {v.tolerance:.2g}; the adapter itself moves them by "
            f"{v.adapter_logit_diff:.2g}), same most likely token {v.argmax_agreement:.2%}, "
            f"loss {v.merged_loss:.4f} ({v.merged_loss - v.loss:+.1g})",
            answer=True,
        )
        if v.max_logit_diff >= v.adapter_logit_diff > 0:
            screen.note(
                "the adapter moves the logits no more than rounding does: --dtype float32 keeps it whole",
                answer=True,
            )
    for note in report.notes:
        screen.note(note, answer=True)
    screen.line("saved", report.output, answer=True)
