"""An adapter is what PEFT loads: embeddings, heads, tied heads, older formats, hub ids; what is not honoured is refused."""

import json
import os
import stat

import pytest
import torch
from adapters import do_merge, make_adapter
from families import build_model, tokenizer
from hub_cache import hub, in_hub_cache  # noqa: F401
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafit.adapter.folder import CONFIG, check_values, locate, read_config, replaces_its_base
from lorafit.errors import RequestError
from lorafit.model.chart import chart_of
from lorafit.model.source import find


def foreign(base, folder, seed=3, **settings):
    """An adapter that plain PEFT made, not zero; the model with it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder)
    return adapted


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 45).view(2, 20)).logits.float()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base whose head is the embedding, and one whose head is not."""
    made = {}
    for tied in (False, True):
        made[tied] = tmp_path_factory.mktemp("bases") / f"tied-{tied}"
        build_model("llama", tie_word_embeddings=tied).save_pretrained(made[tied])
        tokenizer().save_pretrained(made[tied])
    return made


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "names", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"]]
)
def test_embeddings_and_heads_merge_to_what_peft_computes(bases, tmp_path, run, pairs, tied, dora, names):
    base = bases[tied]
    wanted = logits(foreign(base, tmp_path / "a", target_modules=names, use_dora=dora))
    assert any(
        n.endswith("base_layer.weight") for n in load_file(tmp_path / "a" / "adapter_model.safetensors")
    )
    done = run("eval", tmp_path / "a", "--data", pairs, "--samples", 0, "--json", "--rows", 0)
    assert done.code == 0, done.err
    source = find(str(base))
    report = do_merge(tmp_path / "a", source, chart_of(source), tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert (logits(merged) - wanted).abs().max() < 1e-4
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert report.verify.weights.moved_tensors == report.adapted
    assert any("tie_word_embeddings" in note for note in report.notes) == (tied and not dora)


@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_a_tied_pair_that_peft_keeps_tied(bases, tmp_path, run, pairs, how):
    """PEFT adapts the head along with the embedding, or saves it once more."""
    names = {
        "target_modules": ["q_proj"],
        how: ["q_proj", "embed_tokens"] if how == "target_modules" else ["embed_tokens"],
    }
    wanted = logits(foreign(bases[True], tmp_path / "a", ensure_weight_tying=True, **names))
    done = run("merge", tmp_path / "a", "-o", tmp_path / "m")
    assert done.code == 0 and "verified" in done.out, done.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens"])
def test_a_part_of_a_tied_pair_that_was_trained_whole(bases, tmp_path, trained):
    wanted = logits(foreign(bases[True], tmp_path / "a", modules_to_save=[trained]))
    source = find(str(bases[True]))
    do_merge(tmp_path / "a", source, chart_of(source), tmp_path / "m")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")) - wanted).abs().max() < 1e-4


def test_an_embedding_of_its_own_beside_the_adapter_is_the_one_used(bases, tmp_path):
    foreign(bases[False], tmp_path / "a", target_modules=["embed_tokens"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, path, {"format": "pt"})
    wanted = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[False]), tmp_path / "a")
    )
    source = find(str(bases[False]))
    report = do_merge(tmp_path / "a", source, chart_of(source), tmp_path / "m")
    assert any("of its own" in note for note in report.notes)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")) - wanted).abs().max() < 1e-4


def test_adapters_on_single_experts_as_earlier_versions_named_them(tiny, tmp_path, run, pairs):
    """transformers 4 had a module for each expert; PEFT converts the names to the one tensor of today."""
    base = tiny("qwen3_moe")
    source = find(str(base))
    found = chart_of(source)
    layer, tensors = "base_model.model.model.layers.3.mlp.experts", {}
    torch.manual_seed(0)
    for expert in range(4):
        for name, into, out in (("gate_proj", 32, 24), ("up_proj", 32, 24), ("down_proj", 24, 32)):
            tensors[f"{layer}.{expert}.{name}.lora_A.weight"] = torch.randn(2, into) * 0.1
            tensors[f"{layer}.{expert}.{name}.lora_B.weight"] = torch.randn(out, 2) * 0.1
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    LoraConfig(
        r=2, lora_alpha=4, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM",
        base_model_name_or_path=str(base), layers_to_transform=[3],
    ).save_pretrained(tmp_path / "a")  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    wanted = logits(PeftModel.from_pretrained(plain, tmp_path / "a"))
    assert (wanted - before).abs().max() > 1e-3
    done = run("eval", tmp_path / "a", "--data", pairs, "--samples", 0, "--json", "--rows", 0)
    assert done.code == 0, done.err
    do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")) - wanted).abs().max() < 1e-4


def test_pickled_weights_are_named_with_a_command_that_converts_them(bases, tmp_path, run, pairs):
    import subprocess
    import sys

    foreign(bases[False], tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    torch.save(tensors, path.with_name("adapter_model.bin"))
    path.unlink()
    done = run("eval", tmp_path / "a", "--data", pairs)
    assert done.code == 2 and "adapter_model.bin" in done.err
    with pytest.raises(RequestError) as caught:
        read_config(tmp_path / "a")
    assert "weights_only=True" in caught.value.hint
    subprocess.run(["bash", "-c", caught.value.hint.replace("python", sys.executable, 1)], check=True)
    again = load_file(path)
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], t) for n, t in tensors.items())
    assert run("eval", tmp_path / "a", "--data", pairs, "--samples", 0, "--json").code == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("alora_invocation_tokens", [5, 6]), ("layer_replication", [[0, 2], [1, 4]]), ("use_qalora", True),
     ("a_setting_of_tomorrow", True), ("another", {"x": 1})],
)  # fmt: skip
@pytest.mark.parametrize("verify", [True, False])
def test_settings_that_change_the_meaning_are_refused_by_name(
    bases, tmp_path, run, pairs, key, value, verify
):
    foreign(bases[False], tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    for command in (
        ["merge", tmp_path / "a", "-o", tmp_path / "m", *([] if verify else ["--no-verify"])],
        ["eval", tmp_path / "a", "--data", pairs],
    ):
        done = run(*command)
        assert done.code == 2 and f"`{key}`" in done.err, done.err
    assert not (tmp_path / "m").exists()


def test_an_adapter_as_lora_ga_leaves_it_is_refused(bases, tmp_path, run):
    foreign(bases[False], tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, "init_lora_weights": "lora_ga"}))
    done = run("merge", tmp_path / "a", "-o", tmp_path / "m")
    assert done.code == 2 and "`lora_ga` start needs it" in done.err


def test_an_adapter_whose_file_holds_the_bases_embedding_replaces_its_base(bases, tmp_path):
    foreign(bases[False], tmp_path / "a", trainable_token_indices={"embed_tokens": [3]})
    assert not replaces_its_base(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    extra = {"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)}
    save_file({**load_file(path), **extra}, path, {"format": "pt"})
    assert replaces_its_base(tmp_path / "a")


def test_a_vocabulary_that_was_enlarged_is_named(bases, tmp_path, run, pairs):
    larger = AutoModelForCausalLM.from_pretrained(bases[False])
    size = larger.config.vocab_size
    larger.resize_token_embeddings(size + 5)
    larger.save_pretrained(tmp_path / "larger")
    foreign(tmp_path / "larger", tmp_path / "a", modules_to_save=["embed_tokens"])
    done = run("eval", tmp_path / "a", "--model", bases[False], "--data", pairs, "--samples", 0)
    assert done.code == 2 and f"enlarged from {size:,} to {size + 5:,}" in done.err, done.err
    assert f"resize_token_embeddings({size + 5})" in done.err


def test_a_home_is_found_wherever_a_folder_is_named(bases, tmp_path, run, pairs, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    foreign(bases[False], tmp_path / "a")
    assert locate("~/a") == str(tmp_path / "a")
    (tmp_path / "run.yaml").write_text(f"from_adapter: ~/a\ndata: [{pairs}]\nmax_steps: 1\nmax_length: 64\n")
    done = run("train", "--config", tmp_path / "run.yaml", "-o", tmp_path / "r", "-q")
    assert done.code == 0, done.err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_an_error_in_every_command(bases, tmp_path, run, pairs, value):
    foreign(bases[False], tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name][1, 2] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RequestError, match="not finite"):
        check_values(tmp_path / "a")
    for command in (
        ["merge", tmp_path / "a", "-o", tmp_path / "m"], ["merge", tmp_path / "a", "-o", tmp_path / "m", "--no-verify"],
        ["eval", tmp_path / "a", "--data", pairs], ["eval", tmp_path / "a", "--prompt", "hi"],
    ):  # fmt: skip
        done = run(*command)
        assert done.code == 2 and name in done.err and "not finite" in done.err
    assert not (tmp_path / "m").exists()


def test_an_adapter_by_hub_id(bases, tmp_path, hub, run, pairs):  # noqa: F811
    foreign(bases[False], tmp_path / "a")
    foreign(bases[False], tmp_path / "b", seed=4)
    in_hub_cache(tmp_path / "a", hub, name="ada/lora")
    in_hub_cache(tmp_path / "b", hub, name="ada/lora", revision="c" * 40, ref="v2")
    for name, folder in (("ada/lora", "a"), ("ada/lora@v2", "b")):
        with_file = load_file(os.path.join(locate(name), "adapter_model.safetensors"))
        assert all(
            torch.equal(t, with_file[n])
            for n, t in load_file(tmp_path / folder / "adapter_model.safetensors").items()
        )
        assert run("eval", name, "--data", pairs, "--samples", 0, "--json", "--rows", 0).code == 0
        done = run("merge", name, "-o", tmp_path / f"m-{folder}")
        assert done.code == 0, done.err
    for name in ("ada/other", "ada/lora@v3"):
        done = run("eval", name, "--data", pairs)
        text = " ".join(done.err.split())
        assert done.code == 2 and "not in the local cache, and HF_HUB_OFFLINE is set" in text, text


def test_a_weight_file_has_the_permissions_of_the_others(tiny, tmp_path):
    was = os.umask(0o022)
    try:
        make_adapter(tmp_path / "a", tiny("llama"))
    finally:
        os.umask(was)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()}
    assert modes == {0o644}


def test_a_misspelt_run_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert locate("runs/mine") == "runs/mine"
