"""lorafit: LoRA in chosen modules of chosen layers.

`inspect`, `plan`, `train`, `evaluate`, `merge` and `compare` are the commands as functions (docs/python.md).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.api import Comparison as Comparison
    from lorafit.api import Run as Run
    from lorafit.api import compare as compare
    from lorafit.api import evaluate as evaluate
    from lorafit.api import inspect as inspect
    from lorafit.api import merge as merge
    from lorafit.api import plan as plan
    from lorafit.api import train as train
    from lorafit.errors import LorafitError as LorafitError

__version__ = "0.1.0"

EXPORTS = {"api": "Comparison Run compare evaluate inspect merge plan train", "errors": "LorafitError"}
__getattr__ = door(__name__, EXPORTS)
__all__ = [
    "Comparison",
    "LorafitError",
    "Run",
    "__version__",
    "compare",
    "evaluate",
    "inspect",
    "merge",
    "plan",
    "train",
]


def __dir__() -> list[str]:
    """What is here to be used, also where it is not imported yet: for completion."""
    return list(__all__)


class _Package(ModuleType):
    """`lorafit.train` is the function, also after Python has imported the folder of that name, which it would
    put in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
