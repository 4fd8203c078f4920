"""The model card of an adapter and of a merged model: what it is, how it was made, its results, how to use it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorafit import __version__
from lorafit.adapter import Plan
from lorafit.model import split_revision
from lorafit.report.elsewhere import (
    CLASSES,
    Use,
    uses_of_adapter,
    uses_of_merged,
    why_not_gguf,
    why_not_vllm,
)
from lorafit.report.run import DAMAGED, Run, steps_text
from lorafit.results import MergeReport
from lorafit.settings import takes_from_base
from lorafit.units import bytes_text, count, figures, layers_text, seconds_text, short

OWNED = re.compile(r"\w[\w.-]*/\w[\w.-]*(:.*)?")  # an id on the Hub

VERSIONS = ("lorafit", "torch", "transformers", "peft", "python")

PIPELINES = {"causal": "text-generation", "masked": "fill-mask"}  # as the Hub names them


def adapter_card(plan: Plan, run: Run, family: str, task: str) -> str:
    """The `README.md` of a finished run's folder."""
    report = run.report
    name = Path(report["output"]).name
    layers = layers_text(plan.indices)
    lora = plan.lora
    kinds = ["rank-stabilised"] * lora.use_rslora + ["DoRA"] * lora.use_dora
    rows = [
        ("base", f"{_code(_public_name(plan.model))} ({family})"),
        ("strategy", f"{plan.preset}: {', '.join(plan.roles) or 'modules by name'}"),
        ("band", f"{plan.spec}: {layers}"),
        ("rank, alpha, dropout", f"{lora.r}, {lora.alpha:g}, {lora.dropout:g} {', '.join(kinds)}".strip()),
        (
            "trainable parameters",
            f"{count(plan.trainable_params)} of {count(plan.total_params)}, {bytes_text(plan.adapter_bytes)}",
        ),
        *_training(run),
    ]
    place = shlex.quote(name)
    loaded = "" if plan.model == "demo" else _elsewhere(plan, run, family, task, name)
    if takes_from_base(lora.init_lora_weights):
        loaded += (
            f"\nIt was trained from a `{lora.init_lora_weights}` start and is saved for the base as it was, "
            f"with rank {lora.saved_rank}: twice the trained one.\n"
        )
    commands = [
        f"lorafit eval {place}",
        *([] if task == "masked" else [f"lorafit chat {place}"]),
        f"lorafit merge {place} -o {shlex.quote(name + '-merged')}",
        f"lorafit train --config {shlex.quote(name + '/run.yaml')} -o {shlex.quote(name + '-again')}",
    ]
    return "\n".join(
        [
            *_head(plan.model, "peft", task, ["lora", "lorafit"], "adapter"),
            f"# {name}",
            "",
            f"A LoRA adapter for {_code(_public_name(plan.model))}, trained with lorafit {__version__}: "
            f"{', '.join(plan.roles) or 'chosen modules'} in {layers}.",
            "",
            *_table(rows),
            "",
            "## Use",
            "",
            "```sh",
            *commands,
            "```",
            "",
            *([loaded] if loaded else []),
        ]
    )


def _elsewhere(plan: Plan, run: Run, family: str, task: str, name: str) -> str:
    """The lines for other tools, and why others are not there."""
    revision = str(run.settings.get("revision") or split_revision(str(run.settings.get("model", "")))[1])
    base = _public_name(plan.model)
    uses = uses_of_adapter(plan, family, task, name, base, revision)
    stated = f"In these lines {_code(base)} is the folder or the hub id of the base."
    stands_for = [] if OWNED.fullmatch(base) else [stated, ""]
    reasons = {"vLLM": why_not_vllm(plan, family, task), "llama.cpp": why_not_gguf(plan, family, task)}
    notes = [
        f"{tool} cannot take the adapter: {why}. Merge it first." for tool, why in reasons.items() if why
    ]
    return "\n".join([*stands_for, *_uses(uses, task, "from peft import PeftModel"), *notes, ""])


def _uses(uses: Sequence[Use], task: str, *imports: str) -> list[str]:
    """A block of Python and a block of shell commands for other tools."""
    python = [f"model = {use.line}  # {use.tool}" for use in uses if use.python]
    head = [*imports, f"from transformers import {CLASSES[task]}", ""]
    lines = ["```python", *head, *python, "```", ""]
    if shell := [use for use in uses if not use.python]:
        lines += ["```sh", *(text for use in shell for text in (f"# {use.tool}", use.line)), "```", ""]
    return lines


def merged_card(
    report: MergeReport, base: str, parts: Sequence[tuple[Run, float]], family: str, task: str
) -> str:
    """The `README.md` of a merged model's folder. `parts` are the adapters with their weights."""
    base = _public_name(base)
    rows: list[tuple[str, str]] = [("base", _code(base))]
    for run, weight in parts:
        rows.append(("adapter", _code(run.name) + (f" × {weight:g}" if weight != 1 else "")))
        if run.settings:
            what = run.settings.get("preset") or ", ".join(map(str, run.settings.get("modules") or ()))
            layers = run.settings.get("layers") or "the preset's"
            rows.append(("strategy, band", f"{what or 'basic'}, {layers}"))
        rows += _training(run) if run.report else []
    rows.append(("merged", f"{count(report.adapted)} of {count(report.tensors)} tensors changed"))
    if report.verify is None:
        rows.append(("verification", "skipped (`--no-verify`)"))
    else:
        v = report.verify
        rows += [
            ("verification", f"compared with base + adapter on {count(v.tokens)} tokens"),
            ("largest logit difference", f"{v.max_logit_diff:.3g} (tolerance {v.tolerance:.3g})"),
            ("effect of the adapter on the logits", f"up to {v.adapter_logit_diff:.3g}"),
            ("same most likely token", f"{v.argmax_agreement:.2%}"),
            ("loss, nats per token", f"{v.merged_loss:.4f}, base + adapter {v.loss:.4f}"),
        ]
    output = shlex.quote(Path(report.output).name)
    return "\n".join(
        [
            *_head(base, "transformers", task, ["lora", "lorafit", "merge"], "finetune"),
            f"# {Path(report.output).name}",
            "",
            f"{_code(base)} with {'adapters' if len(parts) > 1 else 'an adapter'} merged in by lorafit {__version__}: "
            "an ordinary model folder.",
            "",
            *_table(rows),
            "",
            "## Use",
            "",
            "```sh",
            _merge_command(parts, output),
            f"lorafit inspect {output}",
            "```",
            "",
            *_uses(uses_of_merged(family, task, Path(report.output).name, base), task),
            *[f"\n{_for_others(note, parts)}." for note in report.notes],
            "",
        ]
    )


def _for_others(note: str, parts: Sequence[tuple[Run, float]]) -> str:
    """A note without the adapters' places on this machine."""
    for run, _ in parts:
        here, there = (f"lorafit eval {shlex.quote(name)} " for name in (str(run.folder), run.name))
        note = note.replace(here, there)
    return note


def _merge_command(parts: Sequence[tuple[Run, float]], output: str) -> str:
    """The command that made it."""
    if len(parts) == 1 and parts[0][1] == 1:
        return f"lorafit merge {shlex.quote(parts[0][0].name)} -o {output}"
    given = " ".join(f"--adapter {shlex.quote(f'{run.name}={weight:g}')}" for run, weight in parts)
    return f"lorafit merge {given} -o {output}"


def _training(run: Run) -> list[tuple[str, str]]:
    """The data and results of a finished run; nothing if its record is damaged."""
    try:
        return list(_results(run))
    except DAMAGED:
        return []


def _results(run: Run) -> Iterable[tuple[str, str]]:
    report, look = run.report, run.first("data")
    if not report:
        return
    if look:
        names = ", ".join(_code(_public_name(source["name"])) for source in look["sources"])
        yield (
            "data",
            f"{names}: {count(look['rows'])} rows, {count(look['tokens'])} tokens, "
            f"{count(look['supervised_tokens'])} of them in the loss; {count(look['held_out_rows'])} rows held out",
        )
    settings = run.settings
    if settings:
        yield (
            "training",
            f"{count(report['steps'])} steps of {settings.get('batch_size')} rows × {settings.get('accumulate')}, "
            f"learning rate {settings.get('learning_rate')}, {settings.get('scheduler')}, seed {settings.get('seed')}",
        )
        if (kind := settings.get("quantize", "none")) != "none":
            yield "base weights in training", f"{kind}, quantised by bitsandbytes"
    if losses := report["eval"]:
        before, after = losses["before"]["loss"], losses["after"]["loss"]
        yield (
            "held-out loss, nats per token",
            f"{figures(before, 4)} before, {figures(after, 4)} after {steps_text(report)}",
        )
    yield from _environment(run)
    yield (
        "speed",
        f"{short(report['tokens_per_second'])} tok/s, {seconds_text(report['seconds'])} in training steps, "
        f"peak memory {bytes_text(report['peak_memory_bytes'])}",
    )


def _environment(run: Run) -> Iterable[tuple[str, str]]:
    """What the run was made with, as rows of the card: versions, machine, date, command, commits of the data."""
    facts = run.first("started").get("environment") or {}
    named = [f"{name} {facts[name]}" for name in VERSIONS if facts.get(name, "none") != "none"]
    if named:
        yield "versions", ", ".join(named)
    machine = [facts[name] for name in ("device", "processor", "platform") if facts.get(name)]
    if machine:
        yield "machine", "; ".join(dict.fromkeys(machine))
    if facts.get("date"):
        yield "date", facts["date"]
    if facts.get("command"):
        yield "command", _code(_public_command(facts["command"]))
    yield from ((name, value) for name, value in facts.items() if name.startswith("commit of "))


def _public_command(text: str) -> str:
    """A command line in which files and folders stand by their names alone."""

    def public(word: str) -> str:
        head, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            return f"{head}={public(value)}"
        return _public_name(word) if "/" in word or "\\" in word else word

    try:
        return shlex.join(map(public, shlex.split(text)))
    except ValueError:  # quotes that do not match
        return ""


def _public_name(text: str) -> str:
    """A Hub id unchanged; a file or folder by its name alone, so that no local path is published."""
    return text if OWNED.fullmatch(text) and not Path(text).exists() else Path(text).name


def _head(base: str, library: str, task: str, tags: Sequence[str], relation: str) -> list[str]:
    """The YAML that the Hub reads."""
    named = [f"base_model: {base}", f"base_model_relation: {relation}"] if OWNED.fullmatch(base) else []
    kind = [f"pipeline_tag: {PIPELINES[task]}"] if task in PIPELINES else []
    return [
        "---",
        *named,
        f"library_name: {library}",
        *kind,
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
    ]


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)]


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    """A name as Markdown code: nothing in it is markup."""
    return f"`{text.replace('`', chr(39))}`"
