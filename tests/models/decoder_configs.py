"""Configs that the tests of decoder descriptions start from, and what transformers makes of a family."""

from __future__ import annotations

from typing import Any

#: Families of one feed-forward per layer whose graphs are drawn node by node.
FAMILIES = [
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text"),
    *("smollm3", "olmo2", "olmo3", "granite", "seed_oss", "starcoder2", "gpt2"),
]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
LLAMA: dict[str, Any] = {
    **SIZES,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A small config.json of ``family`` as transformers writes it."""
    return hf_config(family, **changes).to_dict() | {"architectures": [architecture_of(family)]}


def hf_config(family: str, **changes: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes = {key: value for key, value in SIZES.items() if family != "gpt2" or key not in ("num_key_value_heads", "intermediate_size")}
    return CONFIG_MAPPING[family](**{**sizes, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **changes})


def architecture_of(family: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found: str = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return found
