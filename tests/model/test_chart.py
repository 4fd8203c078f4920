import json

import pytest
import torch
from families import build_config, save_model

from lorafit.errors import RequestError
from lorafit.model.chart import chart_of, map_of
from lorafit.model.load import load_model, load_tokenizer
from lorafit.model.roles import Part
from lorafit.model.source import find


def roles_of_layer(name: str, layer: int = 0, stack: str | None = None) -> dict[str, str]:
    found = map_of(build_config(name))
    stack = stack or found.stacks[0].path
    return {
        s.tail: "+".join(s.roles)
        + ("" if s.part in (Part.SELF_ATTENTION, Part.FEED_FORWARD) else f" {s.part.value}")
        for s in found.slots
        if s.layer == layer and s.stack == stack
    }


LLAMA = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
# Read off the models' sources by hand.
BY_HAND = {
    ("llama", 0): LLAMA, ("qwen3", 0): LLAMA, ("gemma2", 0): LLAMA,
    ("phi3", 0): {"self_attn.qkv_proj": "q+k+v", "self_attn.o_proj": "o", "mlp.gate_up_proj": "gate+up", "mlp.down_proj": "down"},
    ("gpt2", 0): {"attn.c_attn": "q+k+v", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
    ("gpt_neox", 0): {"attention.query_key_value": "q+k+v", "attention.dense": "o", "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"},
    ("falcon", 0): {"self_attention.query_key_value": "q+k+v", "self_attention.dense": "o", "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"},
    ("mpt", 0): {"attn.Wqkv": "q+k+v", "attn.out_proj": "o", "ffn.up_proj": "up", "ffn.down_proj": "down"},
    ("bloom", 0): {"self_attention.query_key_value": "q+k+v", "self_attention.dense": "o", "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"},
    ("opt", 0): {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.out_proj": "o", "fc1": "up", "fc2": "down"},
    ("bert", 0): {"attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v", "attention.output.dense": "o",
                  "intermediate.dense": "up", "output.dense": "down"},
    ("distilbert", 0): {"attention.q_lin": "q", "attention.k_lin": "k", "attention.v_lin": "v", "attention.out_lin": "o",
                        "ffn.lin1": "up", "ffn.lin2": "down"},
    ("modernbert", 0): {"attn.Wqkv": "q+k+v", "attn.Wo": "o", "mlp.Wi": "gate+up", "mlp.Wo": "down"},
    ("mixtral", 0): {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
                     "mlp.gate.weight": " router", "mlp.experts.gate_up_proj": "gate+up experts", "mlp.experts.down_proj": "down experts"},
    ("deepseek_v3", 0): {"self_attn.q_b_proj": "q", "self_attn.kv_b_proj": "k+v", "self_attn.o_proj": "o",
                         "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"},
    ("deepseek_v3", 1): {"self_attn.q_b_proj": "q", "self_attn.kv_b_proj": "k+v", "self_attn.o_proj": "o",
                         "mlp.gate.weight": " router", "mlp.experts.gate_up_proj": "gate+up experts", "mlp.experts.down_proj": "down experts",
                         "mlp.shared_experts.gate_proj": "gate shared-experts", "mlp.shared_experts.up_proj": "up shared-experts",
                         "mlp.shared_experts.down_proj": "down shared-experts"},
}  # fmt: skip


@pytest.mark.parametrize("name, layer", BY_HAND, ids=lambda v: str(v))
def test_roles_against_answers_made_by_hand(name, layer):
    assert roles_of_layer(name, layer) == BY_HAND[name, layer]


def test_t5_has_two_stacks_and_cross_attention():
    found = map_of(build_config("t5"))
    assert [(s.name, s.path, s.depth) for s in found.stacks] == [
        ("encoder", "encoder.block", 4),
        ("decoder", "decoder.block", 3),
    ]
    decoder = roles_of_layer("t5", 0, "decoder.block")
    assert (
        decoder["layer.0.SelfAttention.q"] == "q"
        and decoder["layer.1.EncDecAttention.q"] == "q cross-attention"
    )
    assert decoder["layer.2.DenseReluDense.wi"] == "up" and decoder["layer.2.DenseReluDense.wo"] == "down"


def test_bart_declares_k_before_q_and_shapes_never_decide():
    encoder = roles_of_layer("bart", 0, "model.encoder.layers")
    assert [encoder[f"self_attn.{n}_proj"] for n in "kvq"] == ["k", "v", "q"]


def test_a_hybrids_layers_differ():
    assert "linear_attn.out_proj" in roles_of_layer("qwen3_next", 0)
    full = roles_of_layer("qwen3_next", 1)
    assert full["self_attn.q_proj"] == "q" and "mlp.experts.gate_up_proj" in full
    assert any(text.endswith("state-space") for text in roles_of_layer("jamba", 0).values())
    assert roles_of_layer("jamba", 1)["self_attn.q_proj"] == "q"


def test_an_attention_gate_is_no_feed_forward_gate():
    from transformers import AfmoeConfig

    found = map_of(
        AfmoeConfig(
            num_hidden_layers=2,
            hidden_size=32,
            vocab_size=64,
            intermediate_size=64,
            moe_intermediate_size=16,
            num_experts=4,
        )
    )
    assert "model.layers.0.self_attn.gate_proj" in {u.path for u in found.uncovered}


def test_vision_towers_are_set_apart():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=28, patch_size=14),
        text_config=LlamaConfig(**small, vocab_size=300),
    )
    found = map_of(config)
    for stack in found.stacks:
        seen = {s.part.value for s in found.slots if s.stack == stack.path}
        assert seen == ({"vision"} if stack.part == "vision" else {"self-attention", "feed-forward"})
    assert [s.name for s in found.text_stacks] == ["language_model"]


def config_file(tmp_path, **data):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    return tmp_path


def test_bert_base_is_what_the_textbook_says(tmp_path):
    found = map_of(config_file(tmp_path, model_type="bert", architectures=["BertForMaskedLM"]))
    sizes = (
        found.stacks[0].depth,
        found.hidden_size,
        found.heads,
        found.head_dim,
        found.vocab_size,
        found.max_positions,
    )
    assert sizes == (12, 768, 12, 64, 30522, 512) and found.total_params == 109_514_298


@pytest.mark.parametrize(
    "data, words",
    [
        ({}, ["names no `model_type`"]),
        ({"model_type": "lama"}, ["does not know the model type `lama`", "`llama`"]),
        ({"architectures": ["MiniCPM3ForCausalLM"], "auto_map": {"AutoConfig": "x.Y"}}, ["`auto_map`", "never runs", "`minicpm3`"]),
        ({"model_type": "nothing_like_it", "auto_map": {}}, ["remote code"]),
        ({"model_type": "llama", "hidden_size": "wide"}, ["config"]),
        ({"model_type": "llama", "hidden_size": -3}, ["no `llama` config"]),
        ({"model_type": "vit"}, ["no language model"]),
    ],
)  # fmt: skip
def test_configs_that_are_refused(tmp_path, data, words):
    with pytest.raises(RequestError) as error:
        map_of(config_file(tmp_path, **data))
    for word in words:
        assert word in f"{error.value.message} {error.value.hint}"


def test_an_auto_map_alone_is_no_reason_to_refuse(tmp_path):
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    found = map_of(
        config_file(
            tmp_path,
            model_type="phi3",
            auto_map={"AutoConfig": "x.Y"},
            pad_token_id=0,
            num_key_value_heads=4,
            **small,
        )
    )
    assert found.architecture == "Phi3ForCausalLM"


def test_models_that_are_not_there(tmp_path):
    for name, word in (
        ("./none", "no model at"), (str(tmp_path), "no config.json"), ("a/b/c", "no model at"), ("what ever", "no model at"),
        ("nobody/nothing-of-the-kind", "is not in the local cache"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=word):
            find(name)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match="is an adapter"):
        find(str(tmp_path))
    for text in ("{", "[]", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RequestError, match="config"):
            find(str(tmp_path))


def test_weights_that_are_not_there_or_do_not_fill_the_model(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_model("llama", tmp_path / "m")
    cpu = torch.device("cpu")
    assert load_model(find(str(folder)), torch.float32, cpu).training is False
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({n: t for n, t in tensors.items() if "layers.2" not in n}, weights, metadata={"format": "pt"})
    with pytest.raises(RequestError, match="do not fill"):
        load_model(find(str(folder)), torch.float32, cpu)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(RequestError, match="is damaged"):
        load_model(find(str(folder)), torch.float32, cpu)
    weights.unlink()
    with pytest.raises(RequestError, match="no weights"):
        load_model(find(str(folder)), torch.float32, cpu)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(RequestError, match="no tokenizer"):
        load_tokenizer(str(folder), "m")


def test_a_map_seen_before_needs_no_torch(tmp_path):
    import subprocess
    import sys

    chart_of(find("demo"))
    code = (
        "import sys; from lorafit.model import chart_of, find; found = chart_of(find('demo'));"
        "assert found.total_params == 2525952; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attention_is_what_was_asked_for(tiny):
    source, cpu = find(str(tiny("llama"))), torch.device("cpu")
    for name, got in (("auto", "sdpa"), ("eager", "eager")):
        assert load_model(source, torch.float32, cpu, attention=name).config._attn_implementation == got
    with pytest.raises(RequestError, match="--attention flash_attention_2: ") as refused:
        load_model(source, torch.float32, cpu, attention="flash_attention_2")
    assert "--attention sdpa" in refused.value.hint
