"""Base and adapters over the same rows: prefixes shared, groups, other text, prompts of one's own."""

import json

import pytest


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the demo, of other strategies and bands."""
    from lorafit.cli import app

    folder = tmp_path_factory.mktemp("runs")
    for name, preset, layers in (("a", "ffn", "high"), ("b", "basic", "mid")):
        with pytest.raises(SystemExit) as end:
            app(
                [
                    "train",
                    "--preset",
                    preset,
                    "--layers",
                    layers,
                    "--max-steps",
                    "12",
                    "-o",
                    str(folder / name),
                    "-q",
                ]
            )
        assert end.value.code == 0
    return folder / "a", folder / "b"


@pytest.fixture
def topics(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "prompt": f"Ada lent the lamp {n}. ",
            "completion": "lamp" * (1 + n % 3),
            "topic": "light" if n % 3 else "dark",
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_together_they_score_what_each_scores_alone(runs, run, monkeypatch):
    """Each adapter above its own cut, the prefix run once: no figure differs from whole passes."""
    from lorafit.evaluate import side_by_side

    together = run("eval", *runs, "--samples", "0", "--json").document
    alone = [run("eval", path, "--samples", "0", "--json").document for path in runs]
    monkeypatch.setattr(side_by_side, "COMFORTABLE", 0.0)  # no room for any state: every pass is a whole one
    whole = run("eval", *runs, "--samples", "0", "--json").document
    assert together == whole
    assert together["base"] == alone[0]["base"] == alone[1]["base"]
    assert [a for one in alone for a in one["adapters"]] == together["adapters"]
    assert together["paths"] == [str(path) for path in runs]


def test_the_prefix_is_run_once_for_all(runs, monkeypatch):
    """Block passes are counted: below its cut an adapter's pass runs no block."""
    import torch

    from lorafit.data.dataset import load
    from lorafit.evaluate import side_by_side
    from lorafit.forward.prefix import Prefix
    from lorafit.model.chart import chart_of
    from lorafit.model.load import load_tokenizer
    from lorafit.model.source import find
    from lorafit.settings.precedence import derive_from_model, settle

    source = find("demo")
    found, tokenizer = chart_of(source), load_tokenizer(source.place, source.name)
    settings = derive_from_model(settle({})[0], found)
    rows = load(settings, tokenizer, found.task, found.vocab_size).held_out
    ran = []
    whole = side_by_side.load_model

    def counted(*arguments):
        model = whole(*arguments)
        for number, block in enumerate(model.get_submodule("model.layers")):
            block.mlp.gate_proj.register_forward_hook(lambda *_, number=number: ran.append(number))
        return model

    monkeypatch.setattr(side_by_side, "load_model", counted)
    passes = []
    around = Prefix.around

    def seen(self, batch):
        passes.append(self.cut)
        return around(self, batch)

    monkeypatch.setattr(Prefix, "around", seen)
    question = side_by_side.EvalRequest(rows)
    side_by_side.compare(
        question, source, found, [str(runs[1])], tokenizer, torch.float32, {}, torch.device("cpu")
    )
    batches = len(passes) // 2
    assert set(passes) == {4} and batches == 8
    # layer 0 runs as the states are filled, layer 11 in the base's pass and in the adapter's; the replay is
    # tried with each of them, by three passes of which one is a replay
    probes = ran.count(0) - batches
    assert ran.count(11) == probes + 2 * batches + 2 and probes <= batches


def test_rows_by_a_column_and_by_file(runs, run, topics, pairs):
    found = run("eval", *runs, "--data", topics, "--by", "topic", "--json").document
    assert found["by"] == "topic" and [g["name"] for g in found["groups"]] == ["dark", "light"]
    assert [g["rows"] for g in found["groups"]] == [4, 8]
    for place in range(2):
        mean = sum(g["adapters"][place]["loss"] * g["tokens"] for g in found["groups"]) / found["tokens"]
        assert mean == pytest.approx(found["adapters"][place]["loss"])
    files = run("eval", runs[0], "--data", topics, "--data", pairs, "--by", "file", "--json").document
    assert [(g["name"], g["rows"]) for g in files["groups"]] == [("pairs.jsonl", 40), ("rows.jsonl", 12)]
    shown = run("eval", runs[0], "--data", topics, "--by", "topic", "--samples", "0").out
    assert [word for word in shown.split() if word in ("topic", "dark", "light")] == [
        "topic",
        "dark",
        "light",
    ]


def test_files_of_one_name_are_told_apart(runs, run, topics, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / topics.name
    other.write_text(topics.read_text().replace("lamp", "lantern"))
    found = run("eval", runs[0], "--data", topics, "--data", other, "--by", "file", "--json").document
    assert {g["name"]: g["rows"] for g in found["groups"]} == {str(topics): 12, str(other): 12}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--by", "topik"), "did you mean `topic`"),
        (("--by", "nothing-like-it"), "no column `nothing-like-it`"),
        (("--prompt", " "), "--prompt is empty"),
        (("--temperature", "nan"), "--temperature"),
        (("--also", "none.txt"), "no file `none.txt`"),
    ],
)
def test_what_is_wrong_is_said(runs, run, topics, arguments, said):
    result = run("eval", runs[0], "--data", topics, *arguments)
    assert result.code == 2 and said in result.err.replace("there is no", "no")


def test_data_of_another_shape_are_mapped(runs, run, tmp_path):
    """`--map` and `--format` are about --data, whatever the run's own data were."""
    path = tmp_path / "asked.jsonl"
    rows = [{"question": f"Ada lent the lamp {n}. ", "answer": "lamp"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = ("--map", "prompt=question,completion=answer", "--format", "prompt-completion")
    assert run("eval", runs[0], "--data", path, *named, "--json").document["rows"] == 4
    text = tmp_path / "general.txt"  # beside data whose shape is named, other text is seen as it is
    text.write_text("Once there was a village by the sea. " * 30)
    found = run("eval", runs[0], "--data", path, *named, "--also", text, "--json").document
    assert found["rows"] == 4 and found["also"][0]["rows"] >= 1


def test_by_needs_rows(runs, run, tmp_path):
    assert "with --prompt" in run("eval", runs[0], "--prompt", "Ada", "--by", "topic").err
    text = tmp_path / "text.txt"
    text.write_text("Ada lent the lamp to Finn. " * 40)
    assert "no columns" in run("eval", runs[0], "--data", text, "--by", "topic").err


def test_other_text_that_was_not_to_change(runs, run, tmp_path):
    text = tmp_path / "general.txt"
    text.write_text("Once there was a village by the sea. Every morning the boats went out. " * 30)
    found = run("eval", runs[0], "--also", text, "--json").document
    (also,) = found["also"]
    alone = run("eval", runs[0], "--data", text, "--json").document
    assert also["name"] == str(text) and also["rows"] == alone["rows"] and also["base"] == alone["base"]
    fields = ("loss", "delta", "stderr", "low", "high")
    assert [also["adapters"][0][f] for f in fields] == [alone["adapters"][0][f] for f in fields]
    assert "general.txt" in run("eval", runs[0], "--also", text, "--samples", "0").out


def test_rows_that_changed_the_most(runs, run):
    found = run("eval", runs[0], "--rows", "4", "--json").document["adapters"][0]
    gains = [row["adapter"] - row["base"] for row in found["best"]]
    lost = [row["adapter"] - row["base"] for row in found["worst"]]
    assert len(gains) == len(lost) == 4 and gains == sorted(gains) and lost == sorted(lost, reverse=True)
    assert gains[-1] < found["delta"] < lost[-1]
    assert not {r["where"] for r in found["best"]} & {r["where"] for r in found["worst"]}


def test_a_prompt_of_one_s_own_alone(runs, run):
    found = run("eval", *runs, "--prompt", "Ada lent the lamp to Finn.", "--json").document
    (sample,) = found["samples"]
    assert found["rows"] == 0 and found["base"] is None and found["adapters"] == []
    assert sample["reference"] == "" and sample["base"] and len(sample["adapters"]) == 2
    shown = run("eval", *runs, "--prompt", "Ada lent the lamp to Finn.").out
    assert "\n  b  " in shown and "reference" not in shown


def test_what_is_drawn_is_drawn_by_the_seed(runs, run):
    def said(*more):
        found = run("eval", runs[0], "--prompt", "Ada lent the lamp.", "--json", *more).document
        return found["samples"][0]["base"]

    one = said("--temperature", "1.5", "--seed", "3")
    assert one == said("--temperature", "1.5", "--seed", "3") != said("--temperature", "1.5", "--seed", "4")
    assert said() == said("--seed", "9") and len(said("--max-new-tokens", "2")) < len(said())


def test_each_prompt_is_drawn_by_a_seed_of_its_own(runs, run):
    """The same prompt twice is two draws, the same for base and any adapter of a later call."""
    twice = ("--prompt", "Ada lent the lamp.", "--prompt", "Ada lent the lamp.", "--temperature", "1.5")
    first, second = run("eval", runs[0], *twice, "--json").document["samples"]
    assert first["prompt"] == second["prompt"] and first["base"] != second["base"]


def test_a_masked_model_fills_a_prompt_of_one_s_own(tiny, run, tmp_path, pairs):
    base = tiny("bert")
    run("train", base, "--data", pairs, "--max-steps", "2", "-o", tmp_path / "m")
    result = run("eval", tmp_path / "m", "--prompt", "Ada lent the lamp.")
    assert result.code == 2 and "write <|mask|> where" in result.err
    found = run("eval", tmp_path / "m", "--prompt", "Ada lent the <|mask|>.", "--json").document
    assert found["samples"][0]["base"]
    scored = run("eval", tmp_path / "m", "--json").document  # with the prefix replayed, masks and all
    assert scored["rows"] == 2 and scored["base"]["exact"] is None


@pytest.mark.parametrize("lora", ["init_lora_weights: pissa", "modules_to_save: [norm]"])
def test_an_adapter_that_changes_the_base_leaves_the_next_one_whole(run, tmp_path, runs, lora):
    preset = tmp_path / "own.yaml"
    preset.write_text(f"roles: [q, v]\nlora: {{{lora}, r: 4}}\n")
    assert (
        run("train", "--preset", preset, "--layers", "high", "--max-steps", "3", "-o", tmp_path / "p").code
        == 0
    )
    found = run("eval", tmp_path / "p", runs[0], "--samples", "0", "--json").document
    alone = run("eval", runs[0], "--samples", "0", "--json").document
    assert found["adapters"][1] == alone["adapters"][0] and found["base"] == alone["base"]


def test_rows_that_all_lost_are_not_said_to_gain(runs, run, topics, tmp_path):
    """An adapter turned round: the least harmed rows lost too."""
    import shutil

    from safetensors.torch import load_file, save_file

    harmed = tmp_path / "harmed"
    shutil.copytree(runs[0], harmed)
    weights = {
        n: t * (-3 if "lora_B" in n else 1)
        for n, t in load_file(harmed / "adapter_model.safetensors").items()
    }
    save_file(weights, harmed / "adapter_model.safetensors")
    (harmed / "digests.json").unlink()
    result = run("eval", harmed, "--samples", "0", "--json")
    best = result.document["adapters"][0]["best"]
    assert all(row["adapter"] > row["base"] for row in best)
    shown = run("eval", harmed, "--samples", "0").out
    assert "improved" not in shown and "regressed" in shown


def test_adapters_are_ranked_against_the_best_of_them(runs, run):
    """Each pair with the best on the same rows, under the names of the table."""
    found = run("eval", *reversed(runs), "--samples", "0", "--json").document
    best, other = found["ranked"]
    losses = {a["path"]: a["loss"] for a in found["adapters"]}
    assert [best["path"], other["path"]] == sorted(losses, key=losses.get)
    assert best["delta"] == 0 and other["delta"] == pytest.approx(other["loss"] - best["loss"])
    assert other["low"] < other["delta"] < other["high"] and other["stderr"] > 0
    verdict = "same" if other["low"] <= 0 else "worse"
    apart = {a["path"]: a["stderr"] for a in found["adapters"]}
    assert other["stderr"] != apart[other["path"]]  # to the best, not to the base
    shown = run("eval", *reversed(runs), "--samples", "0").out
    ranked = shown[shown.index("ranked") :].splitlines()
    assert ranked[1].split()[0] == best["path"].rpartition("/")[2] and ranked[1].endswith("best")
    assert ranked[2].split()[0] == other["path"].rpartition("/")[2] and ranked[2].endswith(verdict)
    assert "adapter 1" not in shown and "ranked" not in run("eval", runs[0], "--samples", "0").out
