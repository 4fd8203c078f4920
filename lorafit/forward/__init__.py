"""A forward pass: the loss over supervised tokens, the frozen prefix replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.forward.activations import base_of as base_of
    from lorafit.forward.activations import checkpoint_activations as checkpoint_activations
    from lorafit.forward.compiling import PLAIN as PLAIN
    from lorafit.forward.compiling import CompiledBlocks as CompiledBlocks
    from lorafit.forward.head import Forward as Forward
    from lorafit.forward.head import routes_for_loss as routes_for_loss
    from lorafit.forward.loss import chunk_for as chunk_for
    from lorafit.forward.placement import COMFORTABLE as COMFORTABLE
    from lorafit.forward.placement import Choice as Choice
    from lorafit.forward.placement import choose as choose
    from lorafit.forward.placement import fits_whole as fits_whole
    from lorafit.forward.placement import not_streamed as not_streamed
    from lorafit.forward.placement import refused_by_map as refused_by_map
    from lorafit.forward.prefix import Prefix as Prefix
    from lorafit.forward.prefix import blocks_below as blocks_below
    from lorafit.forward.prefix import cut_of as cut_of
    from lorafit.forward.prefix import refusal as refusal
    from lorafit.forward.prefix import trained_in as trained_in
    from lorafit.forward.prefix_fill import Sweep as Sweep
    from lorafit.forward.prefix_fill import fill as fill
    from lorafit.forward.prefix_store import DiskStore as DiskStore
    from lorafit.forward.prefix_store import MemoryStore as MemoryStore
    from lorafit.forward.prefix_store import StateStore as StateStore
    from lorafit.forward.prefix_store import same_state as same_state
    from lorafit.forward.prefix_store import states_folder as states_folder
    from lorafit.forward.prefix_store import states_key as states_key
    from lorafit.forward.streaming import Trial as Trial
    from lorafit.forward.streaming import first_pass as first_pass
    from lorafit.forward.streaming import settle as settle
    from lorafit.forward.streaming import sweep_of as sweep_of

__getattr__ = door(
    __name__,
    {
        "activations": "base_of checkpoint_activations",
        "compiling": "PLAIN CompiledBlocks",
        "prefix_fill": "Sweep fill",
        "head": "Forward routes_for_loss",
        "loss": "chunk_for",
        "placement": "COMFORTABLE Choice choose fits_whole not_streamed refused_by_map",
        "prefix": "Prefix blocks_below cut_of refusal trained_in",
        "streaming": "Trial first_pass settle sweep_of",
        "prefix_store": "DiskStore MemoryStore StateStore same_state states_folder states_key",
    },
)
