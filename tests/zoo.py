"""Every text-bearing architecture of the installed transformers, from its own default config.

A default is shrunk in depth where that can be done, since nothing that is asked here depends on
depth but the bands, which six layers have. What cannot be built says why.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

logging.set_verbosity_error()
DEPTH = 6
DEPTHS = [
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "layers",
    "depth",
    "encoder_num_hidden_layers",
    "decoder_num_hidden_layers",
]
BY_LAYER_TYPE = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}
INDEXED = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
# Arguments without which a default config, of that type or for that class, is no model at all;
# those with a dot are set in the nested config once it is made.
NEEDED: dict[str, dict[str, Any]] = {
    "EsmConfig": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "HunYuanDenseV1Config": {"head_dim": 128},
    "HunYuanMoEV1Config": {"head_dim": 128},
    "MinistralConfig": {"head_dim": 128},
    "NemotronConfig": {"num_key_value_heads": 8},
    "Dots1Config": {"n_routed_experts": 8, "n_shared_experts": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 16},
    "AyaVisionConfig": {"vision_config.num_attention_heads": 16},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 8711}},
    "CohereCompassTextConfig": {"rope_parameters": BY_LAYER_TYPE},
    "CohereCompassConfig": {"text_config.rope_parameters": BY_LAYER_TYPE},
    "DbrxConfig": {"attn_config.rope_theta": 10000.0},
    "DeepseekOcr2Config": {"text_config.mlp_layer_types": ["dense"] + ["sparse"] * 31},
    "DiffusionGemmaConfig": {
        "text_config.num_experts": 8,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 512,
    },
    "Emu3Config": {"vocabulary_map": {"<|extra_200|>": 5, "<image>": 6}},
    "Granite4VisionConfig": {"deepstack_layer_map": [[-1, 0], [-2, 3]], "downsample_rate": "1/2"},
    "HunYuanVLConfig": {"text_config.head_dim": 128},
    "MoonshineStreamingConfig": {"num_key_value_heads": 8},
    "Qwen3OmniMoeConfig": {
        "talker_config.text_config.shared_expert_intermediate_size": 512,
        "talker_config.spatial_merge_size": 2,
    },
    "Qwen4ExpTextConfig": INDEXED,
    "Qwen4ExpConfig": {f"text_config.{name}": value for name, value in INDEXED.items()},
    "FastVlmConfig": {"vision_config": {"model_type": "clip_vision_model"}},  # its own needs timm
    "PerceptionLMConfig": {
        "vision_config": {"model_type": "clip_vision_model"},
        "vision_config.model_args": {"embed_dim": 768},
    },
}


def mappings() -> dict[str, dict[str, Any]]:
    return {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "image and text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "speech": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        "many kinds": getattr(auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),
    }


def classes() -> dict[str, str]:
    """Class name -> model type, each once."""
    found: dict[str, str] = {}
    for table in mappings().values():
        for kind, names in table.items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return found


def shrink(config: Any) -> None:
    """Depths down to six, and every list that runs along one with them; nested configs too."""
    old = {}
    for name in DEPTHS:
        depth = config.__dict__.get(name)
        if isinstance(depth, int) and not isinstance(depth, bool) and depth > DEPTH:
            old[name] = depth
    for name, depth in old.items():
        setattr(config, name, DEPTH)
        for key, value in list(config.__dict__.items()):
            if isinstance(value, list) and len(value) == depth:
                setattr(config, key, value[:DEPTH])
    for value in list(config.__dict__.values()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def made(source: type, settings: dict[str, Any]) -> Any:
    """A config with those settings, the dotted ones in the configs nested in it."""
    config = source(**{name: value for name, value in settings.items() if "." not in name})
    for name, value in settings.items():
        *parents, last = name.split(".")
        if parents:
            holder = config
            for parent in parents:
                holder = getattr(holder, parent)
            setattr(holder, last, value)
    return config


def configs(name: str, kind: str) -> Iterator[Any]:
    """Configs to try for a class: its own, shrunk and whole, then its type's."""
    cls = getattr(transformers, name)
    for source in (cls.config_class, CONFIG_MAPPING[kind]):
        if source is None:
            continue
        for small in (True, False):
            config = made(source, {**NEEDED.get(source.__name__, {}), **NEEDED.get(name, {})})
            if small:
                shrink(config)
            yield config


def build(name: str, kind: str) -> tuple[Any, Any]:
    """(model on the meta device, config). Raises the first error when no config will do."""
    first: BaseException | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for config in configs(name, kind):
                try:
                    with limit(60), torch.device("meta"):
                        return getattr(transformers, name)(config), config
                except Exception as error:
                    first = first or error
        except Exception as error:
            first = first or error
    assert first is not None
    raise first
