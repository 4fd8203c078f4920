"""A model on the meta device to its map: every parameter placed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.cache import cache_folder
from lorafit.model.checkpoint import check_head
from lorafit.model.classes import config_of, model_class, on_meta, task_of
from lorafit.model.map import MapCache, ModelMap, Slot, Stack, Uncovered
from lorafit.model.quantised import stored_quantisation
from lorafit.model.roles import (
    ATTENTIONS,
    DEFAULT_PARTS,
    FEED_FORWARDS,
    ROUTERS,
    Part,
    Role,
    bare_part,
    place_of,
    roles_of,
    with_fusion,
)
from lorafit.model.sizes import ModuleTree, first_in, positions_of, sizes_of
from lorafit.model.source import ModelSource, find
from lorafit.system import without_collecting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def map_of(config_or_path: PreTrainedConfig | str | os.PathLike[str], name: str = "") -> ModelMap:
    """The map of a model, from a transformers config, a folder, a `config.json` or a hub id.

    No weight is read. `config.architectures` decides the class (see `model_class`). Maps of
    named models are kept, by their config's content, in the cache folder.

    Raises RequestError when there is no such model or it cannot be built.
    """
    if isinstance(config_or_path, (str, os.PathLike)):
        return chart_of(find(str(config_or_path)))
    config = config_or_path
    cls = model_class(config)
    return chart(on_meta(cls, config), config, name or config.name_or_path or config.model_type)


def chart_of(source: ModelSource) -> ModelMap:
    """The map of a model that was found; from the cache where its config was seen before."""
    maps = MapCache(cache_folder() / "maps")
    key = maps.key(source.config)
    found = maps.get(key, source.name)
    if found is None:
        with without_collecting():
            config = config_of(source)
            found = chart(on_meta(model_class(config), config), config, source.name)
        maps.put(key, found)
    if source.local and not found.tied_head:
        heads = [row.path for row in found.uncovered if row.reason == "head" and "." in row.path]
        check_head(source.name, Path(source.place), heads, found.modules)
    return found


def _lists_of_blocks(tree: ModuleTree) -> Iterator[tuple[str, int]]:
    """The outermost lists whose members are made of parts: (path, members). Lists of lists are entered."""
    import torch

    taken: list[str] = []
    for path, module in tree.modules.items():
        if not isinstance(module, torch.nn.ModuleList) or any(path.startswith(t + ".") for t in taken):
            continue
        members = list(module)
        if not members or all(isinstance(m, torch.nn.ModuleList) for m in members):
            continue
        if all(next(m.children(), None) is None for m in members):  # a list of plain layers: no blocks
            continue
        taken.append(path)
        yield path, len(members)


def _kind(module: torch.nn.Module) -> str:
    """`linear`, `conv1d`, `conv`, or empty for a module that is no adaptable weight."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Conv1d):
        plain = module.kernel_size == (1,) and module.groups == 1
        return "conv" if plain else ""
    return ""


def _in_out(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(in_features, out_features) of a weight of that kind and shape."""
    return (shape[0], shape[1]) if kind == "conv1d" else (shape[1], shape[0])


@dataclass(slots=True)
class _Draft:
    """A slot in the making, with the container it stands in, to be compared with its neighbours."""

    slot: Slot
    container: str
    names: list[str]


@dataclass(slots=True)
class _Placing:
    """A model's parameters, each placed as it is met: a slot in the making, unplaced, or uncovered."""

    tree: ModuleTree
    lists: dict[str, int]  # the lists of blocks, by path
    head: str
    owners: dict[int, str] = field(default_factory=dict)  # tensor -> the parameter that counts it
    drafts: list[_Draft] = field(default_factory=list)
    unplaced: list[Slot] = field(default_factory=list)
    uncovered: list[Uncovered] = field(default_factory=list)

    def place(self, path: str, module: torch.nn.Module) -> None:
        """The parameters that a module holds itself."""
        own = [(n, p) for n, p in module._parameters.items() if p is not None]
        if not own:
            return
        kind = _kind(module)
        stack = next((s for s in self.lists if path.startswith(s + ".")), "")
        layer = int(path[len(stack) + 1 :].split(".")[0]) if stack else -1
        fresh = {n: p for n, p in own if id(p) not in self.owners}
        shared = {n: self.owners[id(p)] for n, p in own if id(p) in self.owners}
        for n, p in fresh.items():
            self.owners[id(p)] = f"{path}.{n}" if path else n
        tower = self.tree.tower(path) if path else None
        if kind and stack:
            params = sum(p.numel() for p in fresh.values())
            shape = tuple(own[[n for n, _ in own].index("weight")][1].shape)
            draft = _draft(self.tree, path, stack, layer, kind, *_in_out(kind, shape[:2]), tower)
            tied = shared.get("weight", "").removesuffix(".weight")
            self._place_weight(draft, replace(draft.slot, params=params, shared_with=tied), shape)
            return
        for n, p in fresh.items():
            full = f"{path}.{n}" if path else n
            shape = tuple(p.shape)
            slot = _bare_slot(self.tree, module, path, n, shape, stack, layer, tower) if stack else None
            if slot is not None:
                self.drafts.append(_Draft(slot, path, full.split(".")))
            else:
                why = _reason(module, path, n, self.head, tower)
                self.uncovered.append(Uncovered(full, p.numel(), why, shape))

    def _place_weight(self, draft: _Draft, slot: Slot, shape: tuple[int, ...]) -> None:
        if slot.roles or slot.part in (Part.ROUTER, Part.LINEAR_ATTENTION, Part.STATE_SPACE):
            self.drafts.append(replace(draft, slot=slot))
        else:
            self.unplaced.append(slot)
            self.uncovered.append(Uncovered(slot.path, slot.params, _why_unplaced(slot), shape))


# What configs call their activation.
ACTIVATIONS = (
    "hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation", "feed_forward_proj",
    "ffn_act_fn",
)  # fmt: skip


def chart(model: PreTrainedModel, config: PreTrainedConfig, name: str) -> ModelMap:
    """The map of a model that stands on any device (the meta device will do)."""
    tree = ModuleTree(model)
    head = _head_path(tree)
    placing = _Placing(tree, dict(_lists_of_blocks(tree)), head)
    for path, module in tree.modules.items():
        placing.place(path, module)
    slots = _fusions(placing.drafts)
    used = {slot.stack for slot in (*slots, *placing.unplaced)}
    text = config.get_text_config()
    stacks = _stacks(tree, placing.lists, {s.stack for s in slots}, config)
    # a weight in a stack without any slot lies in no layer that can be chosen
    unplaced = [s for s in placing.unplaced if s.stack in {stack.path for stack in stacks} & used]
    held = stored_quantisation(config.to_dict())
    return ModelMap(
        model=name,
        family=config.model_type,
        architecture=type(model).__name__,
        task=task_of(type(model), config),
        stacks=stacks,
        **sizes_of(tree, config, text, slots, stacks),  # type: ignore[arg-type]  # all of them are numbers
        activation=str(first_in(text, *ACTIVATIONS) or ""),
        positions=positions_of(tree, text),
        tied_head=head in _tied(tree, placing.owners, head),
        dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        total_params=sum(p.numel() for p in model.parameters()),
        slots=tuple(slots),
        uncovered=tuple(placing.uncovered),
        unplaced=tuple(unplaced),
        modules=tuple(path for path in tree.modules if path),
        reinterpreted=_reinterpreted(config.model_type, slots),
        quantisable=tuple(_quantisable(tree, config, None if held else slots)),
        quantised=held,
    )


def _quantisable(tree: ModuleTree, config: PreTrainedConfig, slots: Sequence[Slot] | None) -> Iterator[str]:
    """The linear layers that are quantised: the text's weights that play a role in `slots`, or
    without them all that transformers takes for a checkpoint that is quantised already."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    stored: Any = getattr(config, "quantization_config", None)
    skipped = stored.get("llm_int8_skip_modules") if isinstance(stored, dict) else None
    kept = getattr(tree.model, "_keep_in_fp32_modules", None)
    patterns = HfQuantizer.get_modules_to_not_convert(tree.model, skipped, kept)
    parts = DEFAULT_PARTS | {Part.CROSS_ATTENTION}
    text = None if slots is None else {s.path for s in slots if s.roles and s.part in parts}
    for path, module in tree.modules.items():
        linear = isinstance(module, Conv1D) or type(module) is torch.nn.Linear
        if linear and (text is None or path in text) and should_convert_module(path, patterns):
            yield path


def _containers(tree: ModuleTree, path: str, stack: str, layer: int, inside: bool) -> list[tuple[str, str]]:
    """(name, class) of the block, then of each module between it and the weight; with `inside`,
    the module at `path` is a container too (the weight is a bare tensor in it)."""
    block = f"{stack}.{layer}"
    found = [(stack.rpartition(".")[2], type(tree.modules[block]).__name__)]
    between = path[len(block) + 1 :].split(".") if path != block else []
    if not inside:
        between = between[:-1]
    here = block
    for name in between:
        here = f"{here}.{name}"
        found.append((name, type(tree.modules[here]).__name__))
    return found


def _draft(
    tree: ModuleTree,
    path: str,
    stack: str,
    layer: int,
    kind: str,
    in_features: int,
    out_features: int,
    tower: Part | None,
) -> _Draft:
    containers = _containers(tree, path, stack, layer, inside=False)
    block = f"{stack}.{layer}"
    names = [stack.rpartition(".")[2], *path[len(block) + 1 :].split(".")] if path != block else [""]
    part = place_of(containers) or bare_part(names[1:] or names)
    container = path.rpartition(".")[0]
    siblings = {n for n, _ in tree.modules[container].named_children()}
    roles: tuple[Role, ...] = ()
    if names[-1] in ROUTERS and part in FEED_FORWARDS:
        part = Part.ROUTER
    else:
        roles = _gated(roles_of(names[1:] or names, part), names[-1], siblings)
        if names[-1] == "c_attn" and "q_attn" in siblings:  # GPT-2's cross-attention
            roles = (Role.K, Role.V)
    return _Draft(
        Slot(path, roles, tower or part or Part.OTHER, stack, layer, in_features, out_features, kind, 0),
        container,
        names,
    )


def _bare_slot(
    tree: ModuleTree,
    module: torch.nn.Module,
    path: str,
    name: str,
    shape: tuple[int, ...],
    stack: str,
    layer: int,
    tower: Part | None,
) -> Slot | None:
    """A slot for a bare tensor: experts of three dimensions, routers of two; else None.

    PEFT adapts these as `target_parameters`. Experts lie as (copies, in, out) in a module that
    says `is_transposed`, else as (copies, out, in); DBRX lays them under one another as a matrix,
    its `down` by rows of its input.
    """
    containers = _containers(tree, path, stack, layer, inside=True)
    part = place_of(containers)
    block = f"{stack}.{layer}"
    names = path[len(block) + 1 :].split(".")
    if name != "weight":
        names = [*names, name]
    full = f"{path}.{name}"
    size = 1
    for extent in shape:
        size *= extent
    if part is Part.ROUTER and len(shape) == 2 and name == "weight":
        return Slot(full, (), tower or part, stack, layer, shape[1], shape[0], "parameter", size)
    if part not in (Part.EXPERTS, Part.SHARED_EXPERTS) or len(shape) not in (2, 3):
        return None
    holder = place_of([c for c in containers if c[0] != "experts"][:-1])
    roles = _gated(roles_of(names, part, holder), name, {n for n, _ in module.named_parameters()})
    if not roles or (len(shape) == 2 and name == "weight"):  # a matrix of that name is a layer's own
        return None
    *stacked, rows, columns = shape
    if getattr(module, "is_transposed", False) or (roles == (Role.DOWN,) and not stacked):
        rows, columns = columns, rows
    copies = stacked[0] if stacked else 1
    return Slot(full, roles, tower or part, stack, layer, columns, rows, "parameter", size, copies)


def _gated(roles: tuple[Role, ...], name: str, siblings: set[str]) -> tuple[Role, ...]:
    """`w1` is the gate where a `w3` or `v1` stands beside it, else what its spelling says."""
    return (Role.GATE,) if name.lower() == "w1" and siblings & {"w3", "v1"} else roles


def _fusions(drafts: list[_Draft]) -> list[Slot]:
    """The slots, each `up` compared with the `down` nearest to it: in its container, else its block."""
    near: dict[tuple[str, int, str], int] = {}
    far: dict[tuple[str, int, Part], int] = {}
    for draft in drafts:
        slot = draft.slot
        if Role.DOWN in slot.roles:
            near.setdefault((slot.stack, slot.layer, draft.container), slot.in_features)
            far.setdefault((slot.stack, slot.layer, slot.part), slot.in_features)
    found = []
    for draft in drafts:
        slot = draft.slot
        inner = near.get((slot.stack, slot.layer, draft.container)) or far.get(
            (slot.stack, slot.layer, slot.part)
        )
        found.append(replace(slot, roles=with_fusion(slot.roles, slot.out_features, inner)))
    return found


def _why_unplaced(slot: Slot) -> str:
    if slot.part in ATTENTIONS:
        return f"{slot.part.value}: a spelling no rule knows"
    if slot.part is Part.OTHER:
        return "a weight that plays none of the seven roles"
    return f"{slot.part.value}: no role"


def _head_path(tree: ModuleTree) -> str:
    """The module that makes the logits, or empty."""
    head = tree.model.get_output_embeddings()
    return next((path for path, module in tree.modules.items() if module is head and path), "")


def _tied(tree: ModuleTree, owners: dict[int, str], head: str) -> set[str]:
    """{head} when its weight is another module's too."""
    weight = getattr(tree.modules.get(head), "weight", None) if head else None
    if weight is None:
        return set()
    return set() if owners.get(id(weight)) == f"{head}.weight" else {head}


def _reason(module: torch.nn.Module, path: str, name: str, head: str, tower: Part | None) -> str:
    """What a parameter without a role is, in a word."""
    import torch

    low = path.lower()
    if head and (path == head or path.startswith(head + ".")):
        return "head"
    if isinstance(module, torch.nn.Embedding):
        return "positions" if re.search(r"position|wpe|pos_emb|relative", low) else "embedding"
    if re.search(r"norm|ln_|layernorm", type(module).__name__.lower() + low.rpartition(".")[2]):
        return "norm"
    if name.endswith("bias"):
        return "bias"
    if re.search(r"position|pos_emb", f"{low}.{name.lower()}"):
        return "positions"
    if tower:
        return f"{tower.value} tower"
    if re.search(r"(^|\.)(lm_head|cls|predictions|generator|vocab\w*|pooler)(\.|$)", low):
        return "head"
    return "no rule places it"


def _stacks(
    tree: ModuleTree, lists: dict[str, int], used: set[str], config: PreTrainedConfig
) -> tuple[Stack, ...]:
    """The stacks that hold a slot, each with a name of its own."""
    found = []
    for path, members in lists.items():
        if path not in used:
            continue
        tower = tree.tower(path)
        # ALBERT: a few groups of layers, run until the depth is reached
        shared = hasattr(config, "num_hidden_groups") and tower is None
        depth = config.num_hidden_layers if shared else members
        found.append(Stack("", path, depth, tower.value if tower else "text", shared))
    names: dict[str, str] = {}
    generic = {"model", "transformer", "module", "base_model"}
    for stack in found:
        parents = stack.path.split(".")
        choices = [p for p in reversed(parents[:-1]) if p not in generic and not p.isdigit()]
        short = choices[0] if choices else parents[-1]
        same = [s for s in found if s.path.rpartition(".")[0] == stack.path.rpartition(".")[0]]
        if len(same) > 1:
            short = parents[-1]
        if short in names.values():
            short = ".".join(p for p in parents if p not in generic)
        names[stack.path] = short
    return tuple(replace(stack, name=names[stack.path]) for stack in found)


def _reinterpreted(kind: str, slots: list[Slot]) -> tuple[str, ...]:
    """The names of linear layers that PEFT takes for expert parameters in this family.

    peft.utils.transformers_weight_conversion rewrites them in any LoraConfig it is given,
    full names included (peft 0.21); looked up only where there are experts, since it costs
    peft's import.
    """
    if not any(s.kind == "parameter" and s.part is Part.EXPERTS for s in slots):
        return ()
    from peft.utils import transformers_weight_conversion as conversion

    base = vars(conversion)["_MODEL_TO_CONVERSION_PATTERN"].get(kind)
    if not conversion._MOE_FUSED_TARGETS.get(base):
        return ()
    return tuple(conversion._MOE_TARGET_MODULE_MAPPING.get(base, ()))
