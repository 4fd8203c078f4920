"""Quantities as text: one rounding rule for everything that is printed.

Three significant figures, a thin scale (`k`, `M`, `G`, `T`), decimal bytes (1 MB = 10^6 bytes).
"""

from __future__ import annotations

import re
from math import isfinite

SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def figures(value: float, digits: int = 3) -> str:
    """`12.3`, `4.57`, `850`: that many significant figures, never an exponent."""
    if value == 0 or not isfinite(value):
        return f"{value:.0f}"
    size = abs(value)
    whole = len(str(int(size))) if size >= 1 else 0
    if whole == 0:
        return f"{value:.{digits}g}" if size >= 1e-4 else f"{value:.1e}"
    return f"{value:,.{max(0, digits - whole)}f}"


def scaled(value: float) -> tuple[str, str]:
    """The figures and the scale's letter: `("1.24", "M")`; rounded first, so 999,600 is 1.00 M."""
    rounded = float(f"{value:.3g}")
    for size, letter in SCALES:
        if abs(rounded) >= size:
            return figures(rounded / size), letter
    return figures(value), ""


def short(count: float) -> str:
    """A count in short: `950`, `41.2k`, `2.50 M`, `70.6 B` (a thousand million is said B)."""
    text, letter = scaled(count)
    if letter == "k":
        return f"{text}k"
    return f"{text} {'B' if letter == 'G' else letter}" if letter else text


def count(number: int) -> str:
    """A whole number in full: `69,120`."""
    return f"{number:,}"


def epochs_text(number: float) -> str:
    """`1 epoch`, `0.5 epochs`."""
    return f"{round(number, 2):g} epoch{'' if number == 1 else 's'}"


def rows_text(number: int) -> str:
    """`1 row`, `900 rows`."""
    return f"{count(number)} row{'' if number == 1 else 's'}"


def bytes_text(number: float) -> str:
    """A size: `15.0 MB`, `141 GB`, `512 B`."""
    text, letter = scaled(number)
    return f"{text} {letter}B"


def parse_bytes(text: str) -> int:
    """`24GB`, `24 GiB`, `512MB`, `80G` as bytes: powers of ten, of two with an `i`.

    Raises ValueError for anything else, a number without a unit among it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)([bB]?)\s*", text)
    if match is None or (match[3] and not match[2]) or not (match[2] or match[4]):
        raise ValueError(text)
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def seconds_text(seconds: float) -> str:
    """A duration: `0.8 s`, `21 s`, `4 min 10 s`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def percent(part: float, whole: float) -> str:
    """A share: `2.7 %`, `0.024 %`."""
    return f"{figures(100 * part / whole, 2)} %" if whole else "0 %"


def deviation(predicted: float, actual: float) -> str:
    """How far the actual value lies from the predicted one: ` (+3 %)`; empty where nothing was predicted."""
    if predicted <= 0:
        return ""
    return f" ({round(100 * (actual / predicted - 1)):+d} %)".replace("-", "−")


def compared(predicted: float, actual: float) -> str:
    """The actual value beside the predicted one, in words: ` (3 % more than predicted)`, ` (as predicted)`."""
    if predicted <= 0:
        return ""
    share = round(100 * (actual / predicted - 1))
    return (
        f" ({abs(share)} % {'more' if share > 0 else 'less'} than predicted)" if share else " (as predicted)"
    )


def layers_text(indices: tuple[int, ...]) -> str:
    """`layers 0–2, 5`, or `layer 4`."""
    return f"layer{'s' if len(indices) != 1 else ''} {index_ranges(indices)}"


def index_ranges(indices: tuple[int, ...]) -> str:
    """Whole numbers in short: `(0, 1, 2, 5)` is `0–2, 5`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)
