"""What a weight does: its role, read off its spelling, the place it stands in, and its shape.

Three questions, in this order, each answered by a table:

1. Where does it stand? The nearest container that is attention, feed-forward, experts, a
   router ... decides, by module name and class (`PLACES`). Cross-attention wins over the
   self-attention it is often built from.
2. How is it spelled there? Attention and feed-forward have tables of their own
   (`ATTENTION`, `FEED_FORWARD`), since `c_proj`, `output.dense`, `Wo` end both.
3. Does the shape agree? An `up` twice as wide as the `down` it feeds is a fused gate and up.
   A shape may show a fusion; it never tells q from k or v (BART declares k, v, q).

A weight no rule places plays nothing, and is reported as such: never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Role(str, Enum):
    """What a weight does in a block."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741
    GATE = "gate"
    UP = "up"
    DOWN = "down"

    def __str__(self) -> str:
        return self.value


MEANING: dict[Role, str] = {
    Role.Q: "query: what each position looks for",
    Role.K: "key: what each position is found by",
    Role.V: "value: what each position passes on",
    Role.O: "output: combines the heads",
    Role.GATE: "gate: how much of each inner feature passes",
    Role.UP: "up projection: hidden to inner",
    Role.DOWN: "down projection: inner to hidden",
}

Q, K, V, O, GATE, UP, DOWN = Role  # noqa: E741


class Part(str, Enum):
    """Where a weight stands."""

    SELF_ATTENTION = "self-attention"
    FEED_FORWARD = "feed-forward"
    CROSS_ATTENTION = "cross-attention"
    SHARED_EXPERTS = "shared-experts"
    EXPERTS = "experts"
    ROUTER = "router"
    LINEAR_ATTENTION = "linear-attention"
    STATE_SPACE = "state-space"
    VISION = "vision"
    AUDIO = "audio"
    OTHER = "other"

    def __str__(self) -> str:
        return self.value


DEFAULT_PARTS = frozenset({Part.SELF_ATTENTION, Part.FEED_FORWARD, Part.SHARED_EXPERTS, Part.EXPERTS})

ATTENTIONS = frozenset({Part.SELF_ATTENTION, Part.CROSS_ATTENTION, Part.LINEAR_ATTENTION})

FEED_FORWARDS = frozenset({Part.FEED_FORWARD, Part.SHARED_EXPERTS, Part.EXPERTS})


@dataclass(frozen=True, slots=True)
class Place:
    """A container: the part it makes of what stands in it, by module name or by class name."""

    part: Part
    name: re.Pattern[str]
    kind: re.Pattern[str]


def _place(part: Part, name: str, kind: str) -> Place:
    return Place(part, re.compile(name, re.IGNORECASE), re.compile(kind))


NEVER = r"(?!)"

# The first row that a container matches decides what it is; rows are from the special to the
# general, and within a block the container nearest to the weight is asked first.
PLACES: tuple[Place, ...] = (
    _place(
        Part.OTHER,
        r"indexer|compressor|(?!norm_attn_norm).*norm.*|adapter.*|.*bottleneck.*|altup|laurel|forget_gate|.*_hc|conv.*"
        r"|relative_attention_bias|.*adapter_list|ada_.*",
        r"Indexer|Compressor|(?<!NormAttention)Norm$|Adapter|Bottleneck|AltUp|HyperConnection|ConvModule|ShortConv",
    ),
    _place(Part.ROUTER, r"router|router_mlp|gate|gating_network", r"Router|Gate$"),
    _place(Part.SHARED_EXPERTS, r"shared_experts?|shared_mlp|shared_moe", r"SharedExpert|SharedMLP"),
    _place(
        Part.EXPERTS, r"experts|expert_\d+|.*_experts", r"Experts?$|ExpertMLP|ParallelExperts|ExpertLayer"
    ),
    _place(
        Part.CROSS_ATTENTION,
        r"cross_?attn|cross_?attention|encoder_attn|EncDecAttention|encoder_decoder_attention|.*_cross_attn",
        r"CrossAttention$|CrossAttn$",
    ),
    _place(
        Part.LINEAR_ATTENTION,
        r"linear_attn|linear_attention|mlstm_layer",
        r"DeltaNet|DeltaAttention|LinearAttention|LightningAttention|Rwkv\w*Attention|RecurrentBlock|RgLru|mLSTM"
        r"|KimiDelta|RetNet|Retention",
    ),
    _place(Part.STATE_SPACE, r"mamba\w*|ssm\w*", r"Mamba|SSM"),
    _place(
        Part.SELF_ATTENTION,
        r"(self_?|rel_|multi_?head_?|local_?self_?)?(attn|att|attention|attentions)(_\w+)?|longformer_self_attn",
        r"Attention\w*$|Attn$|SelfOutput$",
    ),
    _place(
        Part.FEED_FORWARD,
        r"(\w+_)?mlps?\d?|mlp_block|ffns?|ff|ffw|feed_?forward\d?|block_sparse_moe|moe|DenseReluDense|intermediate",
        r"MLP\w*$|Mlp\w*$|FFN\w*$|FeedForward\w*$|DenseGatedActDense|DenseActDense|Intermediate$|LayerFF"
        r"|SparseMoeBlock|MoE\w*$|MoeBlock|Ffn$",
    ),
)

# A block that is itself an attention or a feed-forward, with its weights directly in it (XLM, Blt).
WHOLE_BLOCK = re.compile(r"Attention$|FFN$|MLP$|FeedForward$")


def spelled(table: str) -> dict[str, tuple[Role, ...]]:
    """`"q: q_proj query; qkv: c_attn"` as a table from spelling to roles."""
    names = {"q": Q, "k": K, "v": V, "o": O, "gate": GATE, "up": UP, "down": DOWN}
    found: dict[str, tuple[Role, ...]] = {}
    for line in table.strip().splitlines():
        roles, _, words = line.partition(":")
        played = tuple(names[role] for role in roles.split())
        found.update({word.lower(): played for word in words.split()})
    return found


# One name, or the last two with a dot; compared without regard to case.
ATTENTION = spelled("""
    q:      q q_proj query query_proj q_lin wq to_q q_head project_q q_b_proj q_attn query_global q_gate_proj
    q:      w2e_query e2w_query e2e_query wq_b
    k:      k k_proj key key_proj k_lin wk to_k k_head project_k key_global
    v:      v v_proj value value_proj v_lin wv to_v v_head project_v value_global
    v:      v_proj_current v_proj_delayed
    o:      o o_proj out_proj dense out_lin wo c_proj to_out attention_out post_proj output o_b_proj
    o:      proj proj_out out attn_out self.output output.dense
    q k:    query_key qk_proj
    k v:    kv kv_proj to_kv kv_b_proj key_value
    q k v:  qkv qkv_proj query_key_value c_attn wqkv in_proj att_proj in_proj_qkv in_proj_qkvz
""")

FEED_FORWARD = spelled("""
    gate:     gate_proj wi_0 w_0 proj_up_gate
    up:       up_proj w3 v1 wi_1 w_1 fc1 c_fc fc_in lin1 dense_h_to_4h intermediate.dense intermediate
    up:       wi linear_1 linear1 layer_1 dense1 input_linear proj_up ffn ffn.0 dense.dense key intermediate_dense w1
    down:     down_proj w2 wo fc2 c_proj fc_out lin2 dense_4h_to_h output.dense output w_out ffn_output
    down:     linear_2 linear2 layer_2 dense2 output_linear proj_down value output_dense ffn.2
    gate up:  gate_up_proj gate_and_up_proj w13
""")

# Experts of an attention (JetMoe's mixture of heads): in is its query, out its output.
ATTENTION_EXPERTS = spelled("""
    q:      input_linear
    o:      output_linear
""")

# Spellings that mean the feed-forward even where no container says so (OPT, BART, BERT, ALBERT).
BARE_FEED_FORWARD = frozenset(
    [
        "fc1",
        "fc2",
        "lin1",
        "lin2",
        "intermediate.dense",
        "output.dense",
        "ffn",
        "ffn_output",
        "dense_h_to_4h",
        "dense_4h_to_h",
    ]
)

# What stands in a feed-forward and only chooses: never a role, whatever it is spelled like.
ROUTERS = frozenset(["gate", "router", "shared_expert_gate", "classifier", "gate_network", "expert_gate"])

WRAPPERS = frozenset({"linear", "lin"})  # Moshi: `q_proj.linear`


def _matches(place: Place, name: str, kind: str) -> bool:
    return bool(place.name.fullmatch(name) or place.kind.search(kind))


def place_of(containers: Sequence[tuple[str, str]]) -> Part | None:
    """The part that the containers of a weight make it stand in, or None where none says.

    `containers` are (module name, class name), the block's own class first, the weight's
    parent last.
    """
    found: Part | None = None
    for depth in range(len(containers) - 1, -1, -1):
        name, kind = containers[depth]
        if depth == 0:  # the block: its list's name or its class may speak for all of it
            kind = kind if WHOLE_BLOCK.search(kind) else ""
        part = next((p.part for p in PLACES if _matches(p, name, kind)), None)
        if part is None:
            continue
        if part is Part.OTHER or part is Part.CROSS_ATTENTION:
            # cross-attention is often built from a self-attention that stands in it, and what
            # stands in an adapter or a norm belongs to it, however it is built
            return part if found in (None, *ATTENTIONS) or part is Part.OTHER else found
        if part in (Part.EXPERTS, Part.SHARED_EXPERTS, Part.ROUTER) and found in (None, Part.FEED_FORWARD):
            found = part
        found = found or part
    return found


def roles_of(names: Sequence[str], part: Part | None, within: Part | None = None) -> tuple[Role, ...]:
    """The roles that a spelling has in a part; `names` are the last names of its path, its own last.

    `within` is the part that holds experts, where that is an attention.
    """
    own = names[-1].lower()
    if own in WRAPPERS and len(names) > 1:
        return roles_of(names[:-1], part)
    last_two = ".".join(names[-2:]).lower()
    if part is Part.EXPERTS and within in ATTENTIONS:
        table = ATTENTION_EXPERTS
    elif part in ATTENTIONS:
        table = ATTENTION
    elif part in FEED_FORWARDS:
        table = FEED_FORWARD
    else:
        return ()
    return table.get(last_two) or table.get(own) or ()


def bare_part(names: Sequence[str]) -> Part | None:
    """Feed-forward for a spelling that means it by itself, else None."""
    last_two = ".".join(names[-2:]).lower()
    bare = last_two in BARE_FEED_FORWARD or names[-1].lower() in BARE_FEED_FORWARD
    return Part.FEED_FORWARD if bare else None


def with_fusion(roles: tuple[Role, ...], out_features: int, down_in: int | None) -> tuple[Role, ...]:
    """`up` as `gate, up` when it is twice as wide as the input of the `down` it feeds.

    `down_in` is that input, or None where no `down` is near.
    """
    if roles == (UP,) and down_in is not None and out_features == 2 * down_in:
        return (GATE, UP)
    return roles


TOWERS: tuple[tuple[Part, re.Pattern[str]], ...] = (
    (Part.VISION, re.compile(r"vision|visual|image|pixel|patch_embed|(^|_)vit($|_)|video|vqmodel|vqgan")),
    (
        Part.AUDIO,
        re.compile(
            r"audio|speech|codec|vocoder|acoustic|wav2vec|(^|_)mimi($|_)|(^|_)dac($|_)"
            r"|conformer|talker|token2wav|code2wav|code_predictor|depth_decoder|mel_"
        ),
    ),
    (
        Part.OTHER,
        re.compile(
            r"qformer|q_former|perceiver_|resampler|connector|multi_modal_projector|protein"
            r"|action_expert|diffusion|aligner|merger|(^|_)dit($|_)|(^|_)mtp($|_)|semantic_tokenizer"
        ),
    ),
)


def tower_of(names: Sequence[str], modalities: Sequence[Sequence[str]]) -> Part | None:
    """The tower a module lies in when it is not of the text, by the names on its path and by what
    each pretrained model on its way says it takes in; None for the text."""
    for taken in modalities:
        if taken and "text" not in taken:
            return Part.AUDIO if "audio" in taken else Part.VISION
    for part, words in TOWERS:
        if any(words.search(name.lower()) for name in names):
            return part
    return None
