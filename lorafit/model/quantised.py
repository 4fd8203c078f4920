"""A base whose linear layers are held in 4 or 8 bits by bitsandbytes: which ones, and their bytes.

`nf4` and `fp4` (QLoRA, arXiv:2305.14314) keep 4 bits a value and a scale for each 64 of them; `double` keeps
the scales in 8 bits too. `int8` keeps a byte a value and a float32 scale for each row (arXiv:2208.07339).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lorafit.errors import RequestError
from lorafit.system import on_apple_gpu

if TYPE_CHECKING:
    from lorafit.model.map import ModelMap

NONE = "none"
KINDS: tuple[str, ...] = (NONE, "nf4", "int8")

BLOCK, OUTER_BLOCK = 64, 256  # values that share a scale, and scales that share one
CODE, OUTER_CODE = 16, 256  # values of the tables that codes stand for, float32


@dataclass(frozen=True, slots=True)
class Quantised:
    """How a base's linear layers are held: `kind` is nf4, fp4 or int8; `stored` where the checkpoint has
    them so."""

    kind: str
    stored: bool = False
    double: bool = True

    def bytes_of(self, out_features: int, in_features: int) -> int:
        """The bytes of a weight with its scales and tables, as bitsandbytes allocates them."""
        size = out_features * in_features
        if self.kind == "int8":
            return size + 4 * out_features
        blocks = -(size // -BLOCK)
        scales = 4 * blocks
        if self.double:  # a byte each, a float32 scale for 256 of them, their table, and their mean
            scales = blocks + 4 * -(blocks // -OUTER_BLOCK) + 4 * OUTER_CODE + 4
        return -(size // -2) + scales + 4 * CODE

    def check(self, dtype: str, device: str) -> None:
        """Raises RequestError where this cannot be run: without bitsandbytes, in float16, on that device."""
        what = f"a base in {self.kind}" if self.stored else f"--quantize {self.kind}"
        other = "" if self.stored else ", or --quantize none"
        if find_spec("bitsandbytes") is None:
            raise RequestError(
                f"{what} needs `bitsandbytes`, which is not installed", f"pip install 'lorafit[quant]'{other}"
            )
        if dtype == "float16":
            raise RequestError(
                f"{what} does not go with --dtype float16: small gradients are lost there",
                "--dtype bfloat16, or float32",
            )
        if device.startswith("mps") or (device == "auto" and on_apple_gpu()):
            raise RequestError(
                f"{what} does not run on {'mps' if device == 'auto' else device}", f"--device cpu{other}"
            )


def stored_quantisation(config: Mapping[str, Any]) -> Quantised | None:
    """How a checkpoint of bitsandbytes holds its weights, by its config; None for any other."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    four, eight = (found.get(k) or found.get(f"_{k}") for k in ("load_in_4bit", "load_in_8bit"))
    if found.get("quant_method", "bitsandbytes") not in (
        "bitsandbytes",
        "bitsandbytes_4bit",
        "bitsandbytes_8bit",
    ):
        return None
    if four:
        kind = str(found.get("bnb_4bit_quant_type", "fp4"))
        return (
            Quantised(kind, True, bool(found.get("bnb_4bit_use_double_quant")))
            if kind in ("nf4", "fp4")
            else None
        )
    return Quantised("int8", True) if eight and not found.get("llm_int8_has_fp16_weight") else None


def held_as(found: ModelMap, quantize: str) -> Quantised | None:
    """How a model's linear layers are held under `--quantize`; None where they are plain.

    Raises RequestError for a checkpoint that is quantised already.
    """
    if quantize == NONE:
        return found.quantised
    if found.quantised is not None:
        raise RequestError(
            f"`{found.model}` is quantised already ({found.quantised.kind}): --quantize {quantize} does not apply",
            "leave it out",
        )
    return Quantised(quantize)


def weight_bytes(found: ModelMap, itemsize: int, held: Quantised | None) -> int:
    """The bytes of a model's weights: those that are quantised, and the others with `itemsize` each."""
    plain = found.total_params * itemsize
    if held is None:
        return plain
    return plain + sum(held.bytes_of(o, i) - o * i * itemsize for o, i in quantised_shapes(found).values())


def quantised_shapes(found: ModelMap) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear layer that is quantised, by its name."""
    shapes = {s.path: (s.out_features, s.in_features) for s in (*found.slots, *found.unplaced)}
    for row in found.uncovered:
        if len(row.shape) == 2:
            shapes.setdefault(row.path.removesuffix(".weight"), (row.shape[0], row.shape[1]))
    return {name: shapes[name] for name in found.quantisable}


def quantised_params(found: ModelMap) -> int:
    """The values of the weights that are quantised."""
    return sum(o * i for o, i in quantised_shapes(found).values())
