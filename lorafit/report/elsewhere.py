"""Adapters and merged models in other tools: PEFT, transformers, vLLM, llama.cpp, Ollama. A line is shown only where
it works for what is adapted; otherwise the reason is.

What the tools take: vLLM's table of supported models and its `PEFTHelper`, llama.cpp's `convert_lora_to_gguf.py`, which
writes `lora_alpha` alone, so that its scaling is alpha / r.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

from lorafit.adapter import Plan
from lorafit.model import HUB_ID, Part, Slot
from lorafit.settings import Lora

CLASSES = {
    "causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "masked": "AutoModelForMaskedLM"
}  # fmt: skip

# Families by transformers' `model_type`: those whose adapters vLLM serves, and those that it serves merged only.
VLLM = frozenset(
    [
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "cwm",
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "falcon_h1",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_bigcode",
        "gpt_oss",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "hunyuan_v1_dense",
        "jamba",
        "lfm2",
        "lfm2_moe",
        "llama",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "seed_oss",
        "smollm3",
        "starcoder2",
    ]
)
VLLM_MERGED = VLLM | frozenset(
    ["bloom", "dbrx", "falcon", "gpt2", "gpt_neox", "gptj", "mamba", "mamba2", "mpt", "olmoe", "stablelm"]
)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank

# Families that llama.cpp's converters are known to read: adapters of plain layers, and whole models.
GGUF = frozenset(
    [
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    ]
)
GGUF_MERGED = GGUF | frozenset(
    [
        "bloom",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "exaone4",
        "falcon",
        "glm4",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "mixtral",
        "mpt",
        "olmo",
        "olmoe",
        "phi",
        "qwen2_moe",
        "qwen3_moe",
        "stablelm",
    ]
)


class Adapting(Protocol):
    """What is adapted, and how: a plan, or an adapter that was read back."""

    @property
    def lora(self) -> Lora: ...
    @property
    def slots(self) -> tuple[Slot, ...]: ...


@dataclass(frozen=True, slots=True)
class Adapted:
    """An adapter as its folder states it: `modules` is how many it adapts, `slots` those that the model's map knows."""

    lora: Lora
    slots: tuple[Slot, ...]
    modules: int


@dataclass(frozen=True, slots=True)
class Use:
    """A line to copy for a tool: Python or a shell command."""

    tool: str
    line: str
    python: bool = False


def uses_of_adapter(
    plan: Plan, family: str, task: str, place: str, base: str, revision: str = ""
) -> list[Use]:
    """The lines for an adapter in the folder `place`, of the base that is named `base`."""
    cls, name = CLASSES[task], _name(place)
    base = str(Path(base).expanduser()) if base.startswith("~") else base
    pinned = f", revision={_text(revision)}" if revision else ""
    whole = f"{cls}.from_pretrained({_text(base)}{pinned})"
    made = [Use("PEFT", f"PeftModel.from_pretrained({whole}, {_text(place)})", True)]
    if not _changes_more(plan) and not revision:
        made.append(Use("transformers", f"{cls}.from_pretrained({_text(place)})", True))
    if not why_not_vllm(plan, family, task):
        rank = next(rank for rank in VLLM_RANKS if rank >= plan.lora.saved_rank)
        words = ["vllm", "serve", base, *(["--revision", revision] if revision else []), "--enable-lora"]
        words += ["--max-lora-rank", str(rank), "--lora-modules", f"{name}={place}"]
        made.append(Use("vLLM", shlex.join(words)))
    if not why_not_gguf(plan, family, task):
        named = ["--base-model-id", base] if HUB_ID.fullmatch(base) and "/" in base else ["--base", base]
        words = ["python", "convert_lora_to_gguf.py", place, *named, "--outfile", f"{name}.gguf"]
        made.append(
            Use("llama.cpp", f"{shlex.join(words)} && llama-cli -m BASE.gguf --lora {shlex.quote(name)}.gguf")
        )
    return made


def uses_of_merged(family: str, task: str, place: str, base: str) -> list[Use]:
    """The lines for a merged model in the folder `place`. llama.cpp does not know the demo's tokenizer."""
    name = _name(place)
    made = [Use("transformers", f"{CLASSES[task]}.from_pretrained({_text(place)})", True)]
    if task != "causal":
        return made
    if family in VLLM_MERGED:
        made.append(Use("vLLM", shlex.join(["vllm", "serve", place])))
    if family in GGUF_MERGED and base != "demo":
        words = ["python", "convert_hf_to_gguf.py", place, "--outfile", f"{name}.gguf"]
        made.append(Use("llama.cpp", shlex.join(words)))
        line = f"echo {shlex.quote(f'FROM ./{name}.gguf')} > Modelfile && ollama create {shlex.quote(name)}"
        made.append(Use("Ollama", line))
    return made


def why_not_vllm(plan: Adapting, family: str, task: str) -> str:
    """Why vLLM cannot serve an adapter beside its base; empty where it can."""
    if plan.lora.saved_rank > VLLM_RANKS[-1]:
        return f"its rank is above {VLLM_RANKS[-1]}"
    return _why_not(plan, task) or ("" if family in VLLM else f"it serves no adapters of {family} models")


def why_not_gguf(plan: Adapting, family: str, task: str) -> str:
    """Why llama.cpp cannot convert an adapter; empty where it can."""
    if plan.lora.use_rslora:
        return "it is rank-stabilised, and llama.cpp scales by alpha / rank"
    return _why_not(plan, task) or (
        "" if family in GGUF else f"its converter is not known to read {family} adapters"
    )


def why_not_merged_gguf(family: str, task: str) -> str:
    """Why llama.cpp cannot convert a whole model; empty where it can."""
    if task != "causal":
        return "it is not a causal model"
    return "" if family in GGUF_MERGED else f"its converter is not known to read {family} models"


def _why_not(plan: Adapting, task: str) -> str:
    """What of an adapter neither tool takes."""
    lora = plan.lora
    reasons: Iterator[str] = (
        why
        for wrong, why in (
            (task != "causal", "it is not a causal model"),
            (lora.use_dora, "it is a DoRA adapter"),
            (bool(lora.modules_to_save), "it trains modules in full (`modules_to_save`)"),
            (lora.bias != "none", "it trains biases"),
            (bool(lora.rank_pattern or lora.alpha_pattern), "its modules differ in rank or alpha"),
            (not _plain_layers(plan), "it adapts more than plain attention and feed-forward layers"),
        )
        if wrong
    )
    return next(reasons, "")


def _plain_layers(plan: Adapting) -> bool:
    if isinstance(plan, Adapted) and plan.modules != len(plan.slots):
        return False
    blocks = (Part.SELF_ATTENTION, Part.FEED_FORWARD)
    return all(slot.kind == "linear" and slot.copies == 1 and slot.part in blocks for slot in plan.slots)


def _changes_more(plan: Plan) -> bool:
    """Whether an adapter changes more than low-rank matrices say: transformers loads those alone."""
    return bool(plan.lora.modules_to_save) or plan.lora.bias != "none"


def _name(place: str) -> str:
    return PurePath(place).name


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
