"""Adapters into their base, a few rows at a time, and the proof that the result is base + adapters.

`W + sum of w * s * B A` is added in float32 and rounded once to W's dtype, as PEFT does for one
adapter on linear layers. What cannot be streamed (experts in one tensor, DoRA, trained biases,
files that are not safetensors) goes through the whole model, with a note that says so.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from lorafit.adapter import check_converted, check_downloaded, recorded_quantize, run_of, tokenizer_place
from lorafit.data import Row, write_generation_config
from lorafit.digests import seal
from lorafit.errors import RequestError, RunError
from lorafit.merge.carry import carry, change_config
from lorafit.merge.check import check_weights
from lorafit.merge.deltas import added
from lorafit.merge.proof import Differs
from lorafit.merge.verify import WeightedModel, verify_merge
from lorafit.merge.write import Work, streamed_work, through_the_model
from lorafit.model import (
    ModelMap,
    ModelSource,
    base_folder,
    called,
    open_file,
    shards,
)
from lorafit.outputs import CARD, EDITABLE, check_target, put_in_place, work_folder, writing
from lorafit.report import Run, merged_card, read_back
from lorafit.results import MergeReport, Verified, WeightProof

UNVERIFIED = ".unverified"


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """What a merge is to make: where, whether it may replace what is there, the `dtype` of its
    floating-point tensors and the most bytes of a file (empty and 0: as the base has them), and
    whether it is verified."""

    output: Path
    overwrite: bool = False
    dtype: str = ""
    max_shard: int = 0
    verify: bool = True


def merge_adapters(
    adapters: Sequence[tuple[Path, float]],
    source: ModelSource,
    model_map: ModelMap,
    settings: MergeSettings,
    rows: Sequence[Row],
    tokenizer: Any,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Merge adapters, each times its weight, into their base: a model folder, verified.

    `rows` are the prompts of the proof (few tokens of each are used); without any, texts of our
    own are. `tick` is called with (bytes written, bytes in all).

    Raises RequestError when the output exists, the base is quantised, or an adapter does not belong to it; RunError
    when a merged tensor is not what base and adapters make it, or the merged model's logits differ by more
    than rounding: then it lies beside the output, and what was there is as it was.
    """
    output = settings.output
    _check_base(source, model_map)
    check_converted(*(folder for folder, _ in adapters))
    local = [Path(source.place)] if source.local else []
    check_target(output, settings.overwrite, (*(folder for folder, _ in adapters), *local))
    started = time.perf_counter()
    base = _base(source, adapters)
    held = replace(source, place=str(base))
    notes = _trained_on_another(adapters)
    with writing(output, "merge again"):
        work = work_folder(output, "merging")
    try:
        with writing(work, "merge again"):
            why, made = streamed_work(
                adapters, base, held, model_map, settings.dtype, settings.max_shard, added
            )
            if made is not None:
                made.stream(base, work, tick)
            else:
                notes.append(f"merged through the whole model: {why}")
                made = through_the_model(adapters, held, base, work, settings.dtype, settings.max_shard)
            notes += made.notes
            place = Path(tokenizer_place(str(adapters[0][0]), str(base)))
            left_out = carry(base, adapters[0][0], place, work)
            # the ends of the answers that any of them was trained to stop at
            write_generation_config(work, base, *(run_of(folder) for folder, _ in adapters))
            if settings.dtype or made.untied:
                change_config(work / "config.json", settings.dtype, made.untied)
        seconds = time.perf_counter() - started
        files = [open_file(path) for path in shards(work)]
        verified = None
        if settings.verify:
            weights, said = _proved(adapters, held, base, work, model_map, made, settings, output)
            notes += said
            merged = WeightedModel(held.at(work))
            with_adapters = WeightedModel(held, tuple(adapters))
            verified = verify_merge(with_adapters, merged, model_map, rows, tokenizer, by_blocks=not why)
            verified = replace(verified, weights=weights)
            _judge(verified, work, output)
            if verified.note:
                notes.append(verified.note)
        report = MergeReport(
            output=str(output),
            tensors=sum(len(file.entries) for file in files),
            adapted=made.adapted,
            bytes=sum(path.stat().st_size for path in work.rglob("*") if path.is_file()),
            seconds=seconds,
            verify=verified,
            notes=tuple(notes),
            left_out=left_out,
        )
        _finish(
            work, output, merged_card(report, source.name, _runs(adapters), model_map.family, model_map.task)
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _base(source: ModelSource, adapters: Sequence[tuple[Path, float]]) -> Path:
    """The folder of the base's files, those that the adapters were trained on. Raises RequestError."""
    found = base_folder(source)
    check_downloaded([str(folder) for folder, _ in adapters], source)
    return found


def _check_base(source: ModelSource, model_map: ModelMap) -> None:
    """Raises RequestError for a base whose weights are quantised."""
    if model_map.quantised is not None:
        raise RequestError(
            f"`{source.name}` is quantised ({model_map.quantised.kind}): a merge would round it again, "
            "and is not base + adapter",
            "--model names the model it was quantised from, to merge into its full weights; or serve the adapter beside "
            "its base",
        )


def _trained_on_another(adapters: Sequence[tuple[Path, float]]) -> list[str]:
    """A note for each adapter that was trained on a quantised base: the full one that it is merged into differs."""
    kinds = {folder: recorded_quantize(folder) for folder, _ in adapters}
    return [
        f"`{called(folder)}` was trained on a base in {kind} and is merged into the full weights, which differ from those; "
        f"`lorafit eval {shlex.quote(str(folder))} --quantize none` measures what was merged"
        for folder, kind in kinds.items()
        if kind != "none"
    ]


def _runs(adapters: Sequence[tuple[Path, float]]) -> list[tuple[Run, float]]:
    """What the runs that made the adapters tell of themselves, with the adapters' weights."""
    return [(read_back(folder), weight) for folder, weight in adapters]


def _finish(work: Path, output: Path, card: str) -> None:
    """Write the card and the digests, and put the folder in its place."""
    with writing(work, "merge again"):
        (work / CARD).write_text(card, encoding="utf-8")
        seal(work, but=EDITABLE)
        put_in_place(work, output)


def _proved(
    adapters: Sequence[tuple[Path, float]],
    source: ModelSource,
    base: Path,
    work: Path,
    model_map: ModelMap,
    made: Work,
    settings: MergeSettings,
    output: Path,
) -> tuple[WeightProof | None, list[str]]:
    """(the proof in weight space, notes about it). Raises RunError, the work moved aside, when it fails."""
    try:
        weights, notes = check_weights(adapters, source, base, work, model_map, made, settings.dtype)
    except Differs as error:
        raise _aside(work, output, error.message) from None
    if weights is not None and not weights.moved_values:
        kind = settings.dtype or "the base's dtype"
        notes.append(
            f"the adapter changes nothing: no stored value moves in {kind}"
            + ("" if settings.dtype == "float32" else "; --dtype float32 keeps smaller changes")
        )
    return weights, notes


def _aside(work: Path, output: Path, what: str) -> RunError:
    """The error for a merge that is wrong; its folder is moved out of harm's way."""
    names = (f"{output.name}{UNVERIFIED}{f'-{n}' if n > 1 else ''}" for n in count(1))
    aside = next(path for path in map(output.with_name, names) if not path.exists() and not path.is_symlink())
    work.rename(aside)
    return RunError(
        f"the merged model differs from base + adapter: {what}",
        f"it is kept as `{aside}` to look at, and nothing was put at `{output}`; "
        "merge with the base the adapter was trained on",
    )


def _judge(verified: Verified, work: Path, output: Path) -> None:
    """Raises RunError, the work moved out of harm's way, when the merged model's logits differ."""
    if not verified.max_logit_diff <= verified.tolerance:  # true for NaN too
        raise _aside(
            work,
            output,
            f"logits by {verified.max_logit_diff:.3g}, where {verified.tolerance:.3g} is rounding",
        )
