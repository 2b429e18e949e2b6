"""Tiny, randomly initialised instances of transformers' causal language models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

VOCABULARY = 96
TOKENS = 12
MOST_PARAMETERS = 400_000_000  # as many as a vision tower may bring; larger is not meant to run


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# What sizes are called, and what they become where they are larger.
_SIZES: dict[str, Any] = {
    **_all("hidden_size d_model n_embd dim embed_dim model_dim word_embed_proj_dim emb_dim", 64),
    **_all("embedding_size lru_width attention_hidden_size hidden_dim hidden_size_global", 64),
    **_all("cross_attention_hidden_size intermediate_size ffn_dim d_ff n_inner d_inner dim_ff", 64),
    **_all("ffn_hidden_size decoder_ffn_dim encoder_ffn_dim moe_intermediate_size", 64),
    **_all("shared_expert_intermediate_size expert_ffn_hidden_size mlp_hidden_size", 64),
    **_all("moe_shared_expert_intermediate_size shared_intermediate_size", 64),
    **_all("ffn_intermediate_size dense_intermediate_size intermediate_size_mlp", 64),
    **_all("feed_forward_size input_linear_size", 64),
    **_all("num_attention_heads n_head n_heads num_heads encoder_attention_heads", 4),
    **_all("decoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads", 4),
    **_all("num_key_value_heads num_kv_heads n_kv_heads kv_n_heads", 2),
    **_all("head_dim attention_head_dim kv_channels d_kv v_head_dim qk_nope_head_dim dim_head", 16),
    **_all("swa_head_dim global_head_dim q_lora_rank kv_lora_rank", 16),
    **_all("qk_rope_head_dim rotary_dim", 8),
    **_all("qk_head_dim", 24),
    **_all("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers", 2),
    **_all("num_decoder_layers num_encoder_layers num_blocks", 2),
    **_all("num_experts n_routed_experts num_local_experts moe_num_experts num_routed_experts", 4),
    **_all("num_experts_per_tok moe_topk top_k num_experts_per_token moe_k moe_top_k", 2),
    **_all("experts_per_token", 2),
    **_all("n_group topk_group num_expert_group", 1),
    **_all("num_kv_shared_layers hidden_size_per_layer_input", 0),
    **_all("vocab_size vocab_size_per_layer_input", VOCABULARY),
}
_WHERE_NONE = {
    "head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_FLAGS = {"use_cache": False, "is_decoder": True, "add_cross_attention": False}

_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_ZAMBA = {
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "hybrid", "hybrid"],
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}

# What the names above do not reach.
_OF_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "CohereCompassForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE),
    },
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "Dots3NoteForCausalLM": {"per_layer_config": {}},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16},
    "ReformerModelWithLMHead": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": _ZAMBA,
    "Zamba2ForCausalLM": {**_ZAMBA, "hybrid_layer_ids": [1, 2]},
}


def architectures() -> dict[str, type[PreTrainedModel]]:
    """Every class that ``AutoModelForCausalLM`` may make, by name."""
    found: dict[str, type[PreTrainedModel]] = {}
    for classes in MODEL_FOR_CAUSAL_LM_MAPPING.values():
        for kind in classes if isinstance(classes, tuple) else (classes,):
            found[kind.__name__] = kind
    return dict(sorted(found.items()))


def tiny_config(kind: type[PreTrainedModel], **changes: Any) -> PretrainedConfig:
    """``changes`` are settings of the text model, where a model has several parts."""
    own = _OF_ARCHITECTURE.get(kind.__name__, {})
    config = _shrunk(kind.config_class, **own)
    if config.get_text_config() is config:
        return _shrunk(kind.config_class, **{**own, **changes})
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    return config


def tiny_model(kind: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    """In float32, its head such that logits are of size 1 to 10, for caps and scales to show."""
    config = tiny_config(kind, **changes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"expected at most {MOST_PARAMETERS} parameters, got {size}")
    torch.manual_seed(0)
    model = kind(config).eval().float()
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Module):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens() -> torch.Tensor:
    """``[1, TOKENS]``, none of them special."""
    return torch.arange(5, 5 + TOKENS)[None]


def _shrunk(kind: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    default = vars(kind())
    arguments = {name: _smaller(name, value) for name, value in default.items()}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if "kv_lora_rank" in default:  # latent attention has no grouped heads
        arguments["num_key_value_heads"] = 4
        if "head_dim" in default:
            arguments["head_dim"] = arguments["qk_rope_head_dim"]
    return kind(**{**arguments, **changes})


def _smaller(name: str, value: Any) -> Any:
    """What an argument becomes; None where it is left to its default."""
    if isinstance(value, PretrainedConfig):
        return _shrunk(type(value))
    if isinstance(value, bool):
        return _FLAGS.get(name)
    if isinstance(value, int) and name in _SIZES:
        return min(value, _SIZES[name])
    if value is None:
        return _WHERE_NONE.get(name)
    if name.endswith(("_token_id", "_token_index")):
        last = VOCABULARY - 1
        return [min(v, last) for v in value] if isinstance(value, list) else min(value, last)
    return None
