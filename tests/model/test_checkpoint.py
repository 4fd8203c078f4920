"""What is not a plain language model is named before anything is planned, in every command."""

import json
import shutil

import pytest
import torch
import transformers
from families import FAMILIES, build_model, tokenizer
from safetensors.torch import load_file, save_file

from lorafit.errors import RequestError
from lorafit.model.chart import chart_of, map_of
from lorafit.model.checkpoint import not_a_language_model, quantisation
from lorafit.model.classes import model_class
from lorafit.model.source import find


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path / "m")
    return tmp_path / "m"


def set_config(folder, **more):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def refused(run, model, *words, pairs):
    """`inspect`, `plan` and `train` refuse it with the same words and exit 2."""
    for command in (
        ["inspect", model],
        ["plan", model, "--no-estimate"],
        ["train", model, "--data", pairs, "-q"],
    ):
        done = run(*command)
        assert done.code == 2, (command[0], done.err)
        text = " ".join(done.err.split())
        assert all(word in text for word in words), text
        assert "hint:" in text and "did not expect" not in text


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"group_size": 64, "bits": 4}, "MLX, 4 bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "bitsandbytes, 4 bits"),
        (
            {"quant_method": "bitsandbytes", "_load_in_8bit": True, "llm_int8_has_fp16_weight": True},
            "bitsandbytes, 8 bits",
        ),
    ],
)
def test_quantised_bases(run, folder, pairs, config, word):
    assert quantisation({"quantization_config": config}) == word
    assert quantisation({"text_config": {"quantization_config": config}}) == word
    set_config(folder, quantization_config=config)
    refused(run, folder, f"is quantised ({word})", pairs=pairs)


@pytest.mark.parametrize("how", ["qweight", "float8", "absmax"])
def test_quantised_weights_that_the_config_does_not_name(run, folder, pairs, how):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    if how == "qweight":
        tensors[name.replace("weight", "qweight")] = torch.zeros(4, 32, dtype=torch.int32)
        del tensors[name]
    elif how == "float8":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    else:
        tensors[f"{name}.absmax"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(run, folder, "are quantised", "q_proj", pairs=pairs)


@pytest.mark.parametrize(
    ("cls", "word"),
    [("LlamaForSequenceClassification", "a classifier or reward model"), ("LlamaModel", "a bare body"),
     ("LlamaForTokenClassification", "a token classifier"), ("LlamaForQuestionAnswering", "question answerer")],
)  # fmt: skip
def test_classes_without_a_language_model_head(run, folder, pairs, cls, word):
    set_config(folder, architectures=[cls])
    refused(run, folder, cls, word, "no language model head", pairs=pairs)


def test_heads_are_told_by_their_names_alone():
    for name in (
        "LlamaForCausalLM",
        "GPT2LMHeadModel",
        "BertForMaskedLM",
        "T5ForConditionalGeneration",
        "BertForPreTraining",
    ):
        assert not not_a_language_model(name)
        assert model_class(transformers.AutoConfig.for_model("llama", architectures=[name])).__name__ == name
    for name in ("LlamaForRewardModel", "MistralForSequenceClassification", "Qwen2ForRewardModel"):
        assert not_a_language_model(name)


def test_weights_without_a_head(run, folder, pairs):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(run, folder, "no language model head", "lm_head", pairs=pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_lacks_its_head(tiny, family):
    assert chart_of(find(str(tiny(family)))).slots


def test_an_adapter_beside_the_weights(run, folder, pairs):
    (folder / "adapter_config.json").write_text("{}")
    refused(run, folder, "an adapter beside", "folder of their own", pairs=pairs)


def test_files_that_are_not_models(run, folder, pairs, tmp_path):
    gguf = tmp_path / "x.bin"
    gguf.write_bytes(b"GGUF" + bytes(60))
    refused(run, gguf, "is a GGUF file", pairs=pairs)
    refused(run, folder / "model.safetensors", "is a weight file", "name its folder", pairs=pairs)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    refused(run, folder / "pytorch_model.bin", "is a PyTorch weight file", "name its folder", pairs=pairs)
    refused(run, pairs, "is data, not a model", "--data", pairs=pairs)
    broken = tmp_path / "odd.json"
    broken.write_text("{,")
    refused(run, broken, "is not a config", pairs=pairs)


def test_folders_that_are_not_models(run, tmp_path, pairs):
    for name, words in {
        "x.gguf": "holds GGUF files", "model.safetensors": "weights and no config.json", "rows.jsonl": "holds data",
    }.items():  # fmt: skip
        place = tmp_path / name.replace(".", "-")
        place.mkdir()
        (place / name).write_bytes(b"{}")
        refused(run, place, words, pairs=pairs)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    refused(run, tmp_path / "gone", "link whose target is missing", pairs=pairs)


def test_gguf_beside_a_config(run, folder, pairs):
    (folder / "model.safetensors").rename(folder / "model.gguf")
    refused(run, folder, "are GGUF files", pairs=pairs)


@pytest.mark.parametrize("kind", ["pegasus", "marian", "bart", "t5"])
def test_an_encoder_decoder_without_architectures_is_its_seq2seq_class(kind):
    config = transformers.AutoConfig.for_model(
        kind, d_model=32, encoder_layers=2, decoder_layers=2, num_layers=2, vocab_size=100,
        encoder_attention_heads=4, decoder_attention_heads=4, num_heads=4, d_kv=8, encoder_ffn_dim=64,
        decoder_ffn_dim=64, d_ff=64, pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    assert config.architectures is None
    found = map_of(config)
    assert found.task == "seq2seq" and len(found.text_stacks) == 2


def test_merge_names_a_quantised_base(run, folder, tiny, tmp_path):
    from adapters import make_adapter

    make_adapter(tmp_path / "a", tiny("llama"))
    set_config(folder, quantization_config={"quant_method": "fp8"})
    done = run("merge", tmp_path / "a", "--model", folder, "-o", tmp_path / "o", "--no-verify")
    assert done.code == 2 and "is quantised (fp8)" in done.err and not (tmp_path / "o").exists()


def test_pickled_weights_are_not_taken_for_none(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    torch.save(load_file(tmp_path / "m" / "model.safetensors"), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert chart_of(find(str(tmp_path / "m"))).slots


def test_a_link_or_a_name_that_is_nothing():
    with pytest.raises(RequestError, match="there is no model"):
        find("./nothing/here")
