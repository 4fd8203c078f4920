"""A merged folder by role, and a run's tokenizer: the base's own files and what the run changed."""

import json
import shutil

import pytest
import torch
from adapters import do_merge, make_adapter
from families import build_model, tokenizer
from safetensors.torch import load_file

from lorafit.adapter.tokenizer_files import save_tokenizer
from lorafit.merge.carry import carry
from lorafit.model.load import load_tokenizer, stored_dtype
from lorafit.model.source import find
from lorafit.settings.preset import Lora


@pytest.fixture
def base(tiny, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path / "base")
    return tmp_path / "base"


def test_the_config_is_the_bases_whatever_the_adapter_holds(base, tmp_path):
    for name in ("generation_config.json", "LICENSE", "tokenizer.model", "modeling_x.py", "README.md"):
        (base / name).write_text("{}")
    (base / "original").mkdir()
    source, found, _ = make_adapter(tmp_path / "a", base)
    for name in (
        "config.json",
        "trainer_state.json",
        "training_args.json",
        "vocab.json",
        "generation_config.json",
    ):
        (tmp_path / "a" / name).write_text('{"quantization_config": 1}')
    report = do_merge(tmp_path / "a", source, found, tmp_path / "m")
    merged = tmp_path / "m"
    for name in ("config.json", "generation_config.json", "LICENSE", "tokenizer.model", "tokenizer.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    names = {path.name for path in merged.iterdir()}
    assert not names & {"trainer_state.json", "training_args.json", "vocab.json", "modeling_x.py", "original"}
    assert set(report.left_out) >= {
        "adapter: config.json", "adapter: trainer_state.json", "adapter: training_args.json", "adapter: vocab.json",
        "base: modeling_x.py", "base: original", "base: README.md",
    }  # fmt: skip


def test_the_tokenizer_is_the_runs(base, tmp_path):
    (base / "chat_template.jinja").write_text("base")
    (base / "vocab.tiktoken").write_text("words")
    own, work = tmp_path / "a", tmp_path / "work"
    own.mkdir()
    work.mkdir()
    shutil.copyfile(base / "tokenizer.json", own / "tokenizer.json")
    (own / "tokenizer_config.json").write_text('{"chat_template": "run"}')
    (own / "additional_chat_templates").mkdir()
    (own / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    carry(base, own, own, work)
    assert json.loads((work / "tokenizer_config.json").read_text()) == {"chat_template": "run"}
    assert not (work / "chat_template.jinja").exists()  # the base's would win over the run's
    assert (work / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert (work / "vocab.tiktoken").read_text() == "words"


@pytest.mark.parametrize("said", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_the_dtype_is_the_tensors_not_the_configs(tmp_path, said, kind, dora):
    base = tmp_path / "base"
    build_model("llama").to(kind).save_pretrained(base)
    tokenizer().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype", None)
    (base / "config.json").write_text(json.dumps({**config, **({"torch_dtype": said} if said else {})}))
    source, found, _ = make_adapter(tmp_path / "a", base, lora=Lora(use_dora=dora))
    assert stored_dtype(find(str(base))) == kind
    do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {kind}
    assert (tmp_path / "m" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_single_tensors_of_another_dtype_keep_it_through_the_model(tmp_path):
    """Norms in float32 beside bfloat16 weights, as several checkpoints have them; and the base's shards."""
    base = tmp_path / "base"
    model = build_model("llama").to(torch.bfloat16)
    model.model.norm.weight.data = torch.linspace(0.9, 1.1, 32)
    model.save_pretrained(base, max_shard_size="60KB")
    tokenizer().save_pretrained(base)
    source, found, _ = make_adapter(tmp_path / "a", base, lora=Lora(use_dora=True))
    do_merge(tmp_path / "a", source, found, tmp_path / "m")
    for path in sorted(base.glob("*.safetensors")):
        old, new = load_file(path), load_file(tmp_path / "m" / path.name)
        assert old.keys() == new.keys() and all(t.dtype == new[n].dtype for n, t in old.items())
        if "model.norm.weight" in old:
            assert torch.equal(old["model.norm.weight"], new["model.norm.weight"])


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tokenizer_of(base, tmp_path, **changes):
    """A run's folder with the tokenizer of that base, changed."""
    own = load_tokenizer(str(base), "base")
    for name, value in changes.items():
        setattr(own, name, value)
    (tmp_path / "run").mkdir()
    save_tokenizer(own, tmp_path / "run")
    return own, load_tokenizer(str(tmp_path / "run"), "run")


def test_a_tokenizer_that_did_not_change_is_the_bases_byte_for_byte(base, tmp_path):
    (base / "tokenizer.model").write_bytes(b"\x01\x02")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    tokenizer_of(base, tmp_path)
    wanted = {n: raw for n, raw in files(base).items() if "token" in n or "templ" in n}
    assert files(tmp_path / "run") == wanted and "additional_chat_templates/rag.jinja" in wanted


def test_a_template_of_the_run_takes_the_place_of_the_bases(base, tmp_path):
    (base / "chat_template.jinja").write_text("base {{ messages }}")
    _, again = tokenizer_of(base, tmp_path, chat_template="run {{ messages[0].content }}")
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "run hi"
    run = tmp_path / "run"
    assert (run / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    config = json.loads((run / "tokenizer_config.json").read_text())
    assert config.pop("chat_template") == "run {{ messages[0].content }}"
    assert config == json.loads((base / "tokenizer_config.json").read_text())


def test_an_end_token_of_the_run_is_saved(base, tmp_path):
    own = load_tokenizer(str(base), "base")
    other = next(t for t in own.get_vocab() if t not in own.all_special_tokens)
    _, again = tokenizer_of(base, tmp_path, eos_token=other)
    assert again.eos_token == other
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_added_tokens_are_saved_whole(base, tmp_path):
    own = load_tokenizer(str(base), "base")
    own.add_tokens(["<new>"])
    (tmp_path / "run").mkdir()
    save_tokenizer(own, tmp_path / "run")
    again = load_tokenizer(str(tmp_path / "run"), "run")
    assert again("<new>")["input_ids"] == own("<new>")["input_ids"]
