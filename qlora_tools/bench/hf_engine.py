"""A checkpoint folder run by transformers: what a user gets without exporting.

Serves fp32 and bf16 folders, as they are or quantized by bitsandbytes while they are loaded, and folders that
bitsandbytes quantized, which transformers loads by their own ``quantization_config``. Imported inside the worker only,
since it brings torch with it at once: the time and memory of that import are measured as such.

On a GPU work is queued and logits are copied to the host, which waits for them: what a caller times has happened.

Axes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.cache_utils import DynamicCache
from transformers.utils.logging import disable_progress_bar

from qlora_tools.checkpoint.reader import read_json
from qlora_tools.errors import CorruptError, MissingError, UsageError
from qlora_tools.live.foreign import load_foreign
from qlora_tools.models.sizes import check_sizes

FACTORY = "qlora_tools.bench.hf_engine:load"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "stored": "auto"}
QUANTIZATIONS = ("nf4", "int8")
#: torch's allocator has one way of growing, so these change nothing here; a setting may name them for any engine.
MEMORY_MODES = ("runtime", "deployed", "lean")


def load(
    path: str,
    *,
    threads: int,
    dtype: str = "stored",
    device: str = "cpu",
    adapter: str | None = None,
    quantize: str | None = None,
    memory: str = "runtime",
    memory_limit: int | None = None,
) -> TransformersEngine:
    """Load a local folder. ``dtype``: ``fp32``, ``bf16``, ``fp16``, or ``stored``, as its config says.

    ``quantize``: ``nf4`` (with double quantization) or ``int8``, by bitsandbytes while a dense folder is loaded; ``dtype`` is then what it computes in.
    ``adapter``: a PEFT folder, put on top by PEFT itself and left unmerged, as a user of PEFT would run it.
    ``memory``: one of :data:`MEMORY_MODES`; ``memory_limit``: the most bytes that torch's allocator may take of a GPU.

    Raises:
        UsageError: a word that is not known, no such device, or a folder that is quantized already. MissingError: no such folder, or no weights in it.
        CorruptError: config.json is not JSON, has sizes that no model has, or names no known dtype; and as :func:`~qlora_tools.live.foreign.load_foreign`.
    """
    config = config_of(path)
    words = loading_words(path, config, threads=threads, dtype=dtype, device=device, quantize=quantize, memory=memory, memory_limit=memory_limit)
    return TransformersEngine(settled(load_foreign(AutoModelForCausalLM, Path(path), config, words), adapter))


def config_of(path: str) -> dict[str, Any]:
    """The config.json of a folder that is to be loaded.

    Raises:
        As :func:`load`.
    """
    place = Path(path) / "config.json"
    if not place.is_file():
        raise MissingError(f"{path} holds no config.json", hint="give a model folder")
    config = read_json(place)
    check_sizes(config, place)
    return config


def loading_words(
    path: str,
    config: Mapping[str, Any],
    *,
    threads: int,
    dtype: str,
    device: str,
    quantize: str | None = None,
    memory: str = "runtime",
    memory_limit: int | None = None,
) -> dict[str, Any]:
    """What a class's ``from_pretrained`` is told, for options as :func:`load` takes them; torch is set up on the way.

    Raises:
        As :func:`load`.
    """
    for name, word, words in (("dtype", dtype, DTYPES), ("quantize", quantize, (None, *QUANTIZATIONS)), ("memory", memory, MEMORY_MODES)):
        if word not in words:
            raise UsageError(f"{name} {word!r}: expected one of {', '.join(str(known) for known in words if known)}")
    _prepare_device(device, memory_limit)
    torch.set_num_threads(threads)
    disable_progress_bar()
    quantization = {} if quantize is None else {"quantization_config": _quantization(quantize, dtype, Path(path), config)}
    trust = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    return {"dtype": DTYPES[dtype], "device_map": {"": device}, **trust, **quantization}


def settled(model: Any, adapter: str | None = None) -> Any:
    """A model that was just loaded, ready to run: a PEFT folder on top, and every copy to the device arrived."""
    if adapter is not None:
        from peft import PeftModel

        # the inner model: PEFT's wrapper adds nothing once the layers are in place, and takes other keywords
        model = PeftModel.from_pretrained(model, adapter, is_trainable=False).get_base_model()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # loading ends when the copies have arrived
    return model.eval()


def _prepare_device(device: str, memory_limit: int | None) -> None:
    """Raises:
    UsageError: torch has no such device, or a limit that it cannot keep.
    """
    kind = device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device `{device}`: this torch ({torch.__version__}) finds no CUDA device", hint="run `qlt doctor`")
    if memory_limit is None:
        return
    if kind != "cuda" or memory_limit < 1:
        raise UsageError(f"memory_limit is {memory_limit} bytes on device `{device}`: expected 1 or more, on a GPU")
    number = torch.device(device).index or 0
    total = torch.cuda.get_device_properties(number).total_memory
    torch.cuda.set_per_process_memory_fraction(min(memory_limit / total, 1.0), number)


def _quantization(name: str, dtype: str, folder: Path, config: Mapping[str, Any]) -> BitsAndBytesConfig:
    """Raises:
    UsageError: the folder is quantized already. CorruptError: config.json names no dtype that is known.
    """
    if "quantization_config" in config:
        raise UsageError(f"{folder} is quantized already, so it cannot be quantized to {name}", hint="leave `quantize` out, or give the dense model")
    if name == "int8":
        # it says with every product that inputs are cast to fp16; writing that would be timed
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    compute = {str(known).removeprefix("torch."): known for known in DTYPES.values()}.get(str(stored)) if dtype == "stored" else DTYPES[dtype]
    if compute is None:
        raise CorruptError(f"{folder / 'config.json'} says dtype {stored!r}", hint="give `dtype`")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)


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
    """Bytes of all weights as they lie in memory, shared storages once; quantization constants that bitsandbytes keeps beside a weight included.

    On the CPU bitsandbytes packs 4-bit weights anew with their first use: count before it.
    """
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
    for module in model.modules():
        count(getattr(getattr(module, "state", None), "SCB", None))  # where 8-bit layers keep their scales after the first use
    for buffer in model.buffers():
        count(buffer)
    return sum(seen.values())
