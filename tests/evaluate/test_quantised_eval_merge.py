"""`lorafit eval` and `lorafit merge` of runs on a quantised base."""

import shlex
import shutil

import pytest
import torch
from families import save_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from twins import CPU

from lorafit.adapter import attach
from lorafit.model import find, load_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, pairs):
    """The folder of a run on a base in `nf4`, `int8` or `none`, made once."""
    from lorafit.cli import app

    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("runs") / kind
            words = [
                "train",
                tiny("llama"),
                "--data",
                pairs,
                "--quantize",
                kind,
                "--preset",
                "all",
                "--epochs",
                2,
            ]
            with pytest.raises(SystemExit) as end:
                app([str(w) for w in (*words, "--batch-size", 4, "-o", made[kind], "--quiet")])
            assert not end.value.code
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_eval_takes_it_from_the_run(kind, run, trained):
    done = run("eval", trained(kind), "--samples", 1, "--json")
    assert done.code == 0, done.err
    ended = run("eval", trained(kind), "--samples", 0, "--quantize", kind, "--json").document
    assert ended["base"] == done.document["base"] and ended["adapters"] == done.document["adapters"]
    assert any(f"the base is in {kind}, as in training" in note for note in done.document["notes"])
    plain = run("eval", trained(kind), "--samples", 0, "--quantize", "none", "--json").document
    assert plain["base"] != done.document["base"]
    assert any(f"was trained with --quantize {kind}" in note for note in plain["notes"])


def test_the_losses_of_eval_are_those_of_the_run(run, trained):
    import json

    events = [json.loads(line) for line in (trained("nf4") / "events.jsonl").read_text().splitlines()]
    report = next(e for e in events if e["event"] == "report")
    found = run("eval", trained("nf4"), "--samples", 0, "--json").document
    assert found["base"]["loss"] == pytest.approx(report["eval"]["before"]["loss"], rel=1e-6)
    assert found["adapters"][0]["loss"] == pytest.approx(report["eval"]["after"]["loss"], rel=1e-5)


def test_adapters_of_bases_that_differ(run, trained):
    done = run("eval", trained("nf4"), trained("int8"), "--samples", 0)
    assert (
        done.code == 2 and "was trained on a base in nf4" in done.err and "--quantize says which" in done.err
    )
    done = run("eval", trained("nf4"), trained("int8"), "--samples", 0, "--quantize", "int8", "--json")
    assert done.code == 0 and len(done.document["adapters"]) == 2
    done = run("eval", trained("nf4"), "--dtype", "float16")
    assert done.code == 2 and "does not go with --dtype float16" in done.err


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_merge_is_the_full_base_and_the_adapter(kind, run, trained, tiny, tmp_path):
    done = run("merge", trained(kind), "-o", tmp_path / "m", "--json")
    assert done.code == 0, done.err
    found = done.document
    assert any(
        f"was trained on a base in {kind} and is merged into the full weights" in n
        and f"`lorafit eval {shlex.quote(str(trained(kind)))} --quantize none`" in n
        for n in found["notes"]
    )
    assert found["verify"]["max_logit_diff"] <= found["verify"]["tolerance"] and found["verify"]["weights"]
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"trained on a base in {kind}" in card and str(trained(kind).parent) not in card
    ids = torch.arange(3, 40)[None]
    whole = attach(load_model(find(str(tiny("llama"))), torch.float32, CPU), trained(kind)).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(merged(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_base_that_is_quantised_already_is_trained_on_and_not_merged_into(run, tiny, pairs, tmp_path):
    base = tmp_path / "base"
    save_model("llama", base)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tiny("llama"), dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(base)
    done = run("train", base, "--data", pairs, "--max-steps", 4, "-o", tmp_path / "r")
    assert done.code == 0, done.err
    assert run("eval", tmp_path / "r", "--samples", 0).code == 0
    refused = run("merge", tmp_path / "r", "-o", tmp_path / "m")
    assert refused.code == 2 and "is quantised (nf4)" in refused.err and not (tmp_path / "m").exists()
    shutil.copytree(tiny("llama"), tmp_path / "other")
    other = run("eval", tmp_path / "r", "--model", tmp_path / "other", "--samples", 0)
    assert other.code == 2 and "the weights differ" in other.err
