"""Every text-bearing architecture that transformers knows: truths that need no answer key.

`pytest` runs a part; `pytest -m zoo` runs every class.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from functools import lru_cache

import pytest
import torch
import zoo

from lorafit.adapter.inject import inject_plan
from lorafit.adapter.plan import resolve
from lorafit.errors import RequestError
from lorafit.model.chart import chart
from lorafit.model.map import ModelMap, sum_params
from lorafit.model.roles import DEFAULT_PARTS, Part, Role
from lorafit.settings.preset import load_preset, preset_names

# Hundreds of classes warn of their own defaults, and of one another's names.
pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES = zoo.classes()
BANDS = ("low", "mid", "high", "all")
# Some of each kind; the families with traps of their own are in families.py.
REPRESENTATIVE = [
    "LlamaForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GPT2LMHeadModel",
    "BertForMaskedLM",
    "T5ForConditionalGeneration",
    "Qwen3NextForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "JetMoeForCausalLM",
    "WhisperForConditionalGeneration",
    "XLMWithLMHeadModel",
    "MobileBertForMaskedLM",
    "FunnelForMaskedLM",
    "AlbertForMaskedLM",
]
# Classes whose default config, whole or shrunk, transformers itself cannot build, or that need
# packages for images. Printed by the sweep; one that builds after all fails it.
UNBUILDABLE = frozenset(
    ["Gemma3nForConditionalGeneration", "Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"]
)

UNBUILT: list[str] = []  # what the sweep could not build, and why: conftest.py prints it


@lru_cache(maxsize=2)
def charted(name: str) -> tuple[object, ModelMap]:
    model, config = zoo.build(name, CLASSES[name])
    return model, chart(model, config, name)


def check_map(found: ModelMap) -> None:
    assert sum_params(found.slots) + sum_params(found.uncovered) == found.total_params
    paths = [s.path for s in found.slots]
    assert len(paths) == len(set(paths))
    stacks = {s.path: s for s in found.stacks}
    for slot in found.slots:
        assert slot.stack in stacks and slot.path.startswith(f"{slot.stack}.{slot.layer}.")
        if slot.part in DEFAULT_PARTS:
            assert slot.roles and stacks[slot.stack].part == "text", slot
    # like blocks play like roles: the same name and shape means the same in every layer
    played = defaultdict(set)
    for slot in found.slots:
        played[slot.stack, slot.tail, slot.in_features, slot.out_features, slot.part].add(slot.roles)
    assert all(len(roles) == 1 for roles in played.values())
    # of a linear layer no weight plays an attention's role and a feed-forward's at once
    attention = {Role.Q, Role.K, Role.V, Role.O}
    for slot in found.slots:
        assert not (set(slot.roles) & attention and set(slot.roles) - attention), slot


def check_reads_the_residual(found: ModelMap) -> None:
    """What asks, indexes and represents reads the stream that the output writes to, in every layer."""
    writes = {
        (s.stack, s.layer): s.out_features
        for s in found.slots
        if s.part is Part.SELF_ATTENTION and s.roles == (Role.O,)
    }
    for slot in found.slots:
        if slot.part is not Part.SELF_ATTENTION or not set(slot.roles) & {Role.Q, Role.K, Role.V}:
            continue
        leaf = slot.tail.rpartition(".")[2]
        if leaf in LOW_RANK or leaf in OWN_WIDTHS.get(found.family, ()):
            continue
        wide = writes.get((slot.stack, slot.layer), found.hidden_size)
        assert slot.in_features == wide, (slot.path, slot.in_features, wide)


# Queries, keys and values of a compressed state (latent attention).
LOW_RANK = {"q_b_proj", "kv_b_proj", "q_gate_proj"}
# What reads another width than the output writes, by the model's own design.
OWN_WIDTHS = {
    "zamba": ("q_proj", "k_proj", "v_proj"),  # the state beside the embedding, twice as wide
    "mobilebert": ("value",),  # the wide state, where queries and keys read its bottleneck
}


def check_plans(model: object, found: ModelMap) -> int:
    """Every strategy × band: chosen slots lie where they should, and PEFT adapts exactly them."""
    adapted = 0
    texts = {s.path for s in found.text_stacks}
    for preset in preset_names():
        for band in BANDS:
            try:
                plan = resolve(found, load_preset(preset), band)
            except RequestError as error:
                assert error.hint or "no repeated blocks" in error.message, error.message
                continue
            roles = set(load_preset(preset).roles)
            for slot in plan.slots:
                assert slot.stack in texts and slot.part in DEFAULT_PARTS
                assert slot.layer in plan.layers[slot.stack] and set(slot.roles) & roles
            put_in_and_out(model, found, plan)
            adapted += 1
    return adapted


def put_in_and_out(model: object, found: ModelMap, plan) -> None:
    with warnings.catch_warnings(), torch.device("meta"):  # where, not which numbers
        warnings.simplefilter("ignore")
        peft_model = inject_plan(model, plan, found.task)  # compares names and counts, and raises
        peft_model.unload()


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_part_of_the_zoo(name):
    model, found = charted(name)
    check_map(found)
    check_reads_the_residual(found)
    assert check_plans(model, found)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n for n in CLASSES if n not in REPRESENTATIVE])
def test_the_whole_zoo(name):
    if name in UNBUILDABLE:
        with pytest.raises(Exception) as error:
            zoo.build(name, CLASSES[name])
        UNBUILT.append(
            f"{name}: {type(error.value).__name__}: {str(error.value).strip().splitlines()[0][:90]}"
        )
        return
    model, found = charted(name)
    check_map(found)
    check_reads_the_residual(found)
    check_plans(model, found)
