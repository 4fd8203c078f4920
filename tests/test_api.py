"""The commands as functions: the same values and files, nothing printed, the libraries loaded once."""

import inspect
import json
import os
import signal
import subprocess
import sys
from importlib import import_module

import pytest

import lorafit
from lorafit.adapter.folder import WEIGHTS
from lorafit.compare import Ended
from lorafit.errors import Interrupted, RequestError
from lorafit.events import Saved, Started, Stepped, TrainReport
from lorafit.jsonio import jsonable

FUNCTIONS = ("compare", "evaluate", "inspect", "merge", "plan", "train")
SMALL = {"layers": "high", "max_steps": 4, "batch_size": 8, "eval_steps": 2, "sample": False}


def fresh(code, *arguments, **environment):
    """The code in a Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


def as_flags(options):
    """The options as the command line has them."""
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        yield from ([flag, str(value)] if value is not False else [flag.replace("--", "--no-", 1)])


def same(document, value, *but):
    """Whether a value is what a command printed, but for these names."""
    own = json.loads(json.dumps(jsonable(value)))
    assert own.keys() == document.keys()
    for name in own.keys() - set(but):
        assert own[name] == document[name], name


@pytest.fixture(scope="module")
def trained(tiny, pairs, tmp_path_factory):
    """A run that `lorafit.train` made, with its events."""
    output = tmp_path_factory.mktemp("api") / "run"
    events = list(lorafit.train(tiny("llama"), data=pairs, output=output, **SMALL))
    return output, events


def test_to_import_lorafit_imports_nothing_else_of_it():
    code = "import sys, lorafit; print(*sorted(n for n in sys.modules if n.startswith('lorafit')))"
    assert fresh(code).stdout.split() == ["lorafit", "lorafit.lazy"]


def test_completion_finds_the_functions_before_they_are_used():
    shown = fresh("import lorafit; print(*dir(lorafit))").stdout.split()
    assert shown == sorted([*FUNCTIONS, "Comparison", "LorafitError", "Run", "__version__"])


def test_the_functions_keep_their_names_beside_the_folders():
    for name in ("compare", "evaluate", "merge", "train"):
        assert import_module(f"lorafit.{name}") is not getattr(lorafit, name)
    for name in FUNCTIONS:
        assert inspect.isfunction(getattr(lorafit, name)) and getattr(lorafit, name).__doc__
    assert set(FUNCTIONS) < set(lorafit.__all__)


def test_the_keywords_are_the_options_of_the_commands():
    from typer.main import get_command

    from lorafit.cli import app

    commands = get_command(app).commands
    shown_alone = {"json", "quiet", "verbose", "debug", "push_to_hub", "matrix", "dry", "csv"}
    named = {
        "extremes": "rows",
        "page": "report",
        "rates": "learning_rates",
    }  # by what they are on the command line
    for name in FUNCTIONS:
        command = commands["eval" if name == "evaluate" else name]
        options = {named.get(p.name, p.name) for p in command.params} - shown_alone
        taken = set(inspect.signature(getattr(lorafit, name)).parameters)
        assert taken == options, name


def test_inspect_and_plan_give_what_the_commands_print(run, tiny, pairs):
    assert jsonable(lorafit.inspect(tiny("llama"))) == run("inspect", tiny("llama"), "--json").document
    asked = {"data": pairs, "preset": "ffn", "layers": "high", "fit": "2GB"}
    made = lorafit.plan(tiny("llama"), probe=False, **asked)
    printed = run("plan", tiny("llama"), *as_flags(asked), "--no-probe", "--json").document
    same(printed, made.as_json())
    assert made.settings.batch_size and made.plan.trainable_params == printed["trainable_params"]


def test_train_is_the_command(run, tiny, pairs, tmp_path, trained):
    output, events = trained
    done = run("train", tiny("llama"), "--data", pairs, "-o", tmp_path / "cli", *as_flags(SMALL), "--json")
    assert (output / WEIGHTS).read_bytes() == (tmp_path / "cli" / WEIGHTS).read_bytes()
    assert isinstance(events[0], Started) and isinstance(events[-1], TrainReport)
    timed = {
        "output",
        "seconds",
        "tokens_per_second",
        "peak_memory_bytes",
        "memory_growth_bytes",
        "predicted",
    }
    timed |= {"environment", "epochs", "settings", "fill_seconds", "prefix_cache"}
    same(done.document, events[-1], *timed)

    def kinds(folder):
        return [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]

    assert kinds(output) == kinds(tmp_path / "cli")


def test_evaluate_and_merge_give_what_the_commands_print(run, tmp_path, trained):
    output, _ = trained
    same(run("eval", output, "--json").document, lorafit.evaluate(output))
    same(run("eval", output, output, "--json").document, lorafit.evaluate([output, str(output)]))
    prompted = lorafit.evaluate(output, prompt="hello", max_new_tokens=2)
    assert [s.prompt for s in prompted.samples] == ["hello"] and not prompted.adapters
    merged = lorafit.merge(output, output=tmp_path / "a")
    done = run("merge", output, "-o", tmp_path / "b", "--json")
    same(done.document, merged, "output", "seconds")
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(tiny, pairs, tmp_path, trained):
    asked = {"data": [pairs], "output": tmp_path / "run", **SMALL}
    stopped = lorafit.train(tiny("llama"), **asked)
    for event in stopped:
        if isinstance(event, Stepped):
            break
    assert event.step == 1
    stopped.stop()
    *_, last = stopped  # a loop that was left goes on
    assert isinstance(last, Saved) and last.step == 1
    with pytest.raises(Interrupted, match="after step 1 of 4"):
        stopped.report()
    report = lorafit.train(tiny("llama"), resume=True, **asked).report()
    assert report.steps == 4
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (trained[0] / WEIGHTS).read_bytes()
    with pytest.raises(RequestError, match="finished run"):
        lorafit.train(output=tmp_path / "run", resume=True)


def test_compare_is_the_command_and_goes_on(run, tiny, pairs, tmp_path):
    asked = {"data": str(pairs), "layers": "last:1", "max_steps": 3, "batch_size": 8, "holdout": 0.2}
    done = run(
        "compare", tiny("llama"), "--presets", "basic,ffn", *as_flags(asked), "-o", tmp_path / "a", "--json"
    )
    here = {**asked, "presets": ["basic", "ffn"], "output": tmp_path / "b"}
    stopped = lorafit.compare(tiny("llama"), **here)
    assert [one.name for one in stopped.ahead.candidates] == ["basic-last1", "ffn-last1"]
    assert next(e for e in stopped if isinstance(e, Ended)).outcome.name == "basic-last1"
    stopped.stop()
    with pytest.raises(Interrupted):
        stopped.report()
    answer = jsonable(lorafit.compare(output=tmp_path / "b", resume=True).report())
    losses = [
        [(c["choice"], c["loss"], c["delta"]) for c in found["choices"]] for found in (answer, done.document)
    ]
    assert losses[0] == losses[1] and answer["take"] == done.document["take"]
    assert (tmp_path / "b" / "compare.html").is_file()


@pytest.mark.parametrize(
    "call, message, hint",
    [
        (lambda: lorafit.train(lr=1), "there is no option `lr`", "`learning_rate`"),
        (lambda: lorafit.train(presett="ffn"), "there is no option `presett`", "did you mean `preset`?"),
        (lambda: lorafit.plan(output="x"), "there is no option `output`", "`lorafit.train` takes it"),
        (lambda: lorafit.compare(preset="ffn"), "there is no option `preset`", "did you mean `presets`?"),
        (lambda: lorafit.evaluate("x", samples_=1), "there is no option `samples_`", "`samples`"),
        (lambda: lorafit.train(rank="three"), "--rank is `three`", ""),
        (
            lambda: lorafit.evaluate("x", samples=-1),
            "`samples` is -1: it takes a whole number from 0 on, at most 50",
            "",
        ),
        (lambda: lorafit.evaluate("x", temperature="hot"), "`temperature` is 'hot': it takes a number", ""),
        (lambda: lorafit.compare(workers=65), "`workers` is 65", ""),
        (lambda: lorafit.merge("x", verify="no"), "`verify` is 'no': it takes True or False", ""),
        (lambda: lorafit.plan(fit=24), "--fit", ""),
        (lambda: lorafit.evaluate(), "needs an adapter", ""),
        (lambda: lorafit.evaluate([]), "needs an adapter", ""),
        (lambda: lorafit.evaluate(["nowhere/a", "nowhere/b"]), "`nowhere/a`", ""),
        (lambda: lorafit.merge(), "merge needs an adapter", ""),
        (lambda: lorafit.inspect("nowhere/at-all"), "nowhere/at-all", ""),
    ],
)
def test_what_is_wrong_is_a_request_error(call, message, hint):
    with pytest.raises(lorafit.LorafitError) as caught:
        call()
    assert isinstance(caught.value, RequestError)
    assert message in caught.value.message and hint in caught.value.hint


def test_nothing_is_printed_and_the_second_run_imports_nothing(tiny, pairs, tmp_path):
    code = (
        "import gc, os, sys, lorafit; model, data, place = sys.argv[1:]; before = dict(os.environ)\n"
        "def once(n):\n"
        "    out = f'{place}/{n}'\n"
        "    lorafit.train(model, data=data, max_steps=2, output=out).report()\n"
        "    lorafit.evaluate(out), lorafit.merge(out, output=out + 'm'), lorafit.plan(model, data=data)\n"
        "once(1); modules, frozen = set(sys.modules), gc.get_freeze_count()\n"
        "once(2)\n"
        "new = {n for n in set(sys.modules) - modules if n.split('.')[0] in ('torch', 'transformers', 'peft')}\n"
        "assert not new, new\n"
        "assert gc.get_freeze_count() <= frozen, 'what a run leaves behind is frozen'\n"
        "assert not any(n.startswith(('lorafit.cli', 'lorafit.screen')) for n in sys.modules)\n"
        "assert set(before) >= {n for n in os.environ if 'LORAFIT' in n or 'GLIBC' in n}\n"
    )
    done = fresh(code, tiny("llama"), pairs, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_signals_stay_with_the_program(tiny, pairs, tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    run = lorafit.train(tiny("llama"), data=pairs, output=tmp_path / "run", max_steps=2)
    next(iter(run))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
