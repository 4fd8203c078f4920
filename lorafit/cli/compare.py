"""`lorafit compare`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorafit.cli.app import app
from lorafit.cli.options import Config, Debug, Json, Quiet, Verbose, run_options
from lorafit.cli.plan import train_command
from lorafit.cli.shell import stopping
from lorafit.errors import RequestError
from lorafit.outputs import check_target
from lorafit.settings import DATA, OPTIONS, OUTPUT, TRAINING, WHAT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.compare import Ahead, Answer, Impossible, Request
    from lorafit.data import Rows, RowSet
    from lorafit.model import ModelMap, ModelSource
    from lorafit.screen import Screen

WITHOUT = (
    "preset", "layers", "modules", "rank", "learning_rate", "seed", "from_adapter", "overwrite", "resume", "sample",
    "track", "track_project", "track_name", "prefix_residency",
)  # fmt: skip


def _list(flag: str, help: str, panel: str) -> Any:
    return typer.Option(flag, help=help, metavar="LIST", rich_help_panel=panel, show_default=False)


def _flag(flag: str, help: str, panel: str) -> Any:
    return typer.Option(flag, help=help, rich_help_panel=panel, show_default=False)


def _text(flag: str, help: str, metavar: str, panel: str) -> Any:
    return typer.Option(flag, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


@app.command()
@run_options(*(name for name in OPTIONS if name not in WITHOUT))
def compare(
    flags: Mapping[str, Any],
    presets: Annotated[
        Optional[list[str]],
        _list("--presets", "Strategies, e.g. `basic,ffn,all`. [dim]\\[all of them][/]", WHAT),
    ] = None,
    layers: Annotated[
        Optional[list[str]],
        _list(
            "--layers",
            "Layers, e.g. `low,high,0-3`; `low+high` is one choice of both. [dim]\\[low,mid,high,all][/]",
            WHAT,
        ),
    ] = None,
    ranks: Annotated[
        Optional[list[str]], _list("--ranks", "LoRA ranks, e.g. `8,32`. [dim]\\[from the preset][/]", WHAT)
    ] = None,
    trainable: Annotated[
        Optional[str],
        _text(
            "--trainable", "Set each rank so that all train about as many parameters, e.g. `1M`.", "N", WHAT
        ),
    ] = None,
    grid: Annotated[
        Optional[str],
        _text("--grid", "A YAML file with a list of candidates, instead of lists.", "FILE", WHAT),
    ] = None,
    also: Annotated[
        Optional[list[str]],
        _text(
            "--also",
            "Text that the adapters should not change, to measure forgetting. Repeatable.",
            "FILE",
            DATA,
        ),
    ] = None,
    rates: Annotated[
        Optional[list[str]],
        _list(
            "--learning-rates",
            "Peak learning rates, e.g. `0.5x,1x,2x` of the derived one, or `1e-4`.",
            TRAINING,
        ),
    ] = None,
    seeds: Annotated[
        Optional[list[str]],
        _list("--seeds", "A number of seeds, e.g. `3`, or a list, e.g. `1,5`. [dim]\\[1][/]", TRAINING),
    ] = None,
    budget: Annotated[
        Optional[str],
        _text(
            "--budget",
            "Time for all of it, e.g. `10m`: all candidates take as many steps as fit.",
            "TIME",
            TRAINING,
        ),
    ] = None,
    halving: Annotated[
        bool,
        _flag(
            "--halving",
            "Drop the worse half after a quarter and a half of the steps, beyond noise.",
            TRAINING,
        ),
    ] = False,
    hint: Annotated[
        bool, _flag("--hint", "First rank the choices by the gradient at the start, as a hint.", TRAINING)
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            min=1,
            max=64,
            help="Candidates to train at once on a CPU, each on one thread.",
            rich_help_panel=TRAINING,
        ),
    ] = 1,
    resume: Annotated[
        bool, _flag("--resume", "Go on with an unfinished comparison: `--resume DIR`.", OUTPUT)
    ] = False,
    dry: Annotated[
        bool, _flag("--plan", "Show the candidates and what they cost, and stop.", OUTPUT)
    ] = False,
    csv: Annotated[bool, _flag("--csv", "Print the table as CSV on stdout.", OUTPUT)] = False,
    config: Config = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train many candidates on the same rows, and say which strategy and band to take.

    Base, rows and frozen layers are shared. Each candidate is a run folder of its own.
    """
    from lorafit.compare import Request, table_text
    from lorafit.screen import Screen, show_answer

    screen = Screen(json or csv, quiet, verbose)
    asked = Request(
        {name: value for name, value in flags.items() if name != "output"},
        presets=tuple(presets or ()), layers=tuple(layers or ()), ranks=tuple(ranks or ()),
        learning_rates=tuple(rates or ()), seeds=tuple(seeds or ()), grid=grid, config=config, budget=budget,
        trainable=trainable, also=tuple(also or ()), halving=halving, hint=hint,
    )  # fmt: skip
    target = Path(flags["output"]).expanduser() if "output" in flags else None
    asked, target = _resumed(asked, target) if resume else (asked.checked(), target)
    prepared = _prepared(screen, asked, target, workers)
    if dry:
        if json:
            screen.document({**prepared.ahead.as_json(), "impossible": prepared.impossible})
        return
    answer = _answered(screen, prepared, resume, workers)
    if json:
        screen.document(answer)
    elif csv:
        sys.stdout.write(table_text(answer))
    else:
        show_answer(screen, answer)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A comparison before its model is loaded."""

    asked: Request
    source: ModelSource
    found: ModelMap
    ahead: Ahead
    impossible: Sequence[Impossible]
    common: Mapping[str, Any]
    rows: Rows
    also: Mapping[str, RowSet]
    tokenizer: PreTrainedTokenizerBase
    target: Path


def _resumed(asked: Request, target: Path | None) -> tuple[Request, Path]:
    """(what an unfinished comparison was asked for, its folder). `--resume DIR` is read as a switch and the first
    argument, so without -o that argument is the folder.

    Raises RequestError when it is not a comparison, or was asked for something else.
    """
    from lorafit.compare import CompareFolder, Request

    alone = target is None
    if target is None:
        name = asked.flags.get("model")
        if not name:
            raise RequestError("--resume needs the comparison's folder", "lorafit compare --resume DIR")
        target = Path(name).expanduser()
    folder = CompareFolder(target)
    folder.open(resume=True)
    stored = Request.of(folder.request())
    given = replace(asked, flags={n: v for n, v in asked.flags.items() if not (alone and n == "model")})
    if given != Request({}) and (odd := stored.differs(given.checked())):
        raise RequestError(
            f"`{target}` was asked for with another {odd}",
            f"lorafit compare --resume {shlex.quote(str(target))} alone",
        )
    return stored, target


def _prepared(screen: Screen, asked: Request, target: Path | None, workers: int) -> _Prepared:
    """Everything before the model is loaded: the candidates, the rows, the cost."""
    from lorafit.compare import (
        check_workers,
        look_ahead,
        new_folder,
        parse_count,
        parse_duration,
        resolve_all,
    )
    from lorafit.data import find_sources
    from lorafit.model import chart_of, find, load_tokenizer, pick_device
    from lorafit.screen import show_ahead, show_impossible
    from lorafit.settings import settle
    from lorafit.system import without_collecting
    from lorafit.units import bytes_text

    common, wanted = asked.wanted()
    first, _ = settle({**common, **wanted[0].settings}, asked.config)
    if not first.holds_out:
        raise RequestError(
            "candidates are compared on held-out rows, and --holdout 0 holds out none", "--holdout 0.05"
        )
    source = find(first.model, first.revision)
    find_sources(first)
    if target is None:
        target = new_folder(re.sub(r"[^\w.]+", "-", first.model.rpartition("/")[2]).strip("-.")[:60])
    if not (target / "request.json").is_file():
        check_target(target, False)
    found = chart_of(source)
    trainable = parse_count(asked.trainable) if asked.trainable else None
    candidates, impossible = resolve_all(found, wanted, common, asked.config, trainable)
    show_impossible(screen, impossible)
    if not candidates:
        raise RequestError("none of the candidates is possible", impossible[0].reason)
    config = candidates[0].config
    with without_collecting():
        from lorafit.data import load, read_eval_rows
    check_workers(workers, pick_device(config.device).type)
    if workers > 1:
        import torch

        torch.set_num_threads(1)  # what is timed and filled here runs as the candidates will
    tokenizer = load_tokenizer(source.place, source.name)
    with screen.bar("reading", bytes_text) as tick:
        rows = load(config, tokenizer, found.task, found.vocab_size, tick)
    plain = replace(config, format="auto", map=None)
    also = {
        Path(spec).name: read_eval_rows([spec], plain, tokenizer, found.task, found.vocab_size)
        for spec in asked.also
    }
    budget = parse_duration(asked.budget) if asked.budget and asked.steps is None else None
    with screen.bar("planning") as tick:
        ahead = look_ahead(source, found, candidates, rows.look, budget, tick, workers)
    show_ahead(screen, found, ahead, trainable, rows.look)
    _check_memory(screen, ahead)
    if budget is not None:
        asked = replace(asked, steps=max(cost.steps or 1 for cost in ahead.costs.values()))
    return _Prepared(asked, source, found, ahead, impossible, common, rows, also, tokenizer, target)


def _check_memory(screen: Screen, ahead: Ahead) -> None:
    """Warn when the predicted peak is more than the free memory. Raises RequestError when it is more than twice
    that."""
    from lorafit.estimate import free_on
    from lorafit.units import bytes_text

    device = next(iter(ahead.forecasts.values())).device
    free = free_on(device)
    if ahead.peak <= free:
        return
    what = f"the largest candidate needs {bytes_text(ahead.peak)} at its peak, and {bytes_text(free)} are free on {device}"
    if ahead.peak > 2 * free:
        raise RequestError(what, "a smaller --batch-size, or --gradient-checkpointing")
    screen.note(what)


def _answered(screen: Screen, run: _Prepared, resume: bool, workers: int) -> Answer:
    """Train what is missing, and write and return the answer."""
    from lorafit.compare import (
        CompareFolder,
        Comparison,
        Hint,
        SharedBase,
        answer_of,
        with_hint,
        write_answer,
    )
    from lorafit.screen import CompareView
    from lorafit.train import load_base

    folder = CompareFolder(run.target)
    folder.open(resume)
    folder.begin(run.asked, [run.rows.train.digest, run.rows.held_out.digest])
    config = run.ahead.candidates[0].config
    view, hint = CompareView(screen, run.ahead), None
    with stopping() as stop:
        shared = SharedBase(lambda: load_base(run.source, run.found, config))
        comparison = Comparison(
            run.ahead,
            shared,
            run.rows,
            run.tokenizer,
            folder,
            run.also,
            halving=run.asked.halving,
            hints=run.asked.hint,
            workers=workers,
            stop=stop,
        )
        try:
            for event in comparison.run():
                hint = event if isinstance(event, Hint) else hint
                view.on(event)
        finally:
            view.close()
            shared.close()
    base = folder.base()
    assert base is not None
    answer = answer_of(
        run.found.model,
        str(run.target),
        run.ahead.candidates,
        comparison.outcomes(),
        base,
        run.impossible,
        folder.cuts(),
    )
    answer = with_hint(replace(answer, command=_command(run, answer.take)), hint)
    write_answer(folder, answer, run.found, comparison.outcomes(), run.rows.held_out, run.tokenizer)
    return answer


def _command(run: _Prepared, take: str) -> str:
    """The command that trains the choice in full; empty where there is none."""
    from lorafit.compare import full_settings

    one = next((c for c in run.ahead.candidates if c.choice == take), None)
    if one is None:
        return ""
    return train_command(full_settings(one, run.common), one.config, run.asked.config)
