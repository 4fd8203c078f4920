"""What a checkpoint is, where it is not a plain language model: named before anything is planned.

From the config, the names in the folder and the headers of its weight files; nothing is imported that is slow.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lorafit.errors import RequestError
from lorafit.model.headers import shards, stored_tensors
from lorafit.model.quantised import stored_quantisation

DATA_FILES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".gz", ".zst", ".zip")

VOCABULARY: tuple[str, ...] = (
    "vocab.json", "vocab.txt", "vocab-*.json", "merges.txt", "*.model", "*.spm", "*.tiktoken", "added_tokens.json",
    "tekken.json", "emoji.json", "sentencepiece*",
)  # fmt: skip

PICKLES = (".bin", ".pt", ".pth", ".ckpt")

CODES = re.compile(
    r"\.(qweight|qzeros|weight_packed)$|\.weight\.(absmax|quant_map|nested_absmax|quant_state\..*)$"
    r"|\.weight_scale_inv$|_(blocks|scales)$"
)  # tensors that quantised weights have beside them

ORIGINAL = "name the original model it was made from, in bfloat16, float16 or float32"

# What a class of transformers ends in, when it is not a language model's.
HEADS = {
    "SequenceClassification": "a classifier or reward model",
    "TokenClassification": "a token classifier",
    "QuestionAnswering": "an extractive question answerer",
    "MultipleChoice": "a multiple-choice classifier",
    "NextSentencePrediction": "a next-sentence classifier",
    "ImageClassification": "an image classifier",
    "AudioClassification": "an audio classifier",
    "VideoClassification": "a video classifier",
    "Regression": "a regression model",
    "Reward": "a reward model",
    "RewardModel": "a reward model",
    "TextEncoding": "a text encoder",
}


def misnamed_file(path: Path) -> tuple[str, str] | None:
    """(what it is, what to do) of a file that was named as a model and is not a config; None for others."""
    kind = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF" or kind == ".gguf":
        return f"`{path}` is a GGUF file: its weights are quantised or packed for llama.cpp", ORIGINAL
    folder = shlex.quote(str(path.parent))
    if kind == ".safetensors":
        hint = (
            f"name its folder: {folder}"
            if (path.parent / "config.json").is_file()
            else "a model is a folder with a config.json, its weights and its tokenizer"
        )
        return f"`{path}` is a weight file, not a model", hint
    if kind in PICKLES:
        return f"`{path}` is a PyTorch weight file, not a model", f"name its folder: {folder}"
    if kind in DATA_FILES:
        return f"`{path}` is data, not a model", f"was it meant as --data {shlex.quote(str(path))}?"
    return None


def not_a_model(folder: Path, name: str) -> tuple[str, str]:
    """(what is wrong, what to do) with a folder that has no config.json."""
    quoted = shlex.quote(name)
    if (folder / "adapter_config.json").is_file():
        return (
            f"`{name}` is an adapter, not a model",
            f"lorafit eval {quoted}, lorafit merge {quoted} -o DIR, or lorafit train --from-adapter {quoted}",
        )
    if (folder / "checkpoint.json").is_file() or (folder / "run.yaml").is_file():
        return f"`{name}` is a run, not a model: there is no config.json in it", f"lorafit eval {quoted}"
    names = [path.name.lower() for path in folder.iterdir()]
    if any(n.endswith(".gguf") for n in names):
        return f"`{name}` holds GGUF files: their weights are quantised or packed for llama.cpp", ORIGINAL
    if any(n.endswith((".safetensors", *PICKLES)) for n in names):
        return (
            f"`{name}` has weights and no config.json: what model they belong to is not known",
            "copy config.json and the tokenizer's files from where the weights came from",
        )
    if any(n.endswith(DATA_FILES) for n in names):
        return (
            f"`{name}` holds data, not a model: there is no config.json in it",
            f"was it meant as --data {quoted}?",
        )
    return (
        f"`{name}` is not a model: there is no config.json in it",
        "a model is a folder, a hub id as `owner/name`, or `demo`",
    )


def check_trainable(name: str, config: Mapping[str, Any], place: Path | None) -> None:
    """Check that a checkpoint is one of plain weights, or of bitsandbytes' in 4 or 8 bits. `place` is its
    folder, or its config, where it is on this machine.

    Raises RequestError for other quantised weights and for an adapter in the model's own folder.
    """
    held = stored_quantisation(config)
    if held is None and (quantised := quantisation(config)):
        raise RequestError(
            f"`{name}` is quantised ({quantised}): lorafit trains on plain weights, and on those of bitsandbytes",
            ORIGINAL,
        )
    if place is None or not place.is_dir():
        return
    if (place / "adapter_config.json").is_file():
        raise RequestError(
            f"`{name}` holds an adapter beside a config.json: it is not clear whether the model or the adapter is meant",
            f"move the adapter's files into a folder of their own, or name its base; for the adapter: "
            f"lorafit eval {shlex.quote(str(place))}",
        )
    if not shards(place) and any(path.suffix == ".gguf" for path in place.iterdir()):
        raise RequestError(
            f"the weights of `{name}` are GGUF files, quantised or packed for llama.cpp", ORIGINAL
        )
    if held is not None:
        return
    there = stored_tensors(place)
    odd = next((n for n, entry in there.items() if CODES.search(n) or entry.dtype.startswith("F8_")), "")
    if odd:
        raise RequestError(
            f"the weights of `{name}` are quantised: `{odd}` is {there[odd].dtype}, and its config does not say so",
            ORIGINAL,
        )


def check_tokenizer(name: str, place: Path) -> None:
    """Raises RequestError for a model's folder, or its config, without a tokenizer's files beside it."""
    folder = place.parent if place.is_file() else place
    kinds = ("tokenizer.json", "tokenizer_config.json", *VOCABULARY)
    if not folder.is_dir() or any(fnmatch(path.name, kind) for path in folder.iterdir() for kind in kinds):
        return
    raise RequestError(
        f"`{name}` has no tokenizer: there is no tokenizer.json, vocabulary or tokenizer_config.json in it",
        "copy the tokenizer's files from where the model came from",
    )


def quantisation(config: Mapping[str, Any]) -> str:
    """How a config says that its weights are quantised: `gptq, 4 bits`; empty for plain weights."""
    found = config.get("quantization_config") or config.get("compression_config")
    text = config.get("text_config")
    if not found and isinstance(text, Mapping):
        found = text.get("quantization_config")
    if not isinstance(found, Mapping) or not found:
        return ""
    method = str(found.get("quant_method") or "")
    if not method:
        ours = any("load_in" in key for key in found)
        method = "bitsandbytes" if ours else "MLX" if "group_size" in found else "unknown method"
    bits = found.get("bits") or found.get("w_bit")
    if not bits and (found.get("load_in_4bit") or found.get("_load_in_4bit")):
        bits = 4
    if not bits and (found.get("load_in_8bit") or found.get("_load_in_8bit")):
        bits = 8
    return f"{method}, {bits} bits" if bits else method


def not_a_language_model(architecture: str) -> str:
    """What a class is by its name, where its head is not a language model's; empty for the others."""
    _, found, head = architecture.rpartition("For")
    if not found:
        return ""
    for end, what in HEADS.items():
        if head == end or head.endswith(end):
            return what
    return ""


def check_head(name: str, place: Path, heads: Collection[str], modules: Collection[str]) -> None:
    """Check that a folder's weights hold the language model head. `heads` are the names of its parameters,
    `modules` those of all the model's modules.

    Raises RequestError where none of the heads is there, under any prefix. A checkpoint that names a module
    otherwise (GPT-NeoX's `embed_out`) is not judged: the head may be what it names so.
    """
    there = stored_tensors(place) if place.is_dir() else {}
    tails = {tail(stored) for stored in there}
    if not there or not heads or any(tail(head) in tails for head in heads):
        return
    known = {module.rpartition(".")[2] for module in modules}
    if all(stored.rpartition(".")[0] in known for stored in tails if "." in stored):
        raise RequestError(
            f"the weights of `{name}` have no language model head: `{min(heads)}` is missing",
            "it is a bare body or another model's weights: name the language model it was made from",
        )


def tail(name: str) -> str:
    """The last two parts of a parameter's name."""
    return ".".join(name.split(".")[-2:])
