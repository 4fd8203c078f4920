"""From a model's name to its map: config, meta-device model, every parameter placed. And the model itself.

torch and transformers are imported where they are needed, not at the head of the file: a map that
was seen before is answered from the cache in a twentieth of the time their import takes.
Remote code is never run and never asked about: `trust_remote_code=False` everywhere.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit import demo
from lorafit.errors import RequestError, RunError
from lorafit.modelmap import MapCache, ModelMap, Slot, Stack, Uncovered, cache_folder
from lorafit.roles import (
    ATTENTIONS,
    FEED_FORWARDS,
    ROUTERS,
    Part,
    Role,
    bare_part,
    place_of,
    roles_of,
    tower_of,
    with_fusion,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@contextmanager
def without_collecting() -> Iterator[None]:
    """While torch and transformers are imported: what they make lives to the end, and looking for
    garbage among it takes a third of the time. It is left out of later searches too."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Source:
    """A model as it was named, and its config as it was found.

    `place` is what transformers' `from_pretrained` takes: a folder's absolute path or a hub id.
    """

    name: str
    place: str
    config: dict[str, Any]

    @property
    def local(self) -> bool:
        return Path(self.place).exists()


def find(model: str) -> Source:
    """The model that a person named: `demo`, a folder, a `config.json`, or a hub id.

    The network is touched only for a hub id. Raises RequestError when there is no such model,
    when its config cannot be read, or when it names no type that transformers knows.
    """
    if model == "demo":
        folder = demo.MODEL
        return Source("demo", str(folder), _read_config(folder / "config.json", "demo"))
    path = Path(model).expanduser()
    if path.is_file():
        return Source(_display_name(path.parent), str(path.resolve()), _read_config(path, model))
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            if (path / "adapter_config.json").is_file():
                raise RequestError(
                    f"`{model}` is an adapter, not a model", f"lorafit eval {model}, or lorafit merge {model}"
                )
            raise RequestError(f"`{model}` is no model: there is no config.json in it")
        return Source(_display_name(path), str(path.resolve()), _read_config(config, model))
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".json")
    if looks_local or not HUB_ID.fullmatch(model):
        raise RequestError(
            f"there is no model at `{model}`", "a model is a folder, a hub id as `owner/name`, or `demo`"
        )
    return Source(model, model, _hub_config(model))


def _display_name(folder: Path) -> str:
    return "demo" if folder.resolve() == demo.MODEL else folder.resolve().name


def _read_config(path: Path, model: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read `{path}`: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"`{path}` is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise RequestError(f"`{path}` is no model's config: it holds no JSON object")
    return data


def _hub_config(model: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(model, "config.json")
    except Exception as error:  # every kind of network and hub error has the same next step
        kind = type(error).__name__
        raise RequestError(
            f"`{model}` is no folder here, and the hub did not give it ({kind})",
            "check the name and the network; a model is a folder, a hub id as `owner/name`, or `demo`",
        ) from None
    return _read_config(Path(path), model)


def config_of(source: Source) -> PreTrainedConfig:
    """The transformers config. Raises RequestError for a type that transformers does not know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    data = source.config
    kind = data.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise _unknown_type(source, kind, list(CONFIG_MAPPING.keys()))
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(data))
    except Exception as error:  # a config class may raise anything on values it does not expect
        raise RequestError(
            f"the config of `{source.name}` is no `{kind}` config: {_first_line(error)}"
        ) from None


def _unknown_type(source: Source, kind: Any, known: list[str]) -> RequestError:
    """Why a config is refused, and the native type it looks like."""
    names = [str(n) for n in source.config.get("architectures") or []]
    stem = re.sub(r"(For|Model|LMHead).*", "", names[0]).lower() if names else str(kind or "").lower()
    squeezed = {name.replace("_", "").replace("-", ""): name for name in known}
    near = get_close_matches(stem, squeezed, n=1, cutoff=0.7) if stem else []
    like = f"it resembles the native type `{squeezed[near[0]]}`: set `model_type` to it" if near else ""
    if "auto_map" in source.config:
        what = "has no `model_type`" if kind is None else f"is of type `{kind}`, unknown to transformers"
        return RequestError(
            f"the config of `{source.name}` {what} and an `auto_map`: it wants remote code, "
            "which lorafit never runs",
            like or "convert it to a type that transformers has",
        )
    if kind is None:
        return RequestError(f"the config of `{source.name}` names no `model_type`", like)
    return RequestError(f"transformers does not know the model type `{kind}` of `{source.name}`", like)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"[:240]
    return lines[0][:240] if lines else type(error).__name__


# -- which class ----------------------------------------------------------------------------


def _mappings() -> tuple[tuple[str, dict[str, Any]], ...]:
    from transformers.models.auto import modeling_auto as auto

    return (
        ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("masked", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    )


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model: the config's `architectures` decide; without them the first of
    causal, seq2seq, masked that knows the type (masked first for an encoder that is no decoder).

    Raises RequestError when there is none.
    """
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and hasattr(found, "from_pretrained") and hasattr(found, "forward"):
            return found
    kind = config.model_type
    mappings = dict(_mappings())
    order = ["causal", "seq2seq", "masked"]
    # transformers gives BERT a causal head too, for its use as a decoder; it reads both ways still
    if kind in mappings["masked"] and not getattr(config, "is_decoder", False):
        order = ["masked", "causal", "seq2seq"]
    for task in order:
        if kind in mappings[task]:
            name = mappings[task][kind]
            return getattr(transformers, name if isinstance(name, str) else name[0])
    from transformers.models.auto import modeling_auto as auto

    for table in (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ):
        if kind in table:
            name = table[kind]
            return getattr(transformers, name if isinstance(name, str) else name[0])
    raise RequestError(f"transformers has no language model of type `{kind}`")


def task_of(cls: type, config: PreTrainedConfig) -> str:
    """`causal`, `masked` or `seq2seq`: how a model of that class is trained on text."""
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    for task, table in _mappings():
        names = {n for value in table.values() for n in ([value] if isinstance(value, str) else value)}
        if cls.__name__ in names and task == "masked":
            return "masked"
    masked = re.search(r"ForMaskedLM|ForPreTraining$", cls.__name__)
    return "masked" if masked and not getattr(config, "is_decoder", False) else "causal"


def on_meta(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: its shape without a byte of weights.

    Raises RequestError when the class cannot be built from the config.
    """
    import torch
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # a model class may raise anything on a config it does not expect
        raise RequestError(
            f"`{cls.__name__}` cannot be built from this config: {_first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)


# -- the map --------------------------------------------------------------------------------


def map_of(config_or_path: PreTrainedConfig | str | os.PathLike[str], name: str = "") -> ModelMap:
    """The map of a model, from a transformers config, a folder, a `config.json` or a hub id.

    No weight is read. `config.architectures` decides the class (see `model_class`). Maps of
    named models are kept, by their config's content, in the cache folder.

    Raises RequestError when there is no such model or it cannot be built.
    """
    if isinstance(config_or_path, (str, os.PathLike)):
        return survey(find(str(config_or_path)))
    config = config_or_path
    cls = model_class(config)
    return chart(on_meta(cls, config), config, name or config.name_or_path or config.model_type)


def survey(source: Source) -> ModelMap:
    """The map of a model that was found; from the cache where its config was seen before."""
    cache = MapCache(cache_folder() / "maps")
    key = cache.key(source.config)
    if found := cache.get(key, source.name):
        return found
    with without_collecting():
        config = config_of(source)
        found = chart(on_meta(model_class(config), config), config, source.name)
    cache.put(key, found)
    return found


@dataclass(slots=True)
class _Tree:
    """A model's modules by name, and the sharing of its tensors."""

    model: PreTrainedModel
    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    text_decoders: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())

    def ancestors(self, path: str) -> list[str]:
        names = path.split(".")
        return [".".join(names[:n]) for n in range(1, len(names) + 1)]

    def modalities(self, path: str) -> list[tuple[str, ...]]:
        """What each pretrained model on the way to a module takes in, nearest first, less the root."""
        found: list[tuple[str, ...]] = []
        for name in reversed(self.ancestors(path)):
            taken = getattr(self.modules[name], "input_modalities", None)
            if taken and hasattr(self.modules[name], "config"):
                found.append((taken,) if isinstance(taken, str) else tuple(taken))
        return found

    def tower(self, path: str) -> Part | None:
        """The tower a module lies in; None for the text.

        A decoder that embeds the vocabulary reads text, whatever the class it inherits from says
        (Moonshine's, SpeechT5's).
        """
        if any(self._embeds_text(name) for name in self.ancestors(path)[1:]):
            return None
        return tower_of(path.split("."), self.modalities(path)[:1])

    def _embeds_text(self, path: str) -> bool:
        if path not in self.text_decoders:
            self.text_decoders[path] = self._looks_up_text(path)
        return self.text_decoders[path]

    def _looks_up_text(self, path: str) -> bool:
        import torch

        module = self.modules[path]
        if not hasattr(module, "config") or "decoder" not in type(module).__name__.lower():
            return False
        rows = _number(self.model.config.get_text_config(decoder=True), "vocab_size")
        return any(isinstance(m, torch.nn.Embedding) and m.num_embeddings == rows for m in module.modules())


def _lists_of_blocks(tree: _Tree) -> Iterator[tuple[str, int]]:
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
    """A slot in the making: with the container it stands in, to be held against its neighbours."""

    slot: Slot
    container: str
    names: list[str]


def chart(model: PreTrainedModel, config: PreTrainedConfig, name: str) -> ModelMap:
    """The map of a model that stands on any device (the meta device will do)."""
    tree = _Tree(model)
    lists = dict(_lists_of_blocks(tree))
    owners: dict[int, str] = {}  # tensor -> the parameter that counts it
    drafts: list[_Draft] = []
    unplaced: list[Slot] = []
    uncovered: list[Uncovered] = []
    head = _head_path(tree)

    for path, module in tree.modules.items():
        own = [(n, p) for n, p in module._parameters.items() if p is not None]
        if not own:
            continue
        kind = _kind(module)
        stack = next((s for s in lists if path.startswith(s + ".")), "")
        layer = int(path[len(stack) + 1 :].split(".")[0]) if stack else -1
        fresh = {n: p for n, p in own if id(p) not in owners}
        shared = {n: owners[id(p)] for n, p in own if id(p) in owners}
        for n, p in fresh.items():
            owners[id(p)] = f"{path}.{n}" if path else n
        tower = tree.tower(path) if path else None

        if kind and stack:
            weight = module._parameters["weight"]
            in_features, out_features = _in_out(kind, tuple(weight.shape)[:2])
            draft = _draft(tree, path, stack, layer, kind, in_features, out_features, tower)
            slot = replace(
                draft.slot,
                params=sum(p.numel() for p in fresh.values()),
                shared_with=shared.get("weight", "").removesuffix(".weight"),
            )
            if slot.roles or slot.part in (Part.ROUTER, Part.LINEAR_ATTENTION, Part.STATE_SPACE):
                drafts.append(replace(draft, slot=slot))
            else:
                unplaced.append(slot)
                uncovered.append(Uncovered(path, slot.params, _why_unplaced(slot), tuple(weight.shape)))
            continue
        for n, p in fresh.items():
            full = f"{path}.{n}" if path else n
            shape = tuple(p.shape)
            slot = _bare_slot(tree, module, path, n, shape, stack, layer, tower) if stack else None
            if slot is not None:
                drafts.append(_Draft(slot, path, full.split(".")))
            else:
                why = _reason(module, path, n, head, tower)
                uncovered.append(Uncovered(full, p.numel(), why, shape))

    slots = _fusions(drafts)
    used = {slot.stack for slot in (*slots, *unplaced)}
    text = config.get_text_config()
    stacks = _stacks(tree, lists, {s.stack for s in slots}, config)
    # what could be adapted in a stack that holds no slot at all lies in no layer a person can choose
    unplaced = [slot for slot in unplaced if slot.stack in {s.path for s in stacks} & used]
    sizes = _sizes(tree, config, text, slots, stacks)
    return ModelMap(
        model=name,
        family=config.model_type,
        architecture=type(model).__name__,
        task=task_of(type(model), config),
        stacks=stacks,
        **sizes,
        activation=str(
            _first(
                text,
                "hidden_act",
                "hidden_activation",
                "activation_function",
                "dense_act_fn",
                "activation",
                "feed_forward_proj",
                "ffn_act_fn",
            )
            or ""
        ),
        positions=_positions(tree, text),
        tied_head=head in _tied(tree, owners, head),
        dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        total_params=sum(p.numel() for p in model.parameters()),
        slots=tuple(slots),
        uncovered=tuple(uncovered),
        unplaced=tuple(unplaced),
        modules=tuple(path for path in tree.modules if path),
        reinterpreted=_reinterpreted(config.model_type, slots),
    )


def _containers(tree: _Tree, path: str, stack: str, layer: int, inside: bool) -> list[tuple[str, str]]:
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
    tree: _Tree,
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
    tree: _Tree,
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
    """The slots, each `up` held against the `down` nearest to it: in its container, else its block."""
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


def _head_path(tree: _Tree) -> str:
    """The module that makes the logits, or empty."""
    head = tree.model.get_output_embeddings()
    return next((path for path, module in tree.modules.items() if module is head and path), "")


def _tied(tree: _Tree, owners: dict[int, str], head: str) -> set[str]:
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
    tree: _Tree, lists: dict[str, int], used: set[str], config: PreTrainedConfig
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


def _first(config: Any, *names: str) -> Any:
    """The first of those settings that is there; one that differs from layer to layer is not."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # transformers refuses the global value of a per-layer setting (Gemma 4)
            continue
        if value is not None:
            return value
    return None


def _number(config: Any, *names: str) -> int:
    value = _first(config, *names)
    if isinstance(value, (list, tuple)) and value and all(v == value[0] for v in value):
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _sizes(
    tree: _Tree,
    config: PreTrainedConfig,
    text: PreTrainedConfig,
    slots: list[Slot],
    stacks: tuple[Stack, ...],
) -> dict[str, int]:
    """The model's sizes: the config's words, and where it has none, the weights' own shapes."""
    rows = _embedding_shape(tree)
    hidden = _number(text, "hidden_size", "d_model", "n_embd", "dim") or (rows[1] if len(rows) > 1 else 0)
    heads = _number(text, "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
    texts = {stack.path for stack in stacks if stack.part == "text"}
    downs = [s.in_features for s in slots if s.stack in texts and Role.DOWN in s.roles]
    inner = max(downs, default=0) or _number(text, "intermediate_size", "ffn_dim", "n_inner", "d_ff")
    queries = [
        s for s in slots if s.stack in texts and s.roles == (Role.Q,) and s.part is Part.SELF_ATTENTION
    ]
    head_dim = _number(text, "head_dim", "d_kv", "attention_head_size")
    if not head_dim and heads:
        head_dim = (queries[0].out_features if queries else hidden) // heads
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "heads": heads,
        "kv_heads": _number(text, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
        or heads,
        "head_dim": head_dim,
        "vocab_size": _number(text, "vocab_size") or (rows[0] if rows else 0),
        "max_positions": _max_positions(tree, text),
    }


def _embedding_shape(tree: _Tree) -> tuple[int, ...]:
    """(vocabulary, hidden) of the input embedding; (0, 0) where there is not one, or the model does
    not say which it is."""
    try:
        embedding = tree.model.get_input_embeddings()
    except NotImplementedError:  # transformers' only way to say that a class names none, as Dia does
        # such a model still has a map, whose sizes come from its config
        return (0, 0)
    weight = getattr(embedding, "weight", None)  # Musicgen has a list of them
    return tuple(weight.shape) if weight is not None else (0, 0)


def _max_positions(tree: _Tree, text: PreTrainedConfig) -> int:
    """The longest text the model's positions reach, 0 where nothing limits it.

    RoBERTa and its kin keep two rows of their position table for padding.
    """
    if _positions(tree, text) in ("relative", "alibi", "none"):
        return 0
    number = _number(
        text,
        "max_position_embeddings",
        "n_positions",
        "max_sequence_length",
        "n_ctx",
        "max_seq_len",
        "seq_length",
        "max_target_positions",
    )
    for path, module in tree.modules.items():
        name = path.rpartition(".")[2]
        if name == "position_embeddings" and getattr(module, "padding_idx", None) is not None:
            return max(0, number - module.padding_idx - 1)
    return number


def _positions(tree: _Tree, text: PreTrainedConfig) -> str:
    """How the model knows where a token stands: rotary, learned, relative, alibi, or unknown."""
    names = [path.rpartition(".")[2] for path in tree.modules]
    if any(re.search(r"rotary|rope", n) for n in names) and not getattr(text, "alibi", False):
        return "rotary"
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        return "alibi"
    if any(re.search(r"position_embedding|^wpe$|embed_positions|pos_embed", n) for n in names):
        return "learned"
    if any("relative" in n or n in ("rel_embeddings", "pos_key_proj") for n in names):
        return "relative"
    if getattr(text, "rope_parameters", None):
        return "rotary"
    return "unknown"


def _reinterpreted(kind: str, slots: list[Slot]) -> tuple[str, ...]:
    """The names of linear layers that PEFT takes for expert parameters in this family.

    peft.utils.transformers_weight_conversion rewrites them in any LoraConfig it is given,
    full names included (peft 0.21); looked up only where there are experts, since it costs
    peft's import.
    """
    if not any(s.kind == "parameter" and s.part is Part.EXPERTS for s in slots):
        return ()
    from peft.utils import transformers_weight_conversion as conversion

    base = conversion._MODEL_TO_CONVERSION_PATTERN.get(kind)
    if not conversion._MOE_FUSED_TARGETS.get(base):
        return ()
    return tuple(conversion._MOE_TARGET_MODULE_MAPPING.get(base, ()))


# -- the real thing -------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU when there is one. Raises RequestError."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise RequestError(f"there is no device `{name}` here", "--device cpu, or auto") from None
    if device.type == "meta":
        raise RequestError("the meta device holds no weights to train", "--device cpu, or auto")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the base weights; `auto` is bfloat16 on a GPU that computes in it, else float32."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def load_model(source: Source, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with its weights, all of them frozen, in `eval` mode.

    Raises RequestError when there are no weights or they do not fill the model, RunError when
    memory does not suffice.
    """
    import torch
    from transformers.utils import logging

    from lorafit.tensorfiles import open_file, shards

    config = config_of(source)
    cls = model_class(config)
    place = source.place
    if Path(place).is_file():
        raise RequestError(
            f"`{place}` is a config without weights", "to train, name a folder that holds both"
        )
    if Path(place).is_dir():
        files = shards(Path(place))
        for path in files:
            open_file(path)  # a file that is cut short or damaged is named
        if not files and not any(path.suffix == ".bin" for path in Path(place).iterdir()):
            raise RequestError(f"there are no weights in `{source.name}`: no .safetensors file")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = cls.from_pretrained(
            place, config=config, dtype=dtype, output_loading_info=True, local_files_only=source.local,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
        model = model.to(device)
    except torch.OutOfMemoryError:
        raise RunError(
            f"`{source.name}` does not fit on {device}", "a smaller dtype or model, or another --device"
        ) from None
    except Exception as error:  # safetensors, the hub and the loader each have kinds of their own
        raise RequestError(
            f"the weights of `{source.name}` cannot be loaded: {_first_line(error)}",
            "check that the files are whole",
        ) from error
    finally:
        logging.set_verbosity(level)
    for name, stored, wanted in sorted(info["mismatched_keys"])[:1]:
        raise RequestError(
            f"`{name}` of `{source.name}` is {tuple(stored)}, and its config makes it {tuple(wanted)}",
            "the weights belong to another config",
        )
    lost = sorted(info["missing_keys"])
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise RequestError(
            f"the weights of `{source.name}` do not fill a {cls.__name__}: `{lost[0]}`{more} missing",
            "a checkpoint of a bare encoder has no language-model head to train with",
        )
    return model.requires_grad_(False).eval()


def load_tokenizer(place: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises RequestError when there is none or it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            place, trust_remote_code=False, local_files_only=Path(place).exists()
        )
    except Exception as error:  # tokenizers raise bare Exceptions
        raise RequestError(
            f"`{name}` has no tokenizer that can be read: {_first_line(error)}",
            "a tokenizer.json beside the model, or a model that has one",
        ) from None
