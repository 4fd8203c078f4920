"""A merge's files compared with base and adapters: which proof is made of which tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lorafit.merge.deltas import named_in
from lorafit.merge.proof import Differs, Target, prove_parameters, prove_weights, read_targets
from lorafit.merge.write import Work, tied_names
from lorafit.model import (
    ModelMap,
    ModelSource,
    config_of,
    load_model,
    model_class,
    on_meta,
    shards,
    stored_dtype,
    stored_tensors,
)
from lorafit.results import WeightProof


def check_weights(
    adapters: Sequence[tuple[Path, float]],
    source: ModelSource,
    base: Path,
    work: Path,
    model_map: ModelMap,
    made: Work,
    dtype: str,
) -> tuple[WeightProof | None, list[str]]:
    """(the proof in weight space, or None where there is none; what it leaves out, as notes).

    Raises Differs when a stored tensor is not what base and adapters make it.
    """
    targets: dict[str, Target] = {}
    odd: list[str] = []
    for folder, weight in adapters:
        found, unplaced = read_targets(folder, weight, model_map)
        odd += unplaced
        for name, target in found.items():
            if name in targets:
                targets[name].pairs += target.pairs
            else:
                targets[name] = target
    if odd:
        return None, [
            f"the weights were not compared one by one: `{odd[0]}` is of a kind that is compared in logits alone"
        ]
    if not shards(base) or not made.named_alike:
        return None, ["the weights were not compared one by one: the checkpoint's names are not the model's"]
    there = stored_tensors(base)
    prefix = model_map.stacks[0].path.split(".")[0] if model_map.stacks else ""
    tied = tied_names(source, model_map) if made.copies else ()
    homes = {}
    for name in targets:
        own = named_in({*there, *made.copies}, name, prefix)
        if own is None and name in tied:
            own = named_in({*there, *made.copies}, tied[1 - tied.index(name)], prefix)
        if own is not None:
            homes[name] = own
    _check_bases(targets, homes, there)
    away = {name: target for name, target in targets.items() if name not in homes}
    if made.streamed and away:
        raise Differs(f"`{next(iter(away))}` of the adapter has no place in it")
    names, converted = _converted(source, set(there), prefix) if away else ([], set())
    if missing := sorted(away.keys() - set(names)):
        raise Differs(f"`{missing[0]}` of the adapter has no place in it")
    proof = prove_weights(base, work, targets, homes, made.copies, dtype, made.streamed, converted)
    if not away:
        return proof, []
    kind = getattr(torch, dtype) if dtype else stored_dtype(source)
    cpu = torch.device("cpu")
    rest = prove_parameters(
        lambda: load_model(source, stored_dtype(source), cpu),
        lambda: load_model(source.at(work), kind, cpu),
        away,
        names,
    )
    return (
        WeightProof(
            proof.tensors + rest.tensors,
            proof.values + rest.values,
            proof.adapted + rest.adapted,
            proof.moved_tensors + rest.moved_tensors,
            proof.moved_values + rest.moved_values,
        ),
        [],
    )


def _converted(source: ModelSource, there: set[str], prefix: str) -> tuple[list[str], set[str]]:
    """(parameters that the checkpoint stores in another form, its tensors that are no parameters)."""
    config = config_of(source)
    model = on_meta(model_class(config), config)
    model.tie_weights()
    tensors = {n: id(t) for n, t in model.named_parameters(remove_duplicate=False)}
    found = {name: named_in(there, name, prefix) for name in tensors}
    stored = {tensors[name] for name, home in found.items() if home is not None}  # a tied one is there
    buffers = {named_in(there, name, prefix) for name, _ in model.named_buffers()}
    names = [name for name, home in found.items() if home is None and tensors[name] not in stored]
    return names, there - {home for home in found.values() if home} - {b for b in buffers if b}


def _check_bases(targets: dict[str, Target], homes: dict[str, str], there: object) -> None:
    """Drop targets that only repeat the base's own weight."""
    for name in [n for n, t in targets.items() if not t.pairs and t.whole is None and t.magnitude is None]:
        if targets[name].base is not None and name in homes:
            continue
        targets.pop(name)
