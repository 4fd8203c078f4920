"""Broken and hostile input: a clear error, two lines, and nothing run, lost or left behind."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import events_of, job_for
from safetensors.torch import load_file, save_file

from lorafit.adapter.folder import CONFIG, WEIGHTS
from lorafit.errors import LorafitError, RequestError
from lorafit.model.safetensors_io import SINGLE
from lorafit.settings import preset
from lorafit.settings.bands import LayerChoice
from lorafit.settings.precedence import read_run_file, settle


@pytest.fixture
def base(tiny, tmp_path):
    """A copy of a tiny model, to be broken."""
    return shutil.copytree(tiny("llama"), tmp_path / "base")


@pytest.fixture(scope="module")
def finished(tiny, pairs, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished") / "r"
    events_of(job_for(tiny("llama"), folder, data=(str(pairs),), max_steps=2, batch_size=4))
    return folder


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(bytes(raw))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def wrong_header(path):
    raw = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(raw) * 2) + raw[8:])


def no_json(path):
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"x" + raw[9:])


def other_shape(path):
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, path, {"format": "pt"})


def missing(path):
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def not_finite(path):
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "harm, words",
    [
        (cut, "is damaged"), (wrong_header, "is damaged"), (no_json, "is damaged"), (empty, "is damaged"),
        (other_shape, "model.layers.1.self_attn.q_proj.weight"), (missing, "model.layers.1.self_attn.q_proj.weight"),
        (not_finite, "`model.layers.1.self_attn.q_proj.weight` of the base holds values that are not finite"),
    ],
)  # fmt: skip
def test_base_weights_that_are_broken(base, pairs, tmp_path, run, harm, words):
    harm(base / SINGLE)
    done = run("train", base, "--data", pairs, "--max-steps", 1, "-o", tmp_path / "r")
    assert done.code in (1, 2) and words in done.err and "hint:" in done.err, done.err
    assert not list(tmp_path.glob("r*"))


def test_an_index_that_points_outside_the_folder(base, pairs, tmp_path, run):
    (base / SINGLE).rename(tmp_path / "elsewhere.safetensors")
    names = list(load_file(tmp_path / "elsewhere.safetensors"))
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        done = run("train", base, "--data", pairs, "--max-steps", 1, "-o", tmp_path / "r")
        assert done.code == 2 and "outside its folder" in done.err, done.err


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_weights_or_nothing(base, pairs, tmp_path, run):
    state = load_file(base / SINGLE)
    (base / SINGLE).unlink()
    torch.save(state, base / "pytorch_model.bin")
    assert run("train", base, "--data", pairs, "--max-steps", 1, "-o", tmp_path / "good").code == 0
    torch.save({**state, "x": Bomb(tmp_path / "boom")}, base / "pytorch_model.bin")
    done = run("train", base, "--data", pairs, "--max-steps", 1, "-o", tmp_path / "r")
    assert done.code == 2 and not (tmp_path / "boom").exists() and "hint:" in done.err, done.err
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    done = run("train", base, "--data", pairs, "--max-steps", 1, "-o", tmp_path / "r")
    assert done.code == 2 and not (tmp_path / "boom").exists(), done.err


def test_code_beside_a_model_is_never_run(base, pairs, tmp_path, run, monkeypatch):
    (base / "modeling_evil.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\n")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked on stdin"))
    for more in ({}, {"model_type": "evil"}):
        (base / "config.json").write_text(json.dumps({**config, **more}))
        for command in (
            ["inspect", base],
            ["plan", base],
            ["train", base, "--data", pairs, "-o", tmp_path / "r", "--max-steps", 1],
        ):
            done = run(*command)
            assert done.code in (0, 2) and not (tmp_path / "boom").exists(), done.err
    path = base / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["modeling_evil.T", None]}})
    )
    run("train", base, "--data", pairs, "-o", tmp_path / "s", "--max-steps", 1)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "tokenizer.json", "digests.json"])
def test_a_flipped_bit_in_an_adapter_is_found(finished, tmp_path, run, name):
    folder = shutil.copytree(finished, tmp_path / "r")
    flip(folder / name, (folder / name).stat().st_size // 2)
    for command in (["eval", folder], ["merge", folder, "-o", tmp_path / "m"]):
        done = run(*command)
        assert done.code == 2 and (
            "is not what was written" in done.err or "damaged" in done.err or "cannot be read" in done.err
        ), done.err
    assert not (tmp_path / "m").exists()
    (folder / name).unlink()
    if name != "digests.json":
        assert run("eval", folder).code == 2


def test_an_adapter_of_another_shape(finished, tiny, run, tmp_path):
    done = run("eval", finished, "--model", tiny("gpt2"))
    assert done.code == 2 and "was not trained on" in done.err
    done = run("merge", finished, "--model", tiny("qwen3"), "-o", tmp_path / "m")
    assert done.code == 2 and "was not trained on" in done.err and not (tmp_path / "m").exists(), done.err
    plain = shutil.copytree(
        finished, tmp_path / "plain", ignore=shutil.ignore_patterns("base.json", "digests.json")
    )
    done = run(
        "merge", plain, "--model", tiny("gpt2"), "-o", tmp_path / "m"
    )  # of another tool: by its tensors
    assert done.code in (1, 2) and not (tmp_path / "m").exists(), done.err


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: &a [1,1]\nroles: [*a, *a]\n", "aliases are not supported"),
        ("roles: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("roles: [q]\nroles: [v]\n", "twice"), ("- a\n", "not a mapping"), ("{" * 3000, ""), ("roles: [q]\n" + "#" * 1_100_000, "larger than"),
        ("roles: [q]\nlora:\n  r: 99999999999999\n", "r"), ("? [a]\n: b\n", "a key is not a name"), ("roles: \0\n", ""),
    ],
)  # fmt: skip
def test_yaml_that_means_harm(tmp_path, text, words):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    for read in (preset.load_preset, read_run_file):
        with pytest.raises(RequestError) as error:
            read(str(path))
        assert read is read_run_file or words in error.value.message


# -- anything at all: never a traceback, never a hang ---------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=8)
words = st.sampled_from(
    [
        "q",
        "v",
        "ffn",
        "high",
        "0-3",
        "first:2",
        "all",
        "basic",
        "-1",
        "1e9",
        "nan",
        ".inf",
        "~",
        "[a, b]",
        "{a: b}",
    ]
)
keys = st.sampled_from(
    ["roles", "modules", "layers", "layers_to_transform", "lora", "training", "bands", "description", "r", "alpha", "model",
     "preset", "data", "epochs", "learning_rate", "origin", "strict", "map", "holdout", "x"]
)  # fmt: skip
documents = st.dictionaries(
    keys,
    scalars
    | words
    | st.lists(scalars | words, max_size=3)
    | st.dictionaries(keys, scalars | words, max_size=3),
    max_size=5,
)
FUZZ = settings(max_examples=250, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(documents | st.text(max_size=60))
def test_any_preset_and_run_file(tmp_path_factory, document):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(
        document if isinstance(document, str) else json.dumps(document), encoding="utf-8", errors="replace"
    )
    for read in (
        lambda: preset.load_preset(str(path)),
        lambda: settle({}, str(path)),
        lambda: settle({"preset": str(path)}),
    ):
        try:
            read()
        except LorafitError as error:
            assert error.message


@FUZZ
@given(
    st.text(alphabet="0123456789-,: lowmidhighfrstaln.", max_size=20) | st.text(max_size=10),
    st.integers(0, 200),
)
def test_any_layer_spelling(text, depth):
    try:
        found = LayerChoice(text).indices(depth)
        assert found and list(found) == sorted(set(found)) and found[0] >= 0 and found[-1] < depth
    except LorafitError as error:
        assert error.message
