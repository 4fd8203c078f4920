import json
import shutil

import pytest
import torch
from adapters import do_merge, make_adapter
from families import FAMILIES, build_model
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorafit.adapter.folder import WEIGHTS, read_config
from lorafit.adapter.inject import adapted_names
from lorafit.errors import RequestError, RunError
from lorafit.merge import deltas, merge, verify, write
from lorafit.merge.verify import verify_merge
from lorafit.model.chart import chart_of
from lorafit.model.headers import open_file, shards
from lorafit.model.load import load_tokenizer
from lorafit.model.safetensors_io import read_tensor, spans
from lorafit.model.source import ModelSource, find
from lorafit.settings.preset import Lora


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_equals_peft_merge_on_every_family(tiny, tmp_path, family):
    source, found, model = make_adapter(tmp_path / "a", tiny(family))
    report = do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert (
        report.adapted == len(adapted_names(model)) and report.verify.max_logit_diff < report.verify.tolerance
    )
    assert report.verify.argmax_agreement > 0.99
    mine = {n: t for path in shards(tmp_path / "m") for n, t in load_file(path).items()}
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    theirs = load_file(tmp_path / "peft" / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    plain = type(model.get_base_model()).from_pretrained(tmp_path / "m")
    assert plain.num_parameters() and (tmp_path / "m" / "tokenizer.json").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_base_merges_to_peft_s_bits(tmp_path, family):
    """Added in float32 and rounded once, as PEFT does with float32 adapters."""
    from families import tokenizer

    base = tmp_path / "base"
    build_model(family).to(torch.bfloat16).save_pretrained(base)
    tokenizer(FAMILIES[family].task == "masked").save_pretrained(base)
    source, found, model = make_adapter(tmp_path / "a", base)
    do_merge(tmp_path / "a", source, found, tmp_path / "m", verify=False)
    mine = {n: t for path in shards(tmp_path / "m") for n, t in load_file(path).items()}
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    theirs, before = load_file(tmp_path / "peft" / "model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_finer_dtype_than_the_bases_verifies(tmp_path, dtype):
    """Both sides of the proof are run in the base's dtype: its rounding is allowed, whatever is stored."""
    from families import tokenizer

    base = tmp_path / "base"
    build_model("llama").to(torch.bfloat16).save_pretrained(base)
    tokenizer().save_pretrained(base)
    source, found, _ = make_adapter(tmp_path / "a", base)
    report = do_merge(tmp_path / "a", source, found, tmp_path / "m", dtype=dtype)
    assert report.verify.max_logit_diff <= report.verify.tolerance
    (path,) = shards(tmp_path / "m")
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in load_file(path).values())


@pytest.mark.parametrize(
    "lora", [Lora(use_rslora=True, r=4), Lora(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 3, "q_proj": 64}), Lora(use_dora=True), Lora(bias="all"), Lora(modules_to_save=("lm_head",)), Lora(modules_to_save=("embed_tokens",))],
    ids=["rslora", "patterns", "dora", "bias", "head", "embedding"],
)  # fmt: skip
def test_loras_settings_merge_as_peft_merges_them(tiny, tmp_path, lora):
    family = "opt" if lora.bias != "none" else "llama"
    source, found, model = make_adapter(tmp_path / "a", tiny(family), lora=lora)
    report = do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert bool(report.notes) == (lora.use_dora or lora.bias != "none" or bool(lora.modules_to_save))
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    mine, theirs = (
        load_file(tmp_path / "m" / "model.safetensors"),
        load_file(tmp_path / "peft" / "model.safetensors"),
    )
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)


def test_shards_index_and_bfloat16_are_kept(tmp_path):
    from families import tokenizer

    base = tmp_path / "base"
    build_model("llama").to(torch.bfloat16).save_pretrained(base, max_shard_size="60KB")
    tokenizer().save_pretrained(base)
    assert len(shards(base)) > 2
    source, found, model = make_adapter(tmp_path / "a", base)
    report = do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert [p.name for p in shards(tmp_path / "m")] == [p.name for p in shards(base)]
    assert json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text()) == json.loads(
        (base / "model.safetensors.index.json").read_text()
    )
    wanted = model.to(torch.bfloat16).merge_and_unload().state_dict()
    changed = 0
    for old, new in zip(shards(base), shards(tmp_path / "m"), strict=True):
        before, after = load_file(old), load_file(new)
        for name, tensor in after.items():
            assert tensor.dtype == before[name].dtype == torch.bfloat16
            if not torch.equal(tensor, before[name]):
                changed += 1
                assert (tensor.float() - wanted[name].float()).abs().max() <= 2**-7 * wanted[name].abs().max()
    assert changed == report.adapted == 14


def test_a_wrong_base_is_an_error_and_leaves_nothing(tiny, tmp_path):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"))
    other = find(str(tiny("qwen3")))
    with pytest.raises((RequestError, RunError)):
        do_merge(tmp_path / "a", find(str(tiny("gpt2"))), chart_of(find(str(tiny("gpt2")))), tmp_path / "m")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()
    assert other.config["model_type"] == "qwen3"
    do_merge(tmp_path / "a", source, found, tmp_path / "m")
    with pytest.raises(RequestError, match="exists"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")


def test_a_merge_that_is_not_the_same_is_not_put_in_place(tiny, tmp_path, monkeypatch):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"))
    monkeypatch.setattr(merge, "added", lambda deltas, rows, first: rows)
    with pytest.raises(RunError, match="differs from base"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert shards(tmp_path / "m.unverified") and not (tmp_path / "m.merging").exists()


def test_what_is_no_number_does_not_verify(tiny, tmp_path, monkeypatch):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"))
    monkeypatch.setattr(merge, "added", lambda deltas, rows, first: rows * float("nan"))
    with pytest.raises(RunError, match="differs from base"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")


@pytest.mark.parametrize("init", ["olora", "pissa"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_that_changes_the_base_is_saved_for_the_base_as_it_was(tiny, tmp_path, init, rslora):
    lora = Lora(init_lora_weights=init, r=4, use_rslora=rslora, rank_pattern={"q_proj": 2})
    if rslora:
        lora = Lora(init_lora_weights=init, r=4, use_rslora=True)
    source, found, model = make_adapter(tmp_path / "a", tiny("llama"), lora=lora)
    config = read_config(tmp_path / "a")
    assert config["init_lora_weights"] is True and config["r"] == 8
    ids = torch.arange(20).view(1, 20)
    wanted = model.eval()(input_ids=ids).logits
    plain = type(model.get_base_model()).from_pretrained(tiny("llama"))
    before = plain(input_ids=ids).logits
    got = PeftModel.from_pretrained(plain, tmp_path / "a").eval()(input_ids=ids).logits
    assert (got - wanted).abs().max() < 1e-4 < 0.1 * (wanted - before).abs().max()
    report = do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert not report.notes and report.verify.max_logit_diff < report.verify.tolerance


@pytest.mark.parametrize(
    "plant",
    {
        "nothing": lambda deltas, rows, first: rows.clone(),
        "scale": lambda deltas, rows, first: rows + 1.01 * sum(d.rows(first, len(rows)) for d in deltas),
        "sign": lambda deltas, rows, first: rows - sum(d.rows(first, len(rows)) for d in deltas),
        "half": lambda deltas, rows, first: torch.cat(
            [rows[:8], rows[8:] + sum(d.rows(first, len(rows)) for d in deltas)[8:]]
        ),
        "one value": lambda deltas, rows, first: merge_rows(deltas, rows, first).index_put_(
            (torch.tensor(3), torch.tensor(2)), torch.tensor(0.25)
        ),
    }.items(),
    ids=lambda plant: plant[0],
)
@pytest.mark.parametrize("size", [0.1, 1e-5])
def test_a_planted_error_is_found_in_weight_space(tiny, tmp_path, monkeypatch, plant, size):
    """Also where the adapter is so small that logits do not show it."""
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"), size=size)
    monkeypatch.setattr(merge, "added", plant[1])
    monkeypatch.setattr(verify, "TOLERANCE", dict.fromkeys(verify.TOLERANCE, 1e9))
    with pytest.raises(RunError, match=r"differs from base.*values of `model\.layers\.[23]"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert not (tmp_path / "m").exists() and shards(tmp_path / "m.unverified")


def merge_rows(parts, rows, first):
    return deltas.added(parts, rows.clone(), first)


def test_a_layer_that_is_skipped_is_found(tiny, tmp_path, monkeypatch):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"), size=1e-4)
    real = deltas.deltas

    def fewer(*given):
        return {name: d for name, d in real(*given).items() if "layers.3" not in name}

    monkeypatch.setattr(write, "deltas", fewer)
    with pytest.raises(RunError, match=r"differs from base.*layers\.3"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")


def test_a_transposed_delta_is_found(tiny, tmp_path, monkeypatch):
    """On a square weight, where no shape tells."""
    source, found, _ = make_adapter(tmp_path / "a", tiny("gpt2"), preset="extended", size=1e-4)
    real = deltas.deltas

    def turned(*given):
        def turn(d):
            square = d.up_OR.shape[0] == d.down_RI.shape[1]
            return deltas.Delta(d.down_RI, d.up_OR, d.scaling, not d.flip) if square else d

        return {name: turn(d) for name, d in real(*given).items()}

    monkeypatch.setattr(write, "deltas", turned)
    with pytest.raises(RunError, match=r"differs from base.*c_proj"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")


def test_a_byte_that_no_adapter_touches_is_found(tiny, tmp_path, monkeypatch):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"))
    from lorafit.merge.write import Work

    real = Work.stream

    def flipped(self, base, work, tick):
        real(self, base, work, tick)
        tensors = load_file(work / "model.safetensors")
        tensors["model.norm.weight"][0] += 1e-6
        save_file(tensors, work / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(Work, "stream", flipped)
    with pytest.raises(RunError, match=r"1 of 32 values of `model\.norm\.weight` are not the base's"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")


@pytest.mark.parametrize(
    "lora", [Lora(use_dora=True), Lora(modules_to_save=("lm_head",))], ids=["dora", "head"]
)
@pytest.mark.parametrize("what", ["nothing", "scale"])
def test_a_planted_error_is_found_where_the_whole_model_was_merged(tiny, tmp_path, monkeypatch, lora, what):
    from peft import PeftModel as Model
    from peft.tuners.lora.layer import LoraLayer

    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"), lora=lora, size=1e-3)
    factor = 0.0 if what == "nothing" else 1.05

    def wrong(self):
        if lora.modules_to_save:
            saved = self.base_model.model.lm_head.modules_to_save.default.weight
            saved.data = self.base_model.model.lm_head.original_module.weight.data + (
                saved.data * (factor != 0) * 0.1
            )
        for module in self.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= factor
        return self.base_model.merge_and_unload()

    monkeypatch.setattr(Model, "merge_and_unload", wrong, raising=False)
    monkeypatch.setattr(verify, "TOLERANCE", dict.fromkeys(verify.TOLERANCE, 1e9))
    with pytest.raises(RunError, match="differs from base"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")


def test_a_planted_error_in_experts_is_found(tiny, tmp_path, monkeypatch):
    source, found, _ = make_adapter(tmp_path / "a", tiny("mixtral"), preset="ffn", size=1e-3)
    from peft.tuners.lora.layer import ParamWrapper

    real = ParamWrapper.get_delta_weight
    monkeypatch.setattr(
        ParamWrapper, "get_delta_weight", lambda self, name, *more: real(self, name, *more) * 1.05
    )
    monkeypatch.setattr(verify, "TOLERANCE", dict.fromkeys(verify.TOLERANCE, 1e9))
    with pytest.raises(RunError, match=r"differs from base.*experts"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")


def test_a_merge_that_moves_nothing_says_so(tiny, tmp_path):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"), size=0)
    report = do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert report.verify.weights.moved_values == 0 and "changes nothing" in " ".join(report.notes)


def test_what_moved_is_counted(tiny, tmp_path):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"))
    seen = do_merge(tmp_path / "a", source, found, tmp_path / "m").verify.weights
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny("llama"), tmp_path / "m"))
    assert seen.tensors == len(base) and seen.values == sum(t.numel() for t in base.values())
    assert (
        seen.moved_tensors
        == sum(not torch.equal(t, merged[n]) for n, t in base.items())
        == seen.adapted
        == 14
    )
    assert seen.moved_values == sum(int((t != merged[n]).sum()) for n, t in base.items())


def test_neither_base_nor_adapter_is_overwritten(tiny, tmp_path):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"))
    for output in (tmp_path / "a", tiny("llama")):
        with pytest.raises(RequestError, match="is read by this command"):
            do_merge(tmp_path / "a", source, found, output, overwrite=True)


def test_files_that_are_damaged(tiny, tmp_path):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"))
    base = tmp_path / "base"
    shutil.copytree(tiny("llama"), base)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (
        whole[:-1],
        whole + b"x",
        whole[:4],
        b"\xff" * 64,
        b"",
        (10**9).to_bytes(8, "little") + whole[8:],
    ):
        weights.write_bytes(damaged)
        with pytest.raises(RequestError, match="damaged"):
            open_file(weights)
        with pytest.raises(RequestError):
            do_merge(tmp_path / "a", find(str(base)), found, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    broken = tmp_path / "a" / WEIGHTS
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.raises(RequestError, match="damaged"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")


def test_an_index_that_points_outside(tmp_path):
    for name, word in (("../x.safetensors", "outside"), ("none.safetensors", "not there"), (3, "outside")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(RequestError, match=word):
            shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(RequestError, match="damaged"):
        shards(tmp_path)


def test_tensors_are_read_as_safetensors_reads_them(tmp_path):
    tensors = {
        "a": torch.randn(3, 5), "b": torch.randn(7).to(torch.bfloat16), "c": torch.arange(4), "d": torch.zeros(0, 3),
        "e": torch.tensor(3.0), "f": torch.tensor([True, False]),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = open_file(tmp_path / "x.safetensors")
    assert {e.name for e in file.entries} == set(tensors)
    for entry in file.entries:
        assert torch.equal(read_tensor(file, entry), tensors[entry.name])


def test_blocks_of_rows_are_the_whole_product_to_the_bit():
    torch.manual_seed(0)
    for out, into, rank, flip in (
        (3000, 1111, 16, False),
        (4096, 896, 8, True),
        (130, 77, 3, False),
        (30_522, 768, 16, False),
        (2049, 64, 64, False),
        (5, 9, 2, True),
        (1025, 2305, 128, True),
    ):
        delta = deltas.Delta(torch.randn(rank, into), torch.randn(out, rank), 0.37, flip)
        whole = ((delta.up_OR @ delta.down_RI).T if flip else delta.up_OR @ delta.down_RI) * 0.37
        assert delta.shape == whole.shape
        for step in (64, 192, 1024):
            parts = [delta.rows(first, many) for first, many in spans(len(whole), step)]
            assert torch.equal(torch.cat(parts), whole), (out, into, step)


def test_a_tensor_larger_than_a_block_merges_as_peft_merges_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafit.model.safetensors_io.PIECE", 1)  # blocks of 64 rows
    source, found, model = make_adapter(tmp_path / "a", tiny("llama"))
    do_merge(tmp_path / "a", source, found, tmp_path / "m")
    mine = load_file(tmp_path / "m" / "model.safetensors")
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    theirs = load_file(tmp_path / "peft" / "model.safetensors")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "t5"])
def test_the_proof_by_blocks_says_what_the_proof_of_whole_models_says(tiny, tmp_path, family):
    source, found, _ = make_adapter(tmp_path / "a", tiny(family))
    report = do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert not report.notes, report.notes
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    base = verify.WeightedModel(source, ((tmp_path / "a", 1.0),))
    merged = verify.WeightedModel(ModelSource("m", str(tmp_path / "m"), config))
    tokenizer = load_tokenizer(source.place, "base")
    whole = verify_merge(base, merged, found, [], tokenizer, by_blocks=False)
    assert "whole" in whole.note and report.verify.tokens == whole.tokens
    assert report.verify.loss == pytest.approx(whole.loss, rel=1e-4)
    assert report.verify.merged_loss == pytest.approx(whole.merged_loss, rel=1e-4)
    assert report.verify.adapter_logit_diff == pytest.approx(whole.adapter_logit_diff, rel=1e-3)
    assert whole.adapter_logit_diff > 10 * whole.max_logit_diff


def test_several_adapters_are_summed_by_their_weights(tiny, tmp_path):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"), preset="attention", layers="all")
    make_adapter(
        tmp_path / "b", tiny("llama"), preset="ffn", layers="last:3", lora=Lora(r=4, use_rslora=True)
    )
    make_adapter(tmp_path / "c", tiny("llama"), preset="all", layers="first:1")
    adapters = [(tmp_path / "a", 0.7), (tmp_path / "b", 0.3), (tmp_path / "c", -1.5)]
    report = do_merge(adapters, source, found, tmp_path / "m")
    assert not report.notes and report.verify.argmax_agreement == 1
    mine = load_file(tmp_path / "m" / "model.safetensors")
    base = load_file(tiny("llama") / "model.safetensors")
    wanted = {name: tensor.double() for name, tensor in base.items()}
    for folder, weight in adapters:
        config = read_config(folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        for name, down in tensors.items():
            if ".lora_A." in name:
                home = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
                up = tensors[name.replace(".lora_A.", ".lora_B.")]
                wanted[home] += weight * scale * (up.double() @ down.double())
    changed = [name for name in base if not torch.equal(mine[name], base[name])]
    assert len(changed) == report.adapted
    for name, tensor in wanted.items():
        assert torch.allclose(mine[name].double(), tensor, rtol=1e-5, atol=1e-5), name


def test_what_is_no_sum_is_not_summed(tiny, tmp_path):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"))
    make_adapter(tmp_path / "b", tiny("llama"), lora=Lora(use_dora=True))
    with pytest.raises(RequestError, match="DoRA"):
        do_merge([(tmp_path / "a", 1.0), (tmp_path / "b", 0.5)], source, found, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_another_dtype_and_smaller_files(tiny, tmp_path):
    source, found, model = make_adapter(tmp_path / "a", tiny("llama"))
    report = do_merge(
        tmp_path / "a", source, found, tmp_path / "m", dtype="bfloat16", max_shard=60_000, verify=False
    )
    files = shards(tmp_path / "m")
    assert report.verify is None and len(files) > 2
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    mine = {n: t for path in files for n, t in load_file(path).items()}
    assert index["weight_map"].keys() == mine.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in mine.values())
    theirs = model.merge_and_unload().state_dict()
    assert all(torch.equal(t, theirs[n].to(torch.bfloat16)) for n, t in mine.items())
    loaded = type(model.get_base_model()).from_pretrained(tmp_path / "m")
    assert loaded.dtype == torch.bfloat16
    largest = max(sum(t.nbytes for t in load_file(path).values()) for path in files)
    assert largest <= max(60_000, *(t.nbytes for t in mine.values()))


def test_the_indexs_total_is_made_true(tmp_path):
    from families import tokenizer

    base = tmp_path / "base"
    build_model("llama").save_pretrained(base, max_shard_size="60KB")
    tokenizer().save_pretrained(base)
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    true = index["metadata"]["total_size"]
    path.write_text(json.dumps({**index, "metadata": {**index["metadata"], "total_size": 7}}))
    source, found, _ = make_adapter(tmp_path / "a", base)
    do_merge(tmp_path / "a", source, found, tmp_path / "m")
    merged = json.loads((tmp_path / "m" / path.name).read_text())
    assert merged["metadata"]["total_size"] == true and merged["weight_map"] == index["weight_map"]


def test_a_tensor_of_the_adapter_without_a_home_is_an_error(tiny, tmp_path):
    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    for half in ("A", "B"):
        name = f"base_model.model.model.layers.2.mlp.up_proj.lora_{half}.weight"
        tensors[name.replace("layers.2", "layers.77")] = tensors[name].clone()
    save_file(tensors, file)
    with pytest.raises(RequestError, match=r"layers\.77|counterpart|fit"):
        do_merge(tmp_path / "a", source, found, tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob("m.*"))


def test_a_full_disk_leaves_nothing_half_done(tiny, tmp_path):
    """A limit on a file's size stands for the disk: the system refuses the write in the same way."""
    import subprocess
    import sys

    make_adapter(tmp_path / "a", tiny("llama"))
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from lorafit.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "merge", str(tmp_path / "a"), "--model", str(tiny("llama")),
         "-o", str(tmp_path / "m"), "--no-verify"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "cannot be written" in done.stderr and "merge again" in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob("m.*"))


def test_a_copy_within_the_system_that_is_refused_is_done_by_hand(tiny, tmp_path, monkeypatch):
    import errno
    import os

    def refused(*_):
        raise OSError(errno.EXDEV, "between file systems")

    source, found, _ = make_adapter(tmp_path / "a", tiny("llama"))
    do_merge(tmp_path / "a", source, found, tmp_path / "m", verify=False)
    monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    do_merge(tmp_path / "a", source, found, tmp_path / "n", verify=False)
    one, other = (tmp_path / name / "model.safetensors" for name in ("m", "n"))
    assert one.read_bytes() == other.read_bytes()


def test_the_tolerance_of_logits_is_no_wider_than_rounding():
    """A spacing of each dtype, as a share of the largest logit, times what a deep model adds up: a float32
    merge that is off by a thousandth of the logits must fail."""
    for dtype, allowed in verify.TOLERANCE.items():
        spacing = torch.finfo(dtype).eps
        assert 2 * spacing < allowed <= (16 * spacing if dtype is not torch.float32 else 1e-3)


def test_a_parameter_made_later_is_never_taken_for_one_of_the_base(tiny):
    """PEFT replaces an embedding's weight; what is made then must not be fed the base's bytes."""
    from lorafit.merge.verify import _homes, _without_weights

    source = find(str(tiny("llama")))
    model = _without_weights(source, torch.float32)
    homes = _homes(model, source)
    for module in list(model.modules()):
        module._parameters.clear()
    made = [torch.nn.Parameter(torch.empty(1, device="meta")) for _ in range(1000)]
    assert homes and not {id(parameter) for parameter in made} & homes.keys()


def of_peft(folder, base, **lora):
    """An adapter that PEFT has made and saved."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    whole = type(build_model("llama")).from_pretrained(base)
    model = get_peft_model(whole, LoraConfig(r=4, init_lora_weights=False, **lora))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def tied(folder, **more):
    """A tiny Llama whose head is its embedding."""
    from families import tokenizer

    build_model("llama", tie_word_embeddings=True, **more).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_tied_base_that_stores_both_is_merged_to_a_file_that_opens(tmp_path, module):
    """As some checkpoints do; the copy that is there is the one that is changed."""
    base = tied(tmp_path / "base")
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    model, source = of_peft(tmp_path / "a", base, target_modules=["q_proj", module]), find(str(base))
    do_merge(tmp_path / "a", source, chart_of(source), tmp_path / "m")
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert merged.keys() == tensors.keys()
    plain = type(model.get_base_model()).from_pretrained(tmp_path / "m").eval()
    ids = torch.arange(20).view(1, 20)
    torch.testing.assert_close(
        plain(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-4, rtol=0
    )
    assert not plain.config.tie_word_embeddings


def test_trained_tokens_of_a_tied_base_stay_in_its_head(tmp_path):
    """PEFT replaces the same rows of embedding and head."""
    base = tied(tmp_path / "base")
    source = find(str(base))
    model = of_peft(
        tmp_path / "a", base, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 9, 20]}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token_adapter" in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    ids = torch.tensor([[3, 5, 9, 20, 30, 5]])
    wanted = model.eval()(input_ids=ids).logits
    do_merge(tmp_path / "a", source, chart_of(source), tmp_path / "m")
    plain = type(model.get_base_model()).from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(plain(input_ids=ids).logits, wanted, atol=1e-4, rtol=0)
    assert plain.config.tie_word_embeddings


def test_a_rounded_copy_of_the_base_beside_an_adapter_is_not_taken_for_it(tmp_path):
    """PEFT writes the embedding beside its adapter, in the dtype that it was trained in."""
    from families import tokenizer

    base = tmp_path / "base"
    build_model("llama").save_pretrained(base)
    tokenizer().save_pretrained(base)
    of_peft(tmp_path / "a", base, target_modules=["q_proj", "embed_tokens"])
    source = find(str(base))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file({**tensors, name: table.to(torch.bfloat16)}, tmp_path / "a" / WEIGHTS, {"format": "pt"})
    assert not torch.equal(table.to(torch.bfloat16).float(), table)
    report = do_merge(tmp_path / "a", source, chart_of(source), tmp_path / "m")
    assert report.verify.max_logit_diff < report.verify.tolerance


def test_a_bias_that_has_no_place_in_the_base_is_refused(tmp_path, tiny):
    of_peft(tmp_path / "a", tiny("llama"), target_modules=["q_proj"], lora_bias=True)
    source = find(str(tiny("llama")))
    with pytest.raises(RequestError, match=r"PEFT cannot merge .*bias"):
        do_merge(tmp_path / "a", source, chart_of(source), tmp_path / "m")
    assert not (tmp_path / "m").exists()
