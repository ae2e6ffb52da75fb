"""A checkpoint folder run by transformers: what a user gets without exporting.

Serves fp32 and bf16 folders and folders that bitsandbytes quantized, which transformers loads by their own
``quantization_config``. Imported inside the worker only, since it brings torch with it at once: the time and memory
of that import are measured as such.

Axes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from qlora_tools.errors import MissingError, UsageError

FACTORY = "qlora_tools.bench.hf_engine:load"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "stored": "auto"}


def load(path: str, *, threads: int, dtype: str = "stored", device: str = "cpu", adapter: str | None = None) -> TransformersEngine:
    """Load a local folder. ``dtype``: ``fp32``, ``bf16``, ``fp16``, or ``stored``, as its config says.

    ``adapter``: a PEFT folder, put on top by PEFT itself and left unmerged, as a user of PEFT would run it.

    Raises:
        UsageError, MissingError: unknown dtype; no such folder.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if not (Path(path) / "config.json").is_file():
        raise MissingError(f"{path} holds no config.json", hint="give a model folder")
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], device_map={"": device}, local_files_only=True)
    if adapter is not None:
        from peft import PeftModel

        # the inner model: PEFT's wrapper adds nothing once the layers are in place, and takes other keywords
        model = PeftModel.from_pretrained(model, adapter, is_trainable=False).get_base_model()
    return TransformersEngine(model.eval())


class TransformersEngine:
    """An :class:`~qlora_tools.bench.engine.Engine` over a loaded causal language model. The past grows as ``generate`` grows it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    @torch.inference_mode()
    def prefill(self, ids_BT: NDArray[np.int64]) -> torch.Tensor:
        self._cache = DynamicCache(config=self._model.config)
        return self._last_logits(ids_BT)

    @torch.inference_mode()
    def decode(self, tokens_B: NDArray[np.int64]) -> torch.Tensor:
        if self._cache is None:
            raise UsageError("decode before prefill: there is no past to continue")
        return self._last_logits(tokens_B[:, None])

    @torch.inference_mode()
    def score(self, ids_BT: NDArray[np.int64]) -> torch.Tensor:
        logits_BTV: torch.Tensor = self._model(input_ids=self._tensor(ids_BT), use_cache=False).logits
        return logits_BTV.cpu()

    def info(self) -> Mapping[str, Any]:
        config = self._model.config
        facts = {
            "runtime": "transformers",
            "device": str(self._model.device),
            "vocab_size": int(config.vocab_size),
            "max_length": int(config.max_position_embeddings) if getattr(config, "max_position_embeddings", None) else None,
            "weights_bytes": stored_bytes(self._model),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "quantization": quantization_method(config),
        }
        return {name: value for name, value in facts.items() if value is not None}

    def close(self) -> None:
        self._model = self._cache = None

    def _tensor(self, ids: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids)).to(self._model.device)

    def _last_logits(self, ids_BT: NDArray[np.int64]) -> torch.Tensor:
        output = self._model(input_ids=self._tensor(ids_BT), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        last_BV: torch.Tensor = output.logits[:, -1].cpu()
        return last_BV


def quantization_method(config: Any) -> str | None:
    """``bitsandbytes`` or another method's name, ``None`` for a dense checkpoint."""
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights as they lie in memory, shared storages once; quantization constants that bitsandbytes keeps beside a weight included."""
    seen: dict[int, int] = {}

    def count(tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()

    for parameter in model.parameters():
        count(parameter.data)
        count(getattr(parameter, "SCB", None))
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            count(getattr(state, "absmax", None))
            count(getattr(state, "code", None))
            count(getattr(state, "offset", None))
            state = getattr(state, "state2", None)
    for buffer in model.buffers():
        count(buffer)
    return sum(seen.values())
