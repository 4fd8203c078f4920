"""`train --from-adapter`: an adapter trained further, on other data, for other steps."""

import json
import shutil

import pytest
from jobs import job_for
from safetensors.torch import load_file

from lorafit.adapter.folder import CONFIG, WEIGHTS


@pytest.fixture
def first(tiny, pairs, tmp_path, run, monkeypatch):
    """A finished run of a model and data named by relative paths: (its folder, its report)."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny("llama"), "m")
    shutil.copy(pairs, "pairs.jsonl")
    words = ("--layers", "last:2", "--rank", 4, "--alpha", 12, "--max-steps", 6, "--batch-size", 8)
    done = run("train", "m", "--data", "pairs.jsonl", *words, "-o", "a", "--json", "-q")
    assert done.code == 0, done.err
    return tmp_path / "a", done.document


def test_it_begins_where_the_adapter_ended(first, run):
    output, report = first
    done = run("train", "--from-adapter", "a", "--epochs", 2, "--learning-rate", 1e-3, "-o", "b", "--json")
    assert done.code == 0 and "goes on from the adapter `a`" in done.err, done.err
    more = done.document
    assert more["eval"]["before"] == report["eval"]["after"] and more["steps"] != 6
    assert more["eval"]["after"]["loss"] != report["eval"]["after"]["loss"]
    one, two = (json.loads((output.parent / name / CONFIG).read_text()) for name in "ab")
    assert one == two and one["r"] == 4 and one["layers_to_transform"] == [2, 3]
    again = run("train", "--config", "b/run.yaml", "-o", "c", "--json", "-q")
    assert again.document["eval"] == more["eval"], "its run file repeats it"


def test_the_rows_that_the_run_held_out_stay_held_out(first, tiny, pairs, run, tmp_path):
    """Also where its --seed chose them: with another one most of them would be rows that it was trained on."""
    words = ("--layers", "last:2", "--max-steps", 1, "--seed", 5, "--holdout", 0.2)
    assert run("train", tiny("llama"), "--data", pairs, *words, "-o", "s", "-q").code == 0
    assert run("train", "--from-adapter", "s", "--max-steps", 1, "-o", "t", "-q").code == 0
    started = [(tmp_path / name / "events.jsonl").read_text().splitlines()[0] for name in "st"]
    one, two = map(json.loads, started)
    assert one["held_out_digest"] == two["held_out_digest"] != ""
    scored = run("eval", "s", "t", "--samples", 0, "--json").document
    assert not any("did not hold out" in note for note in scored["notes"])
    assert run("train", "--from-adapter", "s", "--data-seed", 9, "--max-steps", 1, "-o", "u", "-q").code == 0
    scored = run("eval", "s", "u", "--samples", 0, "--json").document
    assert any("`u` did not hold out the rows of `s`" in note for note in scored["notes"])


def test_other_data_are_read_by_their_own_settings(first, run, tmp_path):
    (tmp_path / "other.csv").write_text("q,a\n" + "".join(f"how many {n}?,{n} of them\n" for n in range(40)))
    words = ("--data", "other.csv", "--map", "prompt=q,completion=a")
    done = run("train", "--from-adapter", "a", *words, "--max-steps", 3, "-o", "b", "--json")
    assert done.code == 0, done.err
    scored = run("eval", "b", "--samples", 0, "--json").document
    beside = run("eval", "a", "--data", "other.csv", *words[2:], "--samples", 0, "--json").document
    assert scored["rows"] < beside["rows"] == 40
    assert run("plan", "--from-adapter", "a", *words, "--no-probe", "--json").document["lora"]["r"] == 4


@pytest.mark.parametrize("moved", [False, True])
def test_an_adapter_of_another_tool(first, run, tmp_path, moved):
    output, report = first
    (tmp_path / "plain").mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(output / name, tmp_path / "plain" / name)
    words = [
        "train",
        "--from-adapter",
        "plain",
        "--data",
        "pairs.jsonl",
        "--max-steps",
        2,
        "-o",
        "b",
        "--json",
    ]
    if moved:
        shutil.move("m", "n")
        words.insert(1, "n")
    done = run(*words)
    assert done.code == 0 and done.document["eval"]["before"] == report["eval"]["after"], done.err
    assert load_file(tmp_path / "b" / WEIGHTS).keys() == load_file(output / WEIGHTS).keys()


@pytest.mark.parametrize(
    "words, named",
    [
        (("--rank", 8), "has rank 4 in"),
        (("--alpha", 24), "has alpha 12 in"),
        (("--layers", "all"), "only the plan has: `model.layers.0.self_attn.q_proj`"),
        (("--layers", "3"), "only the adapter has: `model.layers.2.self_attn.q_proj`"),
        (("--preset", "ffn", "--layers", "last:2"), "adapts other modules"),
        (("-o", "a", "--overwrite"), "is read by this command"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_another_plan_is_refused_with_the_difference(first, run, words, named):
    done = run("train", "--from-adapter", "a", "-o", "b", *words)
    assert done.code == 2 and named in done.err, done.err
    assert not (first[0].parent / "b.partial").exists()


def test_another_base_is_refused(first, run, tiny, tmp_path):
    (tmp_path / "m" / "model.safetensors").write_bytes(
        bytes(
            255 - b if n == 0 else b
            for n, b in enumerate(reversed((tmp_path / "m/model.safetensors").read_bytes()))
        )[::-1]
    )
    done = run("train", "--from-adapter", "a", "-o", "b")
    assert done.code == 2 and "was not trained on" in done.err


def test_a_start_that_changed_the_base(tiny, pairs, tmp_path, run):
    """PiSSA's adapter is saved for the base as it was, of twice the rank: it goes on as that."""
    (tmp_path / "mine.yaml").write_text(
        "roles: [q, v]\nlayers: all\nlora: {r: 4, init_lora_weights: pissa}\n"
    )
    words = ("train", tiny("llama"), "--data", pairs, "--max-steps", 4, "--preset", tmp_path / "mine.yaml")
    report = run(*words, "-o", tmp_path / "a", "--json", "-q").document
    done = run(
        "train", "--from-adapter", tmp_path / "a", "--max-steps", 2, "-o", tmp_path / "b", "--json", "-q"
    )
    assert done.code == 0, done.err
    assert done.document["eval"]["before"]["loss"] == pytest.approx(report["eval"]["after"]["loss"], abs=1e-5)
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["r"] == 8


def test_it_is_resumed(first, tiny, pairs, tmp_path):
    from jobs import events_of

    from lorafit.errors import Interrupted

    flags = {
        "data": ("pairs.jsonl",),
        "layers": "last:2",
        "rank": 4,
        "alpha": 12,
        "batch_size": 4,
        "epochs": 1,
    }
    whole = events_of(job_for("m", tmp_path / "b", from_adapter="a", **flags))[-1]
    with pytest.raises(Interrupted):
        events_of(job_for("m", tmp_path / "c", from_adapter="a", stop=lambda: 2, **flags))
    resumed = events_of(job_for("m", tmp_path / "c", from_adapter=str(tmp_path / "a"), resume=True, **flags))[
        -1
    ]
    assert resumed.eval == whole.eval
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "c" / WEIGHTS).read_bytes()


def test_more_epochs_of_a_finished_run_are_one_of_two_things(first, run):
    done = run("train", "--resume", "a", "--max-steps", 10)
    assert done.code == 2 and "--max-steps was `6`, is `10`" in done.err
    assert "lorafit train --from-adapter a --max-steps 4" in done.err and "10 from the start" in done.err


def test_a_run_file_may_name_the_adapter_and_little_else(first, run, tmp_path):
    """What neither it nor the command says is the adapter's."""
    (tmp_path / "mine.yaml").write_text("from_adapter: a\nlearning_rate: 1e-3\nmax_steps: 2\n")
    done = run("train", "--config", "mine.yaml", "-o", "b", "--json", "-q")
    assert done.code == 0, done.err
    settings = done.document["settings"]
    assert (settings["rank"], settings["layers"], settings["learning_rate"]) == (4, "last:2", 1e-3)
    assert done.document["eval"]["before"] == first[1]["eval"]["after"]
    (tmp_path / "rate.yaml").write_text("learning_rate: 1e-3\n")
    given = ("train", "--config", "rate.yaml", "--from-adapter", "a", "--max-steps", 2)
    assert run(*given, "-o", "c", "--json", "-q").document["eval"] == done.document["eval"]


def test_an_adapter_as_a_start_of_pissa_leaves_it_is_not_gone_on_from(first, run, tmp_path):
    """Its matrices are for what the start left of the base; lorafit saves such adapters for the base as it was."""
    output, _ = first
    config = json.loads((output / CONFIG).read_text())
    (output / CONFIG).write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    (output / "digests.json").unlink()
    for command in (
        ("train", "--from-adapter", "a", "-o", "b"),
        ("export", "a", "--to", "gguf", "-o", "a.gguf"),
        ("merge", "a", "-o", "m"),
    ):
        done = run(*command)
        assert done.code == 2 and "was saved as its `pissa` start needs it" in done.err, done.err
