"""Tiny real models, one of each main family: four layers, 32 wide, with the demo's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from lorafit import demo

VOCABULARY = 896  # the demo's tokens, and room for a mask token


@dataclass(frozen=True)
class Family:
    """How to make a tiny instance: the config class, its arguments, the model class."""

    config: str
    model: str
    arguments: dict[str, Any]
    task: str = "causal"


LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Any] = {**LLAMA_LIKE, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
GPT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 130, "pad_token_id": 0,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", LLAMA_LIKE),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", LLAMA_LIKE),
    "gemma2": Family("Gemma2Config", "Gemma2ForCausalLM", LLAMA_LIKE),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", {**LLAMA_LIKE, "num_key_value_heads": 4}),
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", GPT_LIKE),
    "gpt_neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", {**LLAMA_LIKE, "num_key_value_heads": 4}),
    "falcon": Family(
        "FalconConfig",
        "FalconForCausalLM",
        {
            k: v
            for k, v in LLAMA_LIKE.items()
            if k not in ("head_dim", "intermediate_size", "num_key_value_heads")
        },
    ),
    "mpt": Family(
        "MptConfig",
        "MptForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": 4,
            "n_heads": 4,
            "max_seq_len": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bloom": Family(
        "BloomConfig",
        "BloomForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 4,
            "n_head": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": Family(
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bert": Family("BertConfig", "BertForMaskedLM", BERT_LIKE, "masked"),
    "roberta": Family("RobertaConfig", "RobertaForMaskedLM", BERT_LIKE, "masked"),
    "distilbert": Family(
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 4,
            "n_heads": 4,
            "max_position_embeddings": 130,
            "pad_token_id": 0,
        },
        "masked",
    ),
    "modernbert": Family(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {**BERT_LIKE, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        "masked",
    ),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 4,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        "seq2seq",
    ),
    "bart": Family(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        "seq2seq",
    ),
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", MOE),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **{k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"},
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **LLAMA_LIKE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "jamba": Family(
        "JambaConfig",
        "JambaForCausalLM",
        {
            **{k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"},
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            "mamba_d_conv": 2,
            "mamba_expand": 1,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **MOE,
            "shared_expert_intermediate_size": 24,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "llava": Family(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**LLAMA_LIKE, "model_type": "llama"},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "projection_dim": 16,
            },
            "image_token_index": 890,
        },
    ),
}


def build_config(name: str, **more: Any) -> transformers.PreTrainedConfig:
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**{**family.arguments, **more})
    config.architectures = [family.model]
    return config


def build_model(name: str, seed: int = 0, **more: Any) -> transformers.PreTrainedModel:
    """A tiny model with random weights large enough that what an adapter does shows."""
    torch.manual_seed(seed)
    model = getattr(transformers, FAMILIES[name].model)(build_config(name, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
    return model.eval()


def reads_layer_0(monkeypatch: Any) -> None:
    """From here on the fourth layer of a Llama reads what its first one left behind."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    plain, left = LlamaDecoderLayer.forward, {}

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = plain(self, hidden_states, *args, **kwargs)
        if self.self_attn.layer_idx == 0:
            left["state"] = out
        return out + left["state"].mean() if self.self_attn.layer_idx == 3 else out

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)


@lru_cache
def tokenizer(masked: bool = False) -> PreTrainedTokenizerFast:
    """The demo's tokenizer; for masked models with a mask token and a begin and end around a text."""
    found = PreTrainedTokenizerFast.from_pretrained(str(demo.MODEL))
    if masked:
        from tokenizers.processors import TemplateProcessing

        found.add_special_tokens({"mask_token": "<|mask|>", "cls_token": "<|begin|>", "sep_token": "<|end|>"})
        found.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 2)]
        )
    return found


def save_model(name: str, folder: Path, **more: Any) -> Path:
    """A tiny model's folder, with weights and tokenizer, as a person would have it."""
    build_model(name, **more).save_pretrained(folder)
    tokenizer(FAMILIES[name].task == "masked").save_pretrained(folder)
    return folder
