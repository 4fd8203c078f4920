"""A base divided among two processes: the run of one, with half of the blocks in each."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from families import FAMILIES, LLAMA_LIKE, build_model, save_model, tokenizer
from jobs import events_of, job_for, losses, stopped_after
from processes import NO_NOISE, TESTS, environment, launched, lines_of, same_adapter

from lorafit.adapter import resolve
from lorafit.errors import LorafitError, RequestError
from lorafit.estimate.sharding import divided
from lorafit.estimate.terms import Profile, Shape
from lorafit.events import Stepped
from lorafit.model import chart_of, find
from lorafit.operations import plan_run
from lorafit.settings import load_preset

BASE = {"preset": "attention", "layers": "last:2", "max_length": 100, "learning_rate": 5e-3}
CASES = {
    "accumulation, a partial last group": ("llama", {"batch_size": 7, "accumulate": 2, "epochs": 2}),
    "one row a batch": (
        "llama",
        {"batch_size": 1, "max_steps": 20, "eval_steps": 9, "keep_last": True, "holdout": 0.125},
    ),
    "prefix in memory": ("llama", {"batch_size": 7, "epochs": 3, "prefix_cache": "memory"}),
    "prefix of one row a batch": ("llama", {"batch_size": 1, "max_steps": 60, "prefix_cache": "memory"}),
    "prefix on disk": ("llama", {"batch_size": 7, "epochs": 3, "prefix_cache": "disk"}),
    "activation checkpointing": ("llama", {"batch_size": 8, "epochs": 2, "gradient_checkpointing": True}),
    "all layers": ("qwen3", {"batch_size": 6, "epochs": 2, "preset": "all", "layers": "all"}),
    "masked LM": ("bert", {"batch_size": 6, "epochs": 2}),
    "sequence to sequence": ("t5", {"batch_size": 6, "epochs": 2}),
    "a mixture": ("mixtral", {"batch_size": 6, "epochs": 2}),
    "experts": ("mixtral", {"batch_size": 6, "epochs": 2, "preset": "ffn", "prefix_cache": "memory"}),
    "fused weights, layers that run several times": ("hrm", {"batch_size": 6, "epochs": 2, "layers": "all"}),
    "decay, cosine, clipping": (
        "gpt2",
        {"batch_size": 5, "epochs": 2, "weight_decay": 0.3, "scheduler": "cosine", "max_grad_norm": 0.1},
    ),
    "bfloat16": ("llama", {"batch_size": 7, "epochs": 2, "dtype": "bfloat16", "prefix_cache": "off"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    room = tmp_path_factory.mktemp("models")
    families = {family for family, _ in CASES.values()} & set(FAMILIES)
    made = {family: save_model(family, room / family, **NO_NOISE.get(family, {})) for family in families}
    torch.manual_seed(0)
    hrm = transformers.HrmTextForCausalLM(
        transformers.HrmTextConfig(**LLAMA_LIKE, architectures=["HrmTextForCausalLM"], initializer_range=0.08)
    )
    save(
        hrm, made, room / "hrm"
    )  # whose checkpoints hold q, k, v and a gate in one tensor, gate and up in another
    odd = build_model("llama")
    odd.model.layers[2].mlp.down_proj.weight.data[-1, -1] = torch.inf  # a row of the last process
    save(odd, made, room / "odd")
    made["wide"] = save_model("llama", room / "wide", hidden_size=256, intermediate_size=512, head_dim=64)
    return made


def save(model, made, folder):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    made[folder.name] = folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, models, pairs):
    """All cases in two processes: what each found, and where their folders lie."""
    room = tmp_path_factory.mktemp("two")
    jobs = {
        name: {
            "model": str(models[family]),
            "output": str(room / name),
            "data": [str(pairs)],
            **BASE,
            **flags,
        }
        for name, (family, flags) in CASES.items()
    }
    more = {"model": str(models["llama"]), "data": [str(pairs)], **BASE, "batch_size": 6, "epochs": 2}
    jobs["stopped"] = {**more, "output": str(room / "stopped"), "stop_at": 3}
    wide = {**more, "model": str(models["wide"]), "max_steps": 1}
    jobs["wide"] = {**wide, "output": str(room / "wide")}
    jobs["wide again"] = {
        **wide,
        "output": str(room / "wide 2"),
    }  # whose files have been read for their digest
    jobs["resumed"] = {**more, "output": str(room / "1 to 2"), "resume": True}
    cached = {**more, "epochs": 3, "prefix_cache": "disk"}
    jobs["stopped in the fill"] = {**cached, "output": str(room / "fill"), "batch_size": 5, "stop_at": 1}
    jobs["full disk"] = {**cached, "output": str(room / "full"), "longest_file_of_the_last": 60_000}
    jobs["not finite"] = {**more, "model": str(models["odd"]), "output": str(room / "odd")}
    jobs = {name: {**job, "shard": True} for name, job in jobs.items()}
    alone = {**more, "data": (str(pairs),)}
    with pytest.raises(LorafitError, match="interrupted after step 3"):
        stopped_after(job_for(alone.pop("model"), room / "1 to 2", **alone), 3)
    (room / "jobs.json").write_text(json.dumps(jobs))
    done = launched(TESTS / "ranks.py", room / "jobs.json", room / "found.json", XDG_CACHE_HOME=str(room))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((room / f"found.json.{rank}").read_text()) for rank in range(2))
    return first, second, room


@pytest.mark.parametrize("name", CASES)
@pytest.mark.long
def test_a_sharded_base_takes_the_steps_of_a_whole_one(name, two, models, pairs, tmp_path):
    family, flags = CASES[name]
    first, second, room = two
    job = job_for(models[family], tmp_path / "r", data=(str(pairs),), **{**BASE, **flags})
    events = events_of(job)
    found = first[name]
    close = 3e-4 if flags.get("dtype") == "bfloat16" else 1e-6
    assert found["losses"] == pytest.approx(losses(events), rel=close, abs=close)
    assert found["tokens"] == [e.tokens for e in events if isinstance(e, Stepped)]
    assert found["losses"] == second[name]["losses"] and found["same"], "both hold the same adapter"
    if "prefix_cache" in flags:
        assert found["cache"] == flags["prefix_cache"]
    if close == 1e-6:
        same_adapter(room / name, tmp_path / "r")


@pytest.mark.long
def test_a_run_goes_on_sharded_or_whole(two, models, pairs, tmp_path):
    first, second, room = two
    flags = {"data": (str(pairs),), **BASE, "batch_size": 6, "epochs": 2}
    whole = events_of(job_for(models["llama"], tmp_path / "whole", **flags))
    assert "interrupted after step 3" in first["stopped"]["error"] == second["stopped"]["error"]
    events_of(job_for(models["llama"], room / "stopped", resume=True, **flags))
    same_adapter(room / "stopped", tmp_path / "whole")
    assert first["resumed"]["losses"][-1] == pytest.approx(losses(whole)[-1], rel=1e-6)
    same_adapter(room / "1 to 2", tmp_path / "whole")


@pytest.mark.long
def test_what_happens_to_one_process_all_take_part_in(two, models, pairs, tmp_path):
    """A signal while the cache is filled, a full disk, a weight that is not finite: of the last process alone."""
    first, second, _ = two
    for found in (first, second):
        assert "interrupted before the first step" in found["stopped in the fill"]["error"]
        assert "`model.layers.2.mlp.down_proj.weight`" in found["not finite"]["error"]
        assert found["full disk"]["cache"] == "off"
    flags = {"data": (str(pairs),), **BASE, "batch_size": 6, "epochs": 3, "prefix_cache": "disk"}
    whole = losses(events_of(job_for(models["llama"], tmp_path / "whole", **flags)))
    assert first["full disk"]["losses"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.long
def test_a_process_reads_and_holds_its_rows_alone(two, models):
    """What `plan` counts is what is held, to the byte where the rows divide evenly."""
    first, second, _ = two
    size = sum(path.stat().st_size for path in models["wide"].glob("*.safetensors"))
    for found in (first, second):
        assert 0.5 * size < found["wide again"]["read"] < 0.6 * size
    for name, family in (
        ("wide", "wide"),
        ("a mixture", "mixtral"),
        ("decay, cosine, clipping", "gpt2"),
        ("all layers", "qwen3"),
    ):
        found = chart_of(find(str(models[family])))
        exclude = ["feed-forward"] if found.reinterpreted else []
        plan = resolve(found, load_preset("attention"), "last:2", exclude=exclude)
        base = divided(found, plan, Shape(1, 1), Profile(0, 0, 0, 0, 0, 0, 0, False), 2)
        assert [first[name]["held"], second[name]["held"]] == [base.held, base.held], name


def test_what_cannot_be_sharded_is_refused_by_plan_and_train_alike(models, tmp_path, monkeypatch):
    """Each with its reason and what to do, in one process of `plan`; `train` calls the same two checks."""
    preset = tmp_path / "mine.yaml"

    def refused(words, lora="", **flags):
        preset.write_text(f"roles: [q, v]\nlayers: last:2\nlora: {{{lora}}}\n")
        given = {"model": str(models["llama"]), "preset": str(preset), "shard": True, **flags}
        with pytest.raises(RequestError, match=words) as error:
            plan_run(given, processes=flags.pop("processes", 2), estimate=False)
        assert error.value.hint

    plan_run({"model": str(models["llama"]), "shard": True}, processes=2, estimate=False)
    refused("not sharded: its scales", quantize="nf4")
    refused("it runs in one process, and --shard in several", prefix_residency="stream")
    refused("`modules_to_save: lm_head` trains whole weights", "modules_to_save: [lm_head]")
    refused("`bias: all` trains whole weights", "bias: all")
    refused("DoRA reads whole weights", "use_dora: true")
    refused("`init_lora_weights: pissa` reads whole weights", "init_lora_weights: pissa")
    with pytest.raises(RequestError, match="divides the base among processes, and there is one"):
        plan_run({"model": str(models["llama"]), "shard": True}, estimate=False)
    torch.save(build_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((models["llama"] / name).read_bytes())
    refused("cannot be sharded: there are no .safetensors files", model=str(tmp_path))
    monkeypatch.setattr("lorafit.model.identity.installed", lambda package: "2.11.0+cpu")
    refused("cannot be sharded: it needs torch 2.13")


def test_one_process_takes_a_run_file_that_shards(models, pairs, tmp_path):
    """A run that was sharded goes on, or is done again, in one process: the file does not ask for several."""
    (tmp_path / "run.yaml").write_text(f"model: {models['llama']}\nshard: true\n")
    made = plan_run({}, str(tmp_path / "run.yaml"), estimate=False)
    assert not made.settings.shard and made.settings.why("shard") == "there is one process"


def test_plan_counts_a_process_and_what_it_receives(models, pairs):
    """Of an untied Llama: blocks and embedding divided, two blocks gathered, each block received in both passes."""
    flags = {"model": str(models["llama"]), "data": (str(pairs),), "preset": "attention", "layers": "last:2",
             "batch_size": 4, "prefix_cache": "off"}  # fmt: skip
    whole, part = (
        plan_run({**flags, "shard": shard}, processes=4, probe=False).estimate for shard in (False, True)
    )
    found = chart_of(find(str(models["llama"])))
    block = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32
    table = 896 * 32
    assert whole.memory.weights == 4 * found.total_params == 4 * (4 * block + 2 * table + 32)
    assert part.memory.weights == 4 * (block + table // 4 + table + 32)
    assert part.memory.gathered == 2 * 4 * block
    alone = whole.memory.peak - whole.memory.heap  # which is of one machine, and not counted in several
    assert part.memory.peak - alone == 4 * (2 * block - 3 * block - table * 3 // 4)
    received = 4 * 3 / 4 * (table + 4 * block + 2 * block)
    micro_batches = whole.steps / whole.epochs
    seconds = received * micro_batches / 3e8
    assert part.seconds_per_epoch - whole.seconds_per_epoch == pytest.approx(seconds, rel=1e-6)
    assert any("of the base for each micro-batch" in text for text in part.assumptions)
    room = f"4x{(whole.memory.peak + part.memory.peak) // 2000}kB"
    assert any(
        option.flags == "--shard"
        for option in plan_run({**flags, "device": "cpu"}, fit=room, probe=False).fit.alternatives
    )


ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--use_fsdp",
    "--num_processes",
    "2",
    "--fsdp_version",
]


@pytest.mark.long
def test_accelerate_shards_and_the_adapter_is_as_any_other(tmp_path, forked):
    """`--use_fsdp --fsdp_version 2` is `--shard`: what it saves is evaluated and merged in one process."""
    import lorafit

    def run(*command):
        return subprocess.run(
            [*map(str, command)], cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=900
        )

    train = ["-m", "lorafit", "train", "--preset", "ffn", "--layers", "high", "--max-steps", "40", "--json"]
    done = run(*ACCELERATE, 2, *train, "-o", "shared")
    assert done.returncode == 0, done.stderr
    assert "in 2 processes that share the base" in " ".join(done.stderr.split())
    report = json.loads(done.stdout)
    assert report["settings"]["shard"] and report["prefix_cache"]["where"] == "memory"
    alone = forked.run(*train[2:], "-o", "alone", cwd=tmp_path, env=environment())
    assert report["eval"]["after"]["loss"] == pytest.approx(
        json.loads(alone.stdout)["eval"]["after"]["loss"], rel=1e-5
    )
    same_adapter(tmp_path / "shared", tmp_path / "alone")
    found = lorafit.evaluate(tmp_path / "shared", samples=0)
    assert found.adapters[0].loss == pytest.approx(report["eval"]["after"]["loss"], rel=1e-5)
    lorafit.merge(tmp_path / "shared", output=tmp_path / "merged")

    refused = run(*ACCELERATE, 1, *train, "-o", "no")
    assert refused.returncode != 0 and len(lines_of(refused.stderr)) == 2, refused.stderr
    assert "FSDP1 is not used" in refused.stderr and not (tmp_path / "no").exists()
