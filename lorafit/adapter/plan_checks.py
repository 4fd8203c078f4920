"""What a person should know of a plan, and what PEFT would do differently from it."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.adapter.peft_names import matches, pattern_value
from lorafit.errors import RequestError, closest
from lorafit.model import (
    ATTENTIONS,
    DEFAULT_PARTS,
    FEED_FORWARDS,
    ModelMap,
    Part,
    Role,
    Slot,
    held_as,
    quantised_params,
    sum_params,
)
from lorafit.settings import Lora, Preset, RunConfig, takes_from_base
from lorafit.units import index_ranges, percent, short

STARTS = (True, False, "gaussian", "orthogonal")  # that read no weight of the base


def needs_whole_base(lora: Lora) -> tuple[str, str] | None:
    """(what of these settings trains or reads whole weights of the base, the setting's name); None where none
    does."""
    if lora.modules_to_save:
        return f"`modules_to_save: {', '.join(lora.modules_to_save)}` trains", "modules_to_save"
    if lora.bias != "none":
        return f"`bias: {lora.bias}` trains", "bias"
    if lora.use_dora:
        return "DoRA reads", "use_dora"
    if lora.init_lora_weights not in STARTS:
        return f"`init_lora_weights: {lora.init_lora_weights}` reads", "init_lora_weights"
    return None


def no_role(model_map: ModelMap, roles: Sequence[Role], within: Sequence[Slot]) -> RequestError:
    names = ", ".join(f"`{r}`" for r in roles)
    word = "role" if len(roles) == 1 else "roles"
    feed = {Role.GATE, Role.UP, Role.DOWN}
    group, name = (FEED_FORWARDS, "feed-forward") if set(roles) <= feed else (ATTENTIONS, "attention")
    there = [r for r in Role if any(r in s.roles for s in within if s.part in group)]
    known = f"its {name} roles are " + ", ".join(f"`{r}`" for r in there) if there else ""
    elsewhere = sorted({s.part.value for s in model_map.slots if set(roles) & set(s.roles)})
    if not known and elsewhere:
        known = f"they stand in {', '.join(elsewhere)}: --include {elsewhere[0]}"
    see = f"see `lorafit inspect {model_map.model}`"
    return RequestError(
        f"no weight of `{model_map.model}` plays {word} {names}", f"{known}; {see}" if known else see
    )


def missing_roles(
    model_map: ModelMap, roles: Sequence[Role], candidates: Sequence[Slot], slots: Sequence[Slot]
) -> list[str]:
    """Notes on roles that are asked for and not there; an error where that was the point.

    A feed-forward without a gate is a common shape, and `ffn` there means up and down: said,
    not refused.
    """
    anywhere = {role for slot in candidates for role in slot.roles}
    here = {role for slot in slots for role in slot.roles}
    notes = []
    missing = [role for role in roles if role not in anywhere]
    if missing == [Role.GATE] and {Role.UP, Role.DOWN} & set(roles) & anywhere:
        notes.append("no gate: the feed-forward of this model is not gated")
    elif missing:
        raise no_role(model_map, missing, [s for s in model_map.slots if s.part in DEFAULT_PARTS])
    for role in roles:
        if role in anywhere and role not in here:
            notes.append(f"none of the chosen layers holds `{role}`")
    low_rank = {s.path.rpartition(".")[2] for s in slots} & {"q_b_proj", "kv_b_proj"}
    if low_rank:
        names = " and ".join(f"`{name}`" for name in sorted(low_rank, reverse=True))
        notes.append(f"latent attention: {names} make queries, keys and values of a compressed state")
    return notes


def fused_notes(roles: Sequence[Role], slots: Sequence[Slot], strict: bool) -> list[str]:
    """A note for each spelling of a fused weight that plays more than was asked for."""
    notes = {}
    for slot in slots:
        more = [r for r in slot.roles if r not in roles]
        if more and slot.roles:
            leaf = slot.path.rpartition(".")[2]
            asked = ", ".join(r.value for r in roles)
            also = ", ".join(r.value for r in more)
            notes[leaf] = f"asked {asked}; `{leaf}` also holds {also} and is adapted whole"
    if notes and strict:
        first = next(iter(notes.values())).removesuffix(" and is adapted whole")
        raise RequestError(f"--strict: {first}", "drop --strict, or ask for all that it holds")
    return list(notes.values())


def bare_layers(
    model_map: ModelMap, chosen: dict[str, tuple[int, ...]], slots: Sequence[Slot], preset: Preset
) -> list[str]:
    """A note for the chosen layers that hold nothing that was asked for: said, not skipped."""
    notes = []
    wanted = ", ".join(str(r) for r in preset.roles) or ", ".join(preset.modules)
    for path, layers in chosen.items():
        bare = tuple(i for i in layers if not any(s.stack == path and s.layer == i for s in slots))
        if bare:
            parts = sorted({s.part.value for s in model_map.slots if s.stack == path and s.layer in bare})
            holds = f" (they hold {', '.join(parts)})" if parts else ""
            notes.append(f"layers {index_ranges(bare)} of `{path}` hold none of {wanted}{holds}")
    return notes


def check_rank(slots: Sequence[Slot], lora: Lora) -> list[str]:
    """A note where a rank is more than a weight has rows or columns: more adds parameters and no more room.

    Raises RequestError when it is more than any of the weights can use.
    """
    ranks = {s.path: int(pattern_value(lora.rank_pattern, s.path, lora.r)) for s in slots}
    narrow = [s for s in slots if ranks[s.path] > min(s.in_features, s.out_features)]
    if not narrow:
        return []
    first = min(narrow, key=lambda s: min(s.in_features, s.out_features))
    width = min(first.in_features, first.out_features)
    shape = f"`{first.path}` is {first.in_features:,} → {first.out_features:,}"
    if len(narrow) == len(slots):
        most = max(min(s.in_features, s.out_features) for s in slots)
        raise RequestError(
            f"rank {ranks[first.path]:,} is more than any adapted weight can use: {shape}",
            f"--rank {most} at most",
        )
    leaf = first.path.rpartition(".")[2]
    return [f"rank {ranks[first.path]:,} is more than `{leaf}` can use, which has {width:,} rows or columns"]


def check_peft_can(model_map: ModelMap, slots: Sequence[Slot], lora: Lora) -> None:
    """Refuse what PEFT would do differently, or not at all."""
    bare = [s for s in slots if s.kind == "parameter"]
    if bare:
        asked = [
            name
            for name, on in (
                ("dropout", lora.dropout > 0),
                ("use_dora", lora.use_dora),
                ("bias", lora.bias != "none"),
            )
            if on
        ]
        if asked:
            part = bare[0].part.value
            raise RequestError(
                f"PEFT adapts expert parameters without {', '.join(asked)} (`{bare[0].path}`)",
                f"leave it out, or --exclude {part}",
            )
    renamed = [
        s
        for s in slots
        if s.kind != "parameter"
        and any(s.path == n or s.path.endswith("." + n) for n in model_map.reinterpreted)
    ]
    if renamed:
        parts = sorted({s.part.value for s in renamed})
        raise RequestError(
            f"PEFT takes `{renamed[0].path}` for expert parameters of every layer in family "
            f"`{model_map.family}`, and would not adapt it",
            f"--exclude {','.join(parts)}",
        )
    shared = [s for s in slots if s.shared_with]
    if shared:
        raise RequestError(
            f"`{shared[0].path}` is one tensor with `{shared[0].shared_with}`: two adapters on it "
            "would not merge",
            "choose roles or layers that do not share their weights; "
            f"see `lorafit inspect {model_map.model}`",
        )


def check_patterns(lora: Lora, slots: Sequence[Slot]) -> None:
    """Raises RequestError for a key of `rank_pattern` or `alpha_pattern` that names no chosen module: it would do
    nothing."""
    for name, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            if not any(matches(pattern, slot.path) for slot in slots):
                tails = {slot.path.rpartition(".")[2] for slot in slots}
                raise RequestError(
                    f"{name} names `{pattern}`, and no chosen module has that name", closest(pattern, tails)
                )


def quantised_notes(model_map: ModelMap, lora: Lora, config: RunConfig) -> list[str]:
    """What a quantised base quantises, and what it does not; nothing for a plain one.

    Raises RequestError where it cannot be trained so.
    """
    held = held_as(model_map, config.quantize)
    if held is None:
        return []
    held.check(config.dtype, config.device)
    what = f"a base in {held.kind}" if held.stored else f"--quantize {held.kind}"
    if not model_map.quantisable:
        raise RequestError(
            f"bitsandbytes can quantise no weight of `{model_map.model}`: its layers are of a kind of their own",
            "leave --quantize out",
        )
    start = lora.init_lora_weights
    if takes_from_base(start):
        raise RequestError(
            f"{what} does not go with a `{start}` start, which takes a part out of the base's weights",
            "init_lora_weights: true in the preset, or --quantize none",
        )
    whole = [
        n for n in lora.modules_to_save if any(f"{p}.".find(f"{n}.") >= 0 for p in model_map.quantisable)
    ]
    if whole:
        raise RequestError(
            f"{what} does not go with modules_to_save `{whole[0]}`: what is quantised cannot be trained whole",
            "adapt it, or leave it out of modules_to_save",
        )
    few, every = quantised_params(model_map), model_map.total_params
    experts = sum_params(s for s in model_map.slots if s.part is Part.EXPERTS and s.kind == "parameter")
    rest = f"{short(every - few)} stay in the base's dtype"
    if experts:
        rest += f", among them {short(experts)} of experts, whose tensors bitsandbytes does not take"
    return [
        f"{held.kind}: {short(few)} of {short(every)} parameters are quantised ({percent(few, every)}); {rest}"
    ]
