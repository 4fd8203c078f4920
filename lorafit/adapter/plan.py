"""What will be adapted: a strategy and a band, resolved on one model to a list of full names.

`resolve` is the only way to a plan; `plan` prints what it returns and `train` does it. The
plan is written for PEFT as `target_modules` and `layers_to_transform` where those denote
exactly its modules (peft_names.py), else as the full names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafit.adapter.peft_names import Spelling, pattern_value, spell
from lorafit.adapter.plan_checks import (
    bare_layers,
    check_patterns,
    check_peft_can,
    check_rank,
    fused_notes,
    missing_roles,
    no_role,
    quantised_notes,
)
from lorafit.errors import RequestError, closest
from lorafit.model import (
    DEFAULT_PARTS,
    ModelMap,
    Part,
    Role,
    Slot,
    Stack,
    Uncovered,
)
from lorafit.settings import LayerChoice, Lora, Preset, RunConfig
from lorafit.units import index_ranges

ADAPTER_ITEMSIZE = 4  # PEFT keeps adapters in float32, whatever the base


@dataclass(frozen=True, slots=True)
class Target:
    """The plan in LoraConfig's words; None where the field is to be left out.

    `target_modules` is empty, not None, when only bare parameters are adapted: PEFT would put
    its own default modules in the place of None.
    """

    target_modules: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...] | None
    target_parameters: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer, frozen: which weights of which layers, what they cost, what to know about it.

    `layers` holds, per stack, the chosen indices; `cut` the lowest adapted layer of each stack
    that is adapted: all under it is frozen. `trainable_params` and `total_params` are counted as
    PEFT counts them: adapters belong to the total.
    """

    model: str
    preset: str
    spec: str
    layers: dict[str, tuple[int, ...]]
    roles: tuple[Role, ...]
    slots: tuple[Slot, ...]
    peft: Target
    lora: Lora
    trainable_params: int
    total_params: int
    cut: dict[str, int]
    notes: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The full names of everything adapted, in the model's order."""
        return tuple(slot.path for slot in self.slots)

    @property
    def adapter_bytes(self) -> int:
        return self.trainable_params * ADAPTER_ITEMSIZE

    @property
    def indices(self) -> tuple[int, ...]:
        """The chosen layers; those of all stacks together where there are several."""
        return tuple(sorted({index for layers in self.layers.values() for index in layers}))

    def as_json(self) -> dict[str, Any]:
        """The document of `plan --json`, without its estimate."""
        target = self.peft
        return {
            "model": self.model,
            "preset": self.preset,
            "layers": {"spec": self.spec, "indices": self.indices, "stacks": self.layers},
            "roles": self.roles,
            "target_modules": target.target_modules,
            "layers_to_transform": target.layers_to_transform,
            "layers_pattern": target.layers_pattern,
            "target_parameters": target.target_parameters,
            "modules": self.modules,
            "lora": self.lora,
            "trainable_params": self.trainable_params,
            "total_params": self.total_params,
            "trainable_fraction": self.trainable_params / self.total_params,
            "adapter_bytes": self.adapter_bytes,
            "cut": self.cut,
            "notes": self.notes,
        }


def lora_params(slot: Slot, lora: Lora) -> int:
    """Parameters LoRA adds to a slot: r * (d_in + d_out), for each copy (arXiv:2106.09685, sec. 4.1).

    DoRA adds its magnitudes, one per output feature (arXiv:2402.09353, eq. 5).
    """
    rank = int(pattern_value(lora.rank_pattern, slot.path, lora.r))
    added = rank * (slot.in_features + slot.out_features) * slot.copies
    return added + (slot.out_features if lora.use_dora else 0)


def resolve(
    model_map: ModelMap,
    preset: Preset,
    layers: str | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    stack: str | None = None,
    strict: bool = False,
) -> Plan:
    """The plan for a preset on a model.

    `layers` is a choice as bands.py spells it; None takes the preset's. `include` and `exclude`
    name parts beside the usual ones (self-attention, feed-forward, shared-experts, experts).
    `stack` picks one stack by name or path. `strict` refuses a fused weight that holds more
    than was asked for.

    Raises RequestError when a role, layer, part, stack or module is not there, when nothing
    would be adapted, and when PEFT could not adapt exactly this.
    """
    parts = _parts(include, exclude)
    choice = preset.choice(layers)
    stacks = _stacks(model_map, stack)
    candidates = (
        _named(model_map, preset.modules, stacks, parts, exclude)
        if preset.modules
        else _playing(model_map, preset.roles, stacks, parts)
    )
    notes: list[str] = []
    chosen = _layers(model_map, stacks, candidates, choice)
    slots = tuple(s for s in candidates if s.layer in chosen[s.stack])
    _check_chosen(model_map, preset, candidates, slots, chosen)
    check_patterns(preset.lora, slots)
    if preset.roles:
        notes += missing_roles(model_map, preset.roles, candidates, slots)
        notes += fused_notes(preset.roles, slots, strict)
    notes += bare_layers(model_map, chosen, slots, preset)
    check_peft_can(model_map, slots, preset.lora)
    notes += check_rank(slots, preset.lora)
    notes += model_map.notes

    linear = [s for s in slots if s.kind != "parameter"]
    bare = tuple(s.path for s in slots if s.kind == "parameter")
    spelling = _spelling(model_map, linear, chosen)
    trainable = sum(lora_params(s, preset.lora) for s in slots)
    extra, unfrozen = _beside(model_map, slots, preset.lora)
    if linear and spelling.layers_to_transform is None:
        notes.append("PEFT gets the full names: no short spelling denotes exactly these modules")
    cut = {path: min(s.layer for s in slots if s.stack == path) for path in {s.stack: 0 for s in slots}}
    return Plan(
        model=model_map.model,
        preset=preset.name,
        spec=choice.text,
        layers={path: chosen[path] for path in cut},
        roles=preset.roles,
        slots=slots,
        peft=Target(
            spelling.target_modules,
            spelling.layers_to_transform,
            spelling.layers_pattern,
            bare or None,
        ),
        lora=preset.lora,
        trainable_params=trainable + extra + unfrozen,
        total_params=model_map.total_params + trainable + extra,
        cut=cut,
        notes=tuple(dict.fromkeys(notes)),
    )


def planned(model_map: ModelMap, preset: Preset, config: RunConfig, layers: str | None = None) -> Plan:
    """The plan of a run's settings, or of another choice of `layers` with its other settings.

    Raises RequestError as `resolve` does, and for a base that cannot be quantised as they say.
    """
    notes = quantised_notes(model_map, preset.lora, config)
    made = resolve(
        model_map,
        preset,
        config.layers if layers is None else layers,
        include=config.include,
        exclude=config.exclude,
        stack=config.stack,
        strict=config.strict,
    )
    return replace(made, notes=(*made.notes, *notes))


def _check_chosen(
    model_map: ModelMap,
    preset: Preset,
    candidates: Sequence[Slot],
    slots: Sequence[Slot],
    chosen: dict[str, tuple[int, ...]],
) -> None:
    """Raises RequestError when the chosen layers hold nothing, or not a module that was named."""
    if not slots:
        where = f"layers {index_ranges(tuple(sorted({i for c in chosen.values() for i in c})))}"
        wanted = ", ".join(f"`{r}`" for r in preset.roles or preset.modules)
        there = sorted({s.layer for s in candidates})
        raise RequestError(
            f"{where} of `{model_map.model}` hold no weight for {wanted}",
            f"layers that do: {index_ranges(tuple(there))}",
        )
    for name in preset.modules:
        if not any(s.path == name or s.path.endswith(f".{name}") for s in slots):
            raise RequestError(
                f"module `{name}` lies in none of the chosen layers", "choose its layers too, or leave it out"
            )


def _parts(include: Sequence[str], exclude: Sequence[str]) -> frozenset[Part]:
    known = {part.value: part for part in Part}
    for word in (*include, *exclude):
        if word not in known:
            raise RequestError(f"`{word}` is no part of a model", closest(word, known))
    parts = (DEFAULT_PARTS | {known[w] for w in include}) - {known[w] for w in exclude}
    if not parts:
        raise RequestError("every part is excluded: nothing would be adapted")
    return frozenset(parts)


def _stacks(model_map: ModelMap, wanted: str | None) -> tuple[Stack, ...]:
    if not model_map.stacks:
        raise RequestError(f"`{model_map.model}` has no repeated blocks: there are no layers to choose from")
    if wanted is None:
        return model_map.stacks
    found = tuple(s for s in model_map.stacks if wanted in (s.name, s.path))
    if not found:
        names = {s.name for s in model_map.stacks}
        raise RequestError(f"`{model_map.model}` has no stack `{wanted}`", closest(wanted, names))
    return found


def _playing(
    model_map: ModelMap, roles: Iterable[Role], stacks: Sequence[Stack], parts: frozenset[Part]
) -> list[Slot]:
    """The slots of those parts that play one of the roles; a part none of whose weights has a
    role (a router, a state space) is taken whole, since it was included by name."""
    asked = set(roles)
    paths = {stack.path for stack in stacks}
    within = [s for s in model_map.slots if s.stack in paths and s.part in parts]
    with_roles = {s.part for s in model_map.slots if s.roles}
    found = [s for s in within if asked & set(s.roles) or (not s.roles and s.part not in with_roles)]
    if not found:
        raise no_role(model_map, sorted(asked, key=list(Role).index), within)
    return found


def _named(
    model_map: ModelMap,
    names: Sequence[str],
    stacks: Sequence[Stack],
    parts: frozenset[Part],
    exclude: Sequence[str],
) -> list[Slot]:
    """The slots that literal module names mean: in the text, and in what was included."""
    paths = {stack.path: stack for stack in stacks}
    usable = [
        s
        for s in (*model_map.slots, *model_map.unplaced)
        if s.stack in paths
        and s.part.value not in exclude
        and (paths[s.stack].part == "text" or s.part in parts)
    ]
    found: dict[str, Slot] = {}
    for name in names:
        hits = [s for s in usable if s.path == name or s.path.endswith("." + name)]
        if not hits:
            outside = any(m == name or m.endswith("." + name) for m in model_map.modules)
            if outside:
                raise RequestError(
                    f"module `{name}` of `{model_map.model}` is no adaptable weight of a layer",
                    f"see `lorafit inspect {model_map.model}`",
                )
            raise RequestError(
                f"`{model_map.model}` has no module `{name}`",
                closest(name, {s.path.rpartition(".")[2] for s in usable}),
            )
        found.update({s.path: s for s in hits})
    order = {path: number for number, path in enumerate(model_map.modules)}
    return sorted(found.values(), key=lambda s: order.get(s.path, len(order)))


def _layers(
    model_map: ModelMap, stacks: Sequence[Stack], candidates: Sequence[Slot], choice: LayerChoice
) -> dict[str, tuple[int, ...]]:
    """The chosen layers of each stack that holds a candidate."""
    used = {slot.stack for slot in candidates}
    chosen: dict[str, tuple[int, ...]] = {}
    several = len(used) > 1
    for stack in stacks:
        if stack.path not in used:
            continue
        if stack.shared and choice.text != "all":
            raise RequestError(
                f"`{model_map.model}` runs one shared block {stack.depth} times: a choice of layers "
                "means nothing there",
                "use `--layers all`, which adapts the block for every pass",
            )
        if stack.shared:
            chosen[stack.path] = tuple(sorted({s.layer for s in candidates if s.stack == stack.path}))
            continue
        try:
            chosen[stack.path] = choice.indices(stack.depth)
        except RequestError as error:
            if not several:
                raise
            others = sorted({s.name for s in stacks if s.path in used} - {stack.name})
            raise RequestError(
                f"stack `{stack.name}`: {error.message}",
                f"{error.hint}; or --stack {others[0]}" if others else error.hint,
            ) from None
    return chosen


def _spelling(model_map: ModelMap, linear: Sequence[Slot], chosen: dict[str, tuple[int, ...]]) -> Spelling:
    used = {slot.stack for slot in linear}
    layers = {chosen[path] for path in used}
    shared = any(model_map.stack(path).shared for path in used)
    return spell(
        [s.path for s in linear],
        {s.tail for s in linear},
        () if shared or len(layers) != 1 else layers.pop(),
        {path.rpartition(".")[2] for path in used},
        model_map.modules,
    )


def _beside(model_map: ModelMap, slots: Sequence[Slot], lora: Lora) -> tuple[int, int]:
    """Parameters that train beside the low-rank ones: (copied by modules_to_save, unfrozen biases)."""
    rows: tuple[Slot | Uncovered, ...] = (*model_map.slots, *model_map.uncovered)
    saved = 0
    for name in lora.modules_to_save:
        copied = [m for m in model_map.modules if m.endswith(name)]  # PEFT's own rule
        held = [r for r in rows if any(f"{r.path}.".startswith(f"{m}.") for m in copied)]
        see = f"see `lorafit inspect {model_map.model}`"
        if not held:
            tied = " of its own: it is tied to another" if copied else ""
            raise RequestError(f"`{model_map.model}` has no module `{name}`{tied} (modules_to_save)", see)
        both = [s for s in slots if any(f"{s.path}.".startswith(f"{m}.") for m in copied)]
        if both:
            raise RequestError(
                f"modules_to_save `{name}` holds `{both[0].path}`, which the plan adapts",
                "choose one of the two",
            )
        saved += sum(r.params for r in held)
    if lora.bias == "none":
        return saved, 0
    adapted = {s.path for s in slots}
    biases = sum(
        s.params - s.in_features * s.out_features * s.copies
        for s in (*model_map.slots, *model_map.unplaced)
        if s.kind != "parameter" and (lora.bias == "all" or s.path in adapted)
    )
    if lora.bias == "all":
        # PEFT unfreezes every parameter with `bias` in its name, T5's relative positions too
        biases += sum(r.params for r in model_map.uncovered if "bias" in r.path)
    return saved, biases
