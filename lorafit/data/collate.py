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
    `targets_N`: known before the device is asked anything. `weights_N`, float32, are what each counts in the
    loss, and `row_weights` their sum in each row; None and empty where each counts 1.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    counts: tuple[int, ...]  # supervised tokens of each row
    tokens: int
    key: str = ""  # names a micro-batch that comes again as it is; empty for one that does not
    weights: torch.Tensor | None = None
    row_weights: tuple[float, ...] = ()

    @property
    def supervised(self) -> int:
        return sum(self.counts)

    @property
    def weight(self) -> float:
        """What the micro-batch counts in the loss: its supervised tokens, or their weights' sum."""
        return float(sum(self.row_weights or self.counts))

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; to a GPU its tensors go as one, without a wait."""
        names = list(self.inputs)
        tensors = [*self.inputs.values(), self.labels, self.places, self.targets]
        tensors += [] if self.weights is None else [self.weights]
        moved = _moved(tensors, device)
        labels, places, targets, *weights = moved[len(names) :]
        return replace(
            self,
            inputs=dict(zip(names, moved, strict=False)),
            labels=labels,
            places=places,
            targets=targets,
            weights=weights[0] if weights else None,
        )


def _moved(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The tensors on a device. To a GPU they go in one copy out of pinned memory, those of eight bytes first:
    each begins where its dtype may."""
    if device.type != "cuda" or any(tensor.is_cuda for tensor in tensors):
        return [tensor.to(device) for tensor in tensors]
    raw = packed(tensors).pin_memory().to(device, non_blocking=True)
    return unpacked(raw, tensors)


def packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of all tensors, one after the other."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def unpacked(raw: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors whose bytes `raw` holds, of the dtypes and shapes of `like`: views of it."""
    parts = raw.split([tensor.nbytes for tensor in like])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def collate_rows(rows: Sequence[Row], pad: int, task: str, key: str = "") -> Batch:
    """The rows padded on the right to the longest of them: int64 (B, T); without rows a batch of none."""
    if not rows:
        none = torch.empty(0, dtype=torch.long)
        return Batch({}, none, none, none, (), 0, key)
    ids_BT = _padded([row.ids for row in rows], pad)
    mask_BT = _padded([(1,) * len(row.ids) for row in rows], 0)
    labels = _padded([row.labels for row in rows], IGNORED)
    tokens = int(mask_BT.sum()) + (sum(len(r.labels) for r in rows) if task == "seq2seq" else 0)
    places, targets, counts = _aim(labels, task)
    batch = Batch(
        {"input_ids": ids_BT, "attention_mask": mask_BT}, labels, places, targets, counts, tokens, key
    )
    if not any(row.weights for row in rows):
        return batch
    weights_BT = _padded([row.weights or (1.0,) * len(row.labels) for row in rows], 1.0)
    return _weighted(batch, weights_BT if task != "causal" else weights_BT.roll(-1, dims=1))


def run_along(batch: Batch) -> Batch:
    """A batch that is run and counts nothing: no token, no loss, no gradient."""
    none = torch.zeros(len(batch.places))
    return replace(
        batch, tokens=0, counts=(0,) * len(batch.counts), weights=none, row_weights=(0.0,) * len(batch.counts)
    )


def _aim(labels: torch.Tensor, task: str) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """(places, targets, counts): a causal model's logits stand one place before what they predict."""
    wanted = labels
    if task == "causal":
        wanted = torch.full_like(labels, IGNORED)
        wanted[:, :-1] = labels[:, 1:]
    chosen = wanted != IGNORED
    places = chosen.flatten().nonzero().squeeze(1)
    return places, wanted.flatten()[places], tuple(chosen.sum(1).tolist())


def _weighted(batch: Batch, weights_BT: torch.Tensor) -> Batch:
    """A batch with the weight of each place of its flattened (B * T)."""
    weights_N = weights_BT.flatten()[batch.places]
    sums = [float(part.double().sum()) for part in weights_N.split(batch.counts)]
    return replace(batch, weights=weights_N, row_weights=tuple(sums))


def _padded(sequences: Sequence[Sequence[float]], pad: float) -> torch.Tensor:
    """(rows, longest): int64, or float32 where the padding is a float."""
    width = max(len(s) for s in sequences)
    dtype = torch.float32 if isinstance(pad, float) else torch.long
    out = torch.full((len(sequences), width), pad, dtype=dtype)
    for row, sequence in enumerate(sequences):
        out[row, : len(sequence)] = torch.tensor(sequence, dtype=dtype)
    return out


def mask_row(row: Row, pad: int, mask_id: int, vocab_size: int, seed: int) -> Row:
    """A row with tokens hidden for a masked model (see `mask_tokens`), by a seed of its own."""
    generator = torch.Generator().manual_seed(seed)
    alone = mask_tokens(collate_rows([row], pad, "masked"), mask_id, vocab_size, generator)
    ids, labels = alone.inputs["input_ids"][0].tolist(), alone.labels[0].tolist()
    return replace(row, ids=tuple(ids), labels=tuple(labels))


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
    hidden = replace(
        batch, inputs=inputs, labels=labels_BT, places=places, targets=targets, counts=counts, key=""
    )
    if batch.weights is None:
        return hidden
    weights_BT = torch.ones(labels_BT.shape)
    weights_BT.view(-1)[batch.places] = batch.weights
    return _weighted(hidden, weights_BT)
