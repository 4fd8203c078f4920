"""The loss over chunks of the head's output: never more than one chunk's logits are held.

C tokens of a chunk, N supervised tokens, D hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F

CHUNK_BYTES = {"cpu": 16e6, "cuda": 512e6}  # of a chunk's float32 logits


def chunk_for(device: str, vocabulary: int) -> int:
    """How many tokens the head is run on at once on a `cpu` or a `cuda` device."""
    return max(64, int(CHUNK_BYTES.get(device, 64e6) / 4 / max(1, vocabulary)))


class HeadLoss(torch.autograd.Function):
    """Cross-entropy over chunks: the gradient of the hidden states is made with the loss, so that
    no more than one chunk's logits are ever there. The head itself is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        targets_N: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        chunk: int,
        weights_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum of the tokens' losses, each times its weight: float32, a scalar."""
        wanted = ctx.needs_input_grad[0]
        gradients: list[torch.Tensor] = []
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        weights = repeat(None) if weights_N is None else weights_N.split(chunk)
        parts = zip(hidden_ND.split(chunk), targets_N.split(chunk), weights, strict=False)
        for part_CD, targets_C, weights_C in parts:
            part_CD = part_CD.detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits_CV = head(part_CD)
            loss += _softmax_loss(logits_CV, targets_C, weights_C, gradients, part_CD if wanted else None)
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden_ND,) = ctx.saved_tensors
        return hidden_ND * gradients[0].to(hidden_ND.dtype), None, None, None, None


def _softmax_loss(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    weights_C: torch.Tensor | None,
    gradients: list[torch.Tensor],
    hidden_CD: torch.Tensor | None,
) -> torch.Tensor:
    """The summed cross-entropy of a chunk, softmax in float32; the gradient of `hidden_CD` is appended.

    With p the softmax, the gradient of the scores is p less the one-hot, and the loss -log p of the
    target. Where that underflows, and on a GPU, where asking would be a wait, it is log sum exp(scores)
    less the target's score: with m the largest score, m - log max(p), as the largest p is at least 1 / V.
    """
    scores_CV, targets_C1 = logits_CV.detach(), targets_C[:, None]
    softmax_CV = torch.softmax(scores_CV, -1, dtype=torch.float32)
    chosen_C1 = softmax_CV.gather(1, targets_C1)
    if scores_CV.is_cuda or bool((chosen_C1 < torch.finfo(torch.float32).tiny).any()):
        sums_C1 = scores_CV.amax(-1, keepdim=True).float() - softmax_CV.amax(-1, keepdim=True).log_()
        loss_C1 = sums_C1 - scores_CV.gather(1, targets_C1).float()
    else:
        loss_C1 = -chosen_C1.log_()
    if weights_C is not None:
        loss_C1 = loss_C1 * weights_C[:, None]
    if hidden_CD is not None:
        softmax_CV.scatter_add_(1, targets_C1, softmax_CV.new_full(targets_C1.shape, -1.0))
        if weights_C is not None:
            softmax_CV *= weights_C[:, None]
        gradients += torch.autograd.grad(logits_CV, hidden_CD, softmax_CV.to(logits_CV.dtype))
    return loss_C1.sum()


def summed_loss(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor | None
) -> torch.Tensor:
    """The sum of the tokens' cross-entropies, each times its weight where it has one."""
    if weights_N is None:
        return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
    return (F.cross_entropy(logits_NV.float(), targets_N, reduction="none") * weights_N).sum()


def rounding(dtype: torch.dtype) -> float:
    """How far apart two ways to the same logits may come out, as a share of the largest: products of other
    shapes are added in another order, which is up to five spacings of float32 at a width of 512. A scale
    or a cap that is left out is off by a hundredth and more."""
    return max(4 * torch.finfo(dtype).eps, 1e-5)


def scored(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    return loss_N, logits_NV.argmax(-1) == targets_N
