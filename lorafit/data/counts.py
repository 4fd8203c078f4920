"""What became of a source's examples: rows made, skipped, cut; what was not read; the faults that were found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lorafit.errors import RequestError

SHOWN = 5  # faults that are shown with file and line
HOPELESS = 1000  # faults without one good example: the file is another kind of file


@dataclass(slots=True)
class Counts:
    """Counts over the examples of one source.

    `blank` rows hold no text; `bad` rows cannot be used, and `bad_first` are the first of them as [message,
    hint]. `seams` are rows with a token that holds the end of the prompt and the start of the answer.
    `unused` counts rows by the column that is not read, `unused_keys` messages by such a key. `left_out` is
    what the chat template does not render: kind -> [count, where the first is, its text]. `weightless` are
    rows and answers whose weight is 0; `weighted` are those of another weight than 1, from `lightest` to
    `heaviest`. Of the rows of plain prompt and completion, `joined` have no white
    space between the two; `pair` are prompt and completion of the first such row, else of the first.
    """

    examples: int = 0
    cut: int = 0
    split: int = 0
    too_long: int = 0
    unsupervised: int = 0
    unsupervised_at: str = ""
    cut_away: int = 0
    blank: int = 0
    blank_at: str = ""
    empty: int = 0
    empty_first: str = ""
    bad: int = 0
    bad_first: list[list[str]] = field(default_factory=list)
    seams: int = 0
    seam_at: str = ""
    seam: str = ""
    weightless: int = 0
    weighted: int = 0
    lightest: float = float("inf")
    heaviest: float = 0.0
    joined: int = 0
    pair: list[str] = field(default_factory=list)
    unused: dict[str, int] = field(default_factory=dict)
    unused_keys: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fault(self, error: RequestError) -> None:
        """Record a row that cannot be used. Raises the error where nothing but such rows were found."""
        self.bad += 1
        if len(self.bad_first) < SHOWN:
            self.bad_first.append([error.message, error.hint or ""])
        if self.bad >= HOPELESS and not self.examples:
            raise faults([self])

    def skip_blank(self, where: str) -> None:
        self.blank += 1
        self.blank_at = self.blank_at or where

    def leave_empty(self, said: str) -> None:
        """Count a row whose answer is empty; `said` names it."""
        self.empty += 1
        self.empty_first = self.empty_first or said

    def skip_unsupervised(self, where: str) -> None:
        self.unsupervised += 1
        self.unsupervised_at = self.unsupervised_at or where

    def leave_out(self, kind: str, where: str, text: str) -> None:
        found = self.left_out.setdefault(kind, [0, where, _short(text)])
        found[0] += 1

    def join(self, prompt: str, completion: str) -> None:
        """Count a row of plain prompt and completion."""
        apart = not prompt or prompt[-1:].isspace() or completion[:1].isspace()
        if not self.pair or (not apart and not self.joined):
            self.pair = [prompt, completion]
        self.joined += not apart

    def weigh(self, weight: float) -> None:
        """Count a row or an answer of another weight than 1."""
        self.weighted += 1
        self.lightest, self.heaviest = min(self.lightest, weight), max(self.heaviest, weight)

    def forget_keys(self, is_read: Callable[[str], bool]) -> None:
        """Of the messages' keys, keep those that are not read."""
        self.unused_keys = {key: n for key, n in self.unused_keys.items() if not is_read(key)}

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def faults(counts: list[Counts]) -> RequestError:
    """The error that names the first bad rows of these sources and counts the rest."""
    every = sum(c.bad for c in counts)
    first = [fault for c in counts for fault in c.bad_first][:SHOWN]
    if every == 1:
        return RequestError(first[0][0], first[0][1] or "--on-bad-row skip leaves it out")
    more = f"; and {every - len(first):,} more" if every > len(first) else ""
    hint = next((hint for _, hint in first if hint), "")
    said = f"{every:,} rows cannot be used: " + "; ".join(message for message, _ in first) + more
    return RequestError(
        said, f"{hint}; or --on-bad-row skip" if hint else "--on-bad-row skip leaves them out"
    )


def remarks(counts: list[Counts]) -> Iterator[str]:
    """What a person should know of these sources, a sentence each; alike ones are summed."""
    yield from dict.fromkeys(note for c in counts for note in c.notes)
    if bad := sum(c.bad for c in counts):
        firsts: dict[str, str] = {}  # the first row of each reason, among those that were kept
        for message in (message for c in counts for message, _ in c.bad_first):
            firsts.setdefault(re.sub(r"^`[^`]*`", "", message), message)
        yield f"skipped {bad:,} bad {_rows(bad)}, e.g. {'; '.join(list(firsts.values())[:SHOWN])}"
    if blank := sum(c.blank for c in counts):
        at = next(c.blank_at for c in counts if c.blank_at)
        yield f"skipped {blank:,} blank {_rows(blank)}, e.g. {at}"
    if empty := sum(c.empty for c in counts):
        said = next(c.empty_first for c in counts if c.empty)
        yield f"left out {empty:,} {_rows(empty)} without an answer, e.g. {said}"
    if weightless := sum(c.weightless for c in counts):
        yield f"{weightless:,} rows or answers have weight 0 and are not learned"
    if weighted := sum(c.weighted for c in counts):
        low, high = min(c.lightest for c in counts), max(c.heaviest for c in counts)
        span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        yield f"{weighted:,} rows or answers have a weight of their own in the loss: {span}"
    left: dict[str, list[Any]] = {}
    for c in counts:
        for kind, (number, where, text) in c.left_out.items():
            left.setdefault(kind, [0, where, text])[0] += number
    for kind, (number, where, text) in left.items():
        example = f": `{text}`" if text else ""
        yield f"the chat template leaves out {kind} ({number:,} times, e.g. in {where}{example})"
    for name, what in (("unused", "columns"), ("unused_keys", "keys of messages")):
        names = dict.fromkeys(key for c in counts for key in getattr(c, name))
        if names:
            yield f"{what} not used: {', '.join(f'`{key}`' for key in names)}"
    if joined := sum(c.joined for c in counts):
        prompt, completion = next(c.pair for c in counts if c.joined)
        shown = f"`{_tail(prompt)}` + `{_short(completion, 30)}`"
        yield f"in {joined:,} {_rows(joined)} nothing stands between prompt and completion, e.g. {shown}"
    if seams := sum(c.seams for c in counts):
        at, seam = next((c.seam_at, c.seam) for c in counts if c.seam_at)
        yield (
            f"in {seams:,} {_rows(seams)} one token holds the end of the prompt and the start of the answer, "
            f"e.g. `{seam}` in {at}; it is in the loss, and generation starts before it"
        )


def _rows(number: int) -> str:
    return "row" if number == 1 else "rows"


def _tail(text: str, most: int = 30) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= most else "…" + text[1 - most :]


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
