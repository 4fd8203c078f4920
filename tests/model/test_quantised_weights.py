"""A base in 4 or 8 bits: its bytes are those that were planned, its gradients those of the dequantised weights."""

import json

import bitsandbytes
import pytest
import torch
from families import save_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from twins import CPU, adapted, furthest, gradients, held_bytes, twin_of

from lorafit.errors import RequestError, RunError
from lorafit.jsonio import jsonable
from lorafit.model import chart_of, dequantised, find, held_as, is_quantised, load_model, weight_bytes
from lorafit.model.map import from_json
from lorafit.model.quantised import stored_quantisation

KINDS = ["nf4", "int8"]
FAMILIES = ["llama", "gpt2", "phi3", "bert", "t5", "qwen3_moe", "jamba", "llava"]

STORED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 single": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tiny):
    """The folder of a checkpoint that is quantised already."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("stored") / kind.replace(" ", "-")
            save_model("llama", made[kind])  # its tokenizer and its config
            model = AutoModelForCausalLM.from_pretrained(
                tiny("llama"), dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**STORED[kind])
            )
            model.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_exact_and_gradients_those_of_the_dequantised_weights(family, kind, tiny):
    source = find(str(tiny(family)))
    found = chart_of(source)
    for dtype in (torch.bfloat16, torch.float32):
        model = load_model(source, dtype, CPU, kind)
        planned = weight_bytes(found, dtype.itemsize, held_as(found, kind))
        if family != "t5" or dtype == torch.float32:  # whose `wo` transformers keeps in float32
            assert held_bytes(model) == planned
    assert {n for n, m in model.named_modules() if is_quantised(m)} == set(found.quantisable) != set()
    whole = twin_of(model, tiny(family))
    (loss, ours), (wanted, theirs) = (gradients(adapted(m, tiny(family))) for m in (model, whole))
    assert loss == pytest.approx(wanted, rel=1e-6) and furthest(ours, theirs) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_evaluating_first_changes_no_gradient_where_bitsandbytes_would_repack_the_weights(
    kind, tiny, monkeypatch
):
    """On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit weights in `eval()`, without autograd."""

    def repacked(*_):
        raise AssertionError("the weights were repacked")

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bitsandbytes.nn.modules, "_convert_weight_packed_for_cpu", repacked)
    model = load_model(find(str(tiny("llama"))), torch.float32, CPU, kind)
    whole = twin_of(model, tiny("llama"))
    (_, ours), (_, theirs) = (gradients(adapted(m, tiny("llama"))) for m in (model, whole))
    assert furthest(ours, theirs) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_evaluating_compute_the_same(kind, dtype, tiny):
    model = load_model(find(str(tiny("llama"))), dtype, CPU, kind)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, model.train()(ids).logits)
        assert torch.equal(model(ids).logits, twin_of(model, tiny("llama"), dtype).train()(ids).logits)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_that_is_quantised_is_taken_as_it_is_in_the_dtype_that_is_asked_for(kind, dtype, stored):
    source = find(str(stored(kind)))
    found = chart_of(source)
    assert found.quantised == stored_quantisation(source.config) and found.quantised.kind == kind[:4].strip()
    assert from_json(jsonable(found)) == found
    model = load_model(source, dtype, CPU)
    assert held_bytes(model) == weight_bytes(found, dtype.itemsize, found.quantised)
    plain = [
        p for n, p in model.named_parameters() if not is_quantised(model.get_submodule(n.rpartition(".")[0]))
    ]
    assert {p.dtype for p in plain} == {dtype}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_its_gradients_are_those_of_its_weights_whatever_they_were_stored_from(kind, stored, tiny):
    model = load_model(find(str(stored(kind))), torch.float32, CPU)  # stored from bfloat16
    whole = twin_of(model, tiny("llama"))
    for name in ("lm_head", "model.embed_tokens", "model.norm"):
        whole.get_submodule(name).weight.data = model.get_submodule(name).weight.data
    for name, parameter in whole.named_parameters():
        if "layernorm" in name:
            parameter.data = model.get_parameter(name).data
    (_, ours), (_, theirs) = (gradients(adapted(m, tiny("llama"))) for m in (model, whole))
    assert furthest(ours, theirs) <= 1e-6
    again = load_model(find(str(tiny("llama"))), torch.bfloat16, CPU, kind)
    for name, module in again.named_modules():
        if is_quantised(module) and kind == "nf4":
            assert torch.equal(
                dequantised(module, torch.float32), dequantised(model.get_submodule(name), torch.float32)
            )


def test_what_was_not_planned_is_not_quantised(tiny, monkeypatch):
    from dataclasses import replace

    from lorafit.model import load

    source = find(str(tiny("llama")))
    found = chart_of(source)
    names = tuple(n for n in found.quantisable if not n.endswith("q_proj"))
    monkeypatch.setattr(load, "chart_of", lambda _: replace(found, quantisable=names))
    model = load_model(source, torch.float32, CPU, "nf4")
    assert {n for n, m in model.named_modules() if is_quantised(m)} == set(names)
    monkeypatch.setattr(load, "chart_of", lambda _: replace(found, quantisable=(*names, "lm_head.x")))
    with pytest.raises(RunError, match=r"did not quantise `lm_head.x`"):
        load_model(source, torch.float32, CPU, "nf4")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype", "float16"], ["--quantize nf4 does not go with --dtype float16", "--dtype bfloat16"]),
        (["--device", "mps"], ["does not run on mps"]),
        (["--quantize", "int4"], ["--quantize is `int4`", "none, nf4, int8"]),
    ],
)
def test_refusals_before_anything_is_loaded(flags, words, run, tiny, pairs, tmp_path):
    for command in (["train", "-o", tmp_path / "r"], ["plan"]):
        done = run(*command, tiny("llama"), "--data", pairs, "--quantize", "nf4", *flags)
        assert done.code == 2 and all(word in done.err for word in words), done.err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(run, tiny, pairs, tmp_path, monkeypatch):
    from lorafit.model import quantised

    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    for command in (["train", "-o", tmp_path / "r"], ["plan"]):
        done = run(*command, tiny("llama"), "--data", pairs, "--quantize", "int8")
        assert done.code == 2 and "--quantize int8 needs `bitsandbytes`" in done.err
        assert "pip install 'lorafit[quant]'" in done.err


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ("{init_lora_weights: pissa}", "does not go with a `pissa` start"),
        ("{init_lora_weights: olora}", "does not go with a `olora` start"),
        ("{modules_to_save: [up_proj]}", "modules_to_save `up_proj`"),
    ],
)
def test_adapters_that_it_does_not_go_with(lora, words, run, tiny, stored, pairs, tmp_path):
    (tmp_path / "p.yaml").write_text(f"roles: [q, v]\nlora: {lora}\n")
    for model, flags in ((tiny("llama"), ["--quantize", "nf4"]), (stored("nf4"), [])):
        done = run("plan", model, "--preset", tmp_path / "p.yaml", *flags)
        assert done.code == 2 and words in done.err, done.err


def test_a_model_of_layers_of_its_own_and_one_that_is_quantised_already(run, tiny, stored):
    done = run("plan", tiny("falcon"), "--quantize", "nf4")
    assert done.code == 2 and "can quantise no weight" in done.err
    done = run("plan", stored("nf4"), "--quantize", "int8")
    assert done.code == 2 and "is quantised already (nf4)" in done.err and "leave it out" in done.err


def test_inspect_and_plan_say_it(run, tiny, stored):
    shown = run("inspect", stored("nf4"))
    assert shown.code == 0 and "in nf4 and" in shown.out
    found = run(
        "plan", tiny("qwen3_moe"), "--quantize", "nf4", "--exclude", "feed-forward", "--no-probe", "--json"
    )
    assert found.code == 0, found.err
    note = next(n for n in found.document["notes"] if n.startswith("nf4: "))
    assert "are quantised" in note and "of experts" in note
    source = chart_of(find(str(tiny("qwen3_moe"))))
    wanted = weight_bytes(source, 4, held_as(source, "nf4"))
    assert found.document["estimate"]["memory"]["weights"] == wanted < 4 * source.total_params
    assert any("dequantising nf4 weights" in a for a in found.document["estimate"]["assumptions"])


@pytest.mark.parametrize(
    ("config", "held"),
    [
        (None, None),
        ({"quant_method": "gptq", "bits": 4}, None),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True}, None),
        ({"_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
    ],
)
def test_how_a_config_says_it(config, held):
    found = stored_quantisation({"quantization_config": config} if config else {})
    assert (found.kind if found else None) == held


def test_a_request_for_both_is_an_error(stored):
    found = chart_of(find(str(stored("int8"))))
    assert json.loads(json.dumps(jsonable(found)))["quantised"]["kind"] == "int8"
    with pytest.raises(RequestError, match="quantised already"):
        held_as(found, "nf4")
