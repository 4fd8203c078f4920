"""`lorafit presets`: strategies, roles, bands."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape

from lorafit.model import MEANING
from lorafit.screen.console import Screen, table_of
from lorafit.settings import BANDS, Preset
from lorafit.units import index_ranges


def show_presets(screen: Screen, presets: Iterable[Preset]) -> None:
    """What there is to choose from: the strategies, the roles, the bands."""
    table = table_of("preset", "adapts", "what it means", fold=2)
    for preset in presets:
        adapts = ", ".join(r.value for r in preset.roles)
        table.add_row(
            f"  {preset.name}",
            adapts if len(preset.roles) < len(MEANING) else "all seven",
            escape(preset.description),
        )
    screen.answer(table)
    screen.answer()
    roles = table_of("role", "what it does")
    for role, meaning in MEANING.items():
        roles.add_row(f"  {role.value}", meaning)
    screen.answer(roles)
    screen.answer()
    bands = table_of("band", "of 12 layers", "of 32 layers", "where", fold=3)
    for name in ("low", "mid", "high"):
        band = BANDS[name]
        bands.add_row(f"  {name}", index_ranges(band.indices(12)), index_ranges(band.indices(32)), band.about)
    screen.answer(bands)
    screen.answer()
    screen.note(
        "which strategy and band is best depends on the model and the data: `lorafit compare` measures it",
        answer=True,
    )
    screen.command("next", "lorafit help presets")
