"""Several processes do the run that one does: torchrun on this machine, gloo."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from families import build_model, save_model, tokenizer
from jobs import events_of, job_for, losses, stopped_after
from processes import LAUNCH, NO_NOISE, TESTS, environment, free_port, launched, lines_of, same_adapter

from lorafit.adapter.folder import WEIGHTS
from lorafit.distributed import World, asked_to_shard, only_train
from lorafit.errors import LorafitError, RequestError
from lorafit.events import Stepped

BASE = {"preset": "attention", "layers": "last:2", "max_length": 100, "learning_rate": 5e-3}
CASES = {
    "accumulation, a partial last group": ("llama", {"batch_size": 7, "accumulate": 2, "epochs": 2}),
    "one row a batch": ("llama", {"batch_size": 1, "max_steps": 20}),
    "prefix in memory": ("llama", {"batch_size": 7, "epochs": 3, "prefix_cache": "memory"}),
    "prefix on disk": ("llama", {"batch_size": 7, "epochs": 3, "prefix_cache": "disk"}),
    "activation checkpointing": ("llama", {"batch_size": 8, "epochs": 2, "gradient_checkpointing": True}),
    "float16": ("llama", {"batch_size": 7, "epochs": 2, "dtype": "float16"}),
    "a base in 4 bits": ("llama", {"batch_size": 7, "epochs": 2, "quantize": "nf4"}),
    "masked LM": ("bert", {"batch_size": 6, "epochs": 2}),
    "sequence to sequence": ("t5", {"batch_size": 6, "epochs": 2}),
    "a mixture": ("mixtral", {"batch_size": 6, "epochs": 2}),
    "decay, cosine, clipping": (
        "gpt2",
        {"batch_size": 5, "epochs": 2, "weight_decay": 0.3, "scheduler": "cosine", "max_grad_norm": 0.1},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    room = tmp_path_factory.mktemp("models")
    made = {
        family: save_model(family, room / family, **NO_NOISE.get(family, {}))
        for family in {family for family, _ in CASES.values()}
    }
    steep = build_model("llama")  # whose first gradients overflow in float16, scaled as the first ones are
    steep.lm_head.weight.data *= 40
    steep.save_pretrained(room / "steep")
    tokenizer().save_pretrained(room / "steep")
    return {**made, "steep": room / "steep"}


@pytest.fixture(scope="module")
def two(tmp_path_factory, models, pairs):
    """All cases in two processes: {name: result}, and where their folders lie."""
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
    more = {"model": str(models["llama"]), "data": [str(pairs)], **BASE, "batch_size": 6}
    jobs["stopped"] = {**more, "output": str(room / "stopped"), "epochs": 2, "stop_at": 3}
    jobs["resumed in two"] = {**more, "output": str(room / "1 to 2"), "epochs": 2, "resume": True}
    noisy = {**more, "epochs": 2, "dropout": 0.3}
    jobs["dropout"] = {**noisy, "output": str(room / "dropout")}
    jobs["dropout stopped"] = {**noisy, "output": str(room / "dropout 2"), "stop_at": 3}
    jobs["dropout resumed"] = {**noisy, "output": str(room / "dropout 2"), "resume": True}
    steep = {**more, "model": str(models["steep"]), "epochs": 2, "dtype": "float16"}
    jobs["overflow"] = {**steep, "output": str(room / "overflow")}
    jobs["not finite"] = {**more, "output": str(room / "odd"), "epochs": 9, "learning_rate": 10.0}
    jobs["no such layer"] = {**more, "output": str(room / "no"), "layers": "99"}
    one_of_two = {**more, "output": str(room / "1 to 2"), "epochs": 2}
    stopped_in_one(one_of_two)
    (room / "jobs.json").write_text(json.dumps(jobs))
    done = launched(TESTS / "ranks.py", room / "jobs.json", room / "found.json", XDG_CACHE_HOME=str(room))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((room / f"found.json.{rank}").read_text()) for rank in range(2))
    return first, second, room


def stopped_in_one(flags):
    """A run in one process, stopped after its third step."""
    flags = {**flags, "data": tuple(flags["data"])}
    with pytest.raises(LorafitError, match="interrupted after step 3"):
        stopped_after(job_for(flags.pop("model"), Path(flags.pop("output")), **flags), 3)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(name, two, models, pairs, tmp_path):
    family, flags = CASES[name]
    first, second, room = two
    job = job_for(models[family], tmp_path / "r", data=(str(pairs),), **BASE, **flags)
    events = events_of(job)
    found = first[name]
    if name == "float16":  # the same steps, none of them skipped, to the precision of the dtype
        assert found["losses"] == pytest.approx(losses(events), rel=1e-4)
        assert all(map(math.isfinite, found["norms"])) and found["same"]
        return
    assert found["losses"] == pytest.approx(losses(events), rel=1e-6, abs=1e-6)
    assert found["tokens"] == [e.tokens for e in events if isinstance(e, Stepped)]
    assert found["norms"] == pytest.approx([e.grad_norm for e in events if isinstance(e, Stepped)], rel=1e-3)
    assert found["losses"] == second[name]["losses"] and found["same"], "both hold the same adapter"
    if "prefix_cache" in flags:
        assert found["cache"] == flags["prefix_cache"]
    same_adapter(room / name, tmp_path / "r")


def test_a_run_goes_on_with_another_number_of_processes(two, models, pairs, tmp_path):
    first, second, room = two
    flags = {"data": (str(pairs),), **BASE, "batch_size": 6, "epochs": 2}
    whole = events_of(job_for(models["llama"], tmp_path / "whole", **flags))
    assert "interrupted after step 3" in first["stopped"]["error"]
    assert first["stopped"]["code"] == second["stopped"]["code"] == 128 + signal.SIGTERM
    events_of(job_for(models["llama"], room / "stopped", resume=True, **flags))
    same_adapter(room / "stopped", tmp_path / "whole")
    assert first["resumed in two"]["losses"][-1] == pytest.approx(losses(whole)[-1], rel=1e-6)
    assert first["resumed in two"]["same"]
    same_adapter(room / "1 to 2", tmp_path / "whole")


def test_dropout_is_drawn_by_step_and_process(two):
    """A resumed run draws what the run would have drawn, on each process."""
    first, _, room = two
    whole, resumed = first["dropout"], first["dropout resumed"]
    assert "interrupted after step 3" in first["dropout stopped"]["error"]
    assert resumed["losses"][-4:] == whole["losses"][-4:] and whole["same"] and resumed["same"]
    assert (room / "dropout" / WEIGHTS).read_bytes() == (room / "dropout 2" / WEIGHTS).read_bytes()


def test_a_step_that_overflows_in_float16_is_skipped_by_all(two, models, pairs, tmp_path):
    """The scale is lowered until the gradients are finite; both processes hold the same adapter afterwards."""
    first, second, _ = two
    norms = first["overflow"]["norms"]
    skipped = [not math.isfinite(norm) for norm in norms]
    assert skipped[0] and not skipped[-1] and len(norms) == len(second["overflow"]["norms"])
    assert skipped == [not math.isfinite(norm) for norm in second["overflow"]["norms"]]
    assert first["overflow"]["same"] and first["overflow"]["losses"] == second["overflow"]["losses"]


def test_what_ends_one_process_ends_both_with_one_code(two):
    first, second, _ = two
    for name, words in (("not finite", "step"), ("no such layer", "99")):
        assert first[name]["code"] == second[name]["code"] and words in first[name]["error"], name


@pytest.mark.long
def test_the_command_in_two_processes_has_one_screen_one_folder_and_one_answer(tmp_path, forked):
    train = ("-m", "lorafit", "train", "--preset", "ffn", "--layers", "high", "--max-steps", "6")
    done = launched(*train, "--epochs", "2", "-o", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (
        report["steps"] == 6
        and done.stderr.count("learning rate") == 1
        and "6 steps of" in done.stderr
        and ", in 2 processes" in " ".join(done.stderr.split())
    )
    assert {p.name for p in tmp_path.iterdir()} == {"r"}
    events = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    assert events[0]["processes"] == 2 and [e["step"] for e in events if e["event"] == "step"] == [
        *range(1, 7)
    ]

    refused = launched(*train, "-o", tmp_path / "r")
    assert refused.returncode != 0 and len(lines_of(refused.stderr)) == 2, refused.stderr
    mistyped = forked.run(*train[2:], "--rnk", "3", env=environment(), processes=2)
    assert lines_of(mistyped.stderr) == ["error: there is no option `--rnk`", "hint: did you mean --rank?"]
    other = forked.run("plan", "demo", env=environment(), processes=2)
    assert other.returncode != 0 and "runs in one process, and 2 were launched" in other.stderr
    assert len(lines_of(other.stderr)) == 2


@pytest.mark.long
def test_accelerate_and_two_machines_do_the_same_run(tmp_path):
    """Two launches with a home, a cache and a working folder each: only the first writes a run."""
    train = ["-m", "lorafit", "train", "--preset", "ffn", "--layers", "high", "--max-steps", "6", "-o", "r"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    (tmp_path / "a").mkdir()
    done = subprocess.run(
        [*accelerate, *train],
        cwd=tmp_path / "a",
        capture_output=True,
        text=True,
        env=environment(),
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    port = free_port()
    machines = []
    for rank in range(2):
        home = tmp_path / f"machine {rank}"
        home.mkdir()
        launch = [*LAUNCH[:3], "--nnodes", "2", "--node-rank", rank, "--nproc-per-node", "1"]
        address = ["--master-addr", "127.0.0.1", "--master-port", port]
        machines.append(
            subprocess.Popen(
                list(map(str, [*launch, *address, *train])), cwd=home, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, env=environment(HOME=str(home), XDG_CACHE_HOME=str(home / "cache")),
            )
        )  # fmt: skip
    errors = [machine.communicate(timeout=900)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert {p.name for p in (tmp_path / "machine 1").iterdir()} == {"cache"}
    same_adapter(tmp_path / "a" / "r", tmp_path / "machine 0" / "r")


def workers_of(launcher):
    """The processes that the launcher started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children]


@pytest.mark.long
@pytest.mark.parametrize(
    "how", ["a worker is killed", "a worker that shares the base is killed", "the launcher is told to end"]
)
def test_a_run_that_is_ended_from_outside_can_go_on(how, tmp_path, forked):
    command = [
        *LAUNCH, "-m", "lorafit", "train", "--preset", "all", "--max-steps", "20", "--save-steps", "1",
        "-o", str(tmp_path / "r"), *(["--shard"] if "shares" in how else []),
    ]  # fmt: skip
    with (tmp_path / "err").open("w") as errors:
        run = subprocess.Popen(command, env=environment(), stderr=errors, stdout=errors)
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("r.partial/checkpoint-*")):
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()
            time.sleep(0.2)
        if "killed" in how:
            os.kill(workers_of(run)[1], signal.SIGKILL)
        else:
            run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=300) != 0
    text = (tmp_path / "err").read_text()
    if "killed" in how:
        assert lines_of(text)[0] == "error: another process of the run ended", text
    else:
        assert re.fullmatch(r"error: interrupted after step \d+ of 20; .*", lines_of(text)[0]), text
    assert len(lines_of(text)) == 2, text
    words = [word for word in command[len(LAUNCH) + 2 :] if word != "--shard"]
    gone_on = forked.run(*words, "--resume", env=environment())
    assert gone_on.returncode == 0, gone_on.stderr
    events = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == [*range(1, 21)]


@pytest.mark.long
def test_a_full_disk_under_the_first_process_ends_both_with_one_error(tmp_path):
    script = tmp_path / "full.py"
    script.write_text(
        "import os, resource\n"
        "if os.environ['RANK'] == '0':\n"  # an adapter of the demo takes 276 kB
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "from lorafit.__main__ import main\n"
        "main()\n"
    )
    train = ["train", "--preset", "ffn", "--layers", "high", "--max-steps", "9", "--save-steps", "2"]
    done = launched(script, *train, "-o", tmp_path / "r", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert (
        done.returncode != 0
        and len(lines_of(done.stderr)) == 2
        and "the disk is full" in lines_of(done.stderr)[0]
    ), done.stderr
    assert not (tmp_path / "r").exists()


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        ({**FSDP, "FSDP_VERSION": "1"}, "FSDP1"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "offloading"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "activation checkpointing"),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "let go"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "tensor and pipeline"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor and pipeline"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed precision `bf16`"),
    ],
)
def test_what_a_launcher_asks_for_and_would_not_get_is_refused(environment, words):
    with pytest.raises(RequestError, match=words) as error:
        asked_to_shard(environment)
    assert error.value.hint


def test_a_launcher_may_ask_for_a_sharded_base():
    assert asked_to_shard(FSDP)
    assert not asked_to_shard({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "false"})
    assert not asked_to_shard({})


def test_one_process_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    only_train(["eval", "x"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    only_train(["eval", "x"])  # no launcher: it would have set the rank too
    monkeypatch.setenv("RANK", "1")
    only_train(["train"])
    with pytest.raises(RequestError, match="`lorafit eval` runs in one process"):
        only_train(["eval", "x"])
    assert [list(World(rank, 3).share(range(5))) for rank in range(3)] == [[0, 3], [1, 4], [2]]
