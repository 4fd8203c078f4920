"""Modules put in the place of others for one pass: a block that hands on a cached state, a body that hands on
a chunk to the head. Whatever wraps the originals (hooks, sharding, compiling) does not run meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


class StandIn(torch.nn.Module):
    """A module in the place of another, the original: what its parent reads of it (its kind of attention,
    its layer index) is the original's, and so are the modules and parameters found in it."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a submodule: it is not run from here
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def named_modules(self, *args: Any, **named: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        """The original's: a model's dtype and device are read from its parameters during a pass."""
        yield from self.__dict__["original"].named_modules(*args, **named)


class HandOn(StandIn):
    """A frozen block that hands on: its `state` where one is set, else the hidden states it is given.

    `members` is how many members the original's output has, the hidden states first; 0 for a bare tensor.
    """

    def __init__(self, original: torch.nn.Module, members: int) -> None:
        super().__init__(original)
        self.members = members
        self.state: torch.Tensor | None = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        hidden = hidden_in(inputs, named) if self.state is None else self.state
        return (hidden, *[None] * (self.members - 1)) if self.members else hidden


class Fetched(StandIn):
    """A block that holds its weights only while it runs: within `held`."""

    def __init__(self, original: torch.nn.Module, held: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(original)
        self.held = held

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with self.held():
            return self.__dict__["original"](*inputs, **named)


class Blank(StandIn):
    """An embedding whose weights are gone: zeros of its shape, for a pass in which nothing reads them."""

    def forward(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        weight = self.__dict__["original"].weight
        return torch.zeros(1, dtype=weight.dtype, device=ids.device).expand(*ids.shape, weight.shape[1])


class Tap(StandIn):
    """A block that keeps the first hidden states it is given, as its `state`, and runs."""

    state: Any = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self.state is None:
            self.state = hidden_in(inputs, named).detach().clone()
        return self.__dict__["original"](*inputs, **named)


class End(StandIn):
    """A block that keeps the hidden states it is given, as its `state`, and ends the pass: raises Reached."""

    state: Any = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.state = hidden_in(inputs, named).detach()
        raise Reached


class Fixed(StandIn):
    """A body that returns that output, whatever it is given."""

    def __init__(self, original: torch.nn.Module, output: Any) -> None:
        super().__init__(original)
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class Reached(Exception):
    """What a pass was run for is there; the rest of it is not wanted."""


class Last(StandIn):
    """A body that runs, keeps its `output`, and ends the pass: raises Reached."""

    output: Any = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.output = self.__dict__["original"](*inputs, **named)
        raise Reached


@contextmanager
def in_place(parent: torch.nn.Module, stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
    """While here, these stand in `parent` under their names; afterwards what stood there before."""
    before = {name: getattr(parent, name) for name in stand_ins}
    try:
        for name, module in stand_ins.items():
            setattr(parent, name, module)
        yield
    finally:
        for name, module in before.items():
            setattr(parent, name, module)


def hidden_in(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a block."""
    hidden: torch.Tensor = inputs[0] if inputs else named["hidden_states"]
    return hidden
