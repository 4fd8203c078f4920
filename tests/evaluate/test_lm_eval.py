"""lm-eval is asked, on a task whose data lie here: its figures are those of the model itself."""

import json

import pytest
import torch

TASK = """
task: lamps
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["light", "dark"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path):
    rows = [{"question": f"Ada lent the lamp {n}. It was", "answer": n % 2} for n in range(12)]
    data = tmp_path / "lamps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "lamps.yaml"
    path.write_text(TASK.format(data=data))
    return path, rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from lorafit.cli import app

    folder = tmp_path_factory.mktemp("bench") / "r"
    with pytest.raises(SystemExit):
        app(["train", "--preset", "ffn", "--layers", "high", "--max-steps", "20", "-o", str(folder), "-q"])
    return folder


@pytest.mark.long
def test_a_task_of_one_s_own(trained, run, task):
    from lorafit.adapter.inject import attach
    from lorafit.model.load import load_model, load_tokenizer
    from lorafit.model.source import find

    path, rows = task
    found = run("eval", trained, "--tasks", path, "--json").document
    assert found["rows"] == 0 and [(b["task"], b["metric"], b["model"]) for b in found["benchmarks"]] == [
        ("lamps", "acc", "base"),
        ("lamps", "acc", str(trained)),
    ]
    source = find("demo")
    model = load_model(source, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(source.place, source.name)

    def likelihood(model, text, choice):
        before = tokenizer(text)["input_ids"]
        ids = torch.tensor([tokenizer(f"{text} {choice}")["input_ids"]])
        scores = model(ids).logits[0].log_softmax(-1)
        return sum(float(scores[n - 1, ids[0, n]]) for n in range(len(before), ids.shape[1]))

    for figure, judged in zip(found["benchmarks"], (model, attach(model, trained)), strict=True):
        model.eval()
        with torch.no_grad():
            said = [
                max((0, 1), key=lambda n, r=row: likelihood(judged, r["question"], ("light", "dark")[n]))
                for row in rows
            ]
        right = [said == row["answer"] for said, row in zip(said, rows, strict=True)]
        assert figure["value"] == pytest.approx(sum(right) / len(right))
    assert "lamps" in (trained / "report.html").read_text()
    limited = run("eval", trained, "--tasks", path, "--limit", "3")
    assert limited.code == 0 and "lamps" in limited.out and "fatal" not in limited.err


@pytest.mark.parametrize(
    "name, words",
    [
        ("no-such-task-at-all", "lm-eval has no task"),
        ("missing.yaml", "cannot read task file"),
        pytest.param(",", "has no task", marks=pytest.mark.long),
    ],
)
def test_what_is_no_task_is_said(trained, run, name, words):
    result = run("eval", trained, "--tasks", name)
    assert result.code == 2 and words in result.err


@pytest.mark.long
def test_data_that_are_not_here_are_an_error(trained, run, task):
    path, _ = task
    path.write_text(path.read_text().replace("lamps.jsonl", "gone.jsonl"))
    result = run("eval", trained, "--tasks", path)
    assert result.code == 1 and "lm-eval failed" in result.err


def test_without_lm_eval_the_extra_is_named(trained, run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = run("eval", trained, "--tasks", "hellaswag")
    assert result.code == 2 and "lorafit[lm-eval]" in result.err


def test_the_filters_of_a_metric_are_told_apart():
    """GSM8K's exact match is given twice: strict, and wherever the number stands."""
    from lorafit.evaluate.lm_eval import _figures

    row = {"alias": "gsm8k", "exact_match,strict-match": 0.31, "exact_match,flexible-extract": 0.35,
           "exact_match_stderr,strict-match": 0.01, "exact_match_stderr,flexible-extract": "N/A", "acc,none": 0.5}  # fmt: skip
    assert [(f.metric, f.value, f.stderr) for f in _figures({"gsm8k": row}, "base")] == [
        ("exact_match, strict-match", 0.31, 0.01),
        ("exact_match, flexible-extract", 0.35, None),
        ("acc", 0.5, None),
    ]
