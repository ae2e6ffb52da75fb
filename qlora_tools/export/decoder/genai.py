"""``genai_config.json``: how onnxruntime-genai finds its way round the graph.

Families that onnxruntime-genai (0.18) knows by name go by it; it treats every other as ``decoder``, its plain decoder with a past per layer.
``gpt2`` is among the others: that name there means an older layout, keys and values in one tensor and positions as an input. Search settings
are the model's own generation settings where it has any, and neutral ones elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_tools.export.decoder.export import MODEL_FILE, DecoderExport
from qlora_tools.export.decoder.matrices import Mixture
from qlora_tools.export.schemes import Scheme
from qlora_tools.manifest import canonical_json

FILE_NAME = "genai_config.json"
_NAMED = frozenset(("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"))
_NEUTRAL = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def write_genai_config(export: DecoderExport, config: Mapping[str, Any], folder: Path) -> None:
    """Write the file beside the graph. Reads ``generation_config.json`` in ``folder`` where there is one."""
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    (folder / FILE_NAME).write_bytes(canonical_json(genai_config(export, config, settings)))


def genai_config(export: DecoderExport, config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The file's content. ``generation`` are the settings of generation_config.json; token ids there win over config.json's."""
    decoder = export.decoder

    def token(name: str, otherwise: Any) -> Any:
        found = generation.get(name, config.get(name))
        return otherwise if found is None else found

    end = token("eos_token_id", 0)
    padding = token("pad_token_id", end[0] if isinstance(end, list) else end)
    search = {name: generation[name] if generation.get(name) is not None else value for name, value in _NEUTRAL.items()}
    return {
        "model": {
            "bos_token_id": token("bos_token_id", 0),
            "context_length": decoder.max_positions,
            "decoder": {
                "filename": MODEL_FILE,
                "head_size": decoder.head_size,
                "hidden_size": decoder.hidden,
                "inputs": {
                    "attention_mask": "attention_mask",
                    "input_ids": "input_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": decoder.layers,
                "num_key_value_heads": decoder.kv_heads,
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
                "session_options": {"log_id": "onnxruntime-genai", **session_entries(export.scheme), "provider_options": provider_options(export)},
            },
            "eos_token_id": end,
            "pad_token_id": padding,
            "type": decoder.model_type if decoder.model_type in _NAMED else "decoder",
            "vocab_size": decoder.vocab,
        },
        "search": {**search, "max_length": decoder.max_positions, "past_present_share_buffer": not export.target.standard},
    }


def session_entries(scheme: Scheme) -> dict[str, str]:
    """Config entries that the graph wants of a session. On CUDA: weights outside the arena, which would round their room up, and the tensor-core
    kernels for 4 and 8 bits, which the runtime leaves off by itself. Names that onnxruntime-genai does not know it hands on as config entries.
    """
    if scheme.target.provider != "cuda":
        return {}
    entries = {"session.use_device_allocator_for_initializers": "1"}
    return entries if scheme.dense else {**entries, "ep.cuda.fpa_intb_gemm": "1"}


def provider_options(export: DecoderExport) -> list[dict[str, dict[str, str]]]:
    """One record per provider, the preferred first. The strict mode sums the squares of a norm in fp32; without it 16-bit graphs sum in 16 bits.

    Graph capture is not asked for here: onnxruntime-genai fails where it is refused, and our own runtime tries it unasked. Where experts are drawn one by
    one it is forbidden: which rows each gets (``NonZero``) is known only on the host, and differs from step to step.
    """
    if export.target.provider != "cuda":
        return []
    feeds = (layer.feed for layer in export.layout.layers)
    one_by_one = any(isinstance(feed, Mixture) and not feed.together for feed in feeds)
    return [{"cuda": {"enable_skip_layer_norm_strict_mode": "1", **({"enable_cuda_graph": "0"} if one_by_one else {})}}]
