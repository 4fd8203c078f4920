"""`lorafit export`: llama.cpp's converter is found and run, its file read back, and what it cannot take is refused."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from hub_cache import in_hub_cache

# The converter's command line and its file, without its models: two matrices of each module, with the adapter's alpha.
# `WRONG` is what it does otherwise. With LLAMA_CPP the tests run llama.cpp's own as well.
STAND_IN = """
import argparse, json, os, sys
from pathlib import Path
import gguf
from safetensors.numpy import load_file
parser = argparse.ArgumentParser()
for name in ("--outfile", "--outtype", "--base", "--base-model-id"):
    parser.add_argument(name)
parser.add_argument("place", type=Path)
options, wrong = parser.parse_args(), os.environ.get("WRONG", "")
if wrong == "fails":
    sys.exit("ValueError: this model")
assert (Path(options.base) / "config.json").is_file()
alpha = json.loads((options.place / "adapter_config.json").read_text())["lora_alpha"]
writer = gguf.GGUFWriter(options.outfile, "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", alpha * (2 if wrong == "alpha" else 1))
values = load_file(options.place / "adapter_model.safetensors")
for number, (name, value) in enumerate(sorted(values.items())):
    if number or wrong != "tensor":
        writer.add_tensor(name.removeprefix("base_model.model."), value)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
REAL = os.environ.get("LLAMA_CPP", "")


@pytest.fixture(autouse=True)
def no_place(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(gguf.__file__).parent.parent))


@pytest.fixture(scope="module")
def adapter(tiny, pairs, tmp_path_factory):
    """An adapter of all seven roles in two layers of a tiny Llama."""
    from lorafit.cli import app

    folder = tmp_path_factory.mktemp("export") / "an adapter"
    words = [
        "--data",
        pairs,
        "--preset",
        "all",
        "--layers",
        "2-3",
        "--max-steps",
        2,
        "--no-sample",
        "-q",
        "-o",
        folder,
    ]
    with pytest.raises(SystemExit) as end:
        app(["train", str(tiny("llama")), *map(str, words)])
    assert end.value.code == 0
    return folder


@pytest.fixture
def converters(tmp_path):
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_lora_to_gguf.py").write_text(STAND_IN, encoding="utf-8")
    return tmp_path / "llama.cpp"


# llama.cpp is not in the package index: its own converter runs where LLAMA_CPP names it, the stand-in everywhere
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.skipif(not REAL, reason="LLAMA_CPP names no llama.cpp"))])  # fmt: skip
def test_an_adapter_becomes_a_file_that_holds_it(run, adapter, tiny, converters, tmp_path, monkeypatch, real):
    monkeypatch.chdir(tmp_path)
    place = REAL if real else converters
    found = run("export", adapter, "--llama-cpp", place, "--json").document
    assert (found["output"], found["adapter"], found["tensors"], found["alpha"]) == (
        "an adapter.gguf",
        True,
        28,
        32.0,
    )
    read = gguf.GGUFReader("an adapter.gguf")
    assert read.get_field("general.type").contents() == "adapter" and len(read.tensors) == 28
    assert run("export", adapter, "--llama-cpp", place).code == 2, "it exists"
    shown = run("export", adapter, "--llama-cpp", place, "--overwrite").out
    assert "28 tensors, alpha 32" in shown and "--lora 'an adapter.gguf'" in shown
    monkeypatch.setenv("LLAMA_CPP", str(place))
    assert run("export", adapter, "-o", "deep/er/b.gguf").code == 0 and Path("deep/er/b.gguf").is_file()
    monkeypatch.setenv("LLAMA_CPP", "")
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    assert run("export", adapter, "-o", "c.gguf", "--outtype", "f16").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["an adapter.gguf", "c.gguf", "deep", "llama.cpp"]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("fails", "convert_lora_to_gguf.py failed: ValueError: this model"),
        ("tensor", "made 27 tensors for 14 modules"),
        ("alpha", "made alpha 64.0 for 32"),
    ],
)
def test_a_file_that_is_wrong_is_not_kept(run, adapter, converters, tmp_path, monkeypatch, wrong, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WRONG", wrong)
    result = run("export", adapter, "--llama-cpp", converters)
    assert result.code == 1 and said in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["llama.cpp"]


def test_without_llama_cpp_the_commands_are_shown(run, adapter, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("export", adapter)
    assert result.code == 2 and "convert_lora_to_gguf.py is not on this machine" in result.err
    assert "git clone" in result.err and "--llama-cpp llama.cpp" in result.err
    *_, last = run("export", adapter, "--commands", "--json").document["commands"]
    words = shlex.split(last)
    assert words[1:] == [
        str(Path("llama.cpp/convert_lora_to_gguf.py")), str(adapter), "--base", str(tiny("llama")), "--outfile", "an adapter.gguf",
    ]  # fmt: skip
    *first, last = (
        line.split(maxsplit=1)[-1] for line in run("export", tiny("llama"), "--commands").out.splitlines()
    )
    assert "convert_hf_to_gguf.py" in last and any("git clone" in line for line in first)
    result = run("export", adapter, "--llama-cpp", tmp_path)
    assert result.code == 2 and "there is no convert_lora_to_gguf.py in --llama-cpp" in result.err


def test_a_model_that_is_not_downloaded_is_downloaded_first(run, tiny, tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = in_hub_cache(tiny("llama"), hub, ref="v2")
    assert not any(
        "hf download" in line for line in run("export", "ada/tiny@v2", "--commands").out.splitlines()
    )
    next((home / "snapshots").rglob("model.safetensors")).unlink()
    *_, first, last = run("export", "ada/tiny@v2", "--commands", "--json").document["commands"]
    assert first == "hf download ada/tiny --revision v2" and "convert_hf_to_gguf.py" in last


def test_a_model_of_the_hub_is_a_folder_to_the_converter(run, tiny, tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snapshot,) = (in_hub_cache(tiny("llama"), hub) / "snapshots").iterdir()
    *_, last = run("export", "ada/tiny", "--commands", "--json").document["commands"]
    assert shlex.split(last)[2] == str(snapshot)
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text("import sys\nsys.exit(sys.argv[1])\n")
    done = run("export", "ada/tiny", "--llama-cpp", "llama.cpp")
    assert done.code == 1 and f"failed: {snapshot}" in done.err


def test_what_llama_cpp_cannot_take_is_refused(run, adapter, tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scaled").mkdir()
    for file in adapter.iterdir():
        if file.is_file() and file.name != "digests.json":
            (tmp_path / "scaled" / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "scaled" / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    result = run("export", "scaled")
    assert (
        result.code == 2 and "rank-stabilised" in result.err and "lorafit merge scaled -o DIR" in result.err
    )
    (tmp_path / "x.gguf").write_text("mine")
    for words, said in (
        (("demo",), "does not know the demo's tokenizer"),
        ((tiny("t5"),), "not a causal model"),
        ((adapter, "--to", "onnx"), "--to is `onnx`"),
        ((adapter, "--outtype", "int4"), "--outtype is `int4`"),
        ((adapter, "-o", "."), "is a folder"),
        ((adapter, "-o", "x.gguf", "--overwrite"), "is not a GGUF file"),
        (("nowhere",), "there is no folder `nowhere`"),
    ):
        result = run("export", *words)
        assert result.code == 2 and said in result.err, (words, result.err)
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_its_help_needs_no_library():
    code = "import sys\nfrom lorafit.cli import app\ntry: app(['export', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
