"""A tiny model of every decoder family and its options, and how their exports are run beside transformers."""

from __future__ import annotations

from typing import Any

import numpy as np

from qlora_tools.export.runtime.session import DecoderSession

GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 24, "num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA3 = {"head_dim": 16, "query_pre_attn_scalar": 24, "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 0.5}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "factor": 4.0,
}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-grouping": ("llama", {"num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-sizes": (
        "llama",
        {"hidden_size": 57, "intermediate_size": 75, "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 101},
    ),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    "llama-3.1-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-window-above-first-layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied-biased": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 5, "tie_word_embeddings": True}),
    "phi3-half-rotated": ("phi3", {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": HALF}),
    "phi3-longrope-short": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "phi3-longrope-long": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8}),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma-legacy-activation": ("gemma", {"head_dim": 16, "hidden_act": "gelu", "attention_bias": True}),
    "gemma2": ("gemma2", {**GEMMA2, "sliding_window": 40, "tie_word_embeddings": True}),
    "gemma2-window": ("gemma2", {**GEMMA2, "sliding_window": 5}),
    "gemma2-no-caps": ("gemma2", {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {**GEMMA3, "sliding_window": 40}),
    "gemma3-window-tied": ("gemma3_text", {**GEMMA3, "sliding_window": 5, "tie_word_embeddings": True, "final_logit_softcapping": 3.0}),
    "gemma3-scaled-rope": ("gemma3_text", {**GEMMA3, "rope_parameters": GEMMA3_ROPE}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "smollm3-untied": ("smollm3", {"no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True}),
    "olmo2": ("olmo2", {}),
    "olmo2-tied": ("olmo2", {"tie_word_embeddings": True, "attention_bias": True}),
    "olmo3": ("olmo3", {"num_hidden_layers": 3, "sliding_window": 5, "layer_types": MIXED}),
    "granite": ("granite", GRANITE),
    "granite-tied-biased": ("granite", {**GRANITE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "seed-oss": ("seed_oss", {"head_dim": 16, "attention_out_bias": True}),
    "starcoder2": ("starcoder2", {"tie_word_embeddings": True}),
    "starcoder2-window-unbiased": ("starcoder2", {"sliding_window": 5, "use_bias": False}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "gpt2-narrow-heads": ("gpt2", {"num_attention_heads": 8, "n_inner": 80}),
    "gpt2-exact-gelu": ("gpt2", {"activation_function": "gelu"}),
}
PROMPT, STEPS = 11, 3


def run(folder, ids_BT):
    """Logits [B, prompt + 1 + steps, V]: prompt scored at once, then prompt and single steps over a shared past."""
    session = DecoderSession(folder, threads=1)
    pieces = [session.score(ids_BT[:, :PROMPT]), session.prefill(ids_BT[:, :PROMPT])[:, None]]
    pieces += [session.decode(ids_BT[:, step])[:, None] for step in range(PROMPT, PROMPT + STEPS)]
    session.close()
    return np.concatenate(pieces, axis=1)


def expected(tiny, ids_BT):
    logits = tiny.logits(ids_BT)
    return np.concatenate([logits[:, :PROMPT], logits[:, PROMPT - 1 :]], axis=1)
