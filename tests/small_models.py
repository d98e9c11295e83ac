"""Small random models of every causal class of the installed transformers, from its default configuration."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

LAYERS = 4
# By the names that configurations use. What is derived of these (head_dim, lists of layers) follows from them.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), 64),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "d_head", "attention_head_size", "kv_channels"), 8),
    **dict.fromkeys(("global_head_dim",), 8),
    **dict.fromkeys(("rotary_dim",), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dim_ff", "dff", "d_inner", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("dense_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "zero_expert_num"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "index_head_dim", "linear_head_dim"), 8),
    "qk_head_dim": 16,
    **dict.fromkeys(("index_n_heads", "o_groups", "linear_num_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 4),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size", "window_size"), 4),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}


ROPE_EACH = {
    kind: {"rope_type": "default", "rope_theta": theta}
    for kind, theta in (("sliding_attention", 1e4), ("full_attention", 1e6))
}
MLA = {"num_key_value_heads": 4}  # latent keys: a head each
GEMMA_3N = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
GEMMA_4 = {**GEMMA_3N, "global_head_dim": 16}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "split_ngram_parts": 2,
}
HYBRID = ["linear_attention", "hybrid"] * 2
# What the table above does not give: numbers that have to fit each other.
MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": MLA | {"num_experts_per_tok": 2, "topk_method": "greedy"},
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), MLA),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), MLA),
    **dict.fromkeys(("dots3_note_text",), MLA | {"use_sliding_window": False}),
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": ROPE_EACH},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8},
    "gemma3n_text": GEMMA_3N,
    "gemma4_text": GEMMA_4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "gemma4_unified_text": GEMMA_4,
    "qwen4_exp_text": QWEN4,
    "rwkv": {"attention_hidden_size": 32},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local"] * 4,
    },
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "zamba": {"layers_block_type": HYBRID},
    "zamba2": {"layers_block_type": HYBRID},
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(model_type: str, **more: Any) -> PreTrainedConfig:
    """A configuration of a few narrow layers."""
    return _small(CONFIG_MAPPING[model_type], more)


def _small(kind: Any, more: dict[str, Any]) -> Any:
    default = kind()
    known = set(default.to_dict()) | set(default.attribute_map) | set(getattr(kind, "__dataclass_fields__", ()))
    sizes = {name: value for name, value in SMALL.items() if name in known and _of(default, name) is not None}
    parts = {name: _small(type(part), {}) for name in known if isinstance(part := _of(default, name), PreTrainedConfig)}
    return kind(**{**sizes, **parts, **MORE.get(kind.model_type, {}), **more})


def _of(config: PreTrainedConfig, name: str) -> Any:
    """A setting; 0 for one that has a value for each layer."""
    try:
        return getattr(config, name)
    except Exception:
        return 0


def small_model(config: PreTrainedConfig, seed: int = 0) -> Any:
    """A model of random weights, none of which is a constant: a norm that is taken for another one is seen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model
