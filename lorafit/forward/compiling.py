"""The adapted blocks, compiled by torch.compile: they stand in their places while a step's passes run, not otherwise.

Their gradient is held to that of the plain blocks before it is used, on a micro-batch of the run: torch 2.11 compiled
an adapted layer so that it got no gradient, and said nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lorafit.errors import RunError
from lorafit.forward.activations import base_of
from lorafit.forward.stand_in import StandIn, in_place
from lorafit.model import first_line

GRAPHS = 64  # of a block's code: for each kind of attention, one row or several, a gradient below or none
# How far off a gradient may be, as a share of its length: sums in another order, and in 16 bits what fused code does
# not round in between. A layer that is left out, or its scale, is off by more.
OFF = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
PROBE = 0.02  # the spread of the numbers that stand for a matrix of zeros while gradients are compared


class Compiled(StandIn):
    """A block that runs compiled, for any number of rows and tokens."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__(original)
        self.__dict__["compiled"] = torch.compile(original, dynamic=True)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.__dict__["compiled"](*inputs, **named)


@dataclass(frozen=True, slots=True)
class CompiledBlocks:
    """The blocks that run compiled, by stack and by their name in it; none by default."""

    stacks: Sequence[tuple[torch.nn.Module, Mapping[str, Compiled]]] = ()

    @classmethod
    def of(cls, model: torch.nn.Module, stacks: Iterable[str], adapted: Sequence[str]) -> CompiledBlocks:
        """The blocks of these stacks that hold an adapted module; `stacks` and `adapted` are names in the base."""
        base, found = base_of(model), []
        for path in stacks:
            stack = base.get_submodule(path)
            holds = {
                name: block
                for name, block in stack.named_children()
                if any(module.startswith(f"{path}.{name}.") for module in adapted)
            }
            found.append((stack, {name: Compiled(block) for name, block in holds.items()}))
        return cls(found)

    @property
    def number(self) -> int:
        return sum(len(blocks) for _, blocks in self.stacks)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Around the passes of a micro-batch, forward and back. Raises RunError where a block cannot be compiled
        for it."""
        if not self.number:
            yield
            return
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._inductor import config as code
        from torch.fx.experimental import _config as shapes

        with ExitStack() as entered:
            for stack, blocks in self.stacks:
                entered.enter_context(in_place(stack, blocks))
            # else torch goes on without compiling
            entered.enter_context(config.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True))
            # else dropout draws numbers of its own
            entered.enter_context(code.patch(fallback_random=True))
            # else as many rows as a head has dimensions count as one size, which never changes
            entered.enter_context(shapes.patch(use_duck_shape=False))  # type: ignore[attr-defined]
            try:
                yield
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                raise RunError(
                    f"a block cannot be compiled: {first_line(error)}",
                    "leave out --compile; with --resume it goes on from the last checkpoint",
                ) from error

    def differs(
        self, trained: Mapping[str, torch.nn.Parameter], run: Callable[[CompiledBlocks], Any]
    ) -> tuple[str, float]:
        """(why the gradient is not that of the plain blocks, empty where it is; how far off it is, as a share of
        its length).

        `run` makes the gradients of `trained` by a pass forward and back with these blocks or with none. A low-rank
        matrix that starts at zero gives its partner no gradient: meanwhile it holds small numbers. Both passes draw
        the same random numbers; the gradients are gone afterwards.
        """
        zeros = [p for p in trained.values() if not p.detach().any()]
        numbers = torch.Generator().manual_seed(0)
        try:
            with torch.no_grad():
                for p in zeros:
                    p.copy_(torch.randn(p.shape, generator=numbers).mul_(PROBE))
            plain = _gradients(trained, PLAIN, run)
            found = _gradients(trained, self, run)
        finally:
            with torch.no_grad():
                for p in zeros:
                    p.zero_()
        missing = next((name for name in plain if plain[name].any() and not found[name].any()), "")
        if missing:
            return f"`{missing}` gets no gradient", 1.0
        length, off = _length(plain.values()), _length(found[name] - plain[name] for name in plain)
        share = off / length if length else off
        allowed = OFF.get(self._dtype(), OFF[torch.float32])
        return ("" if share <= allowed else f"the gradient is off by {share:.2g} of its length"), share

    def _dtype(self) -> torch.dtype:
        """The dtype that the blocks compute in."""
        blocks = (block for _, blocks in self.stacks for block in blocks.values())
        found: torch.dtype = next(p.dtype for block in blocks for p in block.original.parameters())
        return found


PLAIN = CompiledBlocks()  # none of them compiled


def _gradients(
    trained: Mapping[str, torch.nn.Parameter], blocks: CompiledBlocks, run: Callable[[CompiledBlocks], Any]
) -> dict[str, torch.Tensor]:
    """The gradients that `run` makes with these blocks."""
    device = next(iter(trained.values())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        run(blocks)
    found = {}
    for name, p in trained.items():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
    return found


def _length(tensors: Iterable[torch.Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())
