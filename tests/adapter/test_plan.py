import json
from dataclasses import replace

import pytest
from families import FAMILIES, build_config, build_model

from lorafit.adapter.plan import resolve
from lorafit.errors import RequestError, RunError
from lorafit.jsonio import jsonable
from lorafit.model.chart import map_of
from lorafit.model.roles import Part, Role
from lorafit.settings.preset import Lora, load_preset, parse, preset_names


@pytest.fixture(scope="module")
def maps():
    made = {}

    def of(name):
        if name not in made:
            made[name] = map_of(build_config(name), name)
        return made[name]

    return of


def plan_for(maps, family, preset="ffn", layers="high", **more):
    return resolve(maps(family), load_preset(preset), layers, **more)


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("family", FAMILIES)
def test_plan_equals_what_peft_adapted_and_counts(maps, family, preset):
    """Every preset × every family × a band: PEFT's own module set and parameter counts."""
    from lorafit.adapter.inject import inject_plan

    layers = "last:2"
    try:
        plan = plan_for(maps, family, preset, layers)
    except RequestError as error:
        # the one family where PEFT would take the dense and shared layers for experts
        assert family in ("deepseek_v3", "qwen3_next", "jamba") and "--exclude" in error.hint, error.message
        plan = plan_for(
            maps, family, preset, layers, exclude=error.hint.removeprefix("--exclude ").split(",")
        )
    model = build_model(family)
    before = model.num_parameters()
    peft_model = inject_plan(model, plan, maps(family).task)  # compares the sets, and raises
    trainable, total = peft_model.get_nb_trainable_parameters()
    assert (plan.trainable_params, plan.total_params) == (trainable, total) and total > before


def test_what_a_plan_says_of_the_demo():
    plan = resolve(map_of("demo"), load_preset("ffn"), "high")
    assert plan.indices == (9, 10, 11) and plan.trainable_params == 69_120
    assert plan.peft.target_modules == ("down_proj", "gate_proj", "up_proj")
    assert plan.peft.layers_to_transform == (9, 10, 11) and plan.cut == {"model.layers": 9}
    document = json.loads(json.dumps(jsonable(plan.as_json())))
    for key in ("model", "preset", "layers", "target_modules", "layers_to_transform", "layers_pattern", "target_parameters",
                "modules", "trainable_params", "total_params", "trainable_fraction", "adapter_bytes", "cut", "notes"):  # fmt: skip
        assert key in document
    assert document["layers"]["indices"] == [9, 10, 11] and len(document["modules"]) == 9


def test_a_preset_brings_its_own_layers(maps):
    preset = parse({"roles": ["q"], "layers_to_transform": [0, 2]}, "mine")
    assert resolve(maps("llama"), preset).indices == (0, 2)
    assert resolve(maps("llama"), preset, "1").indices == (1,)


def test_gpt2_output_is_not_its_mlp(maps):
    plan = plan_for(maps, "gpt2", "extended")
    assert plan.modules == ("transformer.h.3.attn.c_attn", "transformer.h.3.attn.c_proj")


def test_t5_bands_follow_each_stack_and_leave_cross_attention(maps):
    plan = plan_for(maps, "t5", "basic", "high")
    assert plan.layers == {"encoder.block": (3,), "decoder.block": (2,)}
    assert not any("EncDec" in m for m in plan.modules)
    assert plan_for(maps, "t5", "basic", "high", stack="decoder").layers == {"decoder.block": (2,)}
    both = plan_for(maps, "t5", "basic", "high", include=["cross-attention"])
    assert sum("EncDec" in m for m in both.modules) == 2


def test_a_layer_that_only_one_stack_has(maps):
    with pytest.raises(RequestError, match="stack `decoder`: there is no layer 3") as error:
        plan_for(maps, "t5", "basic", "3")
    assert "--stack encoder" in error.value.hint
    assert plan_for(maps, "t5", "basic", "3", stack="encoder").indices == (3,)


def test_fused_weights_are_said_or_refused(maps):
    plan = plan_for(maps, "gpt2", "basic")
    assert "asked q, v; `c_attn` also holds k and is adapted whole" in plan.notes
    with pytest.raises(RequestError, match="--strict: asked q, v"):
        plan_for(maps, "gpt2", "basic", strict=True)
    assert not plan_for(maps, "phi3", "ffn", strict=True).notes[:0]


def test_a_missing_gate_is_said_and_other_missing_roles_are_errors(maps):
    assert any("not gated" in note for note in plan_for(maps, "gpt2", "ffn").notes)
    with pytest.raises(RequestError, match="plays role `gate`") as error:
        resolve(maps("gpt2"), parse({"roles": ["gate"]}, "mine"), "all")
    assert "its feed-forward roles are `up`, `down`" in error.value.hint


def test_literal_modules_go_the_same_way(maps):
    plan = resolve(maps("llama"), load_preset("basic").with_modules(["q_proj", "mlp.down_proj"]), "high")
    assert plan.modules == ("model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj")
    one = resolve(
        maps("llama"), load_preset("basic").with_modules(["model.layers.3.self_attn.q_proj"]), "all"
    )
    assert one.modules == ("model.layers.3.self_attn.q_proj",)
    odd = resolve(maps("deepseek_v3"), load_preset("basic").with_modules(["q_a_proj"]), "0")
    assert odd.modules == ("model.layers.0.self_attn.q_a_proj",)
    with pytest.raises(RequestError, match="has no module `q_porj`") as error:
        resolve(maps("llama"), load_preset("basic").with_modules(["q_porj"]), "all")
    assert "`q_proj`" in error.value.hint
    with pytest.raises(RequestError, match="no adaptable weight of a layer"):
        resolve(maps("llama"), load_preset("basic").with_modules(["lm_head"]), "all")


def test_layers_that_hold_nothing_are_reported(maps):
    plan = plan_for(maps, "qwen3_next", "basic", "all")
    assert plan.cut == {"model.layers": 1}
    assert any(note.startswith("layers 0, 2 of `model.layers` hold none of q, v") for note in plan.notes)
    with pytest.raises(RequestError, match="hold no weight for `q`, `v`") as error:
        plan_for(maps, "qwen3_next", "basic", "0")
    assert "1, 3" in error.value.hint


def test_experts_are_parameters_by_full_name(maps):
    plan = plan_for(maps, "mixtral", "ffn")
    assert plan.peft.target_modules == () and plan.peft.layers_to_transform is None
    assert plan.peft.target_parameters == (
        "model.layers.3.mlp.experts.gate_up_proj",
        "model.layers.3.mlp.experts.down_proj",
    )
    assert plan.trainable_params == 4 * 16 * ((32 + 96) + (48 + 32))
    for setting in ({"dropout": 0.1}, {"use_dora": True}, {"bias": "all"}):
        preset = replace(load_preset("ffn"), lora=Lora(**setting))
        with pytest.raises(RequestError) as error:
            resolve(maps("mixtral"), preset, "high")
        assert "--exclude experts" in error.value.hint


def test_what_peft_would_turn_into_experts_is_refused(maps):
    with pytest.raises(RequestError, match="expert parameters of every layer") as error:
        plan_for(maps, "deepseek_v3", "ffn", "all")
    parts = error.value.hint.removeprefix("--exclude ").split(",")
    plan = plan_for(maps, "deepseek_v3", "ffn", "all", exclude=parts)
    assert {s.part for s in plan.slots} == {Part.EXPERTS}


def test_routers_only_when_included(maps):
    assert not any("router" in s.part for s in plan_for(maps, "mixtral", "all", "all").slots)
    found = plan_for(maps, "mixtral", "all", "high", include=["router"])
    assert [s.path for s in found.slots if s.part is Part.ROUTER] == ["model.layers.3.mlp.gate.weight"]


def test_latent_attention_is_said(maps):
    assert any("latent attention" in note for note in plan_for(maps, "deepseek_v3", "basic").notes)


def test_a_shared_block_has_no_bands():
    from transformers import AlbertConfig

    found = map_of(
        AlbertConfig(
            hidden_size=32,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=48,
            vocab_size=100,
            embedding_size=16,
        )
    )
    with pytest.raises(RequestError, match="runs one shared block 6 times"):
        resolve(found, load_preset("basic"), "high")
    assert resolve(found, load_preset("basic"), "all").modules


def test_two_layers_have_no_band(maps):
    found = map_of(build_config("llama", num_hidden_layers=2))
    with pytest.raises(RequestError, match="a stack of 2 layers has no band `high`") as error:
        resolve(found, load_preset("ffn"), "high")
    assert error.value.hint == "--layers last:1"
    assert resolve(found, load_preset("ffn"), "1").indices == (1,)


@pytest.mark.parametrize(
    "more, word", [({"include": ["router", "visoin"]}, "`vision`"), ({"stack": "dekoder"}, "`decoder`")]
)
def test_parts_and_stacks_that_are_not_there(maps, more, word):
    with pytest.raises(RequestError) as error:
        plan_for(maps, "t5", "basic", "all", **more)
    assert word in error.value.hint


def test_everything_excluded(maps):
    parts = ["self-attention", "feed-forward", "shared-experts", "experts"]
    with pytest.raises(RequestError, match="nothing would be adapted"):
        plan_for(maps, "llama", exclude=parts)
    with pytest.raises(RequestError, match="plays roles"):
        plan_for(maps, "llama", "ffn", exclude=["feed-forward"])


@pytest.mark.parametrize(
    "lora",
    [Lora(use_dora=True), Lora(use_rslora=True), Lora(bias="all"), Lora(bias="lora_only"), Lora(modules_to_save=("lm_head",)),
     Lora(rank_pattern={"q_proj": 4, "fc1|up_proj": 2}), Lora(r=3, rank_pattern={r".*\.3\..*": 5})],
    ids=["dora", "rslora", "bias all", "bias lora_only", "modules_to_save", "rank_pattern", "rank by layer"],
)  # fmt: skip
def test_counts_hold_for_all_of_loras_settings(maps, lora):
    from lorafit.adapter.inject import inject_plan

    for family in ("opt", "llama"):
        if lora.modules_to_save and family == "opt":
            continue
        plan = resolve(maps(family), replace(load_preset("all"), lora=lora), "2-3")
        model = (
            build_model(family, tie_word_embeddings=False) if lora.modules_to_save else build_model(family)
        )
        found = map_of(model.config) if lora.modules_to_save else maps(family)
        plan = resolve(found, replace(load_preset("all"), lora=lora), "2-3")
        trainable, total = inject_plan(model, plan, "causal").get_nb_trainable_parameters()
        assert (plan.trainable_params, plan.total_params) == (trainable, total)


def test_modules_to_save_follow_peft_and_stay_apart_from_the_plan(maps):
    from lorafit.adapter.inject import inject_plan

    preset = replace(load_preset("ffn"), lora=Lora(modules_to_save=("norm",)))
    plan = resolve(maps("llama"), preset, "high")
    trainable, total = inject_plan(build_model("llama"), plan, "causal").get_nb_trainable_parameters()
    assert (plan.trainable_params, plan.total_params) == (trainable, total)
    with pytest.raises(RequestError, match="which the plan adapts"):
        resolve(maps("llama"), replace(load_preset("ffn"), lora=Lora(modules_to_save=("mlp",))), "high")
    tied = map_of(build_config("llama", tie_word_embeddings=True))
    with pytest.raises(RequestError, match="tied"):
        resolve(tied, replace(load_preset("ffn"), lora=Lora(modules_to_save=("lm_head",))), "high")


def test_patterns_mean_after_a_reload_what_they_meant_before(maps, tmp_path):
    """PEFT takes the first pattern that matches, and sorts them when it saves."""
    from lorafit.adapter.folder import save_adapter
    from lorafit.adapter.inject import inject_plan

    patterns = {r"model\.layers\.3\.mlp\.down_proj": 64, "down_proj": 8}
    plan = resolve(maps("llama"), replace(load_preset("ffn"), lora=Lora(alpha_pattern=patterns)), "2-3")
    model = inject_plan(build_model("llama"), plan, "causal")
    save_adapter(model, tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(build_model("llama"), tmp_path)
    name = "base_model.model.model.layers.{}.mlp.down_proj"
    for layer, alpha in ((2, 8), (3, 64)):
        for found in (model, again):
            assert found.get_submodule(name.format(layer)).scaling["default"] == alpha / 16


def test_roles_stand_in_one_order(maps):
    assert plan_for(maps, "llama", "all").roles == tuple(Role)


def test_a_difference_between_plan_and_adapter_stops_the_run():
    from lorafit.adapter.inject import compare

    compare(["a", "b"], ["b", "a"])
    with pytest.raises(RunError, match="not adapted: `b`; adapted unasked: `c`"):
        compare(["a", "b"], ["a", "c"])
