"""One micro-batch: forward, and the loss over its supervised tokens.

B rows, T tokens, S supervised tokens, V vocabulary
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorafit.data import IGNORED, Batch


@dataclass(frozen=True, slots=True)
class Forward:
    """How a model is called: the arguments its forward takes, whichever its class."""

    task: str
    accepts: frozenset[str]

    @classmethod
    def of(cls, model: torch.nn.Module, task: str) -> Forward:
        """How that model is called, with an adapter on it or without."""
        return cls(task, frozenset(inspect.signature(base_of(model).forward).parameters))

    def logits(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits_SV, labels_S) of the supervised tokens, in the model's dtype.

        A causal model's logits stand one place before the token they predict.
        """
        arguments = {name: t for name, t in batch.inputs.items() if name in self.accepts}
        if "use_cache" in self.accepts:
            arguments["use_cache"] = False
        labels = batch.labels
        if self.task == "seq2seq":
            arguments["decoder_input_ids"] = shifted_right(model, labels)
            if "decoder_attention_mask" in self.accepts:
                arguments["decoder_attention_mask"] = (labels != IGNORED).long()
        logits = model(**arguments).logits
        if self.task == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        chosen = labels != IGNORED
        return logits[chosen], labels[chosen]

    def loss_sum(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The loss summed over the supervised tokens, in nats, float32, a scalar."""
        logits_SV, labels_S = self.logits(model, batch)
        return F.cross_entropy(logits_SV.float(), labels_S, reduction="sum")


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Recompute activations in the backward pass, and keep it from running below the lowest adapter.

    transformers makes the embeddings' output require a gradient for its reentrant kind of
    checkpointing, which drags backward through every frozen layer; the other kind needs none.
    """
    base = base_of(model)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(base, "disable_input_require_grads"):
        try:
            base.disable_input_require_grads()
        except AttributeError:  # no hook was installed: nothing to take away
            return
