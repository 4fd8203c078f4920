"""Rows become tensors: a micro-batch, padded on the right, that knows where its loss is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lorafit.data.batching import MASKED_SHARE
from lorafit.data.rows import IGNORED, Row


# B rows, T tokens of the longest row, S tokens of the longest target
@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as tensors: `inputs` go to the model by name.

    `labels` are (B, T), for sequence-to-sequence the decoder's (B, S). The loss is taken at
    `places_N`, the positions in the flattened (B * T) whose next or own token is supervised, against
    `targets_N`: known before the device is asked anything.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    counts: tuple[int, ...]  # supervised tokens of each row
    tokens: int
    key: str = ""  # names a micro-batch that comes again as it is; empty for one that does not

    @property
    def supervised(self) -> int:
        return sum(self.counts)

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if device.type != "cuda":
                return tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            inputs={name: moved(tensor) for name, tensor in self.inputs.items()},
            labels=moved(self.labels),
            places=moved(self.places),
            targets=moved(self.targets),
        )


def collate_rows(rows: Sequence[Row], pad: int, task: str, key: str = "") -> Batch:
    """The rows padded on the right to the longest of them: int64 (B, T)."""
    ids_BT = _padded([row.ids for row in rows], pad)
    mask_BT = _padded([(1,) * len(row.ids) for row in rows], 0)
    labels = _padded([row.labels for row in rows], IGNORED)
    tokens = int(mask_BT.sum()) + (sum(len(r.labels) for r in rows) if task == "seq2seq" else 0)
    return Batch({"input_ids": ids_BT, "attention_mask": mask_BT}, labels, *_aim(labels, task), tokens, key)


def _aim(labels: torch.Tensor, task: str) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """(places, targets, counts): a causal model's logits stand one place before what they predict."""
    wanted = labels
    if task == "causal":
        wanted = torch.full_like(labels, IGNORED)
        wanted[:, :-1] = labels[:, 1:]
    chosen = wanted != IGNORED
    places = chosen.flatten().nonzero().squeeze(1)
    return places, wanted.flatten()[places], tuple(chosen.sum(1).tolist())


def _padded(sequences: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    width = max(len(s) for s in sequences)
    out = torch.full((len(sequences), width), pad, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        out[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    return out


def mask_tokens(
    batch: Batch, mask_id: int, vocab_size: int, generator: torch.Generator, share: float = MASKED_SHARE
) -> Batch:
    """A batch with tokens hidden for a masked model: of those that may be learned 15 %, at least one
    a row; 80 % become the mask token, 10 % a random one, 10 % stay (arXiv:1810.04805, sec. 3.1).
    """
    labels_BT = batch.labels
    free_BT = labels_BT != IGNORED
    draw_BT = torch.rand(labels_BT.shape, generator=generator)
    first = torch.where(free_BT, draw_BT, 2.0).argmin(dim=1)  # the one a row always hides
    chosen_BT = free_BT & (draw_BT < share)
    rows = torch.arange(len(first))
    chosen_BT[rows, first] |= free_BT[rows, first]
    fate_BT = torch.rand(labels_BT.shape, generator=generator)
    random_BT = torch.randint(vocab_size, labels_BT.shape, generator=generator)
    ids_BT = batch.inputs["input_ids"]
    ids_BT = torch.where(chosen_BT & (fate_BT < 0.8), mask_id, ids_BT)
    ids_BT = torch.where(chosen_BT & (fate_BT >= 0.9), random_BT, ids_BT)
    labels_BT = torch.where(chosen_BT, labels_BT, IGNORED)
    inputs = {**batch.inputs, "input_ids": ids_BT}
    places, targets, counts = _aim(labels_BT, "masked")
    return replace(
        batch, inputs=inputs, labels=labels_BT, places=places, targets=targets, counts=counts, key=""
    )
