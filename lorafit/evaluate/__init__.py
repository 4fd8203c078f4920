"""Evaluation: rows scored, base and adapters compared, completions, benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.evaluate.chat import Chat as Chat
    from lorafit.evaluate.generate import Generator as Generator
    from lorafit.evaluate.generate import Prompt as Prompt
    from lorafit.evaluate.generate import Sampling as Sampling
    from lorafit.evaluate.generate import own_prompts as own_prompts
    from lorafit.evaluate.generate import row_prompts as row_prompts
    from lorafit.evaluate.held_out import check_holds_out as check_holds_out
    from lorafit.evaluate.held_out import held_out_rows as held_out_rows
    from lorafit.evaluate.held_out import stored_settings as stored_settings
    from lorafit.evaluate.lm_eval import Tasks as Tasks
    from lorafit.evaluate.paired import RowScore as RowScore
    from lorafit.evaluate.paired import paired_score as paired_score
    from lorafit.evaluate.paired import summed as summed
    from lorafit.evaluate.score import Evaluator as Evaluator
    from lorafit.evaluate.score import mask_id as mask_id
    from lorafit.evaluate.side_by_side import EvalRequest as EvalRequest
    from lorafit.evaluate.side_by_side import compare as compare

__getattr__ = door(
    __name__,
    {
        "chat": "Chat",
        "generate": "Generator Prompt Sampling own_prompts row_prompts",
        "held_out": "check_holds_out held_out_rows stored_settings",
        "lm_eval": "Tasks",
        "paired": "RowScore paired_score summed",
        "score": "Evaluator mask_id",
        "side_by_side": "EvalRequest compare",
    },
)
