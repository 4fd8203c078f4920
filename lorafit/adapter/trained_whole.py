"""Parameters of the base that are trained whole (`modules_to_save`, biases): float32, whatever the base's dtype.

In bfloat16 an update below 1/256 of a weight is rounded away, and most weights would never move. So the
weight that the optimizer sees is float32, and the model computes with a rounded copy of it, in the dtype it
had: as autocast does, and as the adapters do (lora_linear.py). The copies are there while a block runs, or the
model itself for what lies in no block: some code reads the parameters of other modules than its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# (module, name of a parameter, the dtype that is computed in)
Rounded = tuple[torch.nn.Module, str, torch.dtype]


def train_in_float32(model: torch.nn.Module, base: torch.nn.Module) -> None:
    """Make every trained parameter of a model float32, in place; its `base` computes in the dtype they had."""
    modules = dict(model.named_modules())
    scopes: dict[torch.nn.Module, list[Rounded]] = {}
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter.dtype not in (torch.bfloat16, torch.float16):
                continue
            # an embedding's rows are rounded once looked up, not its whole table
            scope = module if type(module) is torch.nn.Embedding else _block_of(path, modules) or base
            scopes.setdefault(scope, []).append((module, name, parameter.dtype))
    for scope, rounded in scopes.items():  # only now: a parameter may be in several modules
        for module, name, _ in rounded:
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.float()
        scope.__dict__["rounded"] = rounded
        kind: Any = type(scope)
        scope.__class__ = _looking_up() if kind is torch.nn.Embedding else _rounding(kind)


def _block_of(path: str, modules: dict[str, torch.nn.Module]) -> torch.nn.Module | None:
    """The outermost member of a list of modules that holds the module of that path; None where none does."""
    names = path.split(".")
    for end in range(1, len(names) + 1):
        if isinstance(modules[".".join(names[: end - 1])], torch.nn.ModuleList):
            return modules[".".join(names[:end])]
    return None


@functools.cache  # a class for each kind: the forward of an object's own would be a cycle
def _rounding(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The same kind of module, computing with rounded copies of the trained parameters in it."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        with _rounded(self.rounded):
            return kind.forward(self, *inputs, **named)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@functools.cache
def _looking_up() -> type[torch.nn.Module]:
    """An embedding whose rows are rounded."""

    def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
        ((_, _, dtype),) = self.rounded
        return torch.nn.Embedding.forward(self, ids).to(dtype)

    return type("Embedding", (torch.nn.Embedding,), {"forward": forward, "__module__": __name__})


@contextmanager
def _rounded(parameters: list[Rounded]) -> Iterator[None]:
    """While here, the modules have the rounded copies; gradients reach the float32 parameters through them."""
    trained = [module._parameters[name] for module, name, _ in parameters]
    copies: dict[torch.Tensor, Any] = {}  # one for each parameter, however many modules share it
    try:
        for (module, name, dtype), parameter in zip(parameters, trained, strict=True):
            assert parameter is not None
            if parameter not in copies:
                copies[parameter] = parameter.to(dtype)
            module._parameters[name] = copies[parameter]
        yield
    finally:
        for (module, name, _), parameter in zip(parameters, trained, strict=True):
            module._parameters[name] = parameter
