"""The settings of a run: options, presets, bands, and their precedence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.settings.bands import BANDS as BANDS
    from lorafit.settings.bands import TILED_FROM as TILED_FROM
    from lorafit.settings.bands import LayerChoice as LayerChoice
    from lorafit.settings.optimizers import OPTIMIZERS as OPTIMIZERS
    from lorafit.settings.optimizers import PACKAGES as PACKAGES
    from lorafit.settings.optimizers import STATE_BYTES as STATE_BYTES
    from lorafit.settings.optimizers import check_optimizer as check_optimizer
    from lorafit.settings.options import DATA as DATA
    from lorafit.settings.options import OUTPUT as OUTPUT
    from lorafit.settings.options import TRAINING as TRAINING
    from lorafit.settings.options import WHAT as WHAT
    from lorafit.settings.options import Option as Option
    from lorafit.settings.places import lasting as lasting
    from lorafit.settings.places import lasting_data as lasting_data
    from lorafit.settings.places import weighted as weighted
    from lorafit.settings.precedence import as_recorded as as_recorded
    from lorafit.settings.precedence import dated as dated
    from lorafit.settings.precedence import derive_from_model as derive_from_model
    from lorafit.settings.precedence import derive_from_rows as derive_from_rows
    from lorafit.settings.precedence import read_run_file as read_run_file
    from lorafit.settings.precedence import settle as settle
    from lorafit.settings.preset import Lora as Lora
    from lorafit.settings.preset import Preset as Preset
    from lorafit.settings.preset import load_preset as load_preset
    from lorafit.settings.preset import preset_names as preset_names
    from lorafit.settings.preset import read_yaml as read_yaml
    from lorafit.settings.preset import takes_from_base as takes_from_base
    from lorafit.settings.run_config import OPTIONS as OPTIONS
    from lorafit.settings.run_config import RunConfig as RunConfig
    from lorafit.settings.same_run import IN_DIGESTS as IN_DIGESTS
    from lorafit.settings.same_run import MAY_CHANGE as MAY_CHANGE
    from lorafit.settings.same_run import changed_settings as changed_settings

__getattr__ = door(
    __name__,
    {
        "bands": "BANDS LayerChoice TILED_FROM",
        "optimizers": "OPTIMIZERS PACKAGES STATE_BYTES check_optimizer",
        "options": "DATA OUTPUT Option TRAINING WHAT",
        "places": "lasting lasting_data weighted",
        "precedence": "as_recorded dated derive_from_model derive_from_rows read_run_file settle",
        "preset": "Lora Preset load_preset preset_names read_yaml takes_from_base",
        "run_config": "OPTIONS RunConfig",
        "same_run": "IN_DIGESTS MAY_CHANGE changed_settings",
    },
)
