"""The page and the cards: what they show, and that nothing in them is taken for markup."""

import json
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import pytest

from lorafit.model.chart import chart_of
from lorafit.model.source import find
from lorafit.outputs import EDITABLE
from lorafit.report import svg
from lorafit.report.html import make_page
from lorafit.report.run import read_back
from lorafit.report.svg import Curve, _ticks, chart, curves, scatter
from lorafit.results import AdapterScore, EvalReport, Group, RowChange, Sample, Score

NASTY = '<script>alert(1)</script> & "quoted" \u202e\x1b[31m'
VOID = {"meta"}


class Tags(HTMLParser):
    """Every element, and whether each that was opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from lorafit.cli import app

    folder = tmp_path_factory.mktemp("page") / "a run"
    with pytest.raises(SystemExit) as end:
        app(["train", "--preset", "ffn", "--layers", "high", "--max-steps", "9", "-o", str(folder), "-q"])
    assert end.value.code == 0
    return folder


def report():
    score = Score(1.0, 2.7, 0.5, 0.25)
    row = RowChange(NASTY, NASTY, 3, 1.0, 0.5)
    adapter = AdapterScore(0.8, 2.2, 0.6, 0.5, NASTY, -0.2, 0.01, -0.3, -0.1, (row,), (row,))
    group = Group(NASTY, 2, 9, score, (adapter,))
    sample = Sample(NASTY, NASTY, NASTY, (NASTY,))
    return EvalReport(4, 20, score, (adapter,), (sample,), (NASTY,), 2, NASTY, (group,), (group,))


def test_the_page_of_a_run_shows_what_was_done(trained):
    text = (trained / "report.html").read_text(encoding="utf-8")
    tags = Tags(text)
    assert not tags.open and {"svg", "polyline", "path", "table", "details"} <= set(tags.seen)
    assert text.count("■") == 9 + 1  # three modules of three layers, and the word for it
    assert "69,120" in text and "train.jsonl" in text and "learning_rate" in text
    said = read_back(trained).report
    assert f"{said['epochs'][0]['loss']:.3f}" in text
    assert "http" not in text and "<script" not in text  # nothing is fetched, nothing runs


def test_the_page_draws_the_rate_and_the_gradients_and_says_what_came_of_it(trained):
    text = (trained / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'aria-label="([^"]*)"', text) == [
        "loss by step", "learning rate by step", "gradient norm by step",
    ]  # fmt: skip
    steps = read_back(trained).every("step")
    drawn = re.findall(r'<polyline points="([^"]*)"', text)
    heights = [float(p.split(",")[1]) for p in drawn[2].split()]  # the learning rate: up, then down
    assert len(heights) == len(steps)
    rates = [e["learning_rate"] for e in steps]
    assert heights.index(min(heights)) == rates.index(max(rates))
    assert text.count('class="dot"') == 2, "the held-out loss before and after"
    said = read_back(trained).report["eval"]
    assert (
        f"lowers the held-out loss: {said['before']['loss']:.4f} before, {said['after']['loss']:.4f}" in text
    )


def test_charts_are_as_wide_as_there_is_room():
    """On a phone too: the square is stretched, and no text is in it."""
    picture = chart([Curve([(1, 2.0), (50, 0.5)], [(50, 0.5)])], "loss", 200, smooth=False)
    tags = Tags(picture)
    assert 'preserveAspectRatio="none"' in picture and "text" not in tags.seen and not tags.open
    x, y = re.search(r'class="dot" d="M([\d.]+) ([\d.]+)h', picture).groups()
    assert (float(x), float(y)) == (1000.0, 750.0), "the last step, a quarter of the way up"
    assert 'style="left:80.00%">40<' in picture and 'style="top:50.00%">1.0' in picture
    named = scatter([("a", 1, 2.0), ("b", 4, 1.0), ("c", 3, 3.0)], {"a", "b"}, "seconds", "loss")
    assert re.findall(r'class="(named[^"]*)"[^>]*>(\w)', named) == [("named", "a"), ("named left", "b")]
    assert scatter([], (), "x", "y") == "" and chart([], "x", 9, smooth=True) == ""


def test_the_head_says_when_where_and_how(trained):
    text = (trained / "report.html").read_text(encoding="utf-8")
    facts = read_back(trained).first("started")["environment"]
    head = text.partition("<h2>")[0]
    assert facts["date"].replace("T", " ")[:16] in head and "cpu" in head
    assert f"torch {facts['torch']}" in head and f"<pre>{escape(facts['command'])}" in head
    both = make_page("x", chart_of(find("demo")), {}, [read_back(trained)], report()).partition("<h2>")[0]
    assert "Trained 2" in both and "Evaluated 2" in both and both.count("<pre>") == 2


@pytest.mark.parametrize(
    "low, words", [(0.02, "0.0300 below the next, beyond"), (-0.01, "do not tell it from worse run")]
)
def test_the_verdict_on_several_begins_with_the_best(low, words):
    one = report().adapters[0]
    others = tuple(replace(one, path=name, best=(), worst=()) for name in ("worse run", "best run"))
    best, next_one = (replace(one, path=name, loss=loss, delta=d, low=own, high=0.05) for name, loss, d, own in (
        ("best run", 0.7, 0.0, 0.0), ("worse run", 0.73, 0.03, low)
    ))  # fmt: skip
    several = replace(
        report(), adapters=others, paths=("worse run", "best run"), ranked=(best, next_one), samples=()
    )
    text = make_page("x", chart_of(find("demo")), {}, [], several)
    first, *rest = re.findall(r'<p class="(verdict|soft)">(.*?)</p>', text.partition("<h2>")[0])[1:]
    assert (
        first[0] == "verdict"
        and first[1].startswith("best run has the lowest loss, 0.7000")
        and words in first[1]
    )
    assert [kind for kind, _ in rest] == ["soft", "soft"] and "Adapters among each other" in text


def test_many_adapters_do_not_fill_the_head():
    one = report().adapters[0]
    many = tuple(
        replace(one, path=f"run {n}", best=(), worst=(), high=0.1 if n < 2 else -0.1) for n in range(9)
    )
    several = replace(report(), adapters=many, paths=tuple(a.path for a in many), ranked=many, samples=())
    head = make_page("x", chart_of(find("demo")), {}, [], several).partition("<h2>")[0]
    assert "7 of 9 adapters are better than the base" in head and head.count("the base") == 1


def test_names_in_a_chart_do_not_cover_one_another():
    near = scatter(
        [("first", 1, 2.0), ("second", 1.01, 2.01), ("third", 1, 1.0)], {"first", "second", "third"}, "x", "y"
    )
    assert re.findall(r'class="named[^>]*>(\w+)', near) == ["first", "third"] and "<title>second" in near


@pytest.mark.parametrize(
    "low, high, words",
    [
        (-0.3, -0.1, "better than the base"),
        (0.1, 0.3, "worse than"),
        (-0.1, 0.2, "no significant difference"),
    ],
)
def test_the_verdict_is_a_sentence(low, high, words):
    adapter = replace(report().adapters[0], low=low, high=high)
    text = make_page("x", chart_of(find("demo")), {}, [], replace(report(), adapters=(adapter,)))
    verdict = re.findall(r'<p class="verdict">(.*?)</p>', text)
    assert len(verdict) == 1 and words in verdict[0] and f"{low:+.4f} to {high:+.4f}" in verdict[0]


def test_the_environment_is_shown_where_it_was_recorded(trained):
    run = read_back(trained)
    first, *others = run.events
    assert first["event"] == "started" and first["environment"]["torch"]

    def page(**started):
        return make_page(
            "x", chart_of(find("demo")), {}, [replace(run, events=({**first, **started}, *others))]
        )

    assert "Environment" in page() and first["environment"]["torch"] in page()
    assert "Environment" not in page(environment=None)
    text = page(environment={"command_line": f"lorafit train {NASTY}", "device": "cpu"})
    assert "command line" in text and "<script" not in text and "lorafit train &lt;script&gt;" in text


def test_nothing_from_data_is_markup(trained):
    found = chart_of(find("demo"))
    run = read_back(trained)
    look = run.first("data")
    look["samples"][0]["pieces"] = [[NASTY, True]]
    run.settings["data"] = [NASTY]
    text = make_page(NASTY, found, {NASTY: (NASTY,)}, [run], report())
    tags = Tags(text)
    assert not tags.open and "script" not in tags.seen
    assert "\x1b" not in text and "\u202e" not in text
    assert "".join(tags.text).count("<script>alert(1)</script>") >= 20


def test_one_row_is_sure_of_nothing(trained, run, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a lamp ", "completion": "is light"}))
    shown = run("eval", trained, "--data", tmp_path / "one.jsonl", "--samples", "0").out
    assert "one row is too few" in shown and "95 %" not in shown


def test_a_page_without_a_run_or_figures():
    found = chart_of(find("demo"))
    plain = EvalReport(0, 0, None, (), (Sample("a", "", "b", ("c",)),), ("x",))
    tags = Tags(make_page("x", found, {"x": ("model.layers.0.mlp.up_proj",)}, [], plain))
    assert not tags.open and "svg" not in tags.seen


def test_long_curves_are_thinned(trained):
    run = read_back(trained)
    step = run.first("step")
    long = [{**step, "step": n, "loss": 1 / n if n % 500 else float("nan")} for n in range(1, 20_001)]
    drawn = curves([type(run)(run.folder, {}, (*long, *run.every("report")))])
    points = re.findall(r'points="([^"]*)"', drawn)
    assert len(points) == 2 + 1 + 2  # loss and gradient norm with their means, the learning rate
    assert all(len(p.split()) <= svg.POINTS for p in points) and "nan" not in drawn


@pytest.mark.parametrize("low, high", [(0, 1), (0.4, 1.3), (0, 20_000), (2.0, 2.0), (1e-4, 3e-4), (0, 1e6)])
def test_ticks_are_round_and_few(low, high):
    ticks = _ticks(low, high)
    assert len(ticks) <= 9 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)
    if high > low:
        assert len(ticks) >= 2


def test_eval_writes_the_page_into_the_run(trained, run, tmp_path):
    before = (trained / "report.html").read_text(encoding="utf-8")
    found = run("eval", trained, "--samples", "1", "--json").document
    after = (trained / "report.html").read_text(encoding="utf-8")
    assert (
        found["page"] == str(trained / "report.html")
        and "Sample outputs" in after
        and "Sample outputs" not in before
    )
    assert run("eval", trained, "--samples", "0", "--report", tmp_path / "r.html", "--json").code == 0
    assert "95 % CI" in (tmp_path / "r.html").read_text(encoding="utf-8")
    result = run("eval", trained, "--samples", "0", "--report", tmp_path / "none" / "r.html")
    assert result.code == 2 and "cannot write --report" in result.err
    result = run("eval", trained, "--samples", "0", "--report", ".")
    assert result.code == 2 and "--report `.` is a folder" in result.err
    assert sorted(p.name for p in trained.iterdir() if p.name.startswith(".")) == []


def test_the_page_and_the_card_may_be_edited(trained, run):
    """They are not sealed: the adapter is as sound as before."""
    (trained / "README.md").write_text((trained / "README.md").read_text() + "\nmine\n")
    sealed = json.loads((trained / "digests.json").read_text())
    assert not set(EDITABLE) & set(sealed) and "adapter_model.safetensors" in sealed
    assert run("eval", trained, "--samples", "0").code == 0


def test_the_cards(trained, run, tmp_path):
    import yaml

    card = (trained / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft" and "lorafit" in head["tags"]
    assert "69,120" in card and "layers 9–11" in card and "lorafit merge" in card and "train.jsonl" in card
    assert run("merge", trained, "-o", tmp_path / "m").code == 0
    merged = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(merged.split("---")[1])["library_name"] == "transformers"
    assert "`demo`" in merged and "largest logit difference" in merged and "ffn, high" in merged
    assert run("merge", "--adapter", f"{trained}=0.5", "-o", tmp_path / "n", "--no-verify").code == 0
    other = (tmp_path / "n" / "README.md").read_text(encoding="utf-8")
    assert "× 0.5" in other and "--no-verify" in other and "=0.5" in other.split("```sh")[1]


def test_a_name_of_the_hub_stands_in_the_card(trained):
    from lorafit.report.model_card import _head

    assert "base_model: Qwen/Qwen2.5-0.5B" in _head("Qwen/Qwen2.5-0.5B", "peft", "causal", [], "adapter")
    assert not any("base_model" in line for line in _head("my folder", "peft", "causal", [], "adapter"))


def test_a_damaged_record_is_as_good_as_none(trained, tmp_path):
    (tmp_path / "run.yaml").write_text("a: [")
    (tmp_path / "events.jsonl").write_text('{"event": "started"}\n[1]\n{"event"')
    found = read_back(tmp_path)
    assert found.settings == {} and found.report == {} and found.held_out_digest == ""


def test_a_damaged_record_spoils_neither_evaluation_nor_merge(trained, run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    started = json.dumps(read_back(trained).first("started"))
    (copy / "events.jsonl").write_text(started + '\n{"event": "data"}\n{"event": "report", "steps": "x"}\n')
    found = run("eval", copy, "--samples", "0", "--json").document
    assert found["page"] == "" and "damaged" in found["notes"][0] and found["base"]["loss"] > 0
    assert run("merge", copy, "-o", tmp_path / "m", "--no-verify").code == 0
