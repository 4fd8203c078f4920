"""The names of the optimizers, and the bytes of state that each keeps. `train/optimizer.py` makes them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from lorafit.errors import RequestError

BLOCK = 256  # values that share one scale in bitsandbytes' 8-bit states


# Bytes of state for that many trained parameters in float32.
STATE_BYTES: dict[str, Callable[[int], int]] = {
    "adamw": lambda count: 8 * count,  # two moments in float32
    # two moments of a byte and a float32 scale for each block of them; tensors below 4,096 values keep float32
    "adamw_8bit": lambda count: 2 * count + 8 * -(-count // BLOCK),
    # a mean for each row and column of a matrix: of the two matrices of rank r about 1 / r. An upper bound
    # that holds from rank 5 on; what is not a matrix keeps 4 bytes
    "adafactor": lambda count: count,
    "sgd": lambda count: 0,
    "lion": lambda count: 4 * count,  # one moment in float32
}

OPTIMIZERS = tuple(STATE_BYTES)

# The packages that bring those that are not always there.
PACKAGES = {"adamw_8bit": "bitsandbytes", "lion": "bitsandbytes"}


def check_optimizer(name: str) -> None:
    """Raises RequestError when the package that brings an optimizer is not installed."""
    package = PACKAGES.get(name)
    if package and find_spec(package) is None:
        raise RequestError(
            f"--optimizer {name} needs `{package}`, which is not installed",
            f"pip install {package}, or --optimizer adamw",
        )
