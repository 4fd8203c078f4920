"""The nearest other settings of a run: what `plan` tries where a run does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lorafit.estimate.terms import Shape
from lorafit.model import ModelMap

STREAM = "--prefix-residency stream"


def changes(
    shape: Shape,
    layers: str | None,
    processes: int,
    found: ModelMap,
    shardable: bool = True,
    of_rows: bool = False,
) -> Iterator[list[tuple[str, Shape, str | None]]]:
    """Lists of changes that `train` supports, each from the smallest to the largest: its flags, its shape and
    its choice of layers, where that is another. `shardable` says that the base may be divided among processes,
    `of_rows` that the batch size follows from the rows: shorter rows would make a larger batch."""
    halves = []
    size = shape.batch // 2
    while size >= 1:
        accumulate = shape.accumulate * -(-shape.batch // size)
        halves.append(
            (
                f"--batch-size {size * processes} --accumulate {accumulate}",
                replace(shape, batch=size, accumulate=accumulate),
            )
        )
        size //= 2
    least = halves[-1] if halves else ("", shape)
    yield [(flags, small, None) for flags, small in halves]
    again = [] if shape.checkpointing else [("--gradient-checkpointing", replace(shape, checkpointing=True))]
    yield [(flags, other, None) for flags, other in again]
    yield [("--layers high", shape, "high")] if layers != "high" else []
    shorter = [shape.length // 2, shape.length // 4]
    same = f" --batch-size {shape.batch * processes}" if of_rows else ""
    yield [(f"--max-length {n}{same}", replace(shape, length=n), None) for n in shorter if n >= 64]
    if shape.dtype == "float32":
        yield [("--dtype bfloat16", replace(shape, dtype="bfloat16"), None)]
    whole = shape.quantize == "none" and found.quantised is None
    plain = whole and shape.dtype != "float16" and not shape.sharded
    yield [(f"--quantize {n}", replace(shape, quantize=n), None) for n in ("int8", "nf4") if plain]
    if plain and processes == 1 and shape.residency != "stream":
        bands = [("", shape, None), ("--layers high", shape, "high")]
        bands += [(f"--layers last:{n} {least[0]}".strip(), least[1], f"last:{n}") for n in (4, 2, 1)]
        yield [
            (f"{STREAM} {flags}".strip(), replace(other, residency="stream"), band)
            for flags, other, band in bands
        ]
    shards = whole and shardable and processes > 1 and not shape.sharded
    yield [("--shard", replace(shape, sharded=True), None)] if shards else []
    both = replace(least[1], checkpointing=True)
    flags = f"{least[0]} --gradient-checkpointing".strip()
    together: list[tuple[str, Shape, str | None]] = [
        (flags, both, None),
        (f"{flags} --layers high", both, "high"),
    ]
    if shape.dtype == "float32":
        half = replace(both, dtype="bfloat16")
        together += [(f"{flags} --dtype bfloat16", half, None)]
        together += [(f"{flags} --dtype bfloat16 --layers high", half, "high")]
    if shards:
        together += [(f"{flags} --shard", replace(both, sharded=True), None)]
        together += [(f"{flags} --shard --layers high", replace(both, sharded=True), "high")]
    if plain:
        few = replace(both, quantize="nf4")
        together += [
            (f"{flags} --quantize nf4", few, None),
            (f"{flags} --quantize nf4 --layers high", few, "high"),
        ]
    yield together
