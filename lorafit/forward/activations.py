"""Activation checkpointing above the cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorafit.errors import RequestError


def base_of(model: torch.nn.Module) -> Any:
    """The model itself, without PEFT's wrapper."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model


def checkpoint_activations(model: torch.nn.Module, frozen: Sequence[torch.nn.Module] = ()) -> None:
    """Recompute activations in the backward pass, and keep it from running below the lowest adapter.

    transformers makes the embeddings' output require a gradient for its reentrant kind of
    checkpointing, which drags backward through every frozen layer; the other kind needs none.
    The `frozen` blocks under the cut keep nothing for backward: they are not checkpointed. Raises RequestError where
    the model's class cannot do it.
    """
    base = base_of(model)
    if not getattr(base, "supports_gradient_checkpointing", True):
        raise RequestError(
            f"--gradient-checkpointing: transformers does not support it for {type(base).__name__}",
            "leave it out",
        )
    if hasattr(base, "activation_checkpointing_enable"):  # its name in newer transformers
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in frozen:
        if hasattr(block, "gradient_checkpointing"):
            setattr(block, "gradient_checkpointing", False)  # noqa: B010  # no tensor, as types have it
    if hasattr(base, "disable_input_require_grads"):
        try:
            base.disable_input_require_grads()
        except AttributeError:  # no hook was installed: nothing to take away
            return
