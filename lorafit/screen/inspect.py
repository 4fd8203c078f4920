"""`lorafit inspect`: the layer diagram and the role and size of every weight."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.text import Text

from lorafit.estimate import ITEMSIZE
from lorafit.model import ModelMap, Part, Role, Slot, Stack, sum_params, weight_bytes
from lorafit.screen.console import Screen, Table, table_of, times_text
from lorafit.settings import BANDS, TILED_FROM
from lorafit.units import bytes_text, count, index_ranges, short

DRAWING_WIDTH = 58  # columns of the layer diagram with its columns


def show_map(screen: Screen, found: ModelMap, named: str) -> None:
    """The layer diagram, then every weight by layer and by role; the numbers of parameters add up.

    `named` is the model as the user wrote it, for the next command.
    """
    size = weight_bytes(found, ITEMSIZE.get(found.dtype, 4), found.quantised)
    kind = f"{found.quantised.kind} and {found.dtype}" if found.quantised else found.dtype
    screen.answer(
        f"[bold]{escape(found.model)}[/]  {found.architecture}  "
        f"{short(found.total_params)} parameters, {bytes_text(size)} in {kind}"
    )
    screen.answer()
    for line in _drawing(found, screen.out.width):
        screen.answer(line)
    screen.answer()
    for stack in found.text_stacks:
        screen.section(f"layers of {stack.path}", _layer_table(found, stack))
    screen.section("roles", _role_table(found))
    screen.section("weights without a role", _uncovered_table(found))
    covered = sum_params(s for s in found.slots if s.roles)
    total = table_of("", "parameters", right=1)
    total.add_row("  with a role", count(covered))
    total.add_row("  without a role", count(found.total_params - covered))
    total.add_row("  [bold]all[/]", f"[bold]{count(found.total_params)}[/]")
    screen.section("total", total)
    for note in found.notes:
        screen.note(note, answer=True)
    screen.command("next", shlex.join(["lorafit", "plan", named, "--preset", "ffn", "--layers", "high"]))


def _drawing(found: ModelMap, width: int) -> Iterator[Text]:
    """From text to logits: tokens, embedding, positions, blocks, head; one line each."""

    def row(label: str, shape: str = "", size: str = "", more: str = "") -> Text:
        if width < DRAWING_WIDTH:  # the columns go, then what the words say
            parts = "  ".join(part for part in (shape, size, more) if part)
            return Text.assemble("  ", (f"{label:<11}", "bold"), parts)
        return Text.assemble(
            "  ", (f"{label:<14}", "bold"), f"{shape:<22}{size:>9}", f"   {more}" if more else ""
        )

    arrow = Text("    │", style="dim")
    yield Text(f"  text → tokens → ids ({count(found.vocab_size)})")
    yield arrow
    tables = [u for u in found.uncovered if u.reason == "embedding" and "tower" not in u.path]
    main = max(tables, key=lambda u: u.params, default=None)
    if main is not None:
        yield row("embedding", times_text(*main.shape), short(main.params))
    learned = [u for u in found.uncovered if u.reason == "positions" and found.positions == "learned"]
    if learned and found.positions == "learned":
        yield row("positions", times_text(*learned[0].shape), short(learned[0].params), "learned")
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
        yield row("norm", f"{count(found.hidden_size)}", "", "final norm")
    head = [u for u in found.uncovered if u.reason == "head" and len(u.shape) == 2]
    size = "" if found.tied_head or not head else short(max(u.params for u in head))
    tied = "tied to the embedding" if found.tied_head else ""
    yield row("head", f"{count(found.hidden_size)} → {count(found.vocab_size)}", size, tied)
    yield Text("    │", style="dim")
    yield Text("  logits")


def _block(found: ModelMap, stack: Stack, width: int) -> Iterator[Text]:
    """One block of a stack in a box, its bands beside it, or under it on a narrow terminal."""
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
    lines.append((f"{norms} norms" if norms else "", "", "", f"{short(size)} per block"))
    widths = [max(len(line[c]) for line in lines) for c in range(4)]
    inner = sum(widths) + 8
    kinds = len(set(map(_signature, layers.values())))
    title = f" block × {stack.depth}" + (f", {stack.name}" if len(found.text_stacks) > 1 else "")
    title += f", the most common of {kinds} kinds " if kinds > 1 else " "
    beside = _bands_beside(stack)
    under = ""
    if inner + 18 > width:
        beside, under = [], "   ".join(" ".join(band.split()) for band in beside)
    if inner + 5 > width:  # a narrow terminal: the part of the block, then its roles and shapes
        yield Text(f"  ┌─{title}─")
        for label, roles, shape, more in lines:
            first = "  ".join(text for text in (label, more) if text)
            for text in (first, f"  {roles}  {shape}" if roles else ""):
                if text:
                    yield Text.assemble("  │ ", text)
        yield Text("  └─")
        if under:
            yield Text.assemble("    ", (under, "cyan"))
        return
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
    """Identical layers on one line: what they hold, and their parameters."""
    table = table_of("layers", "holds", "per layer", "total", right=2)
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
        holds = "; ".join(_holding(slots)) or "no weight with a role"
        sizes = [sum_params(layers.get(i, [])) + inside[i] for i in indices]
        each = count(sizes[0]) if len(set(sizes)) == 1 else f"about {short(sizes[0])}"
        table.add_row(f"  {index_ranges(tuple(indices))}", holds, each, count(sum(sizes)))
    return table


def _holding(slots: Sequence[Slot]) -> Iterator[str]:
    for part in dict.fromkeys(s.part for s in slots):
        roles = [r.value for r in Role if any(r in s.roles for s in slots if s.part is part)]
        yield f"{part.value} {' '.join(roles)}".strip()


def _role_table(found: ModelMap) -> Table:
    """Each role's weights: their names, shapes, and parameters over the whole model."""
    table = table_of("role", "module", "shape", "weights", "parameters", right=2)
    groups: dict[tuple[Part, str, str, str], list[Slot]] = {}
    for slot in found.slots:
        roles = "+".join(r.value for r in slot.roles) or "no role"
        copies = f" × {slot.copies}" if slot.copies > 1 else ""
        shape = f"{count(slot.in_features)} → {count(slot.out_features)}{copies}"
        groups.setdefault((slot.part, roles, slot.tail, shape), []).append(slot)
    merged: dict[tuple[Part, str, str, str], list[Slot]] = {}
    for (part, roles, tail, shape), slots in groups.items():
        # the shortest name that no other weight has: `q_proj`, but `mlp.c_proj`
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
    table = table_of("what", "example", "tensors", "parameters", right=2)
    groups: dict[str, list[Any]] = {}
    for row in found.uncovered:
        groups.setdefault(row.reason, []).append(row)
    for reason, rows in sorted(groups.items(), key=lambda g: -sum_params(g[1])):
        table.add_row(f"  {reason}", rows[0].path, count(len(rows)), count(sum_params(rows)))
    return table
