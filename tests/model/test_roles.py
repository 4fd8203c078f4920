import pytest

from lorafit.model.roles import (
    DEFAULT_PARTS,
    Part,
    Role,
    bare_part,
    place_of,
    roles_of,
    tower_of,
    with_fusion,
)

BLOCK = ("layers", "SomeDecoderLayer")


@pytest.mark.parametrize(
    "containers, part",
    [
        ([BLOCK, ("self_attn", "LlamaAttention")], Part.SELF_ATTENTION),
        ([BLOCK, ("mlp", "LlamaMLP")], Part.FEED_FORWARD),
        ([("layer", "BertLayer"), ("attention", "BertAttention"), ("output", "BertSelfOutput")], Part.SELF_ATTENTION),
        ([("layer", "BertLayer"), ("crossattention", "BertAttention"), ("self", "BertSelfAttention")], Part.CROSS_ATTENTION),
        ([("block", "T5Block"), ("layer", "ModuleList"), ("1", "T5LayerCrossAttention"), ("EncDecAttention", "T5Attention")], Part.CROSS_ATTENTION),
        ([BLOCK, ("encoder_attn", "BartAttention")], Part.CROSS_ATTENTION),
        ([BLOCK, ("mlp", "DeepseekV3MoE"), ("shared_experts", "DeepseekV3MLP")], Part.SHARED_EXPERTS),
        ([BLOCK, ("mlp", "DeepseekV3MoE"), ("experts", "DeepseekV3Experts")], Part.EXPERTS),
        ([BLOCK, ("mlp", "DeepseekV3MoE"), ("gate", "DeepseekV3TopkRouter")], Part.ROUTER),
        ([BLOCK, ("linear_attn", "Qwen3NextGatedDeltaNet")], Part.LINEAR_ATTENTION),
        ([BLOCK, ("temporal_block", "RecurrentGemmaRecurrentBlock")], Part.LINEAR_ATTENTION),
        ([BLOCK, ("temporal_block", "RecurrentGemmaSdpaAttention")], Part.SELF_ATTENTION),
        ([BLOCK, ("mixer", "NemotronHMamba2Mixer")], Part.STATE_SPACE),
        ([BLOCK, ("mixer", "NemotronHAttention")], Part.SELF_ATTENTION),
        ([BLOCK, ("mixer", "NemotronHMLP")], Part.FEED_FORWARD),
        ([BLOCK, ("self_attn", "DeepseekV32Attention"), ("indexer", "DeepseekV32Indexer")], Part.OTHER),
        ([BLOCK, ("input_layernorm", "GatedNorm"), ("mlp", "NormMLP")], Part.OTHER),
        ([("cross_attn_layers", "BltCrossAttention")], Part.CROSS_ATTENTION),
        ([("layers", "MllamaCrossAttentionDecoderLayer"), ("mlp", "MllamaTextMLP")], Part.FEED_FORWARD),
        ([BLOCK], None),
    ],
)  # fmt: skip
def test_where_a_weight_stands(containers, part):
    assert place_of(containers) is part


@pytest.mark.parametrize(
    "names, part, roles",
    [
        ("q_proj", Part.SELF_ATTENTION, "q"), ("query_key_value", Part.SELF_ATTENTION, "q k v"),
        ("c_proj", Part.SELF_ATTENTION, "o"), ("c_proj", Part.FEED_FORWARD, "down"),
        ("output.dense", Part.SELF_ATTENTION, "o"), ("output.dense", Part.FEED_FORWARD, "down"),
        ("intermediate.dense", Part.FEED_FORWARD, "up"), ("Wo", Part.FEED_FORWARD, "down"),
        ("Wo", Part.SELF_ATTENTION, "o"), ("q_b_proj", Part.SELF_ATTENTION, "q"),
        ("kv_b_proj", Part.SELF_ATTENTION, "k v"), ("q_a_proj", Part.SELF_ATTENTION, ""),
        ("gate_proj", Part.SELF_ATTENTION, ""), ("gate_proj", Part.FEED_FORWARD, "gate"),
        ("q_proj.linear", Part.SELF_ATTENTION, "q"), ("experts.gate_up_proj", Part.EXPERTS, "gate up"),
        ("q_proj", Part.STATE_SPACE, ""), ("q_proj", None, ""), ("dense", Part.FEED_FORWARD, ""),
    ],
)  # fmt: skip
def test_what_a_spelling_plays_there(names, part, roles):
    assert " ".join(roles_of(names.split("."), part)) == roles


def test_a_shape_shows_a_fusion_and_nothing_else():
    assert with_fusion((Role.UP,), 256, 128) == (Role.GATE, Role.UP)
    assert with_fusion((Role.UP,), 128, 128) == (Role.UP,)
    assert with_fusion((Role.UP,), 256, None) == (Role.UP,)
    assert with_fusion((Role.Q,), 256, 128) == (Role.Q,)


def test_a_block_without_containers():
    assert bare_part(["fc1"]) is Part.FEED_FORWARD
    assert bare_part(["output", "dense"]) is Part.FEED_FORWARD
    assert bare_part(["q_proj"]) is None


def test_towers():
    assert tower_of(["model", "vision_tower", "layers"], []) is Part.VISION
    assert tower_of(["model", "encoder"], [("audio",)]) is Part.AUDIO
    assert tower_of(["model", "encoder"], [("image",)]) is Part.VISION
    assert tower_of(["model", "decoder", "layers"], [("text",)]) is None
    assert Part.VISION not in DEFAULT_PARTS and Part.CROSS_ATTENTION not in DEFAULT_PARTS
