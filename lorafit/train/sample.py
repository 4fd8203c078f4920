"""What the model says to the first held-out row, before training and after."""

from __future__ import annotations

from dataclasses import replace

import torch

from lorafit.evaluate import Evaluator, Generator, Prompt, Sampling, row_prompts
from lorafit.train.job import Job

TOKENS, SECONDS = 48, 10.0  # limits of one answer: its length in tokens, and the time to generate it


def prompt_of(held_out: Evaluator) -> Prompt:
    """The first held-out row, with room for a short answer."""
    (prompt,) = row_prompts(held_out, 1)
    return replace(prompt, room=min(prompt.room, TOKENS))


def answer(job: Job, held_out: Evaluator) -> str:
    """What the model says now; what is random in training goes on as if nothing had been said. The model is in
    evaluation mode afterwards.

    Raises whatever the model's own generation raises.
    """
    generator = Generator(
        job.tokenizer, held_out.forward, job.device, job.found.max_positions, Sampling(max_seconds=SECONDS)
    )
    with torch.random.fork_rng([job.device] if job.device.type == "cuda" else []):
        return generator.completions(job.model, [prompt_of(held_out)])[0]
