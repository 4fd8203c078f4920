"""`lorafit eval`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import (
    GENERATION,
    Base,
    Debug,
    Json,
    Quiet,
    SamplingSeed,
    Temperature,
    run_options,
)
from lorafit.errors import RequestError
from lorafit.settings import DATA, OPTIONS, OUTPUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.data import RowSet
    from lorafit.model import ModelMap, ModelSource
    from lorafit.results import EvalReport
    from lorafit.settings import RunConfig

BENCHMARKS = "Benchmarks"
SHAPE = ("format", "map", "on_bad_row", "csv_delimiter", "csv_quote")  # of the run's own files, not of others
ABOUT_DATA = (*SHAPE, "as_chat", "loss_on", "overflow", "max_length")


@app.command(name="eval")
@run_options("data", *ABOUT_DATA, "batch_size", "dtype", "quantize", "device", "prefix_residency")
def evaluate(
    flags: Mapping[str, Any],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="A run's folder, or any PEFT LoRA adapter: a folder or a hub id; or one model, alone.",
            show_default=False,
        ),
    ],
    by: Annotated[
        Optional[str],
        typer.Option(
            "--by",
            help="Group results by a column, e.g. `topic`, or by `file`.",
            metavar="COLUMN",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    also: Annotated[
        Optional[list[str]],
        typer.Option(
            "--also",
            help="Text that the adapter should not change, to measure forgetting. Repeatable.",
            metavar="FILE",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=0, max=50, help="Completions to show side by side.", rich_help_panel=GENERATION
        ),
    ] = 3,
    prompt: Annotated[
        Optional[list[str]],
        typer.Option(
            "--prompt",
            help="Your own prompt, side by side; without --data, only this is run. Repeatable.",
            rich_help_panel=GENERATION,
            show_default=False,
        ),
    ] = None,
    temperature: Temperature = 0.0,
    seed: SamplingSeed = 0,
    max_new_tokens: Annotated[
        Optional[int],
        typer.Option(
            "--max-new-tokens",
            min=1,
            help="Maximum new tokens. [dim]\\[the reference's and 24; 128 for --prompt][/]",
            rich_help_panel=GENERATION,
            show_default=False,
        ),
    ] = None,
    extremes: Annotated[
        int,
        typer.Option(
            "--rows",
            min=0,
            max=50,
            help="Number of most improved, and most regressed, rows to show.",
            rich_help_panel=OUTPUT,
        ),
    ] = 2,
    tasks: Annotated[
        Optional[str],
        typer.Option(
            "--tasks",
            help="lm-eval tasks or task files, e.g. `hellaswag,mine.yaml`; without --data, only these are run.",
            metavar="NAMES",
            rich_help_panel=BENCHMARKS,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit", min=0, help="Maximum documents per task; 0 is all.", rich_help_panel=BENCHMARKS
        ),
    ] = 0,
    model: Base = None,
    page: Annotated[
        Optional[str],
        typer.Option(
            "--report",
            help="Write the report page to this file. [dim]\\[report.html in the run's folder][/]",
            metavar="FILE",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare base and adapter on the same rows, with confidence intervals and sample outputs.

    Without --data, the rows that the run held out. Several adapters of one base may be compared. A model, e.g. a merged
    one, is scored alone.
    """
    given = {name: OPTIONS[name].parsed(value) for name, value in flags.items()}

    from lorafit.adapter import CONFIG, locate, tokenizer_place
    from lorafit.data import find_files
    from lorafit.evaluate import check_holds_out
    from lorafit.outputs import check_file
    from lorafit.report import PAGE_MARK
    from lorafit.screen import Screen, show_eval
    from lorafit.system import without_collecting

    screen = Screen(json, quiet)
    if page is not None:
        check_file(Path(page).expanduser(), "--report", PAGE_MARK)
    _check(given, also, by, prompt, tasks)
    find_files((*given.get("data", ()), *(also or ())))
    alone = _model_alone(adapters, bool(given.get("data") or also or prompt or tasks))
    adapters = [] if alone else [locate(adapter) for adapter in adapters]
    if adapters and not (given.get("data") or prompt or tasks) and (Path(adapters[0]) / CONFIG).is_file():
        check_holds_out(adapters[0])
    source, found = _base(adapters, model or alone)

    with without_collecting():
        from lorafit.data import chat_template_of
        from lorafit.evaluate import EvalRequest, Sampling, Tasks, compare, own_prompts
        from lorafit.model import load_tokenizer, pick_device, pick_dtype

    residency = given.get("prefix_residency", "auto")
    quantize, said = quantisation(given, adapters, found)
    device = pick_device(given.get("device", "auto"))
    own = tokenizer_place(adapters[0], source.place) if adapters else source.place
    tokenizer = load_tokenizer(own, adapters[0] if adapters else source.name)
    size = given.get("batch_size", 8)
    rows, labels, others, settings = _rows(
        given, next(iter(adapters), ""), found, tokenizer, also, by, not (prompt or tasks)
    )
    request = EvalRequest(
        rows=rows,
        also=others,
        by=by or "",
        labels=labels,
        samples=samples,
        prompts=own_prompts(
            prompt or (), tokenizer, found.task, found.max_positions, chat_template_of(tokenizer, settings)
        ),
        extremes=extremes,
        batch_size=size,
        tasks=Tasks.named(tasks, found.task, limit, size) if tasks else None,
    )
    sampling = Sampling(temperature, seed, max_new_tokens or 0)
    dtype = pick_dtype(given.get("dtype", "auto"), device)
    with screen.bar("evaluating") as tick:
        report, adapted = compare(
            request, source, found, adapters, tokenizer, dtype, sampling, device, tick, quantize, residency
        )
    written, why = _write_page(page, adapters, found, adapted, report)
    notes = [*report.notes, *said, *([why] if why else []), *_steps_kept(adapters)]
    report = replace(report, page=written, notes=tuple(notes))
    if json:
        screen.document(report)
    else:
        show_eval(screen, report)


def _model_alone(names: Sequence[str], rows: bool) -> str:
    """The model that is named in an adapter's place, to be scored alone; empty where adapters are named.

    Raises RequestError where other models or adapters stand beside it, and where there are no `rows` to score it on.
    """
    from lorafit.adapter import is_model

    found = next((name for name in names if is_model(name)), "")
    if found and len(names) > 1:
        raise RequestError(
            f"`{found}` is a model, and models are scored one by one",
            f"lorafit eval {shlex.quote(found)} --data FILE; adapters of one base go in one call",
        )
    if found and not rows:
        raise RequestError(
            f"`{found}` is a model, not an adapter: it has no held-out rows",
            f"lorafit eval {shlex.quote(found)} --data FILE scores it",
        )
    return found


def _base(adapters: Sequence[str], model: str | None) -> tuple[ModelSource, ModelMap]:
    """The base of the adapters; the model itself where there are none."""
    from lorafit.adapter import common_base
    from lorafit.model import chart_of, find

    if adapters:
        return common_base(adapters, model)
    source = find(model or "")
    return source, chart_of(source)


def _steps_kept(adapters: Sequence[str]) -> Iterator[str]:
    """A note for each run whose folder holds the best adapter, and not that of its last step."""
    from lorafit.adapter import run_of
    from lorafit.report import read_back, steps_text

    for path in adapters:
        report = read_back(Path(path).expanduser()).report if run_of(path) == Path(path).expanduser() else {}
        if report.get("adapter_step", report.get("steps")) != report.get("steps"):
            yield f"`{path}` is the adapter of {steps_text(report)}"


def _check(given: Mapping[str, Any], also: Any, by: str | None, prompt: Any, tasks: str | None) -> None:
    """Raises RequestError for options that mean nothing together: before anything is loaded."""
    about_data = [name for name in ABOUT_DATA if name in given]
    if about_data and not (given.get("data") or also):
        raise RequestError(f"{OPTIONS[about_data[0]].flag} needs --data", "name a file with --data")
    if by and not given.get("data") and (prompt or tasks):
        raise RequestError(
            "--by groups rows, and with --prompt or --tasks there are no rows without --data",
            "name a file with --data",
        )


def quantisation(given: Mapping[str, Any], adapters: Sequence[str], found: ModelMap) -> tuple[str, list[str]]:
    """(how the base is quantised, notes about it): as the adapters were trained, unless --quantize says it.

    Raises RequestError where they were trained in different ways, or it cannot be run.
    """
    from lorafit.adapter import recorded_quantize
    from lorafit.model import held_as

    trained = {path: recorded_quantize(path) for path in adapters}
    asked = given.get("quantize")
    if asked is None and len(set(trained.values())) > 1:
        (first, one), (other, two) = list({kind: path for path, kind in trained.items()}.items())[:2]
        raise RequestError(
            f"`{one}` was trained on a base in {first}, `{two}` in {other}",
            "--quantize says which to evaluate on",
        )
    quantize = asked or next(iter(trained.values()), "none")
    held = held_as(found, quantize)
    if held is not None:
        held.check(given.get("dtype", "auto"), given.get("device", "auto"))
    notes = []
    if asked is None and quantize != "none":
        notes.append(
            f"the base is in {quantize}, as in training; --quantize none is what a merge makes of it"
        )
    elif odd := [path for path, kind in trained.items() if kind != quantize and found.quantised is None]:
        notes.append(
            f"`{odd[0]}` was trained with --quantize {trained[odd[0]]}, and is evaluated with {quantize}"
        )
    return quantize, notes


def _rows(
    given: Mapping[str, Any],
    adapter: str,
    found: ModelMap,
    tokenizer: PreTrainedTokenizerBase,
    also: Sequence[str] | None,
    by: str | None,
    held_out: bool,
) -> tuple[RowSet | None, Sequence[str], dict[str, RowSet], RunConfig]:
    """(the rows to score, a label for each where `by` names them, the rows of --also by file, the settings
    they were read with). Without --data the rows that the run held out, where `held_out` asks for them."""
    from lorafit.data import files_of, labelled, read_eval_rows
    from lorafit.evaluate import held_out_rows, stored_settings
    from lorafit.settings import derive_from_model, settle

    data = given.get("data")
    stored = stored_settings(adapter, found) if adapter else derive_from_model(settle({})[0], found)
    about_data = {name: given[name] for name in ABOUT_DATA if name in given}
    usual = {name: OPTIONS[name].default for name in SHAPE}
    settings = replace(stored, **{**usual, **about_data})
    # with --data, the format options apply to it and not to --also
    beside = replace(settings, format="auto", map=None) if data else settings
    read = partial(read_eval_rows, tokenizer=tokenizer, task=found.task, vocab_size=found.vocab_size)
    rows, specs = None, data or [spec for part in files_of(stored) for spec in part]
    if data:
        rows = read(data, config=settings)
    elif held_out and adapter:
        rows = held_out_rows(adapter, tokenizer, found)
    labels = labelled(rows, by, specs, settings if data else stored) if by and rows is not None else ()
    return rows, labels, {file: read([file], config=beside) for file in also or ()}, settings


def _write_page(
    file: str | None,
    adapters: Sequence[str],
    found: ModelMap,
    adapted: Mapping[str, tuple[str, ...]],
    report: EvalReport,
) -> tuple[str, str]:
    """(path of the written page or empty, reason why it was not written). Without `file` the page goes
    into the folder of the first adapter's run.

    Raises RequestError if `file` cannot be written.
    """
    from lorafit.adapter import run_of
    from lorafit.outputs import PAGE
    from lorafit.report import DAMAGED, make_page, read_back, write_page

    runs = [read_back(folder) for folder in dict.fromkeys(map(run_of, adapters))]
    if file is None and not (runs and runs[0].report):
        return "", ""
    path = Path(file).expanduser() if file else runs[0].folder / PAGE
    title = " and ".join(run.folder.resolve().name for run in runs) or found.model
    try:
        shown = make_page(title, found, adapted, runs, report)
    except DAMAGED:
        return "", f"no report page: the events or settings of `{title}` are damaged"
    try:
        write_page(path, shown)
    except OSError as error:
        if file:
            raise RequestError(
                f"cannot write --report `{path}`: {error.strerror}", "choose another file"
            ) from None
        return "", f"could not write `{path}`: {error.strerror}; choose another file with --report"
    return str(path), ""
