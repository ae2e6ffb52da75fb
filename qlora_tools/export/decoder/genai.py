"""``genai_config.json``: how onnxruntime-genai finds its way round the graph.

Families that onnxruntime-genai (0.18) knows by name go by it; it treats every other as ``decoder``, its plain decoder with a past per layer.
``gpt2`` is among the others: that name there means an older layout, keys and values in one tensor and positions as an input. Search settings
are the model's own generation settings where it has any, and neutral ones elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_tools.checkpoint.reader import read_json
from qlora_tools.errors import CorruptError
from qlora_tools.export.decoder.export import MODEL_FILE, DecoderExport
from qlora_tools.export.decoder.matrices import Mixture
from qlora_tools.export.formats.normal_floats import NormalFloats
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
    """Write the file beside the graph. Reads ``generation_config.json`` in ``folder`` where there is one. Raises as :func:`check_genai_config`."""
    (folder / FILE_NAME).write_bytes(canonical_json(genai_config(export, config, _generation(folder))))


def check_genai_config(export: DecoderExport, config: Mapping[str, Any], folder: Path) -> None:
    """Look, before the graph is made, whether the file can be written with the ``generation_config.json`` of the model in ``folder``.

    Raises:
        CorruptError: that file is not a JSON object, or it or ``config`` holds a setting that is none; the message names the key.
    """
    genai_config(export, config, _generation(folder))


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def genai_config(export: DecoderExport, config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The file's content. ``generation`` are the settings of generation_config.json; token ids there win over config.json's.

    Raises:
        CorruptError: a token id or a search setting is of another kind, or not finite.
    """
    decoder = export.decoder

    def token(name: str, otherwise: Any) -> Any:
        found = generation.get(name, config.get(name))
        return otherwise if found is None else _token(name, found)

    end = token("eos_token_id", 0)
    padding = token("pad_token_id", end[0] if isinstance(end, list) else end)
    search = {name: value if generation.get(name) is None else _setting(name, generation[name]) for name, value in _NEUTRAL.items()}
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


def _token(name: str, found: Any) -> Any:
    if (isinstance(found, list) and found and all(type(item) is int for item in found)) or type(found) is int:
        return found
    raise CorruptError(
        f"`{name}` is {str(found)[:60]}, expected a token id or a list of them", hint="repair generation_config.json, or config.json where that has none"
    )


def _setting(name: str, found: Any) -> Any:
    word = name == "early_stopping" and isinstance(found, str)  # transformers knows "never"
    if word or isinstance(found, int) or (isinstance(found, float) and math.isfinite(found)):
        return found
    raise CorruptError(f"generation_config.json: `{name}` is {str(found)[:60]}, expected a finite number or true or false", hint="repair it")


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

    Graph capture is not asked for here: onnxruntime-genai fails where it is refused, and our own runtime tries it unasked. It is forbidden where a replayed
    step would compute something else (:func:`_replays`).
    """
    if export.target.provider != "cuda":
        return []
    return [{"cuda": {"enable_skip_layer_norm_strict_mode": "1", **({} if _replays(export) else {"enable_cuda_graph": "0"})}}]


def _replays(export: DecoderExport) -> bool:
    """Whether a captured step may be replayed. Not where experts are drawn one by one: which rows each gets (``NonZero``) is known only on the host, and
    differs from step to step. Nor with ``MatMulBnb4``: every run copies its table of 16 levels from the host's stack, which is another by the time of a replay
    (``MatMulBnb4::ComputeInternal``, ``SetBnbQuantMap``).
    """
    one_by_one = any(isinstance(layer.feed, Mixture) and not layer.feed.together for layer in export.layout.layers)
    return not one_by_one and not any(isinstance(matrix.format, NormalFloats) for matrix in export.layout.matrices())
