"""`lorafit merge`: what was merged, and the verification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafit.results import MergeReport
from lorafit.screen.console import Screen, show_uses
from lorafit.units import bytes_text, count, seconds_text

if TYPE_CHECKING:
    from lorafit.report import Use


def show_merge(screen: Screen, report: MergeReport, uses: Sequence[Use] = ()) -> None:
    """What was merged, the result of the verification, and the lines for other tools."""
    screen.line(
        "merged",
        f"{count(report.adapted)} of {count(report.tensors)} tensors, {bytes_text(report.bytes)} "
        f"in {seconds_text(report.seconds)}",
        answer=True,
    )
    if report.verify is None:
        screen.note("not verified: --no-verify", answer=True)
    else:
        v = report.verify
        if v.weights is not None:
            w = v.weights
            screen.line(
                "weights",
                f"{count(w.tensors)} tensors compared one by one: {count(w.adapted)} are base + adapter, rounded once, "
                f"{count(w.tensors - w.adapted)} are the base's; {count(w.moved_values)} of {count(w.values)} values moved",
                answer=True,
            )
        screen.line(
            "verified",
            f"against base + adapter on {count(v.tokens)} tokens: largest logit difference "
            f"{v.max_logit_diff:.2g} (tolerance {v.tolerance:.2g}; the adapter changes them by up to "
            f"{v.adapter_logit_diff:.2g}), same most likely token {v.argmax_agreement:.2%}, "
            f"loss {v.merged_loss:.4f} ({v.merged_loss - v.loss:+.1g})",
            answer=True,
        )
        if v.max_logit_diff >= v.adapter_logit_diff > 0:
            screen.note(
                "the adapter changes the logits no more than rounding does; --dtype float32 keeps its effect",
                answer=True,
            )
    if report.left_out:
        names = ", ".join(report.left_out[:6]) + (
            f" and {len(report.left_out) - 6} more" if len(report.left_out) > 6 else ""
        )
        screen.note(f"left out: {names}", answer=True)
    for note in report.notes:
        screen.note(note, answer=True)
    screen.command("saved", report.output)
    show_uses(screen, uses)
