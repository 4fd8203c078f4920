"""Adapters: the plan, its names for PEFT, putting it into a model, its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.adapter.base import check_downloaded as check_downloaded
    from lorafit.adapter.base import common_base as common_base
    from lorafit.adapter.base import is_model as is_model
    from lorafit.adapter.base import named_alone as named_alone
    from lorafit.adapter.base import tokenizer_place as tokenizer_place
    from lorafit.adapter.continued import check_continues as check_continues
    from lorafit.adapter.continued import modules_of as modules_of
    from lorafit.adapter.continued import put_in as put_in
    from lorafit.adapter.continued import settings_of as settings_of
    from lorafit.adapter.folder import BASE as BASE
    from lorafit.adapter.folder import BASE_LAYER as BASE_LAYER
    from lorafit.adapter.folder import CONFIG as CONFIG
    from lorafit.adapter.folder import WEIGHTS as WEIGHTS
    from lorafit.adapter.folder import base_of as base_of
    from lorafit.adapter.folder import changes_its_base as changes_its_base
    from lorafit.adapter.folder import check_converted as check_converted
    from lorafit.adapter.folder import left_in_base as left_in_base
    from lorafit.adapter.folder import locate as locate
    from lorafit.adapter.folder import read_config as read_config
    from lorafit.adapter.folder import recorded_quantize as recorded_quantize
    from lorafit.adapter.folder import recorded_tokenizer as recorded_tokenizer
    from lorafit.adapter.folder import replaces_its_base as replaces_its_base
    from lorafit.adapter.folder import run_of as run_of
    from lorafit.adapter.folder import save_adapter as save_adapter
    from lorafit.adapter.folder import tensor_names as tensor_names
    from lorafit.adapter.folder import write_base as write_base
    from lorafit.adapter.inject import adapted_names as adapted_names
    from lorafit.adapter.inject import attach as attach
    from lorafit.adapter.inject import attach_all as attach_all
    from lorafit.adapter.inject import compare as compare
    from lorafit.adapter.inject import inject_plan as inject_plan
    from lorafit.adapter.peft_names import pattern_value as pattern_value
    from lorafit.adapter.plan import ADAPTER_ITEMSIZE as ADAPTER_ITEMSIZE
    from lorafit.adapter.plan import Plan as Plan
    from lorafit.adapter.plan import Target as Target
    from lorafit.adapter.plan import lora_params as lora_params
    from lorafit.adapter.plan import planned as planned
    from lorafit.adapter.plan import resolve as resolve
    from lorafit.adapter.plan_checks import needs_whole_base as needs_whole_base
    from lorafit.adapter.tokenizer_files import TEMPLATES as TEMPLATES
    from lorafit.adapter.tokenizer_files import TOKENIZER as TOKENIZER
    from lorafit.adapter.tokenizer_files import files_of_tokenizer as files_of_tokenizer
    from lorafit.adapter.tokenizer_files import is_one as is_one
    from lorafit.adapter.tokenizer_files import save_tokenizer as save_tokenizer

__getattr__ = door(
    __name__,
    {
        "base": "check_downloaded common_base is_model named_alone tokenizer_place",
        "continued": "check_continues modules_of put_in settings_of",
        "folder": "BASE BASE_LAYER CONFIG WEIGHTS base_of changes_its_base check_converted left_in_base locate read_config recorded_quantize recorded_tokenizer replaces_its_base run_of save_adapter tensor_names write_base",
        "inject": "adapted_names attach attach_all compare inject_plan",
        "peft_names": "pattern_value",
        "plan": "ADAPTER_ITEMSIZE Plan Target lora_params planned resolve",
        "plan_checks": "needs_whole_base",
        "tokenizer_files": "TEMPLATES TOKENIZER files_of_tokenizer is_one save_tokenizer",
    },
)
