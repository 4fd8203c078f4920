"""What PEFT does without a word, asked of lorafit: each is an error or exactly what was meant."""

import json

import pytest
from families import build_config, build_model

from lorafit.adapter.folder import CONFIG, save_adapter
from lorafit.adapter.inject import adapted_names, inject_plan
from lorafit.adapter.plan import resolve
from lorafit.errors import RequestError
from lorafit.model.chart import map_of
from lorafit.settings.preset import load_preset, parse


@pytest.fixture(scope="module")
def llama():
    return map_of(build_config("llama"), "llama")


def named(*modules):
    return load_preset("basic").with_modules(modules)


def test_an_empty_list_of_layers_is_not_all_of_them():
    with pytest.raises(RequestError, match="a list of layer numbers"):
        parse({"roles": ["q"], "layers_to_transform": []}, "mine")
    with pytest.raises(RequestError, match="choice of layers is empty"):
        load_preset("basic").choice("")


@pytest.mark.parametrize("layers", ["3,4,99", "99", "-1"])
def test_a_layer_that_is_not_there_is_not_dropped(llama, layers):
    with pytest.raises(RequestError):
        resolve(llama, load_preset("basic"), layers)


def test_a_misspelt_name_beside_a_good_one_is_not_dropped(llama):
    with pytest.raises(RequestError, match="no module `v_porj`"):
        resolve(llama, named("q_proj", "v_porj"), "all")


@pytest.mark.parametrize("kind", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_names_no_chosen_module_is_not_dropped(llama, kind):
    def preset(pattern):
        return parse({"roles": ["up", "down"], "lora": {kind: {pattern: 4}}}, "mine")

    with pytest.raises(RequestError, match=f"{kind} names `down_porj`") as error:
        resolve(llama, preset("down_porj"), "high")
    assert error.value.hint == "did you mean `down_proj`?"
    with pytest.raises(RequestError, match="no chosen module has that name"):
        resolve(llama, preset(r".*\.0\.mlp\.down_proj"), "high")
    assert resolve(llama, preset("down_proj"), "high").slots


def test_a_full_path_does_not_slip_past_the_layers(llama):
    with pytest.raises(RequestError, match="lies in none of the chosen layers"):
        resolve(llama, named("q_proj", "model.layers.0.self_attn.v_proj"), "high")
    both = resolve(llama, named("q_proj", "model.layers.3.self_attn.v_proj"), "2-3")
    assert both.modules == (
        "model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.v_proj",
    )  # fmt: skip
    assert adapted_names(inject_plan(build_model("llama"), both, "causal"))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "norm"])
def test_what_lies_in_no_layer_is_not_adapted_in_all_of_them(llama, name):
    with pytest.raises(RequestError, match="no adaptable weight of a layer"):
        resolve(llama, named("q_proj", name), "high")


@pytest.mark.parametrize("name", ["all-linear", r".*\.q_proj"])
def test_a_pattern_is_no_name(llama, name):
    with pytest.raises(RequestError, match="has no module"):
        resolve(llama, named(name), "high")


def test_an_index_is_that_of_one_stack_and_not_of_cross_attention():
    t5 = map_of(build_config("t5"))
    plan = resolve(t5, load_preset("basic"), "1", stack="decoder")
    assert plan.modules == (
        "decoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.0.SelfAttention.v",
    )
    assert set(adapted_names(inject_plan(build_model("t5"), plan, "seq2seq"))) == set(plan.modules)


def test_an_output_is_not_a_down():
    gpt2 = map_of(build_config("gpt2"))
    plan = resolve(gpt2, parse({"roles": ["o"]}, "mine"), "1")
    assert plan.modules == ("transformer.h.1.attn.c_proj",)


def test_a_band_holds_for_expert_parameters():
    mixtral = map_of(build_config("mixtral"))
    plan = resolve(mixtral, load_preset("all"), "1")
    found = adapted_names(inject_plan(build_model("mixtral"), plan, "causal"))
    assert all(".layers.1." in name for name in found) and sum("experts" in name for name in found) == 2


def test_dense_layers_are_not_turned_into_experts():
    deepseek = map_of(build_config("deepseek_v3"))
    for layers in ("0", "1", "all"):
        with pytest.raises(RequestError, match="expert parameters of every layer"):
            resolve(deepseek, load_preset("ffn"), layers)


def test_one_tensor_does_not_get_three_adapters():
    from transformers import ZambaConfig

    config = ZambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, n_mamba_heads=2,
        mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False,
    )  # fmt: skip
    with pytest.raises(RequestError, match="is one tensor with"):
        resolve(map_of(config), load_preset("basic"), "all")


def test_names_are_saved_in_one_order(tmp_path):
    plan = resolve(map_of(build_config("llama")), load_preset("all"), "high")
    save_adapter(inject_plan(build_model("llama"), plan, "causal"), tmp_path)
    saved = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert saved == sorted(saved) and len(saved) == 7
