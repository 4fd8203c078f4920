"""One micro-batch: forward, and the loss over its supervised tokens. The head does only their share.

B rows, T tokens, N supervised tokens, D hidden size, V vocabulary, C tokens of a chunk
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorafit.data import IGNORED, Batch
from lorafit.forward.activations import base_of
from lorafit.forward.loss import HeadLoss, chunk_for, rounding, scored, summed_loss
from lorafit.forward.stand_in import Fixed, Last, Reached, in_place


@dataclass(frozen=True, slots=True)
class Forward:
    """How a model is called: the arguments its forward takes, and how its head is reached.

    The head is `apart` where the model is a body and what it makes of the body's last hidden
    states: then it is run on supervised tokens alone, chunk by chunk, with whatever scaling,
    capping and bias the model's own code gives it. Where it is `inside` the body (T5 scales in
    between), the supervised tokens are picked at the input of its output layer; else it is run whole.

    Where rows are padded on the right and every token looks back alone, no token of a row sees its padding,
    and a `masked` pass gives the same as one without the attention mask: then it is left out, since without
    one attention skips what lies ahead and nothing of the mask is made or asked for.

    A mixture whose config sets `output_router_logits` is trained with its router's auxiliary loss, times
    `router_aux_loss_coef`, as transformers does. Each micro-batch's counts as much as its supervised tokens.
    """

    task: str
    accepts: frozenset[str]
    head: str
    chunk: int
    body: str = ""  # the module that makes the last hidden states, where the head is apart
    masked: bool = True  # whether the model is given the attention mask
    router: float = 0.0  # what the router's auxiliary loss counts in training; 0 where there is none
    mark: Callable[[str], None] = lambda phase: None  # called when the head begins

    @classmethod
    def of(cls, model: torch.nn.Module, task: str, chunk: int = 0) -> Forward:
        """How that model is called, with an adapter on it or without: tried once, on eight tokens.

        `chunk` is how many tokens the head is run on at once; 0 chooses by the device.
        """
        base, whole = base_of(model), cls.plain(model, task, chunk)
        whole = replace(whole, router=whole._router_share(model))
        whole = replace(whole, masked=not whole._is_right_unmasked(model))
        ways = [replace(whole, head="apart", body=body) for body in _bodies(base, task)]
        ways.append(replace(whole, head="inside"))
        return next((way for way in ways if way._is_right(model, whole)), whole)

    @classmethod
    def plain(cls, model: torch.nn.Module, task: str, chunk: int = 0) -> Forward:
        """How any model may be called: with the mask, its head run whole."""
        base = base_of(model)
        accepts = frozenset(inspect.signature(base.forward).parameters)
        return cls(
            task, accepts, "whole", chunk or chunk_for(next(base.parameters()).device.type, _vocabulary(base))
        )

    def _is_right(self, model: torch.nn.Module, whole: Forward) -> bool:
        """Whether this way to the head gives the logits that the model's own forward gives."""
        base = base_of(model)
        if self.head == "apart" and any(p.requires_grad for p in _outside(base, self.body)):
            return False  # the chunks give the gradient of the hidden states only
        return self._is_same(model, whole, _probe(base, self.task))

    def _is_right_unmasked(self, model: torch.nn.Module) -> bool:
        """Whether a causal model gives the tokens of a padded row the same logits without the mask."""
        if self.task != "causal" or self.router:  # whose router counts the tokens that the mask shows
            return False
        return replace(self, masked=False)._is_same(model, self, _probe(base_of(model), self.task, padded=4))

    @torch.no_grad()
    def _is_same(self, model: torch.nn.Module, whole: Forward, probe: Batch) -> bool:
        """Whether both give the same logits, but for rounding."""
        training = model.training
        model.eval()
        try:
            wanted, got = whole.logits(model, probe), self.logits(model, probe)
        except Exception:  # any model's code may fail when a part of it is stood in for
            return False
        finally:
            model.train(training)
        if got.shape != wanted.shape or wanted.is_meta:
            return got.shape == wanted.shape
        largest = wanted.abs().max().item()
        if not math.isfinite(largest):  # a damaged weight: the held-out loss names it
            return False
        return torch.allclose(got, wanted, atol=rounding(wanted.dtype) * max(largest, 1e-3), rtol=0)

    @torch.no_grad()
    def _router_share(self, model: torch.nn.Module) -> float:
        """The factor of the router's auxiliary loss; 0 where the config does not set it, or the model's
        forward returns none."""
        base = base_of(model)
        if not routes_for_loss(base):
            return 0.0
        auxiliary = getattr(base(**self.arguments(model, _probe(base, self.task))), "aux_loss", None)
        text = base.config.get_text_config(decoder=True)
        factor = getattr(base, "router_aux_loss_coef", getattr(text, "router_aux_loss_coef", 0.0))
        return float(factor) if isinstance(auxiliary, torch.Tensor) else 0.0

    def arguments(self, model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
        """What the model's forward is given."""
        found: dict[str, Any] = {name: t for name, t in batch.inputs.items() if name in self.accepts}
        if not self.masked:
            found.pop("attention_mask", None)
        if "use_cache" in self.accepts:
            found["use_cache"] = False
        if self.task == "seq2seq":
            found["decoder_input_ids"] = shifted_right(model, batch.labels)
            if "decoder_attention_mask" in self.accepts:
                found["decoder_attention_mask"] = (batch.labels != IGNORED).long()
        return found

    def run(self, model: torch.nn.Module, batch: Batch) -> None:
        """Run the model's own forward, to its end or until a stand-in ends it."""
        with suppress(Reached):
            base_of(model)(**self.arguments(model, batch))

    @torch.no_grad()
    def into_head(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """hidden_ND that enters the output layer at the supervised tokens; the pass ends there."""
        entering: list[torch.Tensor] = []

        def ends(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            entering.append(inputs[0].flatten(0, 1).index_select(0, batch.places))
            raise Reached

        hook = base_of(model).get_output_embeddings().register_forward_pre_hook(ends)
        try:
            self.run(model, batch)
        finally:
            hook.remove()
        return entering[0]

    def logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """logits_NV of the supervised tokens, in the model's dtype."""
        return torch.cat(list(self.chunks(model, batch)))

    def chunks(self, model: torch.nn.Module, batch: Batch) -> Iterator[torch.Tensor]:
        """The logits_CV of the supervised tokens, a chunk after the other; whole where the head is not apart."""
        base, arguments = base_of(model), self.arguments(model, batch)
        if self.head == "apart":
            with self._head(model, arguments, batch.places) as (hidden_ND, finish):
                for hidden_CD in hidden_ND.split(self.chunk):
                    yield _logits(finish(hidden_CD))
        elif self.head == "inside":
            yield _logits(self._picked(base, arguments, batch))
        else:
            yield _logits(base(**arguments))[batch.places]

    def loss_sum(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The loss summed over the supervised tokens, each times its weight, in nats, float32, a scalar."""
        base, arguments = base_of(model), self.arguments(model, batch)
        if self.head == "apart":
            with self._head(model, arguments, batch.places) as (hidden_ND, finish):
                self.mark("head")

                def head(hidden_CD: torch.Tensor) -> torch.Tensor:
                    return _logits(finish(hidden_CD))

                loss: torch.Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
                    hidden_ND, batch.targets, head, self.chunk, batch.weights
                )
                if self.router:  # of the whole body's routers, whatever the chunk
                    loss = loss + self.router * batch.weight * finish(hidden_ND[:1].detach()).aux_loss
            return loss
        inside = self.head == "inside"
        output = self._picked(base, arguments, batch) if inside else base(**arguments)
        logits_NV = _logits(output) if inside else _logits(output)[batch.places]
        self.mark("head")
        loss = summed_loss(logits_NV, batch.targets, batch.weights)
        return loss + self.router * batch.weight * output.aux_loss if self.router else loss

    @torch.no_grad()
    def scores(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss_N in nats, float32; whether the most likely token is the right one, bool_N)."""
        if self.head != "apart":
            return scored(self.logits(model, batch), batch.targets)
        arguments = self.arguments(model, batch)
        with self._head(model, arguments, batch.places) as (hidden_ND, finish):
            parts = [
                scored(_logits(finish(hidden_CD)), targets_C)
                for hidden_CD, targets_C in zip(
                    hidden_ND.split(self.chunk), batch.targets.split(self.chunk), strict=True
                )
            ]
        return torch.cat([loss for loss, _ in parts]), torch.cat([right for _, right in parts])

    @contextmanager
    def _head(
        self, model: torch.nn.Module, arguments: dict[str, Any], places_N: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, Callable[[torch.Tensor], Any]]]:
        """The hidden states of the supervised tokens, and the function that makes the model's output of such.

        The body is run and the pass ends there; then the model's own forward is run on a chunk with a
        stand-in for the body that hands on the chunk as its last hidden states.
        """
        base = base_of(model)
        parent, _, name = self.body.rpartition(".")
        above, body = base.get_submodule(parent), base.get_submodule(self.body)
        last = Last(body)
        with in_place(above, {name: last}), suppress(Reached):
            base(**arguments)
        output = last.output
        hidden_ND = _last_hidden(output).flatten(0, 1).index_select(0, places_N)

        def finish(hidden_CD: torch.Tensor) -> Any:
            chunk = _with_last_hidden(output, hidden_CD.unsqueeze(0))
            with in_place(above, {name: Fixed(body, chunk)}):
                return base(**arguments)

        yield hidden_ND, finish

    def _picked(self, base: Any, arguments: dict[str, Any], batch: Batch) -> Any:
        """The model's output for the supervised tokens alone: its output layer is given (1, N, D) of (B, T, D)."""

        def pick(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (inputs[0].flatten(0, 1).index_select(0, batch.places).unsqueeze(0), *inputs[1:])

        hook = base.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            return base(**arguments)
        finally:
            hook.remove()


def routes_for_loss(base: Any) -> bool:
    """Whether a model's config asks for the router's auxiliary loss in training."""
    configs = (base.config, base.config.get_text_config(decoder=True))
    return any(getattr(config, "output_router_logits", False) is True for config in configs)


def _logits(output: Any) -> torch.Tensor:
    """The logits of a model's output, (B * T, V)."""
    logits: torch.Tensor = output.logits
    return logits.flatten(0, 1)  # not [0]: its backward would fill a tensor of the whole


def _bodies(base: Any, task: str) -> Iterator[str]:
    """The modules that may make a model's last hidden states, the likeliest first."""
    names = {id(module): name for name, module in base.named_modules()}
    found = [getattr(base, "base_model", None)]
    if task != "seq2seq" and hasattr(base, "get_decoder"):  # OPT calls its decoder past its body
        found.append(base.get_decoder())
    for body in found:
        if name := names.get(id(body)):
            yield name


def _outside(base: Any, body: str) -> Iterator[torch.nn.Parameter]:
    """The parameters outside the body."""
    inside = {id(p) for p in base.get_submodule(body).parameters()}
    return (p for p in base.parameters() if id(p) not in inside)


def _vocabulary(base: Any) -> int:
    size = getattr(base.config.get_text_config(decoder=True), "vocab_size", 0)
    return size if isinstance(size, int) else 0


def _probe(base: Any, task: str, padded: int = 0) -> Batch:
    """Eight tokens of two rows, with four places to predict; the last tokens of the second row are padding."""
    device = next(base.parameters()).device
    ids_BT = torch.arange(16, device=device).view(2, 8) % max(1, min(16, _vocabulary(base)))
    places = torch.tensor([1, 4, 9, 14 - padded], device=device)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 8 - padded :] = 0
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    return Batch(inputs, ids_BT, places, ids_BT.flatten()[places], (2, 2), 16)


def _last_hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0]
    return hidden


def _with_last_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """The same output of a body with other last hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    other = copy.copy(output)
    other["last_hidden_state"] = hidden
    return other


def shifted_right(model: torch.nn.Module, labels_BS: torch.Tensor) -> torch.Tensor:
    """The decoder's input (B, S): its start token, then the labels less the last; padding for IGNORED."""
    base = base_of(model)
    config = base.config.get_text_config(decoder=True)
    start = next(
        (
            token
            for c in (base.config, config, base.generation_config)
            for token in (getattr(c, "decoder_start_token_id", None),)
            if isinstance(token, int)
        ),
        None,
    )
    pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    if start is None:
        start = config.bos_token_id if isinstance(config.bos_token_id, int) else pad
    shifted = labels_BS.new_full(labels_BS.shape, start)
    shifted[:, 1:] = labels_BS[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, pad)
