"""The commands: options in, one call each, an answer out. Errors end here, in two lines.

torch, transformers and rich are imported in the bodies, so that every `--help` is instant.
"""

from __future__ import annotations

import atexit
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer
from typer.core import TyperGroup

from lorafit import __version__
from lorafit.errors import DONE, FAILED, INTERRUPTED, TERMINATED, LorafitError, OutOfMemory, RequestError
from lorafit.options import OPTIONS

if TYPE_CHECKING:
    from lorafit.config import RunConfig
    from lorafit.modelmap import ModelMap
    from lorafit.plan import Plan

# Typer may carry its own copy of click: its errors are found by their place in the family.
_CLICK_ERROR = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_debug = False


class Boundary(TyperGroup):
    """The shell around every command: an error becomes two lines on stderr and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        signal.signal(signal.SIGTERM, _on_term)
        code: Any = DONE
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except LorafitError as error:
            code = _report(error)
        except _CLICK_ERROR as error:
            code = _report(_usage(error))
        except (KeyboardInterrupt, typer.Abort):
            code = _report(LorafitError("interrupted"), INTERRUPTED)
        except _Terminated:
            code = _report(LorafitError("terminated"), TERMINATED)
        except BrokenPipeError:  # the reader has had enough: `lorafit inspect … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if _debug:
                raise
            text = str(error).strip().splitlines()
            what = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
            hint = "--debug shows where; please report it with the command"
            code = _report(LorafitError(f"an error that lorafit did not expect: {what}", hint), FAILED)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else DONE)
        return code


class _Terminated(BaseException):
    """SIGTERM, as something that unwinds."""


def _on_term(number: int, frame: Any) -> None:
    raise _Terminated


def _report(error: LorafitError, code: int | None = None) -> int:
    if _debug:
        import traceback

        traceback.print_exception(error)
    from lorafit.show import Screen

    Screen().error(error)
    return error.exit_code if code is None else code


def _usage(error: Any) -> LorafitError:
    """A wrong command line in our own voice."""
    message = error.format_message().strip().rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "lorafit"
    return RequestError(message[:1].lower() + message[1:], f"see `{command} --help`")


app = typer.Typer(
    name="lorafit",
    cls=Boundary,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LoRA in chosen modules of chosen layers: see what a model holds, plan, train, evaluate, merge.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 and 143 interrupted.",
)

# -- options, each declared once --------------------------------------------------------------

WHAT, DATA, TRAINING, SAID, BENCH, OUTPUT = (
    "What to adapt", "Data", "Training", "What they say", "Benchmarks", "Output",
)  # fmt: skip


def _option(name: str, panel: str, *more: str) -> Any:
    option = OPTIONS[name]
    flags = [f"{option.flag}/--no-{option.flag[2:]}"] if name == "gradient_checkpointing" else [option.flag]
    shown = option.help
    if option.default not in (None, (), False):
        shown = f"{shown} [dim]\\[{option.default}][/]"
    return typer.Option(*flags, *more, help=shown, rich_help_panel=panel, show_default=False)


Model = Annotated[str, typer.Argument(help=OPTIONS["model"].help, show_default=False)]
ModelOrFile = Annotated[Optional[str], typer.Argument(help=OPTIONS["model"].help, show_default=False)]
Base = Annotated[
    Optional[str],
    typer.Option(
        "--model",
        help="The base, where it is not where the adapter says.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
PresetOption = Annotated[Optional[str], _option("preset", WHAT)]
Modules = Annotated[Optional[list[str]], _option("modules", WHAT)]
Layers = Annotated[Optional[str], _option("layers", WHAT)]
Include = Annotated[Optional[list[str]], _option("include", WHAT)]
Exclude = Annotated[Optional[list[str]], _option("exclude", WHAT)]
StackOption = Annotated[Optional[str], _option("stack", WHAT)]
Strict = Annotated[Optional[bool], _option("strict", WHAT)]
Rank = Annotated[Optional[int], _option("rank", WHAT)]
Alpha = Annotated[Optional[float], _option("alpha", WHAT)]
Dropout = Annotated[Optional[float], _option("dropout", WHAT)]
Data = Annotated[Optional[list[str]], _option("data", DATA)]
EvalData = Annotated[Optional[list[str]], _option("eval_data", DATA)]
Holdout = Annotated[Optional[float], _option("holdout", DATA)]
Format = Annotated[Optional[str], _option("format", DATA)]
Map = Annotated[Optional[str], _option("map", DATA)]
ChatTemplate = Annotated[Optional[str], _option("chat_template", DATA)]
LossOn = Annotated[Optional[str], _option("loss_on", DATA)]
Overflow = Annotated[Optional[str], _option("overflow", DATA)]
MaxLength = Annotated[Optional[int], _option("max_length", DATA)]
Epochs = Annotated[Optional[int], _option("epochs", TRAINING)]
MaxSteps = Annotated[Optional[int], _option("max_steps", TRAINING)]
SaveSteps = Annotated[Optional[int], _option("save_steps", TRAINING)]
SaveMinutes = Annotated[Optional[float], _option("save_minutes", TRAINING)]
Keep = Annotated[Optional[int], _option("keep", TRAINING)]
EvalSteps = Annotated[Optional[int], _option("eval_steps", TRAINING)]
BatchSize = Annotated[Optional[int], _option("batch_size", TRAINING)]
Accumulate = Annotated[Optional[int], _option("accumulate", TRAINING)]
LearningRate = Annotated[Optional[float], _option("learning_rate", TRAINING)]
Scheduler = Annotated[Optional[str], _option("scheduler", TRAINING)]
Warmup = Annotated[Optional[float], _option("warmup", TRAINING)]
WeightDecay = Annotated[Optional[float], _option("weight_decay", TRAINING)]
MaxGradNorm = Annotated[Optional[float], _option("max_grad_norm", TRAINING)]
Seed = Annotated[Optional[int], _option("seed", TRAINING)]
Dtype = Annotated[Optional[str], _option("dtype", TRAINING)]
Device = Annotated[Optional[str], _option("device", TRAINING)]
Checkpointing = Annotated[Optional[bool], _option("gradient_checkpointing", TRAINING)]
PrefixCacheOption = Annotated[Optional[str], _option("prefix_cache", TRAINING)]
HeadChunk = Annotated[Optional[int], _option("head_chunk", TRAINING)]
Output = Annotated[Optional[str], _option("output", OUTPUT, "-o")]
Overwrite = Annotated[Optional[bool], _option("overwrite", OUTPUT)]
Resume = Annotated[Optional[bool], _option("resume", OUTPUT)]
Config = Annotated[
    Optional[str],
    typer.Option(
        "--config",
        help="A run file, as `run.yaml`; flags override it.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
Push = Annotated[
    Optional[str],
    typer.Option(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Send what was made to the hub, as a private repository.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=OUTPUT, show_default=False),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No talk on stderr.", rich_help_panel=OUTPUT, show_default=False)
]


def _set_debug(value: bool) -> None:
    global _debug
    _debug = value


Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show where an error came from.",
        rich_help_panel=OUTPUT,
        callback=_set_debug,
        show_default=False,
    ),
]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lorafit {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version.", callback=_print_version, is_eager=True, show_default=False
        ),
    ] = False,
) -> None:
    """LoRA in chosen modules of chosen layers: see what a model holds, plan, train, evaluate, merge."""


# -- commands ---------------------------------------------------------------------------------


@app.command()
def inspect(model: Model = "demo", json: Json = False, debug: Debug = False) -> None:
    """What is in a model: the way of a text through it, every weight, its role, its size.

    From the config alone: a hub id, a folder or a config.json.
    """
    from lorafit.show import Screen, show_map
    from lorafit.survey import find, survey

    screen = Screen(json)
    found = survey(find(model))
    if json:
        screen.document(found)
    else:
        show_map(screen, found, model)


@app.command()
def presets(json: Json = False, debug: Debug = False) -> None:
    """The strategies there are, what each is for, the roles and the bands."""
    from lorafit.presets import load, names
    from lorafit.show import Screen, show_presets

    screen = Screen(json)
    found = [load(name) for name in names()]
    if json:
        screen.document({"presets": found})
    else:
        show_presets(screen, found)


@app.command()
def plan(
    model: ModelOrFile = None,
    preset: PresetOption = None,
    layers: Layers = None,
    modules: Modules = None,
    include: Include = None,
    exclude: Exclude = None,
    stack: StackOption = None,
    strict: Strict = None,
    rank: Rank = None,
    alpha: Alpha = None,
    dropout: Dropout = None,
    data: Data = None,
    eval_data: EvalData = None,
    holdout: Holdout = None,
    format: Format = None,
    map: Map = None,
    chat_template: ChatTemplate = None,
    loss_on: LossOn = None,
    overflow: Overflow = None,
    max_length: MaxLength = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    dtype: Dtype = None,
    device: Device = None,
    gradient_checkpointing: Checkpointing = None,
    prefix_cache: PrefixCacheOption = None,
    head_chunk: HeadChunk = None,
    config: Config = None,
    fit: Annotated[
        Optional[str],
        typer.Option(
            "--fit",
            help="Plan for a device with so much free memory, as `24GB`, that is not here.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe",
            help="Time a block on this device; without it, a stated rate is assumed.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = True,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Time the device again; do not use an earlier answer.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = False,
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix", help="Every strategy × band in one table.", rich_help_panel=OUTPUT, show_default=False
        ),
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate/--no-estimate",
            help="Simulate a step: its memory and its time.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What would be adapted, and what it costs; no weight is read.

    Modules, layers, their spelling for PEFT, trainable parameters, memory by named terms.
    """
    from lorafit import forecast, show
    from lorafit.config import derive_from_model, settle
    from lorafit.presets import load, names
    from lorafit.survey import find, survey
    from lorafit.units import bytes_text

    flags = _given(locals())
    settings, chosen = settle(flags, config)
    screen = show.Screen(json)
    room = forecast.parse_size(fit) if fit is not None else None
    source = find(settings.model)
    found = survey(source)
    settings = derive_from_model(settings, found)
    made = None if matrix else _resolve(found, chosen, settings)
    if made is not None and not estimate:
        if json:
            screen.document({**made.as_json(), "data": None, "estimate": None, "fit": None})
        else:
            show.show_plan(screen, made, found, None, None, None, _train_command(flags, settings, config))
        return
    with screen.bar("reading", bytes_text) as tick:
        ahead, settings = forecast.prepare(
            settings, source, found, probing=probe, elsewhere=room is not None, fresh=fresh, tick=tick
        )
    free = forecast.free_on(ahead.device) if room is None else room
    if made is None:
        lora = {"r": settings.rank, "alpha": settings.alpha, "dropout": settings.dropout}
        every = [load(name) for name in names()]
        every = [replace(preset, lora=replace(preset.lora, **lora)) for preset in every]
        cells = ahead.matrix(every, ("low", "mid", "high", "all"))
        if json:
            screen.document({"model": found.model, "free": free, "cells": cells})
        else:
            show.show_matrix(screen, found.model, cells, free)
        return
    timing = ahead.timing(made)
    cost = ahead.estimate(made, timing)
    fitting = ahead.fit(made, chosen, cost, timing, free)
    if json:
        screen.document({**made.as_json(), "data": ahead.look, "estimate": cost.as_json(), "fit": fitting})
    else:
        look = (
            ahead.look if settings.data else None
        )  # the demo's own rows are shown where they are trained on
        show.show_plan(screen, made, found, cost, fitting, look, _train_command(flags, settings, config))


@app.command()
def train(
    model: ModelOrFile = None,
    preset: PresetOption = None,
    layers: Layers = None,
    modules: Modules = None,
    include: Include = None,
    exclude: Exclude = None,
    stack: StackOption = None,
    strict: Strict = None,
    rank: Rank = None,
    alpha: Alpha = None,
    dropout: Dropout = None,
    data: Data = None,
    eval_data: EvalData = None,
    holdout: Holdout = None,
    format: Format = None,
    map: Map = None,
    chat_template: ChatTemplate = None,
    loss_on: LossOn = None,
    overflow: Overflow = None,
    max_length: MaxLength = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    learning_rate: LearningRate = None,
    scheduler: Scheduler = None,
    warmup: Warmup = None,
    weight_decay: WeightDecay = None,
    max_grad_norm: MaxGradNorm = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    gradient_checkpointing: Checkpointing = None,
    prefix_cache: PrefixCacheOption = None,
    head_chunk: HeadChunk = None,
    save_steps: SaveSteps = None,
    save_minutes: SaveMinutes = None,
    keep: Keep = None,
    eval_steps: EvalSteps = None,
    output: Output = None,
    overwrite: Overwrite = None,
    resume: Resume = None,
    config: Config = None,
    push_to_hub: Push = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train an adapter: show the plan, do exactly that, evaluate before and after, save.

    Without a model and data: the embedded demo.
    """
    from lorafit import forecast, hub, show
    from lorafit.config import derive_from_model, settle
    from lorafit.events import TrainReport
    from lorafit.runs import read_back
    from lorafit.survey import find, load_tokenizer, pick_device, survey, without_collecting
    from lorafit.units import bytes_text

    with without_collecting():
        from lorafit import data as rows_of
        from lorafit import train as trainer
        from lorafit.checkpoint import RunFolder, claim
    from lorafit.outputs import check_target

    flags = _given(locals())
    settings, chosen = settle(flags, config)
    screen = show.Screen(json, quiet)
    if settings.resume and settings.output is None:
        raise RequestError("--resume needs the run's folder", "name it with -o")
    if push_to_hub:
        hub.check(push_to_hub)
    source = find(settings.model)
    found = survey(source)
    settings = derive_from_model(settings, found)
    made = _resolve(found, chosen, settings)
    folder, reads = None, settings.reads(source.place if source.local else "", config, chosen.path)
    if settings.output is not None:
        folder = RunFolder(Path(settings.output).expanduser())
        if settings.resume and folder.target.exists() and not settings.overwrite:
            screen.line("done", f"{folder.target} is a finished run: nothing to resume")
            if json:
                screen.document(read_back(folder.target).report)
            if push_to_hub:
                _push(screen, str(folder.target), push_to_hub)
            return
        check_target(folder.target, settings.overwrite, reads)
    show.show_header(screen, made, found, settings)

    pick_device(settings.device)
    tokenizer = load_tokenizer(source.place, source.name)
    with screen.bar("reading", bytes_text) as tick:
        rows = rows_of.load(settings, tokenizer, found.task, found.vocab_size, tick)
    ahead, settings = forecast.prepare(settings, source, found, look=rows.look, seconds=1.0)
    cost = ahead.estimate(made, ahead.timing(made))
    show.show_data(screen, settings, rows.look)
    if folder is None:
        folder = claim(_stem(found, made))
    else:
        folder.open(settings.overwrite, settings.resume, reads)
    view = show.TrainView(screen)
    report = None
    try:
        with _stopping() as stop:
            job = trainer.assemble(
                source, found, settings, made, rows, tokenizer, folder, stop, forecast.predicted(cost, made)
            )
            for event in trainer.recorded(job, trainer.run(job)):
                view.on(event)
                report = event if isinstance(event, TrainReport) else report
    except OutOfMemory as error:
        free = min(forecast.free_on(ahead.device), cost.memory.peak - 1)
        nearest = ahead.fit(made, chosen, cost, ahead.timing(made), free).alternatives
        if nearest:
            said = f"{bytes_text(nearest[0].peak)} by the plan, where this run was to take {bytes_text(cost.memory.peak)}"
            error.hint = f"{nearest[0].flags}: {said}"
        raise
    finally:
        folder.abandon()
        view.close()
    assert report is not None
    if json:
        screen.document(report)
    else:
        show.show_train_report(screen, report)
    if push_to_hub:
        _push(screen, report.output, push_to_hub)


@app.command()
def cache(
    remove: Annotated[
        Optional[str],
        typer.Option("--remove", help="Remove the one whose key begins so, or `all`.", show_default=False),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What is kept on this disk for later runs: large data sets' rows, what the frozen layers made of them."""
    from lorafit import caches, show
    from lorafit.modelmap import cache_folder

    screen = show.Screen(json)
    if remove:
        keys = [found.key for found in caches.kept()] if remove == "all" else [remove]
        freed = sum(caches.remove(key) for key in keys)
        if json:
            screen.document({"removed": len(keys), "bytes": freed})
        else:
            show.show_removed(screen, len(keys), freed)
        return
    found = caches.kept()
    if json:
        screen.document({"folder": str(cache_folder()), "caches": found})
    else:
        show.show_caches(screen, str(cache_folder()), found)


@app.command(name="eval")
def evaluate(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...", help="A run's folder, or any PEFT LoRA adapter.", show_default=False
        ),
    ],
    data: Data = None,
    format: Format = None,
    map: Map = None,
    loss_on: LossOn = None,
    overflow: Overflow = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = None,
    by: Annotated[
        Optional[str],
        typer.Option(
            "--by",
            help="The rows apart by a column, as `topic`, or by `file`.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    also: Annotated[
        Optional[list[str]],
        typer.Option(
            "--also",
            help="Text that the adapter was not meant to change: what did it forget? Many times.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=0, max=50, help="Completions to show side by side.", rich_help_panel=SAID
        ),
    ] = 3,
    prompt: Annotated[
        Optional[list[str]],
        typer.Option(
            "--prompt",
            help="A prompt of one's own, side by side; without --data, this alone. Many times.",
            rich_help_panel=SAID,
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0, max=10, help="Draw tokens; 0 takes the likeliest.", rich_help_panel=SAID
        ),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**31, help="Of what is drawn.", rich_help_panel=SAID)
    ] = 0,
    max_new_tokens: Annotated[
        Optional[int],
        typer.Option(
            "--max-new-tokens",
            min=1,
            help="Of a completion. [dim]\\[the reference's and 24; of --prompt 128][/]",
            rich_help_panel=SAID,
            show_default=False,
        ),
    ] = None,
    extremes: Annotated[
        int,
        typer.Option(
            "--rows",
            min=0,
            max=50,
            help="Rows to show that gained, and lost, the most.",
            rich_help_panel=OUTPUT,
        ),
    ] = 2,
    tasks: Annotated[
        Optional[str],
        typer.Option(
            "--tasks",
            help="Benchmarks by lm-eval's names or task files, as hellaswag,mine.yaml; without --data, these alone.",
            rich_help_panel=BENCH,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=0, help="Documents of each task; 0 for all.", rich_help_panel=BENCH)
    ] = 0,
    model: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    page: Annotated[
        Optional[str],
        typer.Option(
            "--report",
            help="Write the page there. [dim]\\[report.html in the run's folder][/]",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The same rows with the adapter off and on: what it changed, how sure that is, what it says.

    Without --data, the rows that the run held out. Several adapters of one base go in one call.
    """
    from lorafit import show
    from lorafit.survey import load_tokenizer, pick_device, pick_dtype, without_collecting

    with without_collecting():
        from lorafit import compare
        from lorafit import data as rows_of
        from lorafit.benchmarks import Tasks
        from lorafit.samples import of_one_s_own

    screen = show.Screen(json, quiet)
    about_data = {
        "format": format, "map": map, "loss_on": loss_on, "overflow": overflow, "max_length": max_length,
    }  # fmt: skip
    _check_options({**about_data, "batch_size": batch_size, "dtype": dtype})
    if page is not None:
        from lorafit.outputs import check_file
        from lorafit.page import MARK

        check_file(Path(page).expanduser(), "--report", MARK)
    source, found = _common_base(adapters, model)
    where = pick_device(device or "auto")
    tokenizer = load_tokenizer(_tokenizer_of(adapters[0], source.place), adapters[0])
    given = {name: value for name, value in about_data.items() if value is not None}
    if given and not (data or also):
        raise RequestError(
            f"{OPTIONS[next(iter(given))].flag} is about --data, and none is named", "name a file with --data"
        )
    stored = _stored_settings(adapters[0], found)
    settings = replace(stored, **{"format": "auto", "map": None, **given})
    # what is said of the rows' shape is about --data, where that is named
    beside = replace(settings, format="auto", map=None) if data else settings
    read = partial(
        rows_of.read_eval_rows,
        config=settings,
        tokenizer=tokenizer,
        task=found.task,
        vocab_size=found.vocab_size,
    )
    rows, specs = None, data or [spec for part in rows_of.files(stored) for spec in part]
    if data:
        rows = read(data)
    elif not prompt and not tasks:
        rows = _held_out(adapters[0], tokenizer, found)
    if by and rows is None:
        raise RequestError(
            "--by parts rows, and beside --prompt and --tasks there are none without --data",
            "name a file with --data",
        )
    question = compare.Question(
        rows=rows,
        also={file: read([file], config=beside) for file in also or ()},
        by=by or "",
        labels=rows_of.labelled(rows, by, specs) if by and rows is not None else (),
        samples=samples,
        asks=of_one_s_own(prompt or (), tokenizer, found.task, found.max_positions),
        extremes=extremes,
        batch_size=batch_size or 8,
        tasks=Tasks.named(tasks, found.task, limit, batch_size or 8) if tasks else None,
    )
    voice = {"temperature": temperature, "seed": seed, "most": max_new_tokens or 0}
    kind = pick_dtype(dtype or "auto", where)
    with screen.bar("evaluating") as tick:
        report, adapted = compare.compare(
            question, source, found, adapters, tokenizer, kind, voice, where, tick
        )
    written, why = _write_page(page, adapters, found, adapted, report)
    report = replace(report, page=written, notes=(*report.notes, *([why] if why else [])))
    if json:
        screen.document(report)
    else:
        show.show_eval(screen, report)


@app.command()
def merge(
    run: Annotated[
        Optional[str],
        typer.Argument(
            metavar="ADAPTER", help="A run's folder, or any PEFT LoRA adapter.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        Optional[list[str]],
        typer.Option(
            "--adapter",
            help="One more, as PATH or PATH=WEIGHT: the sum of all is merged. Many times.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = None,
    output: Output = None,
    overwrite: Overwrite = None,
    dtype: Annotated[
        Optional[str],
        typer.Option(
            "--dtype",
            help="Of what is written: float32, bfloat16 or float16. [dim]\\[the base's][/]",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        Optional[str],
        typer.Option(
            "--max-shard-size",
            help="Of a file, as 5GB. [dim]\\[the base's files][/]",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Hold the result against base + adapter.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = True,
    push_to_hub: Push = None,
    model: Base = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Adapters and base as one model folder, written a few rows at a time, checked on real text."""
    from lorafit import hub, show
    from lorafit.survey import load_tokenizer, without_collecting
    from lorafit.units import bytes_text, parse_bytes

    with without_collecting():
        from lorafit import merge as merging

    named = [*([(run, 1.0)] if run else []), *map(_weighed, adapter or [])]
    if not named:
        raise RequestError("merge needs an adapter", "lorafit merge RUN -o DIR")
    if not output:
        raise RequestError("merge needs a folder to write", f"lorafit merge {named[0][0]} -o DIR")
    if dtype is not None and dtype not in merging.STORED:
        raise RequestError(f"`--dtype` takes one of {', '.join(merging.STORED)}, not `{dtype}`")
    try:
        limit = parse_bytes(max_shard_size) if max_shard_size else 0
    except ValueError as error:
        raise RequestError(f"`--max-shard-size` {error}", "write it like 5GB") from None
    if push_to_hub:
        hub.check(push_to_hub)
    screen = show.Screen(json, quiet)
    source, found = _common_base([path for path, _ in named], model)
    first = named[0][0]
    tokenizer, rows = None, ()
    if verify:
        tokenizer = load_tokenizer(_tokenizer_of(first, source.place), first)
        # where its data are not at hand, the proof reads texts of lorafit's own
        with suppress(RequestError):
            rows = _held_out(first, tokenizer, found)
    wish = merging.Wish(Path(output).expanduser(), bool(overwrite), dtype or "", limit, verify)
    adapters = [(Path(path).expanduser(), weight) for path, weight in named]
    with screen.bar("merging", bytes_text) as tick:
        report = merging.merge(adapters, source, found, wish, rows, tokenizer, tick)
    if json:
        screen.document(report)
    else:
        show.show_merge(screen, report)
    if push_to_hub:
        _push(screen, report.output, push_to_hub)


@app.command()
def push(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A run's folder, or a merged model's.", show_default=False)
    ],
    name: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="What it is called on the hub.", show_default=False)
    ],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Send an adapter or a merged model to the hub: its card with it, nothing of the data.

    A repository that is made is private.
    """
    from lorafit import show

    screen = show.Screen(json, quiet)
    address = _push(screen, folder, name)
    if json:
        screen.document({"folder": folder, "address": address})


# -- what the commands share ------------------------------------------------------------------


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of a run among a command's arguments, those that were given."""
    found = {}
    for name, value in arguments.items():
        if name in OPTIONS and value is not None and value != []:
            found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _check_options(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is not None:
            OPTIONS[name].checked(value, "")


def _resolve(found: ModelMap, preset: Any, settings: RunConfig) -> Plan:
    from lorafit.plan import resolve

    return resolve(
        found,
        preset,
        settings.layers,
        include=settings.include,
        exclude=settings.exclude,
        stack=settings.stack,
        strict=settings.strict,
    )


def _train_command(flags: dict[str, Any], settings: RunConfig, file: str | None) -> str:
    """The command that does what was planned."""
    words = ["lorafit", "train"]
    if file is not None:
        words += ["--config", file]
    if "model" in flags and settings.model != "demo":
        words.append(settings.model)
    for name, value in flags.items():
        if name == "model":
            continue
        if isinstance(value, bool):
            words.append(OPTIONS[name].flag if value else OPTIONS[name].flag.replace("--", "--no-", 1))
        else:
            for item in value if isinstance(value, tuple) else (value,):
                words += [OPTIONS[name].flag, str(item)]
    if settings.model != "demo" and not settings.data:
        words += ["--data", "FILE"]
    return shlex.join(words)


def _stem(found: ModelMap, made: Plan) -> str:
    """`MODEL-PRESET-LAYERS`, in characters that a file name may have."""
    words = (found.model.rpartition("/")[2], made.preset, made.spec)
    return "-".join(re.sub(r"[^\w.]+", "-", word).strip("-.")[:60] for word in words)


def _base(adapter: str, model: str | None) -> tuple[Any, ModelMap]:
    from lorafit.adapter import base_of, check_base, read_config
    from lorafit.survey import find, survey

    read_config(adapter)
    name = model or base_of(adapter)
    try:
        source = find(name)
    except RequestError as error:
        if model is not None:
            raise
        raise RequestError(
            f"the base of `{adapter}` is not there: {error.message}", "name it with --model"
        ) from None
    check_base(adapter, source.place)
    return source, survey(source)


def _common_base(adapters: list[str], model: str | None) -> tuple[Any, ModelMap]:
    """The base that all of them were trained on. Raises RequestError when they name different ones."""
    from lorafit.adapter import base_of, check_base

    source, found = _base(adapters[0], model)
    for other in adapters[1:]:
        if model is None and base_of(other) != base_of(adapters[0]):
            raise RequestError(
                f"`{other}` has another base than `{adapters[0]}`",
                "take them one by one, or name it with --model",
            )
        check_base(other, source.place)
    return source, found


def _weighed(text: str) -> tuple[str, float]:
    """`PATH=WEIGHT`, or `PATH` alone for a weight of 1."""
    path, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    with suppress(ValueError):
        value = float(weight)
        if path and math.isfinite(value):
            return path, value
    raise RequestError(f"`--adapter {text}` has no number behind its =", "write it like runs/a=0.5")


def _write_page(
    asked: str | None, adapters: list[str], found: ModelMap, adapted: dict[str, Any], report: Any
) -> tuple[str, str]:
    """(where the page was written, or nothing; why it was not). Without a place that was named it goes
    into the folder of the first adapter's run.

    Raises RequestError where the named place cannot be written.
    """
    from lorafit import page
    from lorafit.adapter import run_of
    from lorafit.outputs import PAGE
    from lorafit.runs import DAMAGED, read_back

    runs = [read_back(folder) for folder in dict.fromkeys(map(run_of, adapters))]
    if asked is None and not runs[0].report:
        return "", ""
    path = Path(asked).expanduser() if asked else runs[0].folder / PAGE
    title = " and ".join(run.folder.resolve().name for run in runs)
    try:
        shown = page.make(title, found, adapted, runs, report)
    except DAMAGED:
        return "", f"no page was drawn: the record of `{runs[0].folder}` is damaged"
    try:
        page.write(path, shown)
    except OSError as error:
        if asked:
            raise RequestError(f"cannot write --report `{path}`: {error.strerror}", "another place") from None
        return "", f"`{path}` was not written: {error.strerror}; --report names another place"
    return str(path), ""


def _push(screen: Any, folder: str, name: str) -> str:
    from lorafit import hub

    address = hub.push(Path(folder).expanduser(), name)
    screen.line("sent", address, answer=True)
    return address


def _tokenizer_of(adapter: str, base: str) -> str:
    """The adapter's own tokenizer where it has one, else the base's."""
    from lorafit.adapter import run_of

    names = ("tokenizer.json", "tokenizer_config.json")
    own = run_of(adapter)
    return str(own) if any((own / name).is_file() for name in names) else base


def _stored_settings(adapter: str, found: ModelMap) -> RunConfig:
    """The settings an adapter was trained with; the usual ones where it is no run of ours. Its tokenizer
    holds its chat template."""
    from lorafit.adapter import run_of
    from lorafit.config import as_recorded, derive_from_model, settle

    path = run_of(adapter) / "run.yaml"
    settings = as_recorded(str(path)) if path.is_file() else settle({})[0]
    return derive_from_model(replace(settings, chat_template=None), found)


def _held_out(adapter: str, tokenizer: Any, found: ModelMap) -> Any:
    """The rows that a run held out, made again from its data and checked to be the same."""
    from lorafit import data
    from lorafit.adapter import run_of
    from lorafit.runs import read_back

    run = run_of(adapter)
    if not (run / "run.yaml").is_file():
        raise RequestError(
            f"`{adapter}` is no run of lorafit: it has no held-out rows", "name data with --data"
        )
    rows = data.load(_stored_settings(adapter, found), tokenizer, found.task, found.vocab_size)
    if rows.held_out.digest != read_back(run).held_out_digest:
        raise RequestError(
            f"the data of `{adapter}` changed since it was trained: its held-out rows are other ones",
            "name data with --data",
        )
    return rows.held_out


@contextmanager
def _stopping() -> Iterator[Callable[[], int]]:
    """Ctrl-C and SIGTERM ask the run to end after its step; asked twice, it ends at once."""
    asked = 0

    def on_signal(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt if number == signal.SIGINT else _Terminated
        asked = number

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> NoReturn:
    """The command line, to the end of the process.

    It ends the process at once: Python would take torch's thousand modules apart first, for a second.
    """
    code: Any = DONE
    try:
        app()
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()  # what libraries asked to be done still is
    with suppress(BrokenPipeError):  # the reader has had enough: `lorafit presets | true`
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else DONE)
