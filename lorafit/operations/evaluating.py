"""Base and adapters over the same rows."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.adapter import (
    CONFIG,
    common_base,
    locate,
    named_alone,
    recorded_quantize,
    run_of,
    tokenizer_place,
)
from lorafit.data import find_files
from lorafit.errors import RequestError
from lorafit.evaluate import check_holds_out
from lorafit.forward import not_streamed
from lorafit.model import chart_of, find, held_as
from lorafit.operations.options import ABOUT_DATA, SHAPE
from lorafit.operations.progress import Bar, no_bar
from lorafit.outputs import PAGE, check_file
from lorafit.report import DAMAGED, PAGE_MARK, make_page, read_back, steps_text, write_page
from lorafit.settings import OPTIONS, derive_from_model, settle
from lorafit.system import without_collecting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.data import RowSet
    from lorafit.model import ModelMap, ModelSource
    from lorafit.results import EvalReport
    from lorafit.settings import RunConfig


def evaluate_adapters(
    adapters: Sequence[str],
    flags: Mapping[str, Any],
    *,
    by: str | None = None,
    also: Sequence[str] | None = None,
    samples: int = 3,
    prompt: Sequence[str] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    rows: int = 2,
    tasks: str | None = None,
    limit: int = 0,
    model: str | None = None,
    report: str | None = None,
    bar: Bar = no_bar,
) -> EvalReport:
    """Base and adapters, or one model alone, over the same rows: those of `data`, or that the run held out.

    The arguments are the options of `lorafit eval`, `flags` those it shares with a run. Raises RequestError for what
    cannot be evaluated so.
    """
    given = {name: OPTIONS[name].parsed(value) for name, value in flags.items()}

    if report is not None:
        check_file(Path(report).expanduser(), "--report", PAGE_MARK)
    _check(given, also, by, prompt, tasks, limit)
    find_files((*given.get("data", ()), *(also or ())))
    alone = _model_alone(adapters, bool(given.get("data") or also or prompt or tasks), model)
    adapters = [] if alone else [locate(adapter) for adapter in adapters]
    if adapters and not (given.get("data") or prompt or tasks) and (Path(adapters[0]) / CONFIG).is_file():
        check_holds_out(adapters[0])
    if alone and given.get("prefix_residency") == "stream":
        raise not_streamed("a model alone has no band, and all of its layers are held")
    if by and not (given.get("data") or adapters):
        raise RequestError("--by groups rows of --data, and there are none", "name a file with --data")
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
    scored, labels, others, settings = _rows(
        given, next(iter(adapters), ""), found, tokenizer, also, by, not (prompt or tasks)
    )
    request = EvalRequest(
        rows=scored,
        also=others,
        by=by or "",
        labels=labels,
        samples=samples,
        prompts=own_prompts(
            prompt or (), tokenizer, found.task, found.max_positions, chat_template_of(tokenizer, settings)
        ),
        extremes=rows,
        batch_size=size,
        tasks=Tasks.named(tasks, found.task, limit, size) if tasks else None,
    )
    sampling = Sampling(temperature, seed, max_new_tokens or 0)
    dtype = pick_dtype(given.get("dtype", "auto"), device)
    with bar("evaluating") as tick:
        found_out, adapted = compare(
            request, source, found, adapters, tokenizer, dtype, sampling, device, tick, quantize, residency
        )
    written, why = _write_page(report, adapters, found, adapted, found_out)
    seen = () if given.get("data") or scored is None else _others_rows(adapters)
    notes = [*found_out.notes, *said, *([why] if why else []), *_steps_kept(adapters), *seen]
    return replace(found_out, page=written, notes=tuple(notes))


def _model_alone(names: Sequence[str], rows: bool, base: str | None) -> str:
    """The model that is named in an adapter's place, to be scored alone; empty where adapters are named.

    Raises RequestError where other models or adapters stand beside it, or a `base` is named, and where there are no
    `rows` to score it on.
    """
    found = next((name for name in names if named_alone(name, base)), "")
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
    if adapters:
        return common_base(adapters, model)
    source = find(model or "")
    return source, chart_of(source)


def _others_rows(adapters: Sequence[str]) -> Iterator[str]:
    """A note for each run that did not hold out the rows of the first, which are scored."""
    digests = [read_back(run_of(path)).held_out_digest for path in adapters]
    for path, digest in zip(adapters, digests, strict=True):
        if digest and digests[0] and digest != digests[0]:
            yield (
                f"`{path}` did not hold out the rows of `{adapters[0]}`, and may have been trained on them: --data FILE "
                "with rows that neither saw compares them fairly"
            )


def _steps_kept(adapters: Sequence[str]) -> Iterator[str]:
    """A note for each run whose folder holds the best adapter, and not that of its last step."""
    for path in adapters:
        report = read_back(Path(path).expanduser()).report if run_of(path) == Path(path).expanduser() else {}
        if report.get("adapter_step", report.get("steps")) != report.get("steps"):
            yield f"`{path}` is the adapter of {steps_text(report)}"


def _check(
    given: Mapping[str, Any], also: Any, by: str | None, prompt: Any, tasks: str | None, limit: int
) -> None:
    """Raises RequestError for options that mean nothing together: before anything is loaded."""
    about_data = [name for name in ABOUT_DATA if name in given]
    if about_data and not (given.get("data") or also):
        raise RequestError(f"{OPTIONS[about_data[0]].flag} needs --data", "name a file with --data")
    if limit and not tasks:
        raise RequestError("--limit is for --tasks", "name benchmarks with --tasks, e.g. --tasks hellaswag")
    if by and not given.get("data") and (prompt or tasks):
        raise RequestError(
            "--by groups rows, and with --prompt or --tasks there are no rows without --data",
            "name a file with --data",
        )


def quantisation(given: Mapping[str, Any], adapters: Sequence[str], found: ModelMap) -> tuple[str, list[str]]:
    """(how the base is quantised, notes about it): as the adapters were trained, unless --quantize says it.

    Raises RequestError where they were trained in different ways, or it cannot be run.
    """
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
    runs = [read_back(folder) for folder in dict.fromkeys(map(run_of, adapters))]
    if file is None and not (runs and runs[0].report):
        return "", ""
    path = Path(file).expanduser() if file else runs[0].folder / PAGE
    named = [run.folder.resolve().name for run in runs]
    title = (
        (" and ".join(named) or found.model) if len(named) < 4 else f"{len(named)} adapters of {found.model}"
    )
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
