"""A model's sizes and positions: what its config says, and where it says nothing, its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorafit.model.map import Slot, Stack
from lorafit.model.roles import Part, Role, tower_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(slots=True)
class ModuleTree:
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


def first_in(config: Any, *names: str) -> Any:
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
    value = first_in(config, *names)
    if isinstance(value, (list, tuple)) and value and all(v == value[0] for v in value):
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def sizes_of(
    tree: ModuleTree,
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


def _embedding_shape(tree: ModuleTree) -> tuple[int, ...]:
    """(vocabulary, hidden) of the input embedding; (0, 0) where there is not one, or the model does
    not say which it is."""
    try:
        embedding = tree.model.get_input_embeddings()
    # transformers raises it where a class names no input embedding (Dia); the sizes come from the config then
    except NotImplementedError:
        return (0, 0)
    weight = getattr(embedding, "weight", None)  # Musicgen has a list of them
    return tuple(weight.shape) if weight is not None else (0, 0)


def _max_positions(tree: ModuleTree, text: PreTrainedConfig) -> int:
    """The longest text the model's positions reach, 0 where nothing limits it.

    RoBERTa and its kin keep two rows of their position table for padding.
    """
    if positions_of(tree, text) in ("relative", "alibi", "none"):
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
        padding = getattr(module, "padding_idx", None)
        if name == "position_embeddings" and isinstance(padding, int):
            return max(0, number - padding - 1)
    return number


def positions_of(tree: ModuleTree, text: PreTrainedConfig) -> str:
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
